"""Where what can be computed again is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TRCE_CACHE`, else `trce` in the user's cache folder (which follows `$XDG_CACHE_HOME` on Linux)."""
    import platformdirs

    return Path(os.environ.get("TRCE_CACHE") or platformdirs.user_cache_path("trce"))
