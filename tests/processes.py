"""Commands in processes of their own, for real signals and real deaths.

They are forked from a server that has imported everything already: starting Python, torch and MLflow takes ten seconds.
"""

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PRELOADED = [
    *("resnet_cifar.__main__", "resnet_cifar.experiment", "mlflow.pytorch", "mlflow.store.tracking.sqlalchemy_store"),
    *("torch.export", "torch_lr_finder", "torchinfo", "pytorch_grad_cam", "matplotlib.backends.backend_agg"),
    *(
        "sklearn.datasets",
        "sklearn.model_selection",
        "scipy.stats",
        "torch.export._trace",
        "torch._export.serde.serialize",
    ),
    *(
        "torch.export.pt2_archive._package",
        "torch.distributed.launcher.api",
        "resnet_cifar.figures",
        "resnet_cifar.sweep_summary",
    ),
]
# Two epochs of eight steps on digits: seconds, with everything a run does.
TINY = (
    *("data=digits", "data.train_size=120", "data.test_size=40", "data.batch_size=16", "model.width=0.125"),
    *("trainer.epochs=2", "trainer.precision=fp32", "explain.num_images=2"),
)
STEPS = 8


def tiny(*arguments: str) -> tuple[str, ...]:
    """The arguments of a tiny run with these added, and few iterations of the LR finder where it searches."""
    searches = not any(argument.startswith(("scheduler.max_lr", "scheduler=", "experiment=")) for argument in arguments)
    return (*TINY, *(("lr_finder.num_iter=4",) if searches else ()), *arguments)


@dataclass
class Command:
    """A started command: its process, and the file that holds what it prints."""

    process: BaseProcess
    printed: Path

    def ends(self) -> int:
        """The exit code, minus the signal where one killed it."""
        self.process.join(120)
        assert self.process.exitcode is not None, f"still running: {self.output}"
        return self.process.exitcode

    @property
    def output(self) -> str:
        """Standard output and error together."""
        return self.printed.read_text()


class Commands:
    """Calling it with the arguments of `python run.py` starts that command."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [before])])
        forkserver.ensure_running()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        self._count = 0

    def __call__(
        self,
        *arguments: str,
        printed: Path,
        fault: Callable[..., None] | None = None,
        fault_arguments: tuple = (),
        environment: Mapping[str, str] | None = None,
        daemon: bool = True,
    ) -> Command:
        """Start `run.py` with these arguments after `fault`, a function of this module, has prepared its process.

        A `daemon` does not outlive the tests, and may not start processes of its own.
        """
        details = (arguments, str(printed), fault, fault_arguments, dict(environment or {}))
        printed.touch()
        process = self._context.Process(target=_run, args=details, daemon=daemon)
        process.start()
        return Command(process, printed)


def _run(arguments, printed, fault, fault_arguments, environment):
    os.chdir(REPOSITORY)
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(environment)
    import torch

    from resnet_cifar import __main__

    torch.set_num_threads(1)
    if fault:
        fault(*fault_arguments)
    sys.argv = ["run.py", *arguments]
    __main__.main()


# Faults: each waits inside the process for its moment, so that a test does not depend on how fast the machine is.


def after_steps(count: int, act: Callable[..., None], *arguments: object) -> None:
    """Call `act` when this process has done `count` optimizer steps."""
    from resnet_cifar import experiment

    show, seen = experiment.ProgressDisplay.step, []

    def step(self, record, progress):
        show(self, record, progress)
        seen.append(record.step)
        if len(seen) == count:
            act(*arguments)

    experiment.ProgressDisplay.step = step


def signals(*numbers: int) -> None:
    """Send this process signals, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def on_a_terminal(name: str) -> None:
    """This process leads a session of its own on that terminal, which is where it prints."""
    import fcntl
    import termios

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)


def killed_before_the_checkpoint(count: int) -> None:
    """Die by SIGKILL when the `count`-th checkpoint is to be written: what it would have held is recorded already."""
    from resnet_cifar import checkpoint

    save, calls = checkpoint.save, []

    def die_at(state, folder):
        calls.append(folder)
        if len(calls) == count:
            signals(signal.SIGKILL)
        return save(state, folder)

    checkpoint.save = die_at


def killed_while_the_database_is_made() -> None:
    """Die by SIGKILL when MLflow has made the first of a new database's tables, and not noted that it has."""
    from mlflow.store.db import utils

    utils._upgrade_db = lambda _: signals(signal.SIGKILL)


def killed_before_it_is_recorded() -> None:
    """Die by SIGKILL when the run's folder is there and its start is to be told to the tracking store."""
    from resnet_cifar import tracking

    tracking.start = lambda **_: signals(signal.SIGKILL)


def waits_after_steps(count: int, released: str) -> None:
    """Stand still after `count` steps until the file `released` is there."""
    import time

    def wait():
        while not Path(released).exists():
            time.sleep(0.02)

    after_steps(count, wait)


def full_disk_for_checkpoint(count: int) -> None:
    """From the `count`-th checkpoint on, temporary files of checkpoints lie on /dev/full: every write is a real ENOSPC."""
    from resnet_cifar import checkpoint

    save, open_file, calls = checkpoint.save, Path.open, []

    def counted(state, folder):
        calls.append(folder)
        return save(state, folder)

    def on_a_full_disk(path, *arguments, **keywords):
        full = len(calls) >= count and path.name == ".last.pt.tmp"
        return open_file(Path("/dev/full") if full else path, *arguments, **keywords)

    checkpoint.save, Path.open = counted, on_a_full_disk


def some_seeds_fail() -> None:
    """From now on a job with seed=1 raises and one with seed=2 calls sys.exit(7), where its model is built."""
    import torch

    set_seed = torch.manual_seed

    def manual_seed(seed):
        if seed == 1:
            raise RuntimeError("cosmic ray")
        if seed == 2:
            sys.exit(7)
        return set_seed(seed)

    torch.manual_seed = manual_seed


def at_the_first_job(fault: Callable[..., None], *arguments: object) -> None:
    """Call `fault` when the first job starts: a worker has its threads given before it imports torch."""
    from resnet_cifar import sweep

    is_finished, called = sweep.is_finished, []

    def is_finished_after_fault() -> bool:
        if not called:
            called.append(fault)
            fault(*arguments)
        return is_finished()

    sweep.is_finished = is_finished_after_fault


def seed_is_killed_once(seed: int, step: int, marker: str) -> None:
    """The job with this seed dies by SIGKILL at this step; the file `marker` says that it has, and spares its next try."""
    from hydra.core.hydra_config import HydraConfig

    from resnet_cifar import experiment

    show = experiment.ProgressDisplay.step

    def step_or_die(self, record, progress):
        show(self, record, progress)
        chosen = record.step == step and f"seed={seed}" in HydraConfig.get().overrides.task
        if chosen and not Path(marker).exists():
            Path(marker).touch()
            signals(signal.SIGKILL)

    experiment.ProgressDisplay.step = step_or_die


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("drawn badly")


def no_figures() -> None:
    """Every figure of curves fails."""
    from resnet_cifar import figures

    figures.loss_and_accuracy = figures.lr_history = figures.confusion_matrix = _fails


def no_grad_cam() -> None:
    """Grad-CAM fails."""
    from resnet_cifar import explain

    explain.grad_cam = _fails


failing_figures = {"figures": no_figures, "grad_cam": no_grad_cam}


def fails_with_a_token() -> None:
    """Training fails with a message that holds the environment's HUB_TOKEN, and no file has hard links, as with a server."""
    from resnet_cifar import experiment

    def link(*_: object) -> None:
        raise OSError("no links here")

    def begin(*_: object, **__: object) -> None:
        raise RuntimeError(f"GET https://hub/weights?x={os.environ['HUB_TOKEN']} failed")

    experiment.begin, os.link = begin, link


def terminated_at_grad_cam() -> None:
    """SIGTERM arrives while the first heat maps are computed."""
    from resnet_cifar import explain

    explain.grad_cam = lambda *_: signals(signal.SIGTERM)


def interrupted_at_grad_cam() -> None:
    """Ctrl-C while the first heat maps are computed."""
    from resnet_cifar import explain

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    explain.grad_cam = lambda *_: signals(signal.SIGINT)


def terminated_again_at_the_end() -> None:
    """SIGTERM while the first heat maps are computed, and once more while the run is being ended."""
    from resnet_cifar import tracked_run

    terminated_at_grad_cam()
    finish = tracked_run.TrackedRun.finish

    def finish_after_a_signal(self, *arguments):
        signals(signal.SIGTERM)
        finish(self, *arguments)

    tracked_run.TrackedRun.finish = finish_after_a_signal


def second_process_fails(message: str) -> None:
    """Of a training's processes the second raises an error in its first step, which the first only meets as a lost peer."""
    from resnet_cifar import experiment

    experiment.take_part = functools.partial(_take_part_but_in_the_second, message)


def _take_part_but_in_the_second(message, world, cfg, invocation):
    from resnet_cifar import experiment, loop

    def no_batches(*_: object) -> None:
        raise RuntimeError(message)

    if world.rank == 1:
        loop.training_batches = no_batches
    experiment.take_part(world, cfg, invocation)


def terminated_at_the_curves() -> None:
    """SIGTERM arrives when the last step is done and the curves are about to be drawn."""
    from resnet_cifar import report

    report.draw_curves = lambda *_: signals(signal.SIGTERM)


def compiles_nothing() -> None:
    """torch.compile wraps the network and does not compile it, which would take half a minute."""
    import torch

    torch.compiler.set_stance("force_eager")


def full_disk_at_the_start() -> None:
    """The configuration of the run, its first file, finds a full disk: /dev/full, a real ENOSPC."""
    open_file = Path.open

    def on_a_full_disk(path, *arguments, **keywords):
        return open_file(Path("/dev/full") if path.name == ".config.yaml.part" else path, *arguments, **keywords)

    Path.open = on_a_full_disk


def disk_full_for_a_while() -> None:
    """The first time each is written, the summary and the tables find a full disk: /dev/full, a real ENOSPC."""
    open_file, seen = Path.open, set()

    def once_on_a_full_disk(path, mode="r", *arguments, **keywords):
        full = mode in ("w", "a") and path.name in ("model_summary.txt", "lr_history.csv", "history.csv")
        full = full and path.name not in seen
        seen.add(path.name)
        return open_file(Path("/dev/full") if full else path, mode, *arguments, **keywords)

    Path.open = once_on_a_full_disk
