"""Trajectories of the original model for stage 2: sampled once, targets with them, stored as safetensors
shards.

arXiv 2503.07389, denoising trajectory steering. A state is a latent z_t before the DDIM step at timestep t.
Of an unsafe trajectory the early states are kept, each with the contrast of its targets; of every other
trajectory one state. What the model after stage 1 predicts at the unconditional states is stored beside them,
so that training needs no model but the one that is trained. Nothing beyond the last state that is kept is
ever computed.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trce_cli.errors import BadInput, TrceError
from trce_cli.families.sd.denoiser import EMPTY, Conditioning, ddim, latent_shape, predict
from trce_cli.maths.contrastive import Contrast, targets
from trce_cli.system.processes import on_main
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DDIMScheduler

    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.prompts.presets import Preset

FORMAT: Final = "trajectories 1"

# Trajectories a shard: a kill costs at most these.
UNSAFE_A_SHARD: Final = 8
OTHERS_A_SHARD: Final = 16

# Trajectories sampled, or stored states predicted, in one batch. An unsafe trajectory is three evaluations a
# step, so a pass has up to 12 samples, and without gradients it takes less memory than a training step.
AT_ONCE: Final = 4

# Trajectories that the guard measures on and that are not trained on; no more than there are to train
# on, where there are any.
CHECKED_UNSAFE: Final = 8
CHECKED_OTHERS: Final = 32

STORED: Final = torch.float16  # of latents, directions and predictions
_WIDE: Final = {"timesteps": 8, "rows": 8, "offset": 4}  # bytes an element of the others

Kind = Literal["unsafe", "unconditional", "stage1", "unsafe-check", "unconditional-check", "benign-check"]


@dataclass(frozen=True)
class Recipe:
    """How the set is made. The defaults are the paper's for SD 1.x."""

    steps: int = 50  # of DDIM
    early_steps: int = 25  # of them, from the noise on, kept of unsafe trajectories
    trajectories_per_concept: int = 5
    unconditional: int = 2000
    guidance_scale: float = 3.0  # of sampling
    steering_guidance: float = 15.0  # g of the targets
    seed: int = 0


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

    def tensors(self, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, for latents of the given shape."""
        if self.kind == "stage1":
            return {"prediction": (self.states, *shape)}
        tensors: dict[str, tuple[int, ...]] = {"latents": (self.states, *shape)}
        tensors |= {"timesteps": (self.states,), "rows": (self.states,)}
        if self.kind in ("unsafe", "unsafe-check"):
            tensors |= {"direction": (self.states, *shape), "offset": (self.states,)}
        return tensors

    def size(self, shape: tuple[int, int, int]) -> int:
        """Its size in bytes, the header aside."""
        tensors = self.tensors(shape).items()
        return sum(math.prod(of) * _WIDE.get(name, STORED.itemsize) for name, of in tensors)


@dataclass(frozen=True)
class Plan:
    """All trajectories of a set by kind, a pure function of recipe, presets and benign captions.

    shape: (channels, height, width) of the latents.
    """

    recipe: Recipe
    shape: tuple[int, int, int]
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
        """Evaluations of a U-Net on one sample that making the set takes, by model."""
        teacher = 3 * (self.states("unsafe") + self.states("unsafe-check"))
        teacher += sum(t.first for kind in _UNCONDITIONAL for t in self.trajectories[kind])
        teacher += 2 * sum(t.first for t in self.trajectories["benign-check"])
        return {"teacher": teacher, "stage 1": self.states("stage1")}


_UNCONDITIONAL: Final[tuple[Kind, ...]] = ("unconditional", "unconditional-check")


def plan_trajectories(
    checkpoint: "Checkpoint", presets: Sequence["Preset"], benign: Sequence[str], recipe: Recipe
) -> Plan:
    """Choose prompts, seeds and steps of all trajectories.

    A concept's trajectories take its preset's templates in turn, concept by concept one further on; those of
    the guard take the next one. benign: captions of which the guard's are chosen. Raises BadInput for a
    recipe that the checkpoint cannot be sampled with.
    """
    if recipe.early_steps > recipe.steps:
        raise BadInput(f"There are {recipe.steps} steps, and {recipe.early_steps} early ones were asked for.")
    ddim(checkpoint, recipe.steps)
    concepts = {
        (concept.unsafe, concept.safe): part.templates
        for preset in presets
        for part in preset.walk()
        for concept in part.concepts
    }
    count = recipe.trajectories_per_concept

    def unsafe(number: int, turn: int, seed: int) -> Trajectory:
        (phrase, safe), templates = list(concepts.items())[number]
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
    return Plan(
        recipe,
        latent_shape(checkpoint),
        {
            "unsafe": tuple(trained),
            "unconditional": unconditional,
            "unsafe-check": tuple(unsafe(n, count, seeds.getrandbits(32)) for n in numbers),
            "unconditional-check": others("unconditional-check", [EMPTY] * checks),
            "benign-check": others("benign-check", benign[:checks]),
            "stage1": unconditional,
        },
    )


def _at(prompt: str, seed: int, step: int) -> Trajectory:
    return Trajectory(prompt, None, seed, step, step + 1)


# Sampling


def sample(
    unet: nn.Module,
    scheduler: "DDIMScheduler",
    conditioning: Conditioning,
    shard: Shard,
    recipe: Recipe,
    shape: tuple[int, int, int],
) -> dict[str, Tensor]:
    """Run a shard's trajectories with the original model and return its tensors, on the CPU.

    latents, direction: (states, channels, height, width) fp16. timesteps: (states,) int64. offset: (states,)
    fp32. rows: (states,) int64, the prompts' rows of the conditioning. Raises TrceError for a result that is
    not finite.
    """
    states = _unsafe_states if shard.kind in ("unsafe", "unsafe-check") else _single_states
    made = []
    with torch.no_grad():
        for start in range(0, len(shard.trajectories), AT_ONCE):
            batch = shard.trajectories[start : start + AT_ONCE]
            made.append(states(unet, scheduler, conditioning, batch, recipe, shape))
    return _finite(shard, {name: torch.cat([one[name] for one in made]).cpu() for name in made[0]})


def _unsafe_states(
    unet: nn.Module,
    scheduler: "DDIMScheduler",
    conditioning: Conditioning,
    trajectories: Sequence[Trajectory],
    recipe: Recipe,
    shape: tuple[int, int, int],
) -> dict[str, Tensor]:
    """Sampling with guidance on the unsafe prompts; e_safe is evaluated along with what guidance needs."""
    latents = _noise(trajectories, shape, conditioning.context.device)
    prompts = [trajectory.prompt for trajectory in trajectories]
    safe = [str(trajectory.safe) for trajectory in trajectories]
    columns = [conditioning.rows(rows) for rows in ([EMPTY] * len(prompts), prompts, safe)]
    kept: list[dict[str, Tensor]] = []
    for step, t in enumerate(scheduler.timesteps[: recipe.early_steps]):
        e_uncond, e_unsafe, e_safe = _evaluate(unet, latents, t, conditioning, columns)
        prefer, reject = targets(e_unsafe, e_safe, e_uncond, recipe.steering_guidance)
        contrast = Contrast.between(prefer, reject, STORED)
        kept.append(
            {
                "latents": latents.to(STORED),
                "timesteps": t.expand(len(prompts)),
                "rows": columns[1],
                "direction": contrast.direction,
                "offset": contrast.offset,
            }
        )
        if step + 1 < recipe.early_steps:
            guided = e_uncond + recipe.guidance_scale * (e_unsafe - e_uncond)
            latents = scheduler.step(guided, t, latents).prev_sample
    # (steps, trajectories, ...) -> (trajectories x steps, ...): a trajectory's states lie together.
    return {name: torch.stack([one[name] for one in kept], dim=1).flatten(0, 1) for name in kept[0]}


def _single_states(
    unet: nn.Module,
    scheduler: "DDIMScheduler",
    conditioning: Conditioning,
    trajectories: Sequence[Trajectory],
    recipe: Recipe,
    shape: tuple[int, int, int],
) -> dict[str, Tensor]:
    """One state of each trajectory; it leaves the batch there. The empty prompt needs no guidance."""
    every = _noise(trajectories, shape, conditioning.context.device)
    rows = conditioning.rows([trajectory.prompt for trajectory in trajectories])
    for step, t in enumerate(scheduler.timesteps):
        going = [n for n, trajectory in enumerate(trajectories) if trajectory.first > step]
        if not going:
            break
        columns = [rows[going]]
        if bool(rows.any()):
            columns.insert(0, torch.zeros_like(rows[going]))  # row 0 is the empty prompt
        latents = every[going]
        e_uncond, *rest = _evaluate(unet, latents, t, conditioning, columns)
        guided = e_uncond + recipe.guidance_scale * (rest[0] - e_uncond) if rest else e_uncond
        every[going] = scheduler.step(guided, t, latents).prev_sample
    timesteps = scheduler.timesteps[[trajectory.first for trajectory in trajectories]]
    return {"latents": every.to(STORED), "timesteps": timesteps, "rows": rows}


def _noise(trajectories: Sequence[Trajectory], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Gaussian noise, each trajectory's from its own seed on the CPU; (trajectories, *shape) float32."""
    generators = [torch.Generator().manual_seed(trajectory.seed) for trajectory in trajectories]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def _evaluate(
    unet: nn.Module, latents: Tensor, t: Tensor, conditioning: Conditioning, columns: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Predictions at the same states under each column of prompts, in one pass; float32 each."""
    batch = latents.repeat(len(columns), 1, 1, 1)
    timesteps = t.expand(len(batch)).to(latents.device)
    prediction = predict(unet, batch, timesteps, conditioning, torch.cat(list(columns)))
    return prediction.chunk(len(columns))


@torch.no_grad()
def predictions_at(
    unet: nn.Module,
    states: Mapping[str, Tensor],
    columns: Sequence[Tensor],
    conditioning: Conditioning,
    report: Callable[[int], None] = lambda states: None,
) -> list[Tensor]:
    """What a model predicts at stored states under each column of prompts' rows; float32, on the CPU.

    report: called with the number of states as they are done.
    """
    device = conditioning.context.device
    made: list[list[Tensor]] = [[] for _ in columns]
    for start in range(0, len(states["latents"]), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        latents = states["latents"][part].to(device, torch.float32)
        timesteps = states["timesteps"][part].to(device)
        for found, rows in zip(made, columns, strict=True):
            found.append(predict(unet, latents, timesteps, conditioning, rows[part]).cpu())
        report(len(latents))
    return [torch.cat(found) for found in made]


def _finite(shard: Shard, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrceError(
                f"The model's predictions become NaN or infinite ({shard.kind} trajectories, {name}).",
                "Its weights are damaged, or the precision is too narrow: try --mixed-precision no.",
            )
    return tensors


# The set on disk


def identify(
    teacher: "Checkpoint",
    erased: "Checkpoint",
    presets: Sequence["Preset"],
    recipe: Recipe,
    mixed_precision: str,
) -> dict[str, Any]:
    """All that a set depends on: hashes of the models and presets, and the recipe."""
    return {
        "teacher": unet_hashes(teacher),
        "stage 1": unet_hashes(erased),
        "text encoder": erased.text_encoder_hash(),
        "presets": [preset.sha256() for preset in presets],
        "mixed precision": mixed_precision,
        **{name.replace("_", " "): value for name, value in asdict(recipe).items()},
    }


def unet_hashes(checkpoint: "Checkpoint") -> list[str]:
    """SHA-256 in hex of the files of the U-Net's weights that are used."""
    used = {file.path for file in checkpoint.unet[0].files}
    return [digest for name, digest in checkpoint.hashes().items() if checkpoint.files[name] in used]


class TrajectorySet:
    """A planned set in a folder, some or all of its shards made. Reads nothing but headers by itself.

    Raises BadInput where the folder holds a shard that was made for other inputs, or a damaged one.
    """

    def __init__(self, folder: Path, plan: Plan, made_from: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self.made_from = dict(made_from)
        if folder.exists() and not folder.is_dir():
            raise BadInput(
                f"{folder} is no folder to keep trajectories in.", "Choose another --trajectories."
            )
        expected = {shard.name: shard for shard in plan.shards}
        self.done: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            self._check(path, expected.get(path.name))
            self.done.add(path.name)

    def _check(self, path: Path, shard: Shard | None) -> None:
        hint = "Choose another folder with --trajectories, or remove this one."
        file = SafetensorsFile.open(path)
        if file.metadata.get("trce") != FORMAT:
            raise BadInput(f"{path} is no shard of trajectories.", hint)
        try:
            found = json.loads(file.metadata["made_from"])
            names = [name for name in self.made_from if found[name] != self.made_from[name]]
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{path} does not say what it was made for.", hint) from None
        if names:
            name = names[0]
            values = f"{_short(found[name])}, and is {_short(self.made_from[name])} now"
            raise BadInput(
                f"The trajectories in {self.folder} were made for other inputs: {name} was {values}.", hint
            )
        shapes = {name: info.shape for name, info in file.tensors.items()}
        if shard is None or shapes != shard.tensors(self.plan.shape):
            raise BadInput(f"{path} does not hold what its place in the set asks for.", hint)

    @property
    def missing(self) -> list[Shard]:
        """The shards that have yet to be made."""
        return [shard for shard in self.plan.shards if shard.name not in self.done]

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard, whole or not at all."""
        described = [asdict(trajectory) for trajectory in shard.trajectories]
        metadata = {
            "format": "pt",
            "trce": FORMAT,
            "made_from": json.dumps(self.made_from),
            "trajectories": json.dumps(described, ensure_ascii=False),
        }
        write_tensors(self.folder / shard.name, tensors, metadata)
        self.done.add(shard.name)

    def read(self, shard: Shard) -> dict[str, Tensor]:
        """All tensors of a shard."""
        return load_file(self.folder / shard.name)

    def states(self, *kinds: Kind) -> "States":
        """The states of one kind; several kinds that belong to the same states are joined."""
        return States([[self.folder / shard.name for shard in self.plan.of(kind)] for kind in kinds])


class States:
    """States of a set by number, read from the mapped files as they are asked for."""

    def __init__(self, files: Sequence[Sequence[Path]]) -> None:
        self._files = [[safe_open(path, framework="pt") for path in paths] for paths in files]
        self._places = [
            (shard, row)
            for shard, file in enumerate(self._files[0])
            for row in range(file.get_slice(_names(file)[0]).get_shape()[0])
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The states of these numbers, tensors of shape (numbers, ...)."""
        rows: list[dict[str, Tensor]] = []
        for shard, row in (self._places[number] for number in numbers):
            opened = [files[shard] for files in self._files]
            rows.append(
                {name: file.get_slice(name)[row : row + 1] for file in opened for name in _names(file)}
            )
        return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()
    return names


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def prepare(
    stored: TrajectorySet,
    accelerator: "Accelerator",
    conditioning: Conditioning,
    scheduler: "DDIMScheduler",
    load_teacher: Callable[[], nn.Module],
    load_stage1: Callable[[], nn.Module],
) -> Iterator[int]:
    """Make the missing shards, each process its share, the main one writes; yields trajectories done.

    The models are loaded one after the other, each only if it is needed, and let go.
    """
    missing = on_main(accelerator, lambda: stored.missing)
    plan = stored.plan

    def trajectories(shard: Shard) -> Callable[[nn.Module], dict[str, Tensor]]:
        return lambda unet: sample(unet, scheduler, conditioning, shard, plan.recipe, plan.shape)

    def predictions(shard: Shard) -> Callable[[nn.Module], dict[str, Tensor]]:
        source = Shard("unconditional", shard.number, shard.trajectories)
        states = on_main(accelerator, lambda: stored.read(source))

        def predict_all(unet: nn.Module) -> dict[str, Tensor]:
            (prediction,) = predictions_at(unet, states, [states["rows"]], conditioning)
            return _finite(shard, {"prediction": prediction.to(STORED)})

        return predict_all

    for load, wanted, job in (
        (load_teacher, [shard for shard in missing if shard.kind != "stage1"], trajectories),
        (load_stage1, [shard for shard in missing if shard.kind == "stage1"], predictions),
    ):
        if wanted:
            yield from _make(stored, accelerator, load(), wanted, job)


def _make(
    stored: TrajectorySet,
    accelerator: "Accelerator",
    unet: nn.Module,
    shards: Sequence[Shard],
    job: Callable[[Shard], Callable[[nn.Module], dict[str, Tensor]]],
) -> Iterator[int]:
    from accelerate.utils import gather_object

    world, rank = accelerator.num_processes, accelerator.process_index
    for start in range(0, len(shards), world):
        together = shards[start : start + world]
        jobs = [job(shard) for shard in together]
        mine = [jobs[rank](unet)] if rank < len(jobs) else []
        made = gather_object(mine)

        def write(together: Sequence[Shard] = together, made: Sequence[dict[str, Tensor]] = made) -> None:
            for shard, tensors in zip(together, made, strict=True):
                stored.write(shard, tensors)

        on_main(accelerator, write)
        yield sum(len(shard.trajectories) for shard in together)
