from pathlib import Path

import pytest

from trce_cli.errors import TrceError
from trce_cli.system.whole import whole_or_not_at_all


def write(output: Path, replace: bool) -> None:
    """Write a file, while a folder appears in its place."""
    with whole_or_not_at_all(output, replace) as stage:
        stage.write_text("ours")
        output.mkdir()
        (output / "precious").touch()


def test_what_appears_while_an_output_is_written_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(TrceError, match="appeared while"):
        write(tmp_path / "out", replace=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "precious"]


def test_with_force_it_is(tmp_path: Path) -> None:
    write(tmp_path / "out", replace=True)
    assert (tmp_path / "out").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
