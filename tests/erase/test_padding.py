"""Padding that is not EoT: mapped along with the end of the prompt, and what is left of it told."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from trce_cli import emoji
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase.map import Statistics
from trce_cli.erase.padding import MOST, TEMPLATES, held_out
from trce_cli.erase.prior import choose_prior
from trce_cli.erase.settings import MapSettings
from trce_cli.families.clip.text import ClipText
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_preset, preset_names


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def exclaiming(tmp_path: Path) -> Path:
    """The embedded checkpoint with a tokenizer that pads as those of SD 2.x and SDXL do."""
    folder = tmp_path / "exclaiming"
    shutil.copytree(emoji.folder(), folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / "tokenizer" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))
    return folder


def text_of(folder: Path | str) -> ClipText:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint.family.text(checkpoint, "cpu", torch.float32)  # type: ignore[return-value]


def test_held_out_pairs_are_of_templates_that_no_preset_has() -> None:
    pairs = prompt_pairs([load_preset("unsafe")])
    found = held_out(pairs)
    assert MOST / 2 < len(found) == len(set(found)) <= MOST
    assert {pair.keyword for pair in found} <= {pair.keyword for pair in pairs}
    assert all(pair.keyword in pair.unsafe and pair.replacement in pair.safe for pair in found)
    templates = {template for name in preset_names() for template in load_preset(name).templates}
    assert not templates & {*TEMPLATES}


@pytest.mark.parametrize("family", ["tiny_sd2", "tiny_sdxl"])
def test_both_paddings_are_those_that_clients_make(family: str, request: pytest.FixtureRequest) -> None:
    text = text_of(request.getfixturevalue(family))
    other = text.padded_with_eot()
    assert other is not None
    assert other.padded_with_eot() is None
    (own,), (with_eot,) = (each.tokenizers.tokens(["a knife"]) for each in (text, other))
    tokenizer = text.tokenizers.each[-1]
    assert own.ids[-1][own.eot + 1 :] == (tokenizer.pad_token_id,) * (76 - own.eot)
    for ids, before in zip(with_eot.ids, own.ids, strict=True):
        assert ids[: own.eot + 1] == before[: own.eot + 1]
        assert set(ids[own.eot :]) == {tokenizer.eos_token_id}
    assert own.padding == with_eot.padding


def test_padding_is_mapped_with_the_first_eot_where_it_is_another_token(
    tiny_sd2: Path, tiny_sd1: Path
) -> None:
    weights = {"FIRST_EOT": 0.6, "LAST_EOT": 0.0}
    unsafe, safe = "a pistol", "two red apples on a plate"
    text = text_of(tiny_sd2)
    end = max(tokens.eot for tokens in text.tokenizers.tokens([unsafe, safe]))
    found = [
        slot for slot in text.slots(unsafe, safe, "a pistol", weights)["context"] if slot.kind == "PADDING"
    ]
    assert [(slot.unsafe, slot.safe) for slot in found] == [(end + 2**k,) * 2 for k in range(6)]
    assert sum(slot.weight for slot in found) == pytest.approx(0.6)
    assert {slot.kind for slot in text.slots(unsafe, safe, "a pistol", {"KEYWORD": 1.0})["context"]} == {
        "KEYWORD"
    }
    long = "a photo of a dog in the garden " * 20
    assert {slot.kind for slot in text.slots(unsafe, long, "a pistol", weights)["context"]} == {"FIRST_EOT"}
    plain = text_of(tiny_sd1).slots(unsafe, safe, "a pistol", weights)["context"]
    assert {slot.kind for slot in plain} == {"FIRST_EOT"}


def test_where_padding_is_another_token_it_still_moves(exclaiming: Path) -> None:
    """What an edit of the first EoT alone leaves: enough for pictures of the weapon (docs/method.md)."""
    pairs = prompt_pairs([load_preset("emoji-weapons")])
    settings = MapSettings(preserve=0.3, word_share=0.0)
    found = {}
    for name in ("emoji", str(exclaiming)):
        checkpoint = open_checkpoint(name)
        statistics = Statistics.of(checkpoint, pairs, choose_prior(checkpoint), [settings])
        found[name] = statistics.solve(settings)
    exclaimed, usual = found[str(exclaiming)], found["emoji"]
    names = {"padding_moved", "eot_padding_moved"}
    assert names <= exclaimed.figures.keys()
    assert names & usual.figures.keys() == {"padding_moved"}
    for each in (exclaimed.figures["verdicts"][name] for name in names):
        assert each["verdict"] == "good"
    (reading,) = statistics.readings
    checkpoint = open_checkpoint(str(exclaiming))
    key = next(key for key in checkpoint.door_weights()["context"] if "to_k" in key)
    weight = checkpoint.read("denoiser", key)
    shares = [
        reading.paddings["padding_moved"].moved(each.streams["context"])(weight, key)
        for each in (usual, exclaimed)
    ]
    assert shares[0] < 0.7 < shares[1]
