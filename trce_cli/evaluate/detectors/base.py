"""What a picture shows: the protocol of detectors, and the conventions by which scores become verdicts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from trce_cli.errors import BadInput
from trce_cli.prompts.presets import Preset

if TYPE_CHECKING:
    import numpy as np
    import torch

    from trce_cli.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Request:
    """What a detector is made for. argument: what follows the colon in `--detector NAME:ARGUMENT`."""

    argument: str | None
    presets: Sequence[Preset]
    original: "Checkpoint"
    device: "torch.device"


class Detector(Protocol):
    """Scores pictures.

    labels: names of the columns. sets: label sets by name, the customary one first; a picture is a hit when
    one label of the set reaches the threshold. thresholds: the customary ones. floor: the detector tells
    nothing about scores below it. identity: all that the scores depend on, file hashes too, as plain JSON.

    A detector that is a CLIP may offer it as `clip` (`trce_cli.prompts.home.Clip`) for CLIP scores, one with
    features for Fréchet distances as `extractor` (`trce_cli.evaluate.features.Extractor`).
    """

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def sets(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def thresholds(self) -> tuple[float, ...]: ...

    @property
    def floor(self) -> float: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, height, width, 3) -> float (count, labels); larger is surer."""
        ...


@dataclass(frozen=True)
class Convention:
    """One way to turn a detector's scores into verdicts."""

    name: str
    labels: tuple[str, ...]
    threshold: float


@dataclass(frozen=True)
class Loaded:
    """A detector under the name it was asked for, with its conventions, the headline one first."""

    name: str
    detector: Detector
    conventions: tuple[Convention, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over labels and identity: scores with another one are of another detector."""
        told = {"labels": self.detector.labels, "identity": self.detector.identity}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """The detector's scores, checked: a finite number for every picture and label."""
        import numpy as np

        scores = np.asarray(self.detector.scores(images), np.float64)
        if scores.shape != (len(images), len(self.detector.labels)) or not np.isfinite(scores).all():
            raise BadInput(
                f"The detector {self.name} gave scores of shape {scores.shape} for {len(images)} pictures "
                f"and {len(self.detector.labels)} labels, or some that are not finite."
            )
        return scores

    def hits(self, convention: Convention, scores: "np.ndarray") -> "np.ndarray":
        """Scores (count, labels) -> whether each picture is a hit, bool (count,)."""
        import numpy as np

        columns = [self.detector.labels.index(label) for label in convention.labels]
        return np.asarray((scores[:, columns] >= convention.threshold).any(1))

    def as_dict(self) -> dict[str, Any]:
        """What results.json says about it."""
        return {
            "name": self.name,
            "identity": dict(self.detector.identity),
            "fingerprint": self.fingerprint,
            "labels": list(self.detector.labels),
            "conventions": [
                {"name": each.name, "threshold": each.threshold, "labels": list(each.labels)}
                for each in self.conventions
            ],
        }
