"""What is asked of a checkpoint and who looks, by all commands that judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trce_cli.erase.settings import MapSettings, choose_map_settings
from trce_cli.evaluate.choice import grid, parse_range
from trce_cli.evaluate.detectors.registry import parse_threshold, usage
from trce_cli.evaluate.gates import Gate, parse_gate
from trce_cli.families.base import Family
from trce_cli.families.slots import slot_weights
from trce_cli.images.settings import CLIP_SKIP
from trce_cli.prompts.presets import Preset
from trce_cli.prompts.settings import parse_token_weights
from trce_cli.settings import Count, Flag, NotNegative, Seed, Settings


class Asked(Settings):
    """What is asked and who looks."""

    suites: Annotated[tuple[str, ...], Flag(("--suite",), metavar="NAME[=FILE]")] = Field(
        (),
        description="explicit, implied, context, benign, bystanders: only these of the built-in ones "
        "(none: none of them); NAME=FILE.csv: prompts of your own, in the columns that `trce generate` "
        "reads.",
    )
    count: Count | None = Field(
        None, description="Prompts a built-in suite, 200 where not given, and at most so many of a file."
    )
    detectors: Annotated[tuple[str, ...], Flag(("--detector",), metavar="NAME[:MODEL]")] = Field(
        (),
        description=f"{usage()}, or one of an installed package; repeat it for several, the first "
        "gives the headline figures.",
    )
    thresholds: Annotated[
        tuple[tuple[str | None, float], ...],
        Flag(("--threshold",), metavar="[NAME=]SCORE", parse=parse_threshold),
    ] = Field(
        (),
        description="From which score on a detector's label counts, instead of its customary ones; "
        "repeat it to report several side by side.",
    )
    seed: Seed = 0
    steps: Count | None = Field(None, description="Denoising steps: 50, `emoji` 25, `emoji-dit` 16.")
    guidance_scale: NotNegative | None = Field(
        None,
        description="Classifier-free guidance, instead of a file's own or the checkpoint's usual one.",
    )
    scheduler: str | None = Field(None, description="As for `trce generate`; else CHECKPOINT's.")

    def evaluation(self) -> "EvaluationSettings":
        """What of these is asked of pictures; all else is left to its default."""
        asked = {name: value for name, value in self if name in EvaluationSettings.model_fields}
        return EvaluationSettings(**asked)


class EvaluationSettings(Asked):
    """What `trce evaluate` asks."""

    negative_prompt: str = Field(
        "", description="What CHECKPOINT alone is steered away from: the baseline that needs no editing."
    )
    clip_skip: Count = Field(1, description=CLIP_SKIP)
    real: Annotated[Path | None, Flag(metavar="DIR")] = Field(
        None, description="Real images, to which benign suites and your own are compared too."
    )
    clip: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        None, description="CLIP model for CLIP scores and features: a folder or hub id."
    )
    inception: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        None,
        description="FID's Inception weights, for Fréchet distances as papers give them (extra `fid`).",
    )
    reuse: Annotated[Path | None, Flag(metavar="DIR")] = Field(
        None, description="Another evaluation's output, whose equal pictures are copied instead of drawn."
    )


class Checks(Settings):
    """What an evaluation is held to, and what it is put beside."""

    gates: Annotated[tuple[Gate, ...], Flag(("--gate",), metavar="FIGURE<=NUMBER", parse=parse_gate)] = Field(
        (),
        description="Exit with 1 unless it is met, as in asr.implied<=0.05 or benign.kept>=0.95; of a 95 % "
        "interval's end asr.implied.high<=0.05. May be repeated.",
    )
    compared: Annotated[tuple[Path, ...], Flag(("--compare",), metavar="RESULTS.json")] = Field(
        (), description="Results of other evaluations, for one table and one plot; may be repeated."
    )
    card: bool = Field(
        False,
        description="Write figures, pictures and what still gets through into CHECKPOINT's own model card.",
    )


class Tried(Settings):
    """Which settings of stage 1 `trce tune` tries."""

    preserve: Annotated[str, Flag(metavar="LOW..HIGH")] = Field(
        "1e-3..10", description="Range of lambda, spread in equal ratios; or one value."
    )
    token_weights: Annotated[
        tuple[Any, ...], Flag(metavar="W,W,...|SLOT=W,...", parse=parse_token_weights)
    ] = Field(
        (),
        description="Weights of the tokens that are mapped; repeat it to try several; else the presets', "
        "else the family's.",
    )
    trials: Count | None = Field(
        None, description="Settings to try in all, spread evenly over the token weights; else 8 of each."
    )

    def settings(self, presets: Sequence[Preset], family: Family) -> list[MapSettings]:
        """The settings of every trial; what is not tried is what the presets recommend.

        Raises BadInput for what is no range, and for weights that the family has no slots for.
        """
        low, high = parse_range(self.preserve)
        usual, _ = choose_map_settings({}, presets, family)
        given = self.token_weights or (usual.token_weights,)
        slots = [tuple(slot_weights(family, each).values()) for each in given]
        return [
            usual.model_copy(update={"preserve": preserve, "token_weights": weights})
            for preserve, weights in grid(low, high, slots, self.trials)
        ]


class TuningSettings(Asked):
    """What `trce tune` asks of each trial."""

    count: Count = Field(48, description="Prompts a built-in suite, and at most so many of a file.")
    clip: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        None, description="CLIP model that tells what is kept, where no judge does: a folder or hub id."
    )
