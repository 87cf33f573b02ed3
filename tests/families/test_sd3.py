"""Stable Diffusion 3 and 3.5: states against the pipeline, doors against an independent solution, layouts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plugins
import tiny
from maps import PAIRS, PRESET, solved_plainly
from plain_pipes import load
from trce_cli import load_map
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.edits.inspection import describe
from trce_cli.errors import BadInput
from trce_cli.families.registry import SD3
from trce_cli.families.sd3.text import Sd3Text

CPU = torch.device("cpu")
CLIP, WIDTH, LENGTH = 77, 48, 77 + 256
PROMPTS = ["a photo of a dog", "", "Two Red apples, on a plate!", "the weather is fine today " * 60]
DOOR, POOLED = "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"
FILE = "transformer/diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("tiny_sd3")
    return found


@pytest.fixture(scope="module")
def without_t5(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("tiny_sd3-clip")
    return found


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with a preset and a prior."""
    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    return tmp_path


def text_of(folder: Path) -> Sd3Text:
    checkpoint = open_checkpoint(str(folder))
    text: Sd3Text = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    return text


def mapping(folder: Path, given: Path, *options: object) -> list[str]:
    line = ["map", folder, "-p", given / "blades.toml", "--prior", given / "prior.txt", *options]
    return [str(word) for word in (*line, "--max-collateral", 1000, "-q")]


def draw(pipe: Any, guidance: float = 3.5) -> torch.Tensor:
    return torch.as_tensor(
        pipe(
            ["a photo of a knife"], num_inference_steps=2, height=16, width=16, guidance_scale=guidance,
            output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images
    )  # fmt: skip


@torch.no_grad()
def encoded(pipe: Any, prompt: str) -> dict[str, torch.Tensor]:
    """What enters of a prompt by diffusers and transformers alone: by stream (positions, width)."""
    states, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device=CPU)
    return {"context": states[0], "pooled": pooled}


@pytest.mark.parametrize("name", ["folder", "without_t5"])
def test_states_equal_the_pipelines_at_every_position(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    text, pipe = text_of(path), load(path)
    wanted = {
        "context": {prompt: range(LENGTH) for prompt in PROMPTS},
        "pooled": text.content(PROMPTS)["pooled"],
    }
    found: dict[str, dict[str, torch.Tensor]] = {"context": {}, "pooled": {}}
    for batch in text.states(wanted):
        for stream, states in batch.items():
            for prompt, rows in states.rows.items():
                found[stream][prompt] = states.embeddings[list(rows)]
    for prompt in PROMPTS:
        for stream, expected in encoded(pipe, prompt).items():
            torch.testing.assert_close(found[stream][prompt], expected, rtol=1e-5, atol=1e-5)
    assert bool(found["context"][PROMPTS[0]][CLIP:].any()) == (name == "folder")
    # Positions in any order, and each stream alone.
    (batch,) = text.states({"context": {PROMPTS[0]: [LENGTH - 1, 3, CLIP, 0]}})
    assert batch.keys() == {"context"}
    states = batch["context"]
    expected = encoded(pipe, PROMPTS[0])["context"][[LENGTH - 1, 3, CLIP, 0]]
    torch.testing.assert_close(states.embeddings[list(states.rows[PROMPTS[0]])], expected)


def test_added_tokens_are_pooled_where_each_encoder_does(folder: Path, tmp_path: Path) -> None:
    """A configuration of old takes the highest id for the EoT, which an added token may have."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "text_encoder_2/config.json"
    eot = tiny.vocabulary()[0]["<|endoftext|>"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eot}))
    for part in ("text_encoder", "text_encoder_2"):
        path = copy / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": eot + 2}))
        state = load_file(copy / part / "model.safetensors")
        key = "text_model.embeddings.token_embedding.weight"
        state[key] = torch.cat([state[key], torch.ones_like(state[key][:1])])
        save_file(state, copy / part / "model.safetensors", metadata={"format": "pt"})
    for part in ("tokenizer", "tokenizer_2"):
        (copy / part / "added_tokens.json").write_text(json.dumps({"<thing>": eot + 1}))
    pipe, text, prompt = load(copy), text_of(copy), "a <thing> on a plate"
    ids = pipe.tokenizer(prompt).input_ids
    assert ids.index(eot + 1) < ids.index(eot)
    (batch,) = text.states({"pooled": text.content([prompt])["pooled"]})
    torch.testing.assert_close(batch["pooled"].embeddings, encoded(pipe, prompt)["pooled"])


def test_slots_are_clips_and_behind_them_t5s(folder: Path, without_t5: Path) -> None:
    text = text_of(folder)
    unsafe, safe = "a photo of a knife on the table", "a photo of a wooden house on the table"

    def ends(prompt: str) -> tuple[int, int]:
        ours, theirs = text.clip.tokenizers.each[0], text.t5 and text.t5.tokenizer.tokenizer
        assert theirs
        return len(ours(prompt).input_ids) - 1, CLIP + len(theirs(prompt).input_ids) - 1

    def places(kind: str, text: Sd3Text = text) -> list[tuple[int, int]]:
        found = text.slots(unsafe, safe, "knife", {kind: 1.0})["context"]
        assert {slot.kind for slot in found} <= {kind, "PADDING"}
        return [(slot.unsafe, slot.safe) for slot in found if slot.kind == kind]

    (o, o_t5), (n, n_t5) = ends(unsafe), ends(safe)
    assert places("FIRST_EOT") == [(o, n)]
    # The second tokenizer pads with "!", of which a sample goes along with the end of the prompt.
    sample = [(max(o, n) + distance,) * 2 for distance in (1, 2, 4, 8, 16, 32)]
    given = text.slots(unsafe, safe, "knife", {"FIRST_EOT": 2.0})["context"]
    assert [(slot.unsafe, slot.safe) for slot in given if slot.kind == "PADDING"] == sample
    assert sum(slot.weight for slot in given) == pytest.approx(4)
    places_of_padding = {slot.unsafe for slot in text.padding(unsafe, safe)}
    assert places_of_padding == {at for at, _ in sample} | {CLIP + 32 * part - 1 for part in range(1, 9)}
    assert places("LAST_EOT") == [(CLIP - 1, CLIP - 1)]
    assert places("EOS") == [(o_t5, n_t5)]
    assert sorted(places("PADS")) == [(CLIP + 32 * part - 1,) * 2 for part in range(1, 9)]
    keyword = places("KEYWORD")
    assert {at < CLIP for at, _ in keyword} == {True, False}
    assert all((one < CLIP) == (other < CLIP) for one, other in keyword)
    bare = text_of(without_t5)
    assert places("FIRST_EOT", bare) == [(o, n)]
    assert list(bare.content([unsafe])["context"][unsafe]) == list(range(o + 1))


@pytest.mark.parametrize("name", ["folder", "without_t5"])
def test_each_door_is_the_independent_solution(
    name: str, given: Path, request: pytest.FixtureRequest
) -> None:
    """M = I + (B - A)(A + lambda P + r)^-1 in float64, from what diffusers encodes."""
    path: Path = request.getfixturevalue(name)
    pipe, has_t5 = load(path), name == "folder"
    captions, lam, rho = tiny.SENTENCES, 0.5, 1e-3
    weights = "FIRST_EOT=1,EOS=0.5,PADS=2" if has_t5 else "FIRST_EOT=1"
    line = mapping(path, given, "-o", given / "out", "--word-share", 0, "--preserve", lam, "--ridge", rho)
    assert main([*line, "--token-weights", weights]) == 0
    pads = [CLIP + 32 * part - 1 for part in range(1, 9)]

    def ends(prompt: str) -> tuple[int, int]:
        behind = len(pipe.tokenizer_3(prompt).input_ids) - 1 if has_t5 else 0
        return len(pipe.tokenizer(prompt).input_ids) - 1, CLIP + behind

    def rows(stream: str, prompt: str, other: str | None = None) -> torch.Tensor:
        """Of a caption all that it says, of one of a pair the slots."""
        states, (eot, eos) = encoded(pipe, prompt)[stream].double(), ends(prompt)
        if stream == "pooled":
            return states
        if other is None:
            own = [*range(eot + 1), *(range(CLIP, eos + 1) if has_t5 else ())]
        else:  # the second tokenizer's padding goes along with the first EoT
            end = max(eot, ends(other)[0])
            own = [eot, *(end + distance for distance in (1, 2, 4, 8, 16, 32)), *([eos] if has_t5 else [])]
        return states[[*own, *(pads if has_t5 else [])]]

    def solved(stream: str) -> torch.Tensor:
        counts = [1.0] + [1 / 6] * 6 * (stream == "context")
        counts += ([0.5] + [2 / 8] * 8) * (stream == "context" and has_t5)
        w = torch.tensor(counts, dtype=torch.float64)[:, None]
        A = sum((o := rows(stream, a, b)).mT @ (w * o) for a, b in PAIRS) / len(PAIRS)
        B = sum(rows(stream, b, a).mT @ (w * rows(stream, a, b)) for a, b in PAIRS) / len(PAIRS)
        P = sum((c := rows(stream, text)).mT @ c for text in captions) / len(captions)
        return solved_plainly(A, B, A + lam * P, rho)

    before, after = (load_file(each / FILE) for each in (path, given / "out"))
    assert {key for key, value in before.items() if not torch.equal(value, after[key])} == {DOOR, POOLED}
    for key, stream in ((DOOR, "context"), (POOLED, "pooled")):
        expected = before[key].double() @ solved(stream)
        change = (expected - before[key]).norm()
        assert (after[key] - expected).norm() <= 1e-4 * change
        assert (after[key] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["folder", "without_t5"])
def test_names_are_those_that_diffusers_reads(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    path: Path = request.getfixturevalue(name)
    for prefix in (PREFIX, ""):
        file = tiny.sd3_file(path, tmp_path / "file.safetensors", prefix)
        state = {key: value for key, value in load_file(file).items() if not key.startswith("first_stage")}
        expected = convert_sd3_transformer_checkpoint_to_diffusers(state)
        found = open_checkpoint(str(file), config=path)
        assert set(found.keys("denoiser")) == set(expected) == set(load_file(path / FILE))
        for key, value in expected.items():
            assert torch.equal(found.read("denoiser", key), value)
        assert f"A single file of {SD3.name} holds neither" in describe(str(file))["why"]


def test_one_edit_by_every_route_draws_the_same(folder: Path, given: Path, trce: Callable[..., Any]) -> None:
    from diffusers import SD3Transformer2DModel

    out = given / "out"
    forms = [word for form in ("diffusers", "single-file", "lora", "map") for word in ("--as", form)]
    line = mapping(folder, given, "-o", out, "--energy", 1, "--preserve", 0.01, "--strength", 4, *forms)
    assert main(line) == 0
    pipe = load(folder)
    original, expected = draw(pipe), draw(load(out))
    assert (expected - original).abs().max() > 1e-3
    text_map = load_map(given / "out.map.safetensors")
    text_map.apply_to(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    text_map.remove_from(pipe)
    assert torch.equal(draw(pipe), original)
    pipe.load_lora_weights(given / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    pipe.unload_lora_weights()
    assert load_file(given / "out.lora.safetensors").keys() == {
        f"transformer.{layer}.{part}.weight"
        for layer in ("context_embedder", "time_text_embed.text_embedder.linear_1")
        for part in ("lora_A", "lora_B")
    }

    # A published file, edited as it is, and what is written anew from the folder.
    file = tiny.sd3_file(folder, given / "original.safetensors", "", ("clip_l", "clip_g", "t5xxl"))
    edited = given / "edited.safetensors"
    run = trce("apply", given / "out.map.safetensors", file, "--config", folder, "-o", edited)
    assert run.status == 0, run.err
    one, other, were = (load_file(path) for path in (edited, given / "out.safetensors", file))
    assert list(one) == list(were)
    changed = {key for key, value in were.items() if not torch.equal(value, one[key])}
    assert changed == {"context_embedder.weight", "y_embedder.mlp.0.weight"}
    assert {key.removeprefix(PREFIX) for key in other} == {key for key in one if "text_encoders" not in key}
    for key, value in other.items():
        torch.testing.assert_close(one[key.removeprefix(PREFIX)], value)
    # The file's transformer as diffusers builds it from the file's own names, prefix and all.
    pipe.transformer = SD3Transformer2DModel.from_single_file(
        str(given / "out.safetensors"), config=str(folder), subfolder="transformer", local_files_only=True
    )
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    line = ["generate", edited, "a photo of a knife", "--config", folder, "--compare", folder, "--steps", 2]
    for more, name in (([], "images"), (["--negative-prompt", "a dog"], "away")):
        run = trce(*line, *more, "-o", given / name)
        assert run.status == 0, run.err
    run = trce("diff", file, edited, "--config", folder)
    assert run.status == 0, run.err
    assert "context_embedder" in run.out + run.err
    run = trce("inspect", edited, "--config", folder)
    assert run.status == 0, run.err
    assert "Stable Diffusion 3" in run.out + run.err


def test_a_file_becomes_a_folder_and_what_it_lacks_comes_from_the_other(
    folder: Path, given: Path, trce: Callable[..., Any]
) -> None:
    file = tiny.sd3_file(folder, given / "file.safetensors", PREFIX, ("clip_l", "clip_g"))
    run = trce(*mapping(file, given, "--config", folder, "-o", given / "out", "--as", "diffusers"))
    assert run.status == 0, run.err
    for path in folder.glob("*/*.safetensors"):
        before, after = load_file(path), load_file(given / "out" / path.relative_to(folder))
        before.pop("encoder.embed_tokens.weight", None)
        assert before.keys() <= after.keys()
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert changed == ({DOOR, POOLED} if path.parent.name == "transformer" else set())
    assert draw(load(given / "out")).isfinite().all()


def test_a_checkpoint_without_t5_is_written_in_every_form(
    without_t5: Path, given: Path, trce: Callable[..., Any]
) -> None:
    forms = [word for form in ("diffusers", "single-file", "lora") for word in ("--as", form)]
    run = trce(*mapping(without_t5, given, "-o", given / "out", "--preserve", 0.01, "--energy", 1, *forms))
    assert run.status == 0, run.err
    expected, pipe = draw(load(given / "out")), load(without_t5)
    assert (expected - draw(pipe)).abs().max() > 1e-4
    pipe.load_lora_weights(given / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    run = trce(
        "apply", given / "out.lora.safetensors", given / "out.safetensors", "--config", without_t5,
        "-o", given / "twice", "--as", "diffusers",
    )  # fmt: skip
    assert run.status == 0, run.err
    assert not (given / "twice/text_encoder_3").exists()
    line = ["generate", given / "twice", "a photo of a knife", "--steps", 1, "-o", given / "images"]
    assert trce(*line).status == 0


def test_a_file_of_other_blocks_than_its_folders_says_so(
    folder: Path, without_t5: Path, given: Path, trce: Callable[..., Any]
) -> None:
    """3 and 3.5 share their text encoders: a folder of one will do for a file of the other."""
    file = tiny.sd3_file(folder, given / "file.safetensors")
    found = open_checkpoint(str(file), config=without_t5)
    assert "dual_attention_layers = [0]" in found.remarks[0]
    line = [file, "a photo of a knife", "--config", without_t5, "--steps", 1, "-o", given / "images"]
    run = trce("generate", *line)
    assert run.status == 0, run.err
    with pytest.raises(BadInput, match="neither tokenizers nor configurations"):
        open_checkpoint(str(file))
    whole = tiny.sd3_file(folder, given / "whole.safetensors", PREFIX, ("clip_l", "clip_g", "t5xxl"))
    with pytest.raises(BadInput, match="holds a T5"):
        open_checkpoint(str(whole), config=without_t5)


def test_steps_are_those_of_the_pipeline(folder: Path, pipe: Any) -> None:
    checkpoint = open_checkpoint(str(folder))
    for steps in (1, 5):
        pipe("a dog", num_inference_steps=steps, height=16, width=16, output_type="latent")
        schedule = checkpoint.family.denoise(checkpoint).schedule(steps)
        torch.testing.assert_close(schedule.timesteps, pipe.scheduler.timesteps)


def test_stage_2_evaluation_and_attacks_run(
    folder: Path, given: Path, trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = given / "blades.toml"
    run = trce(*mapping(folder, given, "-o", given / "mapped"))
    assert run.status == 0, run.err
    run = trce(
        "steer", given / "mapped", "-p", preset, "-o", given / "erased", "--steps", 3, "--early-steps", 2,
        "--trajectories-per-concept", 1, "--unconditional", 2, "--benign", 2, "--max-steps", 2,
        "--batch-size", 2, "--max-drift", 1000,
    )  # fmt: skip
    assert run.status == 0, run.err
    before, after = (load_file(given / name / FILE) for name in ("mapped", "erased"))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key.split(".")[2] for key in changed} == {"attn", "attn2"}
    assert all(key.startswith("transformer_blocks.") and ".to_" in key for key in changed)
    plugins.install(given, plugins.REDS, monkeypatch)
    (given / "own.txt").write_text("a knife\na pistol\n")
    line = [given / "erased", "--against", folder, "-p", preset, "--detector", "reds"]
    line += ["--suite", "none", "--suite", f"own={given}/own.txt", "--steps", 1, "--device", "cpu"]
    run = trce("evaluate", *line, "-o", given / "evaluation")
    assert run.status == 0, run.err
    budget = "--ring-population 4 --ring-generations 1 --ring-length 3 --ring-positions 24 --prefix-length 2"
    budget += " --prefix-timesteps 1 --prefix-iterations 1 --inversion-iterations 1"
    run = trce("attack", *line, "-o", given / "attacks.csv", *budget.split())
    assert run.status == 0, run.err
    assert len((given / "attacks.csv").read_text().splitlines()) > 2


@pytest.mark.parametrize("name", ["folder", "without_t5"])
def test_attacks_read_words_as_the_pipeline_does(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    pipe, checkpoint = load(path), open_checkpoint(str(path))
    words: Any = checkpoint.family.words(pipe)
    chosen = torch.tensor([[0, 3, 5]])
    text = words.text(chosen[0])
    for ids in (words.ids([text]), words.word_ids(chosen)):
        with torch.no_grad():
            found, worn = words(ids), words(ids, words.table[chosen])
        for stream, expected in encoded(pipe, text).items():
            torch.testing.assert_close(found[stream][0].view_as(expected), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(worn[stream], found[stream], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("transformer/config.json", {"joint_attention_dim": 64}, "joint_attention_dim"),
        ("transformer/config.json", {"pooled_projection_dim": 64}, "pooled_projection_dim"),
        ("transformer/config.json", {"caption_projection_dim": 64}, "caption_projection_dim"),
        ("transformer/config.json", {"in_channels": 9}, "sees pictures"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm"),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers"),
        ("model_index.json", {"_class_name": "StableDiffusion3ControlNetPipeline"}, "ControlNet"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2"),
        ("text_encoder_2/config.json", {"projection_dim": None}, "projection_dim"),
        ("text_encoder_3/config.json", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
        ("text_encoder_3/config.json", {"d_model": 32}, "joint_attention_dim"),
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
    folder: Path, given: Path, trce: Callable[..., Any]
) -> None:
    copy = shutil.copytree(folder, given / "copy")
    cases = {
        "text_encoder_3/model.safetensors": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "text_encoder_2/model.safetensors": "text_projection.weight",
    }
    for file, key in cases.items():
        whole = load_file(copy / file)
        for state, said in (
            ({name: value for name, value in whole.items() if name != key}, key),
            (whole | {key: torch.full_like(whole[key], torch.nan)}, "NaN"),
            (whole | {key: whole[key][:, :4].clone()}, "shape"),
        ):
            save_file(state, copy / file, metadata={"format": "pt"})
            run = trce(*mapping(copy, given, "-o", given / "out"))
            assert run.status == 2
            assert said in run.err
            assert not (given / "out").exists()
        save_file(whole, copy / file, metadata={"format": "pt"})
    state = load_file(copy / FILE)
    del state["pos_embed.pos_embed"]
    save_file(state, copy / FILE, metadata={"format": "pt"})
    run = trce("generate", copy, "a dog", "--steps", 1, "-o", given / "images")
    assert run.status == 2
    assert "pos_embed.pos_embed" in run.err
