"""The history in trce.json, and the model card that is written from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from trce_cli.checkpoint.card import model_card
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import history, provenance_files, record
from trce_cli.errors import BadInput
from trce_cli.prompts.presets import load_preset
from trce_cli.system.machine import peak_memory_bytes

CARD = """---
license: creativeml-openrail-m
license_link: https://example.org/licence
tags: [art]
---
# The original
"""
FIGURES = {
    "condition": 123.456,
    "targets": {"cosine_before": 0.5, "cosine_after": 0.987654},
    "moved": float("nan"),
}


def edit_of(source: Path, kind: str = "map") -> tuple[dict[str, bytes], dict]:
    checkpoint = open_checkpoint(str(source))
    entry = record(
        kind,
        checkpoint,
        [load_preset("weapons")],
        {"preserve": 10.0, "token_weights": [0.0, 1.0, 0.0, 0.0], "strength": 1.0},
        FIGURES,
        seconds=12.3456,
        hashes=checkpoint.hashes(),
        seeds={"prior": 7},
    )
    return provenance_files(checkpoint, entry), entry


@pytest.fixture
def source(tiny_sd1: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "source"))
    (folder / "README.md").write_text(CARD)
    return folder


def test_the_record_holds_all_that_makes_the_edit_again(source: Path) -> None:
    files, entry = edit_of(source)
    stored = json.loads(files["trce.json"])
    assert stored["schema"] == 1
    (stored_entry,) = stored["history"]
    assert stored_entry["figures"].pop("moved") is None  # NaN is no JSON
    entry["figures"].pop("moved")
    assert stored_entry == entry
    checkpoint = open_checkpoint(str(source))
    assert entry["base"]["files"] == checkpoint.hashes().files
    assert entry["base"]["text_encoder"] == checkpoint.text_encoder_hash()
    assert entry["base"]["license"] == "creativeml-openrail-m"
    preset = load_preset("weapons")
    assert entry["presets"][0]["sha256"] == preset.sha256()
    assert len(entry["presets"][0]["concepts"]) == len(preset.concepts)
    assert entry["versions"].keys() >= {"trce", "python", "torch", "diffusers", "transformers"}
    assert entry["seeds"] == {"prior": 7}
    assert entry["seconds"] == 12.346
    assert 10e6 < entry["peak_memory_bytes"] <= peak_memory_bytes()


def test_the_card_says_what_how_and_what_was_measured(source: Path) -> None:
    card = edit_of(source)[0]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "creativeml-openrail-m"
    assert front["license_link"] == "https://example.org/licence"
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert "base_model" not in front  # a local folder is none
    first = load_preset("weapons").concepts[0]
    assert f"{first.unsafe} (now {first.safe})" in card
    assert "| preserve | 10 |" in card
    assert "| token weights | 0, 1, 0, 0 |" in card
    assert "| seed prior | 7 |" in card
    assert "| targets: cosine after | 0.9877 |" in card
    assert "The licence of the original, creativeml-openrail-m," in card


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        ("someone/some-model", "someone/some-model"),
        ("/home/me/hub/models--someone--some-model/snapshots/abc", "someone/some-model"),
        ("emoji", None),
        ("./folder", None),
    ],
)
def test_base_model_is_a_hub_id_or_absent(source: Path, name: str, base_model: str | None) -> None:
    entry = edit_of(source)[1]
    entry["base"]["name"] = name
    front = yaml.safe_load(model_card([entry], {}).split("---")[1])
    assert front.get("base_model") == base_model
    assert front.get("base_model_relation") == ("finetune" if base_model else None)
    assert "license" not in front


def test_the_card_loads_what_lies_beside_it(tiny_sd1: Path, tmp_path: Path) -> None:
    """With the dtype and the variant of the weights; run as it stands."""
    folder = shutil.copytree(tiny_sd1, tmp_path / "half")
    tiny.add_fp16_variant(folder, keep_plain=False)
    files, _ = edit_of(folder)
    out = write_patched(open_checkpoint(str(folder)), tmp_path / "out", {}, files)
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "dtype = torch.float16\n" in code
    assert 'torch_dtype=dtype, variant="fp16"' in code
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(out)), names)
    pipe = names["pipe"]
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float16}
    assert "variant" not in model_card([edit_of(tiny_sd1)[1]], {})


def test_the_card_is_one_that_the_hub_reads(source: Path) -> None:
    """Front matter, what was not erased, and restrictions that are known or said to be unknown."""
    from huggingface_hub import ModelCard

    card = edit_of(source)[0]["README.md"].decode()
    assert ModelCard(card).data.license == "creativeml-openrail-m"
    assert "**What was not:** everything else." in card
    assert "have to be passed on with it (https://example.org/licence)." in card
    assert "How often was not measured" in card
    (source / "README.md").unlink()
    card = edit_of(source)[0]["README.md"].decode()
    assert ModelCard(card).data.license is None
    assert "not known here: its card does not name them." in card


def test_long_lists_are_cut_in_the_card(source: Path) -> None:
    entry = edit_of(source)[1]
    entry["figures"]["exempt_words"] = [f"word{number}" for number in range(40)]
    card = model_card([entry], {})
    assert "word11 and 28 more, in `trce.json`" in card
    assert "word12" not in card


def test_a_second_edit_is_added_to_the_history(source: Path, tmp_path: Path) -> None:
    files, first = edit_of(source)
    once = write_patched(open_checkpoint(str(source)), tmp_path / "once", {}, files)
    assert history(open_checkpoint(str(once)))[0]["date"] == first["date"]
    files, second = edit_of(once, "steer")
    twice = write_patched(open_checkpoint(str(once)), tmp_path / "twice", {}, files)
    entries = history(open_checkpoint(str(twice)))
    assert [entry["edit"] for entry in entries] == ["map", "steer"]
    assert entries[1]["base"]["license"] == "creativeml-openrail-m"
    card = (twice / "README.md").read_text()
    assert card.count("**weapons**") == 1
    assert "1. `trce map`" in card
    assert "2. `trce steer`" in card
    assert second["base"]["files"] == open_checkpoint(str(once)).hashes().files


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '"text"', '{"history": []}', '{"schema": 2, "history": []}', '{"schema": 1, "history": [3]}',
     '{"schema": 1, "history": [{"edit": "map"}]}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_history_is_refused(source: Path, text: str) -> None:
    (source / "trce.json").write_text(text)
    with pytest.raises(BadInput, match="provenance") as caught:
        history(open_checkpoint(str(source)))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("wrong", [[], {}, 3])
def test_presets_whose_hash_is_none_are_refused(source: Path, wrong: object) -> None:
    table = json.loads(edit_of(source)[0]["trce.json"])
    table["history"][0]["presets"][0]["sha256"] = wrong
    (source / "trce.json").write_text(json.dumps(table))
    with pytest.raises(BadInput, match=r"presets\.0\.sha256"):
        history(open_checkpoint(str(source)))


@pytest.mark.parametrize("edits", [[{"sha256": "0", "history": ["map"]}], [{"history": []}], ["map"], {}])
def test_what_an_applied_edit_tells_of_itself_is_checked_too(source: Path, edits: object) -> None:
    (whole,) = json.loads(edit_of(source)[0]["trce.json"])["history"]

    def told(edits: object) -> list[dict[str, Any]]:
        table = {"schema": 1, "history": [whole | {"edits": edits}]}
        (source / "trce.json").write_text(json.dumps(table))
        return history(open_checkpoint(str(source)))

    applied = [{"sha256": "0", "history": [whole]}]
    assert told(applied) == [whole | {"edits": applied}]
    with pytest.raises(BadInput, match="provenance"):
        told(edits)


@pytest.mark.parametrize(
    "card", ["", "no front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\nlicense: 3\n---\n"]
)
def test_odd_cards_do_no_harm(source: Path, card: str) -> None:
    (source / "README.md").write_text(card)
    files, _ = edit_of(source)
    assert files["README.md"].decode().startswith("---\n")
