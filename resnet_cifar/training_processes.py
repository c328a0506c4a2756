"""A training's processes on this machine, by torch's elastic_launch: started, stopped and ended as if they were one.

The first one (rank 0) does what a process alone does: it finds the learning rate, shows, writes, tracks and explains. The others
take their part in the steps and evaluations, and are silent.
"""

import contextlib
import logging
import logging.config
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from resnet_cifar.distributed import World
from resnet_cifar.errors import UserError
from resnet_cifar.signals import StopRequest, ignored, stop_requests

# The launcher notices a process that dies; the others wait long for the first one only while it searches for the learning rate.
PATIENCE = timedelta(days=1)
# Characters of an error or its traceback: a pipe holds 64 KiB, and what is in it is read when all processes have ended.
LONGEST = 5000


def launch(size: int, device: str, logs: dict[str, Any], work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(world, *arguments)` in `size` new processes on this machine and wait until all are done.

    `device` is `cpu` (gloo, the threads divided) or `cuda` (NCCL, a GPU each); `logs` configures the first one's logging.

    Raises:
        SystemExit: SIGINT, SIGTERM or SIGHUP asked to stop, which the first process is told: with the signal's exit code.
        Exception: what was raised in the process that failed first.
        UserError: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # pages about what is said in a line here
    if multiprocessing.get_start_method(allow_none=True) == "loky":  # a joblib worker's, which no child of it knows
        multiprocessing.set_start_method("spawn", force=True)
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // size)
    with tempfile.TemporaryDirectory() as folder, stop_requests(then=_stop_children) as stop:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="",  # its own handling would kill after 30 seconds what may still be saving
        )
        try:
            elastic_launch(config, _work)(failures, device, threads, logs, work, arguments)
        except ChildFailedError as failed:
            error, cause = _reason(failed, failures, stop)
            raise error from cause


def _reason(failed: Any, failures: SimpleQueue, stop: StopRequest) -> tuple[BaseException, "RemoteTraceback | None"]:
    """Why the processes ended: a signal to all of them, a death, or the first of their exceptions."""
    if stop.signal_number:
        return SystemExit(stop.exit_code), None
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0 or failures.empty():
        ended = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        return UserError(f"Process {rank} of the training ended with {ended}, and so the others were ended."), None
    error, remote_traceback = failures.get()
    return error, RemoteTraceback(remote_traceback)


class RemoteTraceback(Exception):
    """The traceback of an exception in another process, as text; the cause of that exception in this one."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _stop_children(number: int) -> None:
    """Ask the processes to stop, of which the first one listens; before there are any, stop here."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    if not children:
        raise SystemExit(128 + number)


def _work(
    failures: SimpleQueue, device: str, threads: int, logs: dict[str, Any], work: Callable[..., None], arguments: tuple
) -> None:
    """What each new process does."""
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # when the launching process is killed, so is this one, as if they were one
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    # A terminal's Ctrl-C and its end reach all processes, a cluster's SIGTERM too. The launching one hears the first, the first
    # worker the second; the others stop when that one does.
    with ignored(signal.SIGINT, signal.SIGHUP, *([signal.SIGTERM] if world.rank else [])):
        try:
            _speak(world, logs)
            torch.set_num_threads(threads)
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
            work(world, *arguments)
            world.wait_for_first()  # its evaluation at the end takes longer; NCCL wants to be ended by all at about the same time
            dist.destroy_process_group()
        except BaseException as error:
            if failures.empty():  # what the others meet then is that this one is gone
                failures.put((_picklable(error), traceback.format_exc()[:LONGEST]))
            raise SystemExit(1) from None


def _speak(world: World, logs: dict[str, Any]) -> None:
    """Log as the launching process does; all but the first are silent."""
    if world.rank == 0:
        logging.config.dictConfig(logs)
    else:
        logging.disable()
        warnings.simplefilter("ignore")


def _picklable(error: BaseException) -> BaseException:
    with contextlib.suppress(Exception):
        pickled = pickle.dumps(error)
        if len(pickled) <= LONGEST:
            return pickle.loads(pickled)
    return RuntimeError(f"{type(error).__name__}: {error}"[:LONGEST])
