"""A run as the experiment sees it: in its folder alone, or tracked: then calls write journal records, which threads deliver."""

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_cifar.artifact_files import write_whole
from resnet_cifar.console import setting
from resnet_cifar.delivery import Journal, Lane, reason
from resnet_cifar.hydra_setup import outputs
from resnet_cifar.passwords import without_passwords
from resnet_cifar.suggestions import program

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from resnet_cifar.tracking import Store

log = logging.getLogger(__name__)


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """The address of a run's page in the MLflow UI of `server`."""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


SUMMARY = "run.json"  # in a run's folder
NOTE = "mlflow.note.content"
POINTS_PER_RECORD = 1000  # MLflow's limits for one request
VALUES_PER_RECORD = 100
QUIET_SECONDS = 3.0
FLUSH_SECONDS = 10.0
UPLOAD_SECONDS = 60.0


def sync_command(folder: Path) -> str:
    """What sends later what the run in `folder` could not."""
    above = [parent.parent for parent in folder.absolute().parents if parent.name in ("runs", "sweeps")]
    output_dir = above[0] if above else folder.absolute()
    given = "" if output_dir == Path(outputs()) else " " + setting("output_dir", output_dir)
    return f"{program()} task=sync{given}"


class Run:
    """A run in its folder alone (tracking=none): what it says of itself is kept in `run.json`, and nothing is sent.

    `run.json` holds parameters, tags and the last value of each metric but the LR finder's, and at the end the status; where it
    lies already, the run goes on.
    """

    def __init__(self, folder: Path, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        self._path = folder / SUMMARY
        self._said: dict[str, Any] = {"params": {}, "tags": {}, "metrics": {}}
        with contextlib.suppress(FileNotFoundError, ValueError):  # a power cut can leave it empty
            self._said |= json.loads(self._path.read_text(encoding="utf-8"))
        self._said.pop("status", None)
        self._said["params"] |= as_texts(params)
        self._said["tags"] |= as_texts(tags)
        self._write()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One value per metric, all at `step`."""
        self._said["metrics"] |= {key: _plain(value) for key, value in metrics.items()}
        self._write()

    def log_series(self, points: Iterable[tuple[str, float, int]]) -> None:
        """Many points `(key, value, step)` at once, which the run's tables have."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters."""
        self._said["params"] |= as_texts(params)
        self._write()

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags; the last value of each stays."""
        self._said["tags"] |= as_texts(tags)
        self._write()

    def log_file(self, path: Path) -> None:
        """A file, which lies in the folder already."""

    def log_model(self, model: "nn.Module", example: "np.ndarray", metadata: dict[str, Any]) -> None:
        """A model, which MLflow alone keeps."""

    def finish(self, status: str, note: str | None = None) -> None:
        """Ends the run as FINISHED, FAILED or KILLED; `note` replaces its Markdown summary."""
        self._said["status"] = status
        self._said["tags"] |= as_texts({NOTE: note} if note else {})
        self._write()

    def _write(self) -> None:
        try:
            write_whole(self._path, json.dumps(self._said, indent=1))
        except OSError as error:
            log.warning("%s was not written (%s); the run goes on.", self._path.name, error.strerror)


class TrackedRun(Run):
    """A run in the store behind `journal` too; its calls neither wait for the store nor raise when it fails."""

    def __init__(
        self,
        store: "Store",
        journal: Journal,
        run_id: str,
        experiment_id: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
    ) -> None:
        super().__init__(journal.folder, params, tags)
        self.run_id, self.experiment_id, self.url = run_id, experiment_id, store.url(experiment_id, run_id)
        self._store, self._journal, self._finished = store, journal, False
        # Of the run before it was resumed, which repeats what came after its last checkpoint.
        earlier = (record.get("points", ()) for record in journal.records if record["run"] == run_id)
        self._known = {(key, step) for points in earlier for key, _, step in points}
        deliver = functools.partial(store.deliver, folder=journal.folder)
        # Files go their own way: a full artifact store or a long upload does not hold back metrics and status.
        self._records = Lane("tracking store", journal, deliver, in_order=True)
        self._files = Lane("artifact store", journal, deliver, in_order=False)
        for record in journal.pending():
            (self._files if record["kind"] in ("file", "model") else self._records).put(record)
        self._records.start()
        self._files.start()
        self._send_values("params", params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point per metric, all at `step`."""
        super().log_metrics(metrics, step)
        self.log_series((key, value, step) for key, value in metrics.items())

    def log_series(self, points: Iterable[tuple[str, float, int]]) -> None:
        """Many points `(key, value, step)` at once; one that an earlier process of this run has logged is left out."""
        plain = [[key, _plain(value), int(step)] for key, value, step in points if (key, int(step)) not in self._known]
        for first in range(0, len(plain), POINTS_PER_RECORD):
            self._send(self._records, "metrics", points=plain[first : first + POINTS_PER_RECORD])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters; MLflow refuses to change one, which becomes a warning."""
        super().log_params(params)
        self._send_values("params", params)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags; the last value of each stays."""
        super().set_tags(tags)
        self._send_values("tags", tags)

    def log_file(self, path: Path) -> None:
        """A file of the run's folder, which should be complete; it has the same place among the run's artifacts."""
        # Relative, so that a moved outputs folder can still be sent.
        self._send(self._files, "file", path=path.relative_to(self._journal.folder).as_posix())

    def log_model(self, model: "nn.Module", example: "np.ndarray", metadata: dict[str, Any]) -> None:
        """Exports `model` to the run folder's `model/` and logs it as the MLflow model `model`.

        `example` is its input, a batch of two or more; `metadata` is plain data that travels with the model. Takes
        seconds. A model that torch.export cannot trace is a warning.
        """
        try:
            self._store.save_model(model, example, metadata, self._journal.folder / "model", self.run_id)
        except Exception as error:
            log.warning(
                "The model is not logged, its export failed (%s). The checkpoint has its weights.", reason(error)
            )
        else:
            self._send(self._files, "model", path="model", name="model")

    def finish(self, status: str, note: str | None = None) -> None:
        """Ends the run as FINISHED, FAILED or KILLED; `note` replaces its Markdown summary.

        Waits for what is under way, not for a store that is down: then one line says what is left and how to send it. FINISHED
        comes after the files, which whoever sees it may read; the others before: who stops a run may not wait for them.
        """
        if self._finished:
            return
        self._finished = True
        super().finish(status, note)
        end = self._journal.append(self.run_id, "finish", status=status, note=without_passwords(note) if note else None)
        try:
            if status != "FINISHED":
                self._records.put(end)
            if self._records.drain(FLUSH_SECONDS):
                try:
                    self._wait_for_files()
                finally:  # Ctrl-C ends the wait alone
                    if status == "FINISHED":
                        self._records.put(end)
                        self._records.drain(FLUSH_SECONDS)
        finally:
            self._records.stop()
            self._files.stop()
            if left := len(self._journal.pending()):
                log.warning(
                    "%d tracking records of this run are not delivered. They are kept in %s; send them later: %s",
                    *(left, self._journal.path, sync_command(self._journal.folder)),
                )
            self._journal.close()

    def _wait_for_files(self) -> None:
        if not self._files.drain(QUIET_SECONDS):
            log.info("Sending the last files to the artifact store; Ctrl-C leaves them to task=sync.")
            self._files.drain(FLUSH_SECONDS if self._files.failing else UPLOAD_SECONDS)

    def _send_values(self, kind: str, values: Mapping[str, Any]) -> None:
        plain = list(as_texts(values).items())
        for first in range(0, len(plain), VALUES_PER_RECORD):
            self._send(self._records, kind, values=dict(plain[first : first + VALUES_PER_RECORD]))

    def _send(self, lane: Lane, kind: str, **content: Any) -> None:
        if not self._finished:
            lane.put(self._journal.append(self.run_id, kind, **content))


def as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters or tags as they are written down: without passwords."""
    return {key: without_passwords(str(value)) for key, value in values.items()}


def _plain(value: float) -> float | str:
    number = float(value)
    # JSON has no nan and no infinity; float() reads the words back.
    return number if math.isfinite(number) else str(number)
