"""Files with the same weights as a published single file, kept in another way: edited like their siblings."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from maps import random_map
from trce_cli.checkpoint.convert import write_folder
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.errors import BadInput
from trce_cli.families.sd.names import ema_from_ldm, ldm_from_ema

UNET = "unet/diffusion_pytorch_model.safetensors"
LDM = "model.diffusion_model."


def flat(folder: Path) -> dict[str, torch.Tensor]:
    """The parts of a folder, each weight behind its folder's name."""
    found = {}
    for path in folder.glob("*/*.safetensors"):
        found |= {f"{path.parent.name}.{key}": value for key, value in load_file(path).items()}
    return found


def variants(family: tiny.FamilyKey, folder: Path, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The folder's weights in every way; those of the U-Net alone need the folder as --config."""
    whole = load_file(tiny.single_file(family, folder, path))
    unet = {key: value for key, value in whole.items() if key.startswith(LDM)}
    rest = {key: value for key, value in whole.items() if not key.startswith(LDM)}
    return {
        "EMA-only": rest | {ema_from_ldm(key): value for key, value in unet.items()},
        "flat": flat(folder),
        "without text_model.": {key.replace(".text_model.", "."): value for key, value in whole.items()},
        "U-Net": unet,
        "U-Net by LDM's names": {key.removeprefix(LDM): value for key, value in unet.items()},
        "U-Net by diffusers' names": load_file(folder / UNET),
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_kind_is_edited_and_becomes_the_folder(
    family: tiny.FamilyKey, tmp_path: Path, request: pytest.FixtureRequest, trce: Callable
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    text_map = random_map(folder)
    saved = text_map.save(tmp_path / "map.safetensors")
    assert trce("apply", saved, folder, "-o", tmp_path / "edited").status == 0
    edited = load_file(tmp_path / "edited" / UNET)
    original = open_checkpoint(str(folder))
    for number, (kind, state) in enumerate(variants(family, folder, tmp_path / "whole.safetensors").items()):
        path, out = tmp_path / f"{number}.safetensors", tmp_path / f"{number}-out.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        outcome = trce("apply", saved, path, "--config", folder, "-o", out)
        assert outcome.status == 0, f"{kind}: {outcome.err}"
        assert load_file(out).keys() == state.keys(), kind
        found = open_checkpoint(str(out), config=folder)
        assert found.text_encoder_hash() == original.text_encoder_hash(), kind
        assert found.keys("vae") == original.keys("vae") or set(found.keys("vae")) == set(
            original.keys("vae")
        )
        write_folder(found, tmp_path / str(number), {}, {})
        for key, value in load_file(tmp_path / str(number) / UNET).items():
            torch.testing.assert_close(value, edited[key], rtol=1e-6, atol=1e-8)
        assert len(load_file(tmp_path / str(number) / UNET)) == len(edited), kind


def test_a_u_net_alone_asks_for_its_base(tiny_sd1: Path, tmp_path: Path, trce: Callable) -> None:
    for number, kind in enumerate(("U-Net", "U-Net by LDM's names", "U-Net by diffusers' names")):
        path = tmp_path / f"{number}.safetensors"
        state = variants("sd1", tiny_sd1, tmp_path / "whole.safetensors")[kind]
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        outcome = trce("map", path, "-p", "weapons", "-o", tmp_path / "out.safetensors")
        assert outcome.status == 2
        assert "--config" in outcome.err, kind
        assert "LoRA" not in outcome.err


def test_a_u_net_alone_of_another_base_is_refused(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    save_file(load_file(tiny_sd1 / UNET), path)
    with pytest.raises(BadInput):
        open_checkpoint(str(path), config=tiny_sdxl)


def test_a_text_encoder_alone_is_none(tiny_sd1: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_file(load_file(tiny_sd1 / "text_encoder/model.safetensors"), path)
    with pytest.raises(BadInput, match="a text encoder"):
        open_checkpoint(str(path), config=tiny_sd1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dots_that_ldm_dropped_are_found_again(family: str, request: pytest.FixtureRequest) -> None:
    for key in tiny.ldm_unet(request.getfixturevalue(f"tiny_{family}")):
        assert ldm_from_ema(ema_from_ldm(LDM + key)) == key
