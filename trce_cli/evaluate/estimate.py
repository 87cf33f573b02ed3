"""What an evaluation will take, told before, by drawing and judging a picture on trial."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.survivals.run import AFTER, chosen
from trce_cli.evaluate.survivals.settings import SurvivalSettings
from trce_cli.images.estimate import Places, missing, pace, plan_drawing
from trce_cli.images.plan import plan_images
from trce_cli.images.record import ImageRecord

if TYPE_CHECKING:
    import torch


def places(evaluation: Evaluation, after: SurvivalSettings, output: Path) -> Places:
    """What is drawn where: by both checkpoints, then in each state of a treatment."""
    suites: Mapping[str, Sequence[ImageRecord]] = {
        suite.name: plan_images(suite.prompts, evaluation.checkpoints, evaluation.settings)
        for suite in evaluation.suites
    }
    found = [(output / "images" / name, records) for name, records in suites.items()]
    for treatment in chosen(after):
        for state in treatment.states(evaluation):
            for name, records in suites.items():
                erased = [record for record in records if record.role == "erased"][: after.after_count]
                found.append((output / AFTER / state.name / name, erased))
    return found


def plan_evaluation(evaluation: Evaluation, where: Places, dtype: str) -> dict[str, Any]:
    """How many pictures are asked for and who looks; see `plan_drawing` for the rest."""
    return {
        "suites": [suite.name for suite in evaluation.suites],
        "detectors": [detector.name for detector in evaluation.detectors],
        **plan_drawing(evaluation.checkpoints, where, dtype),
    }


def evaluation_seconds(evaluation: Evaluation, where: Places, device: "torch.device", dtype: str) -> float:
    """About how long it takes to draw what is missing and to look at all of it."""
    import numpy as np

    every = [record for _, records in where for record in records]
    lacking = list(missing(where))
    drawn = pace(evaluation.erased, every[0], device, dtype)
    begun = monotonic()
    for detector in evaluation.detectors:
        detector.scores(np.array(drawn.sample)[None])
    return drawn.seconds(lacking) + (monotonic() - begun) * len(every)
