"""Pictures drawn from the original's: image to image and inpainting, as every interface has them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from trce_cli.errors import BadInput
from trce_cli.evaluate.survivals.base import Artist, State, Subject

if TYPE_CHECKING:
    from PIL import Image

    from trce_cli.evaluate.question import Evaluation
    from trce_cli.evaluate.scores import Pair

STRENGTHS: Final = (30, 50, 70)  # per cent of the steps that are taken, at least one
PAINTED: Final = (25, 50, 75)  # per cent of the picture, in its middle, that are painted anew


@dataclass(frozen=True)
class FromPictures:
    """The erased checkpoint goes on from the picture that the original drew of the same prompt and seed.

    painted: whether its middle alone is painted anew, from noise, the rest being the original's. prompted:
    under its own prompt, or an empty one, which says nothing of the concept.
    """

    painted: bool
    prompted: bool = True

    @property
    def name(self) -> str:
        """See `Treatment`."""
        return ("inpainting" if self.painted else "image-to-image") + ("" if self.prompted else "-empty")

    @property
    def does(self) -> str:
        """See `Treatment`."""
        what = (
            "painting the middle of the original's picture anew"
            if self.painted
            else ("beginning with the original's picture")
        )
        return what if self.prompted else f"{what}, under an empty prompt"

    def states(self, evaluation: "Evaluation") -> list[State]:
        """See `Treatment`; BadInput for a family whose pictures are not drawn from pictures."""
        if (family := evaluation.erased.family).redraw is None:
            raise BadInput(
                f"--after {self.name} is not built for {family.name}.",
                "It is of SD 1.x, SD 2.x and SDXL; completion is of all.",
            )
        how = "% of it" if self.painted else "% strength"
        return [
            State(
                f"{self.name}-{share}",
                f"{self.does}, {share} {how}",
                f"{self.name} {share} {how}",
                of_original=True,
            )
            for share in (PAINTED if self.painted else STRENGTHS)
        ]

    def enter(self, subject: Subject, states: Sequence[State]) -> Iterator[tuple[State, Artist]]:
        """See `Treatment`."""
        from trce_cli.images.draw import redraw

        if not states:
            return
        pipe, originals = subject.pipe(), Originals(subject)
        for state in states:
            share = int(state.name.rpartition("-")[2])

            def artist(pairs: Sequence["Pair"], share: int = share) -> Iterator[tuple["Pair", "Image.Image"]]:
                for pair in pairs:
                    record, picture = pair.records["erased"], originals.of(pair)
                    mask = middle(picture, share) if self.painted else None
                    strength = 1.0 if self.painted else max(share / 100, min(1.5 / record.steps, 1.0))
                    prompt = record.prompt if self.prompted else ""
                    family = subject.erased.family
                    yield pair, redraw(family, pipe, record, picture, mask, strength, prompt)

            yield state, artist


@dataclass(frozen=True)
class Originals:
    """The original's pictures: as they lie there, or drawn where another shard has them."""

    subject: Subject

    def of(self, pair: "Pair") -> "Image.Image":
        """The original's picture of a pair."""
        from trce_cli.images.draw import draw
        from trce_cli.images.record import load

        if (path := pair.path("original")).exists():
            return load(path)
        ((_, found),) = draw(self.subject.erased.family, self._pipe, [pair.records["original"]])
        return found

    @cached_property
    def _pipe(self) -> Any:
        return self.subject.pipe("original")


def middle(picture: "Image.Image", share: int) -> "Image.Image":
    """A mask that is white in the middle of the picture, in so many per cent of it."""
    from PIL import Image

    mask = Image.new("L", picture.size)
    sides = [round(side * (share / 100) ** 0.5) for side in picture.size]
    corner = [(side - white) // 2 for side, white in zip(picture.size, sides, strict=True)]
    mask.paste(255, (*corner, *(at + white for at, white in zip(corner, sides, strict=True))))
    return mask
