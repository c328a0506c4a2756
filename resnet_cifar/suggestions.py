"""How commands, keys and values are written, and what a mistyped key or option was probably meant to be."""

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def program() -> str:
    """How this program was called, for commands that are to be pasted; where that cannot be told, `python run.py`."""
    called = Path(sys.argv[0])
    if called.stem == "resnet-cifar":  # where it is installed
        return "resnet-cifar"
    if called.parts[-2:] == ("resnet_cifar", "__main__.py"):
        return "python -m resnet_cifar"
    return f"python {shlex.quote(sys.argv[0])}" if called.name == "run.py" else "python run.py"


def keys(container: Mapping[str, Any], parent: str = "") -> Iterator[str]:
    """The dotted keys of every value in a tree of plain dicts, sections included."""
    for name, value in container.items():
        yield parent + str(name)
        if isinstance(value, Mapping):
            yield from keys(value, f"{parent}{name}.")


def overridden(overrides: Iterable[str]) -> list[str]:
    """The key of each override as typed, `trainer.epochs` for `++trainer.epochs=3`; a deletion keeps its ~."""
    return [override.lstrip("+").partition("=")[0] for override in overrides]


def dotted(key: str) -> str:
    """A key as Hydra writes it: a place in a list after a dot, `transforms.0` for `transforms[0]`."""
    return re.sub(r"\[(\d+)\]", r".\1", key)


def quoted(path: Path | str) -> str:
    """The path as a value on Hydra's command line, whatever characters it has."""
    return "'" + str(path).replace("'", "\\'") + "'"


def closest(given: str, known: Iterable[str]) -> list[str]:
    """At most two of the known names: those with the same last part, else those whose last part is spelled alike."""
    last = given.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for name in known:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    if last in by_last:
        return by_last[last][:2]
    # Not by the whole name alone: the keys of one section are alike as such.
    names = [name for part in difflib.get_close_matches(last, by_last, cutoff=0.75) for name in by_last[part]]
    return difflib.get_close_matches(given, names, n=1, cutoff=0.8) or names[:2]


def did_you_mean(given: str, known: Iterable[str], value: str = "") -> str:
    """`"; did you mean trainer.epochs=3?"`, with `value` such as `=3` after each name, or nothing when none is close."""
    found = closest(given, known)
    return f"; did you mean {' or '.join(name + value for name in found)}?" if found else ""
