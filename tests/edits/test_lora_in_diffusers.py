"""What diffusers makes of a LoRA whose layers are of several ranks, as that of both stages is."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.files import open_edit


@pytest.mark.parametrize("key", ["sd1", "sdxl", "qwen-image", "z-image", "flux", "sd3"])
def test_layers_of_several_ranks_are_each_loaded_whole(
    key: str, tmp_path: Path, request: pytest.FixtureRequest, trce: Callable[..., Any]
) -> None:
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(f"tiny_{key}")
    checkpoint = open_checkpoint(str(folder))
    torch.manual_seed(0)
    names = [name for name in checkpoint.keys("denoiser") if checkpoint.family.tuned(name)]
    names = [name for name in names if name.endswith(".weight")]
    names += [name for door in checkpoint.doors() for name in door.weights]
    wanted = {}
    for number, name in enumerate(names):
        weight = checkpoint.read("denoiser", name)
        rank = 1 + number % 3
        wanted[name] = weight + 0.1 * torch.randn(len(weight), rank) @ torch.randn(rank, weight[0].numel())
    save_file(wanted, tmp_path / "weights.safetensors")
    run = trce(
        "apply", tmp_path / "weights.safetensors", folder, "-o", tmp_path / "lora.safetensors",
        "--as", "lora", "--energy", 0.999999,
    )  # fmt: skip
    assert run.status == 0, run.err
    held = load_file(tmp_path / "lora.safetensors")
    assert (
        len({value.shape[0] for name, value in held.items() if "lora_down" in name or "lora_A" in name}) > 1
    )
    assert len({float(value) for name, value in held.items() if name.endswith(".alpha")}) <= 1
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        said = json.loads(file.metadata().get("lora_adapter_metadata", "{}"))
    if checkpoint.family.denoiser == "transformer":  # diffusers 0.39 wants to be told
        assert said["transformer.lora_alpha"] == said["transformer.r"]
        assert said["transformer.alpha_pattern"] == said["transformer.rank_pattern"] != {}
        for path in said["transformer.target_modules"]:
            ranks = [r for each, r in said["transformer.rank_pattern"].items() if re.fullmatch(each, path)]
            assert len(held[f"transformer.{path}.lora_A.weight"]) == (ranks or [said["transformer.r"]])[0]
    again = open_edit(tmp_path / "lora.safetensors").weight_edits(checkpoint)
    for name, weight in wanted.items():
        before = checkpoint.read("denoiser", name)
        assert (again[name](before) - weight).norm() < 2e-3 * (weight - before).norm(), name
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = getattr(pipe, checkpoint.family.denoiser).state_dict()
    for name, weight in wanted.items():
        before = checkpoint.read("denoiser", name)
        assert (found[name] - weight).norm() < 2e-3 * (weight - before).norm(), name
