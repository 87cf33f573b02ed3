"""Linear maps of embeddings, M = I + change, with the change whole or as a product of two factors."""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearMap:
    """M = I + change, over embeddings of one width; float64.

    factors: the change itself, (width, width), or `up` (width, rank) and `down` (rank, width), whose product
    it is: for wide embeddings far less to keep and to multiply with. `a @ b` is M_a M_b.
    """

    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in self.factors]
        fit = all(len(shape) == 2 for shape in shapes) and shapes[0][0] == shapes[-1][1]
        if not fit or any(left[1] != right[0] for left, right in pairwise(shapes)):
            raise ValueError(f"These are no factors of a square matrix: {shapes}.")

    @classmethod
    def of(cls, change: Tensor) -> "LinearMap":
        """The map with this change, (width, width)."""
        return cls((change,))

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return len(self.factors[0])

    @property
    def change(self) -> Tensor:
        """M - I, (width, width)."""
        return reduce(torch.matmul, self.factors)

    @property
    def matrix(self) -> Tensor:
        """M itself, (width, width)."""
        return torch.eye(self.width, dtype=self.factors[0].dtype) + self.change

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity, in float32 either, in which maps are kept and hooked."""
        return all(bool(torch.isfinite(factor.float()).all()) for factor in self.factors)

    @property
    def norm(self) -> float:
        """The spectral norm of the change: by how much it lengthens an embedding at most."""
        if len(self.factors) > 1:
            return float(self.svd()[1][0])
        gram = self.factors[0].mT @ self.factors[0]  # far faster than an SVD, and exact enough for a figure
        return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "LinearMap":
        """In another dtype, on another device; itself where it is there already."""
        factors = tuple(factor.to(device, dtype) for factor in self.factors)
        same = all(new is old for new, old in zip(factors, self.factors, strict=True))
        return self if same else LinearMap(factors)

    def scaled(self, strength: float) -> "LinearMap":
        """M_s = I + s (M - I): 0 is the identity, 1 the full edit."""
        return LinearMap((strength * self.factors[0], *self.factors[1:]))

    def deflated(self, least: float) -> tuple["LinearMap", int]:
        """M (I - Q), with Q the spectral projector of M's eigenvalues whose real part is below `least` < 1.

        What M leaves less than that share of, or turns round, is taken away altogether: M is singular there,
        and no embedding whatever comes out along these directions. Other eigenvalues and eigenvectors are
        kept. Also returns how many dimensions that are.

        With X and Y, (width, dimensions), of which the right and the left eigenvectors of these eigenvalues
        are combinations, Q = X (Y^T X)^-1 Y^T. Those of a change up down are up X and down^T Y with X and Y
        of the small matrix down up, whose eigenvalues are the change's but for zeros: M's of 1, which stay.
        """
        X, Y = _spans_below(reduce(torch.matmul, reversed(self.factors)), least - 1)
        if len(self.factors) > 1:
            X, Y = self.factors[0] @ X, self.factors[1].mT @ Y
        without = LinearMap((-torch.linalg.solve(Y.mT @ X, X, left=False), Y.mT))  # I - Q
        return self @ without, X.shape[1]

    def __matmul__(self, then: "LinearMap") -> "LinearMap":
        """M_a M_b = I + a + b + a b; factored where both are, with the sum of their ranks."""
        if len(self.factors) == len(then.factors) == 2:
            (up, down), (then_up, then_down) = self.factors, then.factors
            rest = down + (down @ then_up) @ then_down  # up rest = a + a b
            return LinearMap((torch.cat([up, then_up], 1), torch.cat([rest, then_down])))
        a = self.change
        return LinearMap.of(a + then.change + reduce(torch.matmul, then.factors, a))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """M e for each embedding in the rows of (..., width); float64."""
        embeddings = embeddings.double()
        return embeddings + self.moves(embeddings)

    def moves(self, embeddings: Tensor) -> Tensor:
        """(M - I) e for each embedding in the rows of (..., width), in the map's own dtype."""
        return reduce(lambda rows, factor: rows @ factor.mT, reversed(self.factors), embeddings)

    def edit(self, weight: Tensor) -> Tensor:
        """W' = W M = W + W (M - I) for a weight W (out, columns), in float64; who stores it rounds it once.

        Columns beyond the map's width stay as they are.
        """
        weight = weight.double()
        own = weight[:, : self.width]
        return torch.cat([own + reduce(torch.matmul, self.factors, own), weight[:, self.width :]], dim=1)

    def moved_moment(self, moment: Tensor) -> Tensor:
        """Second moment of (M - I) c from that of c, both (width, width)."""
        return reduce(lambda found, factor: factor @ found @ factor.mT, reversed(self.factors), moment)

    def inner(self, matrix: Tensor) -> float:
        """The sum over all entries of the change times those of a matrix, (width, width)."""
        first, *rest = self.factors
        return float((first * reduce(lambda found, factor: found @ factor.mT, reversed(rest), matrix)).sum())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, V^T of the change, as `torch.linalg.svd` gives them, with the rank of the factors at most."""
        if len(self.factors) == 1:
            U, S, Vt = torch.linalg.svd(self.factors[0])
            return U, S, Vt
        (left, up), (right, down) = (
            torch.linalg.qr(factor) for factor in (self.factors[0], self.factors[1].mT)
        )
        U, S, Vt = torch.linalg.svd(up @ down.mT)
        return left @ U, S, Vt @ right.mT


def _spans_below(matrix: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases, in columns, of the right and of the left eigenvectors whose eigenvalues have a real
    part below `bound`, by one decomposition.
    """
    from scipy.linalg import eig

    values, left, right = eig(matrix.numpy(), left=True)
    chosen = (values.real < bound) & (values.imag >= 0)  # of two that are conjugate one has both parts
    turning = chosen & (values.imag > 0)
    parts = (np.hstack([each[:, chosen].real, each[:, turning].imag]) for each in (right, left))
    X, Y = (torch.linalg.qr(torch.from_numpy(each))[0] for each in parts)
    return X, Y
