"""A package with a detector, installed as pip would leave it."""

import sys
from pathlib import Path

import pytest

REDS = """
import numpy as np

class Reds:
    labels, thresholds, floor = ("red", "dark"), (0.45, 0.6), 0.0
    sets = {"red": ("red",), "any": ("red", "dark")}
    looked = []

    def __init__(self, request):
        self.identity = {"files": {"none": "0"}}

    def scores(self, images):
        self.looked.append(len(images))
        red = images[..., 0].mean((1, 2)) / 255
        return np.stack([red, 1 - images.mean((1, 2, 3)) / 255], 1)
"""


def write(folder: Path, code: str) -> Path:
    """Write the package with `code`, whose class `Reds` is the detector `reds`, to the folder."""
    info = folder / "reds-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "reds.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trce.detectors]\nreds = reds:Reds\n")
    return folder


def install(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, for the block of a monkeypatch found by Python; returns the folder."""
    write(folder, code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "reds", raising=False)
    return folder
