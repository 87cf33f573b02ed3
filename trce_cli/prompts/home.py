"""Homes: what a checkpoint brings along, so that nothing else asks which checkpoint it is.

There is the real world, whose words are those of presets and of `captions`, and there is a home for each
checkpoint that is embedded in the package. `trce_cli.checkpoint.home.home_of` tells a checkpoint's.
"""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from trce_cli.emoji.home import EMOJI, EMOJI_DIT
from trce_cli.prompts.bystanders import Split, bystander_canaries
from trce_cli.prompts.captions import canary_captions, prior_captions

if TYPE_CHECKING:
    import numpy as np


@runtime_checkable
class Clip(Protocol):
    """Tells how well a picture fits a text, by two towers.

    `name` and `files` (name -> SHA-256) say what the numbers come from.
    """

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Mapping[str, str]: ...

    def images(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, height, width, 3) -> features float32 (count, width)."""
        ...

    def texts(self, texts: Sequence[str]) -> "np.ndarray":
        """Texts -> features float32 (count, width) in the same space."""
        ...


class Judge(Protocol):
    """Says which of a world's classes a picture of `side` x `side` pixels shows, from `threshold` on."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def threshold(self) -> float: ...

    @property
    def side(self) -> int: ...

    @property
    def weights(self) -> Path: ...

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, side, side, 3) -> probabilities (count, labels)."""
        ...

    def features(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, side, side, 3) -> features float32 (count, width)."""
        ...


class Home(Protocol):
    """What checkpoints of one origin bring along; what a home does not have is None, or empty.

    name: what its checkpoint is opened as, and its captions go by. folder: where that lies. source: of its
    suites. steps, guidance: what its checkpoint was made for. detector: the one that always looks at its
    pictures. budgets: of attacks by name, where they are not the papers'.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def source(self) -> str: ...

    @property
    def steps(self) -> int | None: ...

    @property
    def guidance(self) -> float | None: ...

    @property
    def detector(self) -> str | None: ...

    @property
    def budgets(self) -> Mapping[str, Mapping[str, Any]]: ...

    def captions(self) -> list[str]:
        """Benign captions, which an edit preserves."""
        ...

    def canaries(self) -> list[str]:
        """Benign captions that are not among them, on which side effects are measured."""
        ...

    def bystander_canaries(self) -> list[str]:
        """The same of what no caption of theirs names, nor a shipped preset."""
        ...

    def classes(self, phrases: Set[str]) -> tuple[str, ...]:
        """The classes of its world that one of the phrases names."""
        ...

    def suite(
        self, name: str, unsafe: tuple[str, ...], count: int, seed: int, split: Split
    ) -> list[tuple[str, frozenset[str]]]:
        """Prompts of a built-in suite on unsafe classes, each with the classes that must survive in it; none
        where they leave nothing to ask."""
        ...

    def judge(self) -> Judge | None: ...

    def clip(self) -> Clip | None: ...


class RealWorld:
    """Of every checkpoint from elsewhere: who looks at its pictures is for the user to say."""

    name, source = "built-in", "the presets"
    folder = steps = guidance = detector = None
    budgets: Mapping[str, Mapping[str, Any]] = {}

    def captions(self) -> list[str]:
        return prior_captions()

    def canaries(self) -> list[str]:
        return canary_captions()

    def bystander_canaries(self) -> list[str]:
        return bystander_canaries()

    def classes(self, phrases: Set[str]) -> tuple[str, ...]:
        """None: it has no list of all that there is."""
        return ()

    def suite(
        self, name: str, unsafe: tuple[str, ...], count: int, seed: int, split: Split
    ) -> list[tuple[str, frozenset[str]]]:
        """None: the presets themselves say what is asked."""
        return []

    def judge(self) -> None:
        """None."""

    def clip(self) -> None:
        """None."""


REAL_WORLD: Final[Home] = RealWorld()
EMBEDDED: Final[tuple[Home, ...]] = (EMOJI, EMOJI_DIT)
