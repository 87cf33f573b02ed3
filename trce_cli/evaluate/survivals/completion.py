"""Pictures that the original began: its first steps, completed by the erased checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from trce_cli.evaluate.survivals.base import Artist, State, Subject

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from trce_cli.evaluate.question import Evaluation
    from trce_cli.evaluate.scores import Pair

SHARES: Final = (10, 20, 30, 50, 70)  # per cent of the steps that the original takes, at least one


class Completion:
    """A prompt's own picture, its first steps predicted by the original, the rest by the erased checkpoint.

    So it begins from noise in which the concept is already laid out, as a picture to begin from has it.
    """

    name = "completion"
    does = "completing what the original began"

    def states(self, evaluation: "Evaluation") -> list[State]:
        """See `Treatment`."""
        return [
            State(
                f"completion-{share}",
                f"the original's first {share} % of the steps, completed",
                f"completion of {share} % of the steps",
                of_original=True,
            )
            for share in SHARES
        ]

    def enter(self, subject: Subject, states: Sequence[State]) -> Iterator[tuple[State, Artist]]:
        """See `Treatment`. Both denoisers are in memory."""
        if not states:
            return
        beginner, pipe = subject.denoiser(subject.pipe("original")), subject.pipe()
        draw, denoiser = subject.artist(pipe), subject.denoiser(pipe)
        for state in states:
            share = int(state.name.rpartition("-")[2])

            def artist(pairs: Sequence["Pair"], share: int = share) -> "Iterator[tuple[Pair, Image.Image]]":
                for pair in pairs:
                    count = max(round(pair.records["erased"].steps * share / 100), 1)
                    with begun(denoiser, beginner, count):
                        yield from draw([pair])

            yield state, artist


@contextmanager
def begun(denoiser: "nn.Module", by: "nn.Module", count: int) -> Iterator[None]:
    """While it lasts the first `count` timesteps of a denoiser are predicted by another one."""
    own, seen = denoiser.forward, list[float]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        timestep = float((kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])
        if timestep not in seen:  # guidance may take two calls for one
            seen.append(timestep)
        return (by.forward if len(seen) <= count else own)(*args, **kwargs)

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
