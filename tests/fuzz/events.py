"""File-system events of a process, counted through Python's audit hooks; at the n-th something happens.

An event is a call that opens, makes, renames, links, cuts or removes something below the folder that is
watched, be it an input or an output. A kill comes just before the call; a fault is what the call raises.
"""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

# Event -> its arguments that are paths, each with that which is the handle of the folder it starts from.
WATCHED: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.link": ((0, 2), (1, 3)),
    "os.listdir": ((0, None),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.scandir": ((0, None),),
    "os.symlink": ((0, None), (1, 2)),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
SWAPS = {"delete", "cut", "swap"}

_on = False


def watch(folder: Path, plan: dict[str, Any], told: int) -> None:
    """Count from now on, and act on the plan: {"at": number from 1, "do": what, "to": an input's path}.

    do: "kill", the name of an errno, or what is done to the input: "delete", "cut" or "swap" it. Without it
    the events are counted alone. told: a file that gets a line an event.
    """
    global _on
    _on = True
    root, at, do = os.path.realpath(folder), plan.get("at"), plan.get("do")
    count, busy = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, busy
        if busy or not _on:
            return
        if event == "ctypes.dlsym" and arguments[1] == "renameat2":  # how an output takes its place
            paths = [root]
        elif event in WATCHED:
            paths = [
                path
                for n, start in WATCHED[event]
                if (path := _path(arguments[n], -1 if start is None else arguments[start]))
            ]
        else:
            return
        busy = True
        try:
            paths = [path for path in paths if os.path.realpath(path).startswith(root)]
            if not paths:
                return
            count += 1
            os.write(told, f"{event} {os.path.relpath(paths[-1], root)!r}\n".encode())
            if count == at:
                _act(do, paths[-1], root, plan.get("to"))
        finally:
            busy = False

    sys.addaudithook(hook)


def over() -> None:
    """Count no more: what follows is the interpreter's end."""
    global _on
    _on = False


def _path(value: Any, start: int) -> str | None:
    """The path that a call names. start: handle of the folder it starts from; -1: of the working folder."""
    if not isinstance(value, str | bytes | os.PathLike):
        return None
    path = os.fsdecode(value)
    return path if start == -1 else os.path.join(os.readlink(f"/proc/self/fd/{start}"), path)


def other(content: bytes) -> bytes:
    """An input of the same kind that says something else."""
    if content[8:9] == b"{":  # safetensors: another number at the end
        return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    return content.replace(b"knife", b"sword") if b"knife" in content else content + b"\n"


def _act(do: str | None, path: str, root: str, target: str | None) -> None:
    if do is None:
        return
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do in SWAPS:
        place = Path(root, str(target))
        if do == "cut":
            os.truncate(place, place.stat().st_size // 2)
        elif do == "delete":
            place.unlink()
        else:
            content = place.read_bytes()
            (fresh := place.with_name(place.name + ".fresh")).write_bytes(other(content))
            os.replace(fresh, place)
    else:
        code = getattr(errno, do)
        raise OSError(code, os.strerror(code), path)
