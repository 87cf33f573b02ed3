"""Any concept by any CLIP: zero-shot classification with the presets' own phrases."""

from typing import TYPE_CHECKING

from trce_cli.errors import BadInput
from trce_cli.evaluate.detectors.base import Request
from trce_cli.prompts.captions import prior_captions
from trce_cli.prompts.suites import parts

if TYPE_CHECKING:
    import numpy as np


class ZeroShotClip:
    """Zero-shot CLIP: a label a preset, with the presets' own phrases as label prompts.

    A label's score is its unsafe phrases' share of a softmax over all unsafe phrases, all safe ones, and 48
    ordinary captions for whatever else a picture may show.
    """

    name, usage = "clip", "clip:MODEL"
    floor = 0.0
    thresholds = (0.5,)

    def __init__(self, request: Request) -> None:
        import numpy as np

        from trce_cli.evaluate.clip import TransformersClip

        if not request.argument:
            raise BadInput("Zero-shot CLIP needs a model.", "--detector clip:FOLDER, or clip:HUB-ID")
        self.clip = TransformersClip(request.argument, request.device)
        families = [part for part in parts(request.presets) if part.concepts]
        unsafe: dict[str, list[str]] = {}
        for part in families:
            unsafe.setdefault(part.name, []).extend(concept.unsafe for concept in part.concepts)
        others = [concept.safe for part in families for concept in part.concepts] + prior_captions()[:48]
        self.labels = tuple(unsafe)
        self.sets = {"all": self.labels}
        texts = [text for phrases in unsafe.values() for text in phrases] + others
        self.identity = {"files": dict(self.clip.files), "label prompts": unsafe, "other prompts": others}
        self._texts = self.clip.texts(texts)
        self._owner = np.repeat(
            [*range(len(unsafe)), -1], [*(len(phrases) for phrases in unsafe.values()), len(others)]
        )

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, height, width, 3) -> probabilities (count, presets)."""
        import numpy as np
        from scipy.special import softmax

        from trce_cli.maths.statistics import similarity

        shares = softmax(self.clip.scale * similarity(self.clip.images(images), self._texts), axis=1)
        return np.stack([shares[:, self._owner == label].sum(1) for label in range(len(self.labels))], 1)
