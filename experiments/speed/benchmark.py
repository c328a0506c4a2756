"""How fast we train, against the assignment's loop, PyTorch Lightning and the machine's limits, in one go.

Every part adds its measurements to results.csv as they come. The tables and the plot are medians over all of them that are
of the same code: of each part and width, that of the last. What is measured and how: README.md beside this file.

    python experiments/speed/benchmark.py --data-root ../shared/data
    python experiments/speed/benchmark.py --data-root ../shared/data --only step --widths 0.125 --repeats 1
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file, also for whoever imports it
import competitors
import cost
import data_path
import run_around
import step_profile

from resnet_cifar.errors import StorageError
from resnet_cifar.fingerprint import source_hash
from resnet_cifar.parts import choose_device, choose_precision
from resnet_cifar.tables import append_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
SIDES = {
    "ours": competitors.ours,
    "ours_torchs_batch_norm": competitors.ours_with_torchs_batch_norm,
    "assignment": competitors.assignment,
    "lightning": competitors.lightning,
    "lightning_tuned": competitors.lightning_tuned,
    "bare_step": competitors.bare_step,
    "bare_step_kept_memory": competitors.bare_step_kept_memory,
}
LIMIT = "arithmetic_limit"
NAMES = {
    "ours": "(a) our training path",
    "ours_torchs_batch_norm": "(a') the same with torch's batch norm",
    "assignment": "(b) the assignment's loop",
    "lightning": "(c) PyTorch Lightning",
    "lightning_tuned": "(c') Lightning, tuned",
    "bare_step": "(d) bare step, one batch",
    "bare_step_kept_memory": "(d') the same, freed memory kept",
    LIMIT: "(e) arithmetic limit",
}
# Steps of a turn by width, of which the first are not counted: they use up what the loaders' workers have ready by then,
# where these are slower than the network, and of the first five epochs' 98 steps each the end falls into them.
STEPS = {0.125: (24, 12), 0.5: (4, 2), 1.0: (2, 1)}
ROUNDS = 3  # turns of each side in a repeat
PARTS = ("profile", "compile", "data", "run", "cost")  # beside the steps; a table each
BARE = ("bare_step", "bare_step_kept_memory")
# What ours should be divided by the side, at least, by the precision that the processor's instructions give.
TARGETS = {
    "bf16": {
        ("assignment", 0.125): 3.4,
        ("assignment", 1.0): 2.7,
        ("lightning", 0.125): 3.4,
        ("lightning", 1.0): 2.7,
        ("lightning_tuned", 0.125): 1.3,
        ("lightning_tuned", 0.5): 1.0,
        ("lightning_tuned", 1.0): 1.0,
        **{(side, width): 0.95 for side in BARE for width in STEPS},
    },
    "fp32": {
        ("assignment", 0.125): 1.9,
        ("assignment", 1.0): 1.25,
        ("lightning", 0.125): 1.9,
        ("lightning", 1.0): 1.25,
        **{(side, width): 0.95 for side in BARE for width in STEPS},
    },
}
INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "sve",
    "sve_bf16",
)  # those that set the speed


def machine(device: torch.device, precision: str) -> str:
    """Processor, its instructions or the GPU, threads, precision and torch: what measurements are compared within."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capabilities = torch.cpu.get_capabilities()
        instructions = " ".join(key for key in INSTRUCTIONS if capabilities.get(key))
        name = f"{processor()} ({instructions})"
    return f"{name}, {torch.get_num_threads()} threads, {precision}, torch {torch.__version__}"


def processor() -> str:
    """The processor as `lscpu` names it, with family and model, since virtual machines hide the product's name."""
    try:
        table = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    except FileNotFoundError:  # not Linux
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in table.splitlines())}
    return ", ".join(f"{key} {fields[key]}" for key in ("Model name", "CPU family", "Model") if key in fields)


def code() -> str:
    """A hash of all that is measured here: the package's source and the modules beside this file."""
    own = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py")))
    return hashlib.sha256(source_hash().encode() + own).hexdigest()[:12]


def training_steps(arguments: argparse.Namespace, device: torch.device, precision: str) -> Iterator[dict]:
    """A row for each side and turn: the sides take turns of seconds, so that what disturbs one for minutes disturbs all."""
    installed = [side for side in SIDES if "lightning" not in side or has_lightning()]
    for setting in settings(arguments, device, precision):
        sides = [side for side in installed if side != "ours_torchs_batch_norm" or competitors.few_channels(setting)]
        width, targets = setting.width, TARGETS[precision] if device.type == "cpu" else {}
        with contextlib.ExitStack() as stack:
            turns = {side: stack.enter_context(standing_ready(SIDES[side], setting)) for side in sides}
            for repeat in range(ROUNDS * arguments.repeats):
                rates = {**in_turn(turns, repeat), LIMIT: competitors.arithmetic_limit(setting)}
                print(f"width {width}, turn {repeat + 1}:", *(f"{side} {rates[side]:.1f}" for side in (*sides, LIMIT)))
                for side in (*sides, LIMIT):
                    target = targets.get((side, width), "")
                    yield row("step", side, rates[side], "images/s", target and f"ours / this >= {target}", width)


def compilation(arguments: argparse.Namespace, device: torch.device, precision: str) -> Iterator[dict]:
    """What `trainer.compile` costs before the first turn is over, and what it gives in those that follow."""
    sides = {"as it is": competitors.ours, "compiled": partial(competitors.ours, compiled=True)}
    for setting in settings(arguments, device, precision):
        with contextlib.ExitStack() as stack:
            turns, where = {}, f"width {setting.width}"
            for side, train in sides.items():
                started = time.perf_counter()
                try:
                    turns[side] = stack.enter_context(standing_ready(train, setting))
                except Exception as error:  # no C++ compiler, for one
                    print(f"{where}, {side}: {str(error).splitlines()[0]}", file=sys.stderr)
                    break
                seconds = time.perf_counter() - started
                yield row("compile", f"{where}: {side}, start and first turn", seconds, "s", "", setting.width)
            for repeat in range(ROUNDS * arguments.repeats if len(turns) == len(sides) else 0):
                rates = in_turn(turns, repeat)
                for side, rate in rates.items():
                    yield row("compile", f"{where}: {side}", rate, "images/s", "", setting.width)
                ratio = rates["compiled"] / rates["as it is"]
                yield row("compile", f"{where}: compiled / as it is", ratio, "x", "", setting.width)


def profiles(arguments: argparse.Namespace, device: torch.device, precision: str) -> Iterator[dict]:
    """Where a step's time goes at each width."""
    for setting in settings(arguments, device, precision):
        for entry in step_profile.measure(new_process, setting):
            yield row("profile", *entry, setting.width)


def settings(arguments: argparse.Namespace, device: torch.device, precision: str) -> Iterator[competitors.Setting]:
    """What is trained at each width, and the steps of a turn."""
    for width in arguments.widths:
        steps, warmup = competitors.STEPS_ON_GPU if device.type == "cuda" else STEPS.get(width, (10, 2))
        steps = arguments.steps or steps
        yield competitors.Setting(width, steps, min(warmup, steps - 1), arguments.data_root, device, precision)


def in_turn(turns: Mapping[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """Images/s of a turn of each side, each round beginning with another."""
    sides, first = list(turns), repeat % len(turns)
    return {side: turns[side]() for side in (*sides[first:], *sides[:first])}


@contextlib.contextmanager
def standing_ready(train: Callable, setting: competitors.Setting) -> Iterator[Callable[[], float]]:
    """A side in a process of its own, warmed up: a call lets it train for a turn and returns images/s; else it stands still."""
    context = multiprocessing.get_context("spawn")
    connection, its_end = context.Pipe()
    process = context.Process(target=competitors.train_in_turns, args=(train, setting, its_end))
    process.start()
    its_end.close()  # so that the end of the process is seen here

    def result() -> float:
        rate = connection.recv()
        if isinstance(rate, Exception):
            raise rate
        return rate

    def turn() -> float:
        connection.send(True)
        return result()

    try:
        result()
        yield turn
        connection.send(False)
        process.join()
    finally:
        process.kill()


def new_process(work: Callable, *arguments: Any) -> Any:
    """What `work` returns in a process of its own: no side trains in memory that another has left behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def has_lightning() -> bool:
    """Whether PyTorch Lightning is installed; else one line says how to install it, and its rows stay away."""
    if importlib.util.find_spec("lightning"):
        return True
    print('PyTorch Lightning is not installed, (c) is left out: pip install -e ".[speed]"', file=sys.stderr)
    return False


def row(part: str, item: str, value: float, unit: str, target: str = "", width: float | str = "") -> dict:
    """One measurement, without its machine and code."""
    return {"part": part, "item": item, "width": width, "value": value, "unit": unit, "target": target}


def measured(path: Path, on: str) -> dict[tuple[str, str, str], list[dict]]:
    """The measurements of one machine by part, width and item, of each part and width those of the code measured last."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    if not path.exists():
        return groups
    with path.open(newline="") as file:
        entries = [entry for entry in csv.DictReader(file) if entry["machine"] == on]
    last = {(entry["part"], entry["width"]): entry["code"] for entry in entries}
    for entry in entries:
        if entry["code"] == last[entry["part"], entry["width"]]:
            groups.setdefault((entry["part"], entry["width"], entry["item"]), []).append(entry)
    return groups


def median(entries: Sequence[dict]) -> float:
    """The median of the measurements of one thing."""
    return statistics.median(float(entry["value"]) for entry in entries)


def step_table(groups: dict[tuple[str, str, str], list[dict]]) -> list[str]:
    """Markdown: images/s of each side at each width and how many times as fast ours is, the median of the rounds' ratios."""
    lines = [
        "| width | side | images/s, median (min - max, turns) | ours / this (min - max) | target |",
        "|---|---|---|---|---|",
    ]
    for (part, width, side), entries in sorted(groups.items(), key=lambda group: float(group[0][1] or 0)):
        if part != "step":
            continue
        rates = [float(entry["value"]) for entry in entries]
        ours = groups["step", width, "ours"]
        ratios = [float(mine["value"]) / float(its["value"]) for mine, its in zip(ours, entries, strict=False)]
        target = entries[0]["target"].rpartition(" ")[2]
        lines.append(
            f"| {width} | {NAMES[side]} | {median(entries):,.1f} ({min(rates):,.1f} - {max(rates):,.1f}, {len(rates)}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | {target and f'>= {target}'} |"
        )
    return lines


def part_table(groups: dict[tuple[str, str, str], list[dict]], part: str) -> list[str]:
    """Markdown: the measurements of one of PARTS."""
    lines = [f"| {part} | median (min - max, repeats) | target |", "|---|---|---|"]
    for (its_part, _, item), entries in groups.items():
        values, unit = [float(entry["value"]) for entry in entries], entries[0]["unit"]
        if its_part == part:
            spread = f"({min(values):,.2f} - {max(values):,.2f}, {len(values)})"
            lines.append(f"| {item} | {median(entries):,.2f} {unit} {spread} | {entries[0]['target']} |")
    return lines


def plot(groups: dict[tuple[str, str, str], list[dict]], title: str) -> "Figure":
    """A panel for each width: a bar for each side's median, the spread as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    from resnet_cifar.figures import EVAL, INK, STYLE, TRAIN

    widths = sorted({width for part, width, _ in groups if part == "step"}, key=float)
    sides = [side for side in NAMES if all(("step", width, side) in groups for width in widths)]
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axes, width in zip(figure.subplots(1, len(widths), sharey=True, squeeze=False)[0], widths, strict=True):
            values = [[float(entry["value"]) for entry in groups["step", width, side]] for side in sides]
            medians = [statistics.median(each) for each in values]
            axes.barh(range(len(sides)), medians, color=[EVAL if side == "ours" else TRAIN for side in sides])
            for place, each in enumerate(values):
                axes.plot([min(each), max(each)], [place, place], color=INK, linewidth=1)
            axes.set_yticks(range(len(sides)), [NAMES[side] for side in sides], fontsize=9)
            axes.set_ylim(len(sides) - 0.5, -0.5)
            axes.tick_params(axis="x", labelsize=9)
            axes.set_title(f"width {width}")
        figure.suptitle(title, fontsize=8, x=0.01, ha="left")
        figure.supxlabel("training images/s: median of the turns, line from the lowest to the highest", fontsize=9)
    return figure


def step_count(text: str) -> int:
    """A number of steps that leaves one to count: warm-up takes at least the first."""
    steps = int(text)
    if steps < 2:
        raise argparse.ArgumentTypeError(f"{steps} is below 2: the first step warms up and is not counted")
    return steps


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("step", *PARTS, "table"), help="one part; table measures nothing")
    parser.add_argument("--widths", type=float, nargs="+", default=list(STEPS))
    parser.add_argument(
        "--steps", type=step_count, help="a turn's optimizer steps, warm-up included (default: by width)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-root", default="data", help="the folder that holds cifar-10-batches-py")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder of results.csv and the plot")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, add it to results.csv, print the tables and draw the plot."""
    arguments = parse(argv)
    device = choose_device(arguments.device)
    precision = choose_precision("auto", device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    on, results = machine(device, precision), arguments.output / "results.csv"
    print(on)
    of = {"machine": on, "code": code()}
    measurements = {
        "step": lambda: training_steps(arguments, device, precision),
        "profile": lambda: profiles(arguments, device, precision),
        "compile": lambda: compilation(arguments, device, precision),
        "data": lambda: (
            row("data", *entry) for entry in data_path.measure(arguments.data_root, arguments.repeats, device)
        ),
        "run": lambda: (
            row("run", *entry) for entry in run_around.measure(arguments.data_root, arguments.repeats, device)
        ),
        "cost": lambda: (
            row("cost", *entry)
            for entry in cost.measure(
                new_process,
                competitors.Setting(cost.WIDTH, 0, 0, arguments.data_root, device, precision),
                arguments.repeats,
            )
        ),
    }
    for part, measure in measurements.items():
        for entry in measure() if arguments.only in (None, part) else ():
            if not append_csv(results, [{**of, **entry}]):
                sys.exit(StorageError.exit_code)
    groups = measured(results, on)
    known = {part for part, _, _ in groups}
    if "step" in known:
        print("", *step_table(groups), sep="\n")
    for part in filter(known.__contains__, PARTS):
        print("", *part_table(groups, part), sep="\n")
    if "step" in known:
        figure = plot(groups, on)
        figure.savefig(arguments.output / f"images_per_second_{device.type}_{precision}.png")


if __name__ == "__main__":
    main()
