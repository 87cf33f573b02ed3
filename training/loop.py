"""One resumable, seeded, data-parallel training loop for every stage."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trce_cli.erase import training_state

SAVE_EVERY = 90.0  # seconds: what a kill can cost
RECORD = 25  # steps a line of the log


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage; ``batch_size`` is summed over the processes."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.01
    warmup: int = 200
    decay: float = 0.4  # last share of the steps, over which the learning rate falls to zero
    ema: float = 0.999
    seed: int = 0
    muon: tuple[str, ...] = ()  # parts of the names of the matrices that Muon trains; AdamW trains the rest


class Task(Protocol):
    """What a stage trains."""

    @property
    def name(self) -> str: ...

    @property
    def recipe(self) -> Recipe: ...

    def build(self) -> nn.Module: ...

    def loss(self, model: nn.Module, count: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Loss on ``count`` samples that depend on ``seed`` alone."""
        ...


def learning_rate(recipe: Recipe, step: int) -> float:
    """Warm up, hold, fall linearly to zero."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup, left)


def trained(task: Task, work: Path) -> nn.Module:
    """The model with the moving average of its weights: of the whole run, or of what there is so far."""
    model = task.build()
    done, state = work / f"{task.name}.safetensors", work / f"{task.name}.state.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
    else:
        kept = load_file(state)
        named = [name for name, p in model.named_parameters() if p.requires_grad]
        average = {name: kept[f"average.{index}"] for index, name in enumerate(named)}
        model.load_state_dict({name: kept[f"model.{name}"] for name in model.state_dict()} | average)
    return model.eval().requires_grad_(False)


def fit(task: Task, work: Path, processes: int) -> Path:
    """Train in ``processes`` processes of one thread each, from where a killed run stopped.

    Returns the path of the weights. The file holds the moving average of the weights, which is what is used.
    """
    done = work / f"{task.name}.safetensors"
    if not done.exists():
        rendezvous = work / f"{task.name}.rendezvous"
        rendezvous.unlink(missing_ok=True)
        torch.multiprocessing.spawn(_worker, (processes, task, work, str(rendezvous)), nprocs=processes)
    return done


def _worker(rank: int, world: int, task: Task, work: Path, rendezvous: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    with (work / f"{task.name}.jsonl").open("a") as log:
        for record in _steps(task, work, rank, world):
            if rank == 0:
                log.write(json.dumps(record) + "\n")
                log.flush()
    dist.destroy_process_group()


def _steps(task: Task, work: Path, rank: int, world: int) -> Iterator[dict[str, float]]:
    recipe = task.recipe
    torch.manual_seed(recipe.seed)
    model = task.build().train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    average = [p.detach().clone() for p in parameters]
    matrices = [p for name, p in named.items() if p.ndim == 2 and any(part in name for part in recipe.muon)]
    orthogonal = {id(p) for p in matrices}
    optimizer = torch.optim.AdamW(
        [p for p in parameters if id(p) not in orthogonal],
        recipe.lr,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    state = work / f"{task.name}.state.safetensors"
    kept = {f"model.{key}": value for key, value in model.state_dict().items()}
    kept |= {f"average.{index}": value for index, value in enumerate(average)}
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    if matrices:
        muon = torch.optim.Muon(
            matrices, recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        for index, p in enumerate(matrices):  # made here, so that it is kept and restored with the weights
            momentum = muon.state[p]["momentum_buffer"] = torch.zeros_like(p)
            kept[f"muon.{index}"] = momentum
        optimizers.append(muon)
    start = training_state.load(state, kept, optimizer)[0] if state.exists() else 0
    saved = began = time.monotonic()
    totals: dict[str, float] = {}
    for step in range(start, recipe.steps):
        for each in optimizers:
            each.zero_grad(set_to_none=True)
            for group in each.param_groups:
                group["lr"] = learning_rate(recipe, step)
        loss, parts = task.loss(model, recipe.batch_size // world, hash((recipe.seed, step, rank)) % 2**31)
        loss.backward()
        gradients = torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters]
        )
        dist.all_reduce(gradients)
        gradients /= world
        gradients *= min(1.0, 1.0 / (float(gradients.norm()) + 1e-6))
        for p, g in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        for each in optimizers:
            each.step()
        inertia = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - inertia)
        for key, value in {"loss": float(loss.detach()), **parts}.items():
            totals[key] = totals.get(key, 0.0) + value / RECORD
        if (step + 1) % RECORD == 0:
            yield {"step": step + 1, **totals, "seconds": time.monotonic() - began}
            totals = {}
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY:
            training_state.save(state, step + 1, kept, optimizer)
            saved = time.monotonic()
    if rank == 0:
        with torch.no_grad():
            for p, a in zip(parameters, average, strict=True):
                p.copy_(a)
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, work / f"{task.name}.safetensors"
        )
        state.unlink(missing_ok=True)
