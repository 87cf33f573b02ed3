"""What a result was made with and what it took: this program, the libraries under it, the memory."""

import importlib.metadata
import platform
import re
import sys
from functools import cache
from pathlib import Path
from typing import Final

__version__: Final = "0.1.0"

LIBRARIES: Final = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of trce, Python and the libraries that the figures depend on."""
    found = {"trce": __version__, "python": platform.python_version()}
    return found | {library: _version(library) for library in LIBRARIES}


_version = cache(importlib.metadata.version)  # which reads all of a package's metadata


def peak_memory_bytes() -> int:
    """The most memory that this process has had in use so far, in bytes."""
    status = Path("/proc/self/status")  # Linux; getrusage would count what the parent process had as well
    text = status.read_text() if status.exists() else ""
    if high_water := re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE):
        return int(high_water[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
