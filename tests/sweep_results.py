"""What a tiny sweep over seeds must have left behind: in MLflow, in its tables."""

import csv

from processes import TINY

from resnet_cifar import sweep_store

SWEEP = ("-m", *TINY, "scheduler.max_lr=0.01", "explain.num_images=1")


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
    assert {run.data.tags["sweep"] for run in found} == {summary.data.tags["sweep_summary"]}
    assert "sweep" not in summary.data.tags  # which is for the jobs alone
    for run in finished:
        for metric in ("train/loss", "test/accuracy", "schedule/lr"):
            points = client.get_metric_history(run.info.run_id, metric)
            assert [point.step for point in points] == list(range(1, epochs + 1)), metric
    return found, finished


def assert_seeds_1_and_2_failed(outputs, printed):
    """Of a sweep over seed=0,1,2,3 with `processes.some_seeds_fail`: the failures are everywhere, the others finished."""
    assert "2 of the sweep's jobs failed" in printed
    found, finished = assert_one_run_for_each_seed(outputs, [0, 3])
    assert sorted(run.info.run_name for run in found if run.info.status == "FAILED") == ["seed=1", "seed=2"]
    [folder] = (outputs / "sweeps").iterdir()
    assert [row["status"] for row in rows(folder)] == ["FINISHED", "FAILED", "FAILED", "FINISHED"]
    assert [row["error"] for row in rows(folder)][1:3] == ["RuntimeError: cosmic ray", "SystemExit: 7"]
    assert "cosmic ray" in (folder / "leaderboard.md").read_text()
    return finished
