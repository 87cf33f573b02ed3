"""Erase unsafe concepts from text-to-image diffusion checkpoints (TRCE, arXiv 2503.07389).

`solve_map`, `load_map` and `Map` are the Python interface; they import torch when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from trce_cli.errors import BadInput, TrceError
from trce_cli.system.machine import __version__

if TYPE_CHECKING:
    from trce_cli.api import solve_map
    from trce_cli.edits.files import load_map
    from trce_cli.edits.map import Map

__all__ = ["BadInput", "Map", "TrceError", "__version__", "load_map", "solve_map"]


def __getattr__(name: str) -> Any:
    """The parts that are heavy to import, imported when they are first used."""
    import importlib

    where = {"solve_map": "api", "load_map": "edits.files", "Map": "edits.map"}
    if name not in where:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{where[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
