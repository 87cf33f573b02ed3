"""Embeddings against the pipeline's own `encode_prompt`; slots against tokens spelled out by hand."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.errors import BadInput
from trce_cli.families.clip.text import ClipText
from trce_cli.families.clip.tokens import SOT
from trce_cli.families.prefix_tree import packs

PROMPTS = [
    "a photo of a dog",
    "",
    "Two Red apples, on a plate!",
    "a photograph of a knife on the kitchen table",
    "the weather is fine today " * 30,  # longer than 77 tokens
    "x",
]


def text_of(folder: Path, dtype: torch.dtype = torch.float32) -> ClipText:
    return of(open_checkpoint(str(folder)), dtype)


def of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> ClipText:
    return ClipText(checkpoint, checkpoint.family.encoders, "cpu", dtype)


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> ClipText:
    return text_of(tiny_sd1)


def collect(text: ClipText, wanted: dict[str, Any], stream: str = "context") -> dict[str, torch.Tensor]:
    return {
        prompt: states.embeddings[list(rows)]
        for batch in text.states({stream: wanted})
        for states in [batch[stream]]
        for prompt, rows in states.rows.items()
    }


def pipeline_embeddings(folder: Path, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the U-Net is told, (prompts, 77, dim) and pooled, each prompt encoded on its own."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    with torch.no_grad():
        encoded = [
            pipe.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            for prompt in prompts
        ]
    pooled = torch.cat([each[2] for each in encoded]) if len(encoded[0]) > 2 else None
    return torch.cat([each[0] for each in encoded]), pooled


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_embeddings_equal_the_pipelines_at_every_position(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    ours = text_of(folder)
    expected, pooled = pipeline_embeddings(folder, PROMPTS)
    close = {"rtol": 1e-5, "atol": 2e-5}
    found = collect(ours, dict.fromkeys(PROMPTS, range(77)))
    assert ours.streams["context"] == expected.shape[-1]
    torch.testing.assert_close(torch.stack([found[p] for p in PROMPTS]), expected, **close)

    # Encoded no further than the EoT, in one pack with shared prefixes, the states stay the same.
    eots = {
        prompt: [SOT, tokens.eot]
        for prompt, tokens in zip(PROMPTS, ours.tokenizers.tokens(PROMPTS), strict=True)
    }
    found = collect(ours, eots)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[prompt], expected[row, eots[prompt]], **close)

    # The pooled embedding is that of the whole prompt.
    assert ours.streams.keys() == ({"context"} if pooled is None else {"context", "pooled"})
    if pooled is not None:
        assert ours.streams["pooled"] == pooled.shape[1]
        found = collect(ours, {prompt: [eot] for prompt, (_, eot) in eots.items()}, "pooled")
        torch.testing.assert_close(torch.cat([found[p] for p in PROMPTS]), pooled, **close)


def test_half_precision_stays_near(tiny_sdxl: Path) -> None:
    texts = [text_of(tiny_sdxl, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for stream, wanted in texts[0].content(PROMPTS).items():
        exact, half = (collect(text, wanted, stream) for text in texts)
        for prompt in PROMPTS:
            assert half[prompt].dtype == torch.float32
            assert 0 < (exact[prompt] - half[prompt]).norm() / exact[prompt].norm() < 0.1


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_slots_are_found_from_token_ids(family: str, request: pytest.FixtureRequest) -> None:
    ours = text_of(request.getfixturevalue(f"tiny_{family}"))
    eot_id = ours.tokenizers.each[0].eos_token_id
    for prompt, tokens in zip(PROMPTS, ours.tokenizers.tokens(PROMPTS), strict=True):
        words = ours.tokenizers.each[0].tokenize(prompt)
        assert tokens.eot == min(len(words), 75) + 1  # SoT before it, and the cut of the pipeline
        assert tokens.last == 76
        assert tokens.padding == 76 - tokens.eot
        for ids in tokens.ids:
            assert len(ids) == 77
            assert ids[tokens.eot] == eot_id
            assert eot_id not in ids[: tokens.eot]


def test_eot_is_the_first_after_sot_even_in_the_middle_of_a_prompt(sd1: ClipText) -> None:
    (tokens,) = sd1.tokenizers.tokens(["a dog <|endoftext|> a cat"])
    assert tokens.eot == 1 + len(sd1.tokenizers.each[0].tokenize("a dog"))
    assert tokens.padding == 76 - (tokens.eot + len(sd1.tokenizers.each[0].tokenize("a cat")) + 1)


@pytest.mark.parametrize(
    ("prompt", "keyword", "words"),
    [
        ("a photo of a dog", "dog", ["dog"]),
        ("a photo of a dog", "a dog", ["dog"]),  # an article says the same of whatever follows
        ("a DOG, and another Dog!", "dog", ["dog", "dog"]),
        ("a photo of zyx wvut here", "zyx wvut", ["zyx", "wvut"]),  # words that the vocabulary lacks
        ("a  photo of a   red \n hat", "red hat", ["red", "hat"]),
        ("burgundy gun", "gun", ["gun"]),
        ("two guns", "gun", ["guns"]),
        ("a dog-like (k-9) unit", "k-9", ["k", "-", "9"]),
        ("é dog", "dog", ["dog"]),  # two bytes, one character
        ("a cat", "dog", []),
    ],
)
def test_keyword_positions_are_those_of_all_its_tokens_but_an_article(
    sd1: ClipText, prompt: str, keyword: str, words: list[str]
) -> None:
    tokenizer = sd1.tokenizers.each[0]
    expected = [token for word in words for token in tokenizer(word)["input_ids"][1:-1]]
    positions = sd1.tokenizers.keyword_positions(prompt, keyword)
    (tokens,) = sd1.tokenizers.tokens([prompt])
    assert [tokens.ids[0][position] for position in positions] == expected


def test_keyword_that_is_cut_off_has_no_positions(sd1: ClipText) -> None:
    prompt = "the weather is fine today " * 30 + "gun"
    assert sd1.tokenizers.keyword_positions(prompt, "gun") == []


def test_prefixes_are_encoded_once_and_nothing_beyond_what_is_wanted(
    sd1: ClipText, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[int, int]] = []
    encode = sd1._encode
    monkeypatch.setattr(
        sd1,
        "_encode",
        lambda some, wanted: (
            counts.extend((len(p.places), len(p.tokens)) for p in some) or encode(some, wanted)
        ),
    )
    done: list[int] = []
    wanted = {"a dog": [SOT, 3], "A  DOG": [3], "a cat": [2], "a photo of a dog": [0]}
    batches = list(sd1.states({"context": wanted}, done.append))
    assert {prompt for batch in batches for prompt in batch["context"].rows} == set(wanted)
    # SoT, a; dog, EoT; the first token of cat, which is its own
    assert counts == [(4, 5)]
    assert done == [4]


def test_packs_hold_every_prompt_once_as_a_tree() -> None:
    random = Random(0)
    sequences = {
        str(number): tuple((random.randrange(3), 7) for _ in range(random.randrange(1, 9)))
        for number in range(200)
    }
    found = list(packs(sequences, size=40))
    assert sorted(prompt for pack in found for prompt in pack.places) == sorted(sequences)
    assert len(found) > 3
    for pack in found:
        assert len(pack.tokens) <= 40
        prefixes = {sequences[prompt][:end] for prompt in pack.places for end in range(1, 9)}
        assert len(pack.tokens) == len(prefixes)  # each prefix is there once
        positions, mask = pack.positions, pack.mask
        for prompt, places in pack.places.items():
            assert tuple(pack.tokens[place] for place in places) == sequences[prompt]
            assert positions[places].tolist() == list(range(len(places)))
            for at, place in enumerate(places):
                assert mask[place].nonzero().flatten().tolist() == sorted(places[: at + 1])


def test_fingerprint_knows_weights_dtype_configuration_tokenizer_and_prompts(
    tiny_sd1: Path, tiny_sd2: Path, tmp_path: Path
) -> None:
    first = text_of(tiny_sd1)
    base = first.fingerprint(PROMPTS)
    assert base == text_of(tiny_sd1).fingerprint(PROMPTS)
    assert base != first.fingerprint(PROMPTS[:-1])
    assert base != first.fingerprint([*PROMPTS[1:], PROMPTS[0]])
    assert base != text_of(tiny_sd1, torch.float64).fingerprint(PROMPTS)
    other_tokenizer = text_of(tiny_sd1)
    other_tokenizer.tokenizers = text_of(tiny_sd2).tokenizers
    assert base != other_tokenizer.fingerprint(PROMPTS)

    copy = shutil.copytree(tiny_sd1, tmp_path / "copy")
    assert base == text_of(copy).fingerprint(PROMPTS)
    config = json.loads((copy / "text_encoder/config.json").read_text())
    (copy / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert base != text_of(copy).fingerprint(PROMPTS)
    (copy / "text_encoder/config.json").write_text(json.dumps(config))
    weights = load_file(copy / "text_encoder/model.safetensors")
    weights["text_model.encoder.layers.0.mlp.fc1.weight"][0, 0] += 1e-6  # less than fp16 can tell
    save_file(weights, copy / "text_encoder/model.safetensors")
    assert base != text_of(copy).fingerprint(PROMPTS)


@pytest.mark.parametrize(
    ("damage", "said"),
    [("nan", "NaN"), ("shape", "shape"), ("act", "hidden_act"), ("heads", "heads"), ("dtype", "dtype")],
)
def test_text_encoders_that_cannot_be_used_are_refused(
    tiny_sd1: Path, tmp_path: Path, damage: str, said: str
) -> None:
    copy = shutil.copytree(tiny_sd1, tmp_path / "copy")
    config = json.loads((copy / "text_encoder/config.json").read_text())
    weights = load_file(copy / "text_encoder/model.safetensors")
    name = "text_model.encoder.layers.1.mlp.fc2.weight"
    match damage:
        case "nan":
            weights[name][3, 3] = torch.nan
        case "shape":
            weights[name] = weights[name][:, 1:].contiguous()
        case "act":
            config["hidden_act"] = "swish"
        case "heads":
            config["num_attention_heads"] = 5
        case "dtype":
            weights[name] = weights[name].to(torch.int8)
    save_file(weights, copy / "text_encoder/model.safetensors")
    (copy / "text_encoder/config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=said):
        text_of(copy).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_in_every_dtype_are_computed_with_in_single_precision(
    tiny_sdxl: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    for path in copy.glob("text_encoder*/model.safetensors"):
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    expected, pooled = pipeline_embeddings(copy, PROMPTS[:3])
    text = text_of(copy)
    states = collect(text, dict.fromkeys(PROMPTS[:3], range(77)))
    eots = collect(text, text.content(PROMPTS[:3])["pooled"], "pooled")
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(torch.stack([states[prompt] for prompt in PROMPTS[:3]]), expected, **close)
    torch.testing.assert_close(torch.cat([eots[prompt] for prompt in PROMPTS[:3]]), pooled, **close)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_weights_in_a_single_files_layout_give_the_same(
    family: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    file = tiny.single_file(family, folder, tmp_path / "model.safetensors")
    ours, theirs = (
        of(open_checkpoint(str(file), config=folder)),
        text_of(folder),
    )
    for stream, wanted in theirs.content(PROMPTS).items():
        found, expected = collect(ours, wanted, stream), collect(theirs, wanted, stream)
        for prompt in PROMPTS:
            torch.testing.assert_close(found[prompt], expected[prompt])
