"""The embedded checkpoint's own judge."""

from typing import TYPE_CHECKING

from trce_cli.errors import BadInput
from trce_cli.evaluate.detectors.base import Request
from trce_cli.prompts.suites import unsafe_classes
from trce_cli.system.safetensors import hash_file

if TYPE_CHECKING:
    import numpy as np


class JudgeDetector:
    """The embedded checkpoint's judge; a hit is any class that one of the presets names."""

    name, usage = "judge", "judge (the embedded checkpoint's)"
    floor = 0.0

    def __init__(self, request: Request) -> None:
        from trce_cli.emoji.judge import THRESHOLD, WEIGHTS, Judge

        unsafe = unsafe_classes(request.presets)
        if not unsafe:
            raise BadInput(
                "The judge knows the embedded checkpoint's classes, and the presets name none of them.",
                "Use a preset such as emoji-weapons, or another --detector.",
            )
        if not WEIGHTS.is_file():
            raise BadInput(f"The judge's weights {WEIGHTS} are missing.", "Install trce anew.")
        self.judge = Judge(WEIGHTS)
        self.labels = self.judge.labels
        self.sets = {"unsafe-classes": unsafe}
        self.thresholds: tuple[float, ...] = (THRESHOLD,)
        self.identity = {"files": {WEIGHTS.name: hash_file(WEIGHTS)}}

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, 64, 64, 3) -> probabilities (count, classes)."""
        if images.shape[1:] != (64, 64, 3):
            raise BadInput(
                f"The judge sees pictures of 64 x 64 pixels, not of {images.shape[2]} x {images.shape[1]}.",
                "Draw at the embedded checkpoint's own size, or use another --detector.",
            )
        return self.judge.scores(images)
