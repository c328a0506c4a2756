"""Shared by the tests: one torch thread, a database with MLflow's tables, and commands in processes of their own."""

import logging
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # numbers are compared bit for bit, which is promised for a CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads, of other processes too, only wait

import torch
from processes import Commands

from resnet_cifar import console

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10():
    """The folder that holds the real CIFAR-10; without it the test is skipped."""
    folder = Path(os.environ.get("CIFAR10_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"CIFAR-10 is neither in {folder} nor named by CIFAR10_ROOT")
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An MLflow database without runs; making one takes seconds, copying it nothing."""
    from resnet_cifar import tracking

    database = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.Store(f"sqlite:///{database}").client.search_experiments()
    return database


@pytest.fixture
def outputs(empty_database, tmp_path):
    """A folder for `output_dir`, its database made already."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture
def logging_put_back():
    """The root logger as it was, after a test in whose process Hydra sets logging up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [*console.failures.handlers, *set(root.handlers) - set(handlers)]:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def commands():
    """`python run.py` in processes of their own, forked from one that has imported everything."""
    return Commands()
