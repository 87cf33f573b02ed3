"""Curves of a training run as a PNG, drawn with Pillow."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 80, 20, 50, 50
COLOURS = ("#c44e52", "#4c72b0")


def loss_curves(records: Sequence[Mapping[str, Any]], regularisation: float) -> bytes:
    """The two parts of the loss against the step, each smoothed over a fiftieth of the run."""
    series = {
        "contrast": [float(entry["contrast"]) for entry in records],
        f"regulariser x {regularisation:g}": [regularisation * entry["regulariser"] for entry in records],
    }
    smooth = {name: _smoothed(values, max(1, len(values) // 50)) for name, values in series.items()}
    top = max((max(values, default=0.0) for values in smooth.values()), default=0.0) or 1.0
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in range(5):
        y = bottom - tick * (bottom - TOP) / 4
        draw.line((LEFT, y, right, y), fill="#dddddd")
        draw.text((LEFT - 8, y), f"{top * tick / 4:.3g}", fill="black", font=font, anchor="rm")
    draw.text((LEFT, bottom + 8), "1", fill="black", font=font)
    draw.text((right, bottom + 8), f"{len(records)} steps", fill="black", font=font, anchor="ra")
    x = LEFT
    for (name, values), colour in zip(smooth.items(), COLOURS, strict=True):
        step = (right - LEFT) / max(1, len(values) - 1)
        points = [(LEFT + n * step, bottom - (bottom - TOP) * value / top) for n, value in enumerate(values)]
        draw.line(points, fill=colour, width=2)
        draw.text((x, 18), name, fill=colour, font=font)
        x += 60 + int(draw.textlength(name, font=font))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running means over the last `window` values."""
    return [sum(values[max(0, n - window + 1) : n + 1]) / min(n + 1, window) for n in range(len(values))]
