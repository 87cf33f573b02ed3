"""Where a run of stage 2 lives until it is done, so that a kill at any moment costs minutes."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.edits.outputs import Outputs
from trce_cli.erase import training_state
from trce_cli.erase.adapters import trained_numbers
from trce_cli.erase.trajectories import Plan
from trce_cli.erase.trajectory_set import TrajectorySet
from trce_cli.errors import BadInput, TrceError
from trce_cli.system.foreign import parse_json, read_json, read_text, validated
from trce_cli.system.paths import existing, real_path
from trce_cli.system.processes import on_main
from trce_cli.system.unfinished import PLACED, RUN, differ, hidden, lock, placed
from trce_cli.system.whole import appending, check_own_folder, clear_stale, write_json, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE: Final = "state.safetensors"
LOG: Final = "steer.jsonl"
SET: Final = "trajectories"
MAX_LOG: Final = 1 << 30  # bytes
Record = dict[str, int | float | None]
LOSSES: Final = ("loss", "contrast", "regulariser", "retention")  # of each step, in its record


class LossScale(BaseModel):
    """The state of torch's GradScaler, which scales losses in fp16: numbers in float32 and int32."""

    model_config = ConfigDict(strict=True, extra="forbid")

    scale: Annotated[float, Field(gt=0, le=3e38)]
    growth_factor: Annotated[float, Field(gt=1, le=3e38)]
    backoff_factor: Annotated[float, Field(gt=0, lt=1)]
    growth_interval: Annotated[int, Field(gt=0, lt=1 << 31)]
    growth_tracker: Annotated[int, Field(ge=0, lt=1 << 31, alias="_growth_tracker")]


def tidy(output: Path, outputs: Outputs) -> Outputs:
    """Finish removing the working folder of a run that is done, where a kill came in between.

    Returns the outputs; where a stopped run had put some of them in their place and not all, as ones that it
    may replace. BadInput where a link lies in the folder's place.
    """
    folder = hidden(real_path(output), "steer")
    for place in (folder, folder / SET):
        check_own_folder(place)
    try:
        handle = lock(folder, "", "")
    except (FileNotFoundError, BadInput):  # no run, or one at work
        return outputs
    try:
        clear_stale(folder)
        there = {path for path in outputs.paths.values() if os.path.lexists(path)}
        ours = placed(folder, there)
        is_done = len(ours) == len(outputs.paths)
        if is_done or {path.name for path in folder.iterdir()} <= {STATE, LOG, SET, PLACED}:
            _remove(folder)
        elif ours and ours == there:
            return replace(outputs, how=replace(outputs.how, force=True))
    finally:
        os.close(handle)
    return outputs


def _remove(folder: Path) -> None:
    """Remove a run that is done, its arguments first: what lies here without them counts as nothing.

    What is not of the run stays, and with it the folder. OSError where the system refuses: what stays then is
    for the next run to remove, and is not left without a word.
    """
    clear_stale(folder)  # of a write that was refused to tidy up
    for name in (RUN, STATE, LOG, PLACED):
        (folder / name).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        shutil.rmtree(folder / SET)
    with suppress(OSError):
        folder.rmdir()


class WorkingFolder:
    """The hidden folder beside the output with an unfinished run: its arguments, state, log, trajectories."""

    def __init__(
        self, output: Path, outputs: Outputs, made_from: Mapping[str, Any], training: Mapping[str, Any]
    ) -> None:
        self.output = real_path(output)
        self.outputs = outputs
        self.folder = hidden(self.output, "steer")
        self.arguments = {"set": dict(made_from), "training": dict(training)}

    @contextmanager
    def claimed(
        self,
        accelerator: "Accelerator",
        erased: Checkpoint,
        plan: Plan,
        trajectories: Path | None,
        force: bool,
    ) -> Iterator[TrajectorySet]:
        """Take the folder for this run, with the set to train on, and remove it when the block ends well.

        Raises BadInput where it holds a run of other arguments (with `force` that one is dropped, its
        trajectories stay if they fit), where another process is at work in it, or where the set is of other
        inputs or just being made; TrceError where the disk is too small.
        """
        handles: list[int] = []

        def claim() -> TrajectorySet:
            self.outputs = tidy(self.output, self.outputs)
            self.outputs.check(erased)
            fresh = not self.folder.exists()
            try:
                if not fresh:
                    handles.append(self._lock())
                    self._check_arguments(force)
                place = trajectories or self.folder / SET
                stored = TrajectorySet(place, plan, self.arguments["set"])
                self._check_space(erased, stored)
                self.folder.mkdir(parents=True, exist_ok=True)
                if fresh:
                    handles.append(self._lock())
                if trajectories and stored.missing:  # others may want the same set
                    place.mkdir(parents=True, exist_ok=True)
                    handles.append(_lock_set(place))
                    stored = TrajectorySet(place, plan, self.arguments["set"])
                write_json(self.folder / RUN, self.arguments)
            except BaseException:
                if fresh and handles:  # made here, and by nobody else
                    shutil.rmtree(self.folder, ignore_errors=True)
                while handles:
                    os.close(handles.pop())
                raise
            return stored

        try:
            yield on_main(accelerator, claim)
            on_main(accelerator, lambda: _remove(self.folder))
        finally:
            for handle in handles:
                os.close(handle)

    def _lock(self) -> int:
        return lock(self.folder, f"Another run is at work on {self.output}.", "Choose another --output.")

    def _check_arguments(self, force: bool) -> None:
        arguments = self.folder / RUN
        if not os.path.lexists(arguments):  # never begun, and there are files of others
            return
        try:
            found: Mapping[str, Any] = read_json(arguments)
            old, new = ({**one["set"], **one["training"]} for one in (found, self.arguments))
        except (BadInput, KeyError, TypeError):
            found, old, new = {}, {"arguments": None}, {"arguments": ""}
        if not differ(self.folder, old, new, force):
            return
        # What it left goes; its trajectories stay where they were made from the same.
        for name in (STATE, LOG):
            (self.folder / name).unlink(missing_ok=True)
        if found.get("set") != self.arguments["set"]:
            shutil.rmtree(self.folder / SET, ignore_errors=True)

    def _check_space(self, erased: Checkpoint, stored: TrajectorySet) -> None:
        """The set, two states (the old one stays until the new one is whole) and the outputs have to fit."""
        trained = trained_numbers(erased, self.arguments["training"]["lora_rank"])
        missing = sum(shard.size(stored.plan.shape) for shard in stored.missing)
        states = (12 if (self.folder / STATE).exists() else 24) * trained
        needs = [
            (stored.folder, missing),
            (self.folder, states),
            *((path.parent, size) for path, size in self.outputs.needed_bytes(erased).items()),
        ]
        wanted: dict[int, int] = {}
        for place, size in needs:
            parent = existing(place)
            device = parent.stat().st_dev
            wanted[device] = wanted.get(device, 0) + size
            free = shutil.disk_usage(parent).free
            if wanted[device] > free:
                raise TrceError(
                    f"Steering needs {wanted[device] / 1e9:.2f} GB in {parent}, which has {free / 1e9:.2f}.",
                    "Make space, or put the set elsewhere with --trajectories or the result with --output.",
                )

    def load(self, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, scaler: Any) -> int:
        """Put the last state into weights and optimizer, in place; returns the steps done."""
        path = self.folder / STATE
        if not path.exists():
            return 0
        step, metadata = training_state.load(path, weights, optimizer)
        if scaler is not None and "scaler" in metadata:
            told = parse_json(metadata["scaler"], where := f"The loss scale in {path}")
            state = validated(LossScale, told, where, "Remove the file to begin again.")
            scaler.load_state_dict(state.model_dump(by_alias=True))
        return step

    def save(
        self, step: int, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, scaler: Any
    ) -> None:
        """Write the state after `step` steps, if it is finite: the last good one is never lost."""
        for name, tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrceError(
                    f"{name.removeprefix('weights/')} became NaN or infinite by step {step}.",
                    "The last good state is kept; begin again with a lower --lr and --force.",
                )
        metadata = {} if scaler is None else {"scaler": json.dumps(scaler.state_dict())}
        training_state.save(self.folder / STATE, step, weights, optimizer, metadata)

    @contextmanager
    def log(self, accelerator: "Accelerator", start: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Append records to the log, from which those of steps that are done again are dropped first."""
        if not accelerator.is_main_process:
            yield lambda entry: None
            return
        kept = [entry for entry in self.records() if entry["step"] <= start]
        path = self.folder / LOG
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        with appending(path) as file:

            def write(entry: Mapping[str, Any]) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()

            yield write

    def records(self) -> list[dict[str, Any]]:
        """The log's records; a line that a kill cut short, the last one, is not among them."""
        path = self.folder / LOG
        lines = read_text(path, MAX_LOG, errors="replace").splitlines() if os.path.lexists(path) else []
        records: list[dict[str, Any]] = []
        for line in lines:
            try:
                record = validated(Record, parse_json(line, str(path)), str(path))
            except BadInput:
                break
            if any(record.get(name) is None for name in ("step", *LOSSES)):
                break
            records.append(record)
        return records


def _lock_set(folder: Path) -> int:
    return lock(
        folder,
        f"Another run is making the trajectories in {folder}.",
        "Start this one when they are there, or choose another --trajectories.",
    )
