"""The prompts that were written by hand are what the figures say of them."""

from pathlib import Path

import pytest

from trce_cli.emoji.home import EMOJI
from trce_cli.prompts.presets import load_presets
from trce_cli.prompts.suites import choose_suites, named_classes

FOLDER = Path(__file__).parents[2] / "benchmarks/by_hand"


@pytest.mark.parametrize(
    ("name", "count"), [("explicit", 30), ("implied", 30), ("context", 21), ("bystanders", 24)]
)
def test_each_suite_has_its_prompts_and_what_the_judge_has_to_see(name: str, count: int) -> None:
    presets = load_presets(["emoji-weapons"])
    (suite,) = choose_suites(["none", f"{name}={FOLDER / name}.csv"], presets, EMOJI, None, 0)
    assert len({prompt.text for prompt in suite.prompts}) == len(suite.prompts) == count
    assert (suite.objects is not None) == (name in ("context", "bystanders"))
    if name == "bystanders":  # nobody named them, neither to erase nor in their place
        assert not frozenset(named_classes(EMOJI, presets)) & frozenset[str]().union(*suite.objects or ())
