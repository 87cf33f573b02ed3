"""Bounds of what a stranger's file makes a library compute."""

import resource
import signal
import threading
from time import monotonic

import pytest

from trce_cli.system.limits import limited


def test_what_takes_too_long_is_ended() -> None:
    start = monotonic()

    def endless() -> None:
        while True:  # in Python, which looks for signals; a loop of the interpreter's own would not
            pass

    with pytest.raises(ValueError, match="takes too long"), limited(0.2, 1 << 30):
        endless()
    assert monotonic() - start < 5


def test_what_asks_for_too_much_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="too much memory"), limited(10, 1 << 26):
        bytearray(1 << 30)


def test_the_bounds_are_gone_afterwards_and_none_is_kept_in_other_threads() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with limited(10, 1 << 26):
        pass
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    raised = []

    def work() -> None:
        with limited(0.0001, 1 << 30):
            raised.append(sum(range(1000)))

    (thread := threading.Thread(target=work)).start()
    thread.join()
    assert raised == [sum(range(1000))]
