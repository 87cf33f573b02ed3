"""The figures of an evaluation: rates with intervals, paired changes, distances between sets of pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Rate:
    """How many of `total` pictures had a property, with the Wilson 95 % interval."""

    name: str
    hits: int
    total: int

    @classmethod
    def of(cls, name: str, verdicts: ArrayLike) -> "Rate":
        """The rate of the true ones among some verdicts."""
        found = np.asarray(verdicts, dtype=bool)
        return cls(name, int(found.sum()), len(found))

    @property
    def share(self) -> float:
        """hits / total; NaN of no pictures at all."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the Wilson interval; (0, 1), which says nothing, of no pictures at all."""
        if not self.total:
            return 0.0, 1.0
        from scipy.stats import binomtest

        found = binomtest(self.hits, self.total).proportion_ci(LEVEL, method="wilson")
        return float(found.low), float(found.high)

    def as_dict(self) -> dict[str, Any]:
        """hits, total, share, low and high, as plain JSON values."""
        low, high = self.interval
        share = self.share if self.total else None
        return {"hits": self.hits, "total": self.total, "share": share, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:6.1%}  [{low:.1%}, {high:.1%}]  {self.hits}/{self.total}"


def pictures_needed(share: float, bound: float) -> int | None:
    """How many pictures it takes, `share` of them hits, for the Wilson interval to end at `bound`.

    The interval's ends are the two rates pi with (share - pi)^2 = z^2 pi (1 - pi) / n, hence
    n = z^2 bound (1 - bound) / (share - bound)^2. None where no number will do: the share is the bound.
    """
    if share == bound or not 0 < bound < 1:
        return None
    from scipy.stats import norm

    z = float(norm.ppf((1 + LEVEL) / 2))
    # Rounding must not ask for one more where the quotient is whole.
    return math.ceil(z * z * bound * (1 - bound) / (share - bound) ** 2 - 1e-9)


@dataclass(frozen=True)
class Change:
    """What became of a property of the same pictures: how many lost it, how many gained it.

    `p_value`: McNemar's exact test, two-sided, of the hypothesis that losing and gaining are as likely.
    """

    lost: int
    gained: int

    @classmethod
    def of(cls, before: ArrayLike, after: ArrayLike) -> "Change":
        """The change between paired verdicts."""
        old, new = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
        return cls(int((old & ~new).sum()), int((~old & new).sum()))

    @property
    def p_value(self) -> float:
        """1 where nothing was lost or gained."""
        if self.lost + self.gained == 0:
            return 1.0
        from scipy.stats import binomtest

        return float(binomtest(self.lost, self.lost + self.gained, 0.5).pvalue)

    def as_dict(self) -> dict[str, Any]:
        """lost, gained and p_value, as plain JSON values."""
        return {"lost": self.lost, "gained": self.gained, "p_value": self.p_value}


def mean_change(before: ArrayLike, after: ArrayLike) -> dict[str, float | None]:
    """Mean of paired differences after - before, with Student's 95 % interval (None of fewer than two)."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    mean, count = float(difference.mean()), len(difference)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    from scipy.stats import t

    reach = float(t.ppf((1 + LEVEL) / 2, count - 1)) * float(difference.std(ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float | None:
    """Fréchet distance of the Gaussians fitted to two sets of features, (count, width) each, in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with means m and covariances S, as in FID. Small samples bias
    it upwards. None where a set has fewer than two rows.
    """
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if min(len(one), len(two)) < 2:
        return None
    S1, S2 = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (one, two))
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), which rounding cannot make complex.
    values, vectors = np.linalg.eigh(S1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root).clip(min=0)).sum()
    moved = ((one.mean(0) - two.mean(0)) ** 2).sum()
    return max(0.0, float(moved + np.trace(S1) + np.trace(S2) - 2 * overlap))


def similarity(features: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Cosine similarity of every row of (n, width) with every row of (m, width), as (n, m)."""
    rows = [np.asarray(each, np.float64) for each in (features, others)]
    one, two = (each / np.linalg.norm(each, axis=1, keepdims=True).clip(min=1e-12) for each in rows)
    product: NDArray[np.float64] = one @ two.T
    return product


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (harm, benefit) none beats: less harm at no less benefit, or the reverse."""
    return [
        not any(
            harm <= mine[0] and benefit >= mine[1] and (harm, benefit) != mine for harm, benefit in points
        )
        for mine in points
    ]
