"""Fixtures: an erased checkpoint that costs nothing, and a detector that tells what anyone can compute."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import plugins


@pytest.fixture(scope="module")
def reds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an installed package with the detector `reds`: how red and how dark a picture is."""
    with pytest.MonkeyPatch.context() as patched:
        yield plugins.install(tmp_path_factory.mktemp("plugin"), plugins.REDS, patched)


@pytest.fixture(scope="module")
def erased(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, drawing something else."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path_factory.mktemp("erased") / "erased"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"] += 1
    save_file(state, path, metadata={"format": "pt"})
    return folder
