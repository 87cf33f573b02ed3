"""The one way to write: what is written appears whole or not at all, whatever ends the process.

A file or folder is made in a staging folder of its own beside its place: fresh, of a random name, closed to
others, so that nothing that was planted there is ever opened, and two runs never meet. From there it is
renamed into its place. A mark inside, locked while the run lives, tells what a killed run left from what is a
user's.
"""

import csv
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from trce_cli.errors import BadInput, TrceError

if TYPE_CHECKING:
    from torch import Tensor

# What lies in a staging folder: the mark, the new output, and the old one while the two change places.
_MARK, _NEW, _OLD = "mark", "new", "old"
_STAGING: Final = re.compile(r"\.trce-[0-9a-f]{16}")

_HERE: Final = -100  # Linux: paths are relative to the working folder
_NO_REPLACE, _EXCHANGE = 1, 2  # Linux: flags of renameat2


@contextmanager
def whole(target: Path, replace: bool = True, unchanged: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Where to write a file or folder that takes `target`'s place when the block ends well, else vanishes.

    The folders around it are made. An old one is replaced in one step, by what is of its kind only; of a link
    it is the link itself, not what it points to. unchanged: called last; raises where what was read has
    changed meanwhile. Raises TrceError where the disk fails, and without `replace` BadInput where something
    is there before the block, TrceError where it appears meanwhile.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(target.parent)
        with suppress(FileNotFoundError):
            os.lstat(target)  # a name that the file system does not take is told before the work
            if not replace:
                raise BadInput(
                    f"The output {target} exists already.", "Choose another --output, or add --force."
                )
        together = _TOGETHER.get()
        together = together if together and target in together.targets else None
        with ExitStack() as stack:
            staging, handle = _make_staging(target)
            stack.callback(os.close, handle)
            stack.callback(_clear, staging, target)
            made = _Made(staging, target, replace, unchanged)
            yield staging / _NEW
            if together is None:
                made.check()
                made.put()
            else:
                together.made.append(made)
                together.kept.push(stack.pop_all())
    except OSError as error:
        raise _cannot_write(target, error) from error


@contextmanager
def together(targets: Collection[Path]) -> Iterator[None]:
    """Of these outputs those that `whole` makes in the block take their places when it ends well, or none.

    targets: as `whole` is given them.
    """
    with ExitStack() as kept:
        these = _Together(targets, kept)
        token = _TOGETHER.set(these)
        try:
            yield
        finally:
            _TOGETHER.reset(token)
        for each in these.made:
            each.check()
        for each in these.made:
            try:
                each.put()
            except OSError as error:
                raise _cannot_write(each.target, error) from error


@dataclass(frozen=True)
class _Made:
    """An output that is whole in its staging folder; see `whole`."""

    staging: Path
    target: Path
    replace: bool
    unchanged: Callable[[], None]

    def check(self) -> None:
        """Raise where it may not take its place."""
        self.unchanged()
        if not self.replace and os.path.lexists(self.target):
            raise _appeared(self.target)

    def put(self) -> None:
        """Rename it into its place."""
        if tell := _TELL.get():
            tell(self.target, self.staging / _NEW)
        _put(self.staging, self.target, self.replace)


@dataclass
class _Together:
    """Outputs that take their places together, those that are made, and what keeps their staging folders."""

    targets: Collection[Path]
    kept: ExitStack
    made: list[_Made] = field(default_factory=list)


def _cannot_write(target: Path, error: OSError) -> TrceError:
    hint = "Make space, or choose a place on another disk." if error.errno in _FULL else None
    return TrceError(f"Cannot write {target}: {error.strerror or error}.", hint)


def _appeared(target: Path) -> TrceError:
    return TrceError(
        f"The output {target} appeared while it was being written, and is not replaced.",
        "Choose another --output, or add --force.",
    )


_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_TELL: ContextVar[Callable[[Path, Path], None] | None] = ContextVar("tell", default=None)
_TOGETHER: ContextVar["_Together | None"] = ContextVar("together", default=None)


@contextmanager
def telling(tell: Callable[[Path, Path], None] | None) -> Iterator[None]:
    """Call tell(target, what takes its place) just before each output of the block takes its place."""
    token = _TELL.set(tell)
    try:
        yield
    finally:
        _TELL.reset(token)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    write_bytes(path, text.encode(), replace)


def write_bytes(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file, whole or not at all."""
    with whole(path, replace) as fresh:
        fresh.write_bytes(content)


def write_json(path: Path, told: Any) -> None:
    """Write plain JSON values, whole or not at all."""
    write_text(path, json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines as CSV, whole or not at all; the columns are the keys of all lines, as they first occur."""
    with whole(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of tensors that are in memory, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as fresh:
        fresh.touch()
        mode = fresh.stat().st_mode  # what the umask asks for; safetensors writes 0600
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, fresh, dict(metadata))
        except SafetensorError as error:  # it has no error number of its own
            full = "StorageFull" in str(error) or "No space left" in str(error)
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        fresh.chmod(mode)


def appending(path: Path) -> TextIO:
    """Open a file of our own to append lines to it, made where there is none.

    BadInput for a link, a pipe or whatever else is no file of ours: nothing outside is ever written to.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_ours(path, "file") from error
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise _not_ours(path, "file")
    return os.fdopen(handle, "a", encoding="utf-8")


def make_inside(output: Path, *names: str) -> Path:
    """The folder `output/names...`, made where it is not there; `output` itself may be a link to a folder.

    BadInput where something on the way below `output` is a link or no folder: we do not write through it.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        output = output / name
        with suppress(FileExistsError):
            output.mkdir()
        check_own_folder(output)
    return output


def check_own_folder(path: Path) -> None:
    """Raise BadInput where a link, or whatever else is no folder, lies at the place of one of ours."""
    if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
        raise _not_ours(path, "folder")


def _not_ours(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{path} is no {what} of ours: links, pipes and the like are not written to.",
        "Take it away, or choose another --output.",
    )


def clear_stale(folder: Path) -> None:
    """Remove what killed runs left in a folder, and put back an old output that one had moved aside.

    Only staging folders with their mark inside that no living run has locked; whatever else stays.
    """
    try:
        names = [name for name in os.listdir(folder) if _STAGING.fullmatch(name)]
    except OSError:  # not there, or not to be looked into
        return
    for name in names:
        _clear_if_stale(folder / name)


def _clear_if_stale(staging: Path) -> None:
    with suppress(OSError):
        os.rmdir(staging)  # the run was killed before the mark was there
        return
    try:
        if not stat.S_ISDIR(os.lstat(staging).st_mode):
            return
        handle = os.open(staging / _MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # nothing of ours
        return
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark = os.read(handle, 4096).split(b"\0")
        if mark[0] == os.fsencode(staging.name) and len(mark) == 2:
            _clear(staging, staging.parent / os.fsdecode(mark[1]))
        elif mark == [b""] and os.listdir(staging) == [_MARK]:
            _clear(staging, staging)
    except OSError:  # another run is at work there, or it is not for us to remove
        pass
    finally:
        os.close(handle)


def _make_staging(target: Path) -> tuple[Path, int]:
    """A fresh staging folder, and the handle of its mark, which is locked as long as that is open.

    A run that clears up beside us may take it away before the mark is whole; then another one is made.
    """
    while True:
        staging = target.parent / f".trce-{secrets.token_hex(8)}"
        staging.mkdir(mode=0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(staging / _MARK, flags, 0o600)
        except FileNotFoundError:
            continue
        except BaseException:
            os.rmdir(staging)
            raise
        try:
            with suppress(OSError):  # of a file system without locks: nobody else can lock it either
                fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, os.fsencode(staging.name) + b"\0" + os.fsencode(target.name))
            if os.fstat(handle).st_nlink:
                return staging, handle
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(handle)
            raise
        os.close(handle)


def _put(staging: Path, target: Path, replace: bool) -> None:
    fresh = staging / _NEW
    if replace and not fresh.is_dir():
        os.replace(fresh, target)  # in one step; the system refuses to put a file in a folder's place
        return None
    while True:
        try:
            return _rename_to_nothing(fresh, target)
        except FileExistsError:
            if not replace:
                raise _appeared(target) from None
        with suppress(FileNotFoundError):  # another run has just taken it away
            if not stat.S_ISDIR(os.lstat(target).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
            if _renameat2(fresh, target, _EXCHANGE):
                return None
            shutil.rmtree(staging / _OLD, ignore_errors=True)
            os.rename(target, staging / _OLD)  # `_clear` puts it back should the next step not come to pass


def _clear(staging: Path, target: Path) -> None:
    """Remove a staging folder, its mark last; an old output in it goes back where there is no new one."""
    with suppress(FileNotFoundError, FileExistsError):
        if not os.path.lexists(target):
            _rename_to_nothing(staging / _OLD, target)
    for name in (_NEW, _OLD):
        path = staging / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(staging, ignore_errors=True)


def _rename_to_nothing(source: Path, target: Path) -> None:
    """Rename where nothing is in the way; FileExistsError otherwise."""
    if _renameat2(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename under a condition; False where the system or the file system does not know it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if not function(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags):
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
