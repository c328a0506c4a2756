"""Checkpoints of plain types: written atomically with a SHA-256, verified before they are read, never unpickled as code."""

import contextlib
import errno
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_cifar.artifact_files import link_or_copy
from resnet_cifar.errors import CheckpointError, StorageError

LAST, PREVIOUS = "last.pt", "previous.pt"
# The file ends in this and the digest of all before it; torch.load, a zip reader, passes over the end.
_MARK = b"sha256:"
_TRAILER = len(_MARK) + 64
KEYS = {"config", "classes", "max_lr", "model", "optimizer", "scheduler", "progress"}
ADVICE = "Give another:\ncheckpoint=<file or run folder>"

log = logging.getLogger(__name__)


def save(state: dict[str, Any], folder: Path) -> Path:
    """Write `state` to `folder/last.pt`; what was there stays as `previous.pt`. Survives a kill and a power cut at any moment.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the older checkpoint is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    last, temporary = folder / LAST, folder / f".{LAST}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link left under that name would be written through
        with temporary.open("wb") as file:
            file.write(content)
            file.write(_MARK + hashlib.sha256(content).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        if _is_intact(last):
            link_or_copy(last, folder / PREVIOUS)  # as well: at no moment there is neither
        os.replace(temporary, last)
        _sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _storage_error(error, folder, len(content)) from error
    return last


def keep_only_last(folder: Path) -> None:
    """Remove the older checkpoint and leftovers of interrupted writes, once a run is finished."""
    for leftover in (folder / PREVIOUS, *folder.glob(".*.tmp"), *folder.glob(".*.part")):
        leftover.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether the folder of checkpoints has one."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def load(path: Path, network: nn.Module | None = None, advice: str = ADVICE) -> dict[str, Any]:
    """The state in the checkpoint file `path`, or in the newest valid one of the folder `path`, on the CPU.

    `advice` ends the message about one that cannot be used.

    Raises:
        CheckpointError: there is none, or it is damaged, foreign, of another model than `network`, or holds anything but
            plain types.
    """
    if not path.is_dir():
        return _load_file(path, network, advice)
    for folder in (path, path / "checkpoints"):
        candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
        for candidate in candidates:
            try:
                return _load_file(candidate, network, advice)
            except CheckpointError as error:
                if candidate == candidates[-1]:
                    raise
                log.warning("%s Falling back to %s.", str(error).splitlines()[0], PREVIOUS)
    raise CheckpointError(f"No checkpoint in {path}: a run's folder holds checkpoints/{LAST}.")


def is_plain(state: Any) -> bool:
    """Whether `state` can be read back from a checkpoint, which loads plain types and tensors alone."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception:  # of what cannot be pickled, or not be unpickled, almost any
        return False
    return True


def evaluated_weights(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that the run evaluates: their moving average where it keeps one, else the network's own."""
    averaged = state.get("averaged")  # not in checkpoints from before there was one
    if averaged is None:
        return state["model"]
    return {name.removeprefix("module."): tensor for name, tensor in averaged.items() if name != "n_averaged"}


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """What makes two models the same for a checkpoint: the names and shapes of their weights."""
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in weights.items()}


def _load_file(path: Path, network: nn.Module | None, advice: str) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error
    body, trailer = content[:-_TRAILER], content[-_TRAILER:]
    if not trailer.startswith(_MARK):
        raise CheckpointError(f"{path} is not a checkpoint of this program, or it was cut short. {advice}")
    if hashlib.sha256(body).hexdigest().encode() != trailer[len(_MARK) :]:
        raise CheckpointError(f"The checkpoint {path} is damaged: its SHA-256 does not match. {advice}")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # a forged file makes the unpickler raise almost anything
        raise CheckpointError(
            f"The checkpoint {path} holds more than plain values: it could run code. {advice}"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= KEYS or not isinstance(state["model"], dict):
        raise CheckpointError(f"{path} is not a checkpoint of this program. {advice}")
    if network is not None and shapes(state["model"]) != shapes(network.state_dict()):
        raise CheckpointError(f"The checkpoint {path} is of another model. {advice}")
    return state


def _is_intact(path: Path) -> bool:
    """Whether the file is as it was written; a damaged one must not take the place of the older, valid one."""
    if not path.exists():
        return False
    content = memoryview(path.read_bytes())
    return content[-_TRAILER:] == _MARK + hashlib.sha256(content[:-_TRAILER]).hexdigest().encode()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(error: OSError, folder: Path, size: int) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed, there = f"a checkpoint needs {size / 1e6:.1f} MB", folder if folder.exists() else folder.parent
        kept = "; the last good checkpoint is still there" if exists(folder) else ""
        if error.errno == errno.EDQUOT:  # what is free on the disk is not free for this user
            said = f"Your quota is used up: {needed} in {there}."
        else:
            said = f"The disk is full: {needed}, {shutil.disk_usage(there).free / 1e6:.1f} MB are free in {there}."
        return StorageError(f"{said}\nFree some space{kept}.")
    return StorageError(f"The checkpoint folder {folder} cannot be written: {error.strerror or error}.")
