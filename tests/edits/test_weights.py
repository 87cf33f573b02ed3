"""Weights of a denoiser as other erasers hand them out, taken as edits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trce_cli.edits.files import is_edit

UNET = "unet/diffusion_pytorch_model.safetensors"
Run = Callable[..., Any]


@pytest.fixture
def erased(tiny_sd1: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Every weight of the U-Net, each a little other than the checkpoint's."""
    torch.manual_seed(1)
    return {key: each + 0.1 * torch.randn_like(each) for key, each in load_file(tiny_sd1 / UNET).items()}


def keys_and_values(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: each for key, each in weights.items() if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("partial", [True, False])
def test_weights_take_the_place_of_the_checkpoint_s(
    trce: Run, tiny_sd1: Path, erased: dict[str, torch.Tensor], tmp_path: Path, partial: bool, strength: float
) -> None:
    changed = keys_and_values(erased) if partial else erased
    save_file(changed, tmp_path / "uce.safetensors")
    told = trce(
        "apply", tmp_path / "uce.safetensors", tiny_sd1, "-o", tmp_path / "out", "--strength", strength
    )
    assert told.status == 0, told.err
    before, after = (load_file(folder / UNET) for folder in (tiny_sd1, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, weight in before.items():
        wanted = torch.lerp(weight, changed[key], strength) if key in changed else weight
        torch.testing.assert_close(after[key], wanted, rtol=1e-5, atol=1e-6)
    (entry,) = json.loads((tmp_path / "out" / "trce.json").read_text())["history"]
    assert entry["edits"][0]["form"] == "weights"


@pytest.mark.parametrize("key", ["z-image", "flux", "chroma", "flux2-klein", "sd3"])
def test_a_whole_transformer_takes_the_place_of_the_checkpoint_s(
    trce: Run, key: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With padding tokens and positions, which are no layer's weights."""
    folder, weights = (
        request.getfixturevalue(f"tiny_{key}"),
        "transformer/diffusion_pytorch_model.safetensors",
    )
    tuned = {name: each + 0.1 for name, each in load_file(folder / weights).items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    told = trce("apply", tmp_path / "tuned.safetensors", folder, "-o", tmp_path / "out")
    assert told.status == 0, told.err
    after = load_file(tmp_path / "out" / weights)
    assert after.keys() == tuned.keys()
    assert all(torch.equal(after[name], each) for name, each in tuned.items())


def test_they_become_a_lora(
    trce: Run, tiny_sd1: Path, erased: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    changed = keys_and_values(erased)
    save_file(changed, tmp_path / "esd.safetensors")
    lora = tmp_path / "lora.safetensors"
    edit = ("apply", tmp_path / "esd.safetensors", tiny_sd1, "-o", lora, "--as", "lora", "--energy", 1)
    assert trce(*edit).status == 0
    assert trce("apply", lora, tiny_sd1, "-o", tmp_path / "out").status == 0
    after = load_file(tmp_path / "out" / UNET)
    for key, weight in changed.items():
        torch.testing.assert_close(after[key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrong", ["name", "shape", "value", "integers", "pickle"])
def test_what_does_not_fit_is_refused(
    trce: Run, tiny_sd1: Path, erased: dict[str, torch.Tensor], tmp_path: Path, wrong: str
) -> None:
    changed, path = keys_and_values(erased), tmp_path / "uce.safetensors"
    key = next(iter(changed))
    match wrong:
        case "name":
            changed["up_blocks.99.to_k.weight"] = changed.pop(key)
        case "shape":
            changed[key] = changed[key][:-1].contiguous()
        case "value":
            changed[key][0, 0] = torch.nan
        case "integers":
            changed[key] = changed[key].int()
    save_file(changed, path)
    if wrong == "pickle":
        path = tmp_path / "uce.pt"
        torch.save(changed, path)
    told = trce("apply", path, tiny_sd1, "-o", tmp_path / "out")
    assert told.status == 2, told.err
    says = {
        "name": "up_blocks.99.to_k.weight, which",
        "shape": f"{key} in",
        "value": "NaN",
        "integers": "no weight",
        "pickle": "pickle",
    }
    assert says[wrong] in told.err
    assert not (tmp_path / "out").exists()


def test_only_a_file_with_an_edit_is_one(
    tiny_sd1: Path, erased: dict[str, torch.Tensor], trce: Run, tmp_path: Path
) -> None:
    save_file(erased, tmp_path / "unet.safetensors")
    assert is_edit(str(tmp_path / "unet.safetensors"))
    assert (
        trce("apply", tmp_path / "unet.safetensors", tiny_sd1, "-o", tmp_path / "whole.safetensors").status
        == 0
    )
    for other in (
        "emoji",
        str(tiny_sd1),
        str(tmp_path / "whole.safetensors"),
        str(tmp_path / "no.safetensors"),
    ):
        assert not is_edit(other)
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert not is_edit(str(tiny_sd1 / part))


def test_an_evaluation_takes_an_edit_in_a_checkpoint_s_place(
    trce: Run, tiny_sd1: Path, tiny_clip: Path, erased: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    edit, output = tmp_path / "uce.safetensors", tmp_path / "out"
    save_file(keys_and_values(erased), edit)
    line = ["evaluate", edit, "--against", tiny_sd1, "--preset", "weapons", "-o", output, "--json"]
    line += ["--detector", f"clip:{tiny_clip}", "--suite", "explicit", "--count", 1, "--steps", 1]
    told = trce(*line, "--device", "cpu")
    assert told.status == 0, told.err
    results = json.loads(told.out)
    assert results["erased"]["name"] == edit.name
    assert results["figures"]["explicit.change"] > 0
    copy = output / "edited" / UNET
    made = copy.stat().st_mtime_ns
    assert trce(*line, "--device", "cpu").status == 0
    assert copy.stat().st_mtime_ns == made
    save_file({key: 2 * each for key, each in keys_and_values(erased).items()}, edit)
    assert trce(*line, "--device", "cpu", "--force").status == 0
    assert copy.stat().st_mtime_ns != made
