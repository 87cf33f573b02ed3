"""The plan of stage 1, made before anything heavy is loaded."""

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.families.slots import slot_weights
from trce_cli.prompts.pairs import PromptPair, with_compounds
from trce_cli.system.paths import existing

# What Python, torch, the tokenizers, activations and one layer of a text encoder take, measured in bytes.
OVERHEAD: Final = 400 << 20
MATRICES: Final = 10  # of float64 as large as the map that are in memory at a time


def plan(
    checkpoint: Checkpoint, output: Path, pairs: Sequence[PromptPair], prior: Prior, settings: MapSettings
) -> dict[str, Any]:
    """What solving and writing will do and take: layers with shapes, prompts, memory and disk in bytes.

    BadInput for a clip skip that the checkpoint is not read with.
    """
    if settings.clip_skip > 1:
        import torch  # a plan does without it

        checkpoint.family.skipped_text(checkpoint, "cpu", torch.float32, settings.clip_skip)
    doors, pairs = checkpoint.door_weights(), with_compounds(pairs, settings.compounds)
    streams = settings.streams(checkpoint.family)
    return {
        "family": checkpoint.family.name,
        "weights": [copy.label for copy in checkpoint.denoiser],
        "layers": {
            key: list(checkpoint.shape("denoiser", key)) for stream in streams for key in doors[stream]
        },
        "pairs": len(pairs),
        "distinct_prompts": len(distinct_prompts(pairs)),
        "prior": prior.source,
        "captions": len(prior.captions),
        "canaries": len(prior.canaries),
        "preserve": settings.preserve,
        "word_share": settings.word_share,
        "word_prompts": settings.words_asked,
        "ridge": settings.ridge,
        "token_weights": list(slot_weights(checkpoint.family, settings.token_weights).values()),
        "strength": settings.strength,
        "deflate": settings.deflate,
        "compounds": settings.compounds,
        "clip_skip": settings.clip_skip,
        "memory_bytes": _memory(checkpoint),
        "disk_bytes": checkpoint.total_bytes(),
        "free_disk_bytes": shutil.disk_usage(existing(output)).free,
    }


def distinct_prompts(pairs: Iterable[PromptPair]) -> set[str]:
    """Every prompt of the pairs once."""
    return {prompt for pair in pairs for prompt in (pair.unsafe, pair.safe)}


def _memory(checkpoint: Checkpoint) -> int:
    """About the most memory in bytes that `trce map` needs: text encoders are read a layer at a time."""
    matrices = 8 * MATRICES * sum(width**2 for width in checkpoint.widths.values())
    text = checkpoint.family.text_weights(checkpoint.config)
    largest = max(math.prod(shape) for shapes in text.values() for shape in shapes.values())
    return OVERHEAD + matrices + 4 * largest
