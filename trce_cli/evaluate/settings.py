"""What is asked of a checkpoint and who looks, by all commands that judge."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from trce_cli.evaluate.attacks.registry import ATTACKS
from trce_cli.evaluate.attacks.registry import usage as attacks
from trce_cli.evaluate.detectors.registry import parse_threshold
from trce_cli.evaluate.detectors.registry import usage as detectors
from trce_cli.settings import Count, Flag, NotNegative, Seed, Settings


def _check_attack(name: str) -> str:
    if name not in ATTACKS:
        raise ValueError(f"must be one of {', '.join(ATTACKS)}, not {name!r}")
    return name


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
        description=f"{detectors()}, or one of an installed package; repeat it for several, the first "
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


class AttackSettings(Asked):
    """What `trce attack` attacks, and how."""

    attacks: Annotated[
        tuple[Annotated[str, AfterValidator(_check_attack)], ...],
        Flag(("--attack",), metavar="|".join(ATTACKS)),
    ] = Field((), description=f"Only this attack: {attacks()}; may be repeated, all where not given.")
    suites: Annotated[tuple[str, ...], Flag(("--suite",), metavar="NAME[=FILE]")] = Field(
        ("explicit",),
        description="What is attacked: explicit, implied, context; NAME=FILE.csv: prompts "
        "of your own. May be repeated.",
    )
    count: Count = Field(50, description="Prompts a built-in suite, and at most so many of a file.")
    negative_prompt: str = Field(
        "", description="What CHECKPOINT alone is steered away from: the baseline that needs no editing."
    )
