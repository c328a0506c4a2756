"""A whole run in small, once, and what it leaves, read back through MLflow's own API; then the other tasks on it."""

import csv
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image
from processes import (
    STEPS,
    Commands,
    compiles_nothing,
    disk_full_for_a_while,
    failing_figures,
    fails_with_a_token,
    interrupted_at_grad_cam,
    terminated_again_at_the_end,
    terminated_at_grad_cam,
    terminated_at_the_curves,
    tiny,
)
from readme import code_block

from resnet_cifar import checkpoint, experiment, parts, provenance, report, schema, tracked_run, tracking
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.custom_resnet import CustomResNet
from resnet_cifar.distributed import ALONE
from resnet_cifar.errors import CheckpointError, ConfigError
from resnet_cifar.evaluation import with_checkpoint
from resnet_cifar.hydra_setup import set_by_presets, started_hydra
from resnet_cifar.loop import EpochRecord, Progress
from resnet_cifar.recording import Invocation, compared_params, run_name
from resnet_cifar.tables import read_csv

FIGURES = {
    *("sample_training_images", "misclassified_images", "loss_and_accuracy", "lr_finder", "lr_history"),
    *(
        "grad_cam_correct_layer_2",
        "grad_cam_correct_layer_3",
        "grad_cam_predicted_layer_2",
        "grad_cam_predicted_layer_3",
    ),
    "confusion_matrix",
}
FILES = {
    *("config.yaml", "model_summary.txt", "run.log", "history.csv", "lr_history.csv", "lr_finder.csv"),
    *("predictions.csv", "checkpoints/last.pt", *(f"figures/{name}.png" for name in FIGURES)),
}
EPOCH_METRICS = {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "schedule/lr"}
SPEED = {"speed/images_per_second", "speed/epoch_seconds"}
CANARY = "canary-7f3a9c"


class Run:
    """A finished command, its folder, and its run in MLflow."""

    def __init__(self, outputs: Path, command) -> None:
        self.code, self.output, self.outputs = command.ends(), command.output, outputs
        folders = sorted((outputs / "runs").iterdir(), key=lambda folder: (folder / "run.log").stat().st_mtime)
        self.folder = folders[-1]
        self.uri = f"sqlite:///{outputs / 'mlflow.db'}"
        self.client = tracking.Store(self.uri).client
        experiment = self.client.get_experiment_by_name("resnet-cifar")
        runs = self.client.search_runs([experiment.experiment_id]) if experiment else []
        self.tracked = max(runs, key=lambda run: run.info.start_time, default=None)

    def history(self, key):
        return [(point.step, point.value) for point in self.client.get_metric_history(self.tracked.info.run_id, key)]

    def artifacts(self, folder=None):
        files = self.client.list_artifacts(self.tracked.info.run_id, folder)
        return {path for file in files for path in (self.artifacts(file.path) if file.is_dir else {file.path})}

    def table(self, name):
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def start(commands: Commands, empty_database, tmp_path_factory):
    """Run a tiny command to its end in an output folder of its own, or in that of an earlier run."""

    def run(*arguments, base=None, fault=None, **environment):
        outputs = base.outputs if base else tmp_path_factory.mktemp("run") / "outputs"
        if base is None:
            outputs.mkdir()
            (outputs / "mlflow.db").write_bytes(empty_database.read_bytes())
        given = tiny(*arguments) if base is None else arguments
        printed = tmp_path_factory.mktemp("printed") / "output"
        arguments = (*given, f"output_dir={outputs}")
        return Run(outputs, commands(*arguments, printed=printed, fault=fault, environment=environment))

    return run


@pytest.fixture(scope="module")
def trained(start):
    secrets = {"CANARY": CANARY, "MLFLOW_TRACKING_PASSWORD": CANARY + "-password"}
    elsewhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # which is not read by itself
    given = ("tracking.run_name='first ${oc.env:CANARY}'", "seed=0", "data.root='${oc.env:CANARY}'")
    run = start(*given, **secrets, **elsewhere)
    assert run.code == 0, run.output
    return run


# What a run leaves


def test_it_is_finished_and_nothing_went_wrong(trained):
    assert trained.tracked.info.status == "FINISHED"
    warnings = [line for line in (trained.folder / "run.log").read_text().splitlines() if " WARNING " in line]
    assert [
        line for line in warnings if "end of the range" not in line
    ] == []  # of four iterations, the last may be best
    assert (trained.folder / "status.txt").read_text().strip() == "FINISHED"


def test_every_epoch_has_its_metrics_at_its_step(trained):
    assert set(trained.tracked.data.metrics) == {*EPOCH_METRICS, *SPEED, "lr_finder/loss", "lr_finder/lr"}
    for key in EPOCH_METRICS | SPEED:
        assert [step for step, _ in trained.history(key)] == [1, 2], key


def test_the_finders_curve_is_there_by_iteration(trained):
    for key in ("lr_finder/loss", "lr_finder/lr"):
        assert [step for step, _ in trained.history(key)] == [1, 2, 3, 4]
    lrs = [lr for _, lr in trained.history("lr_finder/lr")]
    assert lrs[0] == 0.001 and lrs[-1] == pytest.approx(0.1)


def test_a_name_is_no_longer_than_a_database_takes():
    cfg = compose(parse_arguments(["tracking.run_name=" + 300 * "n"])).jobs[0][0]
    for invocation in (Invocation(Path(), (), {}), Invocation(Path(), (), {}, name=300 * "s")):
        assert len(run_name(cfg, invocation)) == 250


def test_a_name_ends_with_a_whole_setting():
    cfg = compose(parse_arguments([])).jobs[0][0]
    settings = tuple(f"trainer.epochs={number}" for number in range(100, 110))
    assert run_name(cfg, Invocation(Path(), settings, {})).endswith("trainer.epochs=104 ...")
    long = f"augmentation.transforms=[{120 * 'x'}]"
    assert run_name(cfg, Invocation(Path(), (long, "seed=1"), {})) == "session_10 seed=1 ..."


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("optimizer.betas=[0.9,0.95]", {"optimizer.betas": [0.9, 0.95]}),
        ("augmentation.transforms=[]", {"augmentation.transforms": []}),
    ],
)
def test_a_list_that_is_given_is_a_parameter(given, param):
    [(cfg, _)] = compose(parse_arguments([f"+{given}" if "betas" in given else given])).jobs
    choices = {"augmentation": "crop_flip_cutout", "optimizer": "adam"}
    params = compared_params(cfg, Invocation(Path(), (given,), choices))
    assert param.items() <= params.items()
    assert ("augmentation" in params) == ("augmentation.transforms" not in params)


@pytest.mark.parametrize(
    ("given", "name"),
    [((), "session_10"), (("task=find_lr",), "find_lr"), (("task=find_lr", "experiment=record"), "record find_lr")],
)
def test_a_run_is_named_by_its_preset_and_what_it_does(given, name):
    cfg = compose(parse_arguments(list(given))).jobs[0][0]
    preset = dict(override.split("=") for override in given).get("experiment")
    assert run_name(cfg, Invocation(Path(), given, {"experiment": preset})) == name


def test_what_runs_are_compared_by_comes_first_on_mlflows_pages(trained):
    assert next(iter(trained.tracked.data.metrics)) == "test/accuracy"
    cfg = compose(parse_arguments(["model.width=0.5", "scheduler.div_factor=25"])).jobs[0][0]
    given = ("model.width=0.5", "scheduler.div_factor=25")
    params = compared_params(cfg, Invocation(Path(), given, {"data": "cifar10"}, varied=("scheduler.div_factor",)))
    assert list(params)[:3] == ["scheduler.div_factor", "model.width", "data"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((), {"optimizer": "adam"}),
        (("optimizer={_target_: torch.optim.SGD, lr: 0.1}",), {"optimizer._target_": "torch.optim.SGD"}),
        (("optimizer=sgd", "optimizer.momentum=0.5"), {"optimizer": "sgd", "optimizer.momentum": 0.5}),
        (("model=mine",), {"model": "mine", "optimizer": "adam"}),
    ],
)
def test_a_part_that_is_not_the_usual_one_is_compared_too(given, shown):
    choices = {"model": "custom_resnet", "optimizer": "adam"} | dict(
        override.split("=") for override in given if "." not in override
    )
    cfg = compose(parse_arguments([override for override in given if override != "model=mine"])).jobs[0][0]
    params = compared_params(cfg, Invocation(Path(), given, choices))
    assert shown.items() <= params.items()
    assert ("model" in params, "optimizer" in params) == ("model" in shown, "optimizer" in shown)


@pytest.mark.parametrize("entry", ["/model/mine", "mine", "/experiment/mine@_global_", "override /optimizer: sgd"])
def test_the_keys_of_a_preset_end_where_it_names_itself(tmp_path, entry):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"defaults:\n  - {entry}\ntrainer: {{epochs: 3}}\n")
    sources = [{"schema": "file", "path": str(tmp_path)}]
    runtime = OmegaConf.create({"choices": {"experiment": "mine"}, "config_sources": sources})
    assert set_by_presets(runtime, ()) == ("trainer", "trainer.epochs")


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        (
            "record",
            {"trainer.label_smoothing": 0.1, "trainer.ema_decay": 0.99, "param_groups.decay_norm_and_bias": False},
        ),
        ("laptop_94", {"trainer.label_smoothing": 0.1, "model.logit_scale": 0.125, "trainer.epochs": 16}),
        ("[laptop,record]", {"model.width": 0.5, "trainer.flip_tta": True}),
    ],
)
def test_what_a_preset_sets_is_compared(chosen, shown):
    given = [f"experiment={chosen}"]
    with started_hydra(parse_arguments(given)) as hydra:
        runtime = hydra.compose_config("config", given, RunMode.RUN).hydra.runtime
    cfg = compose(parse_arguments(given)).jobs[0][0]
    params = compared_params(cfg, Invocation(Path(), given, {}, preset=set_by_presets(runtime, given)))
    assert shown.items() <= params.items()


def test_metrics_and_tables_agree(trained):
    rows = trained.table("history.csv")
    for key, column in {"train/loss": "train_loss", "test/accuracy": "eval_accuracy", "schedule/lr": "lr"}.items():
        assert [value for _, value in trained.history(key)] == [float(row[column]) for row in rows]
    steps = trained.table("lr_history.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 2 * STEPS + 1))
    assert [float(row["lr"]) for row in (steps[STEPS - 1], steps[-1])] == [float(row["lr"]) for row in rows]
    assert min(float(row["lr"]) for row in steps) > 0


def test_the_parameters_are_the_ones_people_compare(trained):
    params = trained.tracked.data.params
    assert 10 <= len(params) <= 15
    assert {
        "seed": "0",
        "data": "digits",
        "optimizer": "adam",
        "trainer.epochs": "2",
        "model.width": "0.125",
    }.items() <= (params.items())


def test_the_folder_says_what_mlflow_says(trained):
    said = json.loads((trained.folder / "run.json").read_text())
    assert said["params"] == trained.tracked.data.params
    assert said["tags"].items() <= trained.tracked.data.tags.items() and "git_commit" in said["tags"]
    finder = {"lr_finder/loss", "lr_finder/lr"}
    assert said["metrics"] == {key: value for key, value in trained.tracked.data.metrics.items() if key not in finder}


def test_the_peak_is_the_one_that_was_found_and_used(trained):
    peak = float(trained.tracked.data.params["scheduler.max_lr"])
    finder = trained.table("lr_finder.csv")
    assert peak == float(min(finder, key=lambda row: float(row["loss"]))["lr"])
    assert checkpoint.load(trained.folder)["max_lr"] == peak
    assert trained.tracked.data.tags["max_lr_source"] == "find"


def test_the_tags_say_where_the_numbers_come_from(trained):
    tags = trained.tracked.data.tags
    assert {"overrides", "torch", "torchvision", "python", "cuda", "device", "threads", "precision", "task"} <= set(
        tags
    )
    assert (tags["device"], tags["precision"], tags["threads"]) == (parts.choose_device("auto").type, "fp32", "1")
    assert "trainer.epochs=2" in tags["overrides"]
    assert tags["torch"] == str(torch.__version__)
    assert re.search(r"Test accuracy [\d.]+%", tags["mlflow.note.content"])


@pytest.mark.parametrize(("capable_of", "said"), [((), ""), (("avx2", "avx512_f"), " (avx512_f)")])
def test_a_processor_is_told_by_its_best_instructions(monkeypatch, capable_of, said):
    known = {"cpu_name": "AMD EPYC", "avx2": False, **dict.fromkeys(capable_of, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert provenance.device_name(torch.device("cpu")) == f"AMD EPYC{said}"


def test_every_artifact_is_in_the_store_and_in_the_folder(trained):
    assert trained.artifacts() >= FILES
    root = Path(trained.tracked.info.artifact_uri.removeprefix("file://"))
    for name in FILES:
        assert (trained.folder / name).samefile(root / name), name  # hard links: no second copy on the disk


def test_every_figure_is_a_picture_with_something_on_it(trained):
    for name in FIGURES:
        with Image.open(trained.folder / "figures" / f"{name}.png") as picture:
            assert min(picture.size) >= 300 and np.asarray(picture.convert("L")).std() > 5, name


def test_the_saved_configuration_is_resolved_and_valid(trained, monkeypatch):
    saved = OmegaConf.load(trained.folder / "config.yaml")
    assert saved.output_dir == str(trained.outputs) and saved.tracking.uri == trained.uri
    assert "${outputs" not in (trained.folder / "config.yaml").read_text()
    monkeypatch.setenv("CANARY", CANARY)
    schema.check(saved)


def test_predictions_have_a_row_for_each_test_image(trained):
    rows = trained.table("predictions.csv")
    assert [int(row["index"]) for row in rows] == list(range(40))
    correct = sum(row["label"] == row["prediction"] for row in rows)
    assert 100 * correct / 40 == pytest.approx(trained.history("test/accuracy")[-1][1])
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)


def test_saving_takes_a_twentieth_of_the_time_at_most_and_the_last_epoch_is_saved(tmp_path, monkeypatch):
    now, saved, progress = 0.0, [], Progress()
    monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=lambda: now))

    def epochs_of_8_seconds():
        nonlocal now
        for epoch in range(1, 9):
            now += 8
            progress.epoch = epoch + 1
            yield EpochRecord(epoch, *[0.0] * 7)

    def save():
        nonlocal now
        now += 1
        saved.append(progress.epoch - 1)

    class Tracked(tracked_run.Run):
        def log_metrics(self, metrics, step):
            logged.append((step, len(saved)))

    logged, tracked = [], Tracked(tmp_path, {}, {})
    display = SimpleNamespace(epochs=8, evaluated_on="test", epoch=lambda record: None)
    stop = SimpleNamespace(signal_number=0)
    experiment.follow(epochs_of_8_seconds(), tmp_path, tracked, display, progress, save, 5, stop, ALONE)
    assert saved == [1, 4, 7, 8]  # 24 s apart: two epochs, of 16 s, would be too soon
    assert [row["epoch"] for row in read_csv(tmp_path / "history.csv")] == list(range(1, 9))
    # Just before the checkpoint that holds them: a resumed run does not repeat what is logged.
    assert logged == [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2), (8, 3)]


def test_one_checkpoint_is_left(trained):
    assert [path.name for path in (trained.folder / "checkpoints").iterdir()] == ["last.pt"]


def test_the_logged_model_predicts_what_the_run_predicted(trained):
    from resnet_cifar.data import Digits

    mlflow.set_tracking_uri(trained.uri)
    model = mlflow.pyfunc.load_model(f"runs:/{trained.tracked.info.run_id}/model")
    pictures = Digits(train=False).data[:40]
    for size in (1, 3, 40):
        predicted = np.asarray(model.predict(np.ascontiguousarray(pictures[:size]))).argmax(1)
        assert [str(digit) for digit in predicted] == [row["prediction"] for row in trained.table("predictions.csv")][
            :size
        ]


def test_the_summary_leaves_the_network_where_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # torchinfo would move it to that GPU
    assert "Total params" in report.model_summary(CustomResNet(width=0.125), (3, 32, 32))


def test_the_summary_of_the_model_is_a_table(trained):
    assert "Total params" in (trained.folder / "model_summary.txt").read_text()


def test_no_secret_is_in_anything_a_run_writes(trained):
    searched = [path for path in trained.outputs.rglob("*") if path.is_file()]
    assert {".hydra", "checkpoints", "model"} <= {path.parent.name for path in searched}
    assert [path for path in searched if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in trained.output
    assert CANARY not in str(trained.tracked.data) + str(trained.tracked.info)
    assert "${oc.env:CANARY}" in (trained.folder / "config.yaml").read_text()
    assert checkpoint.load(trained.folder)["config"]["data"]["root"] == "${oc.env:CANARY}"


def test_no_secret_of_an_error_is_in_anything_a_run_writes(start):
    run = start("scheduler.max_lr=0.01", fault=fails_with_a_token, HUB_TOKEN=CANARY)
    assert run.code == 1 and run.tracked.info.status == "FAILED"
    written = [path for path in run.outputs.rglob("*") if path.is_file()]
    assert {"status.txt", "run.log", "mlflow.db"} <= {path.name for path in written}
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in run.output
    for folder in (run.folder, run.outputs / "artifacts" / run.tracked.info.run_id / "artifacts"):
        assert (folder / "run.log").read_text().count("Traceback") == 1


@pytest.mark.parametrize(
    "override", ["seed=${oc.env:CANARY}", "tracking.uri=${oc.env:CANARY}", "data.root=${oc.env:NOT_SET_AT_ALL}"]
)
def test_no_secret_is_in_the_message_about_a_bad_value(commands, tmp_path, override):
    # The name says what it is: those are blotted out wherever they come up.
    override = override.replace("CANARY", "CANARY_TOKEN")
    command = commands(
        override, f"output_dir={tmp_path / 'o'}", printed=tmp_path / "p", environment={"CANARY_TOKEN": CANARY}
    )
    assert command.ends() == 2
    assert CANARY not in command.output and len(command.output.splitlines()) <= 3
    assert not (tmp_path / "o").exists()


def test_a_bad_value_of_the_environment_is_named_by_its_variable(commands, tmp_path):
    command = commands(
        *("seed=${oc.env:CANARY}", f"output_dir={tmp_path / 'o'}"),
        printed=tmp_path / "p",
        environment={"CANARY": CANARY},
    )
    assert command.ends() == 2
    assert CANARY not in command.output and "seed=${oc.env:CANARY} should be" in command.output


# The other tasks


def test_evaluate_gives_the_numbers_of_the_training(trained, start):
    again = start(
        "task=evaluate", f"checkpoint={trained.folder}", "trainer.precision=fp32", base=trained, CANARY="another"
    )
    assert again.code == 0, again.output
    assert again.table("predictions.csv") == trained.table("predictions.csv")
    assert again.history("test/accuracy") == [(2, trained.history("test/accuracy")[-1][1])]
    assert not {"optimizer", "seed", "trainer.epochs"} & set(again.tracked.data.params)  # those are the training's
    assert again.tracked.data.params["model.width"] == trained.tracked.data.params["model.width"]
    assert again.tracked.data.tags["task"] == "evaluate" and again.tracked.info.status == "FINISHED"
    assert {"figures/misclassified_images.png", "figures/confusion_matrix.png", "predictions.csv"} <= again.artifacts()


def test_explain_without_pictures_finds_a_run_by_its_id_and_reads_other_test_images(trained, start):
    arguments = (
        "task=explain",
        f"checkpoint={trained.tracked.info.run_id}",
        "data.test_size=20",
        "tracking=none",
        "trainer.precision=fp32",
    )
    again = start(*arguments, base=trained, CANARY="another")
    assert again.code == 0, again.output
    assert again.table("predictions.csv") == trained.table("predictions.csv")[:20]


def test_explain_draws_heat_maps_of_a_folder_of_pictures(trained, start, tmp_path):
    for name, shade in {"a.png": 30, "b.jpg": 200}.items():
        Image.new("RGB", (50, 40), (shade, 90, 120)).save(tmp_path / name)
    moved = shutil.copytree(trained.folder, tmp_path / "moved")
    arguments = ("task=explain", f"checkpoint={moved}", f"explain.images={tmp_path}")
    explained = start(*arguments, base=trained, CANARY="another")
    assert explained.code == 0, explained.output
    assert [row["picture"] for row in explained.table("predictions.csv")] == ["a.png", "b.jpg"]
    names = {"figures/grad_cam_predicted_layer_2.png", "figures/grad_cam_predicted_layer_3.png"}
    assert names <= explained.artifacts()


def test_the_readmes_lines_predict_a_picture_with_the_logged_model(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to(trained.outputs)
    Image.new("RGB", (50, 40), (200, 90, 120)).save("seven.png")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # and restored in the end: MLflow sets it
    try:
        exec(code_block("The model elsewhere").replace("<run id>", trained.tracked.info.run_id), {})
    finally:
        mlflow.set_tracking_uri(None)
    assert capsys.readouterr().out.strip() in map(str, range(10))


def evaluated(checkpoint_folder, *overrides):
    """The configuration of `task=evaluate` on a checkpoint."""
    arguments = parse_arguments(["task=evaluate", f"checkpoint={checkpoint_folder}", *overrides])
    return with_checkpoint(compose(arguments).jobs[0][0], overrides)[0]


def test_what_is_typed_wins_over_the_checkpoints_configuration(trained, monkeypatch):
    monkeypatch.setenv("CANARY", CANARY)
    cfg = evaluated(trained.folder, "explain.layers.layer_3=layer_1", "++data.test_size=30", "data.batch_size=20")
    assert cfg.explain.layers.layer_3 == "layer_1" and cfg.explain.layers.layer_2 == "layer_2"
    assert (cfg.data.test_size, cfg.data.batch_size, cfg.data.train_size, cfg.model.width) == (30, 20, 120, 0.125)


def test_what_is_taken_out_is_not_taken_from_the_checkpoint(trained, monkeypatch):
    monkeypatch.setenv("CANARY", CANARY)
    assert list(evaluated(trained.folder, "~explain.layers.layer_2").explain.layers) == ["layer_3"]


def test_the_images_are_where_was_typed_else_where_they_were_in_training(trained, tmp_path):
    state = checkpoint.load(trained.folder)
    data = compose(parse_arguments(["data.root=/training"])).jobs[0][0].data
    state["config"]["data"] = OmegaConf.to_container(data, resolve=True)
    checkpoint.save(state, tmp_path)
    assert evaluated(tmp_path).data.dataset.root == "/training"
    assert evaluated(tmp_path, "data.root=/here").data.dataset.root == "/here"
    assert evaluated(tmp_path, "data.dataset.root=/there").data.dataset.root == "/there"


def test_what_was_typed_and_does_not_go_with_the_checkpoint_is_no_fault_of_the_checkpoint(trained, monkeypatch):
    monkeypatch.setenv("CANARY", CANARY)
    with pytest.raises(ConfigError, match="flip_tta makes other signs of digits"):
        evaluated(trained.folder, "trainer.flip_tta=true")


def test_a_checkpoint_with_a_forged_configuration_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", CANARY)
    state = checkpoint.load(trained.folder)
    state["config"]["model"]["width"] = {"_target_": "torchvision.datasets.FakeData"}
    checkpoint.save(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be used: model\.width"):
        evaluated(tmp_path)


def test_find_lr_leaves_a_curve_and_no_checkpoint_and_what_the_store_has_not_got_is_sent_by_the_task_sync(start):
    found = start("task=find_lr")
    assert found.code == 0, found.output
    assert {"lr_finder.csv", "figures/lr_finder.png", "config.yaml", "run.log"} <= found.artifacts()
    assert float(found.tracked.data.params["scheduler.max_lr"]) > 0
    assert not (found.folder / "checkpoints").exists()
    (found.folder / "tracking.sent").unlink()
    synced = start("task=sync", base=found)
    assert synced.code == 0 and re.search(r"^[1-9]\d* records sent", synced.output, flags=re.MULTILINE), synced.output


def test_held_out_images_are_looked_at_each_epoch_and_the_test_once(start):
    run = start("data.val_size=30", "scheduler.max_lr=0.01", "explain.num_images=1")
    assert run.code == 0, run.output
    assert [step for step, _ in run.history("val/accuracy")] == [1, 2]
    assert [step for step, _ in run.history("test/accuracy")] == [2]
    assert run.tracked.data.tags["max_lr_source"] == "given"
    assert run.tracked.data.params["scheduler.max_lr"] == "0.01"
    assert "lr_finder/lr" not in run.tracked.data.metrics


def test_the_ingredients_of_more_accurate_trainings_work_together(start, cifar10):
    ingredients = (
        *("experiment=laptop_94", "augmentation.transforms.2.epochs=2", "data=cifar10", f"data.root={cifar10}"),
        *("trainer.ema_decay=0.5", "trainer.flip_tta=true", "param_groups.norm_bias_lr_factor=4"),
        *("trainer.compile=true", "explain.num_images=1"),
    )
    run = start(*ingredients, fault=compiles_nothing)
    assert run.code == 0, run.output
    [(step, accuracy)] = run.history("test/accuracy_flip_tta")
    assert step == 2 and 0 <= accuracy <= 100
    again = start(
        *("task=evaluate", f"checkpoint={run.folder}", "trainer.precision=fp32", "trainer.flip_tta=true"), base=run
    )
    # The averaged weights are those that were evaluated, kept, and are found again.
    assert again.table("predictions.csv") == run.table("predictions.csv")
    assert again.history("test/accuracy")[-1] == run.history("test/accuracy")[-1]
    assert again.history("test/accuracy_flip_tta") == [(2, accuracy)]


def test_the_same_command_gives_the_same_numbers_without_tracking_too(trained, start):
    again = start("seed=0", "tracking=none")
    assert again.code == 0, again.output
    assert again.tracked is None
    said, tracked = (json.loads((run.folder / "run.json").read_text()) for run in (again, trained))
    assert said["metrics"].keys() == tracked["metrics"].keys() and said["status"] == "FINISHED"
    assert said["metrics"]["test/accuracy"] == tracked["metrics"]["test/accuracy"]
    assert (again.folder / "lr_history.csv").read_text() == (trained.folder / "lr_history.csv").read_text()
    assert (again.folder / "predictions.csv").read_text() == (trained.folder / "predictions.csv").read_text()


# What goes wrong


@pytest.mark.parametrize("failing", ["figures", "grad_cam"])
def test_a_failing_figure_is_a_warning_and_the_run_is_finished(start, failing):
    run = start("scheduler.max_lr=0.01", "trainer.epochs=1", fault=failing_figures[failing])
    assert run.code == 0, run.output
    assert run.tracked.info.status == "FINISHED"
    assert "was not drawn" in (run.folder / "run.log").read_text()
    assert "Traceback" not in run.output


def test_a_full_disk_under_a_table_is_said_and_training_goes_on(start):
    run = start("scheduler.max_lr=0.01", fault=disk_full_for_a_while)
    assert run.code == 0, run.output
    for name in ("model_summary.txt", "lr_history.csv", "history.csv"):
        assert f"{name} was not written" in run.output
    assert len(run.table("lr_history.csv")) == 2 * STEPS and len(run.table("history.csv")) == 2
    assert run.tracked.info.status == "FINISHED"


def bad(commands, tmp_path, *arguments):
    command = commands(*arguments, f"output_dir={tmp_path / 'outputs'}", printed=tmp_path / "printed")
    code, output = command.ends(), command.output
    assert len(output.splitlines()) <= 3 and "Traceback" not in output, output
    assert not (tmp_path / "outputs" / "mlflow.db").exists()
    return code, output


def test_a_data_set_that_is_missing_ends_with_3_and_the_offline_command(commands, tmp_path):
    # Without a proxy of the user's, and with one that is not there, nothing can be downloaded.
    proxies = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    arguments = (f"data.root={tmp_path / 'empty'}", f"output_dir={tmp_path / 'outputs'}")
    command = commands(*arguments, printed=tmp_path / "printed", environment=proxies)
    assert command.ends() == 3, command.output
    assert "run offline: experiment=quickstart" in command.output and len(command.output.splitlines()) <= 3


def test_a_corrupt_data_set_ends_with_3(commands, tmp_path):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"not a batch")
    code, output = bad(commands, tmp_path, f"data.root={tmp_path / 'data'}", "data.dataset.download=false")
    assert code == 3 and "data.root=" in output


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("data=digits", "data.batch_size=5000"), 2, "data.batch_size=5000"),
        (("data=digits", "data.test_size=5000"), 2, "data.test_size=5000"),
        (("data=digits", "data.val_size=1437"), 2, "data.val_size=1437"),
        (("task=evaluate", "checkpoint=nowhere"), 4, "there is no such run"),
        (("task=explain", "checkpoint=README.md"), 4, "not a checkpoint"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(commands, tmp_path, arguments, code, part):
    given, output = bad(commands, tmp_path, *arguments)
    assert (given, part in output) == (code, True), output


def test_a_package_installed_inside_another_projects_checkout_has_no_commit(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    here = ["-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", *here, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    for folder, known in {
        "resnet_cifar": {"git_commit", "git_dirty"},
        ".venv/site-packages/resnet_cifar": set(),
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / folder / "provenance.py"))
        assert set(provenance._git()) == known
        assert provenance._git().get("git_dirty", "false") == "false"
    (tmp_path / "resnet_cifar" / "new.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "resnet_cifar" / "provenance.py"))
    assert provenance._git()["git_dirty"] == "true"
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert provenance._git()["git_dirty"] == "true"


def test_a_folder_that_holds_a_run_takes_no_second_one(trained, start):
    before = {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}
    again = start(f"hydra.run.dir={trained.folder}", "seed=1", base=trained, CANARY="x")
    assert again.code == 5 and "holds a run already" in again.output
    assert before == {path: path.read_bytes() for path in trained.folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_model_ends_with_4(trained, commands, tmp_path):
    arguments = ("task=evaluate", f"checkpoint={trained.folder}", "model.width=0.25", f"output_dir={tmp_path / 'o'}")
    command = commands(*arguments, printed=tmp_path / "printed", environment={"CANARY": "x"})
    assert command.ends() == 4
    assert "holds another model" in command.output and len(command.output.splitlines()) <= 3


def test_real_cifar10_runs(start, cifar10):
    arguments = ("data=cifar10", f"data.root={cifar10}", "augmentation=crop_flip_cutout", "data.train_size=256")
    run = start(*arguments, "data.test_size=64", "data.batch_size=64", "optimizer=sgd", "scheduler=cosine")
    assert run.code == 0, run.output
    assert (
        "scheduler.max_lr" not in run.tracked.data.params and "no peak" in run.tracked.data.tags["mlflow.note.content"]
    )
    assert {row["label"] for row in run.table("predictions.csv")} <= set(checkpoint.load(run.folder)["classes"])


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (terminated_at_the_curves, signal.SIGTERM),
        (terminated_at_grad_cam, signal.SIGTERM),
        (interrupted_at_grad_cam, signal.SIGINT),
        (terminated_again_at_the_end, signal.SIGTERM),
    ],
)
def test_a_signal_while_the_figures_are_drawn_ends_the_run_as_killed(start, fault, number):
    run = start("scheduler.max_lr=0.01", "trainer.epochs=1", fault=fault)
    assert run.code == 128 + number, run.output
    assert run.tracked.info.status == "KILLED"
    assert f"Go on with it:\n  python run.py resume={run.folder}\n" in run.output
