"""One image on disk: a PNG that says how it was drawn."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter, ValidationError

from trce_cli.errors import refusing
from trce_cli.system.foreign import open_file
from trce_cli.system.machine import __version__
from trce_cli.system.whole import whole

MAX_PIXELS = 1 << 26  # of a picture that is read; its RGB takes three bytes each
CHUNK = "trce"  # the PNG text chunk that holds the record as JSON
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
    clip_skip: int = 1
    treatment: str = ""  # what was done to the checkpoint before it drew, in memory alone
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
    "clip_skip",
    "treatment",
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
    if record.clip_skip > 1:
        settings["Clip skip"] = record.clip_skip
    lines = [record.prompt]
    if record.negative_prompt:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def write_image(folder: Path, image: Image.Image, record: ImageRecord) -> None:
    """Write the PNG with its `parameters` and JSON text chunks, whole or not at all."""
    with whole(folder / record.file) as fresh:
        image.save(fresh, format="PNG", pnginfo=_chunks(record))


def encoded(image: Image.Image, record: ImageRecord) -> bytes:
    """The PNG that `write_image` writes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_chunks(record))
    return buffer.getvalue()


def _chunks(record: ImageRecord) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters(record))
    chunks.add_text(CHUNK, json.dumps(asdict(record)))
    return chunks


def read_image(path: Path) -> ImageRecord | None:
    """The record inside a PNG, None when it has none; ValueError when the file is no whole PNG.

    Where it cannot be opened BadInput, and where the system refuses to read it OSError: it may be whole.
    """
    try:
        with open_file(path) as file, Image.open(file, formats=["PNG"]) as image:
            image.verify()  # every chunk to the last, by its checksum
        with open_file(path) as file, Image.open(file, formats=["PNG"]) as image:
            text = image.text  # type: ignore[attr-defined]
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is no whole PNG") from error
    return parse_record(text[CHUNK]) if CHUNK in text else None


def load(path: Path) -> Image.Image:
    """A picture as RGB, read whole; BadInput for what is none, or too large to be one of an evaluation."""
    with (
        refusing(f"{path} is no picture that can be read"),
        open_file(path) as file,
        Image.open(file) as image,
    ):
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return image.convert("RGB")


def parse_record(line: str) -> ImageRecord | None:
    """A record from its JSON form, None when it is torn or foreign."""
    try:
        return TypeAdapter(ImageRecord).validate_json(line)
    except ValidationError:
        return None


def to_line(record: ImageRecord) -> str:
    """The record as a line of `images.jsonl`."""
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"
