"""The trajectories of stage 2, planned: prompts, seeds and steps, and what is kept of each.

arXiv 2503.07389, denoising trajectory steering. A state is a latent z_t before the sampler's step at timestep
t. Of an unsafe trajectory the early states are kept, each with the contrast of its targets; of every other
trajectory one state. Stored beside them is what training holds on to, so that it needs no model but the one
that is trained: at benign states what the original predicts, at unconditional ones what the model after stage
1 does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Final, Literal

import torch

from trce_cli.erase.settings import Recipe
from trce_cli.erase.vocabulary import kept_words
from trce_cli.errors import BadInput
from trce_cli.families.base import EMPTY, Shape
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.suites import rounds

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.erase.prior import Prior
    from trce_cli.prompts.presets import Preset

# Trajectories a shard: a kill costs at most these.
UNSAFE_A_SHARD: Final = 8
OTHERS_A_SHARD: Final = 16

MAX_TRAJECTORIES: Final = 100_000  # of concepts in all; each is planned before the first is drawn

# Trajectories that the guard measures on and that are not trained on; no more than there are to train
# on, where there are any.
CHECKED_UNSAFE: Final = 8
CHECKED_OTHERS: Final = 32

WORD_PROMPTS: Final = 6000  # that the meanings of words are read in, as many as in stage 1

STORED: Final = torch.float16  # of latents, directions and predictions
_WIDE: Final = {"timesteps": 8, "rows": 8, "offset": 4}  # bytes an element of the others

Kind = Literal[
    "unsafe", "unconditional", "benign", "stage1", "unsafe-check", "unconditional-check", "benign-check"
]
PREDICTED: Final[tuple[Kind, ...]] = ("benign", "benign-check")  # with what the original predicts there


@dataclass(frozen=True)
class Trajectory:
    """One trajectory: its prompt, the safe prompt of an unsafe one, the seed of its noise, and what is kept
    of it.

    first, end: the range of the steps whose states are kept, counted from the noise.
    """

    prompt: str
    safe: str | None
    seed: int
    first: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One file of the set, and the trajectories that it is made of."""

    kind: Kind
    number: int
    trajectories: tuple[Trajectory, ...]

    @property
    def name(self) -> str:
        """Its file name."""
        return f"{self.kind}-{self.number:05d}.safetensors"

    @property
    def states(self) -> int:
        """How many states it holds."""
        return sum(trajectory.end - trajectory.first for trajectory in self.trajectories)

    def tensors(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, for latents of the given shape."""
        if self.kind == "stage1":
            return {"prediction": (self.states, *shape)}
        tensors: dict[str, tuple[int, ...]] = {"latents": (self.states, *shape)}
        tensors |= {"timesteps": (self.states,), "rows": (self.states,)}
        if self.kind in ("unsafe", "unsafe-check"):
            tensors |= {"direction": (self.states, *shape), "offset": (self.states,)}
        if self.kind in PREDICTED:
            tensors["prediction"] = (self.states, *shape)
        return tensors

    def size(self, shape: Shape) -> int:
        """Its size in bytes, the header aside."""
        tensors = self.tensors(shape).items()
        return sum(math.prod(of) * _WIDE.get(name, STORED.itemsize) for name, of in tensors)


@dataclass(frozen=True)
class Plan:
    """All trajectories of a set by kind, a pure function of recipe, presets and prior.

    shape: of a latent image.
    """

    recipe: Recipe
    shape: Shape
    trajectories: Mapping[Kind, tuple[Trajectory, ...]]

    @cached_property
    def shards(self) -> list[Shard]:
        """Every file of the set, in the order in which they are made."""
        shards = []
        for kind, trajectories in self.trajectories.items():
            size = UNSAFE_A_SHARD if kind in ("unsafe", "unsafe-check") else OTHERS_A_SHARD
            for number, start in enumerate(range(0, len(trajectories), size)):
                shards.append(Shard(kind, number, trajectories[start : start + size]))
        return shards

    def of(self, kind: Kind) -> list[Shard]:
        """The shards of one kind."""
        return [shard for shard in self.shards if shard.kind == kind]

    def states(self, kind: Kind) -> int:
        """How many states of a kind there are."""
        return sum(shard.states for shard in self.of(kind))

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the set once; the conditioning's rows have the empty one before them."""
        every = (p for ts in self.trajectories.values() for t in ts for p in (t.prompt, t.safe) if p)
        return list(dict.fromkeys(every))

    @property
    def total_bytes(self) -> int:
        """Size of the set on disk, headers aside."""
        return sum(shard.size(self.shape) for shard in self.shards)

    @property
    def evaluations(self) -> dict[str, int]:
        """Evaluations of a denoiser on one sample that making the set takes, by model."""
        teacher = 3 * (self.states("unsafe") + self.states("unsafe-check"))
        teacher += sum(t.first for kind in _UNCONDITIONAL for t in self.trajectories[kind])
        teacher += sum(2 * t.first + 1 for kind in PREDICTED for t in self.trajectories[kind])
        return {"teacher": teacher, "stage 1": self.states("stage1")}


_UNCONDITIONAL: Final[tuple[Kind, ...]] = ("unconditional", "unconditional-check")


def plan_trajectories(
    checkpoint: "Checkpoint",
    presets: Sequence["Preset"],
    prior: "Prior",
    recipe: Recipe,
    words: Sequence[str] = (),
) -> Plan:
    """Choose prompts, seeds and steps of all trajectories.

    A concept's trajectories take its preset's templates in turn, concept by concept one further on; those of
    the guard take the next one. Benign trajectories take the prior's captions and the words in turns, those
    of the guard the prior's canaries. words: of the vocabulary, none that means what is erased. Raises
    BadInput for a recipe that the checkpoint cannot be sampled with.
    """
    denoiser = checkpoint.family.denoise(checkpoint)
    denoiser.schedule(recipe.steps)  # refuses what cannot be sampled
    concepts = {
        (concept.unsafe, concept.safe): part.templates
        for preset in presets
        for part in preset.walk()
        for concept in part.concepts
    }
    count = recipe.trajectories_per_concept
    if (planned := len(concepts) * count) > MAX_TRAJECTORIES:
        raise BadInput(
            f"These are {planned:,} trajectories; a run has at most {MAX_TRAJECTORIES:,}.",
            "Lower --trajectories-per-concept, or erase fewer concepts.",
        )
    every = list(concepts.items())

    def unsafe(number: int, turn: int, seed: int) -> Trajectory:
        (phrase, safe), templates = every[number]
        template = templates[(number + turn) % len(templates)]
        prompt, other = template.replace("{}", phrase), template.replace("{}", safe)
        return Trajectory(prompt, other, seed, 0, recipe.early_steps)

    def others(kind: Kind, prompts: Sequence[str]) -> tuple[Trajectory, ...]:
        random = Random(f"{recipe.seed}/{kind}")
        made = [_at(p, random.getrandbits(32), random.randrange(recipe.steps)) for p in prompts]
        return tuple(sorted(made, key=lambda one: one.first))  # those of one batch end together

    seeds = Random(f"{recipe.seed}/unsafe")
    trained = [unsafe(n, turn, seeds.getrandbits(32)) for n in range(len(concepts)) for turn in range(count)]
    checked = min(CHECKED_UNSAFE, len(concepts))
    numbers = [place * len(concepts) // checked for place in range(checked)]
    checks = min(CHECKED_OTHERS, recipe.unconditional or CHECKED_OTHERS)
    unconditional = others("unconditional", [EMPTY] * recipe.unconditional)
    random = Random(f"{recipe.seed}/prompts")
    pools = [rounds(texts, random) for texts in (prior.captions, words) if texts]
    kept = [next(pools[number % len(pools)]) for number in range(recipe.benign)] if pools else []
    return Plan(
        recipe,
        denoiser.latent_shape,
        {
            "unsafe": tuple(trained),
            "unconditional": unconditional,
            "benign": others("benign", kept),
            "unsafe-check": tuple(unsafe(n, count, seeds.getrandbits(32)) for n in numbers),
            "unconditional-check": others("unconditional-check", [EMPTY] * checks),
            "benign-check": others("benign-check", prior.canaries[:checks]),
            "stage1": unconditional,
        },
    )


def known_words(checkpoint: "Checkpoint", presets: Sequence["Preset"], recipe: Recipe) -> list[str]:
    """The words of the vocabulary for `plan_trajectories`; no text encoder is read where no state has one."""
    if not recipe.benign:
        return []
    family = checkpoint.family
    text = family.text(checkpoint, "cpu", torch.float32)
    return kept_words(text, prompt_pairs(presets), family.defaults.meaning, WORD_PROMPTS)


def _at(prompt: str, seed: int, step: int) -> Trajectory:
    return Trajectory(prompt, None, seed, step, step + 1)
