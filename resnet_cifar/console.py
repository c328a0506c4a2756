"""What a run says, to a reader who may leave before its end: `python run.py | head`."""

import logging
import os
import re
import shlex
import sys
import traceback
from pathlib import Path
from typing import TextIO

from hydra.errors import HydraException

from resnet_cifar.errors import UserError
from resnet_cifar.passwords import without_passwords
from resnet_cifar.suggestions import quoted

# Its records go to run.log only (conf/hydra/job_logging): the terminal has the short message.
failures = logging.getLogger("resnet_cifar.failure")


def nobody_reads(stream: TextIO | None = None) -> None:
    """Let what is still said there, by default on stdout, go nowhere, as Python's own last words at exit would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def say(text: str, stream: TextIO | None = None) -> None:
    """Print it there, by default on stdout, to whoever is still reading."""
    try:
        print(text, file=stream, flush=True)
    except OSError:  # a pipe without a reader, a terminal that was closed
        nobody_reads(stream)


def short(error: BaseException) -> str:
    """The message of an error in at most three lines, without passwords; of one that nobody foresaw also its type."""
    lines = str(error).strip().splitlines()
    if isinstance(error, SystemExit):
        lines = [f"the run ended with exit code {error}"]
    if not isinstance(error, UserError | SystemExit | KeyboardInterrupt | OSError | HydraException):
        lines = [f"{type(error).__name__}: {' '.join(lines[:1])}"]
    return without_passwords("\n".join(lines[:3]))


def log_failure(error: BaseException) -> None:
    """Write into run.log, once, why the running job failed: the message, or the traceback where nobody foresaw it."""
    if getattr(error, "is_in_run_log", False):
        return
    expected = isinstance(error, UserError | SystemExit)
    failures.error(short(error) if expected else without_passwords("".join(traceback.format_exception(error))))
    error.is_in_run_log = True  # type: ignore[attr-defined]


def shown(path: Path) -> Path:
    """The path from the working directory, where it lies in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def setting(key: str, path: Path) -> str:
    """`key=path` as it is typed: quoted for the shell, and for Hydra where it would not take the path as it is."""
    value = str(shown(path))
    plain = key == "resume" or re.fullmatch(r"[\w /.:+@%-]*", value, re.ASCII)
    return shlex.quote(f"{key}={value if plain else quoted(value)}")


class ConsoleHandler(logging.StreamHandler):
    """Lines on stdout, as long as they are read: a run is worth more than its words, and goes on without them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` where a line could not be written."""
        if isinstance(sys.exception(), OSError):
            nobody_reads()
        else:
            super().handleError(record)
