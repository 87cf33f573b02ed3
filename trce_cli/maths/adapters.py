"""What adapters do to a weight W: the changes that LoRA, LoHa and LoKr stand for, and DoRA's rescaling.

LoRA: arXiv 2106.09685; LoHa and LoKr as LyCORIS has them: arXiv 2309.14859; DoRA: arXiv 2402.09353. Of a
convolution W is (out, in, height, width), and factors are those of (out, in height width) or have a core.
"""

import torch
from torch import Tensor


def low_rank(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """up down, (out, rank) (rank, in ...); with a core (rank, rank, height, width) its Tucker product."""
    if core is None:
        return up.flatten(1) @ down.flatten(1)
    return torch.einsum("nmkl,in,mj->ijkl", core, up.flatten(1), down.flatten(1))


def hadamard(
    one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], cores: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(a1 b1) * (a2 b2), each a (out, rank) and b (rank, in ...); with cores each the Tucker product of
    a (rank, out), b (rank, in) and its core."""
    if cores is None:
        return (one[0] @ one[1]) * (two[0] @ two[1])
    first, second = (
        torch.einsum("ijkl,ip,jr->prkl", core, a, b) for core, (a, b) in zip(cores, (one, two), strict=True)
    )
    return first * second


def kronecker(one: Tensor, two: Tensor) -> Tensor:
    """The Kronecker product of (out1, in1) and (out2, in2 ...)."""
    wide = one.reshape(*one.shape, *[1] * (two.ndim - one.ndim))
    return torch.kron(wide, two.contiguous())  # which insists on it


def rescaled(weight: Tensor, magnitude: Tensor, by_rows: bool) -> Tensor:
    """m W / |W|, the norm of each row of W (out, in ...), or of each column; m has a number for each."""
    axes = [axis for axis in range(weight.ndim) if axis != (0 if by_rows else 1)]
    norm = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    scale: Tensor = magnitude.reshape(norm.shape) / norm
    return weight * scale
