"""The tables in a run's folder: CSV files that grow by rows, and those of a training, a row per step and per epoch."""

import contextlib
import csv
import dataclasses
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resnet_cifar.artifact_files import write_whole
from resnet_cifar.loop import EpochRecord, Progress, StepRecord

STEPS, EPOCHS = "lr_history.csv", "history.csv"

log = logging.getLogger(__name__)


class TrainingTables:
    """`lr_history.csv` and `history.csv` of the training in `folder`: records wait here until they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []

    def add(self, record: StepRecord | EpochRecord) -> None:
        """Keep a record; the loss of a step stays on its device, since reading it would make a GPU wait."""
        if isinstance(record, StepRecord):
            self.steps.append(record)
        else:
            self.epochs.append(record)

    def write(self) -> None:
        """Add what waits to the files; rows that find the disk full are tried again with those that follow."""
        if self.steps and append_csv(self.folder / STEPS, self._step_rows()):
            self.steps.clear()
        if self.epochs and append_csv(self.folder / EPOCHS, [dataclasses.asdict(row) for row in self.epochs]):
            self.epochs.clear()

    def _step_rows(self) -> list[dict[str, Any]]:
        losses = torch.stack([record.loss for record in self.steps]).tolist()  # a GPU is waited for once
        return [
            {"step": record.step, "epoch": record.epoch, "lr": record.lr, "loss": loss}
            for record, loss in zip(self.steps, losses, strict=True)
        ]


def cut_tables(folder: Path, progress: Progress, steps_per_epoch: int) -> None:
    """Drop rows written after the checkpoint, which the resumed run writes again."""
    _cut(folder / EPOCHS, "epoch", progress.epoch - 1)
    _cut(folder / STEPS, "step", (progress.epoch - 1) * steps_per_epoch + progress.batch)


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Add rows to a CSV file, after a header where it is new; False, a warning and the file as it was on a full disk."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if not size:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is written next must not outlive the rows before it
    except OSError as error:
        log.warning("%s was not written (%s); the run goes on.", path.name, error.strerror)
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        return False
    return True


def read_csv(path: Path) -> list[dict[str, float]]:
    """The numbers of a CSV file, a row each."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: int(value) if value.isdigit() else float(value) for key, value in row.items()} for row in rows]


def _cut(path: Path, key: str, last: int) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(line for line in file if line.endswith("\n"))  # a kill can tear the last one
        names, rows = reader.fieldnames, [row for row in reader if int(row[key]) <= last]
    if names is None:
        return path.unlink()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
