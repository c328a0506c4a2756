"""Interrupted runs, by real signals in real processes: what is kept, and that going on gives what would have been."""

import csv
import json
import os
import select
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from processes import (
    STEPS,
    after_steps,
    full_disk_at_the_start,
    full_disk_for_checkpoint,
    killed_before_the_checkpoint,
    on_a_terminal,
    signals,
    tiny,
    waits_after_steps,
)
from test_loop import numbers, synthetic, training

from resnet_cifar import checkpoint, resume, run_folder, tracking
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.errors import CheckpointError, StorageError
from resnet_cifar.loop import Progress, fit
from resnet_cifar.signals import exit_on_ending_signals, stop_requests
from resnet_cifar.tables import cut_tables, read_csv
from resnet_cifar.training import MovingAverage, restore, training_state

TIMES = ("images_per_second", "epoch_seconds")


@pytest.fixture
def start(commands, outputs, tmp_path):
    """Start a tiny run in `outputs`, with a fault where one is given."""

    def run(*arguments, fault=None, fault_arguments=()):
        if not any("resume=" in argument for argument in arguments):
            arguments = (*tiny(*arguments), f"output_dir={outputs}")
        printed = tmp_path / f"printed_{len(list(tmp_path.glob('printed_*')))}"
        return commands(*arguments, printed=printed, fault=fault, fault_arguments=fault_arguments)

    return run


@pytest.fixture(scope="module")
def uninterrupted(commands, empty_database, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    outputs = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(empty_database, outputs / "mlflow.db")
    command = commands(*tiny(), f"output_dir={outputs}", printed=outputs / "printed")
    assert command.ends() == 0, command.output
    return only_run(outputs)


def only_run(outputs):
    [folder] = (outputs / "runs").iterdir()
    return folder


def tracked(folder):
    """MLflow's client, and the run whose files are in `folder`."""
    client = tracking.Store(f"sqlite:///{folder.parents[1] / 'mlflow.db'}").client
    [run] = client.search_runs([client.get_experiment_by_name("resnet-cifar").experiment_id])
    return client, run


def table(path):
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def points(folder):
    client, run = tracked(folder)
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {
        key: [(point.step, None if key.startswith("speed/") else point.value) for point in history]
        for key, history in histories.items()
    }


def assert_equal_states(ours, theirs, where="state"):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal_states(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif not where.startswith("state.config"):
        assert ours == theirs, where


def said(folder):
    """What the run's folder says of it, but how fast it was."""
    content = json.loads((folder / "run.json").read_text())
    return {**content, "metrics": {key: value for key, value in content["metrics"].items() if "speed/" not in key}}


def assert_as_if_never_interrupted(folder, uninterrupted):
    assert_equal_states(checkpoint.load(folder), checkpoint.load(uninterrupted))
    for name in ("history.csv", "lr_history.csv", "lr_finder.csv", "predictions.csv"):
        assert table(folder / name) == table(uninterrupted / name), name
    assert points(folder) == points(uninterrupted)
    mine, its = said(folder), said(uninterrupted)
    assert (mine["metrics"], mine["status"]) == (its["metrics"], its["status"])
    assert mine["params"]["scheduler.max_lr"] == its["params"]["scheduler.max_lr"]
    assert tracked(folder)[1].info.status == "FINISHED"
    figures = [{path.name for path in (run / "figures").iterdir()} for run in (folder, uninterrupted)]
    assert figures[0] == figures[1]


# Each step a checkpoint; the first before training. In the 2nd epoch, and just after the 1st epoch's metrics are logged.
@pytest.mark.parametrize(
    "checkpoints", [STEPS + 5, STEPS + 2], ids=["inside an epoch", "between metrics and checkpoint"]
)
def test_a_run_killed_by_9_goes_on_bit_for_bit(start, outputs, uninterrupted, checkpoints):
    killed = start(
        "trainer.checkpoint_minutes=1e-9", fault=killed_before_the_checkpoint, fault_arguments=(checkpoints,)
    )
    assert killed.ends() == -signal.SIGKILL
    folder = only_run(outputs)
    time.sleep(0.01)
    resumed = start(f"resume={folder}")
    assert resumed.ends() == 0, resumed.output
    assert "Resumed in epoch" in resumed.output and "LR finder:" not in resumed.output
    assert_as_if_never_interrupted(folder, uninterrupted)


def test_a_run_killed_between_checkpoints_repeats_the_steps_after_the_last(start, outputs, uninterrupted):
    killed = start(fault=after_steps, fault_arguments=(STEPS + 5, signals, signal.SIGKILL))
    assert killed.ends() == -signal.SIGKILL
    resumed = start(f"resume={only_run(outputs)}")
    assert resumed.ends() == 0, resumed.output
    assert_as_if_never_interrupted(only_run(outputs), uninterrupted)


def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_one(start, outputs, uninterrupted):
    killed = start("trainer.checkpoint_minutes=1e-9", fault=after_steps, fault_arguments=(5, signals, signal.SIGKILL))
    killed.ends()
    folder = only_run(outputs)
    last = folder / "checkpoints" / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:1000])
    resumed = start(f"resume={folder}")
    assert resumed.ends() == 0, resumed.output
    assert "cut short" in resumed.output and "Falling back to previous.pt" in resumed.output
    assert_as_if_never_interrupted(folder, uninterrupted)


def test_a_checkpoint_brings_back_the_moving_average_and_dropout_goes_on(tmp_path):
    def averaging():
        parts = training()  # with dropout, which draws from torch's own generator
        parts.averaged = MovingAverage(parts.model, 0.75)
        return parts

    def built(parts):
        return SimpleNamespace(network=parts.model, classes=("a", "b"), device=torch.device("cpu"))

    images, held_out = synthetic(40), synthetic(20, seed=1)
    whole = averaging()
    expected = numbers(fit(whole, images, held_out))

    interrupted, progress = averaging(), Progress()
    records = fit(interrupted, images, held_out, progress)
    first = numbers([next(records) for _ in range(2)])
    state = training_state(OmegaConf.create({}), built(interrupted), interrupted, progress, max_lr=0.01)
    checkpoint.save(state, tmp_path)

    torch.manual_seed(99)
    resumed, progress = averaging(), Progress()
    restore(resumed, resumed.model, progress, checkpoint.load(tmp_path))
    assert first + numbers(fit(resumed, images, held_out, progress)) == expected
    assert_equal_states(resumed.averaged.state_dict(), whole.averaged.state_dict())


@pytest.mark.parametrize("tracking", ["mlflow", "none"])
def test_a_run_goes_on_in_the_precision_it_began_in_and_keeps_its_provenance(start, outputs, tracking):
    stopped = {"fault": after_steps, "fault_arguments": (STEPS + 2, signals, signal.SIGTERM)}
    start("trainer.precision=auto", f"tracking={tracking}", **stopped).ends()
    folder = only_run(outputs)
    began = said(folder)["tags"]["precision"]
    other = {"fp32": "bf16", "bf16": "fp32"}[began]  # as if it had begun on another machine
    checkpoint.save({**checkpoint.load(folder), "precision": other}, folder / "checkpoints")
    resumed = start(f"resume={folder}")
    assert resumed.ends() == 0, resumed.output
    assert f"It goes on in {other}, in which it began" in resumed.output
    tags = said(folder)["tags"]
    assert (tags["precision"], tags["resumed.precision"]) == (began, other)
    assert tracking == "none" or tags.items() <= tracked(folder)[1].data.tags.items()
    assert checkpoint.load(folder)["precision"] == other


def test_a_run_killed_before_its_first_checkpoint_starts_again(start, outputs, uninterrupted):
    killed = start(fault=killed_before_the_checkpoint, fault_arguments=(1,))
    assert killed.ends() == -signal.SIGKILL
    assert not checkpoint.exists(only_run(outputs) / "checkpoints")
    resumed = start(f"resume={only_run(outputs)}")
    assert resumed.ends() == 0, resumed.output
    assert_as_if_never_interrupted(only_run(outputs), uninterrupted)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_within_a_batch_and_the_run_is_killed(
    start, outputs, uninterrupted, number, exit_code
):
    stopped = start(fault=after_steps, fault_arguments=(STEPS + 3, signals, number))
    assert stopped.ends() == exit_code, stopped.output
    folder = only_run(outputs)
    assert checkpoint.load(folder)["progress"]["batch"] == 3
    assert len(table(folder / "lr_history.csv")) == STEPS + 3
    assert {"loss_and_accuracy.png", "lr_history.png"} <= {path.name for path in (folder / "figures").iterdir()}
    client, run = tracked(folder)
    assert run.info.status == "KILLED" and f"resume={folder}" in run.data.tags["mlflow.note.content"]
    assert "checkpoints/last.pt" in [file.path for file in client.list_artifacts(run.info.run_id, "checkpoints")]
    assert "Traceback" not in stopped.output
    assert stopped.output.count(f"Go on with it:\n  python run.py resume={folder}\n") == 1
    assert start(f"resume='{folder}'").ends() == 0
    assert_as_if_never_interrupted(folder, uninterrupted)


def test_a_terminal_that_is_closed_stops_the_run_with_a_checkpoint(start, outputs):
    terminal, its_end = os.openpty()
    stopped = start("trainer.epochs=1000", fault=on_a_terminal, fault_arguments=(os.ttyname(its_end),))
    printed = b""
    while b"epoch    3/1000" not in printed:
        assert select.select([terminal], [], [], 120)[0], printed
        printed += os.read(terminal, 10_000)
    os.close(terminal)
    os.close(its_end)
    assert stopped.ends() == 129, stopped.output
    folder = only_run(outputs)
    assert checkpoint.load(folder)["progress"]["epoch"] >= 3
    assert (folder / "status.txt").read_text().startswith("KILLED")
    assert tracked(folder)[1].info.status == "KILLED"


def test_under_nohup_the_end_of_the_terminal_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_ending_signals(), stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal_number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_at_once(start, outputs):
    stopped = start(fault=after_steps, fault_arguments=(3, signals, signal.SIGTERM, signal.SIGTERM))
    assert stopped.ends() == -signal.SIGTERM
    assert tracked(only_run(outputs))[1].info.status == "RUNNING"


def test_the_next_start_finds_a_killed_run_and_says_how_to_go_on(start, outputs):
    start(fault=after_steps, fault_arguments=(3, signals, signal.SIGKILL)).ends()
    folder = only_run(outputs)
    assert tracked(folder)[1].info.status == "RUNNING"
    following = start("task=find_lr", "lr_finder.num_iter=2")
    assert following.ends() == 0, following.output
    assert f"python run.py resume={folder}" in following.output
    client = tracked_client(outputs)
    statuses = {run.data.tags["task"]: run.info.status for run in client.search_runs(["1"])}
    assert statuses == {"train": "KILLED", "find_lr": "FINISHED"}


def tracked_client(outputs):
    return tracking.Store(f"sqlite:///{outputs / 'mlflow.db'}").client


def test_a_second_resume_is_turned_away_while_the_first_goes_on(start, outputs, tmp_path):
    start(fault=after_steps, fault_arguments=(3, signals, signal.SIGKILL)).ends()
    folder = only_run(outputs)
    first = start(f"resume={folder}", fault=waits_after_steps, fault_arguments=(2, str(tmp_path / "go")))
    while "Resumed in epoch" not in first.output and first.process.is_alive():
        time.sleep(0.05)
    second = start(f"resume={folder}")
    code = second.ends()
    (tmp_path / "go").touch()
    assert first.ends() == 0, first.output
    assert code == 5
    assert "Another process is working in" in second.output and len(second.output.splitlines()) <= 3


def test_a_finished_run_says_so_and_exits_0(start, uninterrupted):
    before = sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*") if path.name != ".lock")
    command = start(f"resume={uninterrupted}")
    assert command.ends() == 0
    assert "finished" in command.output
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*") if path.name != ".lock") == before
    )


@pytest.mark.parametrize("beside", ["seed=1", "-m", "tracking=none"])
def test_anything_beside_resume_is_refused(start, uninterrupted, beside):
    command = start(f"resume={uninterrupted}", beside)
    assert command.ends() == 2
    assert f"leave out {beside}" in command.output


@pytest.mark.parametrize(
    "reference", ["resume=nowhere", "+resume=0123456789abcdef0123456789abcdef", "resume=/tmp/no/run"]
)
def test_an_unknown_run_is_refused(start, reference):
    command = start(reference)
    assert command.ends() == 4
    assert "there is no such run" in command.output and len(command.output.splitlines()) <= 3


def test_files_of_a_run_that_are_not_its_own_folder_are_refused_and_left_alone(start, tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "config.yaml").write_text("seed: 0\n")
    command = start(f"resume={tmp_path / 'artifacts'}")
    assert command.ends() == 4
    assert "is no run's own folder" in command.output
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["seed: [", "seed: 0\n", "seed: ${nowhere}\n"])
def test_a_run_whose_configuration_is_damaged_cannot_go_on(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="its configuration cannot be used"):
        resume.saved_run(tmp_path)


def test_a_run_in_a_folder_that_cannot_be_written_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / ".hydra").mkdir()
    for path in ("config.yaml", ".hydra/hydra.yaml", "run.log"):
        (tmp_path / path).touch()
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / "run.log")  # root may write everything
    with pytest.raises(StorageError, match="cannot be written"):
        resume.command_line([f"resume={tmp_path}"])


@pytest.mark.parametrize(
    ("kinds", "recorded"), [(("start",), False), (("start", "params"), True)], ids=["killed between", "recorded"]
)
def test_parameters_that_a_kill_came_before_are_sent_by_the_run_that_goes_on(tmp_path, kinds, recorded):
    [(cfg, _)] = compose(parse_arguments([])).jobs
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (tmp_path / "run.json").touch()
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {overrides: {task: []}, runtime: {choices: {}}}\n")
    records = [{"n": n, "run": "a", "kind": kind, "uri": "sqlite:////mlflow.db"} for n, kind in enumerate(kinds)]
    (tmp_path / "tracking.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert resume.saved_run(tmp_path)[1].recorded == recorded


def test_an_interrupted_run_goes_on_where_its_images_and_its_store_are_now(tmp_path):
    [(cfg, _)] = compose(parse_arguments(["data.root=/before"])).jobs
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {overrides: {task: []}, runtime: {choices: {}}}\n")
    moved = ["data.root=/now", "tracking.uri=http://now"]
    assert set(moved) <= set(resume.command_line([f"resume={tmp_path}", *moved]))
    for root, found in {None: "/before", "/now": "/now"}.items():
        data = resume.saved_run(tmp_path, root)[0].data
        assert data.root == data.dataset.root == found
    assert resume.saved_run(tmp_path, uri="http://now")[0].tracking.uri == "http://now"
    started = {"n": 1, "run": "a", "kind": "start", "uri": "sqlite:////whole/mlflow.db", "experiment_id": "1"}
    (tmp_path / "tracking.jsonl").write_text(json.dumps(started) + "\n")
    assert resume.saved_run(tmp_path)[0].tracking.uri == "sqlite:////whole/mlflow.db"


def test_a_run_is_found_by_its_mlflow_id(uninterrupted):
    _, run = tracked(uninterrupted)
    found = run_folder.find_run(run.info.run_id, uninterrupted.parents[1], "resume")
    assert found == uninterrupted


def test_a_row_that_a_kill_tore_is_written_again(tmp_path):
    (tmp_path / "lr_history.csv").write_bytes(b"step,epoch,lr,loss\r\n1,1,0.1,2.5\r\n2,1,0.1,2.4\r\n1")
    (tmp_path / "history.csv").write_bytes(b"epoch,lr,tra")
    cut_tables(tmp_path, Progress(epoch=1, batch=17), steps_per_epoch=20)
    assert [row["step"] for row in read_csv(tmp_path / "lr_history.csv")] == [1, 2]
    assert not (tmp_path / "history.csv").exists()


def test_a_torn_journal_hides_no_other_run(tmp_path):
    for name, journal in {"torn": '{"n": 1, "run": "ab\n', "whole": '{"n": 1, "ru\n{"n": 2, "run": "beef"}\n'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tracking.jsonl").write_text(journal)
        (tmp_path / name / "config.yaml").touch()
    assert run_folder.find_run("beef", tmp_path, "resume") == tmp_path / "whole"
    assert run_folder.run_id(tmp_path / "torn") is None and run_folder.run_id(tmp_path) is None


def test_a_run_that_diverges_fails_with_6_and_keeps_its_last_good_checkpoint(start, outputs):
    # The weights overflow within a few steps.
    command = start("scheduler.max_lr=1e30", "scheduler.div_factor=1", "optimizer.weight_decay=0")
    assert command.ends() == 6, command.output
    folder = only_run(outputs)
    _, run = tracked(folder)
    assert run.info.status == "FAILED"
    note = run.data.tags["mlflow.note.content"]
    assert "step" in note and "LR 1e+30" in note and "Lower scheduler.max_lr" in note
    state = checkpoint.load(folder)
    assert all(torch.isfinite(weights).all() for weights in state["model"].values())
    assert len(command.output.split("The loss is not")[1].splitlines()) <= 3


def test_a_disk_full_from_the_start_ends_with_5_and_leaves_no_run(start, outputs):
    command = start(fault=full_disk_at_the_start)
    assert command.ends() == 5, command.output
    [message] = [line for line in command.output.splitlines() if "cannot be written" in line]
    assert str(outputs / "runs") in message and "No space left" in message
    assert not list(outputs.glob("runs/*/config.yaml")) and "Traceback" not in command.output


def test_a_full_disk_under_a_checkpoint_keeps_the_old_one_and_ends_with_5(start, outputs):
    command = start(fault=full_disk_for_checkpoint, fault_arguments=(3,))
    assert command.ends() == 5, command.output
    folder = only_run(outputs)
    assert checkpoint.load(folder)["progress"]["epoch"] == 2
    assert "The disk is full: a checkpoint needs" in command.output
    assert tracked(folder)[1].info.status == "FAILED"
    assert os.listdir(folder / "checkpoints").count(".last.pt.tmp") == 0
