"""MLflow: opens the store, starts runs and sends their records. The only file that imports it, and late.

Sending a record twice is harmless: points carry the journal's time, and MLflow keeps one of two equal points.
"""

import functools
import glob
import logging
import os
import secrets
import shlex
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock

from resnet_cifar.artifact_files import artifact_location, link_or_copy, local_folder
from resnet_cifar.delivery import Journal, Record, has_unsent_end
from resnet_cifar.errors import CheckpointError, ConfigError, StorageError
from resnet_cifar.passwords import has_password, without_passwords
from resnet_cifar.process_identity import identity, is_alive, is_gone, origin
from resnet_cifar.store_errors import user_errors, within
from resnet_cifar.suggestions import program
from resnet_cifar.tracked_run import NOTE, TrackedRun, as_texts, run_page, sync_command

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun
    from torch import nn

log = logging.getLogger(__name__)

# Each only where the user's environment does not say otherwise; MLflow's own retries would take four minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
BUSY_SECONDS = 5.0
SERVER_SECONDS = 6.0
DATABASE_SECONDS = 60.0


def start(
    *,
    uri: str,
    artifacts: str | Path | None,
    experiment: str,
    run_name: str | None,
    folder: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    run_id: str | None = None,
) -> TrackedRun:
    """Starts a run whose journal is in `folder`, or continues `run_id`.

    `artifacts` is where a database keeps the files of a new experiment. Runs of this host whose process is gone become
    KILLED first. Raises StorageError when the store cannot be used, CheckpointError when `run_id` is not in it.
    """
    store = Store(uri)
    journal = Journal(folder)
    values = {**as_texts({**origin(), **tags}), **identity(folder)}  # as it is: by it a later start finds the process
    _import_mlflow()  # seconds, so before the lock
    try:
        with user_errors(uri), store.creation_lock():
            experiment_id = store.get_or_create_experiment(experiment, artifacts)
            store.mark_dead_runs(experiment_id, but=run_id)
            if run_id is None:
                name = without_passwords(run_name) if run_name else None
                run_id = store.client.create_run(experiment_id, tags=values, run_name=name).info.run_id
            else:
                experiment_id = store.continue_run(run_id, values)
    except BaseException:
        journal.close()
        raise
    journal.append(run_id, "start", uri=store.uri, experiment_id=experiment_id)
    return TrackedRun(store, journal, run_id, experiment_id, params, tags)


@contextmanager
def imported_meanwhile(uri: str | None) -> Iterator[None]:
    """Imports MLflow in a thread while the caller reads and verifies files, which takes the other core; not for `uri=None`."""
    with ThreadPoolExecutor(1) as pool:
        if uri is not None:
            pool.submit(_import_mlflow)
        yield


class Store:
    """An MLflow tracking store: a server (http, https) or a database (sqlite:////absolute/path, postgresql and so on).

    `create=False` is for a store that must be there already. Raises ConfigError for any other address, or a password
    in it.
    """

    def __init__(self, uri: str, create: bool = True) -> None:
        if has_password(uri):
            raise ConfigError("tracking.uri holds a password: set MLFLOW_TRACKING_USERNAME and _PASSWORD instead.")
        self._is_server = urlsplit(uri).scheme in ("http", "https")
        self._database = _sqlite_path(uri)
        # Absolute, so that another working directory finds the same database.
        self.uri = f"sqlite:///{self._database}{''.join(uri.partition('?')[1:])}" if self._database else uri
        if self._database and not create and not self._database.exists():
            raise StorageError(f"The database {self._database} is not there any more.")

    @functools.cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client. The tables of a new SQLite database are made under `creation_lock`, which comes before it."""
        return _import_mlflow().MlflowClient(self.uri)

    def url(self, experiment_id: str, run_id: str) -> str:
        """Where to look at a run: its page on a server, or the command that serves a database."""
        if not self._is_server:
            return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"
        return run_page(self.uri.rstrip("/"), experiment_id, run_id)

    @contextmanager
    def creation_lock(self) -> Iterator[None]:
        """One process at a time on an SQLite database, which is made if need be: several that do it at once break it for good."""
        if not self._database:
            yield
            return
        database = self._database.resolve()
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock", timeout=300):
            if _is_empty(database):
                within(DATABASE_SECONDS, lambda: _create(database))
            # MLflow would try a locked or broken database ten times, which takes minutes.
            with closing(sqlite3.connect(database, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            yield

    def get_or_create_experiment(self, name: str, artifacts: str | Path | None) -> str:
        """The experiment `name`, created if need be; `artifacts` is for the files of a new one in a database."""
        location = None if self._is_server else artifact_location(artifacts)
        patience = SERVER_SECONDS if self._is_server else DATABASE_SECONDS
        found = within(patience, lambda: self.client.get_experiment_by_name(name))
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.client.get_experiment_by_name(name)
            assert found is not None  # another process has just made it
        if found.lifecycle_stage != "active":
            raise StorageError(
                f"The experiment {name} was deleted. Choose another tracking.experiment, or restore it:\n"
                f"MLFLOW_TRACKING_URI={self.uri} mlflow experiments restore -x {found.experiment_id}"
            )
        if not self._is_server and found.artifact_location.startswith("mlflow-artifacts:"):
            raise StorageError(
                f"The experiment {name} was made by an MLflow server, the UI's, which keeps its files: give that server as\n"
                "tracking.uri=http://..., or another tracking.experiment, which is made with a place for files."
            )
        if location and found.artifact_location != location:
            log.warning("The experiment %s keeps its files in %s, as when it was made.", name, found.artifact_location)
        return found.experiment_id

    def continue_run(self, run_id: str, tags: Mapping[str, str]) -> str:
        """Makes a run RUNNING again, as this process; returns its experiment."""
        from mlflow.entities import RunTag

        try:
            run = self.client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", None) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise CheckpointError(f"The run {run_id} is not in {self.uri}. Check resume and tracking.uri.") from None
        if run.info.lifecycle_stage != "active":
            raise CheckpointError(
                f"The run {run_id} was deleted. Restore it first:\n"
                f"MLFLOW_TRACKING_URI={self.uri} mlflow runs restore --run-id {run_id}"
            )
        if run.info.status == "RUNNING" and is_alive(run.data.tags):
            raise StorageError(
                f"The run {run_id} is still going, as process {run.data.tags['process.pid']}. Wait for it or stop it."
            )
        # The tags first: a RUNNING run with the tags of a dead process would be marked KILLED. Its note says that it stopped.
        self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in {NOTE: "", **tags}.items()], synchronous=True)
        self.client.update_run(run_id, status="RUNNING")
        return run.info.experiment_id

    def mark_dead_runs(self, experiment_id: str, but: str | None = None) -> None:
        """Ends as KILLED the runs of this host that are RUNNING although their process is gone, `but` one that goes on now."""
        mine = f"attributes.status = 'RUNNING' and tags.`process.host` = '{identity(Path())['process.host']}'"
        for run in self.client.search_runs([experiment_id], mine, max_results=1000):
            if run.info.run_id == but or not is_gone(run.data.tags):
                continue
            folder = run.data.tags.get("process.folder", "/nowhere")
            if has_unsent_end(Path(folder), run.info.run_id):
                log.warning(
                    "The end of run %s in %s has not arrived yet. Send it: %s",
                    *(run.info.run_name, folder, sync_command(Path(folder))),
                )
            else:
                self.mark_killed(run)
                log.warning(
                    "The process of run %s (%s) is gone; the run is KILLED now. Continue it: %s",
                    *(run.info.run_name, run.info.run_id, _how_to_go_on(run).strip("`")),
                )

    def mark_killed(self, run: "MlflowRun") -> None:
        """Ends a run whose process is gone as KILLED and says in its note how to continue it."""
        if run.info.status != "RUNNING":
            return
        said = f"The process ended without a word. Continue it: {_how_to_go_on(run)}"
        note = f"{run.data.tags.get(NOTE, '')}\n\n{said}".strip()
        self.client.set_tag(run.info.run_id, NOTE, note, synchronous=True)
        self.client.set_terminated(run.info.run_id, "KILLED")

    def deliver(self, record: Record, folder: Path) -> None:
        """Sends one journal record, which has arrived when this returns; paths in it are relative to `folder`.

        Raises whatever fails.
        """
        from mlflow.entities import Metric, Param, RunTag

        run_id, kind = record["run"], record["kind"]
        if kind == "metrics":
            points = [Metric(key, float(value), record["time"], step) for key, value, step in record["points"]]
            self.client.log_batch(run_id, metrics=points, synchronous=True)
        elif kind == "params":
            self.client.log_batch(run_id, params=[Param(*item) for item in record["values"].items()], synchronous=True)
        elif kind == "tags":
            self.client.log_batch(run_id, tags=[RunTag(*item) for item in record["values"].items()], synchronous=True)
        elif kind == "file":
            self._send_file(run_id, folder, record["path"])
        elif kind == "model":
            self._send_model(run_id, folder / record["path"], record["name"])
        else:
            if record["note"]:
                self.client.set_tag(run_id, NOTE, record["note"], synchronous=True)
            self.client.set_terminated(run_id, record["status"], end_time=record["time"])

    def _send_file(self, run_id: str, folder: Path, path: str) -> None:
        if store := local_folder(self.client.get_run(run_id).info.artifact_uri):
            link_or_copy(folder / path, store / path)
        else:
            self.client.log_artifact(run_id, str(folder / path), path.rpartition("/")[0] or None)

    def _send_model(self, run_id: str, path: Path, name: str) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        if not path.exists():  # which MLflow says with the same code as that of a run that is not there
            raise FileNotFoundError(f"{path} is gone")
        run = self.client.get_run(run_id)
        # An attempt that failed half-way, or the run before it was resumed, has left its entry: one model per run.
        same = f"name = '{name}' AND source_run_id = '{run_id}'"
        try:
            known = self.client.search_logged_models([run.info.experiment_id], same)
        except Exception as error:
            if getattr(error, "error_code", None) != "ENDPOINT_NOT_FOUND":
                raise
            # A server of MLflow 2, where a model is files of its run.
            self.client.log_artifacts(run_id, str(path), name)
            return
        logged = known[0] if known else self.client.create_logged_model(run.info.experiment_id, name, run_id)
        description = Model.load(str(path))
        description.run_id, description.model_id, description.model_uuid = run_id, logged.model_id, logged.model_id
        description.artifact_path = logged.artifact_location
        description.save(str(path / "MLmodel"))
        if store := local_folder(logged.artifact_location):
            for file in filter(Path.is_file, path.rglob("*")):
                link_or_copy(file, store / file.relative_to(path))
        else:
            self.client.log_model_artifacts(logged.model_id, str(path))
        known_outputs = run.outputs.model_outputs if run.outputs else ()
        if logged.model_id not in {output.model_id for output in known_outputs}:
            self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        self.client.finalize_logged_model(logged.model_id, "READY")

    def save_model(
        self, model: "nn.Module", example: "np.ndarray", metadata: dict[str, Any], path: Path, run_id: str
    ) -> None:
        """Writes `model` as an MLflow model that loads without this package: a graph of torch.export, any batch size.

        `example` (N, ...), N at least 2, is an input; the signature leaves N open.
        """
        import mlflow.pytorch
        import numpy as np
        import torch
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        with torch.no_grad():
            output = model(torch.from_numpy(example)).numpy()
        inputs, outputs = (
            Schema([TensorSpec(np.dtype(array.dtype), (-1, *array.shape[1:]))]) for array in (example, output)
        )
        description = Model(run_id=run_id, metadata=metadata)
        shutil.rmtree(path, ignore_errors=True)
        with warnings.catch_warnings(action="ignore"):
            mlflow.pytorch.save_model(
                model,
                str(path),
                mlflow_model=description,
                input_example=example,
                signature=ModelSignature(inputs, outputs),
                serialization_format="pt2",
                pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "numpy", "torch")],
            )
        # An exported graph stays on its device, and MLflow would ask for CUDA where there is one.
        description.flavors["python_function"]["config"]["device"] = "cpu"
        description.save(str(path / "MLmodel"))


def _create(database: Path) -> None:
    # MLflow makes its tables one by one: stopped between two of them, it would never again open the file.
    for part in database.parent.glob(f".{glob.escape(database.name)}.*part*"):
        part.unlink(missing_ok=True)
    part = database.with_name(f".{database.name}.{secrets.token_hex(3)}.part")
    client = _import_mlflow().MlflowClient(f"sqlite:///{part}")
    try:
        client.search_experiments(max_results=1)
    finally:
        client._tracking_client.store.engine.dispose()
    if _is_empty(database):
        for suffix in ("-journal", "-wal", "-shm"):  # of one that was moved away: SQLite would apply it to this one
            Path(f"{database}{suffix}").unlink(missing_ok=True)
        os.replace(part, database)
    else:  # another program, MLflow's UI say, has made it meanwhile
        part.unlink()


def _is_empty(database: Path) -> bool:
    return not database.exists() or database.stat().st_size == 0


def _how_to_go_on(run: "MlflowRun") -> str:
    if run.data.tags.get("task") == "sweep":  # its summary
        return "the sweep's command again"
    # The folder: by its id only a run in the default outputs folder is found.
    return f"`{program()} resume={shlex.quote(run.data.tags.get('process.folder', run.info.run_id))}`"


def _import_mlflow() -> ModuleType:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(action="ignore"):
        import mlflow
    # These print tracebacks and attempts of errors that are handled here, and a line per step of a new database.
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def _sqlite_path(uri: str) -> Path | None:
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file" or (scheme == "sqlite" and not rest.startswith("/")) or ":memory:" in rest:
        raise ConfigError(
            f"tracking.uri={uri} is not the address of a database or a server.\n"
            "Give sqlite:////absolute/path/mlflow.db or http://server:5000, or choose tracking=none."
        )
    return Path(rest[1:].partition("?")[0]).absolute() if scheme == "sqlite" else None
