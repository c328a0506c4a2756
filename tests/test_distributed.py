"""Several processes: the same batches and gradients as one, and runs that start, stop and fail as one."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import second_process_fails
from test_resume import assert_equal_states, only_run, table, tracked
from torch import nn

from resnet_cifar import checkpoint, parts
from resnet_cifar.augment import Augmentation, Cutout, Normalise, RandomCrop, RandomHorizontalFlip
from resnet_cifar.data import Images, training_batches
from resnet_cifar.distributed import ALONE, World
from resnet_cifar.errors import ConfigError
from resnet_cifar.loop import EpochRecord, StepRecord, Training, fit
from resnet_cifar.process_identity import _started
from resnet_cifar.training_processes import launch

BATCH = 5
NORMALISE = Normalise([0.5] * 3, [0.25] * 3)
AUGMENT = Augmentation([RandomCrop(32, 4), RandomHorizontalFlip(), Cutout(8, [0.5] * 3)], NORMALISE)
# Four epochs of 15 steps, each with a checkpoint: time for a signal between two of them.
RUN = (
    *("data=digits", "data.train_size=120", "data.test_size=41", "data.batch_size=8", "model.width=0.125"),
    *("trainer.epochs=4", "trainer.precision=fp32", "scheduler.max_lr=0.01", "explain.num_images=1"),
    *("trainer.devices=2", "trainer.checkpoint_minutes=1e-9"),
)
STEPS = 60


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that stays in evaluation mode: with statistics of the batch, the processes would have their own."""

    def train(self, mode=True):
        return super().train(False)


def eleven_images():
    """Batches of 5, 5 and 1: shares of 3 and 2, and at the end of 1 and none."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(11) % 3, ("a", "b", "c"))


def batches(world):
    return list(training_batches(eleven_images(), AUGMENT, BATCH, seed=0, epoch=1, world=world))


def trained(world):
    """The gradients of each step, its loss, what a random layer would draw in it, and each epoch's record."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3))
    training = Training(
        world.replicate(network),
        torch.optim.SGD(network.parameters(), lr=0.001),
        *(AUGMENT, 2, BATCH),
        world=world,
    )
    gradients, losses, epochs, draws = [], [], [], []
    for record in fit(training, eleven_images(), eleven_images()[:7]):
        if isinstance(record, StepRecord):
            gradients.append([weights.grad.clone() for weights in network.parameters()])
            losses.append(record.loss.item())
            draws.append(torch.rand(1).item())  # as dropout would
        elif isinstance(record, EpochRecord):
            epochs.append([record.train_loss, record.train_accuracy, record.eval_loss, record.eval_accuracy])
    return {"gradients": gradients, "losses": losses, "epochs": epochs, "draws": draws}


def save_batches_and_training(world, folder):
    torch.save({"batches": batches(world), **trained(world)}, Path(folder) / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes got and computed."""
    folder = tmp_path_factory.mktemp("two")
    launch(2, "cpu", {"version": 1}, save_batches_and_training, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 5, 12, 512])
def test_shares_are_all_of_a_batch_and_weigh_as_much_as_they_hold(size, count):
    worlds = [World(rank, size) for rank in range(size)]
    assert [place for world in worlds for place in world.share(count)] == list(range(count))
    sizes = [len(world.share(count)) for world in worlds]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)
    assert [world.weight(count) * count / size for world in worlds] == pytest.approx(sizes)


def test_the_shares_of_a_batch_are_the_batch_that_one_process_has(of_two):
    for place, (images, labels) in enumerate(batches(ALONE)):
        shares = [process["batches"][place] for process in of_two]
        if len(labels) == 1:
            shares = shares[:1]  # the other process has the same image, with weight 0
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)


def test_dropout_draws_other_masks_in_each_step_and_process(of_two):
    draws = [draw for process in of_two for draw in process["draws"]]
    assert len(set(draws)) == len(draws) == 12
    assert of_two[0]["draws"] == trained(ALONE)["draws"]


def test_gradients_are_the_means_over_the_whole_batch(of_two):
    alone = trained(ALONE)["gradients"]
    assert len(alone) == 6  # three batches an epoch, the last of one image
    for process in of_two:
        for ours, theirs in zip(process["gradients"], alone, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (one - other).abs().max() < 1e-6


def test_records_are_of_the_whole_batch_and_of_all_held_out_images(of_two):
    alone = trained(ALONE)
    for process in of_two:
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for ours, theirs in zip(process["epochs"], alone["epochs"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


# Whole runs


@pytest.fixture
def start(commands, outputs, tmp_path):
    """Start a run of two processes in `outputs`."""

    def run(*arguments, **fault):
        if not any(argument.startswith("resume=") for argument in arguments):
            arguments = (*RUN, *arguments, f"output_dir={outputs}")
        return commands(*arguments, printed=tmp_path / f"printed_{time.monotonic_ns()}", daemon=False, **fault)

    return run


@pytest.fixture(scope="module")
def uninterrupted(commands, empty_database, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(empty_database, outputs / "mlflow.db")
    command = commands(*RUN, f"output_dir={outputs}", printed=outputs / "printed", daemon=False)
    assert command.ends() == 0, command.output
    return only_run(outputs), command.output


def processes_of(command):
    """The process ids of the processes that a command has started, and their children."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {command.process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {command.process.pid}


def in_the_midst(command, outputs):
    """Wait until a few steps are done; returns the run's folder and the processes at work."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and command.process.is_alive():
        tables = list((outputs / "runs").glob("*/lr_history.csv"))
        if tables and len(table(tables[0])) >= 3:
            processes = processes_of(command)
            assert len(processes) >= 2
            return tables[0].parent, processes
        time.sleep(0.01)
    raise AssertionError(command.output)


def alive(pids):
    return [pid for pid in pids if _started(pid)]


def test_two_processes_leave_one_run_and_one_set_of_files(uninterrupted):
    folder, output = uninterrupted
    client, run = tracked(folder)  # exactly one
    assert run.info.status == "FINISHED" and run.data.params["trainer.devices"] == "2"
    for key in ("train/loss", "train/accuracy", "test/loss", "test/accuracy", "schedule/lr", "speed/epoch_seconds"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, key)] == [1, 2, 3, 4], key
    assert [row["epoch"] for row in table(folder / "history.csv")] == ["1", "2", "3", "4"]
    assert [row["step"] for row in table(folder / "lr_history.csv")] == [str(step) for step in range(1, STEPS + 1)]
    assert len(table(folder / "predictions.csv")) == 41
    assert len(list((folder / "figures").glob("*.png"))) >= 8 and (folder / "model").is_dir()
    assert output.count("epoch 1/4") == output.count("Run folder") == output.count("Test accuracy") == 1


def test_a_signal_stops_all_processes_with_a_checkpoint_and_the_run_goes_on_as_if_never_stopped(
    start, outputs, uninterrupted
):
    stopped = start("tracking=none")
    folder, processes = in_the_midst(stopped, outputs)
    for process in (stopped.process.pid, *processes):  # as a cluster's scheduler does
        os.kill(process, signal.SIGTERM)
    assert stopped.ends() == 143, stopped.output
    assert not alive(processes) and "Traceback" not in stopped.output
    assert (folder / "status.txt").read_text().startswith("KILLED")
    progress = checkpoint.load(folder)["progress"]
    done = (progress["epoch"] - 1) * 15 + progress["batch"]
    assert 3 <= done < STEPS and len(table(folder / "lr_history.csv")) == done

    resumed = start(f"resume={folder}")
    assert resumed.ends() == 0, resumed.output
    assert_equal_states(checkpoint.load(folder), checkpoint.load(uninterrupted[0]))
    for name in ("history.csv", "lr_history.csv", "predictions.csv"):
        assert table(folder / name) == table(uninterrupted[0] / name), name


def test_a_run_that_diverges_ends_with_6_in_three_lines(start, outputs):
    command = start("tracking=none", "scheduler.max_lr=1e30", "scheduler.div_factor=1", "optimizer.weight_decay=0")
    assert command.ends() == 6, command.output
    assert (only_run(outputs) / "status.txt").read_text().startswith("FAILED")
    message = command.output[command.output.index("The loss is not a finite number") :]
    assert len(message.splitlines()) <= 3 and "Traceback" not in command.output


def test_a_killed_process_ends_the_whole_run_as_failed(start, outputs):
    command = start("trainer.epochs=1000")
    folder, processes = in_the_midst(command, outputs)
    _, run = tracked(folder)
    os.kill(int(run.data.tags["process.pid"]), signal.SIGKILL)  # the one that records the run
    assert command.ends() == 1, command.output
    assert "ended with SIGKILL" in command.output and "Traceback" not in command.output
    assert not alive(processes)
    _, run = tracked(folder)
    assert run.info.status == "FAILED" and "SIGKILL" in run.data.tags["mlflow.note.content"]


def test_the_death_of_a_process_fails_an_untracked_run_too(start, outputs):
    command = start("tracking=none", "trainer.epochs=1000")
    folder, processes = in_the_midst(command, outputs)
    workers = [pid for pid in processes if b"multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(min(workers), signal.SIGKILL)  # the first to be started, which writes the run's files
    assert command.ends() == 1, command.output
    assert (folder / "status.txt").read_text().startswith("FAILED") and not alive(processes)


def test_the_run_says_why_the_process_failed_that_failed_first(start, outputs):
    command = start(fault=second_process_fails, fault_arguments=("cosmic ray " * 9000,))
    assert command.ends() == 1, command.output
    folder = only_run(outputs)
    assert (folder / "status.txt").read_text().startswith("FAILED\nRuntimeError: RuntimeError: cosmic ray")
    assert "cosmic ray" in tracked(folder)[1].data.tags["mlflow.note.content"]
    assert "cosmic ray" in command.output and "no_batches" in (folder / "run.log").read_text()


def test_no_process_outlives_the_one_that_started_it(start, outputs):
    command = start("tracking=none", "trainer.epochs=1000")
    _, processes = in_the_midst(command, outputs)
    command.process.kill()
    deadline = time.monotonic() + 60
    while alive(processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# What is refused


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ConfigError, match="there are"):
        parts.check_devices(torch.device("cuda"), torch.cuda.device_count() + 1)
    parts.check_devices(torch.device("cpu"), 64)
