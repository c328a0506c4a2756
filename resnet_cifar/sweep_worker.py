"""A worker process of a parallel sweep: a GPU of its own, chosen before CUDA starts, and an end when its sweep is gone."""

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


def take_gpu(folder: Path) -> None:
    """Leave this process one GPU: the first that no other process holds by its lock in `folder`; without one, the last."""
    import torch  # late; counting the devices does not start CUDA

    if _held:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    for gpu in gpus:
        lock = FileLock(folder / f".gpu_{gpu}.lock", thread_local=False)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        return


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
