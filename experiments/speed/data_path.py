"""The data path alone: batches of 512 by ours, on the device, and by a DataLoader's workers; the host memory it takes."""

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import competitors
import torch
from omegaconf import DictConfig

from resnet_cifar import parts
from resnet_cifar.data import Images, training_batches

Entry = tuple[str, float, str, str]  # what, value, unit, target
OURS, LOADER = "our data path", "per-image transforms in a DataLoader with 2 workers"


def measure(data_root: str, repeats: int, device: torch.device) -> Iterator[Entry]:
    """Images/s of both sides and their ratio, `repeats` times in turn; once the host memory."""
    setting = competitors.Setting(1.0, 0, 0, data_root, device, "fp32")
    cfg = competitors.configuration(setting)
    before = peak_memory()
    train = parts.load_train_and_val(cfg.data)[0]
    yield "training set as a uint8 tensor", train.images.nbytes / 1e6, "MB", ""
    yield "peak memory that loading it adds", peak_memory() - before, "MB", ""
    augment, images = parts.build_parts(cfg, train.classes).augment, train.to(device)
    # Before there is a DataLoader, whose data set holds the pixels once more.
    forget_peak_memory()
    loaded = peak_memory()
    for _ in training_batches(images, augment, 512, seed=0, epoch=1):
        pass
    yield "peak memory that an epoch of our data path adds", peak_memory() - loaded, "MB", "no copy of the set"
    for epoch in range(1, repeats + 1):
        ours = rate(training_batches(images, augment, 512, seed=0, epoch=epoch), counted=80, device=device)
        loader = rate(iter(competitors.student_loader(setting)), counted=60, device=device)
        yield OURS, ours, "images/s", ""
        yield LOADER, loader, "images/s", ""
        yield "ratio", ours / loader, "x", ">= 20"
    yield "copies of the pixels that a second job makes", float(copies(train, cfg)), "", "0"


def rate(batches: Iterator, counted: int, device: torch.device, warmup: int = 8) -> float:
    """Images/s of `counted` batches after the first ones, in which the workers start and their queues settle."""
    for _ in range(warmup):
        next(batches)
    competitors.wait_for(device)
    started = time.perf_counter()
    images = sum(len(next(batches)[1]) for _ in range(counted))
    competitors.wait_for(device)
    return images / (time.perf_counter() - started)


def peak_memory() -> float:
    """The most memory (MB) that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def forget_peak_memory() -> None:
    """Let the peak be what is in use now, on Linux (proc(5)): reading the files took more than an epoch will."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def copies(train: Images, cfg: DictConfig) -> int:
    """Whether loading again, as a sweep's next job does, has other memory behind it."""
    return int(parts.load_train_and_val(cfg.data)[0].images.data_ptr() != train.images.data_ptr())
