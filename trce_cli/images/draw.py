"""Seeded images: each depends only on its checkpoint, prompt, seed and settings, never on its batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.errors import TrceError, refusing_library
from trce_cli.families.base import Family
from trce_cli.images.folder import add_picture
from trce_cli.images.record import ImageRecord
from trce_cli.system.memory import free

if TYPE_CHECKING:  # a wrong setting is refused before it is imported
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline


def default_dtype(device: "torch.device") -> str:
    """float16 on CUDA, as published checkpoints are run there, else float32."""
    return "float16" if device.type == "cuda" else "float32"


def draw(
    family: Family, pipeline: "DiffusionPipeline", records: Iterable[ImageRecord]
) -> Iterator[tuple[ImageRecord, Image.Image]]:
    """Draw the records one by one, and yield each with its image.

    Never several at once: libraries choose their kernels by the size of a batch, and another kernel rounds in
    another way, so that an image would depend on what was drawn beside it. Every image has a CPU generator of
    its own, from which its latents are drawn in float32 and then whatever noise its scheduler asks for.
    Raises TrceError when an image is not finite, as fp16 overflow makes it.
    """
    import torch

    for record in records:
        pipeline.scheduler = family.scheduler(pipeline, record.scheduler)
        with refusing_library(f"{record.file} ({record.prompt[:60]!r}) cannot be drawn"):
            (picture,) = family.draw(
                pipeline,
                [record.prompt],
                [record.negative_prompt] if record.negative_prompt else None,
                [torch.Generator("cpu").manual_seed(record.seed)],
                steps=record.steps,
                guidance_scale=record.guidance_scale,
                width=record.width,
                height=record.height,
                clip_skip=record.clip_skip,
            )
        yield record, finished(record, picture)


def redraw(
    family: Family,
    pipeline: "DiffusionPipeline",
    record: ImageRecord,
    picture: Image.Image,
    mask: Image.Image | None,
    strength: float,
    prompt: str,
) -> Image.Image:
    """Draw a record from a picture in place of noise, under a prompt that need not be its own.

    See `families.base.Redraw`, which the family has to have. The noise comes from the record's seed. Raises
    TrceError as `draw` does.
    """
    import torch

    assert family.redraw is not None, f"{family.name} draws from no pictures"
    pipeline.scheduler = family.scheduler(pipeline, record.scheduler)
    with refusing_library(f"{record.file} ({record.prompt[:60]!r}) cannot be drawn"):
        found = family.redraw(
            pipeline,
            prompt,
            record.negative_prompt or None,
            torch.Generator("cpu").manual_seed(record.seed),
            picture,
            mask,
            strength=strength,
            steps=record.steps,
            guidance_scale=record.guidance_scale,
            clip_skip=record.clip_skip,
        )
    return finished(record, found)


def finished(record: ImageRecord, picture: "np.ndarray") -> Image.Image:
    """The image of values within [0, 1]; TrceError where they are not finite."""
    import numpy as np

    if not np.isfinite(picture).all():
        fix = "The weights may be damaged; try another checkpoint."
        if record.dtype != "float32":
            fix = f"{record.dtype} may be too coarse here: try --dtype fp32, with another --output."
        raise TrceError(f"{record.file} ({record.prompt[:60]!r}) came out as NaN or infinity.", fix)
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def draw_records(
    checkpoints: Mapping[str, Checkpoint],
    folder: Path,
    records: Sequence[ImageRecord],
    device: "torch.device",
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[ImageRecord, Image.Image]]:
    """Draw and write pictures to a folder, one role and pipeline after the other, and yield each."""
    import torch

    for role, checkpoint in checkpoints.items():
        missing = [record for record in records if record.role == role]
        if not missing:
            continue
        family = checkpoint.family
        for remark in checkpoint.remarks:
            note(remark)
        pipeline = checkpoint.pipe(device, getattr(torch, missing[0].dtype))
        for cut in checkpoint.cut([record.prompt for record in missing]):
            note(cut)
        for record, image in draw(family, pipeline, missing):
            add_picture(folder, record, image)
            yield record, image
        del pipeline
        free(device)


def is_flat(image: Image.Image) -> bool:
    """Whether every pixel has the same colour, which hints at a broken checkpoint or dtype."""
    return image.getcolors(1) is not None
