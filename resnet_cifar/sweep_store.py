"""What a sweep asks the tracking store, and what it leaves there: finished runs, their durations, the summary run."""

import contextlib
import json
import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from omegaconf import DictConfig, OmegaConf

from resnet_cifar import run_folder, tracking
from resnet_cifar.artifact_files import local_folder
from resnet_cifar.compose import Sweep
from resnet_cifar.delivery import reason
from resnet_cifar.errors import StorageError
from resnet_cifar.fingerprint import config_hash, source_hash
from resnet_cifar.progress import LOCAL_SERVER, duration, shown_uri
from resnet_cifar.run_folder import has_finished
from resnet_cifar.store_errors import user_errors
from resnet_cifar.sweep_plan import SKIP, is_of_this_source
from resnet_cifar.sync import sync_all
from resnet_cifar.tracked_run import TrackedRun, run_page

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

SUMMARY_TAG = "sweep_summary"  # holds the sweep's id there; `sweep` is for its jobs, so that a filter finds these alone
# What a run's duration depends on, beside its number of epochs, among the parameters that every run has.
SIZE = ("data", "data.train_size", "data.batch_size", "model.width")
RUNS_FOR_ESTIMATE = 5
COPIES = "elsewhere"  # in a sweep's folder: files of runs that another machine has

log = logging.getLogger(__name__)


def finished_runs(sweep: Sweep) -> dict[str, Path]:
    """The jobs' configuration hashes that a FINISHED run of the same source has, each with the folder of its files.

    The tracking store knows, which is created here if need be, once, before jobs run in parallel; without tracking
    the sweep's own folder does. Raises StorageError when the store cannot be used.
    """
    settings, hashes = sweep.settings, [config_hash(cfg) for cfg, _ in sweep.jobs]
    if settings.tracking.uri is None:
        if not is_of_this_source(sweep.folder):
            return {}
        there = zip(hashes, sweep.job_folders, strict=False)
        return {key: folder for key, folder in there if has_finished(folder, key)}
    if sweep.folder.exists() and not settings.sweep.dry_run:
        _check_answers(settings)
        try:
            sync_all(sweep.folder)
        except StorageError as error:
            log.warning("%s", error)
    found = {}
    for run in _runs(settings, f"attributes.status = 'FINISHED' AND tags.source_hash = '{source_hash()}'"):
        key = run.data.tags.get("config_hash")
        if key in hashes and key not in found:
            found[key] = _files(run, settings, sweep.folder)
    return found


def _check_answers(settings: DictConfig) -> None:
    """Raise StorageError within seconds for a server that hangs, for which each run with something to send would wait."""
    uri, name, artifacts = settings.tracking.uri, settings.tracking.experiment, settings.tracking.artifacts
    try:
        store = tracking.Store(uri, create=False)
    except (
        StorageError
    ):  # a database that is gone: made anew before them, it would refuse the records that are kept for it
        return
    with user_errors(uri), store.creation_lock():
        store.get_or_create_experiment(name, artifacts)


def _runs(settings: DictConfig, matching: str) -> Iterator["MlflowRun"]:
    """The experiment's runs that match, newest first; a dry run does not create a store or experiment for it."""
    uri, name, artifacts = settings.tracking.uri, settings.tracking.experiment, settings.tracking.artifacts
    try:
        store = tracking.Store(uri, create=not settings.sweep.dry_run)
    except StorageError:
        return
    with user_errors(uri):
        with store.creation_lock():
            if settings.sweep.dry_run:
                known = store.client.get_experiment_by_name(name)
                if known is None:
                    return
                experiment_id = known.experiment_id
            else:
                experiment_id = store.get_or_create_experiment(name, artifacts)
                store.mark_dead_runs(experiment_id)
        token: str | None = ""
        while token is not None:
            page = store.client.search_runs([experiment_id], matching, page_token=token or None)
            yield from page
            token = page.token or None


def _files(run: "MlflowRun", settings: DictConfig, sweep_folder: Path) -> Path:
    """The folder with a run's files: its own, the store's, or for a run of another machine a copy from the store."""
    own, folders = Path(run.data.tags.get("process.folder", "/nowhere")), [local_folder(run.info.artifact_uri)]
    with contextlib.suppress(OSError):  # another user's
        if run_folder.run_id(own) == run.info.run_id:  # else set aside since, for a run that is in its place
            folders.insert(0, own)
    for folder in folders:
        if folder is not None and (folder / "config.yaml").exists():  # only a training has a history
            return folder
    copy = sweep_folder / COPIES / run.info.run_id
    if not copy.exists() and not settings.sweep.dry_run:
        _download(run.info.run_id, settings.tracking.uri, copy)
    return copy


def _download(run: str, uri: str, copy: Path) -> None:
    """The files that a leaderboard is made of, all that the run has, or none and a warning: the table then has a gap."""
    client, partial = tracking.Store(uri).client, copy.with_name(f"{copy.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for artifact in client.list_artifacts(run):
            if artifact.path in ("history.csv", "config.yaml", "lr_finder.csv", "predictions.csv", "checkpoints"):
                client.download_artifacts(run, artifact.path, str(partial))
    except Exception as error:
        log.warning("The files of run %s, which is finished, cannot be fetched: %s", run, reason(error))
    else:
        partial.rename(copy)


def estimate(sweep: Sweep, actions: Sequence[str]) -> str:
    """How long the jobs that are to run will take, from runs of the same size that FINISHED without a stop."""
    if sweep.settings.tracking.uri is None:
        return "tracking=none: no earlier runs to estimate the time from"
    if any(cfg.task != "train" for cfg, _ in sweep.jobs):
        return "no estimate: earlier runs tell how long trainings take"
    trained = _runs(sweep.settings, "attributes.status = 'FINISHED' AND tags.task = 'train'")
    # The time of a resumed run counts what it lay stopped. Its epochs' seconds do not, but they also leave out the LR
    # finder, the figures and the exported model, which are much of a short run.
    earlier = [run for run in trained if not _was_resumed(run)]
    seconds, guessed = 0.0, 0
    for (cfg, _), data, action in zip(sweep.jobs, sweep.data_sets, actions, strict=True):
        if action == SKIP:
            continue
        alike = [run for run in earlier if _size(run) == _planned_size(cfg, data)][:RUNS_FOR_ESTIMATE]
        if not alike:
            return "no earlier runs of this size to estimate the time from"
        per_epoch = mean(
            (run.info.end_time - run.info.start_time) / 1000 / int(run.data.params["trainer.epochs"]) for run in alike
        )
        seconds, guessed = seconds + per_epoch * cfg.trainer.epochs, guessed + 1
    if not guessed:
        return "nothing to do"
    return f"about {duration(seconds)} one after the other, as earlier runs of this size took"


def _was_resumed(run: "MlflowRun") -> bool:
    return any(key.startswith("resumed.") for key in run.data.tags)


def _size(run: "MlflowRun") -> list[str | None]:
    return [run.data.params.get(key) for key in SIZE]


def _planned_size(cfg: DictConfig, data: str | None) -> list[str | None]:
    values = [data, *(OmegaConf.select(cfg, key) for key in SIZE[1:])]
    return [None if value is None else str(value) for value in values]


def run_id(folder: Path) -> str | None:
    """The MLflow run whose files are in `folder`: a run's own, the store's or a copy; None without tracking."""
    if folder.name == "artifacts":
        return folder.parent.name
    return folder.name if folder.parent.name == COPIES else run_folder.run_id(folder)


def log_summary(cfg: DictConfig, sweep_id: str, name: str, note: str, folder: Path) -> TrackedRun:
    """The sweep's summary as one run, the same one again when the sweep goes on; returns it."""
    known = next(_runs(cfg, f"tags.{SUMMARY_TAG} = '{sweep_id}'"), None)
    summary = tracking.start(
        **{key: cfg.tracking[key] for key in ("uri", "artifacts", "experiment")},
        run_name=name,
        folder=folder,
        params={},
        tags={"task": "sweep", SUMMARY_TAG: sweep_id, "source_hash": source_hash()},
        run_id=known.info.run_id if known else None,
    )
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*.md"), *folder.glob("figures/*.png")]):
        summary.log_file(path)
    summary.finish("FINISHED", note)
    return summary


def where_to_look(uri: str, summary: TrackedRun, run_ids: Sequence[str]) -> list[str]:
    """Lines that lead to MLflow's compare page on exactly these runs and to the summary's page, for a database after
    the command that serves it."""
    runs, experiments = (
        quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), [summary.experiment_id])
    )
    is_server = urlsplit(uri).scheme in ("http", "https")
    server = uri.rstrip("/") if is_server else LOCAL_SERVER
    page = run_page(server, summary.experiment_id, summary.run_id)
    compare = f"{server}/#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"
    serve = [] if is_server else [f"MLflow   mlflow ui --backend-store-uri {shlex.quote(shown_uri(uri))}"]
    return [*serve, f"summary  {page}", f"compare  {compare}"]
