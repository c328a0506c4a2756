"""Sweeps: what runs, what is skipped, what a failure, a kill and an interrupt leave, the leaderboard, the launchers."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import REPOSITORY, TINY, after_steps, signals, some_seeds_fail

from resnet_cifar import leaderboard, own_gpu, sweep, sweep_figures, sweep_store
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.fingerprint import config_hash
from resnet_cifar.leaderboard import Result

SWEEP = ["-m", *TINY, "scheduler.max_lr=0.01", "explain.num_images=1"]
STEPS_PER_JOB = 16
PARALLEL = ("hydra/launcher=parallel",)


class NewPython:
    """`run.py` in a Python of its own, as joblib wants it: its workers outlive a forked process that ends."""

    def __init__(self, arguments, printed, environment):
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "run.py", *arguments],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.printed = printed

    def ends(self):
        return self.process.wait(120)

    @property
    def output(self):
        return self.printed.read_text()


def new_python(*arguments, printed, fault=None, environment=None):
    return NewPython(arguments, printed, environment or {})


def runs(outputs):
    """The database's runs by name, the summary of the sweep apart."""
    store = sweep_store.tracking.Store(f"sqlite:///{outputs}/mlflow.db")
    [experiment] = [e for e in store.client.search_experiments() if e.name == "resnet-cifar"]
    found = store.client.search_runs([experiment.experiment_id], max_results=1000)
    summaries = [run for run in found if run.data.tags["task"] == "sweep"]
    return [run for run in found if run not in summaries], summaries, store.client


def rows(folder):
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_one_run_for_each_seed(outputs, seeds, epochs=2):
    """Every seed has exactly one FINISHED run, each with every point of its metrics once, all of the same sweep."""
    found, [summary], client = runs(outputs)
    finished = [run for run in found if run.info.status == "FINISHED"]
    assert sorted(run.info.run_name for run in finished) == [f"seed={seed}" for seed in seeds]
    assert {run.data.tags["sweep"] for run in found} == {summary.data.tags["sweep"]}
    for run in finished:
        for metric in ("train/loss", "test/accuracy", "schedule/lr"):
            points = client.get_metric_history(run.info.run_id, metric)
            assert [point.step for point in points] == list(range(1, epochs + 1)), metric
    return found, finished


@pytest.mark.parametrize("launcher", [(), PARALLEL], ids=["basic", "joblib"])
def test_failing_jobs_are_recorded_the_others_run_and_the_same_command_finishes_the_rest(
    commands, outputs, tmp_path, launcher
):
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason='pip install -e ".[parallel]"')
        (outputs / "mlflow.db").unlink()  # two jobs at once, from a database that does not exist yet
    # A joblib worker is a Python of its own, which runs sitecustomize when it starts.
    (tmp_path / "faults").mkdir()
    code = (
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport processes\nprocesses.some_seeds_fail()\n"
    )
    (tmp_path / "faults" / "sitecustomize.py").write_text(code)
    faulty = {"PYTHONPATH": str(tmp_path / "faults")} if launcher else {}
    arguments = [*SWEEP, *launcher, "seed=0,1,2,3", f"output_dir={outputs}"]

    start = new_python if launcher else commands
    command = start(*arguments, printed=tmp_path / "out", fault=some_seeds_fail, environment=faulty)
    assert command.ends() == 1, command.output
    assert "2 of the sweep's jobs failed" in command.output
    found, _ = assert_one_run_for_each_seed(outputs, [0, 3])
    assert sorted(run.info.run_name for run in found if run.info.status == "FAILED") == ["seed=1", "seed=2"]
    [folder] = (outputs / "sweeps").iterdir()
    assert [row["status"] for row in rows(folder)] == ["FINISHED", "FAILED", "FAILED", "FINISHED"]
    assert [row["error"] for row in rows(folder)][1:3] == ["RuntimeError: cosmic ray", "SystemExit: 7"]
    assert "cosmic ray" in (folder / "leaderboard.md").read_text()

    if launcher:
        return  # what is finished is the same under every launcher
    again = commands(*arguments, printed=tmp_path / "again")
    assert again.ends() == 0, again.output
    assert again.output.count("is finished already") == 2
    assert_one_run_for_each_seed(outputs, [0, 1, 2, 3])


def test_what_kill_9_takes_with_it_the_same_command_finishes(commands, outputs, tmp_path):
    arguments = [*SWEEP, "seed=0,1,2", f"output_dir={outputs}"]
    in_the_second_job = (STEPS_PER_JOB + 3, signals, signal.SIGKILL)
    killed = commands(*arguments, printed=tmp_path / "out", fault=after_steps, fault_arguments=in_the_second_job)
    assert killed.ends() == -signal.SIGKILL, killed.output

    dry = commands(*arguments, "sweep.dry_run=true", printed=tmp_path / "dry")
    assert dry.ends() == 0, dry.output
    assert "3 jobs, 2 to run, about" in dry.output
    said = [line.split(maxsplit=2)[2] for line in dry.output.splitlines()[-3:]]
    assert said == ["finished, would be skipped", "stopped, would go on", "would run"]

    again = commands(*arguments, printed=tmp_path / "again")
    assert again.ends() == 0, again.output
    found, finished = assert_one_run_for_each_seed(outputs, [0, 1, 2])
    assert found == finished  # the killed job went on in its own run
    [folder] = (outputs / "sweeps").iterdir()
    assert {path.name for path in (folder / "figures").iterdir()} == {"learning_curves.png", "grad_cam.png"}

    every = commands(*arguments, "sweep.rerun=all", "sweep.dry_run=true", printed=tmp_path / "every")
    assert every.ends() == 0, every.output
    assert "3 jobs, 3 to run" in every.output


def test_ctrl_c_stops_a_whole_parallel_sweep_and_leaves_no_process(commands, outputs, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason='pip install -e ".[parallel]"')
    arguments = [*SWEEP, *PARALLEL, "seed=0,1,2,3", "trainer.epochs=100000", f"output_dir={outputs}"]
    command = new_python(*arguments, printed=tmp_path / "out")
    _wait(lambda: command.output.count("epoch ") > 4)
    workers = _descendants(command.process.pid)
    assert workers
    os.kill(command.process.pid, signal.SIGINT)
    assert command.ends() == 130, command.output
    _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def _wait(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def _descendants(pid):
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return children + [each for child in children for each in _descendants(child)]


def test_submitit_runs_the_jobs_of_a_sweep(commands, outputs, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason='pip install -e ".[slurm]"')
    arguments = [*SWEEP, "hydra/launcher=submitit_local", "seed=0,1", f"output_dir={outputs}"]
    command = commands(*arguments, printed=tmp_path / "out")
    assert command.ends() == 0, command.output
    assert_one_run_for_each_seed(outputs, [0, 1])


def test_ray_runs_the_jobs_of_a_sweep(commands, outputs, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_ray_launcher", reason='pip install -e ".[cluster]", in a Python of its own'
    )
    arguments = [*SWEEP, "hydra/launcher=cluster", "seed=0,1", f"output_dir={outputs}"]
    command = commands(*arguments, printed=tmp_path / "out")
    assert command.ends() == 0, command.output
    assert_one_run_for_each_seed(outputs, [0, 1])


@pytest.mark.parametrize(
    ("preset", "package"),
    [("parallel", "hydra_joblib_launcher"), ("slurm", "hydra_submitit_launcher"), ("cluster", "hydra_ray_launcher")],
)
def test_a_launcher_preset_composes(preset, package):
    pytest.importorskip(f"hydra_plugins.{package}", reason=f'pip install -e ".[{preset}]"')
    composed = compose(parse_arguments(["-m", f"hydra/launcher={preset}", "seed=0,1"]))
    assert len(composed.jobs) == 2


def test_a_dry_run_without_earlier_runs_writes_nothing(commands, tmp_path):
    command = commands(*SWEEP, "seed=0,1", "sweep.dry_run=true", f"output_dir={tmp_path}/new", printed=tmp_path / "out")
    assert command.ends() == 0, command.output
    assert "2 jobs, 2 to run, no earlier runs" in command.output
    assert not (tmp_path / "new").exists()


def composed(*arguments):
    return compose(parse_arguments(["-m", "data=digits", *arguments]))


def test_a_sweep_keeps_its_id_wherever_it_is_recorded_and_lies():
    here = composed("seed=0,1")
    there = composed("seed=0,1", "tracking=none", "output_dir=/elsewhere", "data.root=/images", "sweep.rerun=all")
    assert here.sweep.id == there.sweep.id
    assert there.sweep.job_folders == tuple(Path(f"/elsewhere/sweeps/{there.sweep.id}/{n}") for n in (0, 1))


def test_other_jobs_make_another_sweep():
    ids = {composed(*given).sweep.id for given in (["seed=0,1"], ["seed=0,2"], ["seed=0,1", "trainer.epochs=3"])}
    assert len(ids) == 3


def test_a_single_run_and_the_same_job_of_a_sweep_have_one_hash():
    [(single, _)] = compose(parse_arguments(["data=digits", "seed=1"])).jobs
    assert config_hash(single) == config_hash(composed("seed=0,1").jobs[1][0])


def test_jobs_are_named_by_what_they_varied():
    jobs = [["scheduler.div_factor=10", "seed=0", "data=digits"], ["scheduler.div_factor=25", "seed=0", "data=digits"]]
    assert [sweep.job_name(values, None) for values in sweep.varied(jobs)] == ["div_factor=10", "div_factor=25"]
    alike = {"optimizer._target_": "a", "scheduler._target_": "b"}
    assert sweep.job_name(alike, "night") == "night optimizer._target_=a scheduler._target_=b"


def result(values, accuracy, evaluated_on="test", status="FINISHED", test_accuracy=None):
    return Result(
        name="",
        values=values,
        folder=Path("/nowhere"),
        status=status,
        error="" if accuracy else "RuntimeError: cosmic ray",
        evaluated_on=evaluated_on,
        accuracy=accuracy,
        loss=accuracy and 1 - accuracy / 100,
        test_accuracy=accuracy if test_accuracy is None else test_accuracy,
        seconds=accuracy and 61.0,
        history=[],
    )


def test_seeds_of_a_point_are_reduced_to_mean_deviation_and_count():
    found = [
        result({"lr": "1", "seed": "0"}, 80.0),
        result({"lr": "1", "seed": "1"}, 84.0),
        result({"lr": "2", "seed": "0"}, 90.0),
        result({"lr": "2", "seed": "1"}, None, status="FAILED"),
    ]
    best, second = leaderboard.table(found)
    assert (best["lr"], best["test/accuracy"], best["deviation"], best["runs"]) == ("2", 90.0, None, 1)
    assert (best["status"], best["error"]) == ("1 FINISHED, 1 FAILED", "RuntimeError: cosmic ray")
    assert (second["test/accuracy"], second["deviation"], second["runs"]) == (82.0, pytest.approx(8**0.5, abs=1e-4), 2)
    assert "± 2.83" in leaderboard.text([best, second]) and "1:01.0" in leaderboard.markdown([best, second])


def test_val_accuracy_ranks_where_every_run_has_one():
    held_out = [
        result({"lr": "1"}, 70.0, "val", test_accuracy=60.0),
        result({"lr": "2"}, 65.0, "val", test_accuracy=64.0),
    ]
    assert [row["val/accuracy"] for row in leaderboard.table(held_out)] == [70.0, 65.0]
    mixed = [*held_out, result({"lr": "3"}, 62.0)]
    assert [row["test/accuracy"] for row in leaderboard.table(mixed)] == [64.0, 62.0, 60.0]


def test_the_compare_page_shows_exactly_these_runs():
    [link] = sweep_store.compare_page("http://host:5000/", "7", ["a", "b"])
    assert link == (
        "http://host:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%227%22%5D"
        "&workflowType=machine_learning"
    )
    serve, _ = sweep_store.compare_page("sqlite:////x/mlflow.db", "7", ["a"])
    assert serve == "mlflow ui --backend-store-uri sqlite:////x/mlflow.db --port 5000"


def test_values_are_drawn_in_the_order_of_numbers():
    figure = sweep_figures.accuracy_against("lr", ["100", "25", "25"], [1.0, 2.0, 3.0], ["", "", ""], "test/accuracy")
    [axes] = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["25", "100"]
    assert axes.get_lines()[0].get_ydata().tolist() == [2.5, 1.0]


def test_each_process_of_a_parallel_sweep_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen, held = [], []
    for _process in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(own_gpu, "_held", [])
        for _job in range(2):
            own_gpu.take(tmp_path)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        held.append(own_gpu._held)
    assert seen == ["0", "1", "1"]


def test_the_same_sweep_does_not_run_twice_at_once(commands, outputs, tmp_path):
    arguments = [*SWEEP, "seed=0,1", "tracking=none", f"output_dir={outputs}"]
    folder = compose(parse_arguments(arguments)).sweep.folder
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        command = commands(*arguments, printed=tmp_path / "out")
        assert command.ends() == 5
    assert command.output.startswith("This sweep is running already")


def test_a_plan_survives_its_file(tmp_path):
    job = sweep.Job(0, "seed=0", {"seed": "0"}, "abc", sweep.RUN, str(tmp_path / "0"), str(tmp_path / "0"))
    plan = sweep.Plan("id", str(tmp_path), ["-m", "seed=0"], [job])
    plan.save()
    assert sweep.load_plan(tmp_path) == plan
    assert json.loads((tmp_path / sweep.PLAN).read_text())["jobs"][0]["name"] == "seed=0"
