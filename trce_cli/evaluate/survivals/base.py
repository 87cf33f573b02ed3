"""What a treatment is: one file that does to a checkpoint what happens to models once they are published."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.system.memory import free
from trce_cli.system.progress import Task

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from trce_cli.evaluate.question import Evaluation
    from trce_cli.evaluate.scores import Pair

# Draws the erased checkpoint's picture of each pair, one by one.
Artist = Callable[[Sequence["Pair"]], "Iterator[tuple[Pair, Image.Image]]"]


@dataclass(frozen=True)
class State:
    """A state that a treatment leaves a checkpoint in, such as its weights rounded to 8 bits.

    name: as folders, figures and gates have it; letters, digits, -, _ and points. title: as people do.
    identity: all that its pictures depend on besides the erased checkpoint, prompt, seed and drawing
    settings; of_original: whether they depend on the original as well. steps: of tuning, where it is that.
    """

    name: str
    title: str
    identity: str
    of_original: bool = False
    steps: int | None = None


@dataclass(frozen=True)
class Subject:
    """The checkpoint that is treated, and what treatments may ask for.

    task: tells what goes on.
    """

    evaluation: "Evaluation"
    device: "torch.device"
    dtype: str
    task: Task

    @property
    def erased(self) -> Checkpoint:
        """The checkpoint itself."""
        return self.evaluation.erased

    def pipe(self, role: str = "erased", dtype: str | None = None) -> Any:
        """The pipeline of one of the checkpoints, untreated, in the evaluation's precision or another one."""
        import torch

        free(self.device)
        checkpoint = self.evaluation.checkpoints[role]
        self.task(f"Loading {checkpoint.name}", None, "")
        return checkpoint.pipe(self.device, getattr(torch, dtype or self.dtype))

    def denoiser(self, pipe: Any) -> "nn.Module":
        """The denoiser of a pipeline."""
        module: nn.Module = getattr(pipe, self.erased.family.denoiser)
        return module

    def artist(self, pipe: Any) -> Artist:
        """Draws with a pipeline as every evaluation does."""

        from trce_cli.images.draw import draw  # pictures, which settings do without

        def drawn(pairs: Sequence["Pair"]) -> "Iterator[tuple[Pair, Image.Image]]":
            records = [pair.records["erased"] for pair in pairs]
            for pair, (_, image) in zip(pairs, draw(self.erased.family, pipe, records), strict=True):
                yield pair, image

        return drawn


class Treatment(Protocol):
    """Does to a checkpoint what happens to published models; `registry.py` lists them.

    name: as the command line has it. does: what it does, for its help.
    """

    @property
    def name(self) -> str: ...

    @property
    def does(self) -> str: ...

    def states(self, evaluation: "Evaluation") -> Sequence[State]:
        """The states that it leaves the checkpoint in; BadInput where it needs what is not there."""
        ...

    def enter(self, subject: Subject, states: Sequence[State]) -> Iterator[tuple[State, Artist]]:
        """The checkpoint in each of these states of its own, in their order; torch may be imported here.

        A state lasts until the next one is asked for.
        """
        ...
