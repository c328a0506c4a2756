"""Real MLflow on real SQLite; a stub server for the ways in which a server fails."""

import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import requests
import torch
from mlflow_stub import StubServer
from processes import killed_while_the_database_is_made, tiny
from readme import code_blocks
from servers import free_port, is_up, wait_for

from resnet_cifar import delivery, store_errors, tracked_run, tracking
from resnet_cifar.artifact_files import link_or_copy
from resnet_cifar.delivery import Journal
from resnet_cifar.deployed_model import DeployedModel
from resnet_cifar.errors import CheckpointError, ConfigError, StorageError
from resnet_cifar.hydra_setup import outputs
from resnet_cifar.process_identity import identity, is_alive, is_gone
from resnet_cifar.sync import sync_all
from resnet_cifar.tracked_run import NOTE

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def database(empty_database, tmp_path):
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


@pytest.fixture
def client(database):
    return tracking.Store(f"sqlite:///{database}").client


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 0.5)
    stub = StubServer()
    yield stub
    stub.released.set()
    stub.gone()


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 60.0)


def start(uri, folder, *, artifacts=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(uri, Path):
        uri, artifacts = f"sqlite:///{uri}", artifacts or uri.parent / "artifacts"
    given = {"experiment": "e", "run_name": None, "params": {"seed": 0}, "tags": {"sweep": "s"}, **changes}
    return tracking.start(uri=uri, artifacts=artifacts, folder=folder, **given)


def history(client, run_id, key):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def text_file(folder, text="one\n"):
    path = folder / "history.csv"
    path.write_text(text)
    return path


# What a run leaves in the store


def test_a_run_is_in_the_store_with_everything_it_logged(database, client, tmp_path, patient):
    run = start(database, tmp_path / "run", run_name="first")
    run.log_metrics({"train/loss": torch.tensor(0.5), "test/loss": float("nan")}, step=3)
    run.log_series([("lr_finder/loss", 1 / (1 + step), step) for step in range(1500)])
    run.set_tags({"max_lr_source": "find"})
    run.finish("FINISHED", note="# 93%")
    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.info.run_name, stored.data.params) == ("FINISHED", "first", {"seed": "0"})
    assert {"sweep": "s", "max_lr_source": "find", "mlflow.note.content": "# 93%"}.items() <= stored.data.tags.items()
    assert history(client, run.run_id, "train/loss") == [(3, 0.5)]
    assert np.isnan(stored.data.metrics["test/loss"])
    assert len(history(client, run.run_id, "lr_finder/loss")) == 1500
    assert run.experiment_id == stored.info.experiment_id


def test_sending_a_journal_again_doubles_nothing(database, client, tmp_path, patient):
    run = start(database, tmp_path / "run")
    run.log_series([("loss", float("nan") if step == 7 else step / 3, step) for step in range(1200)])
    run.log_file(text_file(tmp_path / "run"))
    run.finish("FINISHED", note="done")
    (tmp_path / "run" / "tracking.sent").unlink()
    assert sync_all(tmp_path) == 5
    assert len(history(client, run.run_id, "loss")) == 1200
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_files_are_hard_links_into_a_local_store(database, client, tmp_path, patient):
    run = start(database, tmp_path / "run")
    (tmp_path / "run" / "tables").mkdir()
    path = text_file(tmp_path / "run" / "tables")
    run.log_file(path)
    run.finish("FINISHED")
    stored = tmp_path / "artifacts" / run.run_id / "artifacts" / "tables" / "history.csv"
    assert stored.samefile(path)
    assert [file.path for file in client.list_artifacts(run.run_id, "tables")] == ["tables/history.csv"]


def test_files_are_copied_where_links_are_not_possible(database, tmp_path, patient, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    run = start(database, tmp_path / "run")
    run.log_file(text_file(tmp_path / "run"))
    run.finish("FINISHED")
    assert (tmp_path / "artifacts" / run.run_id / "artifacts" / "history.csv").read_text() == "one\n"


def test_a_file_logged_again_is_the_new_one_in_the_store(database, tmp_path, patient):
    run = start(database, tmp_path / "run")
    run.log_file(text_file(tmp_path / "run"))
    run._files.drain(60)
    replacement = tmp_path / "new"
    replacement.write_text("two\n")
    replacement.replace(tmp_path / "run" / "history.csv")
    run.log_file(tmp_path / "run" / "history.csv")
    run.finish("FINISHED")
    assert (tmp_path / "artifacts" / run.run_id / "artifacts" / "history.csv").read_text() == "two\n"


def test_an_unwritable_artifact_store_is_a_warning_and_the_rest_arrives(
    database, client, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.05)
    run = start(database, tmp_path / "run")
    shutil.rmtree(tmp_path / "artifacts")
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    run.log_file(text_file(tmp_path / "run"))
    run._files.drain(0.2)
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 2.0)
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("FINISHED")
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert history(client, run.run_id, "loss") == [(1, 1.0)]
    assert "artifact store fails" in caplog.text and "1 tracking records of this run are not delivered" in caplog.text
    (tmp_path / "artifacts").unlink()
    assert sync_all(tmp_path) == 1
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["history.csv"]


def test_a_refused_record_is_a_warning_and_holds_nothing_back(database, client, tmp_path, patient, caplog):
    run = start(database, tmp_path / "run")
    run.log_params({"seed": 1})
    run.log_file(tmp_path / "run" / "never_written.png")
    run._send(run._files, "model", path="model_that_is_gone", name="model")
    run.finish("FINISHED")
    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.data.params) == ("FINISHED", {"seed": "0"})
    refused = ("tracking store refuses params", "artifact store refuses file", "artifact store refuses model")
    assert all(said in caplog.text for said in refused)
    assert sync_all(tmp_path) == 0


def test_what_a_run_in_the_trash_misses_is_sent_when_it_is_restored(database, client, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 0.5)
    run = start(database, tmp_path / "run")
    run.log_metrics({"loss": 1.0}, step=1)
    assert run._records.drain(60)
    client.delete_run(run.run_id)
    run.log_metrics({"loss": 2.0}, step=2)
    run.finish("FINISHED")
    assert "Current state is deleted" in caplog.text and "2 tracking records of this run are not" in caplog.text
    with pytest.raises(StorageError, match="2 tracking records could not be sent"):
        sync_all(tmp_path)
    client.restore_run(run.run_id)
    start(database, tmp_path / "next").finish("FINISHED")  # finds it RUNNING, and does not call it KILLED
    assert sync_all(tmp_path) == 2
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert history(client, run.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_what_a_run_that_was_removed_for_good_misses_is_given_up(database, client, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 0.5)
    run = start(database, tmp_path / "run")
    assert run._records.drain(60)
    client.delete_run(run.run_id)
    run.finish("FINISHED")
    client._tracking_client.store._hard_delete_run(run.run_id)  # as `mlflow gc`
    caplog.set_level(logging.INFO)
    assert sync_all(tmp_path) == 0
    assert "0 records sent, 1 refused for good, 0 left" in caplog.text and f"{run.run_id} not found" in caplog.text


def test_what_another_store_has_no_run_for_is_kept(database, client, empty_database, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 0.5)
    run = start(database, tmp_path / "run")
    assert run._records.drain(60)
    client.delete_run(run.run_id)  # so that its end does not arrive
    run.finish("FINISHED")
    client.restore_run(run.run_id)
    with pytest.raises(StorageError, match="1 tracking records could not be sent"):
        sync_all(tmp_path / "run", f"sqlite:///{empty_database}")
    assert f"{run.run_id} not found" in caplog.text
    assert sync_all(tmp_path / "run") == 1
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(("status", "waits_for_files"), [("FINISHED", True), ("KILLED", False), ("FAILED", False)])
def test_only_a_finished_run_waits_for_its_files(
    database, client, tmp_path, patient, monkeypatch, status, waits_for_files
):
    run = start(database, tmp_path / "run")
    seen = []
    monkeypatch.setattr(run, "_wait_for_files", lambda: seen.append(client.get_run(run.run_id).info.status))
    run.finish(status)
    assert seen == ["RUNNING" if waits_for_files else status]
    assert client.get_run(run.run_id).info.status == status


def test_a_record_counts_as_sent_when_it_has_arrived(database, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 0.5)
    run = start(database, tmp_path / "run")
    assert run._records.drain(60)
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE metrics RENAME TO unusable")
    run.log_metrics({"loss": 1.0}, step=1)
    run.finish("FINISHED")
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE unusable RENAME TO metrics")
    assert sync_all(tmp_path) == 2


def test_an_interrupt_while_files_are_sent_ends_the_wait_and_not_the_run_half_way(
    database, client, tmp_path, patient, monkeypatch
):
    def interrupted():
        raise KeyboardInterrupt

    run = start(database, tmp_path / "run")
    monkeypatch.setattr(run, "_wait_for_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.finish("FINISHED")
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert delivery.is_abandoned(tmp_path / "run")


def test_an_experiment_that_a_server_keeps_the_files_of_is_an_error(database, client, tmp_path):
    client.create_experiment("e", artifact_location="mlflow-artifacts:/2")
    with pytest.raises(StorageError, match="was made by an MLflow server"):
        start(database, tmp_path / "run")


def test_passwords_do_not_reach_the_store(database, client, tmp_path, patient):
    with_password = "http://me:hidden@host"
    run = start(database, tmp_path / "run", run_name=with_password, tags={"overrides": f"tracking.uri={with_password}"})
    run.finish("FAILED", note=f"no answer from {with_password}")
    assert "hidden" not in str(client.get_run(run.run_id).to_dictionary())
    assert "hidden" not in (tmp_path / "run" / "tracking.jsonl").read_text()


def test_an_address_with_a_password_or_without_a_store_is_refused(tmp_path):
    for uri in ("http://me:hidden@host:5000", "mlruns", "file:///tmp/mlruns", "sqlite:///:memory:", "sqlite://x.db"):
        with pytest.raises(ConfigError) as error:
            start(uri, tmp_path / "run")
        assert "hidden" not in str(error.value)


def test_a_relative_database_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.Store("sqlite:///mlflow.db").uri == f"sqlite:///{tmp_path}/mlflow.db"
    with_options = tracking.Store("sqlite:///mlflow.db?timeout=3")
    assert with_options.uri == f"sqlite:///{tmp_path}/mlflow.db?timeout=3"
    assert with_options._database == tmp_path / "mlflow.db"


def test_the_command_that_sends_what_is_left_knows_where_it_is(tmp_path):
    assert tracked_run.sync_command(Path(outputs(), "sweeps", "abc", "0")) == "python run.py task=sync"
    elsewhere = tracked_run.sync_command(tmp_path / "my runs" / "runs" / "1")
    assert elsewhere == f"python run.py task=sync 'output_dir={tmp_path}/my runs'"


def test_links_open_the_run():
    assert tracking.Store("http://host:5000/").url("1", "abc") == (
        "http://host:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    )
    assert tracking.Store("sqlite:////a/b.db").url("1", "abc") == "mlflow ui --backend-store-uri sqlite:////a/b.db"


def test_without_a_store_a_run_is_kept_in_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    run = tracked_run.Run(tmp_path / "run", {"seed": 0}, {})
    run.log_metrics({"loss": 2.0}, step=1)
    run.log_metrics({"loss": 1.0}, step=2)
    run.log_file(tmp_path / "run" / "missing")
    run.finish("FINISHED", "**done**")
    [file] = (tmp_path / "run").iterdir()
    said = json.loads(file.read_text())
    assert (said["metrics"], said["status"], said["tags"][tracking.NOTE]) == ({"loss": 1.0}, "FINISHED", "**done**")


@pytest.mark.parametrize(
    "left", ['{"tags": {"git_commit": "abc"}, "status": "KILLED"}', ""], ids=["whole", "cut short"]
)
def test_a_run_that_goes_on_keeps_what_it_said(tmp_path, left):
    (tmp_path / "run.json").write_text(left)
    tracked_run.Run(tmp_path, {}, {"resumed.git_commit": "def"})
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["tags"] == {**({"git_commit": "abc"} if left else {}), "resumed.git_commit": "def"}
    assert "status" not in said


def test_the_untracked_run_has_every_call_of_the_tracked_one():
    assert {name for name in vars(tracked_run.TrackedRun) if not name.startswith("_")} <= vars(tracked_run.Run).keys()


def test_mlflow_is_imported_only_when_a_run_is_tracked():
    code = "import sys, resnet_cifar.tracking, resnet_cifar.sync; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The model


@pytest.fixture
def logged(outputs, patient):
    """A finished run with a model in `outputs`, five pictures, and the logits that they should get."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    network.append(torch.nn.Linear(4 * 6 * 6, 10))
    model = DeployedModel(network, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2])
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    run = start(outputs / "mlflow.db", outputs / "runs" / "run")
    run.log_model(model, pictures[:2], {"classes": ["plane", "car"]})
    run.finish("FINISHED")
    images = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
    with torch.no_grad():
        return run, pictures, network.eval()(images).numpy()


def test_the_model_predicts_any_batch_size_without_this_package(logged, tmp_path):
    run, pictures, logits = logged
    np.save(tmp_path / "pictures.npy", pictures)
    code = (
        "import sys; sys.modules['resnet_cifar'] = None\n"
        "import mlflow, numpy as np\n"
        "mlflow.set_tracking_uri('sqlite:///outputs/mlflow.db')\n"
        f"model = mlflow.pyfunc.load_model('runs:/{run.run_id}/model')\n"
        "assert model.metadata.metadata['classes'] == ['plane', 'car']\n"
        "pictures = np.load('pictures.npy')\n"
        "np.save('logits.npy', np.concatenate([model.predict(pictures[:1]), model.predict(pictures[1:])]))\n"
    )
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, rtol=1e-4, atol=1e-5)
    client = tracking.Store(f"sqlite:///{tmp_path}/outputs/mlflow.db").client
    models = client.get_run(run.run_id).outputs.model_outputs
    assert len(models) == 1 and client.get_logged_model(models[0].model_id).status == "READY"


def test_the_model_is_served_over_http_as_the_readme_says(logged, tmp_path):
    run, pictures, logits = logged
    [command] = code_blocks("The model elsewhere", "bash")
    command = command.replace("<run id>", run.run_id).replace("5001", port := str(free_port()))
    server = subprocess.Popen(["bash", "-c", f"exec env {command}"], cwd=tmp_path, start_new_session=True)
    try:
        wait_for(lambda: is_up(f"http://127.0.0.1:{port}/ping"), seconds=90)
        request = {"inputs": [pictures[0].tolist()]}
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=request, timeout=30)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    np.testing.assert_allclose(answer.json()["predictions"], logits[:1], rtol=1e-4, atol=1e-5)


def test_a_run_is_deleted_for_good_as_the_readme_says(logged, tmp_path):
    run = logged[0]
    [_, command] = code_blocks("Looking at runs", "bash")
    kept = tmp_path / "outputs" / "artifacts"
    assert list(kept.rglob("MLmodel"))
    subprocess.run(["bash", "-ec", command.replace("<run id>", run.run_id)], cwd=tmp_path, check=True)
    with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM logged_models").fetchone() == (0,)
    assert [path for path in kept.rglob("*") if path.is_file()] == []
    assert (tmp_path / "outputs" / "runs" / "run" / "model" / "MLmodel").is_file()  # for the user to remove


def test_a_server_of_mlflow_2_keeps_the_model_as_files_of_its_run(server, tmp_path, patient):
    server.artifacts = str(tmp_path / "artifacts")
    run = start(server.uri, tmp_path / "run")
    model = DeployedModel(torch.nn.Flatten(), [0.5] * 3, [0.5] * 3)
    run.log_model(model, np.zeros((2, 4, 4, 3), dtype=np.uint8), {})
    run.finish("FINISHED")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "artifacts" / "model"))
    assert loaded.predict(np.zeros((3, 4, 4, 3), dtype=np.uint8)).shape == (3, 48)
    assert sync_all(tmp_path) == 0  # nothing is left to send


def test_a_model_that_cannot_be_exported_is_a_warning(database, client, tmp_path, patient, caplog):
    class Untraceable(torch.nn.Module):
        def forward(self, x):
            return x.float() if x.float().mean().item() > 0 else x.float() * 2

    run = start(database, tmp_path / "run")
    run.log_model(Untraceable(), np.ones((2, 3), dtype=np.uint8), {})
    run.finish("FINISHED")
    assert "The model is not logged" in caplog.text
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_deploying_leaves_the_network_as_it_was():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last).train()
    DeployedModel(network, [0.5] * 3, [0.5] * 3)
    assert network.training and network[0].weight.requires_grad
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


# Continued, killed and concurrent runs


def test_a_run_goes_on_under_its_id(database, client, tmp_path, patient):
    first = start(database, tmp_path / "run")
    first.log_metrics({"loss": 2.0}, step=1)
    first.finish("KILLED")
    second = start(database, tmp_path / "run", run_id=first.run_id)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.log_metrics({"loss": 1.0}, step=2)
    second.finish("FINISHED")
    assert history(client, first.run_id, "loss") == [(1, 2.0), (2, 1.0)]
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_run_that_is_not_there_cannot_go_on(database, tmp_path):
    with pytest.raises(CheckpointError, match="is not in"):
        start(database, tmp_path / "run", run_id="0" * 32)


def test_the_folder_of_a_run_that_is_going_is_refused(database, tmp_path, patient):
    run = start(database, tmp_path / "run")
    with pytest.raises(StorageError, match="Another process"):
        start(database, tmp_path / "run", run_id=run.run_id)
    run.finish("FINISHED")


def one_of_several(database, folder, ready, together, ends):
    """A run of a process of its own, which says its id when it has started; one that does not end waits to be killed."""
    logging.basicConfig()
    with (folder / "printed").open("w") as printed:
        os.dup2(printed.fileno(), 2)
    if together:
        together.wait(60)
    run = start(database, folder, artifacts=folder.parent / "artifacts", tags={NOTE: "so far"})
    ready.send(run.run_id)
    run.log_metrics({"loss": 1.0}, step=1)
    if not ends:
        time.sleep(600)
    run.finish("FINISHED")


@pytest.fixture
def start_elsewhere(commands):
    """Another process that starts a run, and the run's id when it has come."""

    def run(database, folder, together=None, ends=False):
        folder.mkdir(parents=True)
        receives, sends = commands._context.Pipe(duplex=False)
        process = commands._context.Process(
            target=one_of_several, args=(database, folder, sends, together, ends), daemon=True
        )
        process.start()
        sends.close()
        return process, receives

    return run


def test_a_killed_process_leaves_a_run_that_the_next_start_ends(
    database, client, tmp_path, patient, caplog, start_elsewhere
):
    process, said = start_elsewhere(database, tmp_path / "killed")
    killed = said.recv()
    alive = start(database, tmp_path / "alive")
    assert client.get_run(killed).info.status == "RUNNING"
    with pytest.raises(StorageError, match="still going"):
        start(database, tmp_path / "other", run_id=killed)
    process.kill()
    process.join()
    start(database, tmp_path / "next").finish("FINISHED")
    run = client.get_run(killed)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow.note.content"].startswith("so far\n\n")
    hint = f"resume={tmp_path / 'killed'}"
    assert hint in run.data.tags["mlflow.note.content"] and hint in caplog.text
    assert client.get_run(alive.run_id).info.status == "RUNNING"
    alive.finish("FINISHED")


def test_a_killed_summary_of_a_sweep_is_continued_by_the_sweep():
    killed = SimpleNamespace(data=SimpleNamespace(tags={"task": "sweep"}), info=SimpleNamespace(run_id="1"))
    assert tracking._how_to_go_on(killed) == "the sweep's command again"


def test_a_killed_run_that_goes_on_is_not_said_to_be_dead(database, client, tmp_path, patient, caplog, start_elsewhere):
    process, said = start_elsewhere(database, tmp_path / "run")
    run_id = said.recv()
    process.kill()
    process.join()
    again = start(database, tmp_path / "run", run_id=run_id, tags={})
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags[NOTE]) == ("RUNNING", "") and "Continue it" not in caplog.text
    again.finish("FINISHED")


def test_a_folder_of_another_user_is_not_read(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "tracking.jsonl").write_text('{"n": 1, "run": "abc", "kind": "finish"}\n')
    assert delivery.has_unsent_end(tmp_path, "abc") and delivery.is_abandoned(tmp_path)
    for name in ("exists", "is_file"):
        monkeypatch.setattr(Path, name, closed)
    assert not delivery.has_unsent_end(tmp_path, "abc") and not delivery.is_abandoned(tmp_path)


def test_a_dead_run_whose_end_is_still_in_its_journal_is_not_ended_as_killed(
    database, client, tmp_path, patient, caplog, start_elsewhere
):
    process, said = start_elsewhere(database, tmp_path / "ended")
    ended = said.recv()
    process.kill()
    process.join()
    journal = Journal(tmp_path / "ended")  # as if its end had met a store that was down
    journal.append(ended, "finish", status="FINISHED", note=None)
    journal.close()
    start(database, tmp_path / "next").finish("FINISHED")
    assert client.get_run(ended).info.status == "RUNNING" and "task=sync" in caplog.text
    sync_all(tmp_path)
    assert client.get_run(ended).info.status == "FINISHED"


def test_runs_of_other_hosts_are_left_alone(database, client, tmp_path, patient):
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    tags = {**identity(tmp_path), "process.host": "elsewhere", "process.started": "1"}
    other = client.create_run(experiment, tags=tags)
    start(database, tmp_path / "run").finish("FINISHED")
    assert client.get_run(other.info.run_id).info.status == "RUNNING"


def test_after_a_reboot_the_lock_on_the_folder_tells(tmp_path):
    tags = {**identity(tmp_path), "process.boot": "an earlier boot"}
    assert not is_gone(tags)  # no journal: nothing is known
    journal = Journal(tmp_path)
    journal.append("r", "start", uri="u", experiment_id="1")
    assert not is_gone(tags)
    journal.close()
    assert is_gone(tags)


def test_a_process_that_the_system_hides_is_not_gone(tmp_path, monkeypatch):
    tags = {**identity(tmp_path), "process.pid": str(os.getppid())}
    assert is_gone(tags)
    read = Path.read_text

    def hidden(path, *arguments, **keywords):
        if path.name == "stat":
            raise FileNotFoundError(path)
        return read(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "read_text", hidden)  # /proc mounted with hidepid=2
    assert not is_gone(tags) and not is_alive(tags)


def test_a_reused_pid_is_another_process(tmp_path):
    child = subprocess.Popen(["sleep", "600"])
    tags = {**identity(tmp_path), "process.pid": str(child.pid)}
    assert is_gone(tags) and not is_alive(tags)  # started at another time than we
    child.kill()
    child.wait()


def test_eight_processes_create_the_database_together(commands, tmp_path, start_elsewhere):
    together = commands._context.Barrier(8)
    processes = [
        start_elsewhere(tmp_path / "new" / "mlflow.db", tmp_path / str(n), together, ends=True) for n in range(8)
    ]
    run_ids = {said.recv() for _, said in processes}
    for process, _ in processes:
        process.join(300)
    assert [process.exitcode for process, _ in processes] == [0] * 8
    assert {(tmp_path / str(n) / "printed").read_text() for n in range(8)} == {""}
    client = tracking.Store(f"sqlite:///{tmp_path}/new/mlflow.db").client
    experiment = client.get_experiment_by_name("e")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in runs} == run_ids
    assert {(run.info.status, run.data.metrics["loss"]) for run in runs} == {("FINISHED", 1.0)}


# Stores that cannot be used


def one_error(*arguments, **keywords):
    with pytest.raises(StorageError) as caught:
        start(*arguments, **keywords)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_a_database_whose_making_was_killed_is_made_by_the_next_run(commands, tmp_path):
    arguments = tiny("task=find_lr", f"output_dir={tmp_path / 'outputs'}")
    killed = commands(*arguments, printed=tmp_path / "killed", fault=killed_while_the_database_is_made)
    assert killed.ends() == -signal.SIGKILL
    following = commands(*arguments, printed=tmp_path / "following")
    assert following.ends() == 0, following.output
    assert not list((tmp_path / "outputs").glob(".*.part*"))


def test_a_journal_of_a_database_that_was_moved_away_is_not_applied_to_the_new_one(tmp_path, patient):
    old = tmp_path / "mlflow.db"
    with sqlite3.connect(old, isolation_level=None) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("CREATE TABLE old (text)")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO old VALUES (?)", [("x" * 1000,)] * 1000)
        shutil.copy(f"{old}-journal", tmp_path / "journal")  # as a power cut leaves it
        connection.execute("ROLLBACK")
    connection.close()
    old.unlink()
    (tmp_path / "journal").rename(f"{old}-journal")
    start(old, tmp_path / "run").finish("FINISHED")
    with sqlite3.connect(old) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name = 'old'").fetchall()
    connection.close()


def test_a_database_that_another_program_made_meanwhile_is_left_alone(empty_database, tmp_path, patient, monkeypatch):
    database, import_mlflow = tmp_path / "mlflow.db", tracking._import_mlflow

    def meanwhile():
        shutil.copy(empty_database, database)
        return import_mlflow()

    monkeypatch.setattr(tracking, "_import_mlflow", meanwhile)
    tracking._create(database)
    assert database.read_bytes() == empty_database.read_bytes() and not list(tmp_path.glob(".*part*"))


def test_a_link_to_a_database_that_is_not_there_yet_stays_a_link(tmp_path, patient):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mlflow.db").symlink_to(tmp_path / "there.db")
    start(tmp_path / "here" / "mlflow.db", tmp_path / "run").finish("FINISHED")
    assert (tmp_path / "here" / "mlflow.db").is_symlink() and (tmp_path / "there.db").stat().st_size


def test_a_database_that_another_program_left_half_made_is_called_damaged(database, tmp_path):
    with sqlite3.connect(database) as connection:  # tables that MLflow has not noted, and one that it had not made
        connection.execute("DELETE FROM alembic_version")
        connection.execute("DROP TABLE logged_model_tags")
    connection.close()
    assert "move it away" in one_error(database, tmp_path / "run")


def test_a_database_held_by_another_program_is_an_error(database, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "BUSY_SECONDS", 0.2)
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert "close that program" in one_error(database, tmp_path / "run")
    holder.close()


def test_a_damaged_database_is_an_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database, though it has its name" * 100)
    assert "damaged" in one_error(tmp_path / "mlflow.db", tmp_path / "run")


def test_a_database_of_another_version_is_an_error(database, tmp_path):
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    assert "Another MLflow version" in one_error(database, tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"File exists: '{tmp_path / 'file'}'" in one_error(tmp_path / "file" / "mlflow.db", tmp_path / "run")


def test_artifacts_that_cannot_be_kept_are_an_error(database, tmp_path):
    (tmp_path / "file").write_text("")
    artifacts = tmp_path / "file" / "artifacts"
    assert f"Not a directory: '{artifacts}'" in one_error(database, tmp_path / "run", artifacts=artifacts)


def test_a_deleted_experiment_is_an_error_that_says_how_to_restore_it(database, client, tmp_path):
    experiment = client.create_experiment("e")
    client.delete_experiment(experiment)
    assert f"restore -x {experiment}" in one_error(database, tmp_path / "run")


def test_a_server_that_is_down_costs_seconds_and_not_minutes(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    began = time.monotonic()
    assert "Start the server" in one_error("http://127.0.0.1:9", tmp_path / "run")
    assert time.monotonic() - began < 60
    assert tracking.SERVER_SECONDS <= 10
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 1  # MLflow's own take four minutes


@pytest.mark.parametrize("leftover", ["link", "file"])
def test_a_leftover_in_the_store_is_neither_written_through_nor_in_the_way(tmp_path, leftover):
    (tmp_path / "outside").write_text("mine")
    part = tmp_path / "store" / ".x.part"
    part.parent.mkdir()
    part.symlink_to(tmp_path / "outside") if leftover == "link" else os.link(tmp_path / "outside", part)
    (tmp_path / "x").write_text("theirs")
    link_or_copy(tmp_path / "x", tmp_path / "store" / "x")
    assert (tmp_path / "store" / "x").samefile(tmp_path / "x")
    assert (tmp_path / "outside").read_text() == "mine" and not part.exists()


def test_a_dead_server_is_an_error(server, tmp_path):
    server.gone()
    assert "Start the server" in one_error(server.uri, tmp_path / "run")
    server.started()


def test_a_server_that_wants_a_password_is_an_error(server, tmp_path):
    server.mode = "denied"
    assert "MLFLOW_TRACKING_PASSWORD" in one_error(server.uri, tmp_path / "run")


def test_a_server_that_hangs_is_an_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SERVER_SECONDS", 0.3)
    server.mode = "hang"
    assert "no answer" in one_error(server.uri, tmp_path / "run")


def test_a_call_that_takes_too_long_is_given_up():
    released = threading.Event()
    with pytest.raises(TimeoutError):
        store_errors.within(0.05, released.wait)
    released.set()
    assert store_errors.within(60, lambda: 3) == 3


# Servers that fail in the middle of a run


def break_down(server, fault):
    if fault == "gone":
        server.gone()
    else:
        server.mode = fault


def come_back(server, fault):
    if fault == "gone":
        server.started()
    server.mode = "ok"
    server.released.set()


@pytest.mark.parametrize("fault", ["gone", "error", "hang"])
def test_what_a_server_misses_is_sent_later_and_once(server, tmp_path, caplog, fault):
    run = start(server.uri, tmp_path / "run")
    run.log_metrics({"loss": 3.0}, step=1)
    assert run._records.drain(60)
    break_down(server, fault)
    run.log_metrics({"loss": 2.0}, step=2)  # returns although nobody answers
    run.log_metrics({"loss": 1.0}, step=3)
    run.finish("FINISHED", note="done")
    assert server.points(run.run_id) == [("loss", 1)]
    assert "3 tracking records of this run are not delivered" in caplog.text
    assert f"python run.py task=sync output_dir={tmp_path / 'run'}" in caplog.text
    come_back(server, fault)
    assert sync_all(tmp_path) == 3
    assert sync_all(tmp_path) == 0
    assert server.points(run.run_id) == [("loss", 1), ("loss", 2), ("loss", 3)]
    assert server.runs[run.run_id]["status"] == "FINISHED"


def test_a_server_that_comes_back_gets_everything_in_order(server, tmp_path, caplog, patient):
    caplog.set_level(logging.INFO)
    run = start(server.uri, tmp_path / "run")
    break_down(server, "error")
    run.log_metrics({"loss": 2.0}, step=1)
    run.log_metrics({"loss": 1.0}, step=2)
    assert not run._records.drain(0.3)
    come_back(server, "error")
    run.finish("FINISHED")
    assert server.points(run.run_id) == [("loss", 1), ("loss", 2)]
    assert server.runs[run.run_id]["status"] == "FINISHED"
    assert caplog.text.count("tracking store fails") == 1 and "works again" in caplog.text


def test_syncing_with_a_dead_server_keeps_everything(server, tmp_path):
    run = start(server.uri, tmp_path / "run")
    assert run._records.drain(60)
    server.gone()
    run.finish("FINISHED")
    with pytest.raises(StorageError, match="1 tracking records"):
        sync_all(tmp_path)
    with pytest.raises(StorageError, match="1 tracking records"):
        sync_all(tmp_path, "http://127.0.0.1:9")  # where it is said to be now
    server.started()
    assert sync_all(tmp_path, server.uri) == 1


def test_syncing_leaves_a_run_that_is_going_alone(server, tmp_path, patient):
    run = start(server.uri, tmp_path / "run")
    assert sync_all(tmp_path) == 0
    run.finish("FINISHED")


def test_syncing_a_run_without_an_end_says_that_it_was_killed(server, tmp_path):
    run = start(server.uri, tmp_path / "run")
    assert run._records.drain(60)
    server.mode = "error"
    run.log_metrics({"loss": 1.0}, step=1)
    run._records.stop()
    run._journal.close()  # as when the process is killed
    server.mode = "ok"
    assert sync_all(tmp_path) == 1
    assert server.points(run.run_id) == [("loss", 1)]
    assert server.runs[run.run_id]["status"] == "KILLED"


def test_an_end_that_was_not_sent_does_not_end_the_run_that_goes_on(server, tmp_path, patient):
    run = start(server.uri, tmp_path / "run")
    assert run._records.drain(60)
    break_down(server, "error")
    tracked = server.runs[run.run_id]
    run.log_metrics({"loss": 2.0}, step=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracked_run, "FLUSH_SECONDS", 0.2)
        run.finish("FAILED")
    come_back(server, "error")
    again = start(server.uri, tmp_path / "run", run_id=run.run_id)
    assert again._records.drain(60)
    assert server.points(run.run_id) == [("loss", 1)] and tracked["status"] == "RUNNING"
    again.finish("FINISHED")
    assert tracked["status"] == "FINISHED"


# The journal


def test_a_line_cut_short_loses_only_itself(tmp_path):
    journal = Journal(tmp_path)
    journal.append("r", "tags", values={"a": "1"})
    journal.mark_sent(journal.append("r", "tags", values={"a": "2"}))
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"n": 3, "kind": "ta')
    with (tmp_path / "tracking.sent").open("ab") as file:
        file.write(b"1")  # of "1 sent"
    again = Journal(tmp_path)
    again.mark_sent(again.append("r", "tags", values={"a": "3"}))
    again.close()
    third = Journal(tmp_path)
    assert [record["values"]["a"] for record in third.records] == ["1", "2", "3"]
    assert [record["values"]["a"] for record in third.pending()] == ["1"]
    third.close()


def test_the_journal_is_plain_json(tmp_path):
    journal = Journal(tmp_path)
    journal.append("r", "metrics", points=[["loss", tracked_run._plain(float("inf")), 1]])
    journal.close()
    [line] = journal.path.read_text().splitlines()

    def refuse(word):
        raise ValueError(word)

    assert float(json.loads(line, parse_constant=refuse)["points"][0][1]) == float("inf")


def test_a_full_disk_is_a_warning_and_the_store_still_gets_the_record(server, tmp_path, caplog, patient):
    run = start(server.uri, tmp_path / "run")
    run._journal._lines.close()
    with Path("/dev/full").open("ab", buffering=0) as full:
        run._journal._lines._file = full
        run.log_metrics({"loss": 1.0}, step=1)
    assert run._records.drain(60)
    assert server.points(run.run_id) == [("loss", 1)]
    assert "cannot be written" in caplog.text
    run._records.stop()
    run._files.stop()
    run._journal.close()
