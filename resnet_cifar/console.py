"""What a run says, to a reader who may leave before its end: `python run.py | head`."""

import logging
import os
import sys


def nobody_reads() -> None:
    """Let what is still said on stdout go nowhere, as Python's own last words at exit would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print it, to whoever is still there."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nobody_reads()


class ConsoleHandler(logging.StreamHandler):
    """Lines on stdout, as long as they are read: a run is worth more than its words, and goes on without them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` where a line could not be written."""
        if isinstance(sys.exception(), BrokenPipeError):
            nobody_reads()
        else:
            super().handleError(record)
