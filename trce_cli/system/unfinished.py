"""Work that can be stopped: a hidden folder beside an output keeps what is done until all of it is."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from trce_cli.errors import BadInput
from trce_cli.system.foreign import read_json, validated
from trce_cli.system.paths import matching, real_path
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import check_own_folder, clear_stale, telling, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

RUN: Final = "run.json"
PLACED: Final = "placed.json"


class Kept:
    """What a run has made so far, by name: tensors, a file each, whole or absent; nothing without a folder.

    saved: seconds that were not spent again, because a stopped run had spent them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.saved = 0.0

    def holds(self, name: str) -> bool:
        """Whether something of that name was made."""
        return self.folder is not None and os.path.lexists(self._path(self.folder, name))

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def __call__(
        self,
        name: str,
        make: Callable[[], Mapping[str, "Tensor"]],
        report: Report = no_report,
        count: int = 0,
    ) -> Mapping[str, "Tensor"]:
        """What was made by that name, on the CPU; else what `make` gives, as it is, which is kept.

        report: is told `count` where nothing has to be made; `make` tells it by itself.
        """
        if self.folder is None:
            return make()
        path = self._path(self.folder, name)
        if os.path.lexists(path):
            file = SafetensorsFile.open(path)
            self.saved += _seconds(file)
            report(count)
            return _Read(path, {key: file.read(key) for key in file.tensors})
        start = monotonic()
        made = make()
        write_tensors(
            path, {key: tensor.cpu() for key, tensor in made.items()}, {"seconds": f"{monotonic() - start}"}
        )
        return made


class _Read(dict[str, "Tensor"]):
    """The tensors of a file that a stopped run left; BadInput for one that is not there."""

    def __init__(self, path: Path, tensors: Mapping[str, "Tensor"]) -> None:
        super().__init__(tensors)
        self.path = path

    def __missing__(self, key: str) -> "Tensor":
        raise _not_kept(self.path)


def _seconds(file: SafetensorsFile) -> float:
    try:
        return float(file.metadata["seconds"])
    except (KeyError, ValueError):
        raise _not_kept(file.path) from None


def _not_kept(path: Path) -> BadInput:
    return BadInput(f"{path} is not what a stopped run keeps.", "Take it away; what it held is made again.")


@contextmanager
def unfinished(output: Path, kind: str, arguments: Mapping[str, Any], force: bool) -> Iterator[Kept]:
    """With what a stopped run of these arguments, plain JSON values, made; removed when the block ends well,
    or before anything is kept.

    kind: of the run, the ending of the hidden folder's name. Raises BadInput where the folder holds a run of
    other arguments, which `force` drops, and where another process is at work in it.
    """
    output = real_path(output)
    folder = hidden(output, kind)
    check_own_folder(folder)
    folder.mkdir(exist_ok=True)
    handle = lock(folder, f"Another run is at work on {output}.", "Wait for it, or choose another --output.")
    try:
        clear_stale(folder)
        _check_arguments(folder, arguments, force)
        write_json(folder / RUN, arguments)
        try:
            yield Kept(folder)
        except BaseException:
            with suppress(OSError):  # what has ended the block is told
                if {path.name for path in folder.iterdir()} == {RUN}:  # nothing to go on with
                    _remove(folder)
            raise
        _remove(folder)
    finally:
        os.close(handle)


def hidden(output: Path, kind: str) -> Path:
    """The folder in which a run of that kind keeps what it made for an output."""
    return output.with_name(f".{output.name}.{kind}")


def _remove(folder: Path) -> None:
    """Remove a run that is done; last what says so."""
    for path in folder.iterdir():
        if path.name != PLACED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / PLACED).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def placing(folder: Path) -> Iterator[None]:
    """Note in a run's folder each output of the block before it takes its place; see `placed`."""
    noted: dict[str, list[int]] = {}

    def note(target: Path, fresh: Path) -> None:
        found = os.lstat(fresh)
        noted[_place(target)] = [found.st_dev, found.st_ino]
        with telling(None):
            write_json(folder / PLACED, {"outputs": noted})

    with telling(note):
        yield


def _place(path: Path) -> str:
    return str(real_path(path.parent) / path.name)


class _Noted(BaseModel):
    outputs: dict[str, tuple[int, int]]


def placed(folder: Path, outputs: Iterable[Path]) -> set[Path]:
    """Those of the outputs that lie there as the run of this folder put them, before it was stopped."""
    try:
        noted = validated(_Noted, read_json(folder / PLACED, strict=True), "").outputs
    except BadInput:  # none so far
        return set()
    found = set()
    for path in outputs:
        with suppress(OSError):
            at = os.lstat(path)
            if noted.get(_place(path)) == (at.st_dev, at.st_ino):
                found.add(path)
    return found


def lock(folder: Path, busy: str, hint: str) -> int:
    """A handle that keeps other processes off the folder until it is closed; BadInput(busy, hint) where one
    is at work."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BadInput(busy, hint) from None
    return handle


def _check_arguments(folder: Path, arguments: Mapping[str, Any], force: bool) -> None:
    if not os.path.lexists(folder / RUN):  # never begun
        return
    try:
        found = dict(read_json(folder / RUN, strict=True))
    except (BadInput, TypeError, ValueError):
        found = {}
    if differ(folder, found, arguments, force):
        for path in matching(folder, "*.safetensors"):
            path.unlink()


def differ(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], force: bool) -> bool:
    """Whether the unfinished run in a folder has other arguments; BadInput where it has, without `force`."""
    name = next((name for name in new if old.get(name) != new[name]), None)
    if name is not None and not force:
        raise BadInput(
            f"{folder} holds an unfinished run with other arguments ({name.replace('_', ' ')} differs).",
            "Finish it with those, choose another --output, or begin again with --force.",
        )
    return name is not None
