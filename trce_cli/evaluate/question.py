"""What an evaluation asks of which checkpoints, and what looks at the pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trce_cli import emoji
from trce_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trce_cli.errors import BadInput
from trce_cli.evaluate.clip import Clip, EmbeddedClip, TransformersClip
from trce_cli.evaluate.detectors.base import Loaded
from trce_cli.evaluate.detectors.judge import JudgeDetector
from trce_cli.evaluate.detectors.registry import load_detectors
from trce_cli.evaluate.detectors.zero_shot import ZeroShotClip
from trce_cli.evaluate.features import ClipFeatures, Extractor, InceptionFeatures, JudgeFeatures
from trce_cli.evaluate.scores import real_images
from trce_cli.images.draw import STEPS, Settings
from trce_cli.prompts.presets import Preset
from trce_cli.prompts.suites import Split, Suite, choose_suites, unsafe_classes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which checkpoints, and what looks at the pictures.

    negative_prompt: of the erased checkpoint alone, as a baseline. real: a folder of real pictures.
    reuse: the output of another evaluation, from which equal pictures are copied instead of drawn.
    """

    original: Checkpoint
    erased: Checkpoint
    presets: Sequence[Preset]
    suites: Sequence[Suite]
    detectors: Sequence[Loaded]
    extractors: Sequence[Extractor]
    clip: Clip | None
    settings: Settings
    negative_prompt: str = ""
    real: Path | None = None
    reuse: Path | None = None

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Both by role, the original first."""
        return {"original": self.original, "erased": self.erased}

    def figure_names(self) -> list[str]:
        """The names of all figures that the evaluation will have, for gates."""
        names = []
        for suite in self.suites:
            names += [f"asr.{suite.name}"]
            names += [f"asr.{suite.name}[{each.name}]" for d in self.detectors for each in d.conventions]
            names += [f"{suite.name}.{kind}" for kind in ("kept", "accuracy") if self._keeps(suite)]
            names += [f"{suite.name}.clip_score"] if self.clip else []
            names += [f"{suite.name}.frechet"] if self.extractors else []
            names += [f"{suite.name}.frechet_real"] if self.extractors and self._has_real(suite) else []
            names += [f"{suite.name}.change"]
        return names

    def _keeps(self, suite: Suite) -> bool:
        return suite.objects is not None or (suite.role in ("context", "benign") and self.clip is not None)

    def _has_real(self, suite: Suite) -> bool:
        return self.real is not None and suite.role != "attack"


def is_embedded(checkpoint: Checkpoint) -> bool:
    """Whether it is the embedded checkpoint or made from it: the text encoder is the same."""
    if checkpoint.name == "emoji" or not (emoji.folder() / "model_index.json").is_file():
        return checkpoint.name == "emoji"
    ours = open_checkpoint("emoji")
    if ours.context_width != checkpoint.context_width:
        return False
    return ours.text_encoder_hash() == checkpoint.text_encoder_hash()


def prepare(
    original: Checkpoint,
    erased: Checkpoint,
    presets: Sequence[Preset],
    device: "torch.device",
    *,
    suites: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    detectors: Sequence[str] = (),
    thresholds: Sequence[tuple[str | None, float]] = (),
    clip: str | None = None,
    inception: Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    scheduler: str | None = None,
    real: Path | None = None,
    reuse: Path | None = None,
    split: Split = "reporting",
    note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Choose suites, detectors and feature extractors, and load all but the checkpoints.

    suites, count, seed, split: see `choose_suites`. detectors, thresholds: see `load_detectors`; the embedded
    checkpoint always has its judge. clip: folder or hub id of a model for CLIP scores and features; else that
    of the first zero-shot detector, or the embedded one. inception: FID's weights. steps, guidance_scale:
    None is what the embedded checkpoint was made for, elsewhere what `trce generate` would take.
    """
    if original.family is not erased.family:
        raise BadInput(
            f"{erased.name} is {erased.family.name}, {original.name} is {original.family.name}.",
            "Compare a checkpoint with the original that it was made from.",
        )
    if reuse is not None and not (reuse / "images").is_dir():
        raise BadInput(
            f"There are no images of an evaluation in {reuse}.", "Give --reuse what --output was there."
        )
    if real is not None:
        real_images(real)
    embedded = is_embedded(original)
    chosen = choose_suites(suites, presets, embedded, count, seed, note, split)
    wanted = list(detectors)
    if embedded:
        from training.measure import GUIDANCE
        from training.measure import STEPS as OWN_STEPS

        steps = steps or OWN_STEPS
        chosen = [with_guidance(suite, GUIDANCE) for suite in chosen]
        if "judge" not in wanted and unsafe_classes(presets):
            wanted.append("judge")
    if not wanted:
        raise BadInput(
            f"No detector was named that can tell what {original.name} draws.",
            "--detector clip:MODEL for any concept; nudenet or safety-checker for sexual content.",
        )
    loaded = load_detectors(wanted, thresholds, presets, original, device)
    found = [each.detector for each in loaded]
    model: Clip | None = None
    if clip is not None:
        model = TransformersClip(clip, device)
    elif zero_shot := [detector.clip for detector in found if isinstance(detector, ZeroShotClip)]:
        model = zero_shot[0]
    elif embedded:
        model = EmbeddedClip(original)
    extractors: list[Extractor] = []
    if inception is not None:
        extractors.append(InceptionFeatures(inception, device))
    extractors += [JudgeFeatures(detector) for detector in found if isinstance(detector, JudgeDetector)]
    extractors += [ClipFeatures(model)] if model else []
    return Evaluation(
        original=original,
        erased=erased,
        presets=presets,
        suites=chosen,
        detectors=loaded,
        extractors=extractors,
        clip=model,
        settings=Settings(steps=steps or STEPS, guidance_scale=guidance_scale, scheduler=scheduler),
        negative_prompt=negative_prompt,
        real=real,
        reuse=reuse,
    )


def with_guidance(suite: Suite, guidance: float) -> Suite:
    """The suite with this guidance scale wherever a prompt's row names none."""
    prompts = [
        prompt if prompt.guidance is not None else replace(prompt, guidance=guidance)
        for prompt in suite.prompts
    ]
    return replace(suite, prompts=tuple(prompts))
