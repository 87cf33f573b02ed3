"""A folder of images: PNGs that say how they were drawn, and `images.jsonl` beside them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from trce_cli.errors import BadInput
from trce_cli.images.grid import GRID
from trce_cli.images.record import ImageRecord, parse_record, read_image, to_line, write_image
from trce_cli.system.foreign import read_bytes, read_text
from trce_cli.system.paths import matching, real_path
from trce_cli.system.whole import appending, write_bytes, write_text

INDEX = "images.jsonl"
PICTURES = "images"  # where evaluations and tunings keep theirs, a folder a suite
SCORES = "scores"  # and what detectors say of them
MAX_INDEX = 1 << 30  # bytes
MAX_PICTURE = 1 << 28  # bytes


class ImageFolder:
    """A folder with the images of one run, which may be stopped at any point and taken up again.

    Every PNG holds its own record: an image counts as drawn when its file is whole and was drawn with these
    settings. `images.jsonl` grows by a line an image and is put right whenever a run begins or ends.
    Images of another run are refused with BadInput, or removed with `force`.
    """

    def __init__(self, path: Path, wanted: Sequence[ImageRecord], force: bool = False) -> None:
        self.path = path
        self.wanted = wanted
        self.drawn, strangers = look_into(path, wanted, force)
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
        add_picture(self.path, record, image)
        self.drawn.add(record.file)

    def take_over(self, other: Path) -> None:
        """Copy what is missing here from a folder in which the very same pictures were drawn."""
        for record in self.missing:
            if not (path := other / record.file).exists():
                continue
            try:
                stored = read_image(path)
            except ValueError:  # damaged
                continue
            if stored is not None and stored.difference(record) is None:
                write_bytes(self.path / record.file, read_bytes(path, MAX_PICTURE))
                self.drawn.add(record.file)

    def check_whole(self) -> None:
        """Raise BadInput where a picture is missing that shards were to draw."""
        if missing := self.missing:
            raise BadInput(
                f"{len(missing)} pictures of the shards are missing or damaged, such as {missing[0].file}.",
                "Start the shards again: each draws what is missing of its own; then merge.",
            )

    def write_index(self) -> None:
        """Write `images.jsonl` anew, in the order of the run."""
        lines = [to_line(record) for record in self.wanted if record.file in self.drawn]
        write_text(self.path / INDEX, "".join(lines))


def look_into(path: Path, wanted: Sequence[ImageRecord], force: bool = False) -> tuple[set[str], list[Path]]:
    """The files of the wanted images that are drawn in a folder, and those of another run's; writes nothing.

    Records without the hash of a checkpoint, as plans have them, are taken for any checkpoint's. Raises
    BadInput, unless `force` is given, where the folder holds what another run drew.
    """
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is no folder.", "Choose another --output.")
    drawn = {record.file for record in wanted if _is_drawn(path / record.file, record, force)}
    strangers = [path / name for name in _listed(path) - {record.file for record in wanted}]
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
    return drawn, strangers


def check_unmeasured(output: Path) -> None:
    """Raise BadInput where the folder is an output of `trce evaluate` or `trce tune`, or lies in one."""
    output = real_path(output)
    around = [folder for folder in output.parents if (folder / SCORES).is_dir()]
    for folder in (output, *[output.parent] * (output.name == PICTURES), *around):
        # Where pictures stand for themselves they have a grid.
        if any((one / INDEX).exists() and not (one / GRID).exists() for one in matching(folder / PICTURES)):
            raise BadInput(
                f"{folder} holds the pictures of an evaluation or a tuning; others are not mixed into it.",
                "Choose another --output.",
            )


def _is_drawn(path: Path, record: ImageRecord, force: bool) -> bool:
    if not path.exists():
        return False
    try:
        stored = read_image(path)
    except ValueError:  # damaged: drawn anew
        return False
    if stored is not None and not record.checkpoint_sha256:
        stored = replace(stored, checkpoint_sha256="")
    how = "by something else" if stored is None else stored.difference(record)
    if how and not force:
        raise BadInput(
            f"{path} was drawn {how}.",
            "To resume take the same settings; else choose another --output, or replace it with --force.",
        )
    return how is None


def _listed(folder: Path) -> set[str]:
    """The files of the folder that its `images.jsonl` lists."""
    index = folder / INDEX
    if not index.exists():
        return set()
    lines = read_text(index, MAX_INDEX, errors="replace").split("\n")  # prompts may hold others
    names = {record.file for line in lines if (record := parse_record(line))}
    return {name for name in names if re.fullmatch(r"[\w-]+\.png", name) and (folder / name).exists()}


def add_picture(folder: Path, record: ImageRecord, image: Image.Image) -> None:
    """Write one picture of a run to its folder, then its line."""
    write_image(folder, image, record)
    with appending(folder / INDEX) as index:
        index.write(to_line(record))
