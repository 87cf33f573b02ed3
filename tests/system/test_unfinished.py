"""A run's own outputs, known again after a kill by what lay in their place when it put them there."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trce_cli.errors import BadInput
from trce_cli.system.unfinished import PLACED, Kept, placed, placing, unfinished
from trce_cli.system.whole import whole, write_text


def test_a_run_knows_the_outputs_that_it_has_put_in_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one, two = tmp_path / ".x.run", tmp_path / "one", tmp_path / "two"
    folder.mkdir()
    assert placed(folder, [one, two]) == set()
    with placing(folder):
        with whole(one) as fresh:
            fresh.mkdir()
            (fresh / "inner").write_text("1")
        write_text(two, "2")
    write_text(tmp_path / "three", "3")  # after the block
    monkeypatch.chdir(tmp_path)
    assert placed(folder, [Path("one"), two, tmp_path / "three"]) == {Path("one"), two}
    os.replace(tmp_path / "three", two)  # somebody else's
    assert placed(folder, [one, two]) == {one}
    for wrong in ("[", '{"outputs": 1}', '{"outputs": {"x": ["a", 1]}}'):
        (folder / PLACED).write_text(wrong)
        assert placed(folder, [one, two]) == set()


def test_what_was_to_take_a_place_and_did_not_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(KeyboardInterrupt),
        placing(tmp_path),
        whole(tmp_path / "one", unchanged=_stop) as fresh,
    ):
        fresh.write_text("1")
    assert placed(tmp_path, [tmp_path / "one"]) == set()


def test_files_that_no_run_kept_are_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    made = kept("a", lambda: {"found": torch.ones(1)})
    (path,) = tmp_path.glob("*.safetensors")
    assert torch.equal(kept("a", dict)["found"], made["found"])
    for tensors, metadata in (({"found": torch.ones(1)}, {}), ({"x": torch.ones(1)}, {"seconds": "1"})):
        save_file(tensors, path, metadata)
        with pytest.raises(BadInput, match="is not what a stopped run keeps"):
            kept("a", dict)["found"]
    save_file({"found": torch.ones(1)}, path, {"seconds": "x"})
    with pytest.raises(BadInput, match="is not what a stopped run keeps"):
        kept("a", dict)


def _stop() -> None:
    raise KeyboardInterrupt


def test_a_run_that_is_done_leaves_nothing(tmp_path: Path) -> None:
    with unfinished(tmp_path / "x", "run", {"a": 1}, force=False) as kept, placing(tmp_path / ".x.run"):
        assert kept.folder == tmp_path / ".x.run"
        write_text(tmp_path / "x", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _fails_after(output: Path, made: tuple[str, ...]) -> None:
    with unfinished(output, "run", {"a": 1}, force=False) as kept:
        for name in made:
            kept(name, lambda: {"found": torch.ones(1)})
        raise BadInput("no")


@pytest.mark.parametrize("made", [(), ("one",)])
def test_a_run_that_fails_leaves_what_another_can_go_on_with(tmp_path: Path, made: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match="no"):
        _fails_after(tmp_path / "x", made)
    assert [path.name for path in tmp_path.iterdir()] == [".x.run"][: len(made)]
