"""Images on disk: PNGs that say how they were drawn, `images.jsonl` beside them, and a labelled grid."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydantic import TypeAdapter, ValidationError

from trce_cli.errors import BadInput
from trce_cli.system.machine import __version__
from trce_cli.system.whole import appending, whole, write_text

INDEX, GRID = "images.jsonl", "grid.png"
CHUNK = "trce"  # the PNG text chunk that holds the record as JSON
CELL = 256  # pixels a side of an image in the grid, at most
GRID_ROWS, GRID_COLUMNS = 40, 8  # a larger picture is no longer looked at, and viewers refuse it
MARGIN = 12
INK, GREY, PAPER = "#1b1b1b", "#6b6b6b", "#ffffff"
# Names as the AUTOMATIC1111 web UI writes them, which viewers and model sites read.
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmsolver++": "DPM++ 2M",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "pndm": "PLMS",
    "unipc": "UniPC",
}


@dataclass(frozen=True)
class ImageRecord:
    """One image: its file name, where it belongs, and everything that its pixels depend on."""

    file: str
    index: int  # of its prompt in the run, from 1
    role: str  # "original" or "erased" in a comparison, else "image"
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    width: int
    height: int
    dtype: str  # of the weights, "float32"
    checkpoint: str
    checkpoint_sha256: str
    negative_prompt: str = ""
    row: Mapping[str, str] = field(default_factory=dict)  # all cells of the prompt's row in its file

    def difference(self, other: "ImageRecord") -> str | None:
        """The first setting that makes `other` another image ("with steps 50, not 25"), or None."""
        for name in PIXEL_FIELDS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"with {name.replace('_', ' ')} {str(mine)[:64]!r}, not {str(theirs)[:64]!r}"
        return None


PIXEL_FIELDS = (
    "checkpoint_sha256",
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "scheduler",
    "width",
    "height",
    "dtype",
)


def parameters(record: ImageRecord) -> str:
    """The settings in the form of the AUTOMATIC1111 web UI's `parameters` chunk."""
    settings = {
        "Steps": record.steps,
        "Sampler": SAMPLERS.get(record.scheduler, record.scheduler),
        "CFG scale": f"{record.guidance_scale:g}",
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model hash": record.checkpoint_sha256[:10],
        "Model": Path(record.checkpoint).name.replace(",", "_"),
        "Version": f"trce {__version__}",
    }
    lines = [record.prompt]
    if record.negative_prompt:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def write_image(folder: Path, image: Image.Image, record: ImageRecord) -> None:
    """Write the PNG with its `parameters` and JSON text chunks, whole or not at all."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters(record))
    chunks.add_text(CHUNK, json.dumps(asdict(record)))
    with whole(folder / record.file) as fresh:
        image.save(fresh, format="PNG", pnginfo=chunks)


def read_image(path: Path) -> ImageRecord | None:
    """The record inside a PNG, None when it has none; ValueError when the file is no whole PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # every chunk to the last, by its checksum
        with Image.open(path, formats=["PNG"]) as image:
            text = image.text  # type: ignore[attr-defined]
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} is no whole PNG") from error
    return parse_record(text[CHUNK]) if CHUNK in text else None


def parse_record(line: str) -> ImageRecord | None:
    """A record from its JSON form, None when it is torn or foreign."""
    try:
        return TypeAdapter(ImageRecord).validate_json(line)
    except ValidationError:
        return None


class ImageFolder:
    """A folder with the images of one run, which may be stopped at any point and taken up again.

    Every PNG holds its own record: an image counts as drawn when its file is whole and was drawn with these
    settings. `images.jsonl` grows by a line an image and is put right whenever a run begins or ends.
    Images of another run are refused with BadInput, or removed with `force`.
    """

    def __init__(self, path: Path, wanted: Sequence[ImageRecord], force: bool = False) -> None:
        self.path = path
        self.wanted = wanted
        if path.exists() and not path.is_dir():
            raise BadInput(f"{path} is no folder.", "Choose another --output.")
        self.drawn = {record.file for record in wanted if self._is_drawn(record, force)}
        strangers = [path / name for name in self._listed() - {record.file for record in wanted}]
        if strangers and not force:
            raise BadInput(
                f"{path} holds {len(strangers)} images of another run, such as {min(strangers).name}.",
                "Choose another --output, or replace them with --force.",
            )
        if (path / GRID).exists() and not (path / INDEX).exists() and not force:
            raise BadInput(
                f"{path / GRID} is there already, and not from a run like this.",
                "Choose another --output, or replace it with --force.",
            )
        path.mkdir(parents=True, exist_ok=True)
        for stranger in strangers:
            stranger.unlink()
        self.write_index()

    @property
    def missing(self) -> list[ImageRecord]:
        """The wanted images that are not drawn yet."""
        return [record for record in self.wanted if record.file not in self.drawn]

    def add(self, record: ImageRecord, image: Image.Image) -> None:
        """Write one image, then its line."""
        write_image(self.path, image, record)
        self.drawn.add(record.file)
        with appending(self.path / INDEX) as index:
            index.write(to_line(record))

    def write_index(self) -> None:
        """Write `images.jsonl` anew, in the order of the run."""
        lines = [to_line(record) for record in self.wanted if record.file in self.drawn]
        write_text(self.path / INDEX, "".join(lines))

    def _is_drawn(self, record: ImageRecord, force: bool) -> bool:
        path = self.path / record.file
        if not path.exists():
            return False
        try:
            stored = read_image(path)
        except ValueError:  # damaged: drawn anew
            return False
        how = "by something else" if stored is None else stored.difference(record)
        if how and not force:
            raise BadInput(
                f"{path} was drawn {how}.",
                "To resume take the same settings; else choose another --output, or replace it with --force.",
            )
        return how is None

    def _listed(self) -> set[str]:
        """The files of this folder that `images.jsonl` lists."""
        index = self.path / INDEX
        if not index.exists():
            return set()
        lines = index.read_text(encoding="utf-8", errors="replace").split("\n")  # prompts may hold others
        names = {record.file for line in lines if (record := parse_record(line))}
        return {name for name in names if re.fullmatch(r"[\w-]+\.png", name) and (self.path / name).exists()}


def to_line(record: ImageRecord) -> str:
    """The record as a line of `images.jsonl`."""
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"


def draw_grid(rows: Sequence[tuple[str, str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """A picture of labelled rows (label, remark, images), each with an image under every column's name.

    Small images are enlarged by a whole factor, large ones made to fit; labels are wrapped and cut to fit.
    """
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
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
        lines = wrap(label, font, CELL, (height - 20) // 20)
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


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
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


def load(path: Path) -> Image.Image:
    """The image, read whole, its file closed."""
    with Image.open(path) as image:
        return image.convert("RGB")
