import pytest
import torch

from trce_cli.errors import TrceError
from trce_cli.evaluate.attacks.unlearn_diff import UnlearnDiffBudget, nearest, optimise, random_words

TABLE = torch.eye(6) * torch.arange(1, 7)[:, None] / 2


def test_nearest_words_are_those_of_a_naive_search():
    embeddings = torch.randn(2, 3, 6)
    for row, found in zip(embeddings, nearest(embeddings, TABLE), strict=True):
        for one, word in zip(row, found, strict=True):
            distances = [float((one - entry).norm()) for entry in TABLE]
            assert distances[word] == pytest.approx(min(distances))


@pytest.mark.parametrize("planted", [[1, 4], [5, 0]])
def test_a_planted_prefix_is_found_through_words_alone(planted):
    wanted = TABLE[torch.tensor(planted)]
    seen = []

    def loss(words, hard):
        assert torch.allclose(hard.detach(), TABLE[words], atol=1e-5)  # words, never what is between
        seen.append(words)
        return (hard - wanted).square().sum((1, 2))

    start = TABLE[torch.tensor([[2, 3], [3, 2]])]
    soft = optimise(start, TABLE, loss, UnlearnDiffBudget(length=2, iterations=300, lr=0.05))
    assert nearest(soft, TABLE).tolist() == [planted, planted]
    assert len(seen) == 300
    assert torch.equal(seen[0], torch.tensor([[2, 3], [3, 2]]))


def test_noise_levels_are_spread_over_the_schedule_noisiest_first():
    assert UnlearnDiffBudget(timesteps=4).noise_levels(1000) == [875, 625, 375, 125]
    assert UnlearnDiffBudget(timesteps=1).noise_levels(1000) == [500]
    assert len(set(UnlearnDiffBudget(timesteps=50).noise_levels(1000))) == 50


def test_the_words_to_start_from_depend_on_each_prompt_s_seed():
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    words = random_words(1000, 5, [one, other])
    assert words.shape == (2, 5)
    assert not torch.equal(words[0], words[1])
    assert torch.equal(random_words(1000, 5, [torch.Generator().manual_seed(2)])[0], words[1])


def test_a_gradient_that_is_not_finite_is_no_attack_that_finds_nothing():
    start = TABLE[torch.tensor([[2, 3]])]
    with pytest.raises(TrceError, match="not finite"):
        optimise(start, TABLE, lambda _, hard: (hard * torch.inf).sum((1, 2)), UnlearnDiffBudget(length=2))
