"""What an evaluation will take, told before, by drawing and judging a picture on trial."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from trce_cli.erase.estimate import BACKWARD, GUIDED
from trce_cli.erase.moments import seconds_each
from trce_cli.evaluate.attacks.registry import ATTACKS
from trce_cli.evaluate.question import Evaluation
from trce_cli.evaluate.survivals.run import AFTER, chosen
from trce_cli.evaluate.survivals.settings import SurvivalSettings
from trce_cli.images.estimate import Places, missing, pace, plan_drawing
from trce_cli.images.folder import PICTURES
from trce_cli.images.plan import plan_images
from trce_cli.images.record import ImageRecord

if TYPE_CHECKING:
    import torch
    from PIL import Image

_SPENT = ("gradients", "encodings", "pictures")


def places(evaluation: Evaluation, after: SurvivalSettings, output: Path) -> Places:
    """What is drawn where: by both checkpoints, then in each state of a treatment."""
    suites: Mapping[str, Sequence[ImageRecord]] = {
        suite.name: plan_images(suite.prompts, evaluation.checkpoints, evaluation.settings)
        for suite in evaluation.suites
    }
    found = [(output / PICTURES / name, records) for name, records in suites.items()]
    for treatment in chosen(after):
        for state in treatment.states(evaluation):
            for name, records in suites.items():
                erased = [record for record in records if record.role == "erased"][: after.after_count]
                found.append((output / AFTER / state.name / name, erased))
    return found


def plan_attack(evaluation: Evaluation, budgets: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """How many prompts are attacked, and what each attack may spend on all of them; nothing goes to disk but
    the suite and what is taken up again."""
    records = _attacked(evaluation)
    told = plan_drawing(evaluation.checkpoints, [(Path(), records)], dtype)
    spent = {name: ATTACKS[name].work(budget) for name, budget in budgets.items()}
    return {
        "prompts": len(records),
        "gradients": {name: len(records) * each.gradients for name, each in spent.items()},
        "encodings": {name: len(records) * each.encodings for name, each in spent.items()},
        "pictures": {name: len(records) * each.pictures for name, each in spent.items()},
        **{name: told[name] for name in ("memory_bytes", "disk_bytes", "free_disk_bytes")},
    }


def attack_seconds(
    evaluation: Evaluation, planned: Mapping[str, Any], device: "torch.device", dtype: str
) -> float:
    """About how long attacks take at most: none ends before its budget is spent."""
    records = _attacked(evaluation)
    drawn = pace(evaluation.erased, records[0], device, dtype)
    one = drawn.seconds(records[:1]) - drawn.load
    import torch

    text = evaluation.erased.family.text(evaluation.erased, device, torch.float32)
    encoding = seconds_each(text, [record.prompt for record in records])
    gradients, encodings, pictures = (sum(planned[name].values()) for name in _SPENT)
    return (
        2 * drawn.load
        + gradients * BACKWARD * drawn.step / GUIDED
        + encodings * encoding
        + (2 * len(records) + pictures) * one  # of both checkpoints without an attack
    )


def _attacked(evaluation: Evaluation) -> list[ImageRecord]:
    prompts = [prompt for suite in evaluation.suites for prompt in suite.prompts if suite.role != "benign"]
    return plan_images(prompts, {"erased": evaluation.erased}, evaluation.settings)


def trials(evaluation: Evaluation, count: int, output: Path) -> Places:
    """What `trce tune` draws: every suite by the original and by so many trials."""
    roles = {"original": evaluation.original} | {f"trial {i}": evaluation.original for i in range(count)}
    return [
        (output / PICTURES / suite.name, plan_images(suite.prompts, roles, evaluation.settings))
        for suite in evaluation.suites
    ]


def plan_evaluation(evaluation: Evaluation, where: Places, dtype: str) -> dict[str, Any]:
    """How many pictures are asked for and who looks; see `plan_drawing` for the rest."""
    return {
        "suites": [suite.name for suite in evaluation.suites],
        "detectors": [detector.name for detector in evaluation.detectors],
        **plan_drawing(evaluation.checkpoints, where, dtype),
    }


def evaluation_seconds(evaluation: Evaluation, where: Places, device: "torch.device", dtype: str) -> float:
    """About how long it takes to draw what is missing and to look at all of it."""
    every = [record for _, records in where for record in records]
    lacking = list(missing(where))
    drawn = pace(evaluation.erased, every[0], device, dtype)
    return drawn.seconds(lacking) + _looking_seconds(evaluation, drawn.sample) * len(every)


def _looking_seconds(evaluation: Evaluation, sample: "Image.Image") -> float:
    """How long all that look at pictures look at one, written and read as any other."""
    import io

    import numpy as np

    image = np.array(sample)
    looks: list[Callable[[], object]] = [partial(each.scores, image[None]) for each in evaluation.detectors]
    looks += [partial(each.features, image[None]) for each in evaluation.extractors]
    looks += [partial(evaluation.clip.images, image[None])] if evaluation.clip else []
    looks += [lambda: sample.save(io.BytesIO(), format="PNG")]
    for look in looks:
        look()  # warms up
    begun = monotonic()
    for look in looks:
        look()
    return monotonic() - begun
