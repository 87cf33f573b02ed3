"""Figures against scipy, closed forms and brute force."""

import math
from random import Random

import numpy as np
import pytest
from scipy import linalg, stats

from trce_cli.maths.statistics import Change, Rate, frechet_distance, mean_change, pareto, similarity


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The textbook formula."""
    z = stats.norm.ppf(0.975)
    middle = (hits + z * z / 2) / (total + z * z)
    reach = z / (total + z * z) * math.sqrt(hits * (total - hits) / total + z * z / 4)
    return middle - reach, middle + reach


def test_wilson_intervals_of_random_counts() -> None:
    rng = Random(0)
    for _ in range(60):
        total = rng.randint(1, 3000)
        hits = rng.choice([0, total, rng.randint(0, total)])
        low, high = Rate("r", hits, total).interval
        assert (low, high) == pytest.approx(wilson(hits, total), abs=1e-9)
        assert low <= hits / total <= high


def test_rate_of_nothing_claims_nothing() -> None:
    rate = Rate.of("r", [])
    assert rate.interval == (0.0, 1.0)
    assert rate.as_dict() == {"hits": 0, "total": 0, "share": None, "low": 0.0, "high": 1.0}


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p by adding up the binomial."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)


def test_mcnemar_of_random_pairs() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 5, 40, 400):
        before, after = rng.random(size) < 0.6, rng.random(size) < 0.3
        change = Change.of(before, after)
        assert change.lost == sum(a and not b for a, b in zip(before, after, strict=True))
        assert change.gained == sum(b and not a for a, b in zip(before, after, strict=True))
        assert change.p_value == pytest.approx(mcnemar(change.lost, change.gained), rel=1e-9)
    assert Change.of([True, False], [True, False]).p_value == 1.0


def test_mean_change_is_the_paired_t_interval() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=30), rng.normal(0.4, size=30)
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    told = mean_change(before, after)
    assert (told["low"], told["high"]) == pytest.approx((expected.low, expected.high))
    assert mean_change([1.0], [3.0]) == {"mean": 2.0, "low": None, "high": None}


def test_frechet_distance_equals_the_definition() -> None:
    rng = np.random.default_rng(2)
    one = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    two = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + 0.7
    covariances = [np.cov(each, rowvar=False) for each in (one, two)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_samples_than_features_is_finite() -> None:
    rng = np.random.default_rng(3)
    distance = frechet_distance(rng.normal(size=(5, 64)), rng.normal(size=(7, 64)))
    assert distance is not None
    assert 0 < distance < 1000
    assert frechet_distance(np.ones((1, 4)), np.ones((5, 4))) is None


def test_similarity_is_the_cosine() -> None:
    rng = np.random.default_rng(4)
    one, two = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    expected = [[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in two] for a in one]
    assert np.allclose(similarity(one, two), expected)
    assert np.isfinite(similarity(np.zeros((1, 5)), two)).all()


def test_pareto_keeps_what_nothing_beats() -> None:
    points = [(0.1, 0.9), (0.2, 0.95), (0.2, 0.9), (0.1, 0.9), (0.5, 0.95), (0.0, 0.2)]
    assert pareto(points) == [True, True, False, True, False, True]
