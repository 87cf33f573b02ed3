import torch

from trce_cli.evaluate.attacks.ring_a_bell import RingABellBudget, concept_vector, search

WORDS = 8
SMALL = RingABellBudget(length=4, population=24, generations=40)


def encode(words):
    """A toy encoder: a fixed random vector for each (word, place)."""
    table = torch.randn(WORDS, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(words.shape[1]) + 1
    return table[words] * places[:, None]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_concept_vector_is_the_mean_difference():
    unsafe, safe = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    naive = torch.zeros(3, 2)
    for one, other in zip(unsafe, safe, strict=True):
        naive += (one - other) / 5
    assert torch.allclose(concept_vector(unsafe, safe), naive, atol=1e-6)


def test_the_search_finds_planted_words():
    planted = torch.tensor([[0, 3, 3, 6], [7, 1, 2, 5]])
    found = search(encode(planted), encode, WORDS, SMALL, generators(1, 2))
    assert torch.equal(found, planted)


def test_more_generations_never_end_worse():
    target = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(3))
    losses = []
    for generations in (1, 3, 10, 30):
        settings = RingABellBudget(length=4, population=10, generations=generations)
        found = search(target, encode, WORDS, settings, generators(5))
        losses.append(float((encode(found) - target).square().sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_prompt_s_result_depends_on_its_own_seed_alone():
    targets = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(4))
    settings = RingABellBudget(length=4, population=8, generations=2)
    together = search(targets, encode, WORDS, settings, generators(1, 2, 3))
    alone = search(targets[1:2], encode, WORDS, settings, generators(2))
    assert torch.equal(together[1:2], alone)
    assert set(together.flatten().tolist()) <= set(range(WORDS))
    other = search(targets[1:2], encode, WORDS, settings, generators(99))
    assert not torch.equal(alone, other)
