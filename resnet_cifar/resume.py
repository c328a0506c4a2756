"""Going on with an interrupted run: finding it, its own configuration, and the state it stopped in."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from resnet_cifar import schema
from resnet_cifar.compose import outputs
from resnet_cifar.errors import CheckpointError, ConfigError
from resnet_cifar.loop import Progress, Training
from resnet_cifar.recording import STATUS, Invocation


def command_line(argv: list[str]) -> list[str] | None:
    """The command line that continues the run `resume=...` names, in its folder; None when that run is finished.

    Raises:
        ConfigError: something else is given beside it, which would change what is continued.
        CheckpointError: there is no such run.
    """
    reference = next(argument for argument in argv if argument.startswith("resume=")).removeprefix("resume=")
    if len(argv) > 1:
        beside = " ".join(argument for argument in argv if not argument.startswith("resume="))
        raise ConfigError(f"A run is resumed with its own configuration: leave out {beside}")
    folder = find_run(reference)
    if (folder / STATUS).exists() and (folder / STATUS).read_text().startswith("FINISHED"):
        return None
    return [f"resume='{folder}'", f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]


def find_run(reference: str) -> Path:
    """The folder of a run, given as such or as its MLflow run id."""
    folder = Path(reference).absolute()
    if (folder / "config.yaml").is_file():
        return folder
    if reference.isalnum():
        for journal in Path(outputs()).rglob("tracking.jsonl"):
            if _run_id(journal.parent) == reference:
                return journal.parent
    raise CheckpointError(
        f"resume={reference}: there is no such run. Give the folder of a run, which holds its config.yaml,\n"
        f"or the id of an MLflow run whose folder lies under {outputs()}"
    )


def saved_run(folder: Path) -> tuple[DictConfig, Invocation]:
    """The configuration a run started with, checked as if it were given now, and how it was asked for."""
    cfg = OmegaConf.load(folder / "config.yaml")
    schema.check(cfg)
    hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
    invocation = Invocation(
        folder=folder,
        overrides=tuple(hydra.overrides.task),
        choices=dict(hydra.runtime.choices),
        resumed=True,
        run_id=_run_id(folder),
    )
    return cfg, invocation


def restore(training: Training, network: torch.nn.Module, progress: Progress, state: dict[str, Any]) -> None:
    """Put a checkpoint's state into the parts, which then go on bit for bit as if they had never stopped."""
    network.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    for name, value in state["progress"].items():
        setattr(progress, name, value)


def cut_tables(folder: Path, progress: Progress, steps_per_epoch: int) -> None:
    """Drop rows written after the checkpoint, which the resumed run writes again."""
    _cut(folder / "history.csv", "epoch", progress.epoch - 1)
    _cut(folder / "lr_history.csv", "step", (progress.epoch - 1) * steps_per_epoch + progress.batch)


def _cut(path: Path, key: str, last: int) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names, rows = reader.fieldnames, [row for row in reader if row[key] and int(row[key]) <= last]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _run_id(folder: Path) -> str | None:
    journal = folder / "tracking.jsonl"
    if not journal.exists():
        return None
    first = journal.read_text().partition("\n")[0]
    return json.loads(first)["run"]
