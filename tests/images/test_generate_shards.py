"""`trce generate` in shards: joined, they are what one process draws."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
PROMPTS = ("a dog", "a pistol", "two red apples")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def generate(trce: Run, tiny_sd1: Path, tmp_path: Path) -> Run:
    def run(output: Path, *more: Any, prompts: tuple[str, ...] = PROMPTS) -> Any:
        line = ("generate", tiny_sd1, *prompts, "--compare", tiny_sd1, "--steps", 2, "--device", "cpu")
        return trce(*line, "-o", output, *more)

    return run


@pytest.mark.parametrize("shared", [True, False])
def test_shards_in_any_order_are_one_run(generate: Run, tmp_path: Path, shared: bool) -> None:
    assert generate(tmp_path / "one").status == 0
    places = [tmp_path / ("all" if shared else f"part-{number}") for number in (1, 2, 3)]
    for number in (3, 1, 2):
        told = generate(places[number - 1], "--shard", f"{number}/3", "--json")
        assert told.status == 0, told.err
        assert json.loads(told.out)["shard"] == f"{number}/3"
        assert json.loads(told.out)["drawn"] == 2
    assert not (places[0] / "grid.png").exists()
    merge = [part for place in dict.fromkeys(places) for part in ("--merge", place)]
    told = generate(tmp_path / "all", *merge, "--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["drawn"] == 0
    assert files(tmp_path / "all") == files(tmp_path / "one")


def test_a_shard_starts_again_and_others_are_refused(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setenv("SKYPILOT_NUM_NODES", "2")
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    assert generate(output).status == 0
    (output / "0001-seed0-original.png").unlink(missing_ok=True)
    (output / "0002-seed0-original.png").unlink(missing_ok=True)
    told = generate(output, "--merge", output)
    assert told.status == 2
    assert "missing: 1/2" in told.err
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "0")
    assert generate(output).status == 0
    told = generate(output, "--merge", output)
    assert told.status == 2
    assert "pictures of the shards are missing" in told.err
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    assert generate(output).status == 0
    assert generate(output, "--merge", output).status == 0
    for more, name in ((("--seed", "3"), "prompts or seeds"), (("--guidance-scale", "3"), "settings")):
        for line in (("--shard", "2/2"), ("--merge", output)):
            told = generate(output, *line, *more)
            assert told.status == 2
            assert f"is one of other {name}" in told.err
    told = generate(output, "--shard", "1/2", prompts=("a cat",))
    assert told.status == 2
    assert "is one of other prompts" in told.err
    told = generate(output, "--shard", "1/2", "--merge", output)
    assert told.status == 2
    assert "Give one of them" in told.err
