"""What an evaluation asks of which checkpoints, and what looks at the pictures."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.home import home_of
from trce_cli.errors import BadInput
from trce_cli.evaluate.clip import TransformersClip
from trce_cli.evaluate.detectors.base import Loaded
from trce_cli.evaluate.detectors.registry import load_detectors
from trce_cli.evaluate.features import ClipFeatures, Extractor, InceptionFeatures
from trce_cli.evaluate.gates import BOUNDS
from trce_cli.evaluate.nearness import near_and_far
from trce_cli.evaluate.settings import EvaluationSettings
from trce_cli.images.folder import PICTURES
from trce_cli.images.given import pictures_in
from trce_cli.images.settings import STEPS, DrawSettings
from trce_cli.prompts.bystanders import Split
from trce_cli.prompts.home import Clip, Home
from trce_cli.prompts.presets import Preset
from trce_cli.prompts.suites import Suite, choose_suites, unsafe_classes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which checkpoints, and what looks at the pictures.

    home: of the original. negative_prompt: of the erased checkpoint alone, as a baseline. real: a folder of
    real pictures. reuse: the output of another evaluation, from which equal pictures are copied instead of
    drawn.
    """

    original: Checkpoint
    erased: Checkpoint
    home: Home
    presets: Sequence[Preset]
    suites: Sequence[Suite]
    detectors: Sequence[Loaded]
    extractors: Sequence[Extractor]
    clip: Clip | None
    settings: DrawSettings
    negative_prompt: str = ""
    real: Path | None = None
    reuse: Path | None = None

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Both by role, the original first."""
        return {"original": self.original, "erased": self.erased}

    @property
    def judge(self) -> Loaded:
        """The detector that the home brings along."""
        return next(detector for detector in self.detectors if detector.name == self.home.detector)

    def figure_names(self) -> list[str]:
        """The names of all figures that the evaluation will have, for gates."""
        names = []
        for suite in self.suites:
            shares = [f"asr.{suite.name}"]
            shares += [f"asr.{suite.name}[{each.name}]" for d in self.detectors for each in d.conventions]
            shares += [f"{suite.name}.{kind}" for kind in ("kept", "accuracy") if self.keeps(suite)]
            groups = sorted(set(suite.groups or ())) if self.keeps(suite) else ()
            shares += [f"{suite.name}.kept[{group}]" for group in groups]
            names += [f"{share}{end}" for share in shares for end in ("", *BOUNDS)]
            names += [f"{suite.name}.clip_score"] if self.clip else []
            names += [f"{suite.name}.frechet"] if self.extractors else []
            names += [f"{suite.name}.frechet_real"] if self.extractors and self._has_real(suite) else []
            names += [f"{suite.name}.change"]
        return names

    def asked_by(self, figure: str) -> int:
        """How many prompts the suite has that a figure is of."""
        named = (s for s in self.suites if re.search(rf"(^|\.){re.escape(s.name)}(\.|\[|$)", figure))
        return next(len(suite.prompts) for suite in named)

    def keeps(self, suite: Suite) -> bool:
        """Whether it can be told what of a suite was kept."""
        return suite.objects is not None or (
            self.clip is not None and (suite.role == "benign" or suite.subjects is not None)
        )

    def _has_real(self, suite: Suite) -> bool:
        return self.real is not None and suite.role != "attack"


def prepare(
    original: Checkpoint,
    erased: Checkpoint,
    presets: Sequence[Preset],
    device: "torch.device",
    asked: EvaluationSettings,
    *,
    split: Split = "reporting",
    note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Choose suites, detectors and feature extractors, and load all but the checkpoints.

    The home's own detector is always among them. CLIP scores and features are of the model that is named, of
    the first detector that is one, or of the home's. Steps and guidance are those that the home's checkpoint
    was made for, elsewhere what `trce generate` would take. split: of the built-in suites.
    """
    if original.family is not erased.family:
        raise BadInput(
            f"{erased.name} is {erased.family.name}, {original.name} is {original.family.name}.",
            "Compare a checkpoint with the original that it was made from.",
        )
    if asked.reuse is not None and not (asked.reuse / PICTURES).is_dir():
        raise BadInput(
            f"There are no images of an evaluation in {asked.reuse}.", "Give --reuse what --output was there."
        )
    if asked.real is not None:
        pictures_in(asked.real, "real pictures", fewest=2)
    home = home_of(original)
    chosen = choose_suites(asked.suites, presets, home, asked.count, asked.seed, note, split)
    chosen = [
        near_and_far(each, presets, original) if each.name == "bystanders" and each.subjects else each
        for each in chosen
    ]
    if home.guidance is not None:
        chosen = [with_guidance(suite, home.guidance) for suite in chosen]
    wanted = list(asked.detectors)
    if home.detector and home.detector not in wanted and unsafe_classes(home, presets):
        wanted.append(home.detector)
    if not wanted:
        raise BadInput(
            f"No detector was named that can tell what {original.name} draws.",
            "--detector clip:MODEL for any concept; nudenet or safety-checker for sexual content.",
        )
    loaded = load_detectors(wanted, asked.thresholds, presets, original, device)
    named = TransformersClip(asked.clip, device) if asked.clip is not None else None
    model = named or brought_clip(loaded) or home.clip()
    extractors: list[Extractor] = []
    if asked.inception is not None:
        extractors.append(InceptionFeatures(asked.inception, device))
    extractors += brought_extractors(loaded)
    extractors += [ClipFeatures(model)] if model else []
    return Evaluation(
        original=original,
        erased=erased,
        home=home,
        presets=presets,
        suites=chosen,
        detectors=loaded,
        extractors=extractors,
        clip=model,
        settings=DrawSettings(
            steps=asked.steps or home.steps or STEPS,
            guidance_scale=asked.guidance_scale,
            scheduler=asked.scheduler,
            clip_skip=asked.clip_skip,
        ),
        negative_prompt=asked.negative_prompt,
        real=asked.real,
        reuse=asked.reuse,
    )


def brought_clip(detectors: Sequence[Loaded]) -> Clip | None:
    """The CLIP of the first detector that is one."""
    found = (getattr(each.detector, "clip", None) for each in detectors)
    return next((clip for clip in found if isinstance(clip, Clip)), None)


def brought_extractors(detectors: Sequence[Loaded]) -> list[Extractor]:
    """The features of the detectors that have some to measure distances in."""
    found = (getattr(each.detector, "extractor", None) for each in detectors)
    return [each for each in found if isinstance(each, Extractor)]


def with_guidance(suite: Suite, guidance: float) -> Suite:
    """The suite with this guidance scale wherever a prompt's row names none."""
    prompts = [
        prompt if prompt.guidance is not None else replace(prompt, guidance=guidance)
        for prompt in suite.prompts
    ]
    return replace(suite, prompts=tuple(prompts))
