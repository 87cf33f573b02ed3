import pytest

from trce_cli.errors import BadInput
from trce_cli.system.processes import Alone, join_team


@pytest.mark.parametrize("size", ["x", "", "-1", "²", "2.0"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(BadInput, match="WORLD_SIZE"):
        join_team("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(join_team("cpu"), Alone)
