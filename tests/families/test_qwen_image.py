"""Qwen-Image: states against its own pipeline, and one edit by every route."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from maps import run_map
from plain_pipes import load
from trce_cli import load_map
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import BadInput
from trce_cli.families.causal_llm.text import LlmText
from trce_cli.families.patches import packed, unpacked
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_preset

CPU = torch.device("cpu")
PROMPTS = ["a photo of a dog", "", "Two {red} apples, on a plate!", "the weather is fine today " * 200]
DOOR = "txt_in.weight"
PRESET = """
name = "blades"
description = "blades"
kind = "object"
[[concepts]]
unsafe = "a knife"
safe = "a spoon"
[[concepts]]
unsafe = "a pistol"
safe = "a tulip"
"""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("tiny_qwen-image")
    return found


def draw(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(
        pipe(
            ["a photo of a knife"], negative_prompt=[""], true_cfg_scale=2.0, num_inference_steps=2,
            height=16, width=16, output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images
    )  # fmt: skip


@torch.no_grad()
def check_states(folder: Path, pipe: Any) -> None:
    checkpoint = open_checkpoint(str(folder))
    text: LlmText = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    counts = [tokens.count for tokens in text.tokenizer.tokens(PROMPTS)]
    wanted = {prompt: range(count) for prompt, count in zip(PROMPTS, counts, strict=True)}
    (batch,) = text.states({"context": wanted})
    for prompt, rows in batch["context"].rows.items():
        states, mask = pipe.encode_prompt(prompt, device=CPU, max_sequence_length=512)
        assert mask is None
        expected = pipe.transformer.txt_norm(states)[0]
        torch.testing.assert_close(batch["context"].embeddings[list(rows)], expected, rtol=1e-5, atol=2e-5)


def test_states_equal_the_pipelines_at_every_position(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder)
    check_states(folder, pipe)
    # Published configurations are of an older kind: the text's sizes lie beside the pictures'.
    copy = shutil.copytree(folder, tmp_path / "flat")
    path = copy / "text_encoder/config.json"
    config = json.loads(path.read_text())
    inner = config.pop("text_config")
    rope = inner.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    path.write_text(json.dumps(inner | config | old))
    check_states(copy, pipe)


def test_the_edit_is_that_of_an_independent_solution(folder: Path, tmp_path: Path) -> None:
    """M = I + (B - A)(A + lambda P + r)^-1 in float64, from what meets the door of diffusers' pipeline."""
    lam, rho = 0.5, 1e-3
    out = run_map(folder, tmp_path, PRESET, "END=1", lam, rho)
    pipe, met = load(folder), []
    pipe.transformer.txt_in.register_forward_pre_hook(lambda _, args: met.append(args[0][0].double()))

    def entering(prompt: str) -> torch.Tensor:
        """(tokens, width), behind the norm; the first tokens of the template are dropped before."""
        met.clear()
        pipe(prompt, true_cfg_scale=1.0, num_inference_steps=2, height=16, width=16, output_type="latent")
        return met[0]

    pairs = prompt_pairs([load_preset(str(tmp_path / "blades.toml"))])
    o, n = (torch.stack([entering(getattr(pair, side))[-1] for pair in pairs]) for side in ("unsafe", "safe"))
    begin = len(pipe.tokenizer(pipe.prompt_template_encode.partition("{}")[0]).input_ids)
    begin -= pipe.prompt_template_encode_start_idx
    captions = [entering(caption) for caption in tiny.SENTENCES]
    c = torch.cat([captions[0], *(each[begin:] for each in captions[1:])])
    G = o.mT @ o / len(pairs) + lam * c.mT @ c / len(captions)
    values, vectors = torch.linalg.eigh(G)
    assert values[0] > 1e-9 * values[-1]  # nothing is cut off
    values = values + rho * values[:-1].mean()
    M = torch.eye(len(G)) + ((n - o).mT @ o / len(pairs)) @ (vectors / values @ vectors.mT)
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors")[DOOR].double()
        for path in (folder, out)
    )
    expected = before @ M
    assert (after - expected).norm() <= 1e-5 * expected.norm()
    assert (after - expected).norm() <= 1e-4 * (expected - before).norm()


def test_one_edit_by_every_route_draws_the_same(
    folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    from diffusers import QwenImageTransformer2DModel

    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    out = tmp_path / "out"
    command = f"map {folder} -p {tmp_path}/blades.toml --prior {tmp_path}/prior.txt -o {out} --energy 1 -q"
    command += " --token-weights suffix=1,last=1,keyword=1 --preserve 0.01 --strength 8 --max-collateral 1000"
    assert (
        main([*command.split(), *["--as", "diffusers", "--as", "single-file", "--as", "lora", "--as", "map"]])
        == 0
    )
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors") for path in (folder, out)
    )
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == [DOOR]

    pipe = load(folder)
    plain, original, expected = pipe.transformer, draw(pipe), draw(load(out))
    assert (expected - original).abs().max() > 1e-3
    text_map = load_map(tmp_path / "out.map.safetensors")
    text_map.apply_to(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    text_map.remove_from(pipe)
    assert torch.equal(draw(pipe), original)
    pipe.transformer = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(folder), subfolder="transformer"
    )
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    pipe.transformer = plain
    pipe.load_lora_weights(tmp_path / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)

    file = tiny.qwen_image_file(folder, tmp_path / "original.safetensors")
    edited = tmp_path / "edited.safetensors"
    run = trce("apply", tmp_path / "out.map.safetensors", file, "--config", folder, "-o", edited)
    assert run.status == 0, run.err
    torch.testing.assert_close(load_file(edited)[f"model.diffusion_model.{DOOR}"], after[DOOR])
    line = ["generate", edited, "a photo of a knife", "--config", folder, "--width", 16, "--height", 16]
    run = trce(*line, "--steps", 1, "-o", tmp_path / "none")
    assert run.status == 2
    assert "--steps 2" in run.err
    run = trce(*line, "--steps", 2, "--guidance-scale", 2, "-o", tmp_path / "images")
    assert run.status == 0, run.err


def test_packing_is_the_pipelines() -> None:
    from diffusers import QwenImagePipeline

    latents = torch.randn(2, 4, 6, 8)
    tokens = QwenImagePipeline._pack_latents(latents[:, None], 2, 4, 6, 8)
    assert torch.equal(packed(latents), tokens)
    assert torch.equal(unpacked(tokens, 3, 4), latents)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("transformer/config.json", {"joint_attention_dim": 40}, "joint_attention_dim"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "QwenImageEditPipeline"),
        ("text_encoder/config.json", {"model_type": "qwen3_vl"}, "model_type"),
    ],
)
def test_variants_that_are_not_known_are_refused(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(BadInput, match=said):
        open_checkpoint(str(copy))
