"""Where a training step's time goes: torch's profiler over the bare step with kept memory, by kind of operation."""

import os
from collections.abc import Callable, Iterator

import competitors
from competitors import Setting
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

Entry = tuple[str, float, str, str]  # what, value, unit, target
WARMUP, COUNTED = 2, 4  # steps
# What the name of an operation holds, or of the one that calls it.
KINDS = {
    "convolutions": ("conv",),
    "max-pooling": ("max_pool",),
    "batch norm": ("batch_norm",),
    "ReLU": ("relu", "threshold"),
    "casts": ("_to_copy",),
    "optimizer": ("Optimizer",),
}
REST = "all else: additions, copies, linear layer, loss"


class Profiled:
    """A watch that has the profiler look at the steps after the first ones."""

    def __init__(self, profiler: profile) -> None:
        self.profiler, self.steps = profiler, 0

    def step(self) -> bool:
        """Note the end of a step; True after the last."""
        self.steps += 1
        if self.steps == WARMUP:
            self.profiler.start()
        if self.steps < WARMUP + COUNTED:
            return False
        self.profiler.stop()
        return True


def measure(new_process: Callable, setting: Setting) -> Iterator[Entry]:
    """The share of each kind of operation in a step's time, the largest first and what is left last."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    shares = new_process(profiled, setting)
    for kind in (*sorted(KINDS, key=shares.__getitem__, reverse=True), REST):
        yield f"width {setting.width}: {kind}", shares[kind], "%", ""


def profiled(setting: Setting) -> dict[str, float]:
    """Percent of the time that operations take, on a GPU there, by their kind."""
    on_gpu = setting.device.type == "cuda"
    watch = Profiled(profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]))
    competitors.bare_step_kept_memory(setting, watch)
    spent = dict.fromkeys([*KINDS, REST], 0.0)

    def add(event: FunctionEvent, kind: str) -> None:
        kind = kind if kind != REST else kind_of(event.name)
        spent[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for called in event.cpu_children:
            add(called, kind)

    for event in watch.profiler.events():
        # A GPU's kernels are there apart too, beside the operations that own them.
        if event.cpu_parent is None and event.device_type == DeviceType.CPU:
            add(event, REST)
    return {kind: 100 * time / sum(spent.values()) for kind, time in spent.items()}


def kind_of(operation: str) -> str:
    """The kind of operation that a name tells."""
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), REST)
