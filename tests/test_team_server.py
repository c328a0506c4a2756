"""The MLflow server of `experiments/team_server`, for real: PostgreSQL behind it, authentication, files through it."""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from processes import REPOSITORY, tiny
from servers import free_port, is_up, wait_for

from resnet_cifar import tracked_run, tracking
from resnet_cifar.errors import StorageError
from resnet_cifar.sync import sync_all

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path())
TEAM_SERVER = REPOSITORY / "experiments" / "team_server"
DOCUMENTED_DATABASE = "postgresql+psycopg2://mlflow@127.0.0.1:5432/mlflow"
DATABASE_PASSWORD, ADMIN_PASSWORD, PASSWORD = "of-the-database", "of-the-admin-0123", "of-the-team-01234"
CLIENT = {"MLFLOW_TRACKING_USERNAME": "team", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
CREATE_USER = "api/2.0/mlflow/users/create"
RUNS, METRICS, POINTS = 8, ("train/loss", "train/accuracy", "test/accuracy"), 24

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(not (PROGRAMS / "initdb").exists(), reason="no PostgreSQL: apt-get install postgresql"),
]


class Postgres:
    """A PostgreSQL cluster of its own in `folder`, with the user and database `mlflow`, on 127.0.0.1 alone."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        # PostgreSQL refuses to run as root.
        nobody = pwd.getpwnam("nobody")
        self._owner = {"user": nobody.pw_uid, "group": nobody.pw_gid} if os.geteuid() == 0 else {}
        if self._owner:
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        (folder / "password").write_text(DATABASE_PASSWORD)
        (folder / "password").chmod(0o644)
        self.password_file = folder / "pgpass"
        self.password_file.write_text(f"127.0.0.1:{self._port}:*:mlflow:{DATABASE_PASSWORD}\n")
        self.password_file.chmod(0o600)
        access = ("-A", "scram-sha-256", "-U", "mlflow", f"--pwfile={folder / 'password'}")
        self._run("initdb", "-D", folder / "data", *access, "--encoding=UTF8", "--locale=C", "--no-sync")
        self.start()
        environment = {**os.environ, "PGPASSFILE": str(self.password_file)}
        address = ("-h", "127.0.0.1", "-p", str(self._port), "-U", "mlflow")
        subprocess.run([PROGRAMS / "createdb", *address, "mlflow"], env=environment, check=True)

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self._port}/mlflow"

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self._port} -k {self._folder} -c fsync=off"
        self._control("start", "-l", self._folder / "log", "-o", options)

    def stop(self) -> None:
        self._control("stop", "-m", "fast")

    def _control(self, action: str, *options: object) -> None:
        self._run("pg_ctl", action, "-w", "-D", self._folder / "data", *options)

    def _run(self, program: str, *arguments: object) -> None:
        command = [PROGRAMS / program, *map(str, arguments)]
        # To a file: a pipe would stay open as long as the server that inherits it.
        with (self._folder / "printed").open("a+") as printed:
            done = subprocess.run(command, cwd="/", stdout=printed, stderr=printed, **self._owner)
            printed.seek(0)
            assert done.returncode == 0, printed.read()


@dataclass
class TeamServer:
    """A running MLflow server: its address, the database behind it, the folder that only it writes, a client of it."""

    uri: str
    postgres: Postgres
    artifacts: Path
    client: MlflowClient


@pytest.fixture(scope="module")
def server(commands, tmp_path_factory):
    pytest.importorskip("psycopg2", reason="pip install 'resnet-cifar[server]'")
    pytest.importorskip("flask_wtf", reason="pip install 'resnet-cifar[server]'")
    # A short path that other users may enter, as a Unix socket needs.
    with tempfile.TemporaryDirectory(prefix="postgres-") as place, pytest.MonkeyPatch.context() as patch:
        postgres = Postgres(Path(place))
        try:
            folder = tmp_path_factory.mktemp("server")
            with mlflow_server(postgres, folder) as uri:
                for name, value in CLIENT.items():
                    patch.setenv(name, value)
                yield TeamServer(uri, postgres, folder / "artifacts", tracking.Store(uri).client)
        finally:
            postgres.stop()


@contextmanager
def mlflow_server(postgres: Postgres, folder: Path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    settings = folder / "auth.ini"
    documented = (TEAM_SERVER / "auth.ini").read_text()
    assert DOCUMENTED_DATABASE in documented
    settings.write_text(documented.replace(DOCUMENTED_DATABASE, postgres.uri))
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-cookies"}
    environment = {
        **{**os.environ, **tracking.ENVIRONMENT, **secrets},
        **{"PGPASSFILE": str(postgres.password_file), "MLFLOW_AUTH_CONFIG_PATH": str(settings)},
        **{"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    }
    storage = ("--backend-store-uri", postgres.uri, "--artifacts-destination", str(folder / "artifacts"))
    network = ("--host", "127.0.0.1", "--port", str(port), "--allowed-hosts", f"127.0.0.1:{port}", "--workers", "1")
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *storage, *network]
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=printed, stderr=printed, start_new_session=True
        )
    try:
        wait_for(lambda: process.poll() is not None or is_up(f"{uri}/health"), 120)
        assert is_up(f"{uri}/health"), (folder / "printed").read_text()
        user = {"username": "team", "password": PASSWORD}
        made = requests.post(f"{uri}/{CREATE_USER}", json=user, auth=("admin", ADMIN_PASSWORD), timeout=30)
        made.raise_for_status()
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too; a polite stop takes seconds
        process.wait(30)


def start(uri: str, folder: Path, name: str) -> tracked_run.Run:
    folder.mkdir()
    given = {"experiment": "team", "run_name": name, "params": {"name": name}, "tags": {}}
    return tracking.start(uri=uri, artifacts=None, folder=folder, **given)


def log_points(run: tracked_run.Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log_metrics(dict.fromkeys(METRICS, step / 7), step)


def assert_complete(client, run_id: str) -> None:
    """FINISHED, and every point once, by MLflow's own account."""
    assert client.get_run(run_id).info.status == "FINISHED"
    for key in METRICS:
        history = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        assert history == [(step, step / 7) for step in range(1, POINTS + 1)]


def one_of_many(uri: str, folder: Path, environment: dict[str, str], together) -> None:
    """A run in a process of its own, started when all the others are ready."""
    os.environ.update(environment)
    tracked_run.FLUSH_SECONDS = 60.0
    together.wait(60)
    run = start(uri, folder, folder.name)
    log_points(run, 1, POINTS)
    table = folder / "history.csv"
    table.write_text(f"{folder.name}\n")
    run.log_file(table)
    run.finish("FINISHED")


def test_eight_runs_at_once_lose_nothing(server, commands, tmp_path):
    together = commands._context.Barrier(RUNS)
    folders = [tmp_path / f"run {number}" for number in range(RUNS)]
    details = [(server.uri, folder, CLIENT, together) for folder in folders]
    processes = [commands._context.Process(target=one_of_many, args=each, daemon=True) for each in details]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * RUNS
    experiment = server.client.get_experiment_by_name("team").experiment_id
    names = [folder.name for folder in folders]
    runs = {run.info.run_name: run for run in server.client.search_runs([experiment]) if run.info.run_name in names}
    assert len(runs) == RUNS
    for name, run in runs.items():
        assert_complete(server.client, run.info.run_id)
        assert run.data.params == {"name": name}
        stored = server.artifacts / experiment / run.info.run_id / "artifacts" / "history.csv"
        assert stored.read_text() == f"{name}\n"


def test_a_training_sends_everything_through_the_server(server, commands, tmp_path):
    given = (f"tracking.uri={server.uri}", f"output_dir={tmp_path}", "tracking.experiment=trained")
    command = commands(*tiny(*given), printed=tmp_path / "printed", environment=CLIENT)
    assert command.ends() == 0, command.output
    client = server.client
    [run] = client.search_runs([client.get_experiment_by_name("trained").experiment_id])
    assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert not (tmp_path / "artifacts").exists()
    [output] = run.outputs.model_outputs
    assert client.get_logged_model(output.model_id).status == "READY"
    [table] = tmp_path.rglob("history.csv")
    fetched = Path(client.download_artifacts(run.info.run_id, "history.csv", str(tmp_path)))
    assert fetched.read_bytes() == table.read_bytes()
    assert PASSWORD not in command.output
    for path in table.parent.rglob("*.json*"):
        assert PASSWORD not in path.read_text()


def test_a_restart_of_the_database_costs_a_run_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 60.0)
    run = start(server.uri, tmp_path / "run", "restart")
    log_points(run, 1, 8)
    assert run._records.drain(60)
    server.postgres.stop()
    try:
        log_points(run, 9, 16)  # returns although nothing can be stored
        wait_for(lambda: run._records.failing, 60)
    finally:
        server.postgres.start()
    log_points(run, 17, POINTS)
    run.finish("FINISHED")
    assert_complete(server.client, run.run_id)
    # As after a death between sending and noting it: everything goes out a second time.
    (tmp_path / "run" / "tracking.sent").unlink()
    assert sync_all(tmp_path) == POINTS + 2
    assert_complete(server.client, run.run_id)


def test_what_the_database_missed_at_the_end_is_synced(server, tmp_path, monkeypatch):
    run = start(server.uri, tmp_path / "run", "late")
    assert run._records.drain(60)
    monkeypatch.setattr(tracked_run, "FLUSH_SECONDS", 0.5)
    server.postgres.stop()
    try:
        log_points(run, 1, POINTS)
        run.finish("FINISHED")
    finally:
        server.postgres.start()
    assert server.client.get_run(run.run_id).info.status == "RUNNING"
    assert sync_all(tmp_path) == POINTS + 1
    assert_complete(server.client, run.run_id)


def test_without_the_password_a_run_does_not_start(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "something-else")
    with pytest.raises(StorageError, match="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        start(server.uri, tmp_path / "run", "stranger")


def test_a_page_of_another_host_is_refused(server):
    url = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    account = ("team", PASSWORD)
    assert requests.get(url, auth=account, timeout=30).status_code == 200
    assert requests.get(url, auth=account, timeout=30, headers={"Host": "elsewhere.example"}).status_code == 403
