"""Plots as PNGs, drawn with Pillow: the curves of a training run, the trade-off of settings."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from trce_cli.images.font import legible, typeface

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 80, 30, 60, 60
COLOURS = ("#c44e52", "#4c72b0", "#55a868")
FAINT = ("#eccacb", "#ccd6e7", "#cfe6d5")
INK, GREY, PAPER = "#1b1b1b", "#999999", "#ffffff"


@dataclass(frozen=True)
class Trialled:
    """A trial in the plot of the trade-off: shares of 1 with their 95 % intervals (low, high).

    best: whether no other trial beats it.
    """

    label: str
    harm: float
    harm_interval: tuple[float, float]
    kept: float
    kept_interval: tuple[float, float]
    best: bool


def loss_curves(records: Sequence[Mapping[str, Any]], regularisation: float, retention: float) -> bytes:
    """The parts of the loss against the step: each step faintly, and smoothed over a tenth of the run."""
    series = {
        "contrast": [float(entry["contrast"]) for entry in records],
        f"regulariser x {regularisation:g}": [regularisation * entry["regulariser"] for entry in records],
        f"retention x {retention:g}": [retention * entry["retention"] for entry in records],
    }
    smooth = {name: _smoothed(values, max(1, len(values) // 10)) for name, values in series.items()}
    # Single steps may leave the picture at the top; the curves never do.
    highest = max((1.5 * max(values, default=0.0) for values in smooth.values()), default=0.0)
    lowest = min((value for values in series.values() for value in values), default=0.0)
    axes = Axes(
        "Loss of stage 2, by step",
        (1, max(2, len(records))),
        (min(0.0, lowest), highest or 1.0),
        "{:g}",
        "{:g}",
    )
    x = LEFT
    for values, faint in zip(series.values(), FAINT, strict=True):
        axes.line(list(enumerate(values, start=1)), faint, 1)
    for (name, values), colour in zip(smooth.items(), COLOURS, strict=True):
        axes.line(list(enumerate(values, start=1)), colour, 2)
        axes.draw.text((x, 34), name, fill=colour, font=typeface(14))
        x += 40 + int(axes.draw.textlength(name, font=typeface(14)))
    return axes.png()


def trade_off(trials: Sequence[Trialled], chosen: int) -> bytes:
    """Attack success (to the right) and preservation (upwards) of trials, labelled, with their intervals.

    Those that none beats are joined by a line; the chosen one has a ring.
    """
    low = min(trial.kept_interval[0] for trial in trials)
    high = max(trial.harm_interval[1] for trial in trials)
    title = "Kept, against attack success, by lambda / token weights; bars: 95 % intervals; ringed: chosen"
    axes = Axes(title, (0, high), (low, 1), "{:.4g} %", "{:.4g} %", 100)
    for trial in trials:
        colour = FAINT[1] if trial.best else "#e4e4e4"
        axes.line([(end, trial.kept) for end in trial.harm_interval], colour, 1)
        axes.line([(trial.harm, end) for end in trial.kept_interval], colour, 1)
    axes.line(sorted((trial.harm, trial.kept) for trial in trials if trial.best), COLOURS[1], 2)
    taken: list[tuple[float, float, float, float]] = []
    for place, trial in enumerate(trials):
        x, y = axes.place(trial.harm, trial.kept)
        axes.draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[1] if trial.best else GREY)
        if place == chosen:
            axes.draw.ellipse((x - 9, y - 9, x + 9, y + 9), outline=COLOURS[0], width=3)
        _label(axes.draw, legible(trial.label), (x, y), taken)
    return axes.png()


class Axes:
    """An empty plot with its title and round ticks, and the way from values to pixels.

    across, up: least and greatest value; the axes end at the round numbers around them. x_label, y_label:
    formats of a tick's value times `factor`.
    """

    def __init__(
        self,
        title: str,
        across: tuple[float, float],
        up: tuple[float, float],
        x_label: str,
        y_label: str,
        factor: float = 1,
    ) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        columns, rows = ticks(*across), ticks(*up)
        self._x = _scale(columns, LEFT, WIDTH - RIGHT)
        self._y = _scale(rows, HEIGHT - BOTTOM, TOP)
        self.draw.text((LEFT, 10), title, fill=INK, font=typeface(16))
        for tick in rows:
            y = self._y(tick)
            self.draw.line((LEFT, y, WIDTH - RIGHT, y), fill="#dddddd")
            self.draw.text((LEFT - 8, y), y_label.format(factor * tick), INK, typeface(14), anchor="rm")
        for tick in columns:
            where = (self._x(tick), HEIGHT - BOTTOM + 8)
            self.draw.text(where, x_label.format(factor * tick), INK, typeface(14), anchor="ma")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a value, within the frame."""
        return self._x(x), max(self._y(y), TOP)

    def line(self, values: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        """A line through values."""
        self.draw.line([self.place(*value) for value in values], fill=colour, width=width)

    def png(self) -> bytes:
        """The picture as a file."""
        file = io.BytesIO()
        self.image.save(file, format="PNG")
        return file.getvalue()


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in equal steps (1, 2 or 5 times a power of ten) around low and high: about so many."""
    span = high - low if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * about >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(step * count, digits) for count in range(first, max(last, first + 1) + 1)]


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From a value to a pixel: the first of the values at `start`, the last at `end`."""
    first, last = values[0], values[-1]
    return lambda value: start + (end - start) * (value - first) / (last - first)


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    point: tuple[float, float],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write a point's label beside it, off its intervals, where no other label is; else leave it out."""
    x, y = point
    for anchor, dx, dy in (("lb", 10, -6), ("rb", -10, -6), ("lt", 10, 6), ("rt", -10, 6)):
        box = draw.textbbox((x + dx, y + dy), text, typeface(12), anchor=anchor)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 10 and box[3] <= HEIGHT - BOTTOM
        apart = all(
            box[2] < left or right < box[0] or box[3] < top or bottom < box[1]
            for left, top, right, bottom in taken
        )
        if inside and apart:
            place = x + dx, y + dy
            draw.text(place, text, INK, typeface(12), anchor=anchor, stroke_width=3, stroke_fill=PAPER)
            taken.append(box)
            return


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running means over the last `window` values."""
    return [sum(values[max(0, n - window + 1) : n + 1]) / min(n + 1, window) for n in range(len(values))]
