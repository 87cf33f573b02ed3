"""Stage 2: fine-tune the visual attention on early denoising steps, resumably, on one process or many.

arXiv 2503.07389, denoising trajectory steering. `steer` is the whole stage; the loop is in `training`.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from trce_cli.checkpoint.bases import public_name
from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
from trce_cli.checkpoint.provenance import history, record
from trce_cli.checkpoint.same_model import check_finite, check_same_model
from trce_cli.edits.edit import Made, WeightEdit
from trce_cli.edits.forms import Edited
from trce_cli.edits.outputs import Outputs, choose_outputs, total_bytes, write_outputs
from trce_cli.erase.adapters import add_adapters, frozen_numbers, take_adapters, trained_numbers
from trce_cli.erase.prepare import prepare
from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Training
from trce_cli.erase.steer_guard import CHECKED, guard, guard_evaluations, weight_change
from trce_cli.erase.training import SOURCES, train, tuned
from trce_cli.erase.trajectories import Kind, Plan
from trce_cli.erase.trajectory_set import States, TrajectorySet, identify
from trce_cli.erase.working_folder import LOG, LOSSES, WorkingFolder
from trce_cli.errors import BadInput, TrceError, first_line
from trce_cli.families.base import Conditioning
from trce_cli.prompts.presets import Preset
from trce_cli.system.paths import existing
from trce_cli.system.processes import PATIENCE, launched, on_main
from trce_cli.system.progress import Task, no_task
from trce_cli.system.unfinished import placing
from trce_cli.system.whole import write_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_EVERY: float = 120  # seconds between two training states: what a kill can cost

CURVES: Final = "loss.png"


def make_accelerator(
    device: torch.device, mixed_precision: str, log_with: str | None = None, logs: Path | None = None
) -> "Accelerator":
    """Accelerate on the device of `--device`; under `accelerate launch` each process takes its own."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    if mixed_precision == "fp16" and device.type == "cpu":
        raise BadInput("Mixed precision fp16 needs a GPU.", "Use --mixed-precision bf16 or no on the CPU.")
    if device.type == "cuda" and device.index is not None:
        if launched() > 1:
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
    """What a run takes: states, evaluations of a denoiser on one sample, and disk in bytes.

    Memory is in `step_memory`, since to tell it takes a while.
    """
    steps = training.steps_over(plan.states("unsafe"))
    held = sum(plan.states(kinds[0]) > 0 for name, kinds in SOURCES.items() if name != "unsafe")
    samples = (2 + held) * training.batch_size
    trained = trained_numbers(erased, training.lora_rank)
    state = 12 * trained  # weights and two moments in fp32
    return {
        "concepts": len(plan.trajectories["unsafe"]) // plan.recipe.trajectories_per_concept,
        "trajectories": sum(len(plan.trajectories[kinds[0]]) for kinds in SOURCES.values()),
        "unsafe_states": plan.states("unsafe"),
        "unconditional_states": plan.states("unconditional"),
        "benign_states": plan.states("benign"),
        "evaluations": {**plan.evaluations, "training": steps * samples, "guard": guard_evaluations(plan)},
        "steps": steps,
        "tuned_weights": trained,
        "frozen_weights": frozen_numbers(erased, training.lora_rank),
        "trajectory_bytes": plan.total_bytes,
        "state_bytes": state,
        "output_bytes": (written := sum(outputs.needed_bytes(erased).values())),
        "disk_bytes": plan.total_bytes + 2 * state + written,  # a state is written beside the last one
        "free_disk_bytes": shutil.disk_usage(existing(next(iter(outputs.paths.values())))).free,
    }


def steer(
    erased: Checkpoint,
    teacher: Checkpoint,
    presets: Sequence[Preset],
    plan: Plan,
    training: Training,
    output: Path,
    accelerator: "Accelerator",
    *,
    trajectories: Path | None = None,
    gradient_checkpointing: bool = False,
    max_drift: float = 0.2,
    force: bool = False,
    outputs: Outputs | None = None,
    teacher_hashes: Sequence[str] | None = None,
    task: Task = no_task,
) -> dict[str, Any]:
    """Prepare, train, measure and write `output`; returns the entry that was added to its history.

    outputs: what to write and where, else `output` as a checkpoint in the layout of `erased`. A LoRA among
    them is for the teacher, of both stages; its figures are returned as `lora` beside the entry.
    teacher_hashes: `denoiser_hashes` of the teacher, where the caller had to read it whole already.

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
    text_encoder = check_same_model(teacher, erased)
    task("Reading checkpoints", None, "")

    def read() -> tuple[Hashes, dict[str, Any]]:
        for checkpoint in [erased] if teacher is erased else [teacher, erased]:
            check_finite(checkpoint)  # now, and not after hours with the other one
        hashes = erased.hashes(text_encoder=text_encoder)
        precision = training.mixed_precision
        return hashes, identify(teacher, erased, presets, plan.recipe, precision, hashes, teacher_hashes)

    hashes, made_from = on_main(accelerator, read)
    chosen = outputs or choose_outputs(erased, output, None, force=force)
    work = WorkingFolder(output, chosen, made_from, training.model_dump())
    with work.claimed(accelerator, erased, plan, trajectories, force) as stored:
        denoiser = erased.family.denoise(erased)
        run = Run(
            accelerator, erased, hashes, teacher, stored, work, training,
            denoiser.condition(plan.prompts, accelerator.device), task,
        )  # fmt: skip
        run.prepare()
        trained = run.load(erased, train=True)
        if gradient_checkpointing:
            trained.module.enable_gradient_checkpointing()  # type: ignore[operator]
        run.fit(trained)
        entry: dict[str, Any] = on_main(accelerator, lambda: run.finish(trained, presets, max_drift, began))
    return entry


@dataclass(frozen=True)
class Run:
    """One run of stage 2 in its working folder. hashes: of `erased`."""

    accelerator: "Accelerator"
    erased: Checkpoint
    hashes: Hashes
    teacher: Checkpoint
    stored: TrajectorySet
    work: WorkingFolder
    training: Training
    conditioning: Conditioning
    task: Task

    def load(self, checkpoint: Checkpoint, train: bool = False) -> Predictor:
        """The denoiser of a checkpoint in the precision of the run; to train also what is trained of it."""
        denoiser = checkpoint.family.denoise(checkpoint)
        dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        rank = self.training.lora_rank
        whole = train and rank is None
        module = denoiser.load(self.accelerator.device, dtype[self.training.mixed_precision], whole)
        if train and rank is not None:
            add_adapters(module, checkpoint.family.tuned, rank, self.training.seed)
        return Predictor(denoiser, module, self.conditioning)

    def prepare(self) -> None:
        """Make what is missing of the set."""
        missing = lambda: sum(len(shard.trajectories) for shard in self.stored.missing)  # noqa: E731
        if not (total := on_main(self.accelerator, missing)):
            return
        report = self.task("Preparing", total, "trajectories")
        schedule = self.teacher.family.denoise(self.teacher).schedule(self.stored.plan.recipe.steps)
        models = partial(self.load, self.teacher), partial(self.load, self.erased)
        for done in prepare(self.stored, self.accelerator, schedule, *models):
            report(done)

    def fit(self, predict: Predictor) -> None:
        """Train to the end from where the working folder's state is, and keep state and log there."""
        # The parameters and not their data, which DistributedDataParallel moves.
        weights = {f"weights/{key}": parameter for key, parameter in tuned(predict.module).items()}
        # No weight decay: the regulariser holds predictions, and nothing should pull weights away from those
        # of stage 1.
        optimizer = torch.optim.AdamW(tuned(predict.module).values(), lr=self.training.lr, weight_decay=0.0)
        start = on_main(self.accelerator, lambda: self.work.load(weights, optimizer, self.accelerator.scaler))
        if self.accelerator.num_processes > 1 and start:
            _share(self.accelerator, optimizer)
        module, prepared = self.accelerator.prepare(predict.module, optimizer)
        predict = replace(predict, module=module)
        total = self.training.steps_over(self.stored.plan.states("unsafe"))
        report = self.task("Training", total, "steps")
        report(start)
        saved = time.monotonic()
        sources = {name: _open(self.accelerator, self.stored, *kinds) for name, kinds in SOURCES.items()}
        with self.work.log(self.accelerator, start) as log:

            def keep(entry: Mapping[str, Any]) -> None:
                """For the main process, whose clock decides when a state is due."""
                nonlocal saved
                log(entry)
                if entry["step"] == total or time.monotonic() - saved > SAVE_EVERY:
                    self.work.save(entry["step"], weights, optimizer, self.accelerator.scaler)
                    saved = time.monotonic()

            for entry in train(
                self.accelerator, predict, prepared, sources, self.stored.plan, self.training, start
            ):
                self.accelerator.log(
                    {key: value for key, value in entry.items() if key != "step"}, step=entry["step"]
                )
                on_main(self.accelerator, partial(keep, entry))
                report(
                    1,
                    "loss {loss:.4f} (contrast {contrast:.4f}, regulariser {regulariser:.2g}, retention "
                    "{retention:.2g})".format(**entry),
                )

    def edits(self, predict: Predictor) -> dict[str, WeightEdit]:
        """What training did to each weight; a LoRA is taken off the denoiser."""
        if self.training.lora_rank is not None:
            return {**take_adapters(predict.module)}
        trained = {key: parameter.detach().cpu() for key, parameter in tuned(predict.module).items()}
        return {
            key: partial(torch.add, weight - self.erased.read("denoiser", key).float())
            for key, weight in trained.items()
        }

    def finish(
        self, predict: Predictor, presets: Sequence[Preset], max_drift: float, began: float
    ) -> dict[str, Any]:
        """Measure what the weights do as they will be saved, and write the output."""
        predict = replace(predict, module=self.accelerator.unwrap_model(predict.module))
        edits = self.edits(predict)
        figures: dict[str, Any] = {"weights": weight_change(self.erased, edits)}
        report = self.task("Guard", 2 * sum(self.stored.plan.states(kind) for kind in CHECKED), "states")
        figures |= guard(predict, self.erased, edits, self.stored, report)
        for name in ("unconditional", "benign"):
            if not figures[name]["drift"] <= max_drift:
                raise TrceError(
                    f"The {name} predictions moved by {figures[name]['drift']:.3g} of their size, more than "
                    f"the --max-drift of {max_drift:g}, so nothing was written.",
                    "Lower --lr or --max-steps, raise --regularisation or --retention, or accept it with a "
                    "higher --max-drift.",
                )
        log = self.work.records()
        figures["training"] = {"steps": len(log), "first": _ends(log[:20]), "last": _ends(log[-20:])}
        entry = record(
            "steer",
            self.erased,
            presets,
            {
                **self.stored.plan.recipe.model_dump(),
                **self.training.model_dump(),
                "teacher": public_name(self.teacher.name),
                "teacher_revision": self.teacher.revision,
                "max_drift": max_drift,
                "processes": self.accelerator.num_processes,
                "device": str(self.accelerator.device),
            },
            figures,
            time.perf_counter() - began,
            self.hashes,
            {"seed": self.training.seed},
        )
        from trce_cli.images.plots import loss_curves

        files = {
            LOG: (self.work.folder / LOG).read_bytes(),
            CURVES: loss_curves(log, self.training.regularisation, self.training.retention),
        }
        report = self.task("Writing", round(total_bytes(self.erased, self.work.outputs) / 1e6), "MB")
        entries, hashes = (*history(self.erased), entry), self.hashes
        made = Made(self.erased.family, hashes.text_encoder, entries, hashes.sample)
        edited = Edited(self.erased, edits, made, original=self.teacher, files=files)
        if not self.work.outputs.has_folder:  # a file has no room; before what says it is done
            for name, content in files.items():
                beside = self.work.output.with_name(f"{self.work.output.stem}.{name}")
                write_bytes(beside, content)
        with placing(self.work.folder):
            lora = write_outputs(edited, self.work.outputs, lambda count: report(count / 1e6))
        return entry | ({"lora": lora} if lora else {})


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


def _ends(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean losses over the first or last records."""
    return {name: sum(record[name] for record in records) / max(1, len(records)) for name in LOSSES}
