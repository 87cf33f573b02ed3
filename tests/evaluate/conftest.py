"""Fixtures: an erased checkpoint that costs nothing, and a detector that tells what anyone can compute."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import plugins

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


@pytest.fixture(scope="module")
def reds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an installed package with the detector `reds`: how red and how dark a picture is."""
    with pytest.MonkeyPatch.context() as patched:
        yield plugins.install(tmp_path_factory.mktemp("plugin"), REDS, patched)


@pytest.fixture(scope="module")
def erased(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, drawing something else."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path_factory.mktemp("erased") / "erased"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"] += 1
    save_file(state, path, metadata={"format": "pt"})
    return folder
