"""An edit file on a checkpoint, to look at what it does: a copy that is made once."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import history
from trce_cli.edits.edit import Made
from trce_cli.edits.files import check_fits, combine, open_edit, record_apply
from trce_cli.edits.forms import Edited
from trce_cli.edits.outputs import choose_outputs, write_outputs
from trce_cli.errors import BadInput
from trce_cli.system.foreign import identities
from trce_cli.system.paths import expanded
from trce_cli.system.safetensors import hash_file


def put_on(original: Checkpoint, name: str, copy: Path) -> None:
    """Write the original with the edit of a file, as `trce apply` does, to the folder or file `copy`.

    A copy that holds the very same edit of the very same original is left as it is, another one replaced.
    Unchanged files are shared with the original where both lie on one file system. Raises BadInput where the
    edit does not fit.
    """
    start, path = perf_counter(), expanded(name)
    read, edit, hashes = identities(filter(Path.exists, [path])), open_edit(path), original.hashes()
    check_fits(edit, original, hashes.text_encoder)
    if copy.exists() and _holds(copy, hash_file(path), hashes.files):
        return
    edits, text_map = combine([edit], original)
    entry = record_apply(original, [path], [edit], 1.0, {}, perf_counter() - start, hashes)
    entries = (*(edit.made.history if edit.made else ()), entry)
    made = Made(original.family, hashes.text_encoder, entries, hashes.sample)
    outputs = choose_outputs(original, copy, None, force=True, link=True)
    outputs.check(original, [path])
    write_outputs(Edited(original, edits, made, text_map, read=read), outputs)


def open_copy(name: str, copy: Path) -> Checkpoint:
    """What `put_on` wrote, by the name of the edit."""
    return replace(open_checkpoint(str(copy)), name=name)


def _holds(copy: Path, edit: str, base: Mapping[str, str]) -> bool:
    try:
        entry = history(open_checkpoint(str(copy)))[-1]
        return bool(entry["edits"][0]["sha256"] == edit and entry["base"]["files"] == dict(base))
    except (BadInput, LookupError):
        return False
