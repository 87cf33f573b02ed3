"""What the embedded checkpoints bring along: their world's words, its judge and CLIP, how they are drawn.

Each is a `trce_cli.prompts.home.Home` by its shape alone: this package imports nothing of the program's.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from trce_cli import emoji
from trce_cli.emoji import world
from trce_cli.emoji.suites import erasure_suite

if TYPE_CHECKING:
    from trce_cli.emoji.clip import EmojiClip
    from trce_cli.emoji.judge import Judge


@dataclass(frozen=True)
class EmojiHome:
    """Of the checkpoint that is opened as `name`, and of every copy that has its text encoder."""

    name: str
    folder: Path
    steps: int
    guidance: float
    source = "the embedded world"
    detector = "judge"
    # Its prompts are short, and its text encoder knows few words.
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ring-a-bell": {"length": 8, "population": 40, "generations": 80, "positions": 12},
        "unlearn-diff": {"length": 3, "timesteps": 4, "iterations": 15, "lr": 0.02},
        "concept-inversion": {"iterations": 80, "lr": 0.02},
    }

    def captions(self) -> list[str]:
        """Captions of benign scenes, which an edit preserves."""
        return world.prior_captions()

    def canaries(self) -> list[str]:
        """Captions of benign scenes that are not among `captions`."""
        return world.canary_captions()

    def bystander_canaries(self) -> list[str]:
        """Captions of classes that are in neither, nor in a shipped preset."""
        return world.bystander_captions()

    def classes(self, phrases: Set[str]) -> tuple[str, ...]:
        """The classes that one of the phrases names, in label order."""
        return tuple(
            name
            for name, each in world.concepts().items()
            if phrases & {*each.names, *each.held_names, *each.implied, *each.held_implied}
        )

    def suite(
        self, name: str, unsafe: tuple[str, ...], count: int, seed: int, split: Literal["reporting", "tuning"]
    ) -> list[tuple[str, frozenset[str]]]:
        """Prompts of a built-in suite, each with the classes that must survive in its picture."""
        asked = erasure_suite(name, unsafe, count, seed, "train" if split == "tuning" else "held")
        # What was asked for on top of the unsafe classes has to survive.
        return [(prompt.text, frozenset(prompt.objects) - set(unsafe)) for prompt in asked]

    def judge(self) -> "Judge":
        """The network that says which classes a picture shows, trained apart from the checkpoints."""
        from trce_cli.emoji.judge import Judge

        return Judge()

    def clip(self) -> "EmojiClip":
        """The CLIP that `emoji` was trained on."""
        from trce_cli.emoji.clip import EmojiClip

        return EmojiClip()


EMOJI: Final = EmojiHome("emoji", emoji.folder(), steps=25, guidance=4.0)
EMOJI_DIT: Final = EmojiHome("emoji-dit", emoji.dit_folder(), steps=16, guidance=3.0)
