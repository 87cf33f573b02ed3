"""The closed form of stage 1 (textual semantic erasure, arXiv 2503.07389): one linear map of text embeddings.

Every cross-attention key and value projection W sees the same text embeddings, so the minimiser of

    ||W' O - W N||^2 + lambda ||W' C - W C||^2        O unsafe, N safe, C benign embeddings, as columns

is W' = W M with one and the same matrix for all of them:

    M = I + (B - A) G^+,   G = A + lambda P
    A = 1/pairs sum w o o^T,   B = 1/pairs sum w n o^T,   P = 1/captions sum c c^T

That is the paper's. Text embeddings hardly vary in most of their directions, and along these G^+ is huge: the
map is small on every prompt, yet its norm is 600 and more, and what rounding adds to a weight, as in 4 bits,
comes out as many times larger. So the change is bounded by a ridge, which asks for a small change as well:

    + r ||W' - W||^2     M = I + (B - A) (G + r)^-1 on the range of G,   r = ridge * mean eigenvalue

With D the columns n - o, weighted as O, the change is 1/pairs D O^T (A + lambda P + r)^-1, and 1/pairs O O^T
= A is at most G: so ||M - I|| <= rms |n - o| / (2 sqrt r), whatever the embeddings. The ridge is on G and not
on P alone, or there would be none where lambda is 0.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trce_cli.maths.linear_map import LinearMap

# Below this share of the largest eigenvalue a direction counts as one that no embedding has. Half precision,
# in which most pipelines run, rounds an embedding by some 2^-12 of its length, spread over 768 directions:
# 1e-10 when squared. A change along weaker directions would act on rounding noise alone.
CUT_OFF: Final = 1e-10
# Embeddings wider than this, those of language models, have maps in two factors where these are smaller.
WIDE: Final = 2048


@dataclass(frozen=True)
class Fit:
    """The map that the closed form gives.

    rank: directions that the statistics reach, of the width; the change is zero in all others.
    condition: largest over smallest eigenvalue of what was inverted, G + r, among those directions.
    """

    map: LinearMap
    rank: int
    condition: float


class SecondMoment:
    """P: the second moment of so many benign captions' embeddings, streamed; float64, (dim, dim)."""

    def __init__(self, dim: int, captions: int) -> None:
        self.captions = captions
        self._sum = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, embeddings: Tensor, times: Tensor) -> "SecondMoment":
        """Add embeddings of the captions (tokens, dim), and how often each of them occurs (tokens,)."""
        c, times = embeddings.to(self._sum), times.to(self._sum)
        self._sum.addmm_(c.mT, times[:, None] * c)
        return self

    @property
    def P(self) -> Tensor:
        """1/captions sum c c^T."""
        return self._sum / self.captions


class MapFitter:
    """Streams what the closed form needs of so many prompt pairs, and solves it; float64.

    The sum of w (n - o) o^T is kept in place of B: the change is never a difference of large numbers.
    factored: whether the map comes as two factors where slots are so few that these are smaller; see `WIDE`.
    """

    def __init__(self, dim: int, pairs: int, factored: bool | None = None) -> None:
        self.pairs = pairs
        self._slots: list[tuple[Tensor, Tensor]] | None = None  # o and w (n - o), while they are few
        if dim > WIDE if factored is None else factored:
            self._slots = []
        self._oo = torch.zeros(dim, dim, dtype=torch.float64)
        self._no = torch.zeros(dim, dim, dtype=torch.float64)
        self._distance = 0.0

    def update(self, unsafe: Tensor, safe: Tensor, weights: Tensor) -> "MapFitter":
        """Add slots of the pairs: unsafe o and safe n (slots, dim), their weights w >= 0 (slots,)."""
        o, n, w = (rows.to(self._oo) for rows in (unsafe, safe, weights))
        wo = w[:, None] * o
        self._oo.addmm_(wo.mT, o)
        self._no.addmm_((n - o).mT, wo)
        self._distance += float(w @ (n - o).square().sum(1))
        if self._slots is not None:
            self._slots.append((o, w[:, None] * (n - o)))
            if 2 * sum(len(each) for each, _ in self._slots) >= len(self._oo):
                self._slots = None
        return self

    @property
    def A(self) -> Tensor:
        """1/pairs sum w o o^T."""
        return self._oo / self.pairs

    @property
    def B_minus_A(self) -> Tensor:
        """1/pairs sum w (n - o) o^T."""
        return self._no / self.pairs

    def solve(self, P: Tensor, preserve: float, ridge: float = 0.0, cut_off: float = CUT_OFF) -> Fit:
        """M = I + (B - A) (A + lambda P + r)^-1 with lambda = `preserve` >= 0 and P (dim, dim).

        ridge: r as a share of the mean eigenvalue, see `pseudo_inverse`; 0 is the paper's form. B - A is a
        product of two matrices with a column a slot, and so is the change: with few of them they are its
        factors, and nothing is inverted but solved for.
        """
        if self._slots:
            o, moves = (torch.cat(parts) for parts in zip(*self._slots, strict=True))
            down, rank, condition = solved(self.A + preserve * P, o, cut_off, ridge)
            return Fit(LinearMap((moves.mT / self.pairs, down)), rank, condition)
        inverse, rank, condition = pseudo_inverse(self.A + preserve * P, cut_off, ridge)
        return Fit(LinearMap.of(self.B_minus_A @ inverse), rank, condition)

    @property
    def distance(self) -> float:
        """How far the safe embeddings are from the unsafe ones: rms |n - o| / rms |o|."""
        return math.sqrt(self._distance / float(self._oo.trace()))

    def moved(self, linear_map: LinearMap) -> float:
        """How far the map takes the unsafe embeddings towards the safe ones: 0 not at all, 1 all the way.

        sum w (n - o)^T (M o - o) / sum w |n - o|^2, which is linear in the strength.
        """
        return linear_map.inner(self._no) / self._distance


def solved(moment: Tensor, rows: Tensor, cut_off: float, ridge: float) -> tuple[Tensor, int, float]:
    """rows (G + r)^-1 for rows in the range of G, (slots, dim), and the rest as `pseudo_inverse` has it.

    With a ridge by a Cholesky factorisation, a tenth of the work of eigenvectors.
    """
    eigenvalues = torch.linalg.eigvalsh(moment)
    kept = eigenvalues[eigenvalues > cut_off * eigenvalues[-1].clamp(min=0)]
    r = ridge * float(kept[:-1].mean()) if len(kept) > 1 else 0.0
    if r <= cut_off * float(eigenvalues[-1]):  # directions that no embedding has need a cut-off then
        inverse, rank, condition = pseudo_inverse(moment, cut_off, ridge)
        return rows @ inverse, rank, condition
    factor = torch.linalg.cholesky(moment + r * torch.eye(len(moment), dtype=moment.dtype))
    down = torch.cholesky_solve(rows.mT, factor).mT.contiguous()
    return down, len(kept), float((kept[-1] + r) / (kept[0] + r))


def pseudo_inverse(moment: Tensor, cut_off: float, ridge: float = 0.0) -> tuple[Tensor, int, float]:
    """(G + r)^-1 on the range of a symmetric positive semi-definite G, its rank, its condition number there.

    Eigenvalues up to `cut_off` times the largest count as zero. The final LayerNorm of a text encoder puts
    embeddings in a hyperplane, where G is singular up to rounding noise, which is not to be mapped: the
    change is that of minimum norm, zero in directions that no embedding has.

    r is `ridge` times the mean of the other eigenvalues but the largest, which is often the start token's:
    it is the same in every prompt, and without a final LayerNorm its states are far longer than others.
    """
    eigenvalues, vectors = torch.linalg.eigh(moment)
    kept = eigenvalues > cut_off * eigenvalues[-1].clamp(min=0)
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    if len(eigenvalues) > 1:
        eigenvalues = eigenvalues + ridge * eigenvalues[:-1].mean()
    condition = float(eigenvalues[-1] / eigenvalues[0]) if len(eigenvalues) else 1.0
    return vectors / eigenvalues @ vectors.mT, len(eigenvalues), condition
