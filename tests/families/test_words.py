"""What attacks tell the U-Net is what the pipeline tells it, in words that survive the tokenizer."""

import pytest
import torch

from trce_cli.checkpoint.open import open_checkpoint

CPU = torch.device("cpu")
PROMPTS = ["a gun on the table", "", "the dog and the " * 40]


@pytest.fixture(params=["tiny_sd1", "tiny_sd2", "tiny_sdxl"])
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
    assert found.keys() == wanted.streams.keys()
    for stream, expected in wanted.told(rows).items():
        for place, prompt in enumerate(PROMPTS):
            if prompt:  # SDXL's empty prompt is zeros by convention
                assert torch.allclose(found[stream][place], expected[place], atol=1e-5)


def test_every_word_is_read_as_itself(encoder):
    everything = torch.arange(len(encoder.words))
    assert len(everything) > 20
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
    assert all(torch.equal(plain[stream], prefixed[stream]) for stream in plain)


def test_gradients_reach_all_embeddings_of_a_prefix(encoder):
    words = torch.tensor([[3, 1]])
    ids = encoder.ids([f"{encoder.text(words[0])} a gun"])
    prefix = encoder.table[words].clone().requires_grad_(True)
    encoder(ids, prefix)["context"].square().sum().backward()
    assert bool((prefix.grad != 0).float().mean() > 0.9)
    assert encoder.encoders[0].get_input_embeddings().weight.grad is None


def test_a_word_wears_another_embedding_for_as_long_as_it_is_asked_to(encoder):
    ids = encoder.ids([f"{encoder.words[3]} {encoder.words[1]}"])
    plain, table = encoder(ids), encoder.table.clone()
    another = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = encoder(ids, another[None, None])
    with encoder.wearing(3, another):
        worn = encoder(ids)
    assert all(torch.allclose(worn[stream], wanted[stream], atol=1e-6) for stream in plain)
    after = encoder(ids)
    assert all(torch.equal(after[stream], plain[stream]) for stream in plain)
