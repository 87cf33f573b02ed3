"""Z-Image: states against its own pipeline, the edit against an independent solution, every layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plugins
import tiny
from plain_pipes import load
from trce_cli import load_map, solve_map
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.causal_llm.text import LlmText
from trce_cli.families.prefix_tree import packs
from trce_cli.maths import closed_form

CPU = torch.device("cpu")
PROMPTS = [
    "a photo of a dog",
    "",
    "Two Red apples, on a plate!",
    "a photograph of a knife on the kitchen table",
    "the weather is fine today " * 100,  # longer than 512 tokens
    "\n two lines\n",
]
DOOR, NORM = "cap_embedder.1.weight", "cap_embedder.0.weight"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
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
    found: Path = request.getfixturevalue("tiny_z-image")
    return found


def draw(pipe: Any, transformer: Any = None) -> torch.Tensor:
    pipe.transformer = transformer or pipe.transformer
    return torch.as_tensor(
        pipe(
            ["a photo of a knife"], num_inference_steps=2, height=16, width=16, guidance_scale=2.0,
            output_type="pt", generator=torch.Generator().manual_seed(0),
        ).images
    )  # fmt: skip


def text_of(checkpoint: Checkpoint) -> LlmText:
    text: LlmText = checkpoint.family.text(checkpoint, CPU, torch.float32)  # type: ignore[assignment]
    return text


@torch.no_grad()
def normed(pipe: Any, prompt: str) -> torch.Tensor:
    """What meets the door by diffusers and transformers alone, (tokens, width)."""
    ((states,), _) = pipe.encode_prompt([prompt], device=CPU, do_classifier_free_guidance=False)
    found: torch.Tensor = pipe.transformer.cap_embedder[0](states)
    return found


def test_states_equal_the_pipelines_at_every_position(checkpoint: Checkpoint, pipe: Any) -> None:
    text = text_of(checkpoint)
    counts = [tokens.count for tokens in text.tokenizer.tokens(PROMPTS)]
    wanted = {prompt: range(count) for prompt, count in zip(PROMPTS, counts, strict=True)}
    found = {
        prompt: batch["context"].embeddings[list(rows)]
        for batch in text.states({"context": wanted})
        for prompt, rows in batch["context"].rows.items()
    }
    for prompt in PROMPTS:
        torch.testing.assert_close(found[prompt], normed(pipe, prompt), rtol=1e-5, atol=2e-5)


def test_the_template_counts_once_and_is_encoded_once(checkpoint: Checkpoint) -> None:
    text = text_of(checkpoint)
    prefix = len(text.tokenizer.tokenizer("<|im_start|>user\n").input_ids)
    content = text.content(PROMPTS[:3])["context"]
    tokens = text.tokenizer.tokens(PROMPTS[:3])
    assert [content[prompt][0] for prompt in PROMPTS[:3]] == [0, prefix, prefix]
    assert [content[prompt][-1] for prompt in PROMPTS[:3]] == [each.count - 1 for each in tokens]
    sequences = {
        prompt: tuple((token,) for token in each.ids) for prompt, each in zip(PROMPTS, tokens, strict=False)
    }
    (pack,) = packs(sequences, 512)
    assert len(pack.tokens) <= sum(each.count for each in tokens) - 2 * prefix


def test_slots_are_where_the_template_and_the_phrase_put_them(checkpoint: Checkpoint) -> None:
    tokenizer = text_of(checkpoint).tokenizer
    unsafe, safe = "a knife on the table", "a wooden spoon on the table"
    read = tokenizer.tokenizer
    suffix = len(read("<|im_end|>\n<|im_start|>assistant\n").input_ids)
    words = {text: len(read(text).input_ids) for text in (unsafe, safe, " on the table", "a")}
    start = len(read("<|im_start|>user\n").input_ids)
    o, n = start + words[unsafe], start + words[safe]

    def places(kind: str, keyword: str = "knife") -> list[tuple[int, int]]:
        found = tokenizer.slots(unsafe, safe, keyword, {kind: 1.0})
        assert {slot.kind for slot in found} == {kind}
        return sorted((slot.unsafe, slot.safe) for slot in found)

    tail = words[" on the table"]
    assert places("END") == [(o + suffix - 1, n + suffix - 1)]
    assert places("SUFFIX") == [(o + at, n + at) for at in range(suffix)]
    assert places("LAST") == [(o - 1, n - 1)]
    assert places("TAIL") == [(o - at, n - at) for at in range(tail, 0, -1)]
    own = [(at, n - tail - 1) for at in range(start + words["a"], o - tail)]
    assert places("KEYWORD") == own
    assert places("KEYWORD", "a knife") == own
    long = "the weather is fine today " * 100
    assert tokenizer.slots(long + "knife", long + "spoon", "knife", {"END": 1.0, "KEYWORD": 1.0}) == []


@pytest.fixture(scope="module")
def edited(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map, a LoRA, a folder and a single file of one and the same edit."""
    where = tmp_path_factory.mktemp("z-image")
    (where / "blades.toml").write_text(PRESET)
    (where / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    tiny.z_image_file(folder, where / "original.safetensors", prefix="")
    forms = ("diffusers", "single-file", "lora", "map")
    command = f"map {folder} -p {where}/blades.toml --prior {where}/prior.txt -o {where}/out --energy 1"
    command += " --token-weights END=1 --preserve 1"
    command += "".join(f" --as {form}" for form in forms)
    assert main(command.split()) == 0
    return where


def test_the_edit_is_that_of_an_independent_solution(edited: Path, folder: Path, pipe: Any) -> None:
    from trce_cli.erase.settings import MapSettings
    from trce_cli.prompts.pairs import prompt_pairs
    from trce_cli.prompts.presets import load_preset

    pairs = prompt_pairs([load_preset(str(edited / "blades.toml"))])
    settings = MapSettings(preserve=1)
    o, n = (
        torch.stack([normed(pipe, getattr(pair, side))[-1] for pair in pairs]).double()
        for side in ("unsafe", "safe")
    )
    captions = [normed(pipe, caption) for caption in tiny.SENTENCES]
    prefix = len(pipe.tokenizer("<|im_start|>user\n").input_ids)
    c = torch.cat([captions[0], *(each[prefix:] for each in captions[1:])]).double()
    G = o.mT @ o / len(pairs) + settings.preserve * c.mT @ c / len(captions)
    values, vectors = torch.linalg.eigh(G)
    assert values[0] > 1e-9 * values[-1]  # nothing is cut off
    values = values + settings.ridge * values[:-1].mean()
    change = ((n - o).mT @ o / len(pairs)) @ (vectors / values @ vectors.mT)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    before, after = (load_file(path / weights) for path in (folder, edited / "out"))
    expected = before[DOOR].double() + before[DOOR].double() @ change
    found = after[DOOR].double()
    assert (found - expected).norm() / (expected - before[DOOR]).norm() < 1e-3
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert not torch.equal(before[DOOR], after[DOOR])
    for key, value in before.items():
        assert key == DOOR or torch.equal(value, after[key])
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.is_file() and relative.as_posix() != weights:
            assert path.read_bytes() == (edited / "out" / relative).read_bytes()


def test_the_guard_looks_at_all_that_carries_meaning(edited: Path, folder: Path, pipe: Any) -> None:
    """However few slots are mapped: of the end alone, behind words that say it all, it would look good."""
    from trce_cli.families.z_image.family import Z_IMAGE
    from trce_cli.prompts.pairs import prompt_pairs
    from trce_cli.prompts.presets import load_preset

    linear = load_map(edited / "out.map.safetensors").streams["context"]
    tokenizer = text_of(open_checkpoint(str(folder))).tokenizer
    inner = way = 0.0
    for pair in prompt_pairs([load_preset(str(edited / "blades.toml"))]):
        o, n = normed(pipe, pair.unsafe).double(), normed(pipe, pair.safe).double()
        for slot in tokenizer.slots(pair.unsafe, pair.safe, pair.keyword, Z_IMAGE.defaults.slots):
            step = n[slot.safe] - o[slot.unsafe]
            inner += slot.weight * float(step @ (linear(o[slot.unsafe][None])[0] - o[slot.unsafe]))
            way += slot.weight * float(step @ step)
    told = json.loads((edited / "out/trce.json").read_text())["history"][0]["figures"]
    assert told["moved"] == pytest.approx(inner / way, rel=1e-3)


def test_every_route_draws_the_same(edited: Path, folder: Path, pipe: Any) -> None:
    from diffusers import ZImageTransformer2DModel

    pipe = load(folder)
    plain, original = pipe.transformer, draw(pipe)
    expected = draw(load(edited / "out"))
    assert (expected - original).abs().max() > 1e-2

    single = ZImageTransformer2DModel.from_single_file(
        str(edited / "out.safetensors"), config=str(folder), subfolder="transformer"
    )
    torch.testing.assert_close(draw(pipe, single), expected, rtol=0, atol=2e-4)

    text_map = load_map(edited / "out.map.safetensors")
    text_map.apply_to(pipe)  # the transformer is the single file's: on top of an edit
    text_map.remove_from(pipe)
    pipe.transformer = plain
    text_map.apply_to(pipe)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)
    text_map.remove_from(pipe)
    assert torch.equal(draw(pipe), original)

    with safe_open(edited / "out.lora.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"transformer.cap_embedder.1.{part}.weight" for part in ("lora_A", "lora_B")
        }
    pipe.load_lora_weights(edited / "out.lora.safetensors")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=2e-4)


def test_a_single_file_of_the_transformer_alone_is_edited_in_place(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    for prefix in ("", "model.diffusion_model."):
        file = tiny.z_image_file(folder, tmp_path / f"file{len(prefix)}.safetensors", prefix)
        out = tmp_path / f"out{len(prefix)}.safetensors"
        run = trce("apply", edited / "out.map.safetensors", file, "--config", folder, "-o", out)
        assert run.status == 0, run.err
        before, after = load_file(file), load_file(out)
        changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
        assert changed == [prefix + DOOR]
        torch.testing.assert_close(after[changed[0]], load_file(edited / "out.safetensors")[DOOR])
        assert trce("inspect", out, "--config", folder, "--json").status == 0
    run = trce("map", file, "-p", edited / "blades.toml", "-o", tmp_path / "x.safetensors")
    assert run.status == 2
    assert "--config" in run.err
    config = shutil.copytree(folder, tmp_path / "config")  # with its template in a file of its own
    say(config, "tokenizer/tokenizer_config.json", chat_template=None)
    (config / "tokenizer/chat_template.jinja").write_text(tiny.CHAT)
    run = trce(
        "apply", edited / "out.map.safetensors", file, "--config", config, "-o", tmp_path / "whole",
        "--as", "diffusers",
    )  # fmt: skip
    assert run.status == 0, run.err
    assert trce("diff", tmp_path / "whole", edited / "out", "--json").status == 0
    assert (tmp_path / "whole/text_encoder/model.safetensors").read_bytes() == (
        folder / "text_encoder/model.safetensors"
    ).read_bytes()
    torch.testing.assert_close(draw(load(tmp_path / "whole")), draw(load(edited / "out")), rtol=0, atol=2e-4)


def test_a_file_in_bf16_is_of_the_folders_text_encoder(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    """The norm before the door belongs to it, and is all of it that the file holds."""
    state = load_file(tiny.z_image_file(folder, tmp_path / "whole.safetensors"))
    file, name = tmp_path / "file.safetensors", f"model.diffusion_model.{NORM}"
    save_file({key: value.bfloat16() for key, value in state.items()}, file, metadata={"format": "pt"})
    line = ["apply", edited / "out.map.safetensors", file, "--config", folder]
    run = trce(*line, "-o", tmp_path / "out.safetensors")
    assert run.status == 0, run.err
    torch.testing.assert_close(
        load_file(tmp_path / "out.safetensors")[f"model.diffusion_model.{DOOR}"].float(),
        load_file(edited / "out.safetensors")[DOOR],
        rtol=0.02,
        atol=0.02,
    )
    save_file(state | {name: state[name] * 1.01}, file, metadata={"format": "pt"})  # another norm
    run = trce(*line, "-o", tmp_path / "no.safetensors")
    assert run.status == 2
    assert "--allow-other-text-encoder" in run.err


def test_a_wide_map_is_kept_in_two_factors_and_does_the_same(
    checkpoint: Checkpoint, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "knife.toml").write_text(PRESET[: PRESET.rindex("[[concepts]]")])  # 18 pairs
    whole = solve_map(
        checkpoint, tmp_path / "knife.toml", prior=edited / "prior.txt", token_weights={"END": 1.0}
    )
    monkeypatch.setattr(closed_form, "WIDE", 40)  # as if 48 were wide
    wide = solve_map(
        checkpoint, tmp_path / "knife.toml", prior=edited / "prior.txt", token_weights={"END": 1.0}
    )
    assert len(wide.streams["context"].factors) == 2
    read = load_map(wide.save(tmp_path / "wide.safetensors"))
    assert set(load_file(tmp_path / "wide.safetensors")) == {"trce_map.up", "trce_map.down"}
    weight = checkpoint.read("denoiser", DOOR)
    expected, found = (each.weight_edits(checkpoint)[DOOR](weight) for each in (whole, read))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_half_precision_are_read_and_edited(
    folder: Path, edited: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    copy = halved(folder, tmp_path / "half", dtype)
    one = solve_map(copy, [edited / "blades.toml"], prior=edited / "prior.txt")
    other = solve_map(folder, [edited / "blades.toml"], prior=edited / "prior.txt")
    change = other.streams["context"].change
    assert (one.streams["context"].change - change).norm() / change.norm() < 0.1


def halved(folder: Path, copy: Path, dtype: torch.dtype) -> Path:
    """A copy in this dtype whose transformer and text encoder lie in two shards each."""
    shutil.copytree(folder, copy)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        source = copy / part / f"{stem}.safetensors"
        state = {key: value.to(dtype) for key, value in load_file(source).items()}
        source.unlink()
        names = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        places = {key: names[number % 2] for number, key in enumerate(sorted(state))}
        for name in names:
            save_file({key: state[key] for key, at in places.items() if at == name}, copy / part / name)
        index = {"metadata": {}, "weight_map": places}
        (copy / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return copy


def test_generate_draws_it_with_its_own_pipeline(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    from PIL import Image

    run = trce(
        "generate", edited / "out", "a photo of a knife", "--compare", folder, "--steps", 2,
        "--guidance-scale", 2, "-o", tmp_path / "images",
    )  # fmt: skip
    assert run.status == 0, run.err
    for name, source in (("original", folder), ("erased", edited / "out")):
        (path,) = (tmp_path / "images").glob(f"*{name}*.png")
        drawn = torch.as_tensor(__import__("numpy").array(Image.open(path))).permute(2, 0, 1) / 255
        torch.testing.assert_close(drawn, draw(load(source))[0], rtol=0, atol=1.5 / 255)


def say(copy: Path, file: str, **values: Any) -> None:
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(copy: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(copy / file)
    edit(state)
    save_file(state, copy / file, metadata={"format": "pt"})


WEIGHTS, TEXT = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no chat template", "chat template"),
        ("no prompt in the template", "chat template"),
        ("no suffix", "no slot END"),
        ("wide door", "shape"),
        ("other encoder", "cap_feat_dim"),
        ("NaN", "NaN"),
        ("NaN in the norm", "NaN"),
        ("no layer", "lacks the weight"),
        ("4 bits", "--as lora"),
        ("4 bits in the text encoder", "--as lora"),
        ("pictures", "reads pictures"),
        ("other pipeline", "OtherPipeline"),
        ("other model", "model_type"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    folder: Path, edited: Path, tmp_path: Path, damage: str, said: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    match damage:
        case "no chat template":
            say(copy, "tokenizer/tokenizer_config.json", chat_template=None)
        case "no prompt in the template":
            say(copy, "tokenizer/tokenizer_config.json", chat_template="<|im_start|>user\n")
        case "no suffix":
            template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
            say(copy, "tokenizer/tokenizer_config.json", chat_template=template)
        case "wide door":
            change(copy, WEIGHTS, lambda state: state.update({DOOR: torch.zeros(32, 50)}))
        case "other encoder":
            say(copy, "text_encoder/config.json", hidden_size=40)
        case "NaN":
            name = "model.layers.1.mlp.up_proj.weight"
            change(copy, TEXT, lambda state: state[name][0].fill_(torch.nan))
        case "NaN in the norm":
            change(copy, WEIGHTS, lambda state: state[NORM][:1].fill_(torch.nan))
        case "no layer":
            change(copy, TEXT, lambda state: state.pop("model.layers.2.self_attn.q_norm.weight"))
        case "4 bits":
            packed = torch.zeros(32 * 24, 1, dtype=torch.uint8)
            change(copy, WEIGHTS, lambda state: state.update({DOOR: packed}))
        case "4 bits in the text encoder":
            name = "model.layers.0.mlp.up_proj.weight"
            change(copy, TEXT, lambda state: state.update({name: torch.zeros(1536, 1, dtype=torch.uint8)}))
        case "pictures":
            say(copy, "transformer/config.json", siglip_feat_dim=8)
        case "other pipeline":
            say(copy, "model_index.json", _class_name="OtherPipeline")
        case "other model":
            say(copy, "text_encoder/config.json", model_type="qwen2")
    with pytest.raises(TrceError) as caught:
        solve_map(copy, [edited / "blades.toml"], prior=edited / "prior.txt")
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert len(caught.value.message) < 400


def test_quantized_files_name_the_lora_as_the_way(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(BadInput) as caught:
        open_checkpoint(str(path))
    assert "--as lora" in str(caught.value.hint)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    copy = halved(folder, tmp_path / "half", torch.float16)
    (copy / "transformer" / SHARD).unlink()
    with pytest.raises(BadInput, match="00001-of-00002"):
        open_checkpoint(str(copy))


def test_stage_2_trains_the_attention_of_the_main_layers(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any]
) -> None:
    steer = (
        "\n[steer]\nsteps = 4\ntrajectories_per_concept = 2\nunconditional = 6\nlr = 1e-2\nbatch_size = 2\n"
    )
    (tmp_path / "blades.toml").write_text(PRESET + steer + "max_steps = 3\n")
    run = trce(
        "steer", edited / "out", "-p", tmp_path / "blades.toml", "-o", tmp_path / "steered",
        "--device", "cpu", "--max-drift", 1000, "--as", "diffusers", "--as", "lora", "--energy", 1,
    )  # fmt: skip
    assert run.status == 0, run.err
    before, after = (load_file(path / WEIGHTS) for path in (edited / "out", tmp_path / "steered"))
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {
        f"layers.{layer}.attention.to_{part}.weight" for layer in (0, 1) for part in ("q", "k", "v", "out.0")
    }
    # diffusers' paths: single files stack queries, keys and values, and so have no kohya names for each.
    pipe, lora = load(folder), tmp_path / "steered.lora.safetensors"
    assert {name.partition(".lora_")[0] for name in load_file(lora)} == {
        "transformer.cap_embedder.1",
        *(f"transformer.{key.removesuffix('.weight')}" for key in changed),
    }
    pipe.load_lora_weights(lora)
    torch.testing.assert_close(draw(pipe), draw(load(tmp_path / "steered")), rtol=0, atol=2e-4)


def test_it_is_evaluated_and_attacked(
    edited: Path, folder: Path, tmp_path: Path, trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.install(tmp_path, plugins.REDS, monkeypatch)
    (tmp_path / "own.txt").write_text("a knife\na pistol\n")
    line = [edited / "out", "--against", folder, "-p", edited / "blades.toml", "--detector", "reds"]
    line += ["--suite", "none", "--suite", f"own={tmp_path}/own.txt", "--steps", 1, "--device", "cpu"]
    run = trce("evaluate", *line, "-o", tmp_path / "evaluation", "--json")
    assert run.status == 0, run.err
    assert json.loads((tmp_path / "evaluation/results.json").read_text())["suites"]
    budget = "--ring-population 4 --ring-generations 1 --ring-length 3 --ring-positions 24 --prefix-length 2"
    budget += " --prefix-timesteps 1 --prefix-iterations 1 --inversion-iterations 1"
    run = trce("attack", *line, "-o", tmp_path / "attacks.csv", *budget.split())
    assert run.status == 0, run.err
    assert len((tmp_path / "attacks.csv").read_text().splitlines()) > 2


def test_a_hub_id_gives_what_a_single_file_lacks_and_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def from_cache(repo_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    file = tiny.z_image_file(folder, tmp_path / "file.safetensors")
    checkpoint = open_checkpoint(str(file), config="someone/z-image")
    assert asked["repo_id"] == "someone/z-image"
    assert "transformer/*.safetensors" in asked["ignore_patterns"]
    assert {"*.jinja", "*/spiece.model"} <= set(asked["allow_patterns"])
    assert set(checkpoint.parts) == {"text_encoder", "vae"}
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"} <= set(
        checkpoint.drawn_from()
    )
