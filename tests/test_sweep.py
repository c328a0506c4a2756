"""Sweeps: what runs, what is skipped, what a failure and a kill leave, the leaderboard. Launchers: test_launchers.py."""

import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from processes import after_steps, killed_before_it_is_recorded, signals, some_seeds_fail
from sweep_results import SWEEP, assert_one_run_for_each_seed, assert_seeds_1_and_2_failed

from resnet_cifar import fingerprint, leaderboard, run_folder, sweep_figures, sweep_plan, sweep_store, sweep_summary
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.fingerprint import config_hash, source_hash
from resnet_cifar.leaderboard import Result
from resnet_cifar.suggestions import quoted

STEPS_PER_JOB = 16


def test_failing_jobs_are_recorded_the_others_run_and_the_same_command_finishes_the_rest(commands, outputs, tmp_path):
    arguments = [*SWEEP, "seed=range(0,4)", f"output_dir={outputs}"]
    command = commands(*arguments, printed=tmp_path / "out", fault=some_seeds_fail)
    assert command.ends() == 1, command.output
    assert_seeds_1_and_2_failed(outputs, command.output)
    assert command.output.count("task=explain") == 0  # one run's next step; a sweep has its own end
    assert "#1, 2 to follow: seed=1" in command.output
    [table] = (outputs / "sweeps").glob("*/leaderboard.md")
    assert f"`python run.py {shlex.join(arguments)}`" in table.read_text()  # to be pasted into a shell

    again = commands(*arguments, printed=tmp_path / "again")
    assert again.ends() == 0, again.output
    assert again.output.count("is finished already") == 2
    for aside in ("1_replaced_1", "2_replaced_1"):
        assert (table.parent / aside / "status.txt").read_text().startswith("FAILED")
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


def test_a_job_killed_before_it_was_recorded_is_recorded_whole_and_finished_once(commands, outputs, tmp_path):
    arguments = [*SWEEP, "seed=0,1", f"output_dir={outputs}"]
    killed = commands(*arguments, printed=tmp_path / "out", fault=killed_before_it_is_recorded)
    assert killed.ends() == -signal.SIGKILL, killed.output

    again = commands(*arguments, printed=tmp_path / "again")
    assert again.ends() == 0, again.output
    found, [first, second] = assert_one_run_for_each_seed(outputs, [0, 1])
    assert len(found) == 2 and first.data.params.keys() == second.data.params.keys() > {"seed", "trainer.epochs"}

    dry = commands(*arguments, "sweep.dry_run=true", printed=tmp_path / "dry")
    assert dry.ends() == 0 and "2 jobs, 0 to run" in dry.output


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


def test_a_data_set_of_ones_own_is_another_one_in_another_folder():
    own = ["data=digits", "data.dataset._target_=resnet_cifar.mine.Mine", "+data.dataset.root=${data.root}"]
    hashes = {config_hash(compose(parse_arguments([*own, f"data.root={root}"])).jobs[0][0]) for root in ("/a", "/b")}
    assert len(hashes) == 2


def test_other_jobs_make_another_sweep():
    ids = {composed(*given).sweep.id for given in (["seed=0,1"], ["seed=0,2"], ["seed=0,1", "trainer.epochs=3"])}
    assert len(ids) == 3


@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "trainer.epochs=3", "trainer.label_smoothing=0.1", "scheduler.div_factor=25", "model.width=0.5"),
        *("optimizer.weight_decay=0.1", "augmentation=none", "data.train_size=100", "lr_finder.select=valley"),
        *("param_groups.norm_bias_lr_factor=2", "explain.num_images=3", "task=find_lr"),
    ],
)
def test_another_value_is_another_job(override):
    (before, _), (after, _) = (compose(parse_arguments(given)).jobs[0] for given in ([], [override]))
    assert config_hash(before) != config_hash(after)


def test_the_same_number_and_the_same_checkpoint_written_otherwise_are_the_same_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"weights")
    numbers = ("scheduler.div_factor=100", "scheduler.div_factor=100.0")
    assert len({config_hash(compose(parse_arguments([number])).jobs[0][0]) for number in numbers}) == 1
    paths = ("checkpoint=last.pt", f"checkpoint={tmp_path}/last.pt")
    hashes = {config_hash(compose(parse_arguments(["task=evaluate", path])).jobs[0][0]) for path in paths}
    assert len(hashes) == 1


def test_another_picture_in_the_folder_is_another_job(tmp_path):
    [(cfg, _)] = compose(parse_arguments(["task=explain", "checkpoint=x", f"explain.images={tmp_path}"])).jobs
    before = config_hash(cfg)
    (tmp_path / "cat.png").write_bytes(b"a picture")
    assert config_hash(cfg) != before


def test_another_byte_of_the_source_is_another_source(monkeypatch, tmp_path):
    hashes = set()
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "fingerprint.py"))
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "module.py").write_text(text)
        hashes.add(source_hash.__wrapped__())
    assert len(hashes) == 2


def test_what_another_source_finished_is_not_finished(outputs, tmp_path):
    composition = composed("seed=0,1", f"output_dir={outputs}")
    settings = composition.jobs[0][0]
    store = sweep_store.tracking.Store(settings.tracking.uri)
    experiment = store.get_or_create_experiment(settings.tracking.experiment, tmp_path / "artifacts")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for source, found in {"another": {}, source_hash(): {config_hash(settings): tmp_path / "run"}}.items():
        tags = {"config_hash": config_hash(settings), "source_hash": source, "process.folder": str(tmp_path / "run")}
        run_id = store.client.create_run(experiment, tags=tags).info.run_id
        (tmp_path / "run" / "tracking.jsonl").write_text(json.dumps({"n": 1, "run": run_id, "kind": "start"}) + "\n")
        store.client.set_terminated(run_id, "FINISHED")
        assert sweep_store.finished_runs(composition.sweep) == found


def test_a_single_run_and_the_same_job_of_a_sweep_have_one_hash():
    [(single, _)] = compose(parse_arguments(["data=digits", "seed=1"])).jobs
    assert config_hash(single) == config_hash(composed("seed=0,1").jobs[1][0])


def test_another_checkpoint_under_the_same_path_makes_another_run(tmp_path):
    path = tmp_path / "last.pt"
    hashes = set()
    for end in ("0" * 64, "1" * 64):
        path.write_text(f"weights sha256:{end}")
        hashes |= {
            config_hash(composed("task=evaluate", f"checkpoint={given}").jobs[0][0]) for given in (path, tmp_path)
        }
    assert len(hashes) == 2


@pytest.fixture
def finished(tmp_path):
    """A folder with a finished run of seed 0, and the configurations of seeds 0 and 1."""
    (of_0, _), (of_1, _) = composed("seed=0,1", "tracking=none", f"hydra.sweep.dir={tmp_path}").jobs
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").write_text(OmegaConf.to_yaml(of_0))
    (tmp_path / "0" / "status.txt").write_text("FINISHED\n")
    sweep_plan.Plan("id", str(tmp_path), [], source_hash(), []).save()
    return tmp_path / "0", of_0, of_1


def test_a_folder_given_by_hand_with_another_sweeps_runs_is_not_taken_for_this_ones(finished):
    folder, of_0, of_1 = finished
    for seeds, found in {"0,1": {config_hash(of_0): folder}, "1,2": {}}.items():
        composition = composed(f"seed={seeds}", "tracking=none", f"hydra.sweep.dir={folder.parent}")
        assert sweep_store.finished_runs(composition.sweep) == found
    (folder / "status.txt").write_text("KILLED\n")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "hydra.yaml").touch()
    assert run_folder.is_stopped(folder, of_0) and not run_folder.is_stopped(folder, of_1)


@pytest.mark.parametrize("damaged", ["", "seed: [", "- 1\n", "seed: 0\n"])
def test_a_run_whose_configuration_a_crash_damaged_is_none(finished, damaged):
    folder, of_0, _ = finished
    (folder / "config.yaml").write_text(damaged)
    composition = composed("seed=0,1", "tracking=none", f"hydra.sweep.dir={folder.parent}")
    assert sweep_store.finished_runs(composition.sweep) == {} and not run_folder.is_stopped(folder, of_0)


def test_what_runs_anew_moves_its_predecessor_aside_and_that_one_alone(finished):
    folder, of_0, _ = finished
    stranger = folder.parent / "2026-11-20_single_run"
    stranger.mkdir()
    (stranger / "config.yaml").touch()
    given = ["-m", "data=digits", "tracking=none", f"hydra.sweep.dir={folder.parent}"]
    sweep_plan.prepare(
        [*given, "seed=1,0"], composed("seed=1,0", "tracking=none", f"hydra.sweep.dir={folder.parent}").sweep
    )
    first, _ = sweep_plan.load_plan(folder.parent).jobs
    assert (first.action, first.folder) == (sweep_plan.RUN, str(folder))
    assert run_folder.has_finished(folder.parent / "0_replaced_1", config_hash(of_0)) and not folder.exists()
    assert stranger.exists()


def test_a_result_that_was_moved_aside_is_found_where_it_is(monkeypatch, finished):
    folder, of_0, _ = finished
    monkeypatch.setattr(sweep_store, "finished_runs", lambda _: {config_hash(of_0): folder})
    given = ["tracking=none", f"hydra.sweep.dir={folder.parent}"]
    sweep_plan.prepare(["-m", "data=digits", *given, "seed=1,0"], composed(*given, "seed=1,0").sweep)
    _, skipped = sweep_plan.load_plan(folder.parent).jobs
    assert (skipped.action, skipped.result) == (sweep_plan.SKIP, str(folder.parent / "0_replaced_1"))


def test_another_run_in_a_jobs_folder_is_not_the_job(finished):
    folder, of_0, of_1 = finished
    assert run_folder.has_finished(folder, config_hash(of_0)) and not run_folder.has_finished(folder, config_hash(of_1))


@pytest.mark.parametrize("option", [["--config-dir", "w=1"], ["-cn", "config"]])
def test_the_sweeps_folder_stands_beside_the_other_settings(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w=1").mkdir()
    given = ["-m", "~scheduler.cycle_momentum", "seed=0,1", "tracking=none", f"output_dir={tmp_path}", *option]
    argv = sweep_plan.prepare(given, compose(parse_arguments(given)).sweep)
    assert parse_arguments(argv).overrides[:-1] == parse_arguments(given).overrides


def test_after_a_change_of_the_source_nothing_in_a_folder_given_by_hand_is_finished_or_goes_on(finished):
    folder, *_ = finished
    planned_sweep = composed("seed=0,1", "tracking=none", f"hydra.sweep.dir={folder.parent}").sweep

    def planned():
        return sweep_plan._plan([], planned_sweep, sweep_store.finished_runs(planned_sweep)).jobs[0].action

    assert planned() == sweep_plan.SKIP
    (folder / "status.txt").unlink()
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "hydra.yaml").touch()
    assert planned() == sweep_plan.RESUME
    anew = composed("seed=0,1", "tracking=none", f"hydra.sweep.dir={folder.parent}", "sweep.rerun=all")
    assert sweep_plan._plan([], anew.sweep, {}).jobs[0].action == sweep_plan.RUN
    assert not run_folder.is_stopped(folder, composed("seed=0,1").jobs[0][0])  # which is tracked elsewhere
    sweep_plan.Plan("id", str(folder.parent), [], "another source", []).save()
    assert planned() == sweep_plan.RUN
    (folder / "status.txt").write_text("FINISHED\n")
    assert planned() == sweep_plan.RUN
    (folder.parent / sweep_plan.PLAN).write_text("")  # by a crash of the machine
    assert planned() == sweep_plan.RUN


def test_a_secret_in_a_sweeps_name_is_not_written_down(monkeypatch):
    monkeypatch.setenv("CANARY", "s3cr3t")
    composition = composed("seed=0,1", "tracking.run_name='night ${oc.env:CANARY}'")
    assert [job.name for job in sweep_plan._plan([], composition.sweep, {}).jobs] == [
        f"night ${{oc.env:CANARY}} seed={seed}" for seed in (0, 1)
    ]


def test_a_run_that_was_set_aside_is_not_looked_for_in_the_folder_of_its_successor(finished, tmp_path):
    folder, settings, _ = finished
    (folder / "tracking.jsonl").write_text('{"n": 1, "run": "successor"}\n')
    kept = tmp_path / "set_aside" / "artifacts"
    kept.mkdir(parents=True)
    (kept / "config.yaml").touch()
    for run_id, found in {"successor": folder, "set_aside": kept}.items():
        info = SimpleNamespace(run_id=run_id, artifact_uri=kept.as_uri())
        run = SimpleNamespace(info=info, data=SimpleNamespace(tags={"process.folder": str(folder)}))
        assert sweep_store._files(run, settings, tmp_path) == found


def test_a_path_with_an_apostrophe_is_one_value_for_hydra():
    path = "/home/O'Brien/Ü (2)/it's"
    assert OverridesParser.create().parse_override(f"hydra.sweep.dir={quoted(path)}").value() == path


def test_jobs_are_named_by_what_they_varied():
    jobs = [["scheduler.div_factor=10", "seed=0", "data=digits"], ["scheduler.div_factor=25", "seed=0", "data=digits"]]
    assert [sweep_plan.job_name(values, None) for values in sweep_plan.varied(jobs)] == [
        "div_factor=10",
        "div_factor=25",
    ]
    alike = {"optimizer._target_": "a", "scheduler._target_": "b"}
    assert sweep_plan.job_name(alike, "night") == "night optimizer._target_=a scheduler._target_=b"


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


def test_of_equals_the_one_with_the_lower_loss_is_first():
    equals = [replace(result({"lr": str(loss)}, 80.0), loss=loss) for loss in (0.3, 0.2, 0.4)]
    assert [row["lr"] for row in leaderboard.table(equals)] == ["0.2", "0.3", "0.4"]
    points = sweep_summary.ranked_points(equals, "test/accuracy")
    assert [point[0].loss for point in points] == [0.2, 0.3, 0.4]


def test_an_unknown_loss_is_behind_a_known_one():
    rows = leaderboard.table([replace(result({"lr": "1"}, 80.0), loss=None), result({"lr": "2"}, 80.0)])
    assert [row["lr"] for row in rows] == ["2", "1"]


def test_a_run_without_predictions_keeps_the_accuracy_of_its_last_epoch():
    found = [replace(result({"lr": "1"}, 90.0), test_accuracy=None)]
    assert [row["test/accuracy"] for row in leaderboard.rows_of_runs(found)] == [90.0]


def test_val_accuracy_ranks_where_every_run_has_one():
    held_out = [
        result({"lr": "1"}, 70.0, "val", test_accuracy=60.0),
        result({"lr": "2"}, 65.0, "val", test_accuracy=64.0),
    ]
    assert [row["val/accuracy"] for row in leaderboard.table(held_out)] == [70.0, 65.0]
    mixed = [*held_out, result({"lr": "3"}, 62.0)]
    assert [row["test/accuracy"] for row in leaderboard.table(mixed)] == [64.0, 62.0, 60.0]


def test_the_end_of_a_sweep_leads_to_its_summary_and_to_the_compare_page_on_exactly_these_runs(monkeypatch, tmp_path):
    summary = SimpleNamespace(run_id="s", experiment_id="7")
    assert sweep_store.where_to_look("http://host:5000/", summary, ["a", "b"]) == [
        "summary  http://host:5000/#/experiments/7/runs/s?workflowType=machine_learning",
        "compare  http://host:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%227%22%5D"
        "&workflowType=machine_learning",
    ]
    monkeypatch.chdir(tmp_path)
    serve, *pages = sweep_store.where_to_look(f"sqlite:///{tmp_path}/outputs/mlflow.db", summary, ["a"])
    assert serve == "MLflow   mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"
    assert all("  http://127.0.0.1:5000/#/" in page for page in pages)


def test_the_verdict_names_the_best_point_and_the_next():
    found = [
        result({"a.lr": "0.20833333333333334", "seed": "0"}, 80.0),
        result({"a.lr": "0.20833333333333334", "seed": "1"}, 84.0),
        result({"a.lr": "2", "seed": "0"}, 70.0),
        result({"a.lr": "3", "seed": "0"}, None, status="FAILED"),
    ]
    assert leaderboard.verdict(leaderboard.table(found)) == (
        "**Best: lr=0.208333: test/accuracy 82.00% ± 2.83 (2 runs).** Next of 2: lr=2: test/accuracy 70.00%."
    )
    assert leaderboard.verdict(leaderboard.table(found[3:])) == "**No run came to its end.**"
    diverged = [result({"lr": "1", "seed": "0"}, 95.0), result({"lr": "1", "seed": "1"}, None, status="FAILED")]
    assert leaderboard.verdict(leaderboard.table(diverged)) == (
        "**Best: lr=1: test/accuracy 95.00% (1 FINISHED, 1 FAILED).**"
    )


def finished_job(folder, *predictions, columns="label,prediction"):
    """The folder of a job that trained nothing, with what it predicted."""
    folder.mkdir()
    (folder / "status.txt").write_text("FINISHED\n")
    (folder / "config.yaml").write_text("data: {val_size: 5000}\n")
    if predictions:
        (folder / "predictions.csv").write_text("\n".join([columns, *predictions]) + "\n")
    return str(folder)


def found_in(tmp_path, *folders, action=sweep_plan.RUN):
    jobs = [
        sweep_plan.Job(n, folder, {"checkpoint": folder[-1]}, "", action, folder, folder)
        for n, folder in enumerate(folders)
    ]
    return leaderboard.results(sweep_plan.Plan("id", str(tmp_path), ["-m"], source_hash(), jobs))


def test_jobs_that_evaluate_are_ranked_without_a_history(tmp_path):
    found = found_in(
        tmp_path, finished_job(tmp_path / "a", "cat,dog", "cat,cat"), finished_job(tmp_path / "b", "cat,cat")
    )
    assert [row["test/accuracy"] for row in leaderboard.rows_of_runs(found)] == [50, 100]
    assert leaderboard.verdict(leaderboard.table(found)) == (
        "**Best: checkpoint=b: test/accuracy 100.00%.** Next of 2: checkpoint=a: test/accuracy 50.00%."
    )


def test_jobs_that_find_a_rate_or_explain_pictures_came_to_their_end_without_an_accuracy(tmp_path):
    pictures = finished_job(tmp_path / "b", "rex.jpg,dog", columns="picture,prediction")
    found = found_in(tmp_path, finished_job(tmp_path / "a"), pictures)
    assert [result.test_accuracy for result in found] == [None, None]
    rows = leaderboard.table(found)
    assert leaderboard.verdict(rows) == "**No accuracy was measured to rank by.**"
    assert leaderboard.text(rows).split() == ["checkpoint", "status", "a", "FINISHED", "b", "FINISHED"]


def test_the_rates_that_a_sweep_found_are_in_its_table(tmp_path):
    jobs = []
    for seed, losses in {"0": (3, 1, 2), "1": (3, 2, 1)}.items():
        folder = Path(finished_job(tmp_path / seed))
        (folder / "config.yaml").write_text("lr_finder: {select: min_loss}\n")
        points = [
            f"{place},{lr},{loss}" for place, (lr, loss) in enumerate(zip((0.01, 0.02, 0.04), losses, strict=True))
        ]
        (folder / "lr_finder.csv").write_text("\n".join(["iteration,lr,loss", *points]) + "\n")
        jobs.append(sweep_plan.Job(0, "", {"seed": seed}, "", sweep_plan.RUN, str(folder), str(folder)))
    found = leaderboard.results(sweep_plan.Plan("id", str(tmp_path), ["-m"], source_hash(), jobs))
    assert [row["found_lr"] for row in leaderboard.rows_of_runs(found)] == [0.02, 0.04]
    assert leaderboard.text(leaderboard.table(found)).split("\n")[1] == "0.02 to 0.04  2 FINISHED"
    assert [row["found_lr"] for row in leaderboard.table(found[:1])] == ["0.02"]


@pytest.mark.parametrize(
    ("action", "expected"),
    [(sweep_plan.SKIP, ("FINISHED", 100)), (sweep_plan.RUN, ("UNFINISHED", None))],
    ids=["skip", "run"],
)
def test_without_a_status_what_was_skipped_is_finished_by_the_stores_word(tmp_path, action, expected):
    finished_job(tmp_path / "a", "cat,cat")
    (tmp_path / "a" / "status.txt").unlink()
    [result] = found_in(tmp_path, str(tmp_path / "a"), action=action)
    assert (result.status, result.accuracy) == expected


def test_files_of_a_run_elsewhere_are_fetched_whole_or_another_time(monkeypatch, tmp_path, caplog):
    failures = [ConnectionError("cable"), None, None]

    def download_artifacts(run_id, name, folder):
        Path(folder, name).touch()
        if (error := failures.pop(0)) is not None:
            raise error

    there = [SimpleNamespace(path=name) for name in ("config.yaml", "history.csv", "run.log")]
    client = SimpleNamespace(list_artifacts=lambda run_id: there, download_artifacts=download_artifacts)
    monkeypatch.setattr(sweep_store.tracking, "Store", lambda uri: SimpleNamespace(client=client))
    info = SimpleNamespace(run_id="abc", artifact_uri="mlflow-artifacts:/1/abc/artifacts")
    run, settings = SimpleNamespace(info=info, data=SimpleNamespace(tags={})), composed("seed=0,1").jobs[0][0]
    assert not sweep_store._files(run, settings, tmp_path).exists()
    assert "cannot be fetched" in caplog.text
    assert {path.name for path in sweep_store._files(run, settings, tmp_path).iterdir()} == {
        "config.yaml",
        "history.csv",
    }


def test_what_a_database_that_is_gone_misses_is_kept(outputs):
    sweep = composed("seed=0,1", f"output_dir={outputs}").sweep
    folder = sweep.job_folders[0]
    folder.mkdir(parents=True)
    given = {key: sweep.settings.tracking[key] for key in ("uri", "artifacts", "experiment")}
    run = sweep_store.tracking.start(**given, run_name=None, folder=folder, params={"seed": 0}, tags={})
    run.finish("FINISHED")
    (folder / "tracking.sent").write_text("")
    (outputs / "mlflow.db").rename(outputs / "moved.db")
    assert sweep_store.finished_runs(sweep) == {}
    assert (folder / "tracking.sent").read_text() == ""


def test_the_time_a_resumed_run_lay_stopped_is_not_in_the_estimate(outputs, tmp_path):
    composition = composed("seed=0,1", "trainer.epochs=2", f"output_dir={outputs}")
    settings = composition.jobs[0][0]
    store = sweep_store.tracking.Store(settings.tracking.uri)
    client = store.client
    experiment = store.get_or_create_experiment(settings.tracking.experiment, tmp_path / "artifacts")

    def earlier(seconds, **tags):
        run = client.create_run(experiment, start_time=1000, tags={"task": "train", **tags})
        for key, value in zip(sweep_store.SIZE, sweep_store._planned_size(settings, "digits"), strict=True):
            if value is not None:
                client.log_param(run.info.run_id, key, value)
        client.log_param(run.info.run_id, "trainer.epochs", 2)
        client.set_terminated(run.info.run_id, "FINISHED", end_time=1000 * (1 + seconds))

    estimate = [composition.sweep, [sweep_plan.RUN, sweep_plan.SKIP]]
    earlier(360_000, **{"resumed.git_commit": "abc"})
    assert sweep_store.estimate(*estimate).startswith("no earlier runs")
    earlier(60)
    assert sweep_store.estimate(*estimate).startswith("about 60 s")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0.20833333333333334", "0.208333"),
        ("1e-07", "1e-07"),
        ("1234567890", "1234567890"),
        ("one_cycle_b", "one_cycle_b"),
    ],
)
def test_long_decimals_are_short_in_names(value, shown):
    assert sweep_plan.short_value(value) == shown


def assert_apart_and_inside(texts, figure):
    page, boxes = figure.bbox, [text.get_window_extent() for text in texts if text.get_text()]
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert all(box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1 for box in boxes)


@pytest.mark.parametrize(("count", "width"), [(7, 0.9), (2, 1.3)])  # of 9 inches for 8 columns, 3 as wide as 6
def test_long_names_take_no_room_from_the_images_and_from_each_other(count, width):
    heat_maps, labels = np.ones((2, 8, 8)), ["aquatic_mammals_of_the_seas", "large_omnivores_and_herbivores"]
    runs = [
        {"name": f"norm_bias_lr_factor={n} pct_start=0.208333", "heat_maps": heat_maps, "predictions": labels}
        for n in range(count)
    ]
    figure = sweep_figures.grad_cam_grid(np.zeros((2, 8, 8, 3)), labels, runs, "layer_2")
    figure.draw_without_rendering()
    assert min(axes.get_window_extent().width for axes in figure.axes) / figure.dpi > width
    assert_apart_and_inside([axes.title for axes in figure.axes], figure)


def long_names(count):
    return [f"weight_decay=0.0005 div_factor=100 pct_start=0.208333 final_div_factor={n}" for n in range(count)]


@pytest.mark.parametrize("count", [2, 11])
def test_a_legend_leaves_room_for_the_curves_and_has_a_colour_for_each_name(count):
    names = long_names(count)
    curves = sweep_figures.learning_curves([(name, [50.0, 60.0]) for name in names], "test/accuracy")
    against = sweep_figures.accuracy_against(
        "lr", ["1", "2"] * count, [90.0] * 2 * count, sorted(2 * names), "test/accuracy"
    )
    for figure in (curves, against):
        [legend] = figure.legends
        shown = [line.get_color() for line in legend.get_lines()]
        assert len(set(shown)) == len(shown) == len(legend.get_texts())
        figure.draw_without_rendering()
        assert figure.axes[0].get_window_extent().width > figure.bbox.width / 2
        assert legend.get_window_extent().y0 >= 0


def test_more_series_than_have_room_stay_at_their_values_and_out_of_the_legend():
    others = [f"alpha={n}" for n in range(40)]
    figure = sweep_figures.accuracy_against("lr", ["1"] * 40, [90.0] * 40, others, "test/accuracy")
    [axes] = figure.axes
    assert max(abs(x) for line in axes.get_lines() for x in line.get_xdata()) < 0.5
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "and 30 more"


@pytest.mark.parametrize(
    "values", [[f"outputs/runs/2026-11-28_09-30-2{n}_3f6203" for n in range(5)], [f"{n / 7}" for n in range(13)]]
)
def test_long_values_are_not_written_over_each_other(values):
    figure = sweep_figures.accuracy_against(
        "checkpoint", values, [90.0] * len(values), [""] * len(values), "val/accuracy"
    )
    figure.draw_without_rendering()
    [axes] = figure.axes
    # Slanted ones stand above each other where their boxes, which are level, overlap.
    lines = [(text.get_window_extent(), text.get_rotation()) for text in axes.get_xticklabels()]
    assert all(box.x0 >= 0 and box.y0 >= 0 for box, _ in lines)
    ends = [box.x1 for box, rotation in lines if rotation == 30]
    assert len(ends) == len(values) and min(np.diff(ends)) > 1.5 * axes.get_xticklabels()[0].get_fontsize()
    assert axes.get_window_extent().height > figure.bbox.height / 3


def test_values_are_drawn_in_the_order_of_numbers():
    figure = sweep_figures.accuracy_against("lr", ["100", "25", "25"], [1.0, 2.0, 3.0], ["", "", ""], "test/accuracy")
    [axes] = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["25", "100"]
    assert axes.get_lines()[0].get_ydata().tolist() == [2.5, 1.0]


def test_points_are_drawn_in_the_order_of_the_leaderboard_with_their_best_run_first():
    found = [
        result({"lr": "1", "seed": "0"}, 90.0),
        result({"lr": "1", "seed": "1"}, 60.0),
        result({"lr": "2", "seed": "0"}, 79.0),
        result({"lr": "2", "seed": "1"}, 81.0),
    ]
    ranked = sweep_summary.ranked_points(found, "test/accuracy")
    assert [[run.accuracy for run in point] for point in ranked] == [[81.0, 79.0], [90.0, 60.0]]


def test_seeds_of_a_point_are_drawn_under_their_mean():
    figure = sweep_figures.learning_curves([("lr=1", [10.0, 20.0]), ("lr=1", [20.0, 40.0])], "test/accuracy")
    first, second, average = (line.get_ydata().tolist() for line in figure.axes[0].get_lines()[:3])
    assert (first, second, average) == ([10.0, 20.0], [20.0, 40.0], [15.0, 30.0])


def test_final_accuracies_have_a_line_per_name_the_best_on_top_and_the_base_marked():
    runs = [("best", 92.0), ("best", 90.0), ("base", 80.0)]
    [axes] = sweep_figures.final_accuracies(runs, "base", "val/accuracy").axes
    points, average, *_ = axes.get_lines()
    assert (points.get_xdata().tolist(), average.get_xdata().tolist()) == ([92.0, 90.0], [91.0])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["best", "base"] and axes.yaxis_inverted()
    assert axes.get_lines()[-1].get_xdata() == [80.0, 80.0]


def test_the_same_sweep_does_not_run_twice_at_once(commands, outputs, tmp_path):
    arguments = [*SWEEP, "seed=0,1", "tracking=none", f"output_dir={outputs}"]
    folder = compose(parse_arguments(arguments)).sweep.folder
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        command = commands(*arguments, printed=tmp_path / "out")
        assert command.ends() == 5
    assert command.output.startswith(f"Another process is working in {folder}. Wait")


def test_a_run_is_set_aside_beside_those_before_it(tmp_path):
    folder = tmp_path / "explain.layers=[a,b]"  # no pattern
    for place in (f"{folder}_replaced_1", f"{folder}_replaced_3", f"{folder}_replaced_2"):
        if place.endswith("3"):
            Path(place).mkdir()  # its predecessor was deleted since
            continue
        folder.mkdir()
        assert sweep_plan._set_aside(folder) == Path(place)
    folder.mkdir()
    assert sweep_plan._set_aside(folder).name == f"{folder.name}_replaced_4"


def test_a_run_that_a_process_works_on_is_not_set_aside(commands, outputs, tmp_path):
    arguments = [*SWEEP, "seed=0,1", "sweep.rerun=all", "tracking=none", f"output_dir={outputs}"]
    [folder, _] = compose(parse_arguments(arguments)).sweep.job_folders
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    with FileLock(folder / ".lock"):
        command = commands(*arguments, printed=tmp_path / "out")
        assert command.ends() == 5
    assert command.output.startswith(f"Another process is working in {folder}")
    assert (folder / "config.yaml").exists()


def test_a_plan_survives_its_file(tmp_path):
    job = sweep_plan.Job(0, "seed=0", {"seed": "0"}, "abc", sweep_plan.RUN, str(tmp_path / "0"), str(tmp_path / "0"))
    plan = sweep_plan.Plan("id", str(tmp_path), ["-m", "seed=0"], source_hash(), [job])
    plan.save()
    assert sweep_plan.load_plan(tmp_path) == plan
    assert json.loads((tmp_path / sweep_plan.PLAN).read_text())["jobs"][0]["name"] == "seed=0"
