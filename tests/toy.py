"""A preset of two concepts."""

_HEAD = """
name = "toy"
description = "For tests"
kind = "object"
"""
_CONCEPTS = """
[[concepts]]
unsafe = "a knife"
safe = "a tulip"
[[concepts]]
unsafe = "a pistol"
safe = "an apple"
"""


def preset(steer: str = "", head: str = "") -> str:
    """Its TOML text. steer: lines of its table of that name; head: further keys of its own."""
    return f"{_HEAD}{head}{_CONCEPTS}" + (f"[steer]\n{steer}" if steer else "")
