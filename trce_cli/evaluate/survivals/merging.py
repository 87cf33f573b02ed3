"""A merge with the original, as merged models have it somewhere among their parents."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.survivals.base import Artist, State, Subject

if TYPE_CHECKING:
    from trce_cli.evaluate.question import Evaluation

SHARE: Final = 0.5  # of the original


class Merging:
    """The denoiser's weights halfway between the erased checkpoint's and the original's."""

    name = "merging"
    does = "merged half and half with the original"

    def states(self, evaluation: "Evaluation") -> list[State]:
        """See `Treatment`; BadInput where the two have different weights."""
        shapes = [
            {key: one.shape("denoiser", key) for key in one.keys("denoiser")}
            for one in evaluation.checkpoints.values()
        ]
        if shapes[0] != shapes[1]:
            raise BadInput(
                f"{evaluation.erased.name} cannot be merged with {evaluation.original.name}: their "
                f"{evaluation.erased.family.network}s are of different architectures."
            )
        name = f"merge-{SHARE}"
        return [State(name, f"merged with {SHARE:.0%} of the original", name, of_original=True)]

    def enter(self, subject: Subject, states: Sequence[State]) -> Iterator[tuple[State, Artist]]:
        """See `Treatment`."""
        import torch

        original = subject.evaluation.original
        for state in states:
            pipe = subject.pipe()
            with torch.no_grad():
                for key, weight in subject.denoiser(pipe).named_parameters():
                    weight.lerp_(original.read("denoiser", key).to(weight), SHARE)
            yield state, subject.artist(pipe)
            del pipe
