"""Rounding of weights as formats for release store them; what comes out is what they give back.

Each takes a float tensor (out, ...) of at least two dimensions and returns float32 of the same shape.
"""

from typing import Final

import torch
from torch import Tensor

FP8_MAX: Final = 448.0  # the largest number of e4m3
BLOCK: Final = 64  # of nf4, bitsandbytes' default
Q4_BLOCK: Final = 32  # of GGUF's Q4_0

# The quantiles of a normal distribution that QLoRA (arXiv 2305.14314, appendix E) stores 4 bits as.
NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def fp8(weight: Tensor) -> Tensor:
    """8-bit floating point, e4m3, with one scale a tensor: its largest number becomes the format's."""
    weight = weight.float()
    scale = _positive(weight.abs().max()) / FP8_MAX
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def int8(weight: Tensor) -> Tensor:
    """Whole numbers from -127 to 127 with a scale for each output channel."""
    rows = weight.float().flatten(1)
    scale = _positive(rows.abs().amax(1, keepdim=True)) / 127
    return ((rows / scale).round() * scale).reshape(weight.shape)


def nf4(weight: Tensor) -> Tensor:
    """4 bits: blocks of 64 numbers in a row, each with a scale, rounded to the nearest of 16 levels."""
    numbers = weight.float().flatten()
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK))
    blocks = padded.reshape(-1, BLOCK)
    scale = _positive(blocks.abs().amax(1, keepdim=True))
    levels = torch.tensor(NF4, device=weight.device)
    places = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[places] * scale).flatten()[: len(numbers)].reshape(weight.shape)


def q4_0(weight: Tensor) -> Tensor:
    """GGUF's Q4_0: blocks of 32 numbers of a row, whole numbers from -8 to 7 with a scale in half precision.

    The number of largest size is -8 (ggml's `quantize_row_q4_0_ref`). Rows that are no multiple of 32 long,
    as convolutions have them, stay as they are: programs that write such files do not round them.
    """
    weight = weight.float()
    if weight.shape[-1] % Q4_BLOCK:
        return weight
    blocks = weight.reshape(-1, Q4_BLOCK)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    levels = (blocks * inverse + 8.5).floor().clamp(max=15) - 8
    return (levels * scale.half().float()).reshape(weight.shape)


def _positive(scale: Tensor) -> Tensor:
    """The scale; 1 for a block of zeros, which stay what they are."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
