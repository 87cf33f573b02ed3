"""Single files that stack several weights in one tensor are edited in place: that weight's rows alone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.convert import write_single_file
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint

FAMILIES = ("z-image", "flux", "chroma", "flux2-klein", "sd3")
# A weight of each that is stacked, the tensor that holds it, and its rows there in parts of the whole.
STACKED = {
    "z-image": ("layers.1.attention.to_k.weight", "layers.1.attention.qkv.weight", 1 / 3, 2 / 3),
    "flux": ("single_transformer_blocks.0.proj_mlp.weight", "single_blocks.0.linear1.weight", 3 / 7, 1),
    "chroma": ("transformer_blocks.1.attn.to_q.weight", "double_blocks.1.img_attn.qkv.weight", 0, 1 / 3),
    "flux2-klein": ("transformer_blocks.0.attn.to_v.weight", "double_blocks.0.img_attn.qkv.weight", 2 / 3, 1),
    "sd3": ("transformer_blocks.0.attn2.to_v.weight", "joint_blocks.0.x_block.attn2.qkv.weight", 2 / 3, 1),
}  # fmt: skip
PREFIX = "model.diffusion_model."


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"tiny_{family}"))


def single(family: Any, folder: Path, path: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    tiny.single_file(family, folder, path)
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    return open_checkpoint(str(path), config=folder)


def added(change: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() + change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_one_weight_change_and_nothing_else(
    family: str, folder: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    key, name, begin, end = STACKED[family]
    checkpoint = single(family, folder, tmp_path / "given.safetensors", dtype)
    change = torch.randn(checkpoint.shape("denoiser", key)).double()
    write_patched(checkpoint, tmp_path / "out.safetensors", {key: partial(added, change)}, {})
    before, after = load_file(tmp_path / "given.safetensors"), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert {each for each in before if not torch.equal(before[each], after[each])} == {PREFIX + name}
    old, new = before[PREFIX + name], after[PREFIX + name]
    rows = slice(round(begin * len(old)), round(end * len(old)))
    assert torch.equal(new[rows], (old[rows].double() + change).to(dtype))
    new[rows] = old[rows]
    assert torch.equal(new, old)


def test_an_edit_of_everything_is_that_of_the_folder(family: str, folder: Path, tmp_path: Path) -> None:
    """Halves of rows in the other order and weights that share a tensor as well."""
    torch.manual_seed(0)
    given = open_checkpoint(str(folder))
    keys = [key for key in given.keys("denoiser") if key.endswith(".weight")]
    edits = {key: partial(added, torch.randn(given.shape("denoiser", key)).double()) for key in keys}
    write_single_file(given, tmp_path / "converted.safetensors", edits, {})
    checkpoint = single(family, folder, tmp_path / "given.safetensors")
    write_patched(checkpoint, tmp_path / "out.safetensors", edits, {})
    found = {
        key.removeprefix(PREFIX): value for key, value in load_file(tmp_path / "out.safetensors").items()
    }
    for key, value in load_file(tmp_path / "converted.safetensors").items():
        assert torch.equal(found[key.removeprefix(PREFIX)], value), key


def test_a_stacked_weight_in_fp8_keeps_its_neighbours(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One scale for all that is stacked: where the new weight fits it, their bytes stay."""
    folder = request.getfixturevalue("tiny_flux")
    key, name, begin, end = STACKED["flux"]
    tiny.flux_file(folder, tmp_path / "plain.safetensors")
    save_file(tiny.fp8_scaled(load_file(tmp_path / "plain.safetensors")), tmp_path / "given.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "given.safetensors"), config=folder)
    write_patched(checkpoint, tmp_path / "out.safetensors", {key: lambda weight: -weight / 2}, {})
    before, after = load_file(tmp_path / "given.safetensors"), load_file(tmp_path / "out.safetensors")
    changed = {each for each in before if not torch.equal(before[each].float(), after[each].float())}
    assert changed == {PREFIX + name}
    old, new = before[PREFIX + name].float(), after[PREFIX + name].float()
    rows = slice(round(begin * len(old)), round(end * len(old)))
    torch.testing.assert_close(new[rows], -old[rows] / 2, rtol=0.07, atol=2**-9)
    new[rows] = old[rows]
    assert torch.equal(new, old)
