"""FLUX.1 and Chroma: states against the pipelines, doors against an independent solution, every layout."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plugins
import tiny
from maps import PAIRS, PRESET, run_map, solved_plainly
from plain_pipes import load
from trce_cli import load_map
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import BadInput
from trce_cli.families.flux.text import FluxText
from trce_cli.families.patches import packed, unpacked
from trce_cli.families.t5.text import T5Text

CPU = torch.device("cpu")
PROMPTS = ["a photo of a dog", "", "Two Red apples, on a plate!", "the weather is fine today " * 200]
DOOR, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("tiny_flux")
    return found


def draw(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(
        pipe(
            ["a photo of a knife"], num_inference_steps=2, height=16, width=16, guidance_scale=3.5,
            output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images
    )  # fmt: skip


@torch.no_grad()
def encoded(pipe: Any, prompt: str, limit: int = 512) -> dict[str, torch.Tensor]:
    """What enters of a prompt by diffusers and transformers alone: by stream (positions, width)."""
    states, pooled, _ = pipe.encode_prompt([prompt], None, device=CPU, max_sequence_length=limit)
    return {"context": states[0], "pooled": pooled}


@pytest.mark.parametrize("limit", [512, 256])
def test_states_equal_the_pipelines_at_every_position(folder: Path, tmp_path: Path, limit: int) -> None:
    """256 are read where guidance is not embedded, as in schnell."""
    path = folder if limit == 512 else tiny.build_flux(tmp_path / "schnell", seed=8, guidance=False)
    checkpoint, pipe = open_checkpoint(str(path)), load(path)
    text: FluxText = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    wanted = {
        "context": {prompt: range(limit) for prompt in PROMPTS},
        "pooled": text.content(PROMPTS)["pooled"],
    }
    found: dict[str, dict[str, torch.Tensor]] = {"context": {}, "pooled": {}}
    for batch in text.states(wanted):
        for stream, states in batch.items():
            for prompt, rows in states.rows.items():
                found[stream][prompt] = states.embeddings[list(rows)]
    for prompt in PROMPTS:
        for stream, expected in encoded(pipe, prompt, limit).items():
            torch.testing.assert_close(found[stream][prompt], expected, rtol=1e-5, atol=1e-5)


def test_padding_says_the_prompt(checkpoint: Checkpoint, pipe: Any) -> None:
    """Why it is a slot: the denoiser sees it all, and T5 lets every position see every other."""
    last = [encoded(pipe, prompt)["context"][-1] for prompt in ("a knife", "a spoon")]
    assert (last[0] - last[1]).abs().max() > 1e-2
    text: FluxText = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    found = text.content(["a knife", "the weather is fine today " * 200])["context"]
    assert list(found["a knife"])[-8:] == [63, 127, 191, 255, 319, 383, 447, 511]
    assert list(found["the weather is fine today " * 200]) == list(range(512))


def test_slots_are_where_the_phrase_puts_them(checkpoint: Checkpoint) -> None:
    text: FluxText = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    unsafe, safe = "a photo of a knife on the table", "a photo of a wooden house on the table"
    read = {prompt: text.tokenizer.tokenizer(prompt).input_ids for prompt in (unsafe, safe, "a photo of a")}
    o, n = len(read[unsafe]) - 1, len(read[safe]) - 1
    before = len(read["a photo of a"]) - 1
    tail = len(text.tokenizer.tokenizer("on the table").input_ids) - 1

    def places(kind: str) -> list[tuple[int, int]]:
        found = text.slots(unsafe, safe, "knife", {kind: 1.0})["context"]
        assert {slot.kind for slot in found} == {kind}
        return sorted((slot.unsafe, slot.safe) for slot in found)

    assert places("EOS") == [(o, n)]
    assert places("PADS") == [(64 * part - 1,) * 2 for part in range(1, 9)]
    assert sum(slot.weight for slot in text.slots(unsafe, safe, "knife", {"PADS": 2.0})["context"]) == 2
    around = [(at, at) for at in range(before)] + [(o - at, n - at) for at in range(tail, 0, -1)]
    assert places("CONTENT") == around
    assert places("KEYWORD") == [(at, n - tail - 1) for at in range(before, o - tail)]


def test_each_door_is_the_independent_solution(folder: Path, pipe: Any, tmp_path: Path) -> None:
    """M = I + (B - A)(A + lambda P + r)^-1 in float64, from what diffusers encodes."""
    captions = tiny.SENTENCES
    lam, rho = 0.5, 1e-3
    out = run_map(folder, tmp_path, PRESET, "EOS=1,PADS=2", lam, rho)
    pads = [64 * part - 1 for part in range(1, 9)]
    ends = {text: len(pipe.tokenizer_2(text).input_ids) - 1 for pair in PAIRS for text in pair}
    ends |= {text: len(pipe.tokenizer_2(text).input_ids) - 1 for text in captions}

    def solved(stream: str) -> torch.Tensor:
        def rows(text: str, content: bool) -> torch.Tensor:
            states = encoded(pipe, text)[stream].double()
            if stream == "pooled":
                return states
            return states[[*(range(ends[text] + 1) if content else [ends[text]]), *pads]]

        weights = torch.tensor([1.0] + [2 / 8] * 8 if stream == "context" else [1.0], dtype=torch.float64)
        A = sum((o := rows(a, False)).mT @ (weights[:, None] * o) for a, _ in PAIRS) / len(PAIRS)
        B = sum(rows(b, False).mT @ (weights[:, None] * rows(a, False)) for a, b in PAIRS) / len(PAIRS)
        P = sum((c := rows(text, True)).mT @ c for text in captions) / len(captions)
        return solved_plainly(A, B, A + lam * P, rho)

    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors") for path in (folder, out)
    )
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == {DOOR, POOLED}
    for key, stream in ((DOOR, "context"), (POOLED, "pooled")):
        expected = before[key].double() @ solved(stream)
        change = (expected - before[key]).norm()
        assert (after[key] - expected).norm() <= 1e-4 * change
        assert (after[key] - expected).norm() <= 1e-5 * expected.norm()


def test_one_edit_by_every_route_draws_the_same(
    folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    from diffusers import FluxTransformer2DModel

    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    out = tmp_path / "out"
    command = f"map {folder} -p {tmp_path}/blades.toml --prior {tmp_path}/prior.txt -o {out} --energy 1 -q"
    command += " --preserve 0.01 --strength 4 --max-collateral 1000"
    assert (
        main([*command.split(), *["--as", "diffusers", "--as", "single-file", "--as", "lora", "--as", "map"]])
        == 0
    )
    pipe = load(folder)
    plain, original, expected = pipe.transformer, draw(pipe), draw(load(out))
    assert (expected - original).abs().max() > 1e-3
    text_map = load_map(tmp_path / "out.map.safetensors")
    text_map.apply_to(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    text_map.remove_from(pipe)
    assert torch.equal(draw(pipe), original)
    pipe.load_lora_weights(tmp_path / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    assert load_file(tmp_path / "out.lora.safetensors").keys() == {
        f"transformer.{layer}.{part}"
        for layer in ("context_embedder", "time_text_embed.text_embedder.linear_1")
        for part in ("lora_A.weight", "lora_B.weight")
    }

    # diffusers' own reader takes FLUX.1's true width for granted, so ours is held against the folder's names.
    file = tiny.flux_file(folder, tmp_path / "original.safetensors")
    edited = tmp_path / "edited.safetensors"
    run = trce("apply", tmp_path / "out.map.safetensors", file, "--config", folder, "-o", edited)
    assert run.status == 0, run.err
    one, other, were = (load_file(path) for path in (edited, tmp_path / "out.safetensors", file))
    prefix = "model.diffusion_model."
    assert {key.removeprefix(prefix) for key in one} == {key.removeprefix(prefix) for key in other}
    changed = {key for key, value in were.items() if not torch.equal(value, one[key])}
    assert changed == {f"{prefix}txt_in.weight", f"{prefix}vector_in.in_layer.weight"}
    for key, value in other.items():
        torch.testing.assert_close(one[prefix + key.removeprefix(prefix)], value)
    pipe.unload_lora_weights()
    state = {
        key: open_checkpoint(str(edited), config=folder).read("denoiser", key) for key in plain.state_dict()
    }
    pipe.transformer = FluxTransformer2DModel.from_config(plain.config)
    pipe.transformer.load_state_dict(state)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    line = ["generate", edited, "a photo of a knife", "--config", folder, "--compare", folder, "--steps", 2]
    run = trce(*line, "-o", tmp_path / "images")
    assert run.status == 0, run.err
    run = trce(*line, "--negative-prompt", "a dog", "-o", tmp_path / "guided")
    assert run.status == 0, run.err
    assert "vector_in" not in trce("diff", folder, out).err


def test_stage_2_evaluation_and_attacks_run(
    folder: Path, tmp_path: Path, trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    preset, prior = tmp_path / "blades.toml", tmp_path / "prior.txt"
    run = trce(
        "map", folder, "-p", preset, "--prior", prior, "-o", tmp_path / "mapped", "--max-collateral", 1000
    )
    assert run.status == 0, run.err
    run = trce(
        "steer", tmp_path / "mapped", "-p", preset, "-o", tmp_path / "erased", "--steps", 3,
        "--early-steps", 2, "--trajectories-per-concept", 1, "--unconditional", 2, "--benign", 2,
        "--max-steps", 2, "--batch-size", 2, "--max-drift", 1000,
    )  # fmt: skip
    assert run.status == 0, run.err
    before, after = (
        load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors")
        for name in ("mapped", "erased")
    )
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed
    assert all(key.startswith("transformer_blocks.") and ".attn.to_" in key for key in changed)
    plugins.install(tmp_path, plugins.REDS, monkeypatch)
    (tmp_path / "own.txt").write_text("a knife\na pistol\n")
    line = [tmp_path / "erased", "--against", folder, "-p", preset, "--detector", "reds"]
    line += ["--suite", "none", "--suite", f"own={tmp_path}/own.txt", "--steps", 1, "--device", "cpu"]
    run = trce("evaluate", *line, "-o", tmp_path / "evaluation")
    assert run.status == 0, run.err
    budget = "--ring-population 4 --ring-generations 1 --ring-length 3 --ring-positions 24 --prefix-length 2"
    budget += " --prefix-timesteps 1 --prefix-iterations 1 --inversion-iterations 1"
    run = trce("attack", *line, "-o", tmp_path / "attacks.csv", *budget.split())
    assert run.status == 0, run.err
    assert len((tmp_path / "attacks.csv").read_text().splitlines()) > 2


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("transformer/config.json", {"joint_attention_dim": 40}, "joint_attention_dim"),
        ("transformer/config.json", {"pooled_projection_dim": 40}, "pooled_projection_dim"),
        ("transformer/config.json", {"in_channels": 384, "out_channels": 64}, "sees pictures"),
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "FluxKontextPipeline"),
        ("text_encoder_2/config.json", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
        ("text_encoder_2/config.json", {"num_layers": 10**9}, "num_layers"),
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


def test_weights_that_are_missing_or_not_finite_are_told(
    folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    (tmp_path / "blades.toml").write_text(PRESET)
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "text_encoder_2/model.safetensors"
    whole = load_file(path)
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    for state, said in (
        ({name: value for name, value in whole.items() if name != key}, key),
        (whole | {key: torch.full_like(whole[key], torch.nan)}, "NaN"),
        (whole | {key: whole[key][:, :4].clone()}, "shape"),
    ):
        save_file(state, path, metadata={"format": "pt"})
        run = trce("map", copy, "-p", tmp_path / "blades.toml", "-o", tmp_path / "out")
        assert run.status == 2
        assert said in run.err
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def chroma(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("tiny_chroma")
    return found


def test_a_tokenizer_without_its_fast_form_says_what_it_needs(
    chroma: Path, tmp_path: Path, trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Chroma's repository has it: a SentencePiece model alone."""
    copy = shutil.copytree(chroma, tmp_path / "copy")
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/spiece.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    (tmp_path / "blades.toml").write_text(PRESET)
    run = trce("map", copy, "-p", tmp_path / "blades.toml", "-o", tmp_path / "out")
    assert run.status == 2
    assert "needs sentencepiece" in run.err
    assert "trce[sentencepiece]" in run.err
    assert not (tmp_path / "out").exists()
    file = tiny.flux_file(chroma, tmp_path / "file.safetensors")
    assert "tokenizer/spiece.model" in open_checkpoint(str(file), config=copy).drawn_from()


@torch.no_grad()
def test_chromas_states_equal_the_pipelines(chroma: Path) -> None:
    """Padding is masked there, so that only what is asked for is computed of it."""
    checkpoint, pipe = open_checkpoint(str(chroma)), load(chroma)
    text: T5Text = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    places = [0, 1, 2, 100, 511]
    (batch,) = text.states({"context": dict.fromkeys(PROMPTS, places)})
    for prompt in PROMPTS:
        expected = pipe._get_t5_prompt_embeds([prompt], device=CPU)[0][0, places]
        found = batch["context"].embeddings[list(batch["context"].rows[prompt])]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_chroma_predicts_what_its_pipeline_does(chroma: Path) -> None:
    """The mask of the text is its own affair: the very arguments of the pipeline give the same."""
    checkpoint, pipe = open_checkpoint(str(chroma)), load(chroma)
    seen: list[dict[str, Any]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        seen.append(kwargs | {"found": found[0]})

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    prompt = "a photo of a dog"
    pipe(prompt, num_inference_steps=2, height=16, width=16, guidance_scale=1.0, output_type="latent")
    denoiser = checkpoint.family.denoise(checkpoint)
    told = denoiser.condition([prompt], CPU)
    latents = unpacked(seen[0]["hidden_states"], 4, 4)
    found = denoiser.predict(
        denoiser.load(CPU), latents, seen[0]["timestep"] * 1000, told.told(told.rows([prompt]))
    )
    torch.testing.assert_close(packed(found), seen[0]["found"], rtol=1e-4, atol=1e-5)


def test_chromas_door_is_the_independent_solution(chroma: Path, tmp_path: Path) -> None:
    """The same from what meets the door of diffusers' own pipeline, whose T5 masks its padding."""
    captions = tiny.SENTENCES
    lam, rho = 0.5, 1e-3
    out = run_map(chroma, tmp_path, PRESET, "EOS=1,PADS=2", lam, rho)
    pipe, met = load(chroma), []
    pipe.transformer.context_embedder.register_forward_pre_hook(
        lambda _, args: met.append(args[0][0].double())
    )
    pads = [64 * part - 1 for part in range(1, 9)]

    def rows(text: str, content: bool) -> torch.Tensor:
        met.clear()
        pipe(text, num_inference_steps=1, height=16, width=16, guidance_scale=1.0, output_type="latent")
        end = len(pipe.tokenizer(text).input_ids) - 1
        return met[0][[*(range(end + 1) if content else [end]), *pads]]

    w = torch.tensor([1.0] + [2 / 8] * 8, dtype=torch.float64)[:, None]
    found = [(rows(a, False), rows(b, False)) for a, b in PAIRS]
    A, B = (
        sum(each.mT @ (w * o) for each, o in some) / len(PAIRS)
        for some in ([(o, o) for o, _ in found], [(n, o) for o, n in found])
    )
    P = sum((c := rows(text, True)).mT @ c for text in captions) / len(captions)
    M = solved_plainly(A, B, A + lam * P, rho)
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors")[DOOR].double()
        for path in (chroma, out)
    )
    expected = before @ M
    assert (after - expected).norm() <= 1e-5 * expected.norm()
    assert (after - expected).norm() <= 1e-4 * (expected - before).norm()


def test_one_edit_of_chroma_by_every_route(chroma: Path, tmp_path: Path, trce: Callable[..., Any]) -> None:
    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    out = tmp_path / "out"
    command = f"map {chroma} -p {tmp_path}/blades.toml --prior {tmp_path}/prior.txt -o {out} --energy 1 -q"
    command += " --preserve 0.01 --strength 4 --max-collateral 1000"
    assert main([*command.split(), *["--as", "diffusers", "--as", "lora", "--as", "map"]]) == 0
    before, after = (
        load_file(path / "transformer/diffusion_pytorch_model.safetensors") for path in (chroma, out)
    )
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == {DOOR}
    pipe = load(chroma)
    original, expected = draw(pipe), draw(load(out))
    assert (expected - original).abs().max() > 1e-3
    text_map = load_map(tmp_path / "out.map.safetensors")
    text_map.apply_to(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    text_map.remove_from(pipe)
    pipe.load_lora_weights(tmp_path / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    file = tiny.flux_file(chroma, tmp_path / "original.safetensors")
    edited = tmp_path / "edited.safetensors"
    run = trce("apply", tmp_path / "out.map.safetensors", file, "--config", chroma, "-o", edited)
    assert run.status == 0, run.err
    one, were = load_file(edited), load_file(file)
    door = "model.diffusion_model.txt_in.weight"
    assert {key for key, value in were.items() if not torch.equal(value, one[key])} == {door}
    torch.testing.assert_close(one[door], after[DOOR])
    with warnings.catch_warnings(record=True) as said:  # diffusers' own, of a class that Chroma's is made of
        warnings.simplefilter("always")
        run = trce(
            "generate", edited, "a photo of a knife", "--config", chroma, "--steps", 2, "-o", tmp_path / "i"
        )
    assert run.status == 0, run.err
    assert not [each for each in said if issubclass(each.category, FutureWarning)]
