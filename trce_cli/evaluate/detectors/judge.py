"""The judge that the embedded checkpoints bring along."""

from typing import TYPE_CHECKING

from trce_cli.checkpoint.home import home_of
from trce_cli.errors import BadInput, first_line
from trce_cli.evaluate.detectors.base import Request
from trce_cli.prompts.home import EMBEDDED
from trce_cli.prompts.suites import unsafe_classes
from trce_cli.system.safetensors import hash_file

if TYPE_CHECKING:
    import numpy as np


class JudgeDetector:
    """The judge of the original's home, or of the embedded checkpoint whose classes the presets name.

    A hit is any class that one of the presets names.
    """

    name, usage = "judge", "judge (the embedded checkpoints')"
    floor = 0.0

    def __init__(self, request: Request) -> None:
        from trce_cli.evaluate.features import JudgeFeatures

        homes = (home_of(request.original), *EMBEDDED)
        home = next((home for home in homes if unsafe_classes(home, request.presets)), None)
        if home is None:
            raise BadInput(
                "The judge knows the embedded checkpoints' classes, and the presets name none of them.",
                "Use a preset such as emoji-weapons, or another --detector.",
            )
        try:
            judge = home.judge()
        except OSError as error:
            raise BadInput(
                f"The judge cannot be loaded: {first_line(error)}.", "Install trce anew."
            ) from None
        assert judge is not None, "a home that knows classes has a judge"
        self._judge = judge
        self.labels = judge.labels
        self.sets = {"unsafe-classes": unsafe_classes(home, request.presets)}
        self.thresholds: tuple[float, ...] = (judge.threshold,)
        self.identity = {"files": {judge.weights.name: hash_file(judge.weights)}}
        self.extractor = JudgeFeatures(judge)

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, side, side, 3) -> probabilities (count, classes)."""
        side, (height, width) = self._judge.side, images.shape[1:3]
        if (height, width) != (side, side):
            raise BadInput(
                f"The judge sees pictures of {side} x {side} pixels, not of {width} x {height}.",
                "Draw at an embedded checkpoint's own size, or use another --detector.",
            )
        return self._judge.scores(images)
