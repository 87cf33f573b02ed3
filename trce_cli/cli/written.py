"""What the commands that write an edit have in common: hashing the original, writing, and telling of it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trce_cli.cli.console import Console
from trce_cli.cli.options import Publishing
from trce_cli.cli.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
    from trce_cli.edits.forms import Edited
    from trce_cli.edits.outputs import Outputs


def hash_original(source: "Checkpoint", progress: Progress, text_encoder: str | None = None) -> "Hashes":
    """The hashes of the checkpoint, which its outputs record; text_encoder: where it is known.

    Where it lies is noted in the cache, for those who look for it again.
    """
    from trce_cli.checkpoint.bases import remember

    hashing = progress.task("Hashing the original", round(source.total_bytes() / 1e6), "MB")
    hashes = source.hashes(lambda count: hashing(count / 1e6), text_encoder)
    remember(source, hashes)
    return hashes


def write(console: Console, edited: "Edited", outputs: "Outputs") -> dict[str, Any]:
    """Write an edit in every form, and return what `write_outputs` does."""
    from trce_cli.edits.outputs import total_bytes, write_outputs

    with console.progress() as progress:
        total = total_bytes(edited.checkpoint, outputs)
        writing = progress.task("Writing", round(total / 1e6), "MB")
        return write_outputs(edited, outputs, lambda count: writing(count / 1e6))


def add_changes(table: "Table", change: Any, on: str) -> None:
    """Rows on how much the weights of a stream's doors change, as `erase.map.door_changes` has it."""
    if isinstance(change, float):  # there is one door of one layer
        table.add_row(f"Change of what enters on {on}", "", f"{change:.2%}")
        return
    for name, layers in change.items():
        row = f"Change of {name} on {on}, mean (largest) of the layers"
        table.add_row(row, "", f"{layers['mean']:.2%} ({layers['max']:.2%})")


def show_verdicts(console: Console, figures: Mapping[str, Any]) -> None:
    """What the guards of a map mean, those that are not good as warnings; nothing where none was judged."""
    for name, told in figures.get("verdicts", {}).items():
        sign = "up to" if told["good"] < told["weak"] else "from"
        line = f"{told['verdict'].capitalize()}: {told['sentence']}"
        figure = (
            f"({name.replace('_', ' ').replace('.', ': ')} {told['value']:.3g}; good {sign} {told['good']:g})"
        )
        (console.note if told["verdict"] == "good" else console.warn)(f"{line} {figure}")


def show_written(
    console: Console,
    output: Path,
    outputs: "Outputs",
    original: str,
    entry: Mapping[str, Any],
    lora: Mapping[str, Any],
    seconds: float,
    publishing: Publishing,
    source: "Checkpoint",
) -> None:
    """Tell where the edit is, and the command that comes next.

    original: the checkpoint to compare with. entry: what the edit's history says of it. lora: the figures of
    the LoRA, where one was written. publishing: whether it goes to the hub, as an edit of source.
    """
    from trce_cli.edits.outputs import lora_lines

    for line in lora_lines(lora) if lora else []:
        console.note(line)
    console.note(f"Wrote {', '.join(map(str, outputs.paths.values()))} in {seconds:.1f} s.")
    made = {key: value for key, value in entry.items() if key != "lora"}
    url = publishing.push(console, source, outputs, made)
    console.note(_next_command(outputs, original))
    result = {"output": output, "outputs": dict(outputs.paths), **entry}
    result |= {"lora": lora} if lora else {}
    console.result(result | ({"pushed_to": url} if url else {}))


def _next_command(outputs: "Outputs", original: str) -> str:
    """What to type to see what the edit does."""
    checkpoints = [path for form, path in outputs.forms if form.is_checkpoint]
    if not checkpoints:
        edit = shlex.quote(str(next(iter(outputs.paths.values()))))
        return f"Next: trce apply {edit} CHECKPOINT --output DIR"
    erased = shlex.quote(str(checkpoints[0]))
    return f"Next: trce generate {erased} PROMPT --compare {shlex.quote(original)} --output DIR"
