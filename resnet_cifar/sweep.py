"""What spans the runs of a sweep: the list of those that failed, from which the sweep has its exit code."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

FAILED = "failed_jobs.txt"


def record_failure(message: str) -> None:
    """Add the running job and why it failed to the sweep's list, a file since a launcher's jobs may be other processes."""
    job = HydraConfig.get()
    overrides = OmegaConf.to_container(job.overrides.task, resolve=False)
    with open(Path(job.sweep.dir) / FAILED, "a", encoding="utf-8") as failed:
        failed.write(f"{job.job.num} {' '.join(overrides)}: {' '.join(message.split())}\n")


class ExitCode(Callback):
    """Ends a sweep in which a job failed with exit code 1, after all the others have run."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        failed = Path(config.hydra.sweep.dir) / FAILED
        if failed.exists():
            count = len(failed.read_text(encoding="utf-8").splitlines())
            sys.stderr.write(f"{count} of the sweep's jobs failed: {failed}\n")
            raise SystemExit(1)
