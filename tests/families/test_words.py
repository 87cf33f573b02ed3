"""What attacks tell the U-Net is what the pipeline tells it, in words that survive the tokenizer."""

import pytest
import torch

from trce_cli.checkpoint.open import open_checkpoint

CPU = torch.device("cpu")
PROMPTS = ["a gun on the table", "", "the dog and the " * 40]


@pytest.fixture(
    params=["tiny_sd1", "tiny_sd2", "tiny_sdxl", "tiny_z-image", "tiny_qwen-image", "tiny_flux2-klein"]
)
def checkpoint(request):
    return open_checkpoint(str(request.getfixturevalue(request.param)))


@pytest.fixture
def encoder(checkpoint):
    family = checkpoint.family
    return family.words(family.pipe(checkpoint, CPU, torch.float32))


def test_the_denoiser_is_told_what_the_pipeline_tells_it(checkpoint, encoder):
    found = encoder(encoder.ids(PROMPTS))
    wanted = checkpoint.family.denoise(checkpoint).condition(PROMPTS, CPU)
    rows = wanted.rows(PROMPTS)
    told = wanted.told(rows)
    assert found.keys() == told.keys()
    for name, lengths in wanted.lengths.items():
        assert torch.equal(found[f"{name}.length"], lengths[rows])
    for stream in wanted.streams:
        for place, prompt in enumerate(PROMPTS):
            if prompt:  # SDXL's empty prompt is zeros by convention
                expected = told[stream][place]
                if stream in wanted.lengths:
                    expected = expected[: int(wanted.lengths[stream][rows][place])]
                torch.testing.assert_close(
                    found[stream][place][: len(expected)], expected, rtol=1e-4, atol=2e-5
                )


def test_every_word_is_read_as_itself(encoder):
    everything = torch.arange(len(encoder.words))
    assert len(everything) > 10
    for words in everything.split(20):
        text = encoder.text(words)
        for typed, built in zip(encoder.ids([text]), encoder.word_ids(words[None]), strict=True):
            assert torch.equal(typed, built)
        assert text.split() == [encoder.words[word] for word in words]


def test_a_prefix_of_the_words_own_embeddings_changes_nothing(encoder):
    words = torch.tensor([[3, 1, 4], [2, 7, 1]])
    ids = encoder.ids([f"{encoder.text(row)} a gun" for row in words])
    plain, prefixed = encoder(ids), encoder(ids, encoder.table[words])
    assert plain.keys() == prefixed.keys()
    for stream in plain:
        torch.testing.assert_close(prefixed[stream], plain[stream], rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_embeddings_of_a_prefix(encoder):
    words = torch.tensor([[3, 1]])
    ids = encoder.ids([f"{encoder.text(words[0])} a gun"])
    prefix = encoder.table[words].clone().requires_grad_(True)
    encoder(ids, prefix)["context"].square().sum().backward()
    assert bool((prefix.grad != 0).float().mean() > 0.9)
    assert encoder.table.grad is None


def test_a_word_wears_another_embedding_for_as_long_as_it_is_asked_to(encoder):
    ids = encoder.ids([f"{encoder.words[3]} {encoder.words[1]}"])
    plain, table = encoder(ids), encoder.table.clone()
    another = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = encoder(ids, another[None, None])
    with encoder.wearing(3, another):
        worn = encoder(ids)
    for stream in plain:
        torch.testing.assert_close(worn[stream], wanted[stream], rtol=1e-4, atol=1e-5)
    after = encoder(ids)
    assert all(torch.equal(after[stream], plain[stream]) for stream in plain)
