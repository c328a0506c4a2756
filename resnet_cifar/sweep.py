"""A sweep while it runs and when it ends: which job this is, whether it has anything to do, what failed, the exit code."""

import contextlib
import logging
import sys
import traceback
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from resnet_cifar.console import say
from resnet_cifar.errors import UserError
from resnet_cifar.run_folder import has_finished, status
from resnet_cifar.sweep_plan import FAILED, SKIP, Job, load_plan

SUMMARY_ERROR = "summary_error.txt"

log = logging.getLogger(__name__)


def current_job() -> Job | None:
    """The plan of the running Hydra job; None outside a sweep, and where the sweeper makes its jobs up."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return None
    jobs = load_plan(Path(settings.sweep.dir)).jobs
    return jobs[settings.job.num] if jobs else None


def place() -> str:
    """Where in the running sweep this Hydra job stands: `#3, 5 to follow: div_factor=25 seed=0`; empty outside a sweep."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return ""
    number, jobs = settings.job.num, load_plan(Path(settings.sweep.dir)).jobs
    if not jobs:
        return f"#{number}"
    left = sum(job.action != SKIP for job in jobs[number + 1 :])
    return f"#{number}, {left} to follow{f': {name}' if (name := jobs[number].name) else ''}"


def is_finished() -> bool:
    """Whether the running Hydra job has nothing to do, which is said in a line.

    A job that the plan runs may be finished too: one that a killed sweep left waiting at a cluster ran since.
    """
    job = current_job()
    if job is None or (job.action != SKIP and not has_finished(Path(job.folder), job.config_hash)):
        return False
    log.info("%s is finished already: %s", job.name or "The job", job.result)
    return True


def tags() -> dict[str, str]:
    """The tag that ties the run to its sweep, if it has one."""
    settings = HydraConfig.get()
    return {"sweep": load_plan(Path(settings.sweep.dir)).id} if settings.mode == RunMode.MULTIRUN else {}


def record_failure(cfg: DictConfig, error: BaseException, message: str) -> None:
    """Add the running job and why it failed to the sweep's list, a file since a launcher's jobs may be other processes.

    One that failed before it was recorded, for want of its data say, becomes a FAILED run all the same.
    """
    job = HydraConfig.get()
    if status(Path(job.runtime.output_dir))[0] != "FAILED":
        from resnet_cifar import experiment, recording

        # The error comes back out, and so does that of a store that cannot be used: the list below has the job anyway. Ctrl-C
        # meanwhile ends the sweep.
        with contextlib.suppress(Exception, type(error)), recording.recorded(*experiment.asked_for(cfg), {}):
            raise error
    overrides = OmegaConf.to_container(job.overrides.task, resolve=False)
    with open(Path(job.sweep.dir) / FAILED, "a", encoding="utf-8") as failed:
        failed.write(f"{job.job.num} {' '.join(overrides)}: {' '.join(message.split())}\n")


class EndOfSweep(Callback):
    """After all jobs: the leaderboard; exit code 1 where a job failed, else that of the summary where it failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        folder = Path(config.hydra.sweep.dir)
        exit_code = _publish(folder, config) if load_plan(folder).jobs else 0
        if (folder / FAILED).exists():
            count = len((folder / FAILED).read_text(encoding="utf-8").splitlines())
            say(f"{count} of the sweep's jobs failed: {folder / FAILED}", sys.stderr)
            exit_code = UserError.exit_code
        if exit_code:
            raise SystemExit(exit_code)


def _publish(folder: Path, config: DictConfig) -> int:
    """The exit code of the sweep's summary; Hydra would turn what it raises into a warning and end with 0."""
    (folder / SUMMARY_ERROR).unlink(missing_ok=True)
    try:
        from resnet_cifar import sweep_summary  # late: torch and the figures

        sweep_summary.publish(folder, config)
    except UserError as error:
        say(str(error), sys.stderr)
        return error.exit_code
    except Exception as error:
        (folder / SUMMARY_ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        say(
            f"The sweep's runs are kept, but their summary failed: {type(error).__name__}: {error}\n"
            f"The traceback is in {folder / SUMMARY_ERROR}. The same command again makes the summary anew.",
            sys.stderr,
        )
        return UserError.exit_code
    return 0
