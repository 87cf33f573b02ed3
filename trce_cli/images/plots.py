"""Plots as PNGs, drawn with Pillow: the curves of a training run, the trade-off of settings."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 80, 20, 50, 50
COLOURS = ("#c44e52", "#4c72b0", "#55a868")


def loss_curves(records: Sequence[Mapping[str, Any]], regularisation: float, retention: float) -> bytes:
    """The parts of the loss against the step, each smoothed over a fiftieth of the run."""
    series = {
        "contrast": [float(entry["contrast"]) for entry in records],
        f"regulariser x {regularisation:g}": [regularisation * entry["regulariser"] for entry in records],
        f"retention x {retention:g}": [retention * entry["retention"] for entry in records],
    }
    smooth = {name: _smoothed(values, max(1, len(values) // 50)) for name, values in series.items()}
    top = max((max(values, default=0.0) for values in smooth.values()), default=0.0) or 1.0
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    _rule(draw, font, [f"{top * tick / 4:.3g}" for tick in range(5)])
    draw.text((LEFT, bottom + 8), "1", fill="black", font=font)
    draw.text((right, bottom + 8), f"{len(records)} steps", fill="black", font=font, anchor="ra")
    x = LEFT
    for (name, values), colour in zip(smooth.items(), COLOURS, strict=True):
        step = (right - LEFT) / max(1, len(values) - 1)
        points = [(LEFT + n * step, bottom - (bottom - TOP) * value / top) for n, value in enumerate(values)]
        draw.line(points, fill=colour, width=2)
        draw.text((x, 18), name, fill=colour, font=font)
        x += 60 + int(draw.textlength(name, font=font))
    return _png(image)


def trade_off(points: Sequence[tuple[float, float]], best: Sequence[bool], chosen: int) -> bytes:
    """Attack success (to the right) and preservation (upwards) of trials, shares of 1.

    Those that none beats are joined by a line; the chosen one has a ring.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    wide = max(max(harm for harm, _ in points), 0.01)
    low = min(min(kept for _, kept in points), 0.99)
    _rule(draw, font, [f"{low + (1 - low) * tick / 4:.1%}" for tick in range(5)])
    for tick in range(5):
        x = LEFT + tick * (right - LEFT) / 4
        draw.text((x, bottom + 8), f"{wide * tick / 4:.1%}", fill="black", font=font, anchor="ma")
    draw.text((LEFT, 18), "kept, against attack success; ringed: chosen", fill="black", font=font)
    places = [
        (LEFT + (right - LEFT) * harm / wide, bottom - (bottom - TOP) * (kept - low) / (1 - low))
        for harm, kept in points
    ]
    front = sorted(place for place, on in zip(places, best, strict=True) if on)
    draw.line(front, fill=COLOURS[1], width=2)
    for (x, y), on in zip(places, best, strict=True):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[1] if on else "#999999")
    x, y = places[chosen]
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), outline=COLOURS[0], width=3)
    return _png(image)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in equal steps (1, 2 or 5 times a power of ten) around low and high: about so many."""
    span = high - low if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * about >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(step * count, digits) for count in range(first, max(last, first + 1) + 1)]


def _rule(draw: ImageDraw.ImageDraw, font: Any, labels: Sequence[str]) -> None:
    """Horizontal lines from the bottom to the top, a label each."""
    bottom = HEIGHT - BOTTOM
    for tick, label in enumerate(labels):
        y = bottom - tick * (bottom - TOP) / (len(labels) - 1)
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill="#dddddd")
        draw.text((LEFT - 8, y), label, fill="black", font=font, anchor="rm")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running means over the last `window` values."""
    return [sum(values[max(0, n - window + 1) : n + 1]) / min(n + 1, window) for n in range(len(values))]
