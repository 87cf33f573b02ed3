"""Matrices of low rank in place of others: how much to keep, and the factors that do."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trce_cli.errors import BadInput

ENERGY: Final = 0.999


@dataclass(frozen=True)
class Size:
    """How much of a change its factors keep: a rank, or else as many as hold this share of the energy.

    The energy is the sum of the squared singular values. Raises BadInput for values that make no sense.
    """

    rank: int | None = None
    energy: float = ENERGY

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"The rank must be at least 1, not {self.rank}.")
        if not 0 < self.energy <= 1:
            raise BadInput(f"The energy must be above 0 and at most 1, not {self.energy:g}.")

    def of(self, singular_values: Tensor) -> int:
        """The rank for these singular values, in falling order; at least 1."""
        squares = singular_values.square()
        noise = len(squares) * torch.finfo(squares.dtype).eps * singular_values[0]
        most = max(1, int((singular_values > noise).sum()))
        if self.rank is not None:
            return min(self.rank, most)
        return min(most, 1 + int((squares.cumsum(0) < self.energy * squares.sum()).sum()))


def cut(up: Tensor, down: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The best factors of that size of up down, (out, rank) (rank, in): by the SVD of its small middle.

    With up = Q R and down^T = P L it is Q (R L^T) P^T.
    """
    Q, R = torch.linalg.qr(up)
    P, L = torch.linalg.qr(down.mT)
    left, right = own_factors(R @ L.mT, size)
    return Q @ left, right @ P.mT


def own_factors(change: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The cut-off SVD of one weight's change: up = U S, down = V^T."""
    U, S, Vt = torch.linalg.svd(change, full_matrices=False)
    rank = size.of(S)
    return U[:, :rank] * S[:rank], Vt[:rank]
