"""A sweep before it runs: its jobs, what is to be done for each, their names, and room for those that run anew."""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from resnet_cifar.artifact_files import write_whole
from resnet_cifar.compose import Sweep, parse_arguments
from resnet_cifar.environment import without_environment
from resnet_cifar.errors import ConfigError
from resnet_cifar.fingerprint import config_hash, source_hash
from resnet_cifar.run_folder import is_stopped, only_process
from resnet_cifar.suggestions import quoted

PLAN, FAILED = "sweep.json", "failed_jobs.txt"
RUN, RESUME, SKIP = "run", "resume", "skip"

_running = (
    contextlib.ExitStack()
)  # holds the folder of the sweep that this process runs, until its end or another sweep


@dataclass(frozen=True)
class Job:
    """A job of a sweep: what it varied, what is to be done, its folder, and the folder with its result, another if skipped."""

    number: int
    name: str
    values: dict[str, str]
    config_hash: str
    action: str
    folder: str
    result: str


@dataclass(frozen=True)
class Plan:
    """A sweep as its jobs and its end find it in its folder's `sweep.json`."""

    id: str
    folder: str
    command: list[str]
    source: str
    jobs: list[Job]

    def save(self) -> None:
        """Write it into the sweep's folder, whole or not at all."""
        path = Path(self.folder) / PLAN
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=1))


def load_plan(folder: Path) -> Plan:
    """The plan of the sweep in `folder`."""
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    return Plan(**{**plan, "jobs": [Job(**job) for job in plan["jobs"]]})


def is_of_this_source(folder: Path) -> bool:
    """Whether the package's source is the one by which the sweep in `folder` ran last: a folder given by hand outlives it."""
    try:
        return json.loads((folder / PLAN).read_text(encoding="utf-8")).get("source") == source_hash()
    except (FileNotFoundError, ValueError):  # a crash of the machine can leave it empty
        return False


def prepare(argv: Sequence[str], sweep: Sweep) -> list[str]:
    """Plan the sweep, make room for the jobs that run anew, and return the command line with the sweep's folder in it.

    Exits with 0 after saying what would run, where that is all that was asked for (`sweep.dry_run=true`).
    """
    from resnet_cifar import parts, sweep_store  # late: torch takes seconds, and MLflow is asked

    settings = sweep.settings.sweep
    for cfg, _ in sweep.jobs if sweep.job_folders else ():  # what made-up jobs have in common is no job
        if cfg.task in ("train", "find_lr"):
            parts.check_targets(cfg)
    if settings.dry_run and not sweep.job_folders:
        raise ConfigError("sweep.dry_run=true: this hydra/sweeper makes its jobs up while it runs; leave dry_run out")
    _check_places(sweep)
    if not settings.dry_run:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        _running.close()
        _running.enter_context(only_process(sweep.folder))
    finished = {} if settings.rerun == "all" else sweep_store.finished_runs(sweep)
    plan = _plan(argv, sweep, finished)
    estimated = sweep_store.estimate(sweep, [job.action for job in plan.jobs]) if plan.jobs else ""
    if settings.dry_run:
        print(dry_run(plan, estimated))
        sys.exit(0)
    plan = _make_room(sweep, plan)
    (sweep.folder / FAILED).unlink(missing_ok=True)
    plan.save()
    if plan.jobs:
        print(heading(plan, estimated), flush=True)
    overrides = parse_arguments(argv).overrides  # which Hydra wants in one row; the last one wins
    place = argv.index(overrides[0]) + len(overrides) if overrides else len(argv)
    return [*argv[:place], f"hydra.sweep.dir={quoted(sweep.folder)}", *argv[place:]]


def _check_places(sweep: Sweep) -> None:
    """Raise ConfigError unless no job is there twice, each has a folder of its own, and all are recorded in one place."""
    seen: list[dict[str, str]] = []
    for (_, overrides), values in zip(sweep.jobs, varied([job for _, job in sweep.jobs]), strict=True):
        if values in seen:
            raise ConfigError(f"the sweep has one job twice: {' '.join(overrides)}")
        seen.append(values)
    if len(set(sweep.job_folders)) < len(sweep.job_folders):
        raise ConfigError("hydra.sweep.subdir gives several jobs one folder: put ${hydra.job.num} into it")
    for key in ("tracking.uri", "tracking.experiment", "output_dir"):
        if len({OmegaConf.select(cfg, key) for cfg, _ in sweep.jobs}) > 1:
            raise ConfigError(
                f"{key} is not the same in all jobs: a sweep is recorded in one place; give one sweep for each"
            )


def _make_room(sweep: Sweep, plan: Plan) -> Plan:
    """Set aside the runs that jobs replace; the plan with each result where it is now.

    Jobs that the sweeper makes up can be any in the sweep's folder. A folder given by hand can hold another job's result.
    """
    made_up = [folder for folder in sorted(sweep.folder.glob("*")) if "_replaced" not in folder.name]
    replaced = [Path(job.folder) for job in plan.jobs if job.action == RUN] if sweep.job_folders else made_up
    moved = {str(folder): str(_set_aside(folder)) for folder in replaced if (folder / "config.yaml").exists()}
    jobs = [
        job if job.action == RUN else dataclasses.replace(job, result=moved.get(job.result, job.result))
        for job in plan.jobs
    ]
    return dataclasses.replace(plan, jobs=jobs)


def _plan(argv: Sequence[str], sweep: Sweep, finished: dict[str, Path]) -> Plan:
    jobs, same_source = [], is_of_this_source(sweep.folder)
    values_of = varied([overrides for _, overrides in sweep.jobs])
    planned = zip(sweep.jobs, values_of, sweep.job_folders, strict=False)  # jobs that are made up have no folders: none
    for number, ((cfg, _), values, folder) in enumerate(planned):
        key = config_hash(cfg)
        goes_on = cfg.sweep.rerun != "all" and same_source and is_stopped(folder, cfg)
        action = SKIP if key in finished else RESUME if goes_on else RUN
        result = str(finished.get(key, folder))
        run_name = without_environment(cfg)["tracking"]["run_name"]
        jobs.append(Job(number, job_name(values, run_name), values, key, action, str(folder), result))
    return Plan(sweep.id, str(sweep.folder), list(argv), source_hash(), jobs)


def varied(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """For each job's overrides, those whose value is not the same in all jobs: key to value."""
    values = [dict(override.lstrip("+").partition("=")[::2] for override in overrides) for overrides in jobs]
    keys = [key for key in values[0] if len({job.get(key) for job in values}) > 1]
    return [{key: job.get(key, "") for key in keys} for job in values]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or all of it where two keys end in the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def short_value(value: str) -> str:
    """A long decimal number to six digits, `0.208333` for `0.20833333333333334`; anything else as it is."""
    try:
        return f"{float(value):.6g}" if len(value) > 8 and not value.isdigit() else value
    except ValueError:
        return value


def job_name(values: dict[str, str], run_name: str | None) -> str:
    """`div_factor=25 seed=1`: what the job varied, after `tracking.run_name` where that is given."""
    names = short_names(list(values))
    varied_values = (f"{names[key]}={short_value(value)}" for key, value in values.items())
    return " ".join([*([run_name] if run_name else []), *varied_values])


def heading(plan: Plan, estimated: str) -> str:
    """The sweep in a line: its id, how many jobs it has, how many of them are to run, and how long that takes."""
    running, count = sum(job.action != SKIP for job in plan.jobs), len(plan.jobs)
    return f"Sweep {plan.id}: {count} job{'s' if count > 1 else ''}, {running} to run, {estimated}"


def dry_run(plan: Plan, estimated: str) -> str:
    """What `sweep.dry_run=true` prints."""
    said = {RUN: "would run", RESUME: "stopped, would go on", SKIP: "finished, would be skipped"}
    lines = [f"{job.number:>4}  {job.name or 'one job':<40}  {said[job.action]}" for job in plan.jobs]
    return "\n".join([heading(plan, estimated), *lines])


def _set_aside(folder: Path) -> Path:
    """Rename the folder of a run that runs anew, so that nothing of it is lost; its new path.

    Raises:
        StorageError: a process is working on it, a cluster's job say, whose sweep has ended.
    """
    places = (folder.with_name(f"{folder.name}_replaced_{number}") for number in itertools.count(1))
    with only_process(folder):
        return folder.rename(next(place for place in places if not place.exists()))
