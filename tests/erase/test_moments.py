"""Second moments: equal to a plain sum, and a cache that is never believed blindly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase import moments
from trce_cli.families.clip.text import ClipText
from trce_cli.families.sd.family import SD1
from trce_cli.system.cache import cache_folder

TEXTS = ["a photo of a dog", "two red apples", "a cat sleeping on a chair", "a dog", "two red apples"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def text(tiny_sd1: Path) -> ClipText:
    return SD1.text(open_checkpoint(str(tiny_sd1)), "cpu", torch.float32)


def plain_moment(text: ClipText) -> torch.Tensor:
    """Each caption, duplicates too, on its own at 77 positions; sums in a loop."""
    from transformers import CLIPTextModel

    total = torch.zeros(text.streams["context"], text.streams["context"], dtype=torch.float64)
    tokenizer, folder = text.tokenizers.each[0], text.encoders[0].weights.folder("text_encoder")
    model = CLIPTextModel.from_pretrained(folder, local_files_only=True).eval()
    for text in TEXTS:
        batch = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(batch.input_ids)[0][0].double()
        for position, token in enumerate(batch.input_ids[0].tolist()):
            total += torch.outer(states[position], states[position])
            if position > 0 and token == tokenizer.eos_token_id:
                break
    return total / len(TEXTS)


def test_moment_equals_a_plain_sum(text: ClipText) -> None:
    done: list[int] = []
    found = moments.second_moments(text, TEXTS, done.append)
    assert found.keys() == {"context"}
    torch.testing.assert_close(found["context"], plain_moment(text), rtol=1e-5, atol=1e-5)
    assert sum(done) == len(set(TEXTS))


@pytest.fixture
def encodings(text: ClipText, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each forward pass took since."""
    counts: list[int] = []
    encode = text._encode
    monkeypatch.setattr(
        text,
        "_encode",
        lambda some, wanted: counts.append(sum(len(p.places) for p in some)) or encode(some, wanted),
    )
    return counts


def entry(cache: Path) -> Path:
    (path,) = cache.rglob("*.safetensors")
    return path


def test_moment_is_computed_once(text: ClipText, encodings: list[int]) -> None:
    first = moments.second_moments(text, TEXTS)["context"]
    assert encodings
    encodings.clear()
    assert torch.equal(moments.second_moments(text, TEXTS)["context"], first)
    assert not encodings
    assert not torch.equal(moments.second_moments(text, TEXTS[1:])["context"], first)
    assert encodings


@pytest.mark.parametrize("damage", ["cut", "flipped", "pickle", "empty", "folder", "renamed", "shape", "nan"])
def test_damaged_or_foreign_entries_are_computed_anew(
    text: ClipText, cache: Path, encodings: list[int], damage: str
) -> None:
    expected = moments.second_moments(text, TEXTS)["context"]
    path = entry(cache)
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        case "pickle":
            torch.save({"context": expected}, path)
        case "empty":
            path.write_bytes(b"")
        case "folder":
            path.unlink()
            path.mkdir()
        case "renamed":
            moments.second_moments(text, TEXTS[1:])
            (other,) = set(cache.rglob("*.safetensors")) - {path}
            other.replace(path)
        case "shape":
            save_file({"context": torch.eye(3, dtype=torch.float64)}, path)
        case "nan":
            bad = torch.full_like(expected, torch.nan)
            save_file({"context": bad}, path, {"sha256": moments._seal(path.stem, {"context": bad})})
    encodings.clear()
    assert torch.equal(moments.second_moments(text, TEXTS)["context"], expected)
    assert encodings
    if damage != "folder":
        assert torch.equal(load_file(entry(cache))["context"], expected)
    assert not [left for left in path.parent.iterdir() if "partial" in left.name]


def test_a_cache_that_cannot_be_written_is_done_without(
    text: ClipText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "file"))
    found = moments.second_moments(text, TEXTS)["context"]
    torch.testing.assert_close(found, plain_moment(text), rtol=1e-5, atol=1e-5)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TRCE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder().name == "trce"


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, [1, 4]), (60.0, [1])])
def test_how_long_a_prompt_takes_is_told_by_one_where_that_takes_long(
    seconds: float, expected: list[int], text: ClipText, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(moments, "_compute", lambda text, prompts, report: tried.append(len(prompts)))
    monkeypatch.setattr(moments, "monotonic", lambda: seconds * sum(tried))
    assert moments.seconds_each(text, sorted(set(TEXTS))) == seconds
    assert tried == expected
