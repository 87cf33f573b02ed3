"""`trce evaluate --card`: the model card of the evaluated folder, and what is refused before any drawing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from trce_cli.checkpoint.measured import DATASET, PICTURE
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import TrceError
from trce_cli.evaluate.card import left, write_card
from trce_cli.images.plan import checkpoint_hash

Run = Callable[..., Any]
PAIRS = """
name = "pairs"
description = "One pair."
kind = "object"
sensitive = {}
implied = ["what cuts bread", "what lies beside the fork"]
concepts = [{{ unsafe = "a knife", safe = "a spoon" }}]
"""


@pytest.fixture(scope="module")
def mapped(tiny_sd1: Path, reds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with presets, `erased`, a mapped checkpoint, and as files `whole.safetensors` and `edit`."""
    folder = tmp_path_factory.mktemp("mapped")
    (folder / "pairs.toml").write_text(PAIRS.format("false"))
    (folder / "secret.toml").write_text(PAIRS.format("true"))
    # Weak enough to do no harm to a text encoder of random weights.
    line = [
        "map",
        tiny_sd1,
        "-p",
        folder / "pairs.toml",
        "--strength",
        "0.05",
        "--word-prompts",
        50,
        "-q",
        "-o",
    ]
    assert main([*map(str, line), str(folder / "erased"), "--as", "diffusers", "--as", "map"]) == 0
    return folder


@pytest.fixture
def card(mapped: Path, tiny_sd1: Path, tmp_path: Path, trce: Run) -> Run:
    """Evaluate a copy of the mapped checkpoint, `tmp_path/erased`, with few cheap pictures and --card."""
    shutil.copytree(mapped / "erased", tmp_path / "erased")

    def run(
        *more: Any, checkpoint: Any = tmp_path / "erased", preset: str = "pairs", suite: str = "explicit"
    ) -> Any:
        line = [
            "evaluate",
            checkpoint,
            "--against",
            tiny_sd1,
            "--preset",
            mapped / f"{preset}.toml",
            "--card",
        ]
        line += ["--output", tmp_path / f"of-{preset}", "--detector", "reds", "--steps", 1, "--count", 2]
        return trce(*line, "--suite", suite, "--suite", "benign", "--device", "cpu", *more)

    return run


def test_the_card_holds_what_was_measured_and_nothing_else_changes(
    card: Run, trce: Run, tiny_clip: Path, tmp_path: Path
) -> None:
    erased = tmp_path / "erased"
    before = {path: path.read_bytes() for path in erased.rglob("*") if path.is_file()}
    identity = checkpoint_hash(open_checkpoint(str(erased)))
    own = tmp_path / "own.csv"
    own.write_text("prompt\nwhat nobody should read\n")
    outcome = card("--clip", tiny_clip, "--suite", f"own={own}", "--json")
    assert outcome.status == 0, outcome.err
    results = json.loads(outcome.out)
    assert results["card"] == str(erased / "README.md")

    loaded = ModelCard.load(erased / "README.md")
    assert loaded.data.license == ModelCard(before[erased / "README.md"].decode()).data.license
    assert loaded.data.pipeline_tag == "text-to-image"
    assert loaded.data.model_name == "erased"
    told = {(each.dataset_config, each.metric_name): each for each in loaded.data.eval_results}
    for suite in results["suites"]:
        assert told[suite["name"], f"still shown ({suite['asr'][0]['convention']})"].dataset_type == (
            DATASET + suite["name"]
        )
        rates = [(f"still shown ({each['convention']})", each["erased"]) for each in suite["asr"]]
        rates += [("kept", suite["kept"]["kept"])] if "kept" in suite else []
        for name, rate in rates:
            metric = told[suite["name"], name]
            assert metric.metric_value == pytest.approx(rate["share"], abs=1e-4)
            for key in ("low", "high", "hits", "total"):
                assert metric.metric_args[key] == pytest.approx(rate[key], abs=1e-4)
            assert metric.metric_args["level"] == 0.95
    assert ("benign", "kept") in told
    table = metadata_load(erased / "README.md")
    assert ModelCard(f"---\n{loaded.data.to_yaml()}\n---\n").data.to_dict() == loaded.data.to_dict()
    assert [model["name"] for model in table["model-index"]] == ["erased"]

    for part in (results["verdict"]["sentence"], "| explicit | 2: asks for it by name |", f"({PICTURE})"):
        assert part in loaded.text
    assert "was not measured" not in loaded.text
    assert "## Licence" in loaded.text
    assert "what nobody should read" not in loaded.text
    assert str(tmp_path) not in (erased / "README.md").read_text()
    picture = Image.open(erased / PICTURE)
    assert picture.format == "PNG"
    assert picture.height > 4 * 100  # two pairs of each suite

    after = {path: path.read_bytes() for path in erased.rglob("*") if path.is_file()}
    changed = {path for path, content in after.items() if content != before.get(path)}
    assert changed == {erased / "README.md", erased / PICTURE}
    assert checkpoint_hash(open_checkpoint(str(erased))) == identity
    assert trce("evidence", tmp_path / "of-pairs", "-o", tmp_path / "evidence").status == 0
    assert trce("evidence", "--verify", tmp_path / "evidence", "--checkpoint", erased).status == 0

    times = {path: path.stat().st_mtime_ns for path in after}
    assert card("--clip", tiny_clip, "--suite", f"own={own}").status == 0
    assert {path: path.stat().st_mtime_ns for path in after} == times


def test_what_the_owner_wrote_stays_and_a_card_that_is_gone_is_written_whole(
    card: Run, tmp_path: Path
) -> None:
    readme = tmp_path / "erased" / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("## Licence", "I tried it on my cat.\n\n## Licence"))
    assert card().status == 0
    once = readme.read_text()
    assert "I tried it on my cat." in once
    assert card("--suite", "implied").status == 0
    again = ModelCard.load(readme)
    assert {each.dataset_config for each in again.data.eval_results} == {"explicit", "implied", "benign"}
    assert "I tried it on my cat." in again.text
    assert again.text.count("| suite | prompts |") == 1
    readme.unlink()
    assert card("--suite", "implied").status == 0
    assert ModelCard.load(readme).data.to_dict() == again.data.to_dict()
    assert readme.read_text() == again.content.replace("I tried it on my cat.\n\n", "")


def test_sensitive_pictures_are_left_out_and_those_of_before_go(card: Run, tmp_path: Path) -> None:
    assert card().status == 0
    assert (tmp_path / "erased" / PICTURE).is_file()
    assert card(preset="secret").status == 0
    text = (tmp_path / "erased/README.md").read_text()
    assert not (tmp_path / "erased" / PICTURE).exists()
    assert "Pictures are left out: what was erased is sensitive." in text
    assert "![" not in text
    assert ModelCard(text).data.eval_results


def test_an_edit_of_a_carded_checkpoint_carries_neither_figures_nor_picture(
    card: Run, trce: Run, mapped: Path, tmp_path: Path
) -> None:
    assert card().status == 0
    line = [
        "map",
        tmp_path / "erased",
        "-p",
        mapped / "secret.toml",
        "--strength",
        "0.05",
        "--word-prompts",
        50,
        "-o",
        tmp_path / "next",
    ]
    outcome = trce(*line)
    assert outcome.status == 0, outcome.err
    assert f"Left out: {PICTURE} (it shows what this checkpoint draws, and not an edited one)." in outcome.err
    assert not (tmp_path / "next" / PICTURE).exists()
    new = ModelCard.load(tmp_path / "next/README.md")
    assert not new.data.eval_results
    assert "How often was not measured" in new.text
    assert "2. `trce map`" in new.text


def test_what_has_no_card_of_its_own_is_refused_before_anything_is_drawn(
    card: Run, mapped: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    def refused(*more: Any, status: int = 2, **how: Any) -> str:
        outcome = card(*more, "-q", **how)
        assert outcome.status == status, outcome.err
        error, _ = outcome.err.strip().splitlines()
        assert error.startswith("Error: ")
        assert not (tmp_path / "of-pairs").exists()
        return str(error)

    single = tmp_path / "single.safetensors"
    single.write_bytes((mapped / "erased/unet/diffusion_pytorch_model.safetensors").read_bytes())
    for checkpoint in (single, mapped / "erased.map.safetensors", "owner/name", "emoji"):
        assert f"{checkpoint} is no diffusers folder on this machine" in refused(checkpoint=checkpoint)
    assert "not of the checkpoint alone" in refused("--negative-prompt", "knife")
    assert "is evaluated against itself" in refused(checkpoint=tiny_sd1)
    shutil.copytree(tiny_sd1, tmp_path / "plain")
    assert "has no trce.json" in refused(checkpoint=tmp_path / "plain")
    cache = tmp_path / "models--owner--name/snapshots/abc"
    shutil.copytree(mapped / "erased", cache)
    assert "lies in the hub's cache" in refused(checkpoint=cache)
    assert "lies in the hub's cache" in refused("--dry-run", checkpoint=cache)
    readme = tmp_path / "erased/README.md"
    readme.write_text("---\nlicense: [\n---\n")
    assert "README.md cannot be read as YAML" in refused()
    readme.write_text("Mine.\n<!-- ... to here -->\n")
    assert "only one of the marks" in refused()
    assert readme.read_text() == "Mine.\n<!-- ... to here -->\n"
    readme.write_bytes(b"caf\xe9\n")
    assert "README.md is not UTF-8 text" in refused()
    (tmp_path / "erased/trce.json").write_text("{}")
    assert "provenance" in refused()


def test_figures_are_not_written_to_other_weights(card: Run, tmp_path: Path) -> None:
    assert card("--json").status == 0
    results = json.loads((tmp_path / "of-pairs/results.json").read_text())
    opened = open_checkpoint(str(tmp_path / "erased"))
    with (tmp_path / "erased/README.md").open("a") as readme:
        readme.write("Mine.\n")
    opened.check_unchanged()  # a card may change at any time
    before = (tmp_path / "erased/README.md").read_bytes()
    weights = tmp_path / "erased/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(TrceError, match="was changed"):
        write_card(opened, results | {"sensitive": True}, {}, tmp_path / "of-pairs")
    assert (tmp_path / "erased/README.md").read_bytes() == before


def rate(hits: int, total: int) -> dict[str, Any]:
    return {"hits": hits, "total": total, "share": hits / total, "low": 0.0, "high": 0.1}


def suite(name: str, role: str, hits: int, kept: int) -> dict[str, Any]:
    return {"name": name, "role": role, "prompts": 20, "kept": {"kept": rate(kept, 20)},
            "asr": [{"convention": "c", "original": rate(20, 20), "erased": rate(hits, 20)}]}  # fmt: skip


def test_what_still_gets_through_is_told_worst_first() -> None:
    suites = [
        suite("explicit", "attack", 1, 20),
        suite("attacks", "own", 8, 20),
        suite("benign", "benign", 3, 19),
    ]
    state = {"title": "merged with 50 % of the original", "suites": []}
    for each in suites[:2]:
        treated = [{**told, "treated": rate(10, 20)} for told in each["asr"]]
        state["suites"].append({**each, "asr": treated})
    back = {"sentence": "After relearning explicit is back in half of the pictures after 20 steps."}
    lines = list(left({"suites": suites, "survivals": [state], "returns": [back]}))
    assert lines.pop(3) == f"- {back['sentence']}"
    assert [line.split("**")[1] for line in lines] == [
        "Still shown", "Still shown", "Merged with 50 % of the original", "Lost",
    ]  # fmt: skip
    assert "8 of 20 pictures of `attacks`: 40.0 %" in lines[0]
    assert "1 of 20 pictures of `explicit`" in lines[1]
    assert "50.0 % [0.0, 10.0] of the pictures of `explicit`" in lines[2]
    assert "1 of 20 pictures of `benign`" in lines[3]
    (line,) = left({"suites": [suite("explicit", "attack", 0, 20)], "survivals": [], "returns": []})
    assert line == (
        "- **Still shown** in none of these pictures, 20 of them in the smallest suite, "
        "which leaves room for up to 10.0 %."
    )
