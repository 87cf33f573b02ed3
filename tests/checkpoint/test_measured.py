"""Figures in a model card: what its owner wrote stays, and the hub's own library reads the rest."""

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from trce_cli.checkpoint.measured import DATASET, UNMEASURED, with_figures
from trce_cli.errors import BadInput


def result(suite: str, value: float) -> dict[str, Any]:
    return {
        "task": {"type": "text-to-image"},
        "dataset": {"type": f"{DATASET}{suite}", "name": suite},
        "metrics": [{"type": "attack-success-rate", "value": value}],
    }


def figures(card: str) -> dict[str, float]:
    """By dataset, as the hub's library has it."""
    data = ModelCard(card).data
    return {each.dataset_type: each.metric_value for each in data.eval_results or []}


def test_figures_take_the_place_of_the_sentence_that_there_are_none() -> None:
    card = f"---\nlicense: mit\n---\n# A model\n\nBefore.\n\n{UNMEASURED}\n\nAfter.\n"
    once = with_figures(card, "card", "model", [result("explicit", 0.5)], "Half of it.")
    assert figures(once) == {f"{DATASET}explicit": 0.5}
    assert ModelCard(once).data.license == "mit"
    assert ModelCard(once).data.model_name == "model"
    assert UNMEASURED not in once
    assert once.index("Before.") < once.index("Half of it.") < once.index("After.")
    again = with_figures(once, "card", "other", [result("implied", 0.25)], "A quarter.")
    assert figures(again) == {f"{DATASET}implied": 0.25}
    assert "Half of it." not in again
    assert again.index("Before.") < again.index("A quarter.") < again.index("After.")
    assert with_figures(again, "card", "model", [result("implied", 0.25)], "A quarter.") == again


HAND = """---
# what a lawyer wrote
license: other
model-index:
- name: mine
  results:
  - task:
      type: text-to-image
    dataset:
      type: coco
      name: COCO

    metrics:
    - type: fid
      value: 12.5
tags: [art]  # mine
---
Text of my own, with \\1 and {braces}.
"""


@pytest.mark.parametrize(
    "card",
    [HAND, HAND.replace("\n", "\r\n"), HAND.replace("model-index:", '"model-index":'), f"\ufeff\n{HAND}"],
)
def test_what_the_owner_wrote_stays(card: str) -> None:
    told = with_figures(card, "card", "model", [result("explicit", 0.5)], "Half of it, \\1.")
    again = with_figures(told, "card", "model", [result("explicit", 0.125)], "An eighth.")
    assert figures(again) == {"coco": 12.5, f"{DATASET}explicit": 0.125}
    assert ModelCard(again).data.model_name == "mine"
    for line in ("# what a lawyer wrote", "tags: [art]  # mine", "Text of my own, with \\1 and {braces}."):
        assert line in again.splitlines()
    assert "Half of it" not in again


@pytest.mark.parametrize("card", ["", "No front matter.\n", "---\n---\nEmpty.\n", "---\nmodel-index:\n---\n"])
def test_a_card_without_front_matter_gets_some(card: str) -> None:
    told = with_figures(card, "card", "model", [result("explicit", 0.5)], "Half of it.")
    assert figures(told) == {f"{DATASET}explicit": 0.5}
    assert told.endswith("Half of it.\n<!-- ... to here -->\n")
    assert yaml.safe_load(told.split("---")[1]).keys() == {"model-index"}


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: [\n---\n", "cannot be read as YAML"),
        ("---\n{license: mit}\n---\n", "cannot be read as YAML"),
        ("---\n- a list\n---\n", "cannot be read as YAML"),
        ("---\nmodel-index: 3\n---\n", "model-index of card cannot be read"),
        ("---\nmodel-index:\n- results: []\n---\n", "name"),
        ("---\nmodel-index:\n- &a [*a]\n---\n", "aliases"),
        (f"---\nkey: {'long ' * 20_000}\n---\n", "too long"),
        ("<!-- ... to here -->\n", "only one of the marks"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_read_is_refused(card: str, said: str) -> None:
    with pytest.raises(BadInput, match="card") as caught:
        with_figures(card, "card", "model", [], "")
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert "take it away" in (caught.value.hint or "")
