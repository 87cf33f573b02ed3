"""Folders of each transformer's family that are damaged or are of something else: refused in one sentence."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.open import open_checkpoint

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# Of each family the door, an encoder, a layer of that, and its width by the configuration.
T5_LAYER = "encoder.block.1.layer.0.SelfAttention.q"
FAMILIES = {
    "z-image": ("cap_embedder.1.weight", "text_encoder", "layers.1.mlp.up_proj", "hidden_size"),
    "qwen-image": ("txt_in.weight", "text_encoder", "layers.1.mlp.up_proj", "hidden_size"),
    "flux": ("context_embedder.weight", "text_encoder_2", T5_LAYER, "d_model"),
    "chroma": ("context_embedder.weight", "text_encoder", T5_LAYER, "d_model"),
    "sd3": ("context_embedder.weight", "text_encoder_3", T5_LAYER, "d_model"),
    "flux2-klein": ("context_embedder.weight", "text_encoder", "layers.20.mlp.up_proj", "hidden_size"),
}  # fmt: skip
PRESET = (
    'name = "blades"\ndescription = "blades"\nkind = "object"\n'
    '[[concepts]]\nunsafe = "a knife"\nsafe = "a cup"\n'
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def copy(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "blades.toml").write_text(PRESET)
    (tmp_path / "prior.txt").write_text("\n".join(tiny.SENTENCES[:3]))
    yield Path(shutil.copytree(request.getfixturevalue(f"tiny_{family}"), tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy")


def say(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def shard(path: Path) -> Path:
    """Split a file in two with an index; returns the second."""
    state = load_file(path)
    names = sorted(state)
    stem, parts = path.name.removesuffix(".safetensors"), (names[::2], names[1::2])
    files = [path.with_name(f"{stem}-0000{n}-of-00002.safetensors") for n in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: state[name] for name in part}, file, metadata={"format": "pt"})
    told = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": told}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()
    return files[1]


def refused(trce: Callable[..., Any], copy: Path, said: str, *command: Any) -> None:
    """The command ends with a sentence that says so, and with nothing written."""
    work = copy.parent
    line = command or ("map", copy, "-p", work / "blades.toml", "--prior", work / "prior.txt")
    done = trce(*line, "-o", work / "out", "--device", "cpu")
    assert done.status == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    message = next(text for text in done.err.splitlines() if said in text)
    assert len(message) < 500
    assert not list(work.glob("*out*"))


@pytest.mark.parametrize("part", ["transformer", "encoder"])
def test_a_shard_that_is_missing(family: str, copy: Path, part: str, trce: Callable[..., Any]) -> None:
    encoder = FAMILIES[family][1]
    missing = shard(copy / (WEIGHTS if part == "transformer" else f"{encoder}/model.safetensors"))
    open_checkpoint(str(copy))  # as whole it is read
    missing.unlink()
    refused(trce, copy, "00002-of-00002")


@pytest.mark.parametrize("part", ["transformer", "encoder"])
def test_shards_that_no_index_lists(family: str, copy: Path, part: str, trce: Callable[..., Any]) -> None:
    """The libraries find none of them."""
    place = WEIGHTS if part == "transformer" else f"{FAMILIES[family][1]}/model.safetensors"
    shard(copy / place)
    (copy / f"{place}.index.json").unlink()
    refused(trce, copy, "is one of several shards, and no index")


def test_shards_of_another_save_are_not_taken_for_weights(family: str, copy: Path) -> None:
    """Beside the index lies what it does not list, as when a folder was saved twice."""
    _, encoder, layer, _ = FAMILIES[family]
    place = copy / encoder / "model.safetensors"
    whole = load_file(place)
    key = next(key for key in whole if key.endswith(f"{layer}.weight"))
    shard(place)
    save_file({key: whole[key] + 1}, place.with_name("model-00001-of-00003.safetensors"))
    checkpoint = open_checkpoint(str(copy))
    ours = checkpoint.names.published(encoder, key)
    assert ours is not None
    assert torch.equal(checkpoint.read(encoder, ours), whole[key])


def test_a_gguf_in_place_of_the_transformers_weights(copy: Path, trce: Callable[..., Any]) -> None:
    (copy / WEIGHTS).rename(copy / "transformer/model-Q4_K_S.gguf")
    refused(trce, copy, "--as lora")


@pytest.mark.parametrize(
    ("kept", "whole", "said"),
    [
        ((), None, "holds no tokenizer"),
        (("tokenizer_config.json",), None, "holds no tokenizer"),
        (("tokenizer_config.json", "vocab.json"), None, "holds no tokenizer"),
        (("tokenizer_config.json",), '{"model', "cannot be read as JSON"),
        (("tokenizer_config.json",), '{"version": "1.0"}', "is no tokenizer"),
    ],
)
def test_a_tokenizer_that_is_empty_or_broken(
    family: str, copy: Path, kept: tuple[str, ...], whole: str | None, said: str, trce: Callable[..., Any]
) -> None:
    folder = copy / FAMILIES[family][1].replace("text_encoder", "tokenizer")
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    config = folder / "tokenizer_config.json"
    if whole is not None:
        told = json.loads(config.read_text())
        told.pop("added_tokens_decoder", None)
        config.write_text(json.dumps(told))
        (folder / "tokenizer.json").write_text(whole)
    if "vocab.json" in kept:  # without its merges every word would fall to pieces
        (folder / "vocab.json").write_text('{"a": 0}')
    refused(trce, copy, said)
    refused(trce, copy, "whole tokenizer again")


def test_a_door_of_another_width(family: str, copy: Path, trce: Callable[..., Any]) -> None:
    door = FAMILIES[family][0]
    whole = load_file(copy / WEIGHTS)[door]
    change(copy / WEIGHTS, lambda state: state.update({door: torch.zeros(len(whole), whole.shape[1] + 8)}))
    refused(trce, copy, "shape")


def test_a_transformer_of_another_class(family: str, copy: Path, trce: Callable[..., Any]) -> None:
    say(copy / "model_index.json", transformer=["nunchaku", "OtherTransformer2DModel"])
    refused(trce, copy, "transformer is OtherTransformer2DModel")


def test_a_text_encoder_of_another_size(family: str, copy: Path, trce: Callable[..., Any]) -> None:
    _, encoder, layer, width = FAMILIES[family]
    path = copy / encoder / "config.json"
    told = json.loads(path.read_text())
    if "text_config" in told:
        say(path, text_config=told["text_config"] | {width: told["text_config"][width] * 2})
    else:
        say(path, **{width: told[width] * 2})
    refused(trce, copy, "joint_attention_dim" if width == "d_model" else "text encoder")
    path.write_text(json.dumps(told))
    file = path.with_name("model.safetensors")
    name = next(key for key in load_file(file) if key.endswith(f"{layer}.weight"))
    change(file, lambda state: state.update({name: state[name][:, 1:].clone()}))
    refused(trce, copy, "shape")


def test_a_setting_without_a_name_changes_nothing(family: str, copy: Path, trce: Callable[..., Any]) -> None:
    say(copy / FAMILIES[family][1] / "config.json", **{"": {"x": 1}})
    work = copy.parent
    line = ("map", copy, "-p", work / "blades.toml", "--prior", work / "prior.txt", "--max-collateral", 1e9)
    done = trce(*line, "-o", work / "mapped.safetensors", "--as", "map", "--device", "cpu")
    assert "Traceback" not in done.err
    assert done.status in (0, 1), done.err
    assert (work / "mapped.safetensors").exists() == (done.status == 0)


def test_nan_in_one_layer(family: str, copy: Path, trce: Callable[..., Any]) -> None:
    """Of the text encoder for all; of the transformer for what computes with it."""
    _, encoder, layer, _ = FAMILIES[family]
    file = copy / encoder / "model.safetensors"
    whole = load_file(file)
    name = next(key for key in whole if key.endswith(f"{layer}.weight"))
    change(file, lambda state: state[name][:1].fill_(torch.nan))
    refused(trce, copy, "NaN")
    save_file(whole, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(copy))
    tuned = next(key for key in checkpoint.keys("denoiser") if checkpoint.family.tuned(key))
    change(copy / WEIGHTS, lambda state: state[tuned][:1].fill_(torch.nan))
    refused(trce, copy, f"{tuned} in", "steer", copy, "-p", copy.parent / "blades.toml", "--steps", 2)


def test_nan_in_the_door(family: str, copy: Path, trce: Callable[..., Any]) -> None:
    door = FAMILIES[family][0]
    change(copy / WEIGHTS, lambda state: state[door][:1].fill_(torch.nan))
    refused(trce, copy, door)
