"""How the cost of our training path grows: with the number of images, the width, the batch size and the processes."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import competitors
from competitors import Setting, Stopwatch

from resnet_cifar.distributed import World
from resnet_cifar.training_processes import launch

Entry = tuple[str, float, str, str]  # what, value, unit, target
WIDTH, BATCH_SIZE = 0.125, 512  # where nothing else is said
SETTINGS = {
    "images": (5_120, 10_240, 20_480, 40_960),
    "width": (0.125, 0.25, 0.5, 1.0),
    "batch size": (64, 128, 256, 512, 1024),
    "processes": (1, 2),
}
STEPS = {0.125: 31, 0.25: 16, 0.5: 6, 1.0: 3}  # the first of which is not counted


def measure(new_process: Callable, setting: Setting, repeats: int) -> Iterator[Entry]:
    """Images/s for each value of each quantity, the others as `setting` has them; `repeats` times in turn."""
    for _ in range(repeats):
        for quantity, values in SETTINGS.items():
            if quantity == "processes" and setting.device.type != "cpu":
                continue
            for value in values:
                changed, processes = varied(setting, quantity, value)
                train = competitors.ours if processes == 1 else partial(in_processes, processes)
                yield f"{quantity} {value:,}", new_process(competitors.training_rate, train, changed), "images/s", ""


def varied(setting: Setting, quantity: str, value: float) -> tuple[Setting, int]:
    """The setting with another value of one quantity, and the number of processes; on a CPU an epoch where images are counted."""
    width = value if quantity == "width" else WIDTH
    batch_size = int(value) if quantity == "batch size" else BATCH_SIZE
    train_size = int(value) if quantity == "images" else None
    steps = train_size // batch_size if train_size else 1 + (STEPS[width] - 1) * BATCH_SIZE // batch_size
    warmup = 1
    if setting.device.type == "cuda":  # whose first steps choose and load kernels
        steps, warmup = competitors.STEPS_ON_GPU
    changed = dataclasses.replace(
        setting, width=width, batch_size=batch_size, steps=steps, warmup=warmup, train_size=train_size
    )
    return changed, int(value) if quantity == "processes" else 1


def in_processes(count: int, setting: Setting, watch: Stopwatch) -> None:
    """Our training path in `count` processes of this machine, as `trainer.devices=count` runs it; the first one's clock."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder, "times")
        launch(count, setting.device.type, {"version": 1}, _take_part, setting, times)
        watch.started, watch.stopped = (float(word) for word in times.read_text().split())


def _take_part(world: World, setting: Setting, times: Path) -> None:
    watch = Stopwatch(setting)
    competitors.ours(setting, watch, world)
    if world.rank == 0:
        times.write_text(f"{watch.started!r} {watch.stopped!r}")
