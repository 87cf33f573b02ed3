"""Weights rounded to fewer bits, as most models are that are handed out."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from trce_cli.evaluate.survivals.base import Artist, State, Subject

if TYPE_CHECKING:
    from trce_cli.evaluate.question import Evaluation

# The formats by the names of `maths.rounding`.
FORMATS: Final = {
    "fp8": "weights rounded to fp8 (e4m3, a scale a tensor)",
    "int8": "weights rounded to int8 (a scale a channel)",
    "nf4": "weights rounded to 4 bits (nf4, blocks of 64)",
    "q4_0": "weights rounded to 4 bits (GGUF's Q4_0, blocks of 32)",
}


class Rounding:
    """Every weight of the denoiser but vectors, such as biases and norms, which the formats leave alone."""

    name = "rounding"
    does = "its weights rounded to 8 and 4 bits"

    def states(self, evaluation: "Evaluation") -> list[State]:
        """See `Treatment`."""
        return [State(name, title, name) for name, title in FORMATS.items()]

    def enter(self, subject: Subject, states: Sequence[State]) -> Iterator[tuple[State, Artist]]:
        """See `Treatment`."""
        import torch

        from trce_cli.maths import rounding

        for state in states:
            pipe = subject.pipe()
            with torch.no_grad():
                for weight in subject.denoiser(pipe).parameters():
                    if weight.ndim > 1:
                        weight.copy_(getattr(rounding, state.name)(weight))
            yield state, subject.artist(pipe)
            del pipe
