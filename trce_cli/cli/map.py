"""`trce map`: stage 1, a concept erased from a checkpoint in closed form."""

from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trce_cli.cli.console import Console
from trce_cli.cli.options import (
    CheckpointName,
    Config,
    Device,
    DryRun,
    EditDType,
    Energy,
    Force,
    Forms,
    Json,
    Link,
    Output,
    Presets,
    PriorFile,
    Quiet,
    Rank,
    Revision,
    Variant,
    check_dtype,
    files_read,
    resolve_device,
    resolve_dtype,
)
from trce_cli.errors import BadInput
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_presets

if TYPE_CHECKING:
    from rich.table import Table


def map_(
    checkpoint: CheckpointName,
    presets: Presets,
    output: Output,
    preserve: Annotated[
        float | None,
        typer.Option(
            help="lambda: how much a benign caption counts against a prompt pair; else the preset's, else 1.",
            show_default=False,
        ),
    ] = None,
    prior: PriorFile = None,
    token_weights: Annotated[
        str | None,
        typer.Option(
            metavar="SOT,FIRST_EOT,LAST_EOT,KEYWORD",
            help="Weights of the tokens that are mapped; else the preset's, else 0,1,0,0.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of the edit to apply, 1 is all of it; else the preset's, else 1.",
            show_default=False,
        ),
    ] = None,
    pooled: Annotated[
        bool,
        typer.Option("--pooled/--no-pooled", help="SDXL: map the pooled text embedding as well."),
    ] = True,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision that prompts are encoded in: fp32, fp16 or bf16; else fp32. Weights keep theirs.",
            callback=check_dtype,
            show_default=False,
        ),
    ] = None,
    forms: Forms = None,
    rank: Rank = None,
    energy: Energy = None,
    edit_dtype: EditDType = None,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    link: Link = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Erase concepts in closed form, in seconds (stage 1).

    The text embeddings of unsafe prompts are mapped to those of safe ones inside every cross-attention layer,
    and SDXL's pooled embeddings where they enter.
    The result is a complete checkpoint of the same form, with trce.json and a model card beside the weights,
    or what --as names.
    """
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.edits.outputs import choose_outputs, lora_lines, notes, total_bytes, write_outputs
    from trce_cli.erase.map_settings import choose_settings, plan
    from trce_cli.erase.prior import choose_prior

    start = perf_counter()
    console = Console(json, quiet)
    chosen = load_presets(presets)
    weights = None if token_weights is None else parse_token_weights(token_weights)
    given = {"preserve": preserve, "token_weights": weights, "strength": strength, "pooled": pooled}
    settings, remarks = choose_settings(given, chosen)
    source = open_checkpoint(checkpoint, revision, variant, config)
    outputs = choose_outputs(source, output, forms, rank, energy, edit_dtype, force, link)
    outputs.check(source, files_read(presets, prior, config))
    benign = choose_prior(source, prior, console.note)
    pairs = prompt_pairs(chosen)
    for remark in remarks + notes(source, outputs):
        console.note(remark)
    if dry_run:
        planned = plan(source, output, pairs, benign, settings)
        planned["disk_bytes"] = total_bytes(source, outputs)
        console.show(_plan_table(planned))
        console.result({"dry_run": True, "output": output, "outputs": dict(outputs.paths), **planned})
        return

    import torch

    from trce_cli.api import solved_map
    from trce_cli.erase.map import solve

    where, precision = resolve_device(device), resolve_dtype(dtype) or torch.float32
    with console.progress() as progress:
        solution = solve(source, pairs, benign, settings, where, precision, progress.stage)
        hashing = progress.stage("Hashing the original", round(source.total_bytes() / 1e6), "MB")
        source.hashes(lambda count: hashing(count / 1e6))
    console.show(_guard_table(solution.figures))
    seconds = perf_counter() - start
    edit = solved_map(source, chosen, settings, benign, solution, where, precision, seconds)
    with console.progress() as progress:
        writing = progress.stage("Writing", round(total_bytes(source, outputs) / 1e6), "MB")
        lora = write_outputs(
            source,
            edit.weight_edits(source),
            edit.made,
            outputs,
            edit,
            lambda count: writing(count / 1e6),
        )
    for line in lora_lines(lora) if lora else []:
        console.note(line)
    where_to = ", ".join(map(str, outputs.paths.values()))
    console.note(f"Wrote {where_to} in {perf_counter() - start:.1f} s.")
    result = {"output": output, "outputs": dict(outputs.paths), **edit.made.history[-1]}
    console.result(result | ({"lora": lora} if lora else {}))


def parse_token_weights(text: str) -> tuple[float, ...]:
    """`SOT,FIRST_EOT,LAST_EOT,KEYWORD` -> their weights; BadInput where one is no number."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(
            f"--token-weights {text!r} is not a list of numbers.",
            "Give SOT,FIRST_EOT,LAST_EOT,KEYWORD, for example 0,1,0,0.",
        ) from None


def _guard_table(figures: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Guard", "Before", "After", title="What the edit does")
    before, after = (figures["cosine_to_safe"][when] for when in ("before", "after"))
    change, rank, dim = figures["canary_change"], figures["rank"], figures["dim"]
    table.add_row("Cosine of unsafe to safe EoT, mean", f"{before['mean']:.3f}", f"{after['mean']:.3f}")
    table.add_row(f"... lowest of {figures['pairs']} pairs", f"{before['min']:.3f}", f"{after['min']:.3f}")
    table.add_row("Targets moved, of their way to the safe embeddings", "", f"{figures['moved']:.1%}")
    for name in ("keys", "values"):
        row = f"Change of {name} on {figures['canaries']} canary captions, mean (largest) of the layers"
        table.add_row(row, "", f"{change[name]['mean']:.2%} ({change[name]['max']:.2%})")
    table.add_row(f"Condition number, within rank {rank} of {dim}", "", f"{figures['condition']:.2g}")
    if pooled := figures.get("pooled"):
        before, after = (pooled["cosine_to_safe"][when] for when in ("before", "after"))
        table.add_row(
            "Pooled: cosine of unsafe to safe, mean", f"{before['mean']:.3f}", f"{after['mean']:.3f}"
        )
        table.add_row("... lowest", f"{before['min']:.3f}", f"{after['min']:.3f}")
        table.add_row("... targets moved", "", f"{pooled['moved']:.1%}")
        table.add_row("... change of canary captions in add_embedding", "", f"{pooled['canary_change']:.2%}")
        row = f"... condition number, within rank {pooled['rank']} of {pooled['dim']}"
        table.add_row(row, "", f"{pooled['condition']:.2g}")
    return table


def _plan_table(planned: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table("Plan", "", title="Nothing was written")
    for key, (rows, columns) in planned["layers"].items():
        table.add_row(key, f"{rows} x {columns}")
    for name, value in planned.items():
        if name.endswith("_bytes"):
            value = f"{value / 1e9:.2f} GB"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if name != "layers":
            table.add_row(name.removesuffix("_bytes").replace("_", " "), str(value))
    return table
