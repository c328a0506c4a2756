"""A run around its work: how it was asked for, its name and compared parameters, its start and end in MLflow, its files."""

import logging
import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from resnet_cifar import schema, tracking
from resnet_cifar.artifact_files import write_whole
from resnet_cifar.checkpoint import LAST
from resnet_cifar.console import log_failure, setting, shown
from resnet_cifar.environment import without_environment
from resnet_cifar.errors import StorageError
from resnet_cifar.loop import EpochRecord
from resnet_cifar.passwords import without_passwords
from resnet_cifar.progress import where_to_look
from resnet_cifar.run_folder import STATUS, only_process
from resnet_cifar.signals import STOPPED, exit_on_ending_signals, ignored
from resnet_cifar.suggestions import program
from resnet_cifar.tables import read_csv
from resnet_cifar.tracked_run import Run

# What people compare runs by, as far as a configuration has it: these always, then what was overridden, by the command and by
# its preset, then the others.
COMPARED_GROUPS = ("data", "augmentation", "optimizer", "scheduler")
USUAL_MODEL = "custom_resnet"  # another is compared too
ALWAYS_COMPARED = ("seed", "trainer.epochs", "data.batch_size", "data.train_size", "model.width")
COMPARED = (
    *("scheduler.pct_start", "scheduler.div_factor", "scheduler.final_div_factor", "optimizer.weight_decay"),
    "model.inner_shortcut",
)
FROM_CHECKPOINT = ("model.", "data.")
LONGEST_OWN_NAME = 120  # characters of a name that is made of settings
LONGEST_NAME = 250  # characters: the column in MLflow's database, which PostgreSQL insists on
MOST_PARAMS = 15  # more squeeze the images on MLflow's pages
# Where a run lies and where it is recorded tell nothing about its result.
NOT_COMPARED = ("tracking", "hydra", "output_dir", "data.root", "experiment", "scheduler.max_lr", "resume", "sweep")
FILES = ("config.yaml", "model_summary.txt", "*.csv", "run.log", "figures/*.png", f"checkpoints/{LAST}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Invocation:
    """How a run was asked for: its folder, the overrides as typed, the option chosen of each group; `run_id` of one resumed.

    What one that is `recorded` already began with, its parameters and tags, stays.

    `preset` has the keys that its presets set. In a sweep `name` says what it `varied` (keys), `place` where in the running
    sweep it stands, in words; `tags` say which sweep that is, and which runs are the same as this one.
    """

    folder: Path
    overrides: tuple[str, ...]
    choices: Mapping[str, str | None]
    resumed: bool = False
    run_id: str | None = None
    recorded: bool = False
    preset: tuple[str, ...] = ()
    name: str = ""
    varied: tuple[str, ...] = ()
    place: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def recorded(cfg: DictConfig, invocation: Invocation, provenance: Mapping[str, str]) -> Iterator[Run]:
    """The run in MLflow from its start to FINISHED, FAILED or KILLED; whatever happens, the folder's files go there.

    Raises:
        StorageError: another process has this run, or its folder or store cannot be used.
    """
    folder = invocation.folder
    with only_process(folder), exit_on_ending_signals():
        if not invocation.resumed:
            with _writing(folder):
                write_whole(folder / "config.yaml", OmegaConf.to_yaml(without_environment(cfg)))
        tracked_run = _start(cfg, invocation, provenance)
        (folder / STATUS).unlink(missing_ok=True)
        log.info("%s%s", f"\n{invocation.place}\n" if invocation.place else "Run folder: ", shown(folder))
        try:
            with _writing(folder):
                yield tracked_run
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | GeneratorExit) or (
                isinstance(error, SystemExit) and error.code in STOPPED
            )
            status = "KILLED" if stopped else "FAILED"
            hint = f"Stopped. Continue it: `{program()} resume={shlex.quote(str(folder))}`"
            if not stopped:
                log_failure(error)  # before run.log is sent
            _end(folder, tracked_run, status, hint if stopped else failure(error))
            if isinstance(error, KeyboardInterrupt | SystemExit) and stopped:
                log.warning("Stopped. Go on with it:\n  %s %s", program(), setting("resume", folder))
            raise
        _end(folder, tracked_run, "FINISHED", None)
    if not invocation.place:  # a sweep says where to look once, at its end
        log.info("%s", where_to_look(cfg.task, folder, tracked_run))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}\nWhat was written before is still there.") from error


def failure(error: BaseException) -> str:
    """Why a run FAILED, as its status and its note in MLflow say it."""
    return without_passwords(f"{type(error).__name__}: {error}".strip())


def _start(cfg: DictConfig, invocation: Invocation, provenance: Mapping[str, str]) -> Run:
    params = {} if invocation.recorded else compared_params(cfg, invocation)
    tags = {
        "task": cfg.task,
        "overrides": shlex.join(invocation.overrides) or "none",
        **invocation.tags,
        # A later commit or another machine trained its later part only.
        **{f"resumed.{name}" if invocation.recorded else name: value for name, value in provenance.items()},
    }
    if cfg.tracking.uri is None:
        return Run(invocation.folder, params, tags)
    return tracking.start(
        **{key: cfg.tracking[key] for key in ("uri", "artifacts", "experiment")},
        run_name=run_name(cfg, invocation),
        folder=invocation.folder,
        params=params,
        tags=tags,
        run_id=invocation.run_id,
    )


@ignored(signal.SIGTERM, signal.SIGHUP)  # a second one, when the first has ended the run, would leave it without an end
def _end(folder: Path, tracked_run: Run, status: str, note: str | None) -> None:
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            tracked_run.log_file(path)
    try:
        write_whole(folder / STATUS, f"{status}\n" + (f"{note}\n" if note else ""))
    except OSError as error:
        log.warning("%s cannot be written: %s", folder / STATUS, error)
    tracked_run.finish(status, note)  # last: Ctrl-C may end its wait for the store


def epoch_metrics(record: EpochRecord, evaluated_on: str) -> dict[str, float]:
    """An epoch's record under the names of the metrics; MLflow's compare page ranks by the first a run ever logs."""
    return {
        f"{evaluated_on}/accuracy": record.eval_accuracy,
        f"{evaluated_on}/loss": record.eval_loss,
        "train/accuracy": record.train_accuracy,
        "train/loss": record.train_loss,
        "schedule/lr": record.lr,
        "speed/images_per_second": record.images_per_second,
        "speed/epoch_seconds": record.epoch_seconds,
    }


def log_range_test(folder: Path, tracked_run: Run) -> None:
    """The LR finder's curve, where there is one; after the epochs, since MLflow's compare page ranks by the first metric."""
    if (folder / "lr_finder.csv").exists():
        rows = read_csv(folder / "lr_finder.csv")
        tracked_run.log_series(
            (f"lr_finder/{key}", row[key], int(row["iteration"])) for row in rows for key in ("loss", "lr")
        )


def compared_params(cfg: DictConfig, invocation: Invocation) -> dict[str, Any]:
    """Flat dotted keys and their values, what was varied and given first, as a run's page in MLflow shows them.

    `scheduler.max_lr`, which may have to be found first, is logged when it is known. Of a task on a checkpoint only what
    was given and what the checkpoint brings along: how it was trained is in the configuration of its own run.
    """
    container = without_environment(cfg)
    values = dict(schema.leaves(container))
    given: list[str] = []
    groups = [*COMPARED_GROUPS, *(["model"] if invocation.choices.get("model", USUAL_MODEL) != USUAL_MODEL else [])]
    for override in invocation.overrides:
        name, _, value = override.lstrip("+").partition("=")
        if value.startswith("{"):  # a section written out: what it says counts, not the option that it is merged into
            given += [key for key in values if key.startswith(f"{name}.")]
            groups = [group for group in groups if group != name]
        elif value.startswith("[") and isinstance(items := _value_at(container, name), list):
            given.append(name)
            values[name] = items
            groups = [group for group in groups if name != f"{group}.transforms"]
        else:
            given.append(name)
    keys = [*ALWAYS_COMPARED, *given, *invocation.preset, *COMPARED]
    if cfg.checkpoint is not None:
        groups = [group for group in groups if group in given]
        keys = [key for key in keys if key in given or key.startswith(FROM_CHECKPOINT)]
    params: dict[str, Any] = {group: invocation.choices.get(group) for group in groups}
    for key in keys:
        room = len(params) < MOST_PARAMS - 1  # scheduler.max_lr is the last
        if room and values.get(key) is not None and not key.startswith(NOT_COMPARED):
            params[key] = values[key]
    first = [key for key in (*invocation.varied, *given) if key in params]
    return {key: params[key] for key in dict.fromkeys([*first, *params])}


def _value_at(container: Any, key: str) -> Any:
    for part in key.split("."):
        inside = dict(enumerate(container)) if isinstance(container, list) else container
        container = inside.get(int(part) if part.isdigit() else part) if isinstance(inside, dict) else None
    return container


def run_name(cfg: DictConfig, invocation: Invocation) -> str:
    """`tracking.run_name`, or the preset and what was overridden, as far as MLflow's databases have room."""
    if invocation.name:
        return invocation.name[:LONGEST_NAME]
    if cfg.tracking.run_name:
        return without_environment(cfg)["tracking"]["run_name"][:LONGEST_NAME]
    presets = [override.partition("=")[2] for override in invocation.overrides if override.startswith("experiment=")]
    preset = invocation.choices.get("experiment") or next(iter(presets), None)  # of several, Hydra names none
    named = [preset or "session_10"] if cfg.task == "train" else [*([preset] if preset else []), cfg.task]
    aside = tuple(key for key in NOT_COMPARED if key != "scheduler.max_lr")
    given = [override for override in invocation.overrides if not override.startswith((*aside, "task=", "checkpoint="))]
    name, left_out = " ".join(named), ""
    for override in given:  # whole ones: half a value is another one
        if len(name) + len(override) < LONGEST_OWN_NAME:
            name += f" {override}"
        else:
            left_out = " ..."
    return name + left_out
