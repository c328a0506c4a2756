"""A GPU of its own for each process of a parallel sweep, chosen before CUDA starts."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

_held: list[FileLock] = []  # while this process lives, which may be several jobs long: CUDA sees only what it saw first


def take(folder: Path) -> None:
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
