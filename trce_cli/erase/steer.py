"""Stage 2: fine-tune the visual attention on early denoising steps, resumably, on one process or many.

arXiv 2503.07389, denoising trajectory steering. `steer` is the whole stage; `train` is the loop, a generator
that yields a record a step. The only model in memory while it runs is the one in training: targets and the
predictions to hold on to come from a `TrajectorySet`.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.provenance import history, record
from trce_cli.edits.edit import Made
from trce_cli.edits.outputs import Outputs, choose_outputs, total_bytes, write_outputs
from trce_cli.erase.steer_guard import CHECKED, guard, guard_evaluations, weight_change
from trce_cli.erase.trajectories import Kind, Plan, Recipe, States, TrajectorySet, identify, prepare
from trce_cli.erase.working_folder import LOG, WorkingFolder
from trce_cli.errors import BadInput, TrceError, first_line
from trce_cli.families.sd.denoiser import (
    Conditioning,
    check_finite,
    check_same_model,
    ddim,
    encode,
    is_trainable,
    load_unet,
    predict,
    trainable,
)
from trce_cli.maths.contrastive import Contrast, contrastive_loss, regulariser
from trce_cli.prompts.presets import Preset, SteerSettings
from trce_cli.system.processes import PATIENCE, on_main
from trce_cli.system.whole import write_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_EVERY: float = 120  # seconds between two training states: what a kill can cost
WARM_UP: Final = 0.05  # of the steps, over which the learning rate rises; a usual share
CLIP: Final = 1.0  # norm of the gradient, diffusers' training scripts' value
SKIPS: Final = 20  # steps in a row that fp16's loss scaling may skip while it finds its scale

CURVES: Final = "loss.png"

Report = Callable[..., None]  # called with the number of items done, and a word on how it goes
Stage = Callable[[str, int | None, str], Report]  # text, total, unit


@dataclass(frozen=True)
class Training:
    """How to train. The defaults are the paper's for SD 1.x; `batch_size` is summed over the processes.

    The loop ends after `epochs` passes over the unsafe states or after `max_steps`, whichever comes first.
    """

    margin: float = 0.01
    regularisation: float = 100.0  # weight of the regulariser
    lr: float = 1e-6
    epochs: int | None = 3
    max_steps: int | None = None
    batch_size: int = 4  # unsafe states a step, and as many unconditional ones
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    def steps(self, states: int) -> int:
        """The number of optimisation steps over this many unsafe states."""
        limits = [self.max_steps] if self.max_steps is not None else []
        limits += [math.ceil(self.epochs * states / self.batch_size)] if self.epochs is not None else []
        return min(limits)


def choose(given: Mapping[str, Any], recommended: SteerSettings) -> tuple[Recipe, Training]:
    """What the user gave (None: not given), else what the presets recommend, else the defaults.

    A recommendation that hangs on a setting the user changed is dropped: early steps on the number of steps,
    and epochs and maximal steps on each other. Raises BadInput for numbers that make no sense.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    advice = recommended.model_dump(exclude_none=True)
    for name, other in (("steps", "early_steps"), ("epochs", "max_steps"), ("max_steps", "epochs")):
        if name in chosen:
            advice.pop(other, None)
    settings = advice | chosen
    if "max_steps" in settings:
        settings.setdefault("epochs", None)
    if "steps" in settings:
        settings.setdefault("early_steps", math.ceil(settings["steps"] / 2))
    for name, value in settings.items():
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise BadInput(f"--{name.replace('_', '-')} must be finite and at least 0, not {value:g}.")
    if settings.get("lr") == 0:
        raise BadInput("--lr must be greater than 0: nothing would be learnt.")
    names = Recipe.__dataclass_fields__
    recipe = Recipe(**{name: value for name, value in settings.items() if name in names})
    if recipe.early_steps > recipe.steps:
        raise BadInput(
            f"--early-steps is {recipe.early_steps}, more than the {recipe.steps} steps there are."
        )
    fields = Training.__dataclass_fields__
    return recipe, Training(**{name: value for name, value in settings.items() if name in fields})


def make_accelerator(
    device: torch.device, mixed_precision: str, log_with: str | None = None, logs: Path | None = None
) -> "Accelerator":
    """Accelerate on the device of `--device`; under `accelerate launch` each process takes its own."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    if mixed_precision == "fp16" and device.type == "cpu":
        raise BadInput("Mixed precision fp16 needs a GPU.", "Use --mixed-precision bf16 or no on the CPU.")
    if device.type == "cuda" and device.index is not None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise BadInput(
                f"{device} is one device, and several processes were started.", "Use --device cuda."
            )
        torch.cuda.set_device(device)
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=mixed_precision,
            log_with=log_with,
            project_dir=logs,
            # Every step is one batch, whatever the user's configuration of Accelerate says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except (ValueError, ImportError) as error:
        raise BadInput(f"Accelerate refuses these settings: {first_line(error)}") from error


def estimate(erased: Checkpoint, plan: Plan, training: Training, outputs: Outputs) -> dict[str, Any]:
    """What a run takes: states, evaluations of a U-Net on one sample, memory and disk in bytes.

    Memory is that of weights, gradients and optimizer; activations come on top, with the batch.
    """
    steps = training.steps(plan.states("unsafe"))
    samples = (3 if plan.states("unconditional") else 2) * training.batch_size
    sizes = {key: math.prod(erased.shape(key)) for key in erased.unet[0].tensors}
    tuned = sum(size for key, size in sizes.items() if is_trainable(key))
    frozen = sum(sizes.values()) - tuned
    state = 12 * tuned  # weights and two moments in fp32
    return {
        "concepts": len(plan.trajectories["unsafe"]) // plan.recipe.trajectories_per_concept,
        "trajectories": len(plan.trajectories["unsafe"]) + len(plan.trajectories["unconditional"]),
        "unsafe_states": plan.states("unsafe"),
        "unconditional_states": plan.states("unconditional"),
        "evaluations": {**plan.evaluations, "training": steps * samples, "guard": guard_evaluations(plan)},
        "steps": steps,
        "tuned_weights": tuned,
        "frozen_weights": frozen,
        "memory_bytes": frozen * (4 if training.mixed_precision == "no" else 2) + 16 * tuned,
        "trajectory_bytes": plan.total_bytes,
        "state_bytes": state,
        "output_bytes": sum(outputs.needed_bytes(erased).values()),
    }


def steer(
    erased: Checkpoint,
    teacher: Checkpoint,
    presets: Sequence[Preset],
    plan: Plan,
    training: Training,
    output: Path,
    accelerator: "Accelerator",
    trajectories: Path | None = None,
    gradient_checkpointing: bool = False,
    max_drift: float = 0.2,
    force: bool = False,
    outputs: Outputs | None = None,
    stage: Stage = lambda text, total, unit: lambda *done: None,
) -> dict[str, Any]:
    """Prepare, train, measure and write `output`; returns the entry that was added to its history.

    outputs: what to write and where, else `output` as a checkpoint in the layout of `erased`. A LoRA among
    them is for the teacher, of both stages; its figures are returned as `lora` beside the entry.

    Killed at any moment and called again with the same arguments, it goes on where it was. Only the main
    process touches files. Raises BadInput and TrceError, in the end also where the model drifted more than
    `max_drift`.
    """
    began = time.perf_counter()
    if training.batch_size % accelerator.num_processes:
        raise BadInput(
            f"A batch of {training.batch_size} cannot be shared by {accelerator.num_processes} processes.",
            f"Use a --batch-size that is a multiple of {accelerator.num_processes}.",
        )
    check_same_model(teacher, erased)
    stage("Reading checkpoints", None, "")

    def read() -> dict[str, Any]:
        for checkpoint in [erased] if teacher is erased else [teacher, erased]:
            check_finite(checkpoint)  # now, and not after hours with the other one
        return identify(teacher, erased, presets, plan.recipe, training.mixed_precision)

    made_from = on_main(accelerator, read)
    chosen = outputs or choose_outputs(erased, output, None, force=force)
    work = WorkingFolder(output, chosen, made_from, asdict(training))
    with work.claimed(accelerator, erased, plan, trajectories, force) as stored:
        conditioning = encode(erased, plan.prompts, accelerator.device)
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[training.mixed_precision]
        load = partial(load_unet, device=accelerator.device, dtype=dtype)
        total = on_main(accelerator, lambda: sum(len(shard.trajectories) for shard in stored.missing))
        if total:
            report = stage("Preparing", total, "trajectories")
            scheduler = ddim(teacher, plan.recipe.steps)
            for done in prepare(
                stored, accelerator, conditioning, scheduler, lambda: load(teacher), lambda: load(erased)
            ):
                report(done)
        model = load(erased, train=True)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        _fit(accelerator, model, stored, conditioning, training, work, stage)
        entry: dict[str, Any] = on_main(
            accelerator,
            lambda: _finish(
                accelerator, model, erased, teacher, presets, stored, conditioning, training, work,
                max_drift, began, stage,
            ),
        )  # fmt: skip
    return entry


# Training


def _fit(
    accelerator: "Accelerator",
    model: nn.Module,
    stored: TrajectorySet,
    conditioning: Conditioning,
    training: Training,
    work: WorkingFolder,
    stage: Stage,
) -> None:
    """Train to the end from where the working folder's state is, and keep state and log there."""
    # The parameters and not their data, which DistributedDataParallel moves.
    weights = {f"weights/{key}": parameter for key, parameter in trainable(model).items()}
    # No weight decay: the regulariser holds predictions, and nothing should pull weights away from stage 1's.
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=training.lr, weight_decay=0.0)
    start = on_main(accelerator, lambda: work.load(weights, optimizer, accelerator.scaler))
    if accelerator.num_processes > 1 and start:
        _share(accelerator, optimizer)
    model, prepared = accelerator.prepare(model, optimizer)
    total = training.steps(stored.plan.states("unsafe"))
    report = stage("Training", total, "steps")
    report(start)
    saved = time.monotonic()
    unsafe, held = (
        _open(accelerator, stored, *kinds) for kinds in (("unsafe",), ("unconditional", "stage1"))
    )
    with work.log(accelerator, start) as log:

        def keep(entry: Mapping[str, Any]) -> None:
            """For the main process, whose clock decides when a state is due."""
            nonlocal saved
            log(entry)
            if entry["step"] == total or time.monotonic() - saved > SAVE_EVERY:
                work.save(entry["step"], weights, optimizer, accelerator.scaler)
                saved = time.monotonic()

        for entry in train(
            accelerator, model, prepared, unsafe, held, stored.plan, conditioning, training, start
        ):
            accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])
            on_main(accelerator, partial(keep, entry))
            report(
                1,
                "loss {loss:.4f} (contrast {contrast:.4f}, regulariser {regulariser:.2g})".format(**entry),
            )


def _share(accelerator: "Accelerator", optimizer: torch.optim.Optimizer) -> None:
    """Give every process the main one's moments and loss scale; weights go along as the model is prepared."""

    def state() -> tuple[dict[str, Any], dict[str, Any] | None]:
        moments = optimizer.state_dict()
        on_cpu = {
            index: {name: value.cpu() for name, value in entry.items()}
            for index, entry in moments["state"].items()
        }
        scaler = accelerator.scaler
        return {**moments, "state": on_cpu}, scaler.state_dict() if scaler is not None else None

    moments, scale = on_main(accelerator, state)
    if not accelerator.is_main_process:
        optimizer.load_state_dict(moments)
        if scale is not None:
            accelerator.scaler.load_state_dict(scale)


def _open(accelerator: "Accelerator", stored: TrajectorySet, *kinds: Kind) -> States | None:
    """The states of these kinds in the main process, which sends them to the others; None without any."""
    return stored.states(*kinds) if accelerator.is_main_process and stored.plan.states(kinds[0]) else None


def train(
    accelerator: "Accelerator",
    model: nn.Module,
    optimizer: Any,
    unsafe: States | None,
    held: States | None,
    plan: Plan,
    conditioning: Conditioning,
    training: Training,
    start: int = 0,
) -> Iterator[dict[str, Any]]:
    """The loop: one batched forward and backward a step, on [unsafe states x {prompt, empty}] + [held
    states].

    model, optimizer: as Accelerate prepared them. unsafe, held: in the main process, the states with their
    targets and the unconditional states with stage 1's predictions. Yields a record after each step: its
    number counted from 1, loss and its parts (contrast and regulariser, unweighted), the share of unsafe
    states with a loss (active), where predictions lie between reject and prefer (position), learning rate,
    gradient norm before clipping (None where fp16's scaling skipped the step), seconds. Raises TrceError as
    soon as loss or gradient is not finite; that step is not made.
    """
    counts = {"unsafe": plan.states("unsafe"), "held": plan.states("unconditional")}
    total, size = training.steps(counts["unsafe"]), training.batch_size
    share = size // accelerator.num_processes
    mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
            model, batch[0], batch[1] if len(batch) > 1 else None, conditioning, training
        )
        # Every process has the same share of the batch, so the mean over processes is that over the batch.
        accelerator.backward(contrast.mean() + training.regularisation * kept.mean())
        norm = float(accelerator.clip_grad_norm_(parameters, CLIP))
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
    model: nn.Module,
    unsafe: Mapping[str, Tensor],
    held: Mapping[str, Tensor] | None,
    conditioning: Conditioning,
    training: Training,
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
    prediction = predict(model, latents.float(), timesteps, conditioning, torch.cat(rows))
    prompted, empty, *rest = prediction.split([len(part["latents"]) for part in parts])
    contrast = Contrast(unsafe["direction"], unsafe["offset"])
    loss = contrastive_loss(prompted, empty, contrast, training.margin)
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


# The end


def _finish(
    accelerator: "Accelerator",
    model: nn.Module,
    erased: Checkpoint,
    teacher: Checkpoint,
    presets: Sequence[Preset],
    stored: TrajectorySet,
    conditioning: Conditioning,
    training: Training,
    work: WorkingFolder,
    max_drift: float,
    began: float,
    stage: Stage,
) -> dict[str, Any]:
    """Measure what the weights do as they will be saved, and write the output."""
    model = accelerator.unwrap_model(model)
    before = {key: erased.read(key) for key in trainable(model)}
    trained = {key: parameter.detach().cpu() for key, parameter in trainable(model).items()}
    changes = {key: trained[key] - before[key].float() for key in trained}
    after = {key: (before[key].float() + changes[key]).to(before[key].dtype) for key in changes}
    figures: dict[str, Any] = {"weights": weight_change(erased, before, after)}
    report = stage("Guard", 2 * sum(stored.plan.states(kind) for kind in CHECKED), "states")
    figures |= guard(model, before, after, stored, conditioning, report)
    for name in ("unconditional", "benign"):
        if not figures[name]["drift"] <= max_drift:
            raise TrceError(
                f"The {name} predictions moved by {figures[name]['drift']:.3g} of their size, more than the "
                f"--max-drift of {max_drift:g}, so nothing was written.",
                "Lower --lr or --max-steps, raise --regularisation, or accept it with a higher --max-drift.",
            )
    log = work.records()
    figures["training"] = {"steps": len(log), "first": _ends(log[:20]), "last": _ends(log[-20:])}
    entry = record(
        "steer",
        erased,
        presets,
        {
            **asdict(stored.plan.recipe),
            **asdict(training),
            "teacher": teacher.name,
            "teacher_revision": teacher.revision,
            "max_drift": max_drift,
            "processes": accelerator.num_processes,
            "device": str(accelerator.device),
        },
        figures,
        time.perf_counter() - began,
        {"seed": training.seed},
    )
    from trce_cli.images.plots import loss_curves

    files = {LOG: (work.folder / LOG).read_bytes(), CURVES: loss_curves(log, training.regularisation)}
    report = stage("Writing", round(total_bytes(erased, work.outputs) / 1e6), "MB")
    lora = write_outputs(
        erased,
        {key: partial(torch.add, change) for key, change in changes.items()},
        Made(erased.family, erased.text_encoder_hash(), (*history(erased), entry)),
        work.outputs,
        report=lambda count: report(count / 1e6),
        original=teacher,
        files=files,
    )
    if "diffusers" not in work.outputs.paths:  # a single file has no room for them
        for name, content in files.items():
            beside = work.output.with_name(f"{work.output.stem}.{name}")
            write_bytes(beside, content)
    return entry | ({"lora": lora} if lora else {})


def _ends(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean losses over the first or last records."""
    names = ("loss", "contrast", "regulariser")
    return {name: sum(record[name] for record in records) / max(1, len(records)) for name in names}
