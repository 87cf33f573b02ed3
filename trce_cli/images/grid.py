"""A labelled grid of a run's images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trce_cli.images.font import legible, typeface
from trce_cli.images.record import ImageRecord, load
from trce_cli.system.whole import whole

GRID = "grid.png"
CELL = 256  # pixels a side of an image in the grid, at most
GRID_ROWS, GRID_COLUMNS = 40, 8  # a larger picture is no longer looked at, and viewers refuse it
MARGIN = 12
INK, GREY, PAPER = "#1b1b1b", "#6b6b6b", "#ffffff"


def draw_grid(rows: Sequence[tuple[str, str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """A picture of labelled rows (label, remark, images), each with an image under every column's name.

    Small images are enlarged by a whole factor, large ones made to fit; labels are wrapped and cut to fit.
    """
    font, small = typeface(16), typeface(13)
    cells = [[fit(image) for image in images] for _, _, images in rows]
    width = max(image.width for images in cells for image in images)
    heights = [max(CELL // 2, *(image.height for image in images)) for images in cells]
    left, top = CELL + 2 * MARGIN, 2 * MARGIN + 16  # where the images begin
    size = (left + len(columns) * (width + MARGIN), top + sum(height + MARGIN for height in heights))
    grid = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(grid)
    for column, name in enumerate(columns):
        middle = left + column * (width + MARGIN) + width // 2
        pen.text((middle, top // 2), name, INK, font, anchor="mm")
    for (label, remark, _), images, height in zip(rows, cells, heights, strict=True):
        lines = wrap(legible(label), font, CELL, (height - 20) // 20)
        for number, line in enumerate(lines):
            pen.text((MARGIN, top + 20 * number), line, INK, font)
        pen.text((MARGIN, top + 20 * len(lines)), remark, GREY, small)
        for column, image in enumerate(images):
            grid.paste(image, (left + column * (width + MARGIN), top))
        top += height + MARGIN
    return grid


def fit(image: Image.Image) -> Image.Image:
    """The image at most CELL pixels a side: enlarged by a whole factor, or made smaller."""
    if (factor := CELL // max(image.size)) >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    smaller = image.copy()
    smaller.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return smaller


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels; long words are broken, the rest becomes "..."."""
    wrapped = [""]
    for word in text.split():
        joined = f"{wrapped[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            wrapped[-1] = joined
            continue
        wrapped.append("")
        for letter in word:
            if font.getlength(wrapped[-1] + letter) > width:
                wrapped.append("")
            wrapped[-1] += letter
    wrapped = [line for line in wrapped if line]
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while font.getlength(last + "...") > width:
            last = last[:-1]
        wrapped[lines - 1 :] = [last + "..."]
    return wrapped


def write_grid(folder: Path, records: Sequence[ImageRecord]) -> Path:
    """Write `grid.png` from the drawn images: a row for each prompt and seed, a column for each role.

    Without a comparison a row is a prompt and its columns are its seeds. Shows the first GRID_ROWS rows and
    GRID_COLUMNS columns.
    """
    rows: dict[tuple[int, int], list[ImageRecord]] = {}
    compared = len({record.role for record in records}) > 1
    for record in records:
        rows.setdefault((record.index, record.seed if compared else 0), []).append(record)
    shown = [row[:GRID_COLUMNS] for row in list(rows.values())[:GRID_ROWS]]
    labelled = [(row[0].prompt, remark(row), [load(folder / record.file) for record in row]) for row in shown]
    widest = max(shown, key=len)
    columns = [record.role if compared else str(place) for place, record in enumerate(widest, start=1)]
    path = folder / GRID
    with whole(path) as fresh:
        draw_grid(labelled, columns).save(fresh, format="PNG")
    return path


def remark(row: Sequence[ImageRecord]) -> str:
    """The seeds of a grid row, "seed 7" or "seeds 7 to 9"."""
    first, last = row[0].seed, row[-1].seed
    return f"seed {first}" if first == last else f"seeds {first} to {last}"
