"""The loop of stage 2, a generator that yields a record a step, and its loss.

The only model in memory while it runs is the one in training: targets and the predictions to hold on to come
from a set of trajectories.
"""

import math
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Training
from trce_cli.erase.trajectories import Plan
from trce_cli.erase.trajectory_set import States
from trce_cli.errors import TrceError
from trce_cli.maths.contrastive import Contrast, contrastive_loss, regulariser
from trce_cli.system.processes import on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

WARM_UP: Final = 0.05  # of the steps, over which the learning rate rises; a usual share
MAX_NORM: Final = 1.0  # norm of the gradient, diffusers' training scripts' value
SKIPS: Final = 20  # steps in a row that fp16's loss scaling may skip while it finds its scale


def tuned(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights in training, by name."""
    return {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}


def train(
    accelerator: "Accelerator",
    predict: Predictor,
    optimizer: Any,
    unsafe: States | None,
    held: States | None,
    plan: Plan,
    training: Training,
    start: int = 0,
) -> Iterator[dict[str, Any]]:
    """The loop: one batched forward and backward a step, on [unsafe states x {prompt, empty}] + [held
    states].

    predict, optimizer: as Accelerate prepared them. unsafe, held: in the main process, the states with their
    targets and the unconditional states with stage 1's predictions. Yields a record after each step: its
    number counted from 1, loss and its parts (contrast and regulariser, unweighted), the share of unsafe
    states with a loss (active), where predictions lie between reject and prefer (position), learning rate,
    gradient norm before clipping (None where fp16's scaling skipped the step), seconds. Raises TrceError as
    soon as loss or gradient is not finite; that step is not made.
    """
    counts = {"unsafe": plan.states("unsafe"), "held": plan.states("unconditional")}
    total, size = training.steps_over(counts["unsafe"]), training.batch_size
    share = size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    parameters = list(tuned(predict.module).values())
    skipped = 0
    for step in range(start, total):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, total)

        def read(step: int = step) -> list[dict[str, Tensor]]:
            sources = {"unsafe": unsafe, "held": held}
            return [
                states[order(counts[name], size, step, f"{training.seed}/{name}")]
                for name, states in sources.items()
                if states is not None
            ]

        batch = [
            {name: tensor[mine].to(accelerator.device) for name, tensor in states.items()}
            for states in on_main(accelerator, read)
        ]
        contrast, position, kept = losses(
            predict, batch[0], batch[1] if len(batch) > 1 else None, training.margin
        )
        # Every process has the same share of the batch, so the mean over processes is that over the batch.
        accelerator.backward(contrast.mean() + training.regularisation * kept.mean())
        norm = float(accelerator.clip_grad_norm_(parameters, MAX_NORM))
        parts = torch.stack(
            [contrast.mean(), kept.mean(), (contrast > 0).float().mean(), position.mean()]
        ).detach()
        contrast_mean, kept_mean, active, place = accelerator.reduce(parts, "mean").tolist()
        loss = contrast_mean + training.regularisation * kept_mean
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
            "contrast": contrast_mean,
            "regulariser": kept_mean,
            "active": active,
            "position": place,
            "lr": learning_rate(training, step, total),
            "gradient_norm": norm if math.isfinite(norm) else None,  # fp16 skips the step
            "seconds": time.perf_counter() - began,
        }


def losses(
    predict: Predictor,
    unsafe: Mapping[str, Tensor],
    held: Mapping[str, Tensor] | None,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(contrastive loss, position) of each unsafe state and the regulariser of each held one, in one pass.

    unsafe: latents, timesteps, rows, direction, offset. held: latents, timesteps, rows, prediction; none
    counts as a regulariser of 0.
    """
    parts = [unsafe, unsafe] if held is None else [unsafe, unsafe, held]
    latents, timesteps = (torch.cat([part[name] for part in parts]) for name in ("latents", "timesteps"))
    rows = [
        unsafe["rows"],
        *(torch.zeros_like(part["rows"]) for part in parts[1:]),
    ]  # row 0 is the empty prompt
    prediction = predict(latents.float(), timesteps, torch.cat(rows))
    prompted, empty, *rest = prediction.split([len(part["latents"]) for part in parts])
    contrast = Contrast(unsafe["direction"], unsafe["offset"])
    loss = contrastive_loss(prompted, empty, contrast, margin)
    kept = regulariser(rest[0], held["prediction"]) if held is not None else torch.zeros_like(loss)
    return loss, contrast.position(prompted), kept


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
