"""Which detectors there are, and which of them look: the built-in ones, and those of installed packages.

Others can be added by a package of their own, with an entry point of the group `trce.detectors` that is
called with a `Request` and returns a `Detector`.
"""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.detectors.base import Convention, Detector, Loaded, Request
from trce_cli.evaluate.detectors.judge import JudgeDetector
from trce_cli.evaluate.detectors.nudenet import NudeNetDetector
from trce_cli.evaluate.detectors.safety_checker import SafetyChecker
from trce_cli.evaluate.detectors.zero_shot import ZeroShotClip
from trce_cli.prompts.presets import Preset

if TYPE_CHECKING:
    import torch

    from trce_cli.checkpoint.checkpoint import Checkpoint

GROUP: Final = "trce.detectors"
BUILT_IN: Final = (JudgeDetector, NudeNetDetector, SafetyChecker, ZeroShotClip)


def find_detectors() -> dict[str, Callable[[Request], Detector]]:
    """What makes each known detector: the built-in ones and those of installed packages."""
    found: dict[str, Callable[[Request], Detector]] = {
        entry.name: lambda request, entry=entry: entry.load()(request)  # type: ignore[misc]
        for entry in importlib.metadata.entry_points(group=GROUP)
    }
    return found | {each.name: each for each in BUILT_IN}


def usage() -> str:
    """The built-in detectors as `--detector` takes them."""
    return ", ".join(each.usage for each in BUILT_IN)


def load_detectors(
    wanted: Sequence[str],
    thresholds: Sequence[tuple[str | None, float]],
    presets: Sequence[Preset],
    original: "Checkpoint",
    device: "torch.device",
) -> list[Loaded]:
    """The detectors by `NAME` or `NAME:ARGUMENT`, each with its label sets at its thresholds.

    `thresholds`: (detector or None for all, value), in place of the customary ones. Raises BadInput for
    unknown names, for thresholds that can change nothing, and for whatever a detector lacks.
    """
    known = find_detectors()
    loaded = []
    for text in dict.fromkeys(wanted):
        name, _, argument = text.partition(":")
        if name not in known:
            raise BadInput(f"There is no detector {name!r}.", f"There are {', '.join(known)}.")
        detector = known[name](Request(argument or None, presets, original, device))
        own = [value for target, value in thresholds if target in (None, name)] or detector.thresholds
        if too_low := [value for value in own if value < detector.floor]:
            raise BadInput(
                f"{name} tells nothing below {detector.floor:g}; a threshold of {too_low[0]:g} means nothing."
            )
        conventions = tuple(
            Convention(f"{text}/{label_set}@{threshold:g}", tuple(labels), threshold)
            for threshold in own
            for label_set, labels in detector.sets.items()
        )
        loaded.append(Loaded(text, detector, conventions))
    names = [text.partition(":")[0] for text in wanted]
    if strange := [target for target, _ in thresholds if target is not None and target not in names]:
        raise BadInput(f"There is a threshold for {strange[0]!r}, which is no --detector of this run.")
    return loaded


def parse_threshold(text: str) -> tuple[str | None, float]:
    """`VALUE` or `DETECTOR=VALUE` -> (detector or None, value)."""
    target, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (equals and not target):
        raise BadInput(f"The threshold {text!r} is no number.", "Examples: 0.5, nudenet=0.6")
    return target or None, value
