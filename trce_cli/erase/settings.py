"""The settings of both stages: what the user gave, else what the presets recommend, else the defaults."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from trce_cli.erase.map_verdict import MAX_COLLATERAL
from trce_cli.errors import BadInput
from trce_cli.families.base import Family
from trce_cli.families.slots import slot_weights
from trce_cli.prompts.presets import Preset, every_part, recommended
from trce_cli.prompts.settings import MapTable, TrainingTable, TrajectoryTable
from trce_cli.settings import Flag, NotNegative, Seed, Settings, Tracking, option_name

LORA_LR: Final = 1e-4  # of diffusers' training scripts for LoRAs


class MapSettings(MapTable):
    """How to solve stage 1.

    preserve: lambda. word_share: of the words in P; word_prompts: in how many prompts they stand at most.
    ridge: r as a share of the mean eigenvalue. token_weights: w in the order of the family's slots, or by
    their names; None: the family's. strength: s in M_s = I + s (M - I), 1 is the full edit. deflate: what of
    M_s is taken away, see `LinearMap.deflated`; 0: nothing. compounds: see `pairs.with_compounds`. clip_skip:
    the highest that is solved for. without: further streams that are left alone.
    """

    without: tuple[str, ...] = ()

    def streams(self, family: Family) -> tuple[str, ...]:
        """Which of the family's streams are mapped, the main one first."""
        return tuple(stream for stream in family.streams if stream not in self.without)

    def resolved(self, family: Family) -> dict[str, Any]:
        """The settings as they are recorded: of each further stream whether it is mapped."""
        mapped = {stream: stream not in self.without for stream in family.streams[1:]}
        return self.model_dump(exclude={"without"}) | mapped

    @property
    def words_asked(self) -> int:
        """In how many prompts words are preserved: in none where they have no share."""
        return self.word_prompts if self.word_share else 0


class Guarding(Settings):
    """What an edit may do to what is not to be erased."""

    max_collateral: NotNegative = Field(
        MAX_COLLATERAL,
        description="Largest change of what harmless captions and words give that is written, as a share of "
        "their size.",
    )


class Recipe(TrajectoryTable):
    """How the set of trajectories is made."""

    seed: Seed = 0


class Training(TrainingTable):
    """How to train; `batch_size` is summed over the processes.

    The loop ends after `epochs` passes over the unsafe states or after `max_steps`, whichever comes first.
    """

    seed: Seed = 0
    lora_rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        examples=[16],
        description="Train a LoRA of this rank in place of the weights themselves, which stay frozen: far "
        "less memory. The learning rate is then 1e-4 unless it is given.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Precision of frozen weights and the computation; what is trained is kept in fp32."
    )

    def steps_over(self, states: int) -> int:
        """The number of optimisation steps over this many unsafe states."""
        limits = [self.max_steps] if self.max_steps is not None else []
        limits += [math.ceil(self.epochs * states / self.batch_size)] if self.epochs is not None else []
        return min(limits)


class SteerSettings(Training, Recipe):
    """All settings of stage 2."""


class Running(Tracking):
    """How a run of stage 2 goes about it, and what it may write."""

    gradient_checkpointing: bool = Field(False, description="Less memory, half as much time again.")
    trajectories: Annotated[Path | None, Flag(metavar="DIR")] = Field(
        None,
        description="Where the prepared set is kept, to be used again; else beside the output until the end.",
    )
    max_drift: Annotated[float, Field(ge=0)] = Field(
        0.2,
        description="Largest change of unconditional and benign predictions that is saved, as a share of "
        "their size.",
    )

    def arguments(self) -> dict[str, Any]:
        """What `steer` is told of these."""
        return {name: value for name, value in self if name != "log_with"}


def choose_map_settings(
    given: Mapping[str, Any], presets: Sequence[Preset], family: Family
) -> tuple[MapSettings, list[str]]:
    """What the user gave (None: not given), else what the presets recommend, else the defaults.

    Token weights come out in the order of the family's slots. What a preset recommends with token weights for
    other slots is left aside, all of it, since its numbers were chosen with those. Also returns a sentence
    for each setting on which the presets' recommendations differ. Raises BadInput for numbers that make no
    sense.
    """
    chosen = _without_none(given)
    parts = [part for part in every_part(presets) if _are_slots(family, part.map.token_weights)]
    default = _without_none({"preserve": family.defaults.preserve})
    settings = MapSettings.of(default | recommended(parts, "map") | chosen, option_name)
    weights = tuple(slot_weights(family, settings.token_weights).values())
    settings = settings.model_copy(update={"token_weights": weights})
    remarks = []
    for name in MapTable.model_fields.keys() - chosen:
        found: dict[str, str] = {}  # value -> the first that recommends it
        for part in parts:
            if name in part.map.model_fields_set:
                found.setdefault(str(getattr(part.map, name)), part.name)
        if len(found) > 1:
            each = ", ".join(f"{value} by {preset}" for value, preset in found.items())
            used = f"{getattr(settings, name)} is used ({option_name(name)})"
            remarks.append(f"Of {name}, {each} is recommended; {used}.")
    return settings, sorted(remarks)


def choose_steer_settings(given: Mapping[str, Any], advice: Mapping[str, Any]) -> tuple[Recipe, Training]:
    """What the user gave (None: not given), else what the presets recommend, else the defaults.

    A recommendation that hangs on a setting the user changed is dropped: early steps on the number of steps,
    epochs and maximal steps on each other, the learning rate on whether a LoRA is trained. Raises BadInput
    for numbers that make no sense.
    """
    chosen, kept = _without_none(given), dict(advice)
    for name, other in (
        ("steps", "early_steps"),
        ("epochs", "max_steps"),
        ("max_steps", "epochs"),
        ("lora_rank", "lr"),
    ):
        if name in chosen:
            kept.pop(other, None)
    settings = kept | chosen
    if "lora_rank" in chosen:
        settings.setdefault("lr", LORA_LR)
    if "max_steps" in settings:
        settings.setdefault("epochs", None)
    resolved = dict(SteerSettings.of(settings, option_name))
    return (
        Recipe(**{name: resolved[name] for name in Recipe.model_fields}),
        Training(**{name: resolved[name] for name in Training.model_fields}),
    )


def _are_slots(family: Family, weights: Any) -> bool:
    """Whether recommended token weights are for this family's slots."""
    try:
        slot_weights(family, weights)
    except BadInput:
        return False
    return True


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
