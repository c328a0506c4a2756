"""What a terminal shows: a bar per epoch, a line after each, once when training will end, and at the end where to look.

What it shows has room in 80 columns, unless a path is longer.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resnet_cifar.console import nobody_reads, setting, shown
from resnet_cifar.loop import EpochRecord, Progress, StepRecord
from resnet_cifar.suggestions import program
from resnet_cifar.tracked_run import Run, TrackedRun, run_page

STEPS_BEFORE_ESTIMATE = 10
HOUR = 3600
LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` serves a database
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"

log = logging.getLogger(__name__)


class Bar(tqdm):
    """A bar with lines above it, as long as there is somebody to read them."""

    def display(self, *arguments: Any, **options: Any) -> bool:
        """Draw it, and say whether that is done; no more when the terminal was closed."""
        try:
            return bool(super().display(*arguments, **options))
        except OSError:
            self.disable = True
            return False

    @classmethod
    def write(cls, *arguments: Any, **options: Any) -> None:
        """A line above the bars."""
        try:
            super().write(*arguments, **options)
            (options.get("file") or sys.stdout).flush()  # here, and not where the handler would fail
        except OSError:
            nobody_reads()


class ProgressDisplay:
    """Bars on a terminal and in a notebook, none in a pipe; lines everywhere. A context in which the two do not mix."""

    def __init__(
        self, epochs: int, num_images: int, batch_size: int, evaluated_on: str, costs: Sequence[float] | None
    ) -> None:
        """`costs`: what a step of each epoch costs, relative to each other, to say when it will end; None says nothing."""
        self.epochs, self.num_images, self.batch_size = epochs, num_images, batch_size
        self.evaluated_on, self.costs = evaluated_on, costs
        self.steps_per_epoch = -(-num_images // batch_size)
        self.bar: Bar | None = None
        self.started, self.steps_timed = 0.0, -1  # the first step warms up and only starts the clock
        self.redirection = ExitStack()

    def __enter__(self) -> "ProgressDisplay":
        with warnings.catch_warnings(action="ignore"):  # about notebook widgets, which this bar does without
            from tqdm.contrib.logging import logging_redirect_tqdm
        self.redirection.enter_context(logging_redirect_tqdm(tqdm_class=Bar))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.redirection.close()

    def step(self, record: StepRecord, progress: Progress) -> None:
        """Move the bar; its numbers are refreshed only when it is drawn, since reading a loss makes a GPU wait."""
        if self.bar is None:
            # A notebook's streams are no terminals, yet it draws bars, and in one stream with the lines they stay in order.
            in_notebook = type(sys.stdout).__module__ == "ipykernel.iostream"
            self.bar = Bar(
                total=self.steps_per_epoch,
                initial=progress.batch - 1,
                desc=f"epoch {self._of_epochs(record.epoch)}",
                bar_format=BAR,
                disable=False if in_notebook else None,
                file=sys.stdout if in_notebook else sys.stderr,
                leave=False,
                ncols=80 if in_notebook else None,
                dynamic_ncols=not in_notebook,
            )
        if self.bar.update():
            accuracy = 100 * int(progress.correct) / min(progress.batch * self.batch_size, self.num_images)
            self.bar.set_postfix_str(f"lr {record.lr:.6f}, loss {record.loss.item():.3f}, {accuracy:.1f}%")
        if self.steps_timed < 0:
            self.started = time.monotonic()
        self.steps_timed += 1
        if self.costs is not None and self.steps_timed == STEPS_BEFORE_ESTIMATE:
            self._say_when_it_ends(self.costs[record.epoch - 1 :], progress.batch)

    def epoch(self, record: EpochRecord) -> None:
        """One line for a finished epoch: its last learning rate, losses and accuracies, and the seconds it took."""
        self.close()
        # Resumed: a whole evaluation for a few steps is no measure.
        if self.steps_timed < min(STEPS_BEFORE_ESTIMATE, self.steps_per_epoch - 1):
            self.steps_timed = -1
        log.info(
            "epoch %s  lr %.6f  train %6.3f %6.2f%%  %s %6.3f %6.2f%%  %3s s",
            *(self._of_epochs(record.epoch), record.lr, record.train_loss, record.train_accuracy),
            *(self.evaluated_on, record.eval_loss, record.eval_accuracy),
            _seconds(record.epoch_seconds),
        )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _of_epochs(self, epoch: int) -> str:
        return f"{epoch:{len(str(self.epochs))}}/{self.epochs}"

    def _say_when_it_ends(self, costs: Sequence[float], batch: int) -> None:
        seconds_per_step = (time.monotonic() - self.started) / self.steps_timed
        steps = sum(costs) / costs[0] * self.steps_per_epoch - batch  # that cost as much as those seen
        remaining = seconds_per_step * steps
        end = datetime.now() + timedelta(seconds=remaining)
        if remaining < HOUR:
            log.info("Training takes about %s more, until about %s.", duration(remaining), f"{end:%H:%M}")
            return
        log.info(
            "Training takes about %s more on this CPU, until %s;\nfor a look in a minute: %s experiment=quickstart",
            *(duration(remaining), f"{end:%H:%M on %d %B}", program()),
        )


def where_to_look(task: str, folder: Path, tracked_run: Run) -> str:
    """The run's folder, figures and page in MLflow, and the command to go on with; paths are relative where they can be."""
    lines = ["", f"folder   {shown(folder)}", f"figures  {shown(folder / 'figures')}"]
    if isinstance(tracked_run, TrackedRun):
        lines.append(f"MLflow   {shown_uri(tracked_run.url)}")
        if not tracked_run.url.startswith("http"):
            lines.append(f"         {run_page(LOCAL_SERVER, tracked_run.experiment_id, tracked_run.run_id)}")
    if task == "train":
        lines.append(f"next     {program()} task=explain explain.images=<folder of pictures> \\")
        lines.append(f"           {setting('checkpoint', folder)}")
    return "\n".join(lines)


def shown_uri(text: str) -> str:
    """The address of an SQLite database in `text` from the working directory, where it lies in there."""
    return text.replace(f"sqlite:///{Path.cwd()}/", "sqlite:///")


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader would choose: `3.4 s`, `45 s`, `3 min`, `3.5 hours`."""
    if seconds < 90:
        return f"{_seconds(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} hours"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"
