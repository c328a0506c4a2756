"""What a run says, to a reader who may leave before its end: `python run.py | head`."""

import logging
import os
import sys
from typing import TextIO


def nobody_reads(stream: TextIO | None = None) -> None:
    """Let what is still said there, by default on stdout, go nowhere, as Python's own last words at exit would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def say(text: str, stream: TextIO | None = None) -> None:
    """Print it there, by default on stdout, to whoever is still reading."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nobody_reads(stream)


class ConsoleHandler(logging.StreamHandler):
    """Lines on stdout, as long as they are read: a run is worth more than its words, and goes on without them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` where a line could not be written."""
        if isinstance(sys.exception(), BrokenPipeError):
            nobody_reads()
        else:
            super().handleError(record)
