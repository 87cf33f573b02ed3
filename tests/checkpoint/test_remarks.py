"""What is said of a single file that is odd and yet valid, and of what a form cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tiny
from maps import random_map

POSITION = "cond_stage_model.transformer.text_model.embeddings.position"


def test_more_positions_are_read_from_the_weights(tiny_sd1: Path, tmp_path: Path, trce: Callable) -> None:
    path = tiny.single_file("sd1", tiny_sd1, tmp_path / "long.safetensors")
    state = load_file(path)
    state[f"{POSITION}_embedding.weight"] = state[f"{POSITION}_embedding.weight"].repeat(4, 1)[:248]
    save_file(state, path)
    done = trce(
        "map", path, "--config", tiny_sd1, "-p", "weapons", "--as", "diffusers", "-o", tmp_path / "out"
    )
    assert done.status == 0, done.err
    assert "has 248 positions" in done.err
    assert "--config" in done.err
    config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert config["max_position_embeddings"] == 248
    random_map(tmp_path / "out").save(tmp_path / "map.safetensors")
    done = trce(
        "apply", tmp_path / "map.safetensors", tmp_path / "out", "--as", "single-file", "-o",
        tmp_path / "again.safetensors",
    )  # fmt: skip
    assert (done.status, "refuse a single file" in done.err) == (0, True), done.err


def test_broken_ids_of_positions_are_told(tiny_sd1: Path, tmp_path: Path, trce: Callable) -> None:
    path = tiny.single_file("sd1", tiny_sd1, tmp_path / "merge.safetensors")
    state, saved = load_file(path), random_map(tiny_sd1).save(tmp_path / "map.safetensors")
    for number, ids in enumerate((torch.arange(77)[None], torch.arange(77.0)[None] * 0.99)):
        save_file(state | {f"{POSITION}_ids": ids}, path)
        out = tmp_path / f"{number}.safetensors"
        done = trce("apply", saved, path, "--config", tiny_sd1, "-o", out)
        assert (done.status, "position_ids does not count" in done.err) == (0, bool(number)), done.err


def test_the_pooled_layer_of_a_lora_is_told(tiny_sdxl: Path, tmp_path: Path, trce: Callable) -> None:
    for pooled in (True, False):
        saved = random_map(tiny_sdxl, pooled=pooled).save(tmp_path / f"{pooled}.safetensors")
        done = trce("apply", saved, tiny_sdxl, "--as", "lora", "-o", tmp_path / f"{pooled}-lora.safetensors")
        assert (done.status, "--no-pooled" in done.err) == (0, pooled), done.err
