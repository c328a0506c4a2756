"""SIGINT, SIGTERM and SIGHUP as a request to stop between two batches; a second signal ends the process at once."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

# The shell's, 128 and the number of the signal: of SIGHUP, SIGINT and SIGTERM. What ends with one was stopped and did not fail.
STOPPED = (129, 130, 143)


@dataclass
class StopRequest:
    """The number of the signal that asked to stop, 0 while there was none."""

    signal_number: int = 0

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signal_number


def ending_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP of a terminal that is closed; not where `nohup` has this process ignore it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, *([] if ignores_hangup else [signal.SIGHUP])]


@contextmanager
def _handled(handler: Callable[[int, Any], object], *numbers: int) -> Iterator[None]:
    """These signals go to `handler`; outside the main thread, where none arrive, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        number: signal.getsignal(number) for number in numbers
    }  # all of them before a signal finds the first set
    try:
        for number in numbers:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def stop_requests(
    then: Callable[[int], None] = lambda number: None,
    repeated: Callable[[int, object], None] | signal.Handlers = signal.SIG_DFL,
) -> Iterator[StopRequest]:
    """Collect signals in a `StopRequest` instead of raising; outside the main thread, where none arrive, do nothing.

    `then` is called with the first signal's number; `repeated` is what happens to those that follow it.
    """
    request, numbers = StopRequest(), (signal.SIGINT, *ending_signals())

    def remember(number: int, _frame: object) -> None:
        request.signal_number = number
        for each in numbers:
            signal.signal(each, repeated)
        then(number)

    with _handled(remember, *numbers):
        yield request


def exit_on_ending_signals() -> AbstractContextManager[None]:
    """SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt, so that what is open is closed on the way out."""
    return _handled(lambda number, _: sys.exit(128 + number), *ending_signals())


def do_nothing(_number: int, _frame: object) -> None:
    """A handler that ignores a signal; where another handler is at work, Python would complain about SIG_IGN."""


@contextmanager
def ignored(*numbers: int) -> Iterator[None]:
    """These signals do nothing; outside the main thread, where none arrive, do nothing."""
    with _handled(do_nothing, *numbers):
        yield
