"""FLUX.2 klein: states against its own pipeline, the edit against an independent solution, every layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plugins
import tiny
from maps import PAIRS, PRESET, run_map, solved_plainly
from plain_pipes import load
from trce_cli import load_map, solve_map
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.causal_llm.text import LlmText
from trce_cli.families.patches import packed, unpacked

CPU = torch.device("cpu")
PROMPTS = [
    "a photo of a dog",
    "",
    "Two <|endoftext|> apples, on a plate!",
    "the weather is fine today " * 200,
]
DOOR = "context_embedder.weight"
WEIGHTS, TEXT = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
PADS = [63, 127, 191, 255, 319, 383, 447, 511]
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("tiny_flux2-klein")
    return found


def draw(pipe: Any, guidance: float = 2.0) -> torch.Tensor:
    return torch.as_tensor(
        pipe(
            prompt=["a photo of a knife"], num_inference_steps=2, height=16, width=16,
            guidance_scale=guidance, output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images
    )  # fmt: skip


def text_of(checkpoint: Checkpoint) -> LlmText:
    text: LlmText = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    return text


@torch.no_grad()
def encoded(pipe: Any, prompt: str) -> torch.Tensor:
    """What enters of a prompt by diffusers and transformers alone, (512, width)."""
    found: torch.Tensor = pipe.encode_prompt([prompt], device=CPU)[0][0]
    return found


def test_states_equal_the_pipelines_at_every_position(checkpoint: Checkpoint, pipe: Any) -> None:
    """Padding among them, whether all of it is asked for or some, many prompts to a sequence."""
    text = text_of(checkpoint)
    for places in (range(512), [0, 3, *PADS]):
        found = {
            prompt: batch["context"].embeddings[list(rows)]
            for batch in text.states({"context": dict.fromkeys(PROMPTS, places)})
            for prompt, rows in batch["context"].rows.items()
        }
        for prompt in PROMPTS:
            expected = encoded(pipe, prompt)[list(places)]
            torch.testing.assert_close(found[prompt], expected, rtol=1e-5, atol=1e-5)


def test_padding_says_the_prompt(checkpoint: Checkpoint, pipe: Any) -> None:
    """Why it is a slot: the denoiser sees all of it, and each position the whole prompt, at a depth apart."""
    last = [encoded(pipe, prompt)[-1] for prompt in ("a knife", "a spoon")]
    assert all(
        (one - other).abs().max() > 1e-3 for one, other in zip(*(s.chunk(3) for s in last), strict=True)
    )
    content = text_of(checkpoint).content(["a knife", *PROMPTS])["context"]
    assert list(content["a knife"])[-8:] == PADS
    assert list(content[PROMPTS[-1]])[-1] == 511
    assert len(content[PROMPTS[-1]]) == 512 - len(pipe.tokenizer("<|im_start|>user\n").input_ids)


def test_slots_are_where_the_template_and_the_phrase_put_them(checkpoint: Checkpoint, pipe: Any) -> None:
    text = text_of(checkpoint)
    unsafe, safe = "a knife on the table", "a wooden spoon on the table"

    def places(kind: str, pair: tuple[str, str] = (unsafe, safe)) -> list[tuple[int, int]]:
        found = text.slots(*pair, "knife", {kind: 1.0})["context"]
        assert {slot.kind for slot in found} <= {kind}
        return sorted((slot.unsafe, slot.safe) for slot in found)

    read = pipe.tokenizer
    o, n = (len(read(f"<|im_start|>user\n{prompt}{SUFFIX}").input_ids) for prompt in (unsafe, safe))
    suffix = len(read(SUFFIX).input_ids)
    assert places("END") == [(o - 1, n - 1)]
    assert places("SUFFIX") == [(o - at, n - at) for at in range(suffix, 0, -1)]
    assert places("LAST") == [(o - suffix - 1, n - suffix - 1)]
    assert places("PADS") == [(at, at) for at in PADS]
    assert sum(slot.weight for slot in text.slots(unsafe, safe, "knife", {"PADS": 2.0})["context"]) == 2
    long = "the weather is fine today " * 200
    assert places("PADS", (long, long + "spoon")) == []
    assert sorted(slot[1:3] for slot in text.padding(unsafe, safe)) == [(at, at) for at in PADS]
    assert checkpoint.family.slots[-1] == "PADS"


def test_the_edit_is_that_of_an_independent_solution(folder: Path, pipe: Any, tmp_path: Path) -> None:
    """M = I + (B - A)(A + lambda P + r)^-1 in float64, from what diffusers encodes."""
    lam, rho = 0.5, 1e-3
    out = run_map(folder, tmp_path, PRESET, "END=1,PADS=2", lam, rho)
    prefix = len(pipe.tokenizer("<|im_start|>user\n").input_ids)

    def rows(prompt: str, content: bool = False, begin: int = prefix) -> torch.Tensor:
        end = len(pipe.tokenizer(f"<|im_start|>user\n{prompt}{SUFFIX}").input_ids)
        own = range(begin, end) if content else [end - 1]
        return encoded(pipe, prompt)[[*own, *PADS]].double()

    weights = torch.tensor([1.0] + [2 / 8] * 8, dtype=torch.float64)[:, None]
    A = sum((o := rows(a)).mT @ (weights * o) for a, _ in PAIRS) / len(PAIRS)
    B = sum(rows(b).mT @ (weights * rows(a)) for a, b in PAIRS) / len(PAIRS)
    captions = [rows(text, True, prefix if number else 0) for number, text in enumerate(tiny.SENTENCES)]
    P = sum(c.mT @ c for c in captions) / len(captions)
    M = solved_plainly(A, B, A + lam * P, rho)
    before, after = (load_file(path / WEIGHTS) for path in (folder, out))
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == {DOOR}
    expected = before[DOOR].double() @ M
    assert (after[DOOR] - expected).norm() <= 1e-3 * (expected - before[DOOR]).norm()
    assert (after[DOOR] - expected).norm() <= 1e-5 * expected.norm()
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and relative.as_posix() != WEIGHTS:
            assert path.read_bytes() == (out / relative).read_bytes()
    (told,) = json.loads((out / "trce.json").read_text())["history"]
    assert 0 < told["figures"]["padding_moved"] < 1.5  # a guard of its own: most of what is seen is padding


@pytest.fixture(scope="module")
def edited(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map, a LoRA, a folder and a single file of one and the same edit."""
    where = tmp_path_factory.mktemp("flux2")
    (where / "blades.toml").write_text(PRESET)
    (where / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    command = f"map {folder} -p {where}/blades.toml --prior {where}/prior.txt -o {where}/out --energy 1 -q"
    command += " --preserve 0.01 --strength 4 --max-collateral 1000"
    assert (
        main([*command.split(), *["--as", "diffusers", "--as", "single-file", "--as", "lora", "--as", "map"]])
        == 0
    )
    return where


def test_every_route_draws_the_same(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    from diffusers import Flux2Transformer2DModel
    from PIL import Image

    pipe = load(folder)
    plain, original, expected = pipe.transformer, draw(pipe), draw(load(edited / "out"))
    assert (expected - original).abs().max() > 1e-3
    text_map = load_map(edited / "out.map.safetensors")
    text_map.apply_to(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    text_map.remove_from(pipe)
    assert torch.equal(draw(pipe), original)
    pipe.load_lora_weights(edited / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    pipe.unload_lora_weights()
    for part in ("out.safetensors", "in place"):
        path = edited / part
        if part == "in place":
            file = tiny.flux2_file(folder, tmp_path / "original.safetensors", prefix="")
            path = tmp_path / "edited.safetensors"
            run = trce("apply", edited / "out.map.safetensors", file, "--config", folder, "-o", path)
            assert run.status == 0, run.err
            before, after = load_file(file), load_file(path)
            assert {key for key in before if not torch.equal(before[key], after[key])} == {"txt_in.weight"}
        pipe.transformer = Flux2Transformer2DModel.from_single_file(
            str(path), config=str(folder), subfolder="transformer"
        )
        torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    pipe.transformer = plain
    line = ["generate", path, "a photo of a knife", "--config", folder, "--compare", folder, "--steps", 2]
    run = trce(*line, "--guidance-scale", 2, "-o", tmp_path / "images")
    assert run.status == 0, run.err
    for name, picture in (("original", original), ("erased", expected)):
        (png,) = (tmp_path / "images").glob(f"*{name}*.png")
        drawn = torch.as_tensor(np.array(Image.open(png))).permute(2, 0, 1) / 255
        torch.testing.assert_close(drawn, picture[0], rtol=0, atol=1.5 / 255)


def test_the_original_layout_is_diffusers_own(folder: Path, pipe: Any, tmp_path: Path) -> None:
    """Our names against diffusers' converter, and the prefix of other tools, which it does not know."""
    from diffusers import Flux2Transformer2DModel

    own = pipe.transformer.state_dict()
    for prefix in ("", "model.diffusion_model."):
        file = tiny.flux2_file(folder, tmp_path / f"file{len(prefix)}.safetensors", prefix)
        single = open_checkpoint(str(file), config=folder)
        assert set(single.keys("denoiser")) == set(own)
        assert all(torch.equal(single.read("denoiser", key), value) for key, value in own.items())
    model = Flux2Transformer2DModel.from_single_file(
        str(tmp_path / "file0.safetensors"), config=str(folder), subfolder="transformer"
    )
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_it_predicts_and_samples_as_its_pipeline_does(checkpoint: Checkpoint, pipe: Any) -> None:
    seen: list[dict[str, Any]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        seen.append(kwargs | {"found": found[0]})

    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    draw(pipe, guidance=1.0)
    handle.remove()
    denoiser = checkpoint.family.denoise(checkpoint)
    module = denoiser.load(CPU)
    told = denoiser.condition(["a photo of a knife"], CPU)
    assert not told.lengths
    schedule = denoiser.schedule(2)
    latents = unpacked(seen[0]["hidden_states"], 4, 4)
    for at, step in enumerate(seen):
        torch.testing.assert_close(packed(latents), step["hidden_states"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule.timesteps[at : at + 1], step["timestep"] * 1000)
        t = schedule.timesteps[at : at + 1]
        found = denoiser.predict(module, latents, t, told.told(told.rows(["a photo of a knife"])))
        torch.testing.assert_close(packed(found), step["found"], rtol=1e-4, atol=1e-5)
        latents = schedule.step(found, t, latents)


@torch.no_grad()
def test_latents_are_less_the_batch_norms_statistics(checkpoint: Checkpoint, pipe: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    ours = checkpoint.family.pipe(checkpoint, CPU, torch.float32)
    found = checkpoint.family.latents(ours, images)
    assert tuple(found.shape[1:]) == checkpoint.family.denoise(checkpoint).latent_shape
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = pipe._pack_latents(pipe._encode_vae_image(pixels, None))
    torch.testing.assert_close(packed(found), expected, rtol=1e-4, atol=1e-5)


def test_guidance_is_as_the_pipeline_decides(folder: Path, tmp_path: Path, trce: Callable[..., Any]) -> None:
    """The base is guided, away from a negative prompt too; what is distilled takes no guidance."""
    line = ["a photo of a knife", "--steps", 2]

    def png(path: Path, *options: Any) -> bytes:
        out = tmp_path / f"{path.name}{'-'.join(map(str, options))}"
        run = trce("generate", path, *line, *options, "-o", out)
        assert run.status == 0, run.err
        (found,) = (each for each in out.glob("*.png") if each.name != "grid.png")
        from PIL import Image

        return Image.open(found).tobytes()

    assert png(folder, "--guidance-scale", 3) != png(folder, "--guidance-scale", 1)
    assert png(folder, "--guidance-scale", 3) != png(
        folder, "--guidance-scale", 3, "--negative-prompt", "dog"
    )
    distilled = shutil.copytree(folder, tmp_path / "distilled")
    say(distilled, "model_index.json", is_distilled=True)
    assert png(distilled, "--guidance-scale", 3) == png(folder, "--guidance-scale", 1)
    run = trce("generate", distilled, *line, "--negative-prompt", "dog", "-o", tmp_path / "x")
    assert run.status == 2
    assert "--negative-prompt" in run.err
    assert "distilled" in trce("inspect", distilled).out


def test_stage_2_evaluation_and_attacks_run(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = edited / "blades.toml"
    run = trce(
        "steer", edited / "out", "-p", preset, "-o", tmp_path / "erased", "--steps", 3, "--early-steps", 2,
        "--trajectories-per-concept", 1, "--unconditional", 2, "--benign", 2, "--max-steps", 2,
        "--batch-size", 2, "--max-drift", 1000, "--as", "diffusers", "--as", "lora", "--energy", 1,
    )  # fmt: skip
    assert run.status == 0, run.err
    before, after = (load_file(path / WEIGHTS) for path in (edited / "out", tmp_path / "erased"))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {
        f"transformer_blocks.{block}.attn.to_{part}.weight"
        for block in (0, 1)
        for part in ("q", "k", "v", "out.0")
    }
    # Both stages in one LoRA for the original, of layers of several ranks.
    pipe = load(folder)
    pipe.load_lora_weights(tmp_path / "erased.lora.safetensors")
    torch.testing.assert_close(draw(pipe), draw(load(tmp_path / "erased")), rtol=0, atol=2e-4)
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


def say(copy: Path, file: str, **values: Any) -> None:
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("transformer/config.json", {"joint_attention_dim": 40}, "joint_attention_dim"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
        ("transformer/config.json", {"in_channels": 32}, "channels"),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 4]}, "axes_dims_rope"),
        ("transformer/config.json", {"mlp_ratio": 1e9}, "mlp_ratio"),
        ("vae/config.json", {"patch_size": [4, 4]}, "patch_size"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "Flux2Pipeline"),
        ("model_index.json", {"is_distilled": "x"}, "is_distilled"),
        ("text_encoder/config.json", {"model_type": "mistral"}, "model_type"),
        ("text_encoder/config.json", {"num_hidden_layers": 27}, "num_hidden_layers"),
        ("text_encoder/config.json", {"hidden_size": 24}, "joint_attention_dim"),
    ],
)
def test_variants_that_are_not_known_are_refused(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    say(copy, file, **values)
    with pytest.raises(BadInput) as caught:
        open_checkpoint(str(copy))
    assert said in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no chat template", "chat template"),
        ("no suffix", "no slot END"),
        ("left", "pads before"),
        ("wide door", "shape"),
        ("NaN", "NaN"),
        ("no layer", "lacks the weight"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    folder: Path, edited: Path, tmp_path: Path, damage: str, said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tokenizer, key = "tokenizer/tokenizer_config.json", "model.layers.20.mlp.up_proj.weight"
    match damage:
        case "no chat template":
            say(copy, tokenizer, chat_template=None)
        case "no suffix":
            template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
            say(copy, tokenizer, chat_template=template)
        case "left":
            say(copy, tokenizer, padding_side="left")
        case "wide door":
            save_file(load_file(copy / WEIGHTS) | {DOOR: torch.zeros(32, 50)}, copy / WEIGHTS)
        case "NaN":
            state = load_file(copy / TEXT)
            state[key][0] = torch.nan
            save_file(state, copy / TEXT)
        case "no layer":
            save_file(
                {name: each for name, each in load_file(copy / TEXT).items() if name != key}, copy / TEXT
            )
    with pytest.raises(TrceError) as caught:
        solve_map(copy, [edited / "blades.toml"], prior=edited / "prior.txt")
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("bn.running_mean"), "bn.running_mean"),
        (lambda state: state["bn.running_var"].fill_(torch.nan), "NaN"),
        (lambda state: state["bn.running_var"].neg_(), "negative"),
    ],
)
def test_statistics_of_the_batch_norm_are_looked_at(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(BadInput, match=said):
        open_checkpoint(str(copy)).pipe(CPU, torch.float32)


def test_the_larger_models_file_is_not_taken_for_kleins(folder: Path, tmp_path: Path) -> None:
    file = tiny.flux2_file(folder, tmp_path / "dev.safetensors")
    guidance = {"model.diffusion_model.guidance_in.in_layer.weight": torch.ones(32, 16)}
    save_file(load_file(file) | guidance, file)
    with pytest.raises(BadInput, match=r"FLUX\.2 dev"):
        open_checkpoint(str(file))
