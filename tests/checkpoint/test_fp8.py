"""Single files in fp8, plain and with scales: what is computed from them, and what an edit writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli import load_map
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main

PRESET = """
name = "blades"
description = "blades"
kind = "object"
[[concepts]]
unsafe = "a knife"
safe = "a spoon"
"""
DOORS = {"context": "txt_in.weight", "pooled": "vector_in.in_layer.weight"}
PREFIX = "model.diffusion_model."
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset, a map, and the tiny FLUX.1's transformer as one file, in fp32."""
    folder: Path = request.getfixturevalue("tiny_flux")
    work = tmp_path_factory.mktemp("fp8")
    (work / "folder").symlink_to(folder)
    (work / "blades.toml").write_text(PRESET)
    (work / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    tiny.flux_file(folder, work / "whole.safetensors")
    line = (
        f"map {folder} -p {work}/blades.toml --prior {work}/prior.txt -o {work}/map.safetensors --as map -q"
    )
    assert main([*line.split(), "--max-collateral", "1000"]) == 0
    return work


def plain(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(dtype) for key, value in state.items()}


def values(state: dict[str, torch.Tensor], key: str, ending: str = "") -> torch.Tensor:
    weight = state[PREFIX + key].float()
    return weight * state[PREFIX + key.removesuffix(".weight") + ending].float() if ending else weight


@pytest.mark.parametrize(
    ("form", "ending"),
    [("e4m3", ""), ("e5m2", ""), ("scaled", ".scale_weight"), ("scaled", ".weight_scale")],
)
def test_an_edit_of_an_fp8_file_is_rounded_and_changes_nothing_else(
    work: Path, tmp_path: Path, trce: Callable[..., Any], form: str, ending: str
) -> None:
    whole = load_file(work / "whole.safetensors")
    dtype = torch.float8_e5m2 if form == "e5m2" else E4M3
    before = tiny.fp8_scaled(whole, ending) if ending else plain(whole, dtype)
    save_file(before, tmp_path / "in.safetensors", metadata={"format": "pt"})
    config = (work / "folder").resolve()
    out = tmp_path / "out.safetensors"
    run = trce("apply", work / "map.safetensors", tmp_path / "in.safetensors", "--config", config, "-o", out)
    assert run.status == 0, run.err
    after = load_file(out)
    assert list(after) == list(load_file(tmp_path / "in.safetensors"))
    changed = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    doors = {PREFIX + door for door in DOORS.values()}
    assert doors <= changed <= doors | {key.removesuffix(".weight") + ending for key in doors}
    text_map = load_map(work / "map.safetensors")
    for stream, door in DOORS.items():
        matrix = text_map.streams[stream].matrix
        expected = (values(before, door, ending).double() @ matrix.double()).float()
        found = values(after, door, ending)
        step = torch.finfo(dtype).eps / 2  # half a step of the mantissa, and of what is below the smallest
        least = float(after[PREFIX + door.removesuffix(".weight") + ending]) if ending else 1.0
        assert ((found - expected).abs() <= step * expected.abs() + 0.01 * least).all()


def test_a_scale_grows_where_the_new_weight_asks_for_it(work: Path, tmp_path: Path) -> None:
    from trce_cli.checkpoint.scaled import scaled_edits

    before = tiny.fp8_scaled(load_file(work / "whole.safetensors"), ".scale_weight")
    save_file(before, tmp_path / "in.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(tmp_path / "in.safetensors"), config=(work / "folder").resolve())
    place = checkpoint.denoiser[0].tensors["context_embedder.weight"]
    edits = scaled_edits(place, lambda weight: 3 * weight)
    name, scale = f"{PREFIX}txt_in.weight", f"{PREFIX}txt_in.scale_weight"
    stored, factor = edits[name](before[name].float()), edits[scale](before[scale])
    torch.testing.assert_close(factor, 3 * before[scale])
    torch.testing.assert_close(stored * factor, 3 * values(before, "txt_in.weight", ".scale_weight"))


def test_fp8_files_are_drawn_and_converted(work: Path, tmp_path: Path, trce: Callable[..., Any]) -> None:
    config, file = (work / "folder").resolve(), tmp_path / "in.safetensors"
    before = tiny.fp8_scaled(load_file(work / "whole.safetensors"), ".scale_weight")
    save_file(before, file, metadata={"format": "pt"})
    run = trce("generate", file, "a dog", "--config", config, "--steps", 2, "-o", tmp_path / "images")
    assert run.status == 0, run.err
    line = ["apply", work / "map.safetensors", file, "--config", config, "--as", "diffusers"]
    run = trce(*line, "-o", tmp_path / "out")
    assert run.status == 0, run.err
    found = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    wanted = values(before, "img_in.weight", ".scale_weight")
    torch.testing.assert_close(found["x_embedder.weight"].float(), wanted, rtol=1e-2, atol=0)


def test_scales_of_blocks_are_refused(work: Path, tmp_path: Path, trce: Callable[..., Any]) -> None:
    before = tiny.fp8_scaled(load_file(work / "whole.safetensors"), ".scale_weight")
    name = f"{PREFIX}txt_in.scale_weight"
    before[name] = before[name].repeat(4)
    save_file(before, tmp_path / "in.safetensors", metadata={"format": "pt"})
    config = (work / "folder").resolve()
    run = trce("inspect", tmp_path / "in.safetensors", "--config", config)
    out = tmp_path / "out.safetensors"
    run = trce("apply", work / "map.safetensors", tmp_path / "in.safetensors", "--config", config, "-o", out)
    assert run.status == 2
    assert "one scale each" in run.err
    assert not out.exists()
