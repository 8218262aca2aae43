"""Signals that ask a program to end: Ctrl-C, and SIGTERM, which comes some time before SIGKILL.

Schedulers send SIGTERM when a job's time is up or its machine is wanted by others (Slurm, Kubernetes,
preempted virtual machines). Both raise `KeyboardInterrupt` in the main thread, wherever that is.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# The exit status after SIGTERM, which says "try again" (EX_TEMPFAIL of sysexits.h).
AGAIN = 75


class Terminated(KeyboardInterrupt):
    """SIGTERM: the machine or the time is wanted back."""


class _Signals:
    """Whether signals wait for the end of a piece of work, and the one that does."""

    def __init__(self) -> None:
        self.held, self.waiting = False, 0


_signals = _Signals()


def install() -> None:
    """Lets both signals raise `KeyboardInterrupt`; does nothing outside the main thread."""
    _signals.waiting = 0
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _receive)


def _receive(number: int, _: FrameType | None) -> None:
    # Also where it is raised at once: Python drops what is raised in a finaliser or a callback.
    _signals.waiting = number
    if not _signals.held:
        raise _error(number)


def _error(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keeps a signal waiting until the end of a piece of work that must be done wholly.

    One that came before and whose exception was dropped is raised there too.
    """
    _signals.held = True
    try:
        yield
    finally:
        _signals.held = False
    if number := _signals.waiting:
        _signals.waiting = 0
        raise _error(number)
