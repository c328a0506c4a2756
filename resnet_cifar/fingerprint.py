"""What makes two runs the same: the resolved configuration, as far as it can change a result, and the package's source."""

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Where a run lies, where it is recorded and how it was asked for tell nothing about its result.
ELSEWHERE = ("tracking", "sweep", "output_dir", "resume")
# Data sets that are checked against their checksums, or come with a library: the same in every folder.
SAME_ANYWHERE = ("torchvision.datasets.", "resnet_cifar.data.Digits")


@functools.cache
def source_hash() -> str:
    """A hash of the package's Python files, names and contents."""
    package, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def config_hash(cfg: DictConfig) -> str:
    """A hash of every resolved value that can change a result."""
    container = OmegaConf.to_container(cfg, resolve=True)
    for key in ELSEWHERE:
        container.pop(key, None)
    data = container.get("data", {})
    if data.get("dataset", {}).get("_target_", "").startswith(SAME_ANYWHERE):
        data.pop("root", None)
        data["dataset"].pop("root", None)
    container.get("trainer", {}).pop("checkpoint_minutes", None)
    if container.get("checkpoint") is not None:
        container["checkpoint"] = _end_of_checkpoint(Path(container["checkpoint"])) or container["checkpoint"]
    pictures = container.get("explain", {}).get("images")
    with suppress(OSError):  # what cannot be read is refused later, in words
        if pictures is not None and Path(pictures).is_dir():
            files = sorted(path for path in Path(pictures).iterdir() if path.is_file())
            container["explain"]["images"] = [(path.name, _digest(path)) for path in files]
    return _hash(container)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # one that cannot be read is not explained either
        return ""


def _end_of_checkpoint(path: Path) -> str:
    """The SHA-256 in which the checkpoint file or a run's last checkpoint ends; empty where `path` is none, but a run's id."""
    # checkpoint.py looks in the same places, but imports torch.
    with suppress(OSError):
        for file in (path, path / "last.pt", path / "checkpoints" / "last.pt"):
            if file.is_file():
                with file.open("rb") as opened:
                    opened.seek(max(0, file.stat().st_size - 64))
                    return opened.read().hex()
    return ""


def sweep_id(overrides: Sequence[str], config_hashes: Sequence[str]) -> str:
    """The name of a sweep: the same for the same overrides, jobs and source, wherever it writes and is recorded."""
    # hydra.* is not in Hydra's list of a task's overrides.
    untold = (*ELSEWHERE, "data.root", "trainer.checkpoint_minutes")
    told = [override for override in overrides if not override.lstrip("+~").startswith(untold)]
    return _hash([told, list(config_hashes), source_hash()])[:10]


def _hash(value: Any) -> str:
    value = json.loads(json.dumps(value), parse_int=float)  # 100 is 100.0
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
