"""A worker process of a parallel sweep: GPUs of its own, chosen before CUDA starts, and an end when its sweep is gone."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

CHECK_SECONDS = 1

_held: list[FileLock] = []  # while this process lives, which may be several jobs long: CUDA sees only what it saw first
_watched: list[threading.Thread] = []


def take_gpus(folder: Path, count: int) -> None:
    """Leave this process `count` GPUs: the first that no other process holds by their locks in `folder`; else the last."""
    import torch  # late; counting the devices does not start CUDA

    if _held:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    taken: list[str] = []
    for gpu in gpus:
        lock = FileLock(folder / f".gpu_{gpu}.lock", thread_local=False)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            _held.append(lock)
            taken.append(gpu)
        if len(taken) == count:
            break
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken if len(taken) == count else gpus[-count:])


def gpus_of_a_job() -> int:
    """The `${gpus_of_a_job:}` of conf/hydra/launcher/cluster.yaml: 1 where this machine has a CUDA GPU, else 0."""
    import torch  # late; counting the devices does not start CUDA

    return int(torch.cuda.device_count() > 0)


def end_with_sweep() -> None:
    """From now on, die as soon as the process that runs the sweep has died.

    joblib's workers would go on, and take further jobs, beside those of the same command given again. They die as it did, by
    SIGKILL: to stop by SIGTERM would end one job and start the next.
    """
    sweep = multiprocessing.parent_process()
    if sweep is None or _watched:
        return

    def watch() -> None:
        while os.getppid() == sweep.pid:
            time.sleep(CHECK_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    _watched.append(threading.Thread(target=watch, daemon=True))
    _watched[0].start()
