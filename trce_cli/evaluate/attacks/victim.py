"""The erased checkpoint under attack: what an attack may ask of it, whatever its family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from trce_cli.errors import BadInput, TrceError, refusing_library
from trce_cli.evaluate.question import Evaluation
from trce_cli.families.base import Schedule, Words
from trce_cli.images.draw import draw
from trce_cli.images.plan import plan_images
from trce_cli.images.record import ImageRecord
from trce_cli.prompts.files import Prompt
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.system.memory import free
from trce_cli.system.progress import Report, Task, no_report
from trce_cli.system.unfinished import Kept

if TYPE_CHECKING:
    from PIL import Image

AT_ONCE: Final = 256  # prompts that a text encoder reads at a time


@dataclass(frozen=True)
class Block:
    """Prompts that are attacked together, and the place of the first of them among all."""

    first: int
    prompts: Sequence[Prompt]


class Victim:
    """Prompts of an evaluation's suites, and the erased checkpoint that is to draw them or others.

    name: the checkpoint's. every: all prompts. prompts: those that are attacked now, together; `first` is the
    place of the first among all. pairs: the prompt pairs that the concepts were erased by. task: tells what
    goes on. kept: what a stopped run of the same arguments found. latents: of what the original draws of
    `prompts`, float32 (prompts, *latent shape), where an attack needs them.
    """

    latents: Tensor

    def __init__(
        self, evaluation: Evaluation, device: torch.device, dtype: str, seed: int, task: Task
    ) -> None:
        self.evaluation, self.device, self.dtype = evaluation, device, dtype
        self.seed, self.task, self.kept = seed, task, Kept()
        self.name, self.family = evaluation.erased.name, evaluation.erased.family
        self.every = [prompt for suite in evaluation.suites for prompt in suite.prompts]
        self.pairs = prompt_pairs(evaluation.presets)
        self.detector = evaluation.detectors[0]
        self.denoiser = self.family.denoise(evaluation.erased)
        self._pipeline: Any = None
        self._words: Words | None = None
        self._shown: dict[int, dict[tuple[Any, ...], bool]] = {}
        self.turn_to(Block(0, self.every))

    def turn_to(self, block: Block, latents: Tensor | None = None) -> None:
        """Attack these prompts from now on. latents: see the class."""
        self.first, self.prompts = block.first, block.prompts
        if latents is not None:
            self.latents = latents.to(self.device)

    # --- before anything is loaded

    @cached_property
    def schedule(self) -> Schedule:
        """The checkpoint's noise schedule; BadInput where it has none to add noise by."""
        return self.denoiser.schedule(1)

    def check(self) -> None:
        """Raise BadInput for prompts that the checkpoints cannot draw, or not at once."""
        drawn = [self.records(self.every, role) for role in self.evaluation.checkpoints][-1]
        if len({(record.width, record.height) for record in drawn}) > 1:
            raise BadInput(
                "The prompts ask for pictures of several sizes, which cannot be attacked at once.",
                "Give each size a file of its own.",
            )

    def check_room(self, words: int) -> None:
        """Raise BadInput where a prompt has no room for so many words."""
        if words > (room := self.family.room(self.evaluation.erased)):
            raise BadInput(f"{self.name} reads prompts of up to {room} words.")

    def records(self, prompts: Sequence[Prompt], role: str) -> list[ImageRecord]:
        """How the prompts are drawn, as `trce evaluate` draws them."""
        negative = self.evaluation.negative_prompt if role == "erased" else ""
        settings = self.evaluation.settings.model_copy(update={"negative_prompt": negative})
        records = plan_images(prompts, {role: self.evaluation.checkpoints[role]}, settings)
        return [replace(record, dtype=self.dtype) for record in records]

    def generators(self, prompts: Sequence[Prompt]) -> list[torch.Generator]:
        """A stream of random numbers for each prompt, which the others do not touch."""
        seeds = [Random(f"{self.seed} {prompt.seed} {prompt.text}").getrandbits(63) for prompt in prompts]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    # --- with a checkpoint in memory

    @contextmanager
    def using(self, role: str) -> Iterator[None]:
        """With the pipeline of the original or of the erased checkpoint in memory, and nothing of the other.

        Raises BadInput where attacks cannot search in the words of the erased one.
        """
        checkpoint = self.evaluation.checkpoints[role]
        self.task(f"Loading {checkpoint.name}", None, "")
        self._pipeline = checkpoint.pipe(self.device, getattr(torch, self.dtype))
        self._module.requires_grad_(False)
        try:
            if role == "erased":
                self._words = self.family.words(self._pipeline)
                if self._words is None:
                    raise BadInput(f"Attacks cannot search in the text encoder of {self.family.name}.")
            yield
        finally:
            self._pipeline = self._words = None
            free(self.device)

    @property
    def words(self) -> Words:
        """The words of the erased checkpoint, which is in memory."""
        assert self._words is not None, "no erased checkpoint is in memory"
        return self._words

    @property
    def _module(self) -> torch.nn.Module:
        """The denoiser of the pipeline in memory."""
        module: torch.nn.Module = getattr(self._pipeline, self.family.denoiser)
        return module

    def pictures(
        self, prompts: Sequence[Prompt], role: str, report: Report = no_report
    ) -> list["Image.Image"]:
        """What the pipeline in memory draws of the prompts, each from its own seed."""
        records = self.records(prompts, role)
        drawn = {}
        for record, image in draw(self.family, self._pipeline, records):
            drawn[record.index] = image
            report(1)
        return [drawn[record.index] for record in records]

    def found(self, pictures: Sequence["Image.Image"]) -> np.ndarray:
        """Whether the detector's headline convention sees the concept, bool (pictures,).

        It looks at one after the other, for what stands beside a picture would change how scores are rounded.
        """
        scores = [self.detector.scores(np.asarray(picture)[None]) for picture in pictures]
        return self.detector.hits(self.detector.conventions[0], np.concatenate(scores))

    def shows(self, prompts: Sequence[Prompt], report: Report = no_report) -> np.ndarray:
        """Whether the concept is seen in what the erased checkpoint draws of each prompt, bool (prompts,).

        While the same prompts are attacked, one is drawn once: what it showed is remembered. What others
        drew is not, so that nothing depends on what is attacked elsewhere.
        """
        shown = self._shown.setdefault(self.first, {})
        keys = [(one.text, one.seed, one.guidance, one.width, one.height) for one in prompts]
        new = {key: one for key, one in zip(keys, prompts, strict=True) if key not in shown}
        report(len(prompts) - len(new))
        if new:
            asked = [*new.values()]

            def look() -> dict[str, Tensor]:
                return {"found": torch.from_numpy(self.found(self.pictures(asked, "erased", report)))}

            found = self.kept(f"shown {self.first} {[*new]}", look, report, len(new))["found"]
            shown |= {key: bool(seen) for key, seen in zip(new, found, strict=True)}
        return np.array([shown[key] for key in keys])

    @torch.no_grad()
    def states(self, ids: Sequence[Tensor], positions: int | None = None) -> Tensor:
        """Token ids as `words` gives them -> embeddings of the family's main stream at the first positions.

        Float32 (prompts, positions, width).
        """
        main = self.family.streams[0]
        parts = zip(*(each.split(AT_ONCE) for each in ids), strict=True)
        return torch.cat([self.words(part)[main][:, :positions].float() for part in parts])

    def encoded(self, pictures: Sequence["Image.Image"]) -> Tensor:
        """Pictures -> their latents by the autoencoder in memory, float32 (pictures, *latent shape)."""
        latents = [self.family.latents(self._pipeline, np.asarray(picture)[None]) for picture in pictures]
        if not all(bool(each.isfinite().all()) for each in latents):
            raise TrceError("The original's autoencoder gives NaN or infinity.", "Try --dtype fp32.")
        return torch.cat(latents)

    def denoising_loss(
        self,
        rows: Sequence[int],
        level: int,
        generators: Sequence[torch.Generator],
        *,
        alone: bool = False,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of prefixes before the prompts of these rows, or of what is `alone` in place of them, at
        timestep `level`, of new noise each time.

        It takes words and their embeddings, and gives a loss a prompt. It is of the denoiser alone: neither
        guidance nor a negative prompt enters it. generators: of all prompts.
        """
        latents, module = self.latents[rows], self._module
        timesteps = torch.full((len(rows),), level, device=self.device)
        dtype = next(module.parameters()).dtype

        def loss(words: Tensor, prefixes: Tensor) -> Tensor:
            texts = [
                self.words.text(prefix) if alone else f"{self.words.text(prefix)} {self.prompts[row].text}"
                for row, prefix in zip(rows, words, strict=True)
            ]
            told = self.words(self.words.ids(texts), prefixes)
            noise = torch.stack(
                [torch.randn(latents.shape[1:], generator=generators[row]) for row in rows]
            ).to(self.device)
            noisy = self.schedule.noised(latents, noise, timesteps)
            wanted = self.schedule.wanted(latents, noise, timesteps)
            with refusing_library("The denoiser cannot predict"):
                prediction = self.denoiser.predict(module, noisy.to(dtype), timesteps, told)
            return (prediction - wanted).square().mean(tuple(range(1, latents.ndim)))

        return loss
