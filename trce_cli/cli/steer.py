"""`trce steer`: stage 2, early denoising steered away from a concept."""

import importlib.util
import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    Config,
    Device,
    DryRun,
    EditDType,
    Energy,
    Forms,
    Json,
    Link,
    Output,
    Presets,
    Quiet,
    Rank,
    Revision,
    Seed,
    Variant,
    files_read,
    resolve_device,
)
from trce_cli.errors import BadInput
from trce_cli.prompts.presets import joint_steer_settings, load_presets

if TYPE_CHECKING:
    from rich.table import Table

    from trce_cli.checkpoint.checkpoint import Checkpoint


def steer(
    erased: Annotated[
        str,
        typer.Argument(
            metavar="ERASED",
            help="What `trce map` wrote; or any checkpoint, for stage 2 alone.",
            show_default=False,
        ),
    ],
    presets: Presets,
    output: Output,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="The original model; else the base that is recorded in ERASED's trce.json.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="DDIM steps of a trajectory; else the preset's, else 50.", show_default=False
        ),
    ] = None,
    early_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many of them, from the noise on, are tuned; else half.", show_default=False
        ),
    ] = None,
    trajectories_per_concept: Annotated[
        int | None,
        typer.Option(min=1, help="Seeds a concept; else the preset's, else 5.", show_default=False),
    ] = None,
    unconditional: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Unconditional states that hold everything else in place; else the preset's, else 2000.",
            show_default=False,
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, help="Guidance of the trajectories; else the preset's, else 3.", show_default=False
        ),
    ] = None,
    steering_guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Guidance of the targets; else the preset's, else 15.", show_default=False),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="Margin of the hinge; else the preset's, else 0.01.", show_default=False),
    ] = None,
    regularisation: Annotated[
        float | None,
        typer.Option(
            min=0, help="Weight of the unconditional states; else the preset's, else 100.", show_default=False
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", min=0, help="Learning rate; else the preset's, else 1e-6.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Unsafe states a step, over all processes, and as many unconditional ones; else the "
            "preset's, else 4.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the unsafe states; else the preset's, else 3.", show_default=False
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimisation steps, instead of epochs.", show_default=False),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"],
        typer.Option(help="Precision of the computation; tuned weights are kept in fp32."),
    ] = "no",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, half as much time again.")
    ] = False,
    trajectories: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the prepared set is kept, to be used again; else beside the output until the end.",
            show_default=False,
        ),
    ] = None,
    max_drift: Annotated[
        float,
        typer.Option(
            min=0,
            help="Largest change of unconditional and benign predictions that is saved, as a share of their "
            "size.",
        ),
    ] = 0.2,
    log_with: Annotated[
        Literal["tensorboard", "wandb", "trackio"] | None,
        typer.Option(help="Follow the training with this tracker as well.", show_default=False),
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    forms: Forms = None,
    rank: Rank = None,
    energy: Energy = None,
    edit_dtype: EditDType = None,
    link: Link = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an existing output, or an unfinished run of other arguments."),
    ] = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune early denoising away from concepts (stage 2).

    Killed and started again with the same arguments it goes on where it was. `accelerate launch -m trce_cli
    steer` spreads it over several processes.
    """
    main = os.environ.get("RANK", "0") == "0"
    console = Console(json and main, quiet or not main)
    chosen = load_presets(presets)
    given = {
        "steps": steps,
        "early_steps": early_steps,
        "trajectories_per_concept": trajectories_per_concept,
        "unconditional": unconditional,
        "guidance_scale": guidance_scale,
        "steering_guidance": steering_guidance,
        "margin": margin,
        "regularisation": regularisation,
        "lr": lr,
        "batch_size": batch_size,
        "epochs": epochs,
        "max_steps": max_steps,
        "seed": seed,
        "mixed_precision": mixed_precision,
    }
    if math.isnan(max_drift):
        raise BadInput("--max-drift must be a number of at least 0, not nan.")
    if log_with and not importlib.util.find_spec(log_with):
        raise BadInput(f"{log_with} is not installed.", f"pip install {log_with}")

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.checkpoint.same_model import check_same_model
    from trce_cli.edits.outputs import choose_outputs, lora_lines, notes
    from trce_cli.erase import steer as stage2
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.trajectories import plan_trajectories
    from trce_cli.erase.working_folder import tidy

    recipe, training = stage2.choose(given, joint_steer_settings(chosen))
    source = open_checkpoint(erased, revision, variant, config)
    original = _teacher(console, source, teacher, config)
    check_same_model(original, source)
    outputs = choose_outputs(source, output, forms, rank, energy, edit_dtype, force, link)
    if "map" in outputs.paths:
        raise BadInput("What `trce steer` changes is no map of text embeddings.", "Use --as lora.")
    if main:
        tidy(output)
        outputs.check(source, files_read(presets, original.path, config))
    plan = plan_trajectories(source, chosen, choose_prior(source).canaries, recipe)
    planned = stage2.estimate(source, plan, training, outputs)
    if dry_run:
        result = {"teacher": original.name, "output": str(output), **planned}
        console.show(_plan_table(result))
        console.result({"dry_run": True, **result})
        return
    where = trajectories or "a working folder beside the output"
    console.note(
        f"{planned['unsafe_states']:,} unsafe and {planned['unconditional_states']:,} unconditional states: "
        f"{_size(planned['trajectory_bytes'])} in {where}; {planned['steps']:,} steps."
    )
    for note in notes(source, outputs):
        console.note(note)
    logs = output.parent / f"{output.name}-logs" if log_with else None
    accelerator = stage2.make_accelerator(resolve_device(device), mixed_precision, log_with, logs)
    if log_with:
        with redirect_stdout(sys.stderr):  # trackers talk, and stdout is for the result
            accelerator.init_trackers("trce-steer", {k: str(v) for k, v in given.items() if v is not None})
    with console.progress() as progress:
        entry = stage2.steer(
            source,
            original,
            chosen,
            plan,
            training,
            output,
            accelerator,
            trajectories=trajectories,
            gradient_checkpointing=gradient_checkpointing,
            max_drift=max_drift,
            force=force,
            outputs=outputs,
            stage=progress.stage,
        )
    with redirect_stdout(sys.stderr):
        accelerator.end_training()
    if not main:
        return
    console.show(_guard_table(entry["figures"]))
    moved = entry["figures"]["unsafe"]
    if moved["prompt_after"] <= moved["prompt_before"]:
        console.warn("On held-out states the predictions did not move toward the safe concepts.")
    for line in lora_lines(entry["lora"]) if "lora" in entry else []:
        console.note(line)
    where_to = ", ".join(map(str, outputs.paths.values()))
    console.note(f"Wrote {where_to} in {entry['seconds']:.1f} s.")
    console.result({"output": output, "outputs": dict(outputs.paths), **entry})


def _teacher(console: Console, source: "Checkpoint", name: str | None, config: Path | None) -> "Checkpoint":
    """The checkpoint of `--teacher`, or the first base of the history; ERASED itself where it has none."""
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.checkpoint.provenance import history
    from trce_cli.erase.trajectory_set import denoiser_hashes

    entries = history(source)
    if not any(entry["edit"] in ("map", "apply") for entry in entries):
        console.note(f"{source.name} has not been mapped: stage 2 alone is the weaker half of the method.")
    if name is None and not entries:
        return source
    base = entries[0]["base"] if entries else {}
    if name is None:
        try:
            opened = open_checkpoint(base["name"], base.get("revision"), base.get("variant"), config)
        except BadInput as error:
            raise BadInput(
                f"The original that {source.name} was made from cannot be opened: {error.message}",
                "Name it with --teacher.",
            ) from None
    else:
        opened = open_checkpoint(name, config=config)
    if base and not set(base["files"].values()) & set(denoiser_hashes(opened)):
        message = (
            f"{opened.name} is not the original that {source.name} was made from: its U-Net's weights differ."
        )
        if name is None:
            raise BadInput(message, "Name the original with --teacher.")
        console.warn(message)
    return opened


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _plan_table(planned: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Plan", "", title="Nothing was written")
    for name, value in planned.items():
        if name == "evaluations":
            for model, count in value.items():
                table.add_row(f"U-Net evaluations, {model}", f"{count:,}")
        elif name.endswith("_bytes"):
            table.add_row(f"{name.removesuffix('_bytes').replace('_', ' ')}, bytes", _size(value))
        else:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
    return table


def _guard_table(figures: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Guard", "Before", "After", title="What the edit does")
    unsafe, training, weights = figures["unsafe"], figures["training"], figures["weights"]
    for name, where in (("prompt", "Unsafe prompts"), ("empty", "... the same states, empty prompt")):
        row = f"{where}, from reject (0) to prefer (1), {unsafe['states']} held-out states"
        table.add_row(row, f"{unsafe[f'{name}_before']:.3f}", f"{unsafe[f'{name}_after']:.3f}")
    for name in ("unconditional", "benign"):
        row = f"Change of {name} predictions, {figures[name]['states']} held-out states"
        table.add_row(row, "", f"{figures[name]['drift']:.2%}")
    table.add_row("Tuned weights that changed, as they are saved", "", f"{weights['changed_share']:.1%}")
    first, last = (training[when]["loss"] for when in ("first", "last"))
    table.add_row(f"Loss over the first and last of {training['steps']} steps", f"{first:.4g}", f"{last:.4g}")
    return table
