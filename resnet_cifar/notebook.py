"""A run from a notebook, composed, checked, recorded and logged as on the command line."""

from pathlib import Path

from omegaconf import DictConfig

from resnet_cifar.__main__ import check_command_line
from resnet_cifar.compose import start_job
from resnet_cifar.errors import ConfigError
from resnet_cifar.experiment import asked_for
from resnet_cifar.recording import Invocation


def begin(*overrides: str) -> tuple[DictConfig, Invocation]:
    """What `run.py` with these overrides would run, in a new run folder: for `experiment.train_in_stages`.

    Raises ConfigError for what cannot be run, StorageError for a folder that holds a run, before anything is written.
    """
    composition = check_command_line(overrides)
    if composition is None or composition.sweep is not None:
        raise ConfigError("A notebook trains one run: give sweeps to python run.py")
    for cfg, _ in composition.jobs:
        if cfg.task != "train" or cfg.resume is not None:
            raise ConfigError("A notebook trains from the beginning: give other tasks and resume to python run.py")
        if cfg.trainer.devices > 1:
            raise ConfigError("trainer.devices: a notebook trains in its own process; give more to python run.py")
    return start_job(overrides, asked_for)


def show(folder: Path, *patterns: str) -> None:
    """Display a run's figures of these names (`grad_cam_*` is several), or say that the run has none."""
    from IPython.display import Image, display

    for pattern in patterns:
        paths = sorted((folder / "figures").glob(f"{pattern}.png"))
        if not paths:
            print(f"This run has no figure {pattern}.")
        display(*(Image(path, width=900) for path in paths))
