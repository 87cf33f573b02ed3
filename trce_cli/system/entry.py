"""What a process does before anything else: streams that are there, and signals that end it tidily.

Imports nothing but the standard library's smallest modules, so that little time passes before it is done.
"""

import fcntl
import io
import os
import signal
import sys
from types import FrameType

# Seconds of work after a signal until it counts as lost.
LOST = 0.5


class _Forgiving(io.FileIO):
    """A stream for what is said beside the result: where it cannot be written, that is all that is lost."""

    def write(self, data, /):  # type: ignore[no-untyped-def]  # the signature is FileIO's
        try:
            return super().write(data)
        except OSError:
            return len(data)


def begin() -> None:
    """Take the process over: called once, first thing, in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # else it is to be ignored, as under nohup
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
    sys.unraisablehook = _unless_stopped
    for handle in (0, 1, 2):  # else the next file that is opened takes the place of a stream that is closed
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if fcntl.fcntl(1, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:  # as good as closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    raw = io.BufferedWriter(_Forgiving(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)


def heard() -> None:
    """The command has ended, by a signal or not: none is raised again."""
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def end() -> None:
    """Give the signals back: called last, since an exception in the interpreter's own end is a traceback."""
    heard()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that terminal and disk are left in order; once is enough.

    In what the interpreter calls by itself, as `__del__`, an exception comes to nothing, and in what a
    library catches: so it is raised again, unless it is on its way, until `heard`.
    """

    def again(_: int, frame: FrameType | None) -> None:
        if _on_its_way(sys.exc_info()[1]):
            signal.setitimer(signal.ITIMER_VIRTUAL, LOST)
        else:
            _stop(number, frame)

    signal.signal(signal.SIGVTALRM, again)
    signal.setitimer(signal.ITIMER_VIRTUAL, LOST)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _on_its_way(error: BaseException | None) -> bool:
    """Whether what is handled right now, as in the cleaning up of a `finally`, is the end or came of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__context__
    return error is not None


def _unless_stopped(told: "sys.UnraisableHookArgs") -> None:
    """What Python does with an exception that comes to nothing; of a signal, which comes again, no word."""
    if not issubclass(told.exc_type, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(told)
