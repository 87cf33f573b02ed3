"""What is to be drawn: every picture's settings, from prompts, what users say and what checkpoints say."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from trce_cli.checkpoint.bases import public_name
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.errors import BadInput
from trce_cli.families.base import Canvas
from trce_cli.images.record import PIXEL_FIELDS, ImageRecord
from trce_cli.images.schedulers import own_scheduler, scheduler_name
from trce_cli.images.settings import DrawSettings
from trce_cli.prompts.files import Prompt
from trce_cli.settings import MAX_SEED
from trce_cli.system.paths import as_text
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import hash_file
from trce_cli.system.shards import digest

MAX_PICTURES = 250_000  # of a run; each is planned before the first is drawn
ROW_CELL = 1000  # characters; longer cells of a prompt's row (a picture, say) are not recorded


def plan_images(
    prompts: Sequence[Prompt],
    checkpoints: Mapping[str, Checkpoint],
    settings: DrawSettings,
) -> list[ImageRecord]:
    """What to draw: every prompt with `images_per_prompt` seeds, counted up from its own, by all checkpoints.

    `checkpoints` are keyed by role; the last one gives the defaults, so that all draw with the same settings.
    Reads configs only and leaves dtype and hash for `identify`. Raises BadInput for settings that one of the
    checkpoints cannot draw.
    """
    if not prompts:
        raise BadInput("There is no prompt.", "Give prompts as arguments, or a file with --prompts.")
    check(settings, prompts)
    if (count := len(prompts) * settings.images_per_prompt * len(checkpoints)) > MAX_PICTURES:
        raise BadInput(
            f"These are {count:,} pictures; a run draws at most {MAX_PICTURES:,}.", "Take fewer: --limit."
        )
    canvases = {role: one.family.canvas(one) for role, one in checkpoints.items()}
    last, own = list(checkpoints.values())[-1], list(canvases.values())[-1]
    scheduler = own_scheduler(last)
    if settings.scheduler is not None:
        scheduler = scheduler_name(settings.scheduler, last.family.schedulers)
    records = []
    for index, prompt in enumerate(prompts, start=1):
        width = first(settings.width, prompt.width, own.width)
        height = first(settings.height, prompt.height, own.height)
        guidance = first(settings.guidance_scale, prompt.guidance, last.family.defaults.guidance)
        for role, canvas in canvases.items():
            check_canvas(canvas, width, height, settings.steps, f"Prompt {index}", checkpoints[role].name)
            check_clip_skip(canvas, settings.clip_skip, checkpoints[role].name)
        for offset in range(settings.images_per_prompt):
            seed = (first(settings.seed, prompt.seed, 0) + offset) & MAX_SEED
            for role, checkpoint in checkpoints.items():
                suffix = "" if len(checkpoints) == 1 else f"-{role}"
                record = ImageRecord(
                    file=f"{index:04d}-seed{seed}{suffix}.png",
                    index=index,
                    role=role,
                    prompt=prompt.text,
                    seed=seed,
                    steps=settings.steps,
                    guidance_scale=float(guidance),
                    scheduler=scheduler,
                    width=width,
                    height=height,
                    dtype="",
                    checkpoint=public_name(checkpoint.name),
                    checkpoint_sha256="",
                    negative_prompt=settings.negative_prompt,
                    clip_skip=settings.clip_skip,
                    row={name: cell for name, cell in prompt.row.items() if len(cell) <= ROW_CELL},
                )
                records.append(record)
    return records


def identify(
    records: Sequence[ImageRecord],
    checkpoints: Mapping[str, Checkpoint],
    dtype: str,
    report: Report = no_report,
) -> list[ImageRecord]:
    """The plan with dtype and checkpoint hashes; `report` is called after each of the files that are read."""
    hashes = {role: checkpoint_hash(checkpoint, report) for role, checkpoint in checkpoints.items()}
    return [replace(record, dtype=dtype, checkpoint_sha256=hashes[record.role]) for record in records]


def identity(records: Iterable[ImageRecord]) -> dict[str, str]:
    """Digests of what pictures are drawn from, by what a user gives: checkpoints, prompts, settings."""
    named = ("file", "prompt", "seed")
    others = [name for name in PIXEL_FIELDS if name not in (*named, "checkpoint_sha256")]
    told = [
        (
            [record.role, record.checkpoint_sha256],
            [getattr(record, name) for name in named],
            [record.role, *(getattr(record, name) for name in others)],
        )
        for record in records
    ]
    names = ("checkpoints", "prompts or seeds", "settings")
    columns = zip(*told, strict=True)
    return {
        name: digest(list({json.dumps(value): value for value in column}.values()))
        for name, column in zip(names, columns, strict=True)
    }


def check(settings: DrawSettings, prompts: Sequence[Prompt]) -> None:
    """Raise BadInput for prompts and values that no checkpoint can draw with."""
    for text in (settings.negative_prompt, *(prompt.text for prompt in prompts)):
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text in its encoding
            raise BadInput(f"The prompt {text[:60]!r} is no valid Unicode.", "Give it as UTF-8.") from None


def check_canvas(canvas: Canvas, width: int, height: int, steps: int, who: str, checkpoint: str) -> None:
    """Raise BadInput where the checkpoint cannot draw this size in so many steps."""
    for side, pixels in (("width", width), ("height", height)):
        if pixels < 1 or pixels % canvas.multiple:
            raise BadInput(
                f"{who} has a {side} of {pixels}; {checkpoint} draws multiples of {canvas.multiple}.",
                f"Its own size is {canvas.width}x{canvas.height}; see --width and --height.",
            )
    if not 1 <= steps <= canvas.max_steps:
        raise BadInput(f"{checkpoint} draws in 1 to {canvas.max_steps} steps, not in {steps}.")


def check_clip_skip(canvas: Canvas, clip_skip: int, checkpoint: str) -> None:
    """Raise BadInput where the checkpoint's text encoder cannot be read at that layer."""
    if clip_skip > canvas.max_clip_skip:
        most = canvas.max_clip_skip
        raise BadInput(
            f"{checkpoint} cannot be drawn with a clip skip of {clip_skip}.",
            f"Its text encoder has {most} layers." if most > 1 else "It reads its text at one layer alone.",
        )


def checkpoint_hash(checkpoint: Checkpoint, report: Report = no_report) -> str:
    """SHA-256 in hex over the names and hashes of the files that a picture depends on."""
    return hash_of(picture_files(checkpoint, report))


def picture_files(checkpoint: Checkpoint, report: Report = no_report) -> dict[str, str]:
    """The SHA-256 in hex of each file that a picture depends on, by name; `report` is called after each.

    TrceError where a file is no longer the one that was opened.
    """
    hashes = {}
    for name, path in sorted(checkpoint.drawn_from().items()):
        hashes[as_text(name)] = hash_file(path)
        report(1)
    checkpoint.check_unchanged()
    return hashes


def hash_of(files: Mapping[str, str]) -> str:
    """SHA-256 in hex over names and hashes of files."""
    return sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
