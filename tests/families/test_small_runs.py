"""What families of today are asked in everyday use, at the smallest: cards, fp8, tuning, Qwen-Image."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.open import open_checkpoint

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PRESET = """
name = "blades"
description = "blades"
kind = "object"
templates = ["a photo of {}"]
[[concepts]]
unsafe = "a knife"
safe = "a spoon"
[map]
word_prompts = 6
[steer]
steps = 4
early_steps = 1
trajectories_per_concept = 1
unconditional = 2
benign = 2
batch_size = 1
max_steps = 1
"""
# How a single file of the family is written, and its door there and in a folder.
FAMILIES: dict[str, tuple[Callable[[Path, Path], Path], str, str]] = {
    "flux2-klein": (tiny.flux2_file, "txt_in.weight", "context_embedder.weight"),
    "sd3": (tiny.sd3_file, "context_embedder.weight", "context_embedder.weight"),
}
TAGS = {"flux2-klein": "FLUX.2 klein", "sd3": "Stable Diffusion 3"}
POOLED = "y_embedder.mlp.0.weight"  # the second door of SD 3


@pytest.fixture(scope="module", params=FAMILIES)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def work(key: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, a preset, a prior, and an edit of it as a folder and as a map."""
    from trce_cli.cli.app import main

    work = tmp_path_factory.mktemp(key)
    (work / "folder").symlink_to(request.getfixturevalue(f"tiny_{key}"))
    (work / "blades.toml").write_text(PRESET)
    (work / "prior.txt").write_text("\n".join(tiny.SENTENCES[:4]))
    line = f"map {work}/folder -p {work}/blades.toml --prior {work}/prior.txt -o {work}/out -q"
    assert main([*line.split(), "--max-collateral", "1000", "--as", "diffusers", "--as", "map"]) == 0
    return work


def test_the_card_says_what_it_is_and_how_it_is_loaded(key: str, work: Path) -> None:
    card = (work / "out/README.md").read_text()
    family = open_checkpoint(str(work / "folder")).family
    assert TAGS[key] in card
    assert all(tag in card for tag in family.defaults.tags)
    assert family.defaults.doors in card
    assert "blades" in card
    history = json.loads((work / "out/trce.json").read_text())["history"]
    assert [entry["edit"] for entry in history] == ["map"]


@pytest.mark.parametrize("form", ["plain", "scaled"])
def test_a_file_in_fp8_is_edited_and_steered(
    key: str, work: Path, tmp_path: Path, form: str, trce: Callable[..., Any]
) -> None:
    write, door, _ = FAMILIES[key]
    whole = load_file(write(work / "folder", tmp_path / "whole.safetensors"))
    kept = ("pos_embed", "first_stage_model")  # what is no weight of a transformer
    fp8 = {k: v if any(each in k for each in kept) else v.to(torch.float8_e4m3fn) for k, v in whole.items()}
    state = fp8 if form == "plain" else tiny.fp8_scaled(whole)
    file, config = tmp_path / "in.safetensors", ("--config", work / "folder")
    save_file(state, file, metadata={"format": "pt"})
    run = trce("apply", work / "out.map.safetensors", file, *config, "-o", tmp_path / "out.safetensors")
    assert run.status == 0, run.err
    before, after = load_file(file), load_file(tmp_path / "out.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    doors = {f"model.diffusion_model.{each}" for each in (door, *[POOLED] * (key == "sd3"))}
    scales = {name.removesuffix(".weight") + ".scale_weight" for name in doors}
    assert doors <= changed <= doors | scales
    line = ["steer", file, *config, "-p", work / "blades.toml", "-o", tmp_path / "lora.safetensors"]
    line += ["--as", "lora", "--lora-rank", 2, "--lr", 0.1, "--max-drift", 1000, "--device", "cpu"]
    run = trce(*line, "--json")
    assert run.status == 0, run.err
    assert json.loads(run.out)["lora"]["max_rank"] == 2


def test_settings_are_tuned(work: Path, tiny_clip: Path, tmp_path: Path, trce: Callable[..., Any]) -> None:
    line = ["tune", work / "folder", "-p", work / "blades.toml", "--prior", work / "prior.txt"]
    line += ["--detector", f"clip:{tiny_clip}", "--count", 1, "--steps", 1, "--preserve", 0.5]
    run = trce(*line, "--device", "cpu", "-o", tmp_path / "tuning")
    assert run.status == 0, run.err
    (trial,) = json.loads((tmp_path / "tuning/tune.json").read_text())["trials"]
    assert (trial["failed"], trial["attack_success"]["total"]) == (None, 1)


def test_qwen_image_is_steered(
    tmp_path: Path, trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("tiny_qwen-image")
    # It has as many latents as large pictures do, whatever its sizes.
    monkeypatch.setattr("trce_cli.families.qwen_image.denoiser.LATENTS", 8)
    preset = tmp_path / "blades.toml"
    preset.write_text(PRESET)
    line = ["steer", folder, "-p", preset, "-o", tmp_path / "erased", "--max-drift", 1000, "--lr", 0.01]
    run = trce(*line, "--device", "cpu")
    assert run.status == 0, run.err
    before, after = (load_file(path / WEIGHTS) for path in (folder, tmp_path / "erased"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(name.startswith("transformer_blocks.") and ".attn.to_" in name for name in changed)
