"""What a process does before anything else: streams that are there, and signals that end it tidily.

Imports nothing but the standard library's smallest modules, so that little time passes before it is done.
"""

import io
import os
import signal
import sys
from types import FrameType


class _Forgiving(io.FileIO):
    """A stream for what is said beside the result: where it cannot be written, that is all that is lost."""

    def write(self, data, /):  # type: ignore[no-untyped-def]  # the signature is FileIO's
        try:
            return super().write(data)
        except OSError:
            return len(data)


def begin() -> None:
    """Take the process over: called once, first thing, in the main thread."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # else it is to be ignored, as under nohup
            signal.signal(number, _stop)
    for handle in (0, 1, 2):  # else the next file that is opened takes the place of a stream that is closed
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    raw = io.BufferedWriter(_Forgiving(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)


def end() -> None:
    """Give the signals back: called last, since an exception in the interpreter's own end is a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C: by an exception, so that terminal and disk are left in order; once is enough."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
