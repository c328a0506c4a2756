"""What a terminal shows while a training runs: a bar per epoch, a line after each, and once when it will end."""

import logging
import time
from datetime import datetime, timedelta

from tqdm import tqdm

from resnet_cifar.loop import EpochRecord, Progress, StepRecord

STEPS_BEFORE_ESTIMATE = 10
HOUR = 3600

log = logging.getLogger(__name__)


class ProgressDisplay:
    """Bars on a terminal, none in a pipe; log lines in both."""

    def __init__(self, epochs: int, steps_per_epoch: int, num_images: int, evaluated_on: str, estimate: bool) -> None:
        self.epochs, self.steps_per_epoch, self.num_images = epochs, steps_per_epoch, num_images
        self.evaluated_on, self.estimate = evaluated_on, estimate
        self.bar: tqdm | None = None
        self.started, self.steps_seen = time.monotonic(), 0

    def step(self, record: StepRecord, progress: Progress) -> None:
        """Move the bar; its numbers are refreshed only when it is drawn, since reading a loss makes a GPU wait."""
        if self.bar is None:
            self.bar = tqdm(
                total=self.steps_per_epoch,
                initial=progress.batch - 1,
                desc=f"Epoch {record.epoch}/{self.epochs}",
                disable=None,
                leave=False,
                dynamic_ncols=True,
            )
        if self.bar.update():
            accuracy = 100 * int(progress.correct) * self.steps_per_epoch / (progress.batch * self.num_images)
            self.bar.set_postfix_str(f"LR {record.lr:.3g}, loss {record.loss.item():.3f}, accuracy {accuracy:.1f}%")
        self.steps_seen += 1
        if self.estimate and self.steps_seen == STEPS_BEFORE_ESTIMATE:
            self._say_when_it_ends(record.step)

    def epoch(self, record: EpochRecord) -> None:
        """One line for a finished epoch."""
        self.close()
        log.info(
            "epoch %*d/%d  LR %.6f  train loss %.4f, accuracy %6.2f%%  %s loss %.4f, accuracy %6.2f%%  %.0f images/s",
            *(len(str(self.epochs)), record.epoch, self.epochs, record.lr, record.train_loss, record.train_accuracy),
            *(self.evaluated_on, record.eval_loss, record.eval_accuracy, record.images_per_second),
        )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say_when_it_ends(self, step: int) -> None:
        seconds_per_step = (time.monotonic() - self.started) / self.steps_seen
        remaining = seconds_per_step * (self.epochs * self.steps_per_epoch - step)
        end = datetime.now() + timedelta(seconds=remaining)
        if remaining < HOUR:
            log.info("Training takes about %s more, until about %s.", _duration(remaining), f"{end:%H:%M}")
            return
        log.info(
            "Training takes about %s more on this CPU, until about %s; for a look in a minute: "
            "python run.py experiment=quickstart",
            *(_duration(remaining), f"{end:%H:%M on %d %B}"),
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} hours"
