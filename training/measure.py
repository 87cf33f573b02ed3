"""What the judge sees in an emoji checkpoint's pictures: how well it draws, what an edit erased and kept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from training.quality import QUALITY, quality_suite
from training.render import nearest_background
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.emoji.home import EMOJI
from trce_cli.emoji.judge import Judge
from trce_cli.emoji.suites import SuitePrompt
from trce_cli.emoji.world import HARMLESS
from trce_cli.evaluate.question import Evaluation
from trce_cli.images.draw import draw
from trce_cli.images.plan import plan_images
from trce_cli.images.settings import DrawSettings
from trce_cli.maths.statistics import Rate
from trce_cli.prompts.files import Prompt
from trce_cli.prompts.suites import unsafe_classes


class Eye:
    """One checkpoint's pipeline with the judge, to draw prompts and look at them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        steps: int = EMOJI.steps,
        guidance: float = EMOJI.guidance,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = DrawSettings(steps=steps, guidance_scale=guidance)
        self._pipeline = checkpoint.family.pipe(checkpoint, device, torch.float32)
        self._judge = EMOJI.judge()

    def draw(self, prompts: Sequence[SuitePrompt]) -> np.ndarray:
        """Pictures of the prompts, RGB uint8 (count, 64, 64, 3); prompt i is drawn from seed i."""
        wanted = [Prompt(prompt.text, seed=place) for place, prompt in enumerate(prompts)]
        records = plan_images(wanted, {"": self._checkpoint}, self._settings)
        drawn = draw(self._checkpoint.family, self._pipeline, records)
        pictures = {record.index: image for record, image in drawn}
        return np.stack([np.asarray(pictures[i + 1]) for i in range(len(prompts))])

    def visible(self, images: np.ndarray) -> list[set[str]]:
        """The classes that the judge sees in each picture."""
        return [_visible(self._judge.labels, scores) for scores in self._judge.scores(images)]

    def top(self, images: np.ndarray) -> list[str]:
        """The likeliest class of each picture."""
        return [self._judge.labels[i] for i in self._judge.scores(images).argmax(1)]


def _visible(labels: Sequence[str], scores: Sequence[float]) -> set[str]:
    return {label for label, score in zip(labels, scores, strict=True) if score >= Judge.threshold}


def quality(eye: Eye, count: int, seed: int = 0) -> Iterator[Rate]:
    """How well a checkpoint draws, a rate a suite: top-1, both objects visible, background obeyed."""
    for name in QUALITY:
        prompts = quality_suite(name, count, seed)
        images = eye.draw(prompts)
        if name == "two objects":
            hits = sum(set(p.objects) <= seen for p, seen in zip(prompts, eye.visible(images), strict=True))
        elif name == "background":
            hits = sum(
                p.background == nearest_background(image) for p, image in zip(prompts, images, strict=True)
            )
        else:
            hits = sum(p.objects[0] == top for p, top in zip(prompts, eye.top(images), strict=True))
        yield Rate(name, hits, count)


def judged(
    evaluation: Evaluation, verdicts: Mapping[str, Sequence[Mapping[str, Any]]], role: str
) -> Iterator[tuple[str, list[bool]]]:
    """The same, prompt by prompt."""
    judge, benign = evaluation.judge, set(HARMLESS)
    unsafe = set(unsafe_classes(evaluation.home, evaluation.presets))
    for suite in evaluation.suites:
        scores = [row["scores"][judge.name][role] for row in verdicts[suite.name]]
        seen = [_visible(judge.detector.labels, each) for each in scores]
        if suite.role != "benign":
            yield f"{suite.name}: unsafe visible", [bool(each & unsafe) for each in seen]
            yield f"{suite.name}: something benign visible", [bool(each & benign) for each in seen]
        if suite.objects is not None:
            kept = [objects <= each for objects, each in zip(suite.objects, seen, strict=True)]
            yield f"{suite.name}: kept", kept
