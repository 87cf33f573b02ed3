"""The settings of stage 1 and the plan they make, checked before anything heavy is loaded."""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.erase.prior import Prior
from trce_cli.errors import BadInput
from trce_cli.families.clip.tokens import SLOTS
from trce_cli.prompts.pairs import PromptPair
from trce_cli.prompts.presets import MapSettings, Preset, joint_map_settings
from trce_cli.system.paths import existing

# What Python, torch, the tokenizers, activations and one layer of a text encoder take, measured in bytes.
OVERHEAD: Final = 400 << 20
MATRICES: Final = 10  # of float64 as large as the map that are in memory at a time


@dataclass(frozen=True)
class Settings:
    """How to solve stage 1.

    preserve: lambda. token_weights: w in the order of `SLOTS`. strength: s in M_s = I + s (M - I), 1 is the
    full edit. pooled: whether SDXL's pooled embedding is mapped as well; other families have none. Raises
    BadInput unless all numbers are finite and at least 0, with a token weight above 0.
    """

    preserve: float = 1.0  # a benign caption counts as much as a prompt pair
    token_weights: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)  # the paper's: only the first EoT
    strength: float = 1.0
    pooled: bool = True

    def __post_init__(self) -> None:
        for name, numbers in (
            ("preserve", (self.preserve,)),
            ("token weights", self.token_weights),
            ("strength", (self.strength,)),
        ):
            for number in numbers:
                if not (math.isfinite(number) and number >= 0):
                    raise BadInput(f"The {name} must be finite and at least 0, not {number:g}.")
        if len(self.token_weights) != len(SLOTS) or not any(self.token_weights):
            raise BadInput(
                f"The token weights {self.token_weights} are not {len(SLOTS)} numbers that are not all 0.",
                f"They are {','.join(SLOTS)}, for example 0,1,0,0.",
            )


def choose_settings(given: Mapping[str, Any], presets: Sequence[Preset]) -> tuple[Settings, list[str]]:
    """What the user gave (None: not given), else what the presets recommend, else the defaults.

    Also returns a sentence for each setting on which the presets' recommendations differ.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = Settings(**joint_map_settings(presets).model_dump(exclude_none=True) | chosen)
    remarks = []
    for name in MapSettings.model_fields.keys() - chosen:
        advice: dict[Any, str] = {}  # value -> the first that recommends it
        for part in (part for preset in presets for part in preset.walk()):
            if (value := getattr(part.map, name)) is not None:
                advice.setdefault(value, part.name)
        if len(advice) > 1:
            each = ", ".join(f"{value} by {preset}" for value, preset in advice.items())
            option = "--" + name.replace("_", "-")
            remarks.append(f"Of {name}, {each} is recommended; {getattr(settings, name)} is used ({option}).")
    return settings, sorted(remarks)


def plan(
    checkpoint: Checkpoint, output: Path, pairs: Sequence[PromptPair], prior: Prior, settings: Settings
) -> dict[str, Any]:
    """What solving and writing will do and take: layers with shapes, prompts, memory and disk in bytes."""
    doors = checkpoint.door_weights()
    streams = doors if settings.pooled else checkpoint.family.streams[:1]
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
        "token_weights": list(settings.token_weights),
        "strength": settings.strength,
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
