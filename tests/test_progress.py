"""What a terminal of 80 columns, a pipe and a notebook show of a training."""

import dataclasses
import io
import itertools
import logging
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from resnet_cifar.console import setting, shown
from resnet_cifar.delivery import Journal
from resnet_cifar.loop import EpochRecord, Progress, StepRecord
from resnet_cifar.progress import ProgressDisplay, where_to_look
from resnet_cifar.tracked_run import Run, TrackedRun
from resnet_cifar.tracking import Store


class Terminal(io.StringIO):
    def isatty(self):
        return True


def an_epoch(epoch, **changed):
    values = {"lr": 0.00819, "train_loss": 0.738, "train_accuracy": 73.844, "eval_loss": 0.7, "eval_accuracy": 75.1}
    return EpochRecord(epoch, **{**values, **changed}, images_per_second=260.0, epoch_seconds=188.4)


def steps(display, count):
    """Show one epoch up to its step `count`, every image classified correctly."""
    for step in range(1 if display.bar is None else 2, count + 1):
        correct = min(step * display.batch_size, display.num_images)
        display.step(StepRecord(1, step, 0.01, torch.tensor(0.5)), Progress(batch=step, correct=correct))


def terminal(monkeypatch):
    """Called in the test itself, since pytest sets stderr anew after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_the_lines_of_all_epochs_are_columns_and_have_room_in_a_terminal(caplog):
    caplog.set_level(logging.INFO)
    display = ProgressDisplay(24, 50_000, 512, "test", costs=None)
    display.epoch(an_epoch(3))
    display.epoch(an_epoch(24, train_loss=23.4, train_accuracy=100.0, eval_accuracy=9.0))
    first, last = caplog.messages
    assert first == "epoch  3/24  lr 0.008190  train  0.738  73.84%  test  0.700  75.10%  188 s"
    assert len(first) == len(last) <= 80


def test_the_seconds_of_a_short_epoch_have_a_decimal(caplog):
    caplog.set_level(logging.INFO)
    display = ProgressDisplay(24, 50_000, 512, "test", costs=None)
    display.epoch(dataclasses.replace(an_epoch(3), epoch_seconds=0.46))
    display.epoch(dataclasses.replace(an_epoch(4), epoch_seconds=9.96))
    assert [line.rpartition("%")[2] for line in caplog.messages] == ["  0.5 s", "   10 s"]


def test_a_terminal_has_a_bar_with_the_accuracy_on_the_images_so_far(monkeypatch):
    screen = terminal(monkeypatch)
    display = ProgressDisplay(24, 300, 64, "test", costs=None)
    with display:
        steps(display, 1)
        display.bar.mininterval = 0  # drawn at every step from here on
        steps(display, 5)
        *_, bar = [text for text in screen.getvalue().split("\r") if text.strip()]
        assert bar.startswith("epoch  1/24 ")
        assert bar.endswith("lr 0.010000, loss 0.500, 100.0%")
        assert len(bar) <= 80
    assert screen.getvalue().split("\r")[-2].strip() == ""  # taken away in the end


def test_a_line_that_comes_while_a_bar_is_drawn_has_a_row_of_its_own(monkeypatch):
    screen = terminal(monkeypatch)
    root, handler = logging.getLogger(), logging.StreamHandler(screen)
    root.addHandler(handler)
    try:
        display = ProgressDisplay(24, 300, 64, "test", costs=None)
        with display:
            steps(display, 2)
            logging.getLogger("resnet_cifar").warning("the store is down")
    finally:
        root.removeHandler(handler)
    before, _, after = screen.getvalue().partition("the store is down")
    assert before.endswith("\r") and after.startswith("\n")


def test_a_pipe_has_no_bar(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with ProgressDisplay(24, 300, 64, "test", costs=None) as display:
        steps(display, 5)
    assert pipe.getvalue() == ""


def test_a_notebook_whose_streams_are_no_terminals_has_a_bar_among_the_lines(monkeypatch):
    output = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stdout", output)
    with ProgressDisplay(24, 300, 64, "test", costs=None) as display:
        steps(display, 5)
    assert "epoch  1/24" in output.getvalue()


@pytest.mark.parametrize(("epochs", "quickstart"), [(2, False), (1000, True)])
def test_a_cpu_says_once_when_it_will_be_done_and_names_the_quickstart_if_that_is_far(
    caplog, monkeypatch, epochs, quickstart
):
    caplog.set_level(logging.INFO)
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    with ProgressDisplay(epochs, 3000, 64, "test", costs=epochs * [1.0]) as display:
        steps(display, 40)
    [said] = caplog.messages
    assert said.startswith("Training takes about")
    assert ("experiment=quickstart" in said) == quickstart
    assert max(map(len, said.splitlines())) <= 80


def test_a_training_resumed_early_in_an_epoch_says_once_when_it_will_be_done(caplog):
    caplog.set_level(logging.INFO)
    with ProgressDisplay(3, 20 * 64, 64, "test", costs=[1.0] * 3) as display:
        for epoch, first in ((1, 3), (2, 1)):
            for step in range(first, 21):
                progress = Progress(epoch=epoch, batch=step, correct=step)
                display.step(StepRecord(epoch, step, 0.01, torch.tensor(0.5)), progress)
            display.epoch(an_epoch(epoch))
    assert sum("Training takes about" in line for line in caplog.messages) == 1


def test_the_estimate_knows_that_later_epochs_cost_more(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    display = ProgressDisplay(2, 20 * 64, 64, "test", costs=[0.25, 1.0])
    steps(display, 1)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)  # ten steps later
    steps(display, 12)
    display.close()
    # 9 more of this epoch at 10 s, then 20 at four times as much: 890 s.
    assert caplog.messages[0].startswith("Training takes about 15 min more")


def test_the_estimate_of_a_resumed_training_is_not_of_the_rest_of_an_epoch_and_its_evaluation(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    display = ProgressDisplay(2, 20 * 64, 64, "test", costs=[1.0, 1.0])
    display.step(StepRecord(1, 20, 0.01, torch.tensor(0.5)), Progress(batch=20, correct=20 * 64))
    monkeypatch.setattr(time, "monotonic", lambda: 10_000.0)  # the evaluation
    display.epoch(an_epoch(1))
    steps(display, 1)
    monkeypatch.setattr(time, "monotonic", lambda: 10_100.0)
    steps(display, 12)
    display.close()
    # 29 of two epochs' 40 steps at 10 s, from the 11 that followed.
    assert caplog.messages[1].startswith("Training takes about 5 min more")


def run_in(database):
    return TrackedRun(Store(f"sqlite:///{database}"), Journal(database.parent), 32 * "a", "1", {}, {})


def test_the_end_says_where_to_look_relative_to_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "runs" / "2026-11-22_19-59-02_932890"
    folder.mkdir(parents=True)
    lines = where_to_look("train", folder, run_in(tmp_path / "outputs" / "mlflow.db")).splitlines()
    assert "folder   outputs/runs/2026-11-22_19-59-02_932890" in lines
    assert "MLflow   mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db" in lines
    assert lines[-1].strip() == "checkpoint=outputs/runs/2026-11-22_19-59-02_932890"
    [link] = [line for line in lines if "http" in line]
    assert f"#/experiments/1/runs/{32 * 'a'}?workflowType=machine_learning" in link
    assert max(len(line) for line in lines if line != link) <= 80


def test_a_run_that_is_not_tracked_has_no_link_and_one_that_trained_nothing_no_next_command(tmp_path):
    lines = where_to_look("evaluate", tmp_path, Run(tmp_path, {}, {})).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["folder", "figures"]


@pytest.mark.parametrize(
    ("key", "name", "typed"),
    [
        ("checkpoint", "run", "checkpoint=run"),
        ("checkpoint", "my run", "'checkpoint=my run'"),
        ("checkpoint", "Ü", "\"checkpoint='Ü'\""),
        ("resume", "Ü", "resume=Ü"),
        ("resume", "my run", "'resume=my run'"),
    ],
)
def test_a_path_is_shown_as_shell_and_hydra_take_it(monkeypatch, tmp_path, key, name, typed):
    monkeypatch.chdir(tmp_path)
    assert shlex.split(setting(key, tmp_path / name)) == shlex.split(typed)


def test_a_folder_elsewhere_is_shown_whole(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shown(Path("/elsewhere/run")) == Path("/elsewhere/run")
