"""What the commands that write an edit have in common: hashing the original, writing, and telling of it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trce_cli.cli.console import Console
from trce_cli.cli.options import Publishing
from trce_cli.cli.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
    from trce_cli.edits.forms import Edited
    from trce_cli.edits.outputs import Outputs

NO_LIMIT: Final = "(no limit)"  # of a guard's figure that nothing is known to follow from


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


def guard_table(title: str) -> "Table":
    """An empty table of guards."""
    from rich.table import Table

    return Table("Guard", "Before", "After", "Verdict", title=title)


def judged(figures: Mapping[str, Any], name: str, limit: str = ".0%", value: float | None = None) -> str:
    """The verdict on a guard with its limit: `good (from 70%)`, `weak (good from 70%)`; else `NO_LIMIT`.

    limit: how it is written. value: what is judged by the guard's limits, in place of its own figure.
    """
    from trce_cli.maths.verdict import Limits

    if (told := figures.get("verdicts", {}).get(name)) is None:
        return NO_LIMIT
    limits = Limits(told["good"], told["weak"])
    word = told["verdict"] if value is None else limits.word(value)
    sign = "up to" if limits.less_is_better else "from"
    return f"{word} ({'' if word == 'good' else 'good '}{sign} {limits.good:{limit}})"


def add_changes(table: "Table", change: Any, on: str, figures: Mapping[str, Any], guard: str) -> None:
    """Rows on how much the weights of a stream's doors change, as `erase.map.door_changes` has it.

    guard: of figures, the one whose limits judge each door's mean.
    """
    if isinstance(change, float):  # there is one door of one layer
        table.add_row(f"Change of what enters, {on}", "", f"{change:.1%}", judged(figures, guard))
        return
    for name, layers in change.items():
        after = f"{layers['mean']:.1%} (layers up to {layers['max']:.1%})"
        table.add_row(f"Change of {name}, {on}", "", after, judged(figures, guard, value=layers["mean"]))


# The guards that `trce map` judges, by the words of its table: those of recorded figures, too.
_ROWS: Final = {
    "moved": "Way to the safe prompts, done",
    "padding_moved": "... by padding",
    "eot_padding_moved": "... by padding with EoT",
    "canary_change": "Change, canary captions",
    "word_change": "Change, words of no prior",
    "norm": "Spectral norm of the change",
}


def recorded_table(verdicts: Mapping[str, Any], title: str) -> "Table":
    """The guards of a map as it has them on record; verdicts: as `erase.map_verdict.recorded` has them."""
    table = guard_table(title)
    for name, told in verdicts.items():
        part, _, guard = name.rpartition(".")
        row, is_size = _ROWS.get(guard, guard.replace("_", " ")), guard == "norm"
        after = f"{told['value']:.3g}" if is_size else f"{told['value']:.1%}"
        verdict = judged({"verdicts": verdicts}, name, "g" if is_size else ".0%")
        table.add_row(f"{part.replace('_', ' ').capitalize()}: {row}" if part else row, "", after, verdict)
    return table


def show_verdict(console: Console, figures: Mapping[str, Any]) -> None:
    """What the guards mean in one sentence, a warning where it is not good; nothing where none was judged."""
    from trce_cli.erase.map_verdict import overall

    if told := overall(figures.get("verdicts", {})):
        word, sentence = told
        (console.show if word == "good" else console.warn)(sentence)


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
    console.note(_next_command(outputs, original, entry["presets"], source))
    result = {"output": output, "outputs": dict(outputs.paths), **entry}
    result |= {"lora": lora} if lora else {}
    console.result(result | ({"pushed_to": url} if url else {}))


def _is_drawn(checkpoint: "Checkpoint") -> bool:
    from trce_cli.errors import BadInput

    try:
        checkpoint.family.canvas(checkpoint)
    except BadInput:
        return False
    return True


def _configured(made: Path, source: "Checkpoint") -> list[str]:
    """The option without which what was made of the checkpoint cannot be opened, or not be drawn as it can;
    nothing where none is needed.
    """
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.errors import BadInput, TrceError

    if made.is_dir():  # it has all that it needs
        return []
    try:
        if _is_drawn(open_checkpoint(str(made))) or not _is_drawn(source):
            return []
    except BadInput:
        pass
    except (TrceError, OSError):  # what was written is written, whatever becomes of a hint
        return []
    return ["--config", source.name if source.path.is_dir() else str(source.config_folder)]


def _next_command(
    outputs: "Outputs", original: str, presets: Sequence[Mapping[str, Any]], source: "Checkpoint"
) -> str:
    """What to type to see what the edit does, with a phrase that it erases; else what was made."""
    checkpoints = [path for form, path in outputs.forms if form.is_checkpoint]
    made = (checkpoints or [*outputs.paths.values()])[0]
    if not checkpoints:
        words = ["trce", "apply", str(made), original, "--output", f"{made.with_suffix('')}-applied"]
    elif not _is_drawn(source):
        words = ["trce", "inspect", str(made), *_configured(made, source)]
    else:
        phrases = [concept["unsafe"] for preset in presets for concept in preset["concepts"]]
        words = ["trce", "generate", str(made), *(phrases or ["PROMPT"])[:1], "--compare", original]
        words += ["--output", f"{made.with_suffix('') if made.suffix == '.safetensors' else made}-images"]
        words += _configured(made, source)
    return f"Next: {shlex.join(words)}"
