"""Outputs that appear whole or not at all, whatever ends the process."""

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trce_cli.errors import TrceError


@contextmanager
def whole_or_not_at_all(output: Path, replace: bool) -> Iterator[Path]:
    """Where to write a file or folder that takes `output`'s place when the block ends well, else vanishes.

    Raises TrceError where the disk fails, and where without `replace` something else has appeared there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _staged(output, replace) as stage:
            yield stage
    except OSError as error:
        hint = "Make space, or choose an --output on another disk." if error.errno == errno.ENOSPC else None
        raise TrceError(f"Cannot write {output}: {error.strerror or error}.", hint) from error


@contextmanager
def _staged(output: Path, replace: bool) -> Iterator[Path]:
    """The place behind `whole_or_not_at_all`.

    It lies in a hidden folder beside `output`, which is locked while the run lives, so that a later run can
    tell what a killed one left behind. An old output is moved aside for the moment between two renames.
    """
    import fcntl

    aside = output.with_name(f".{output.name}.trce-old")
    hidden = output.with_name(f".{output.name}.trce-{secrets.token_hex(4)}")
    hidden.mkdir()
    handle = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield hidden / output.name
        if output.exists():
            if not replace:
                raise TrceError(
                    f"The output {output} appeared while it was being written, and is not replaced.",
                    "Choose another --output, or add --force.",
                )
            output.rename(aside)
        (hidden / output.name).rename(output)
        _remove(aside)
    except BaseException:
        if aside.exists() and not output.exists():
            aside.rename(output)
        raise
    finally:
        _remove(hidden)
        os.close(handle)


def clear_stale(output: Path) -> None:
    """Remove what a killed run left beside `output`, and put an old output back that it had moved aside."""
    import fcntl

    aside = output.with_name(f".{output.name}.trce-old")
    if aside.exists() and not output.exists():
        aside.rename(output)
    for stale in output.parent.glob(f".{glob.escape(output.name)}.trce-*"):
        handle = os.open(stale, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(stale)
        except BlockingIOError:
            pass  # another run is at work
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
