"""The run around the training, by part: from the times at which a real `run.py` writes its files.

One epoch of a single step at width 0.125, so that hardly anything but the run's own cost is left.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch

from resnet_cifar import checkpoint
from resnet_cifar.custom_resnet import CustomResNet
from resnet_cifar.tables import read_csv

Entry = tuple[str, float, str, str]  # what, value, unit, target
ROOT = Path(__file__).resolve().parents[2]
BATCH = 512
FIGURES = ("loss_and_accuracy", "lr_history", "confusion_matrix", "misclassified_images")


def measure(data_root: str, repeats: int, device: torch.device) -> Iterator[Entry]:
    """Seconds of each part of a run, `repeats` times; a run with a new database comes first and is not counted."""
    small = ("model.width=0.125", "trainer.epochs=1", "scheduler=constant", f"trainer.device={device}")
    images = (f"data.root={Path(data_root).resolve()}", f"data.train_size={BATCH}", f"data.batch_size={BATCH}")
    arguments = [*small, *images]
    with tempfile.TemporaryDirectory() as folder:
        arguments.append(f"output_dir={folder}")
        yield "first run, with a new MLflow database, in all", run(arguments), "s", ""
        for repeat in range(repeats):
            yield "a checkpoint of the network at width 1, which replaces another", checkpoint_seconds(), "s", ""
            yield "`--help`", run(["--help"]), "s", "< 1.5 s"
            yield "`--cfg job`", run(["--cfg", "job"]), "s", "< 1.5 s"
            for module in ("resnet_cifar.experiment", "mlflow", "pytorch_grad_cam"):
                yield f"`import {module}` in a process of its own", run_python(f"import {module}"), "s", ""
            began = time.time()
            whole = run(arguments)
            yield from parts_of_run(began, began + whole, newest(Path(folder, "runs")))
            yield from sweep(arguments, repeat)


def checkpoint_seconds() -> float:
    """Seconds to save weights and Adam's moments where a checkpoint lies already, which is verified before it is replaced."""
    network = CustomResNet()
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory(dir=ROOT / "outputs") as folder:  # a system's own can lie in memory
        checkpoint.save(state, Path(folder))
        started = time.perf_counter()
        checkpoint.save(state, Path(folder))
        return time.perf_counter() - started


def parts_of_run(began: float, ended: float, folder: Path) -> Iterator[Entry]:
    """The seconds between the files of one run, from the command to the end of its process."""
    first_step, trained = training_times(folder)
    set_up = written(folder / ".hydra" / "overrides.yaml")
    loaded, tracked = written(folder / "config.yaml"), logged(folder, "Run folder")
    described = written(folder / "model_summary.txt")
    yield "command to Hydra's job: arguments composed and checked", set_up - began, "s", ""
    yield "import of torch and the package, data, network, MLflow's import beside them", loaded - set_up, "s", ""
    yield "MLflow: run started", tracked - loaded, "s", ""
    yield "network summary", described - tracked, "s", ""
    yield "optimizer, checkpoint, first step", first_step - described, "s", ""
    yield "command to the end of the first training step, warm store", first_step - began, "s", "< 8 s"
    times = [written(folder / "figures" / f"{name}.png") for name in FIGURES]
    last_map = max(written(path) for path in (folder / "figures").glob("grad_cam_*.png"))
    yield "checkpoint, training samples, curves, LR history", times[1] - trained, "s", ""
    yield "test predictions, confusion matrix", times[2] - times[1], "s", ""
    yield "mistakes figure", times[3] - times[2], "s", ""
    yield "Grad-CAM, four figures", last_map - times[3], "s", ""
    yield "all figures after training, with Grad-CAM", last_map - trained, "s", "< 12 s"
    finished = logged(folder, "Test accuracy")
    yield "model logging: export and check", finished - last_map, "s", ""
    yield "delivery to MLflow, exit", ended - finished, "s", ""
    yield "everything after the last step and its evaluation", ended - trained, "s", ""


def sweep(arguments: list[str], repeat: int) -> Iterator[Entry]:
    """What each further job of a sweep in one process costs beside its training."""
    run(["-m", *arguments, f"seed={100 + 3 * repeat},{101 + 3 * repeat},{102 + 3 * repeat}"])
    folder = newest(
        Path(next(word for word in arguments if word.startswith("output_dir=")).partition("=")[2], "sweeps")
    )
    jobs = [folder / str(number) for number in range(3)]
    for job, following in zip(jobs[1:], [*jobs[2:], None], strict=True):
        first_step, trained = training_times(job)
        began = written(job / ".hydra" / "overrides.yaml")
        yield "sweep: a further job, from its start to its first step", first_step - began, "s", "< 2 s"
        if following is not None:
            after = written(following / ".hydra" / "overrides.yaml") - trained
            yield "sweep: a further job, after its last evaluation (figures, Grad-CAM, model)", after, "s", ""


def training_times(folder: Path) -> tuple[float, float]:
    """When the only step ended and when the epoch did, its evaluation included; in seconds since 1970."""
    (epoch,) = read_csv(folder / "history.csv")
    trained = written(folder / "history.csv")
    return trained - epoch["epoch_seconds"] + BATCH / epoch["images_per_second"], trained


def written(path: Path) -> float:
    """When a file was last written."""
    return path.stat().st_mtime


def logged(folder: Path, text: str) -> float:
    """When a line with `text` came into run.log."""
    line = next(line for line in (folder / "run.log").read_text().splitlines() if text in line)
    return datetime.strptime(re.match(r"\S+ \S+", line)[0], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def newest(folder: Path) -> Path:
    """The youngest folder in `folder`."""
    return max((path for path in folder.iterdir() if path.is_dir()), key=written)


def run(arguments: list[str]) -> float:
    """Seconds that `python run.py` with these arguments takes; its output is shown only when it fails."""
    return _seconds([sys.executable, str(ROOT / "run.py"), *arguments])


def run_python(code: str) -> float:
    """Seconds that `python -c` takes."""
    return _seconds([sys.executable, "-c", code])


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - started
