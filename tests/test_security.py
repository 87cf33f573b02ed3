"""docs/security.md: its limits are the code's."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/security.md"
ROWS = re.findall(r"^\|[^|]+\| ([\d,]+) \|[^|]*\| `([\w.]+)` \|$", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("number", "name"), ROWS, ids=[name for _, name in ROWS])
def test_a_limit_is_the_code_s(number: str, name: str) -> None:
    module, _, constant = name.rpartition(".")
    assert getattr(importlib.import_module(module), constant) == int(number.replace(",", ""))


def test_every_limit_is_told() -> None:
    """Constants that are called MAX_... in the modules that read foreign files."""
    package = PAGE.parents[1] / "trce_cli"
    texts = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    found = {
        f"{'.'.join(path.relative_to(package.parent).with_suffix('').parts)}.{name}"
        for path, text in texts.items()
        if "trce_cli.system.foreign" in text
        for name in re.findall(r"^(MAX_\w+)\b.* = ", text, re.MULTILINE)
    }
    assert found
    assert found <= {name for _, name in ROWS}
