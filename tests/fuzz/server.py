"""A process that has imported everything and runs one command line after the other, as `trce` would.

Requests and answers are lines of JSON on the streams it was started with. A command that is to be killed or
disturbed runs in a fork.
"""

import functools
import gc
import json
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz import events

MARGIN = 6 << 30  # bytes of address space that a command may ask for before the system says no


def command(args: list[str], folder: str) -> int:
    """What `trce ARGS` in that folder does, with its exit status; an exception that passes is printed."""
    from trce_cli.__main__ import main

    os.chdir(folder)
    sys.argv = ["trce", *args]
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # made anew, as in a fresh process
    try:
        return main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()


def answer(request: dict[str, Any], streams: tuple[int, int]) -> dict[str, Any]:
    """Run one command and say what came of it."""
    for number, stream in zip((1, 2), streams, strict=True):
        os.ftruncate(stream, 0)
        os.lseek(stream, 0, os.SEEK_SET)
        os.dup2(stream, number)
    counted = None
    before = _begin_memory()
    start = time.monotonic(), _spent()
    if request.get("plan") is None:
        status = command(request["args"], request["folder"])
    else:
        status, counted = _forked(request)
    seconds = time.monotonic() - start[0], _spent() - start[1]
    told = [os.pread(stream, 1 << 22, 0).decode("utf-8", "surrogateescape") for stream in streams]
    return {
        "status": status,
        "out": told[0],
        "err": told[1],
        "wall": seconds[0],
        "seconds": seconds[1],
        "memory": _most_memory() - before,
        "events": counted,
    }


def _forked(request: dict[str, Any]) -> tuple[int, list[str]]:
    """In a process of its own, disturbed as planned; its events are what it told of before it ended."""
    told = os.memfd_create("events")
    if (child := os.fork()) == 0:
        status = 1
        try:
            events.watch(Path(request["folder"]), request["plan"], told)
            status = command(request["args"], request["folder"])
        finally:
            events.over()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    names = os.pread(told, 1 << 24, 0).decode("utf-8", "replace").splitlines()
    os.close(told)
    return os.waitstatus_to_exitcode(ended), names


def _spent() -> float:
    """Seconds of CPU of this process and of those that it waited for."""
    told = os.times()
    return sum(told[:4])


def _begin_memory() -> int:
    """Forget the most memory that was in use; bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _most_memory() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def main() -> None:
    """Serve until the requests end."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    streams = os.memfd_create("out"), os.memfd_create("err")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    import diffusers.pipelines.stable_diffusion
    import diffusers.pipelines.stable_diffusion_xl  # noqa: F401
    import typer.main
    from transformers import CLIPTextModel, CLIPTokenizerFast  # noqa: F401

    import trce_cli.cli.app
    import trce_cli.edits.files
    import trce_cli.erase.map
    import trce_cli.erase.steer
    import trce_cli.evaluate.attacks.run
    import trce_cli.evaluate.report
    import trce_cli.evaluate.tune  # noqa: F401

    # What `main` freezes, since its process is about to end, has to be collected here.
    freeze, gc.freeze = gc.freeze, lambda: None
    # Built anew for each command it would be half of what a quick one takes.
    typer.main.get_command = functools.cache(typer.main.get_command)
    limit = _status("VmSize") + MARGIN
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    imported = 0
    for line in requests:
        if len(sys.modules) > imported:  # what is imported is collected by no further command
            gc.collect()
            freeze()
            imported = len(sys.modules)
        answers.write(json.dumps(answer(json.loads(line), streams)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
