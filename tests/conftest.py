"""Fixtures: `trce` runs a command, `browser` is a real one; tiny checkpoints of every family, read-only."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
from trce_cli.cli.app import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
)


@dataclass
class Outcome:
    """What a command left behind: its exit status and the two streams."""

    status: int
    out: str
    err: str


@pytest.fixture
def trce(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command in this process, errors mapped as on the command line: `trce("presets", "list").out`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: Any) -> Outcome:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return Outcome(status, *capsys.readouterr())

    return run


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
    """A tiny SDXL diffusers folder in fp32: two text encoders; the second tokenizer does not pad with EoT."""
    return tiny.build("sdxl", tmp_path_factory.mktemp("tiny") / "sdxl", seed=3)


@pytest.fixture(scope="session", name="tiny_z-image")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Z-Image diffusers folder in fp32."""
    return tiny.build_z_image(tmp_path_factory.mktemp("tiny") / "z-image", seed=4)


@pytest.fixture(scope="session", name="tiny_qwen-image")
def tiny_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image diffusers folder in fp32."""
    return tiny.build_qwen_image(tmp_path_factory.mktemp("tiny") / "qwen-image", seed=5)


@pytest.fixture(scope="session", name="tiny_flux")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FLUX.1 pipeline in a folder, with embedded guidance as dev has it."""
    return tiny.build_flux(tmp_path_factory.mktemp("tiny") / "flux", seed=6)


@pytest.fixture(scope="session", name="tiny_chroma")
def tiny_chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Chroma pipeline in a folder."""
    return tiny.build_chroma(tmp_path_factory.mktemp("tiny") / "chroma", seed=7)


@pytest.fixture(scope="session", name="tiny_flux2-klein")
def tiny_flux2_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FLUX.2 klein pipeline in a folder, the base, which is guided."""
    return tiny.build_flux2_klein(tmp_path_factory.mktemp("tiny") / "flux2-klein", seed=8)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 3.5 pipeline in a folder, with T5, qk-norm and a block of two
    attentions."""
    return tiny.build_sd3(tmp_path_factory.mktemp("tiny") / "sd3", seed=9)


@pytest.fixture(scope="session", name="tiny_sd3-clip")
def tiny_sd3_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 3 of old without T5: no norms of queries and keys, no block of two attentions."""
    blocks: dict[str, Any] = {"qk_norm": None, "dual_attention_layers": (), "num_layers": 2}
    return tiny.build_sd3(tmp_path_factory.mktemp("tiny") / "sd3-clip", seed=10, t5=False, **blocks)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP model of transformers with its processor."""
    return tiny.build_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        flags = FLAGS.split() + (["--no-sandbox"] if os.geteuid() == 0 else [])
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()
