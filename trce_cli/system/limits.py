"""Bounds in time and memory for what a stranger's file makes a library compute."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def limited(seconds: float, more: int) -> Iterator[None]:
    """Raise ValueError in the block when it takes longer, or asks for so many bytes more than are in use.

    The time is kept in the main thread, the memory on Linux; what the block calls has to give Python a turn.
    """
    main = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    linux = sys.platform == "linux"
    if linux:
        most = _size() + more
        resource.setrlimit(
            resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard)
        )
    if main:
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except MemoryError:
        raise ValueError("it asks for too much memory") from None
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if linux:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """The address space of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise ValueError("it takes too long")
