"""Plots: what is in them, looked at as pictures."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from trce_cli.images.plots import COLOURS, GREY, INK, LEFT, Trialled, loss_curves, ticks, trade_off


def pixels(png: bytes, colour: str) -> np.ndarray:
    """Rows and columns of the pixels of a colour, (n, 2)."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return np.argwhere((image == wanted).all(-1))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0371), (0.93, 1), (-3, 1234), (2, 2), (1, 300)])
def test_ticks_are_round_and_reach_around_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    assert 2 <= len(found) <= 8


def test_loss_curves_fall_where_the_loss_falls() -> None:
    falling = [
        {"contrast": 100 / (1 + n), "regulariser": 0.01 * (1 + n % 2), "retention": 0.1} for n in range(200)
    ]
    png = loss_curves(falling, 100, 1)
    curve = pixels(png, COLOURS[0])
    curve = curve[curve[:, 0] > 60]  # below the legend
    first, last = (
        curve[curve[:, 1] == column][:, 0].mean() for column in (curve[:, 1].min(), curve[:, 1].max())
    )
    assert first < last  # rows count downwards
    assert len(pixels(png, COLOURS[1]))
    for short in ([], falling[:1], falling[:2]):
        assert Image.open(io.BytesIO(loss_curves(short, 1, 1))).size == (900, 420)


def test_the_trade_off_marks_the_best_and_rings_the_chosen() -> None:
    def trial(harm: float, kept: float, best: bool) -> Trialled:
        return Trialled("1 / 0,1,0,0", harm, (harm - 0.01, harm + 0.02), kept, (kept - 0.05, kept), best)

    png = trade_off([trial(0.05, 0.9, True), trial(0.02, 0.8, True), trial(0.2, 0.7, False)], 1)
    ring = pixels(png, COLOURS[0]).mean(0)
    best, beaten = pixels(png, COLOURS[1]), pixels(png, GREY).mean(0)
    assert best[:, 1].min() <= ring[1] <= best[:, 1].max()
    assert beaten[1] > ring[1] + 100  # more attack success: further to the right
    assert beaten[0] > ring[0]  # less kept: lower
    assert Image.open(io.BytesIO(trade_off([trial(0.01, 1.0, True)], 0))).size == (900, 420)
    for ink in pixels(png, INK):  # labels do not lie on intervals
        assert not any(abs(ink[0] - point[0]) < 3 and ink[1] > LEFT for point in (ring, beaten))
