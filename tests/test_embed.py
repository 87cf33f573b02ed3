"""Embeddings against the pipeline's own `encode_prompt`; slots against tokens spelled out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trce_cli.checkpoint import open_checkpoint
from trce_cli.embed import SOT, Embedder

PROMPTS = [
    "a photo of a dog",
    "",
    "Two Red apples, on a plate!",
    "a photograph of a knife on the kitchen table",
    "the weather is fine today " * 30,  # longer than 77 tokens
    "x",
]


def embedder(folder: Path, dtype: torch.dtype = torch.float32) -> Embedder:
    checkpoint = open_checkpoint(str(folder))
    encoders = checkpoint.load_text_encoders("cpu", dtype)
    return Embedder(checkpoint.family, checkpoint.load_tokenizers(), encoders)


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> Embedder:
    return embedder(tiny_sd1)


def collect(embedder: Embedder, wanted: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {prompt: states for batch in embedder.states(wanted) for prompt, states in batch.items()}


def pipeline_states(folder: Path, prompts: list[str]) -> torch.Tensor:
    """What the U-Net sees, (prompts, 77, dim), each prompt encoded on its own."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    encode = lambda prompt: pipe.encode_prompt(  # noqa: E731
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    with torch.no_grad():
        return torch.cat([encode(prompt) for prompt in prompts])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_states_equal_the_pipelines_at_every_position(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    ours = embedder(folder)
    every = range(77)
    expected = pipeline_states(folder, PROMPTS)
    found = collect(ours, dict.fromkeys(PROMPTS, every))
    assert ours.dim == expected.shape[-1]
    torch.testing.assert_close(torch.stack([found[p] for p in PROMPTS]), expected, rtol=1e-5, atol=2e-5)

    # Encoded no further than the EoT, in batches of equal length, the states stay the same.
    eots = {prompt: [SOT, tokens.eot] for prompt, tokens in zip(PROMPTS, ours.tokens(PROMPTS), strict=True)}
    found = collect(ours, eots)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[prompt], expected[row, eots[prompt]], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_slots_are_found_from_token_ids(family: str, request: pytest.FixtureRequest) -> None:
    ours = embedder(request.getfixturevalue(f"tiny_{family}"))
    eot_id = ours.tokenizers[0].eos_token_id
    for prompt, tokens in zip(PROMPTS, ours.tokens(PROMPTS), strict=True):
        words = ours.tokenizers[0].tokenize(prompt)
        assert tokens.eot == min(len(words), 75) + 1  # SoT before it, and the cut of the pipeline
        assert tokens.last == 76
        assert tokens.padding == 76 - tokens.eot
        for ids in tokens.ids:
            assert len(ids) == 77
            assert ids[tokens.eot] == eot_id
            assert eot_id not in ids[: tokens.eot]


def test_eot_is_the_first_after_sot_even_in_the_middle_of_a_prompt(sd1: Embedder) -> None:
    (tokens,) = sd1.tokens(["a dog <|endoftext|> a cat"])
    assert tokens.eot == 1 + len(sd1.tokenizers[0].tokenize("a dog"))
    assert tokens.padding == 76 - (tokens.eot + len(sd1.tokenizers[0].tokenize("a cat")) + 1)


@pytest.mark.parametrize(
    ("prompt", "keyword", "words"),
    [
        ("a photo of a dog", "dog", ["dog"]),
        ("a photo of a dog", "a dog", ["a", "dog"]),
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
def test_keyword_positions_are_those_of_all_its_tokens(
    sd1: Embedder, prompt: str, keyword: str, words: list[str]
) -> None:
    tokenizer = sd1.tokenizers[0]
    expected = [token for word in words for token in tokenizer(word)["input_ids"][1:-1]]
    positions = sd1.keyword_positions(prompt, keyword)
    (tokens,) = sd1.tokens([prompt])
    assert [tokens.ids[0][position] for position in positions] == expected


def test_keyword_that_is_cut_off_has_no_positions(sd1: Embedder) -> None:
    prompt = "the weather is fine today " * 30 + "gun"
    assert sd1.keyword_positions(prompt, "gun") == []


def test_a_prompt_is_encoded_once_and_no_further_than_wanted(
    sd1: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    encode = sd1._encode
    monkeypatch.setattr(
        sd1, "_encode", lambda ids, length: shapes.append((len(ids), length)) or encode(ids, length)
    )
    done: list[int] = []
    wanted = {"a dog": [SOT, 3], "a cat": [3], "a photo of a dog": [0]}
    assert {p for batch in sd1.states(wanted, done.append) for p in batch} == set(wanted)
    assert shapes == [(1, 1), (2, 4)]
    assert sum(done) == 3


def test_fingerprint_knows_weights_dtype_configuration_tokenizer_and_prompts(
    tiny_sd1: Path, tiny_sd2: Path
) -> None:
    first = embedder(tiny_sd1)
    base = first.fingerprint(PROMPTS)
    assert base == embedder(tiny_sd1).fingerprint(PROMPTS)
    assert base != first.fingerprint(PROMPTS[:-1])
    assert base != first.fingerprint([*PROMPTS[1:], PROMPTS[0]])
    assert base != embedder(tiny_sd1, torch.float64).fingerprint(PROMPTS)
    other_tokenizer = Embedder(first.family, embedder(tiny_sd2).tokenizers, first.text_encoders)
    assert base != other_tokenizer.fingerprint(PROMPTS)

    def changed() -> str:
        return Embedder(first.family, first.tokenizers, first.text_encoders).fingerprint(PROMPTS)

    weight = next(first.text_encoders[0].parameters())
    weight[0, 0] += 1e-6
    assert base != changed()
    weight[0, 0] -= 1e-6
    first.text_encoders[0].config.hidden_act = "gelu"
    assert base != changed()
