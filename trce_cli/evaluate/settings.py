"""What is asked of a checkpoint and who looks, by all commands that judge."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from trce_cli.evaluate.detectors.registry import parse_threshold, usage
from trce_cli.settings import Count, Flag, NotNegative, Seed, Settings


class Asked(Settings):
    """What is asked and who looks."""

    suites: Annotated[tuple[str, ...], Flag(("--suite",), metavar="NAME[=FILE]")] = Field(
        (),
        description="explicit, implied, context, benign: only these of the built-in ones (none: none of "
        "them); NAME=FILE.csv: prompts of your own, in the columns that `trce generate` reads.",
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
    steps: Count | None = Field(None, description="Denoising steps: 50, `emoji` 25.")
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


class TuningSettings(Asked):
    """What `trce tune` asks of each trial."""

    count: Count = Field(48, description="Prompts a built-in suite, and at most so many of a file.")
    clip: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        None, description="CLIP model that tells what is kept, where no judge does: a folder or hub id."
    )
