"""Rounded weights against plain versions of the formats."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from trce_cli.maths.rounding import NF4, fp8, int8, nf4, q4_0


def weights(*shape: int) -> torch.Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    found[0] = 0  # a channel without anything in it
    found[1] *= 100
    return found


def e4m3() -> np.ndarray:
    """Every finite number of the format: sign, 4 bits of exponent with bias 7, 3 bits of fraction."""
    found = []
    for exponent in range(16):
        for fraction in range(8):
            if (exponent, fraction) != (15, 7):  # NaN
                small = fraction / 8 * 2.0**-6
                found.append(small if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
    return np.array(sorted({*found, *(-number for number in found)}))


@pytest.mark.parametrize("shape", [(7, 9), (5, 3, 3, 3)])
def test_fp8_takes_the_nearest_number_of_the_format_at_one_scale(shape: tuple[int, ...]) -> None:
    weight = weights(*shape)
    scale = float(weight.abs().max()) / 448
    codes = e4m3()
    assert codes.max() == 448
    off = np.abs(weight.numpy()[..., None] / scale - codes).min(-1) * scale
    assert np.abs(fp8(weight).numpy() - weight.numpy()) == pytest.approx(off, abs=1e-6 * scale * 448)


@pytest.mark.parametrize("shape", [(7, 9), (5, 3, 3, 3)])
def test_int8_has_a_scale_for_each_channel(shape: tuple[int, ...]) -> None:
    weight = weights(*shape)
    for row, rounded in zip(weight.numpy(), int8(weight).numpy(), strict=True):
        scale = np.abs(row).max() / 127 or 1.0
        assert rounded == pytest.approx(np.rint(row / scale) * scale, rel=1e-5, abs=1e-6)


def test_nf4_rounds_each_block_of_64_to_the_nearest_of_its_levels() -> None:
    weight = weights(6, 33)  # 198 numbers: the last block is not whole
    flat, rounded = weight.flatten().numpy(), nf4(weight).flatten().numpy()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = np.abs(block).max() or 1.0
        nearest = [min(NF4, key=lambda level, x=x: abs(level - x / scale)) * scale for x in block]  # type: ignore[misc]
        assert rounded[start : start + 64] == pytest.approx(nearest, rel=1e-5, abs=1e-6)


def test_nf4_s_levels_are_quantiles_of_a_normal_distribution() -> None:
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2  # appendix E of the paper, as its code has it
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    levels = np.array(sorted([*below, 0, *above]))
    assert pytest.approx(levels / levels.max(), abs=1e-6) == NF4


def test_q4_0_rounds_blocks_of_32_as_ggml_does() -> None:
    weight = weights(4, 64)
    weight[2, 5] = 1e-3  # whatever stands beside the largest number
    for block, rounded in zip(weight.reshape(-1, 32).numpy(), q4_0(weight).reshape(-1, 32), strict=True):
        largest = block[np.abs(block).argmax()]
        scale = largest / np.float32(-8)
        codes = [min(15, int(number / scale + 8.5)) if scale else 8 for number in block]
        assert np.float16(scale) * np.float32(-8) == pytest.approx(largest, rel=1e-3)
        assert rounded.numpy() == pytest.approx((np.array(codes) - 8) * float(np.float16(scale)), rel=1e-6)


def test_q4_0_leaves_rows_that_are_no_whole_blocks() -> None:
    weight = weights(5, 32, 3, 3)
    assert torch.equal(q4_0(weight), weight)
