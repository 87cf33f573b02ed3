"""Erase unsafe concepts from text-to-image diffusion checkpoints (TRCE, arXiv 2503.07389).

`solve_map`, `load_map` and `Map` are the Python interface; they import torch when they are first asked for.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from trce_cli.api import solve_map
    from trce_cli.edits.files import load_map
    from trce_cli.edits.map import Map
    from trce_cli.errors import BadInput, TrceError
    from trce_cli.system.machine import __version__

__all__ = ["BadInput", "Map", "TrceError", "__version__", "load_map", "solve_map"]

_PLACES = {
    **dict.fromkeys(("BadInput", "TrceError"), "errors"),
    "__version__": "system.machine",
    "solve_map": "api",
    "Map": "edits.map",
    "load_map": "edits.files",
}


def __getattr__(name: str) -> "Any":
    """Everything is imported when it is first used: the command line has its signals to see to before."""
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
