"""Configurations and tokenizers that would break a library or fill the memory are refused in one sentence."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.errors import BadInput


@pytest.fixture
def folder(tiny_sd1: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd1, tmp_path / "sd1"))


def say(folder: Path, file: str, **said: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (UNET, "sample_size", 10**9),
        (UNET, "block_out_channels", [10**9]),
        (UNET, "layers_per_block", "x"),
        (UNET, "layers_per_block", 10**6),
        (UNET, "norm_num_groups", 0),
        (UNET, "norm_eps", "x"),
        (UNET, "attention_head_dim", 0),
        (VAE, "scaling_factor", "x"),
        (VAE, "scaling_factor", 0),
        (VAE, "block_out_channels", [32] * 1000),
        (SCHEDULER, "num_train_timesteps", 10**12),
        (SCHEDULER, "beta_start", "x"),
        (SCHEDULER, "beta_end", 1e300),
        (SCHEDULER, "prediction_type", "x"),
        (TEXT, "num_hidden_layers", 10**8),
        (TEXT, "num_attention_heads", 0),
        (TEXT, "hidden_size", 10**12),
        (TEXT, "vocab_size", "x"),
        (TEXT, "layer_norm_eps", "x"),
        (TEXT, "layer_norm_eps", 10**30),
        (TEXT, "hidden_act", [1]),
        (TEXT, "hidden_act", {}),
    ],
)
def test_a_number_that_cannot_be_is_named(folder: Path, file: str, key: str, value: object) -> None:
    say(folder, file, **{key: value})
    with pytest.raises(BadInput) as caught:
        open_checkpoint(str(folder))
    assert file in caught.value.message
    assert key in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("key", ["addition_time_embed_dim", "projection_class_embeddings_input_dim"])
@pytest.mark.parametrize("is_null", [True, False])
def test_sdxls_sizes_are_told_whole(tiny_sdxl: Path, tmp_path: Path, key: str, is_null: bool) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "sdxl"))
    told = json.loads((folder / UNET).read_text())
    told = told | {key: None} if is_null else {name: value for name, value in told.items() if name != key}
    (folder / UNET).write_text(json.dumps(told))
    with pytest.raises(BadInput, match=f"{UNET}.*{key}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [(SCHEDULER, "beta_schedule", "x"), (UNET, "act_fn", "x"), (TEXT, "hidden_act", "x")],
)
def test_what_a_library_refuses_is_told(folder: Path, file: str, key: str, value: object) -> None:
    say(folder, file, **{key: value})
    with pytest.raises(BadInput):
        open_checkpoint(str(folder)).pipe(torch.device("cpu"), torch.float32)


def test_a_tokenizer_without_a_configuration_reads_as_much_as_its_encoder(folder: Path) -> None:
    expected = (
        open_checkpoint(str(folder)).pipe(torch.device("cpu"), torch.float32).tokenizer.model_max_length
    )
    for said in (None, {"model_max_length": 1 << 32}, {"model_max_length": 10**30}):
        path = folder / "tokenizer/tokenizer_config.json"
        path.unlink(missing_ok=True)
        if said:
            path.write_text(json.dumps(said))
        pipe = open_checkpoint(str(folder)).pipe(torch.device("cpu"), torch.float32)
        assert pipe.tokenizer.model_max_length == expected
        assert len(pipe.tokenizer(["a"], padding="max_length").input_ids[0]) == expected


@pytest.mark.parametrize("said", [{"model_max_length": -1}, {"model_max_length": "x"}, [], "{"])
def test_a_tokenizer_that_cannot_be_is_refused(folder: Path, said: object) -> None:
    text = said if isinstance(said, str) else json.dumps(said)
    (folder / "tokenizer/tokenizer_config.json").write_text(text)
    with pytest.raises(BadInput, match="tokenizer"):
        open_checkpoint(str(folder)).pipe(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("special_tokens_map.json", {"eos_token": {"content": "x", "a\x1b[31m": 1}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "x", "a\x1b[31m": 1}}}),
        ("special_tokens_map.json", {"eos_token": {"content": "x", "": 1}}),
        ("special_tokens_map.json", {"eos_tok": {"content": "x", "a\x1b[31m": 1}}),
        ("special_tokens_map.json", {"extra_special_tokens": ["y", {"content": "x", "a\x1b[31m": 1}]}),
        ("tokenizer_config.json", {"some": [{"in": {"__type": "AddedToken", "a\x1b[31m": 1}}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 0, "content": "x", "a\x1b[31m": 1}]}),
    ],
)
def test_what_the_library_would_print_of_a_token_is_refused(folder: Path, file: str, said: object) -> None:
    (folder / "tokenizer" / file).write_text(json.dumps(said))
    with pytest.raises(BadInput, match="special token with the unknown key"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("key", ["tokenizer_padding", "_json_truncation", "gguf_file"])
def test_a_tokenizers_configuration_holds_no_arguments_of_its_class(folder: Path, key: str) -> None:
    path = folder / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"a\x1b[31m": 1}}))
    with pytest.raises(BadInput, match=f"has {key}, which is no part of a configuration"):
        open_checkpoint(str(folder))


def test_named_special_tokens_and_full_descriptions_of_tokens_are_taken(folder: Path) -> None:
    token = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "special": True}
    path = folder / "tokenizer/tokenizer_config.json"
    told = json.loads(path.read_text()) | {
        "extra_special_tokens": {"image_token": "<|endoftext|>"},
        "pad_token": token,
    }
    path.write_text(json.dumps(told))
    pipe = open_checkpoint(str(folder)).pipe(torch.device("cpu"), torch.float32)
    assert pipe.tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "build",
    [tiny.build_z_image, tiny.build_qwen_image, tiny.build_flux, tiny.build_sd3, tiny.build_flux2_klein],
)
def test_pipes_and_endless_files_beside_a_tokenizer_are_refused_at_once(tmp_path: Path, build: Any) -> None:
    folder = build(tmp_path / "model")
    tokenizer = sorted(folder.glob("tokenizer*"))[-1]
    os.mkfifo(path := tokenizer / "added_tokens.json")
    with pytest.raises(BadInput, match="added_tokens"):
        open_checkpoint(str(folder))
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(BadInput, match="at most"):
        open_checkpoint(str(folder))


def test_a_tokenizer_that_fails_at_some_texts_is_told_in_a_sentence(folder: Path) -> None:
    path = folder / "tokenizer/vocab.json"
    without = ("â", "â</w>", "<|endoftext|>")  # the first byte of "€", and what stands for unknown ones
    kept = {key: at for key, at in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(kept))
    checkpoint = open_checkpoint(str(folder))
    text = checkpoint.family.text(checkpoint, torch.device("cpu"), torch.float32)
    with pytest.raises(BadInput, match=r"tokenizer in .* cannot be used"):
        text.content(["5 €"])
