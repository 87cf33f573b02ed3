"""Values as TOML writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def toml(value: Any) -> str:
    """The value as it stands behind `key =`: texts, numbers, lists, and tables in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = (f"{key if _is_bare(key) else json.dumps(key)} = {toml(each)}" for key, each in value.items())
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list | tuple):
        each = [toml(one) for one in value]
        short = ", ".join(each)
        return f"[{short}]" if len(short) < 90 else "[\n" + "".join(f"    {one},\n" for one in each) + "]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str | Path):  # as in JSON, but for a letter that TOML wants escaped
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _is_bare(key: str) -> bool:
    return key.isascii() and key.replace("_", "").replace("-", "").isalnum()
