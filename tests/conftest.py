"""Session fixtures: tiny random checkpoints of every family. They are read-only; copy one before changing it."""

from pathlib import Path

import pytest

import tiny


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x diffusers folder in fp32."""
    return tiny.build("sd1", tmp_path_factory.mktemp("tiny") / "sd1", seed=1)


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 2.x diffusers folder in fp32; its tokenizer pads with another token than EoT."""
    return tiny.build("sd2", tmp_path_factory.mktemp("tiny") / "sd2", seed=2)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL diffusers folder in fp32: two text encoders, the second tokenizer pads with another token than EoT."""
    return tiny.build("sdxl", tmp_path_factory.mktemp("tiny") / "sdxl", seed=3)
