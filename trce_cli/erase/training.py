"""The loop of stage 2, a generator that yields a record a step, and its loss.

The only model in memory while it runs is the one in training: targets and the predictions to hold on to come
from a set of trajectories.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Training
from trce_cli.erase.trajectories import Kind, Plan
from trce_cli.erase.trajectory_set import States
from trce_cli.errors import TrceError
from trce_cli.maths.contrastive import Contrast, contrastive_loss, regulariser
from trce_cli.system.processes import on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

WARM_UP: Final = 0.05  # of the steps, over which the learning rate rises; a usual share
MAX_NORM: Final = 1.0  # norm of the gradient, diffusers' training scripts' value
# The states of a batch by name, and the kinds of shards that they lie in.
SOURCES: Final[Mapping[str, tuple[Kind, ...]]] = {
    "unsafe": ("unsafe",),
    "unconditional": ("unconditional", "stage1"),
    "benign": ("benign",),
}
SKIPS: Final = 20  # steps in a row that fp16's loss scaling may skip while it finds its scale


def tuned(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights in training, by name."""
    return {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}


class Losses(NamedTuple):
    """The parts of the loss, a value a state: of unsafe states the contrastive loss and where predictions lie
    between reject and prefer, of unconditional and of benign ones what holds them.

    Without states to hold a part is 0.
    """

    contrast: Tensor
    position: Tensor
    regulariser: Tensor
    retention: Tensor


def train(
    accelerator: "Accelerator",
    predict: Predictor,
    optimizer: Any,
    sources: Mapping[str, States | None],
    plan: Plan,
    training: Training,
    start: int = 0,
) -> Iterator[dict[str, Any]]:
    """The loop: one batched forward and backward a step, on [unsafe states x {prompt, empty}] + [held
    states].

    predict, optimizer: as Accelerate prepared them. sources: by the names of `SOURCES`, in the main process
    the states, with their targets or with the predictions that they are held to; None where there are none.
    Yields a record after each step: its number counted from 1, loss and its parts (contrast, regulariser and
    retention, unweighted), the share of unsafe states with a loss (active), where predictions lie between
    reject and prefer (position), learning rate, gradient norm before clipping (None where fp16's scaling
    skipped the step), seconds. Raises TrceError as soon as loss or gradient is not finite; that step is not
    made.
    """
    counts = {name: plan.states(kinds[0]) for name, kinds in SOURCES.items()}
    total, size = training.steps_over(counts["unsafe"]), training.batch_size
    share = size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    parameters = list(tuned(predict.module).values())
    skipped = 0
    for step in range(start, total):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, total)

        def read(step: int = step) -> dict[str, dict[str, Tensor]]:
            return {
                name: states[order(counts[name], size, step, f"{training.seed}/{name}")]
                for name, states in sources.items()
                if states is not None
            }

        batch = {
            name: {key: tensor[mine].to(accelerator.device) for key, tensor in states.items()}
            for name, states in on_main(accelerator, read).items()
        }
        found = losses(predict, batch, training.margin)
        means = [part.mean() for part in found]
        # Every process has the same share of the batch, so the mean over processes is that over the batch.
        accelerator.backward(weighted(means, training))
        norm = float(accelerator.clip_grad_norm_(parameters, MAX_NORM))
        parts = torch.stack([*means, (found.contrast > 0).float().mean()]).detach()
        *reduced, active = accelerator.reduce(parts, "mean").tolist()
        contrast, position, kept, retained = reduced
        loss = weighted(reduced, training)
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if not math.isfinite(loss) or skipped > (SKIPS if training.mixed_precision == "fp16" else 0):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise TrceError(
                f"The {what} is not finite at step {step + 1} of {total}, so training stopped.",
                "The last good state is kept; begin again with a lower --lr and --force (trajectories stay).",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {
            "step": step + 1,
            "loss": loss,
            "contrast": contrast,
            "regulariser": kept,
            "retention": retained,
            "active": active,
            "position": position,
            "lr": learning_rate(training, step, total),
            "gradient_norm": norm if math.isfinite(norm) else None,  # fp16 skips the step
            "seconds": time.perf_counter() - began,
        }


def losses(predict: Predictor, batch: Mapping[str, Mapping[str, Tensor]], margin: float) -> Losses:
    """The parts of the loss of a batch, in one pass.

    batch: by the names of `SOURCES`; unsafe states have latents, timesteps, rows, direction and offset, the
    others, which may be missing, a prediction in place of the last two.
    """
    unsafe, held = batch["unsafe"], [name for name in ("unconditional", "benign") if name in batch]
    parts = [unsafe, unsafe, *(batch[name] for name in held)]
    latents, timesteps = (torch.cat([part[name] for part in parts]) for name in ("latents", "timesteps"))
    rows = [part["rows"] for part in parts]
    rows[1] = torch.zeros_like(rows[1])  # row 0 is the empty prompt
    prediction = predict(latents.float(), timesteps, torch.cat(rows))
    prompted, empty, *rest = prediction.split([len(part["latents"]) for part in parts])
    contrast = Contrast(unsafe["direction"], unsafe["offset"])
    loss = contrastive_loss(prompted, empty, contrast, margin)
    kept = {name: regulariser(p, batch[name]["prediction"]) for name, p in zip(held, rest, strict=True)}
    none = torch.zeros_like(loss)
    return Losses(
        loss, contrast.position(prompted), kept.get("unconditional", none), kept.get("benign", none)
    )


def weighted(parts: Sequence[Any], training: Training) -> Any:
    """The loss of parts in the order of `Losses`."""
    contrast, _, kept, retained = parts
    return contrast + training.regularisation * kept + training.retention * retained


def learning_rate(training: Training, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant."""
    return training.lr * min(1.0, (step + 1) / max(1, round(WARM_UP * total)))


def order(count: int, size: int, step: int, seed: str) -> list[int]:
    """The states of a step's batch: epochs of all `count`, each shuffled anew, cut into batches of `size`.

    A function of its arguments alone, so that a run that goes on sees what an undisturbed one would have
    seen.
    """
    places = range(step * size, (step + 1) * size)
    return [_shuffled(count, f"{seed}/{place // count}")[place % count] for place in places]


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: str) -> list[int]:
    numbers = list(range(count))
    Random(seed).shuffle(numbers)
    return numbers
