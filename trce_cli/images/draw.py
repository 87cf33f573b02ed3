"""Seeded images: each depends only on its checkpoint, prompt, seed and settings, never on its batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.errors import TrceError
from trce_cli.families.base import Family
from trce_cli.images.folder import ImageFolder
from trce_cli.images.record import ImageRecord
from trce_cli.system.memory import free

if TYPE_CHECKING:  # a wrong setting is refused before it is imported
    import torch
    from diffusers import DiffusionPipeline


def default_dtype(device: "torch.device") -> str:
    """float16 on CUDA, as published checkpoints are run there, else float32."""
    return "float16" if device.type == "cuda" else "float32"


def draw(
    family: Family, pipeline: "DiffusionPipeline", records: Sequence[ImageRecord], batch_size: int
) -> Iterator[tuple[ImageRecord, Image.Image]]:
    """Draw the records, those with equal settings in batches, and yield each with its image.

    Every image has a CPU generator of its own, from which its latents are drawn in float32 and then whatever
    noise its scheduler asks for. Raises TrceError when an image is not finite, as fp16 overflow makes it.
    """
    batches: dict[tuple[Any, ...], list[ImageRecord]] = {}
    for record in records:
        key = (record.scheduler, record.steps, record.guidance_scale, record.width, record.height)
        batches.setdefault((*key, bool(record.negative_prompt)), []).append(record)
    for alike in batches.values():
        pipeline.scheduler = family.scheduler(pipeline, alike[0].scheduler)
        for start in range(0, len(alike), batch_size):
            yield from draw_batch(family, pipeline, alike[start : start + batch_size])


def draw_batch(
    family: Family, pipeline: "DiffusionPipeline", records: Sequence[ImageRecord]
) -> list[tuple[ImageRecord, Image.Image]]:
    """Draw records of equal settings at once; see `draw`."""
    import numpy as np
    import torch

    head = records[0]
    pictures = family.draw(
        pipeline,
        [record.prompt for record in records],
        [record.negative_prompt for record in records] if head.negative_prompt else None,
        [torch.Generator("cpu").manual_seed(record.seed) for record in records],
        steps=head.steps,
        guidance_scale=head.guidance_scale,
        width=head.width,
        height=head.height,
    )
    drawn = []
    for record, picture in zip(records, pictures, strict=True):
        if not np.isfinite(picture).all():
            fix = "The weights may be damaged; try another checkpoint."
            if record.dtype != "float32":
                fix = f"{record.dtype} may be too coarse here: try --dtype fp32, with another --output."
            raise TrceError(f"{record.file} ({record.prompt[:60]!r}) came out as NaN or infinity.", fix)
        drawn.append((record, Image.fromarray((picture * 255).round().astype(np.uint8))))
    return drawn


def draw_missing(
    checkpoints: Mapping[str, Checkpoint],
    folder: ImageFolder,
    device: "torch.device",
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[ImageRecord, Image.Image]]:
    """Draw and write the folder's missing images, one role and pipeline after the other, and yield each."""
    import torch

    for role, checkpoint in checkpoints.items():
        missing = [record for record in folder.missing if record.role == role]
        if not missing:
            continue
        family = checkpoint.family
        pipeline = checkpoint.pipe(device, getattr(torch, missing[0].dtype))
        limit, cut = family.truncated(checkpoint, [record.prompt for record in missing])
        if cut:
            note(
                f"{checkpoint.name} reads {limit} tokens; {cut} of {len(missing)} prompts are longer and cut."
            )
        for record, image in draw(family, pipeline, missing, batch_size):
            folder.add(record, image)
            yield record, image
        del pipeline
        free(device)
    folder.write_index()


def is_flat(image: Image.Image) -> bool:
    """Whether every pixel has the same colour, which hints at a broken checkpoint or dtype."""
    return image.getcolors(1) is not None
