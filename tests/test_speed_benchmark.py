"""The speed study's script: what it measures in a tiny run, and the table it makes of that."""

import contextlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "experiments" / "speed"))
    yield importlib.import_module("benchmark")
    sys.path.remove(str(ROOT / "experiments" / "speed"))


def measurements(benchmark, machine="this", code="now", width=0.125, **rates):
    rows = [benchmark.row("step", side, rate, "images/s", "", width) for side, each in rates.items() for rate in each]
    return [{"machine": machine, "code": code, **row} for row in rows]


def test_the_table_has_medians_spread_and_our_median_over_theirs(benchmark, tmp_path):
    path = tmp_path / "results.csv"
    benchmark.append_csv(path, measurements(benchmark, ours=[90, 120, 100], assignment=[20, 30]))
    benchmark.append_csv(path, measurements(benchmark, assignment=[25]))  # a later call adds to the first
    benchmark.append_csv(path, measurements(benchmark, machine="another", ours=[1e6]))
    table = benchmark.step_table(benchmark.measured(path, "this"))
    assert "| 0.125 | (a) our training path | 100.0 (90.0 - 120.0, 3) | 1.00 (1.00 - 1.00) |  |" in table
    assert "| 0.125 | (b) the assignment's loop | 25.0 (20.0 - 30.0, 3) | 4.00 (4.00 - 4.50) |  |" in table
    assert len(table) == 4


def test_measurements_of_older_code_give_way_to_those_of_the_last(benchmark, tmp_path):
    path = tmp_path / "results.csv"
    benchmark.append_csv(path, measurements(benchmark, code="before", ours=[50, 60], assignment=[20]))
    benchmark.append_csv(path, measurements(benchmark, code="before", width=1.0, ours=[7]))
    benchmark.append_csv(path, measurements(benchmark, ours=[100]))
    measured = {key: benchmark.median(entries) for key, entries in benchmark.measured(path, "this").items()}
    assert measured == {("step", "0.125", "ours"): 100, ("step", "1.0", "ours"): 7}


def test_the_flop_of_the_whole_network_are_the_assignments(benchmark):
    forward = 2 * 7.59e9 / 20  # the assignment's table: 7.59 G multiply-adds for 20 images
    first_convolution = 2 * 35_389_440 / 20
    assert benchmark.competitors.flop_per_image(1.0) == pytest.approx(3 * forward - first_convolution, rel=1e-3)


LIGHTNING = pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="pip install 'resnet-cifar[speed]'")


@pytest.mark.parametrize(
    "side",
    ["ours", "assignment", "bare_step", *(pytest.param(c, marks=LIGHTNING) for c in ("lightning", "lightning_tuned"))],
)
def test_the_stopwatch_leaves_warm_up_out(benchmark, cifar10, monkeypatch, side):
    competitors = benchmark.competitors
    setting = competitors.Setting(0.125, 3, 1, str(cifar10), competitors.torch.device("cpu"), "fp32", batch_size=8)
    ticks = iter([10.0, 14.0])  # seconds: the end of the warm-up and the end of the last step
    monkeypatch.setattr(competitors, "perf_counter", lambda: next(ticks))
    assert competitors.training_rate(benchmark.SIDES[side], setting) == 2 * 8 / 4


@pytest.fixture
def forked(benchmark, commands, monkeypatch):
    """The sides' processes are forked from one that has imported everything."""
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: commands._context)


def test_sides_take_turns_and_an_error_of_one_comes_back(benchmark, cifar10, forked):
    competitors = benchmark.competitors
    setting = competitors.Setting(0.125, 2, 1, str(cifar10), competitors.torch.device("cpu"), "fp32", batch_size=8)
    with (
        benchmark.standing_ready(competitors.bare_step, setting) as bare,
        benchmark.standing_ready(competitors.ours, setting) as ours,
    ):
        assert all(turn() > 0 for turn in (bare, ours, ours, bare))
    nowhere = replace(setting, data_root="nowhere")
    with pytest.raises(RuntimeError, match="not found"), benchmark.standing_ready(competitors.assignment, nowhere):
        pass


def test_turns_that_go_beyond_a_sides_last_epoch_are_an_error_that_says_so(benchmark, cifar10, forked):
    competitors = benchmark.competitors
    device, sizes = competitors.torch.device("cpu"), {"batch_size": 8, "train_size": 16}  # 48 steps in 24 epochs
    setting = competitors.Setting(0.125, 30, 1, str(cifar10), device, "fp32", **sizes)
    with (
        pytest.raises(RuntimeError, match="give less --steps or --repeats"),
        benchmark.standing_ready(competitors.ours, setting) as turn,
    ):
        turn()


def test_a_profile_shares_a_steps_time_out(benchmark):
    setting = benchmark.competitors.Setting(0.125, 0, 0, "", benchmark.torch.device("cpu"), "bf16", batch_size=8)
    shares = benchmark.step_profile.profiled(setting)
    assert sum(shares.values()) == pytest.approx(100)
    assert all(share > 0 for share in shares.values())


def test_what_a_convolution_calls_is_a_convolution(benchmark):
    kinds = [
        benchmark.step_profile.kind_of(name) for name in ("aten::convolution_backward", "aten::fill_", "aten::relu_")
    ]
    assert kinds == ["convolutions", benchmark.step_profile.REST, "ReLU"]


def test_compiled_and_as_it_is_take_turns(benchmark, monkeypatch):
    @contextlib.contextmanager
    def standing_ready(train, setting):
        yield lambda: 120.0 if getattr(train, "keywords", {}) == {"compiled": True} else 100.0

    monkeypatch.setattr(benchmark, "standing_ready", standing_ready)
    arguments = benchmark.parse(["--widths", "0.5", "--repeats", "1"])
    rows = list(benchmark.compilation(arguments, benchmark.torch.device("cpu"), "fp32"))
    assert [row["value"] for row in rows if row["item"] == "width 0.5: compiled / as it is"] == [pytest.approx(1.2)] * 3
    assert sum("start and first turn" in row["item"] for row in rows) == 2


@pytest.mark.parametrize("side", ["ours", "ours_torchs_batch_norm", "assignment", "bare_step"])
def test_others_train_with_torchs_batch_norm(benchmark, cifar10, monkeypatch, side):
    competitors, built = benchmark.competitors, []

    class Counted(competitors.nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            built.append(channels)

    monkeypatch.setattr(competitors.custom_resnet, "BatchNorm2d", Counted)
    setting = competitors.Setting(0.125, 2, 1, str(cifar10), competitors.torch.device("cpu"), "fp32", batch_size=8)
    competitors.training_rate(benchmark.SIDES[side], setting)
    assert bool(built) == (side in ("ours", "bare_step"))


@pytest.mark.parametrize(
    ("width", "precision", "few"), [(0.125, "bf16", True), (0.25, "bf16", False), (0.125, "fp32", False)]
)
def test_our_batch_norm_has_a_side_where_it_is_not_torchs(benchmark, monkeypatch, width, precision, few):
    @contextlib.contextmanager
    def standing_ready(train, setting):
        yield lambda: 100.0

    monkeypatch.setattr(benchmark, "standing_ready", standing_ready)
    monkeypatch.setattr(benchmark.competitors, "arithmetic_limit", lambda setting: 1000.0)
    arguments = benchmark.parse(["--widths", str(width), "--repeats", "1"])
    rows = benchmark.training_steps(arguments, benchmark.torch.device("cpu"), precision)
    assert ("ours_torchs_batch_norm" in {row["item"] for row in rows}) == few


def test_our_side_trains_on_the_device_that_is_asked_for(benchmark):
    competitors = benchmark.competitors
    setting = competitors.Setting(0.125, 3, 1, "", competitors.torch.device("cuda:1"), "fp32")
    assert competitors.configuration(setting).trainer.device == "cuda:1"


@pytest.mark.parametrize("steps", ["0", "1", "-3"])
def test_steps_that_leave_none_to_count_are_refused(benchmark, capsys, steps):
    with pytest.raises(SystemExit):
        benchmark.parse(["--steps", steps])
    assert f"{steps} is below 2" in capsys.readouterr().err


def test_one_quantity_is_varied_at_a_time(benchmark):
    cost, setting = (
        benchmark.cost,
        benchmark.competitors.Setting(0.125, 0, 0, "", benchmark.torch.device("cpu"), "fp32"),
    )
    assert cost.varied(setting, "images", 5120) == (
        replace(setting, steps=10, warmup=1, train_size=5120),
        1,
    )
    smaller, processes = cost.varied(setting, "batch size", 64)
    assert (smaller.width, smaller.batch_size, smaller.train_size, processes) == (0.125, 64, None, 1)
    assert smaller.steps - 1 == 8 * (cost.varied(setting, "processes", 2)[0].steps - 1)  # the same images
    assert cost.varied(setting, "width", 1.0)[0].width == 1.0
    on_gpu = cost.varied(replace(setting, device=benchmark.torch.device("cuda")), "width", 1.0)[0]
    assert (on_gpu.steps, on_gpu.warmup) == benchmark.competitors.STEPS_ON_GPU
    assert cost.varied(setting, "processes", 2)[1] == 2


def test_two_processes_train_on_one_clock(benchmark, cifar10):
    competitors = benchmark.competitors
    setting = competitors.Setting(0.125, 3, 1, str(cifar10), competitors.torch.device("cpu"), "fp32", batch_size=8)
    watch = competitors.Stopwatch(setting)
    benchmark.cost.in_processes(2, setting, watch)
    assert watch.stopped > watch.started > 0
