"""What the tests of each family have in common; each says by `folder` which checkpoint they are of."""

from pathlib import Path
from typing import Any

import pytest

from plain_pipes import load
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    """diffusers' own, loaded by itself."""
    return load(folder)
