"""A package with a detector, installed as pip would leave it."""

import sys
from pathlib import Path

import pytest


def install(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install `code`, whose class `Reds` is the detector `reds`, in the folder, which is returned."""
    info = folder / "reds-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "reds.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trce.detectors]\nreds = reds:Reds\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "reds", raising=False)
    return folder
