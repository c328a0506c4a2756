"""From the command line to configurations: what Hydra is going to run, composed once before it starts."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from resnet_cifar.composition_errors import COMPOSITION_ERRORS, explained, known_keys
from resnet_cifar.errors import ConfigError
from resnet_cifar.fingerprint import config_hash, sweep_id
from resnet_cifar.hydra_setup import started_hydra, without_hydra
from resnet_cifar.passwords import has_password, is_secret
from resnet_cifar.run_folder import HYDRA_FILE
from resnet_cifar.suggestions import did_you_mean, overridden, program

SWEEP_ID = "SWEEP_ID"  # in hydra.sweep.dir it stands for the hash that is known when all jobs are


Jobs = list[tuple[DictConfig, list[str]]]  # configuration and overrides of each


@dataclass(frozen=True)
class Sweep:
    """A sweep before it starts: its id, its folder, its jobs, and for each the chosen option of `data` and its folder.

    Where the sweeper makes jobs up there are no folders.
    """

    id: str
    folder: Path
    jobs: Jobs
    data_sets: tuple[str | None, ...]
    job_folders: tuple[Path, ...]

    @property
    def settings(self) -> DictConfig:
        """The first job's configuration, for what all have in common: `tracking` and `sweep`."""
        return self.jobs[0][0]


@dataclass(frozen=True)
class Composition:
    """What a command line asks for: its jobs, and the sweep they belong to, or the run's folder.

    The folder is None too where its name has no value, which the check of every value says.
    """

    jobs: Jobs
    sweep: Sweep | None = None
    folder: Path | None = None


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as Hydra's own parser reads it; raises ConfigError for what it would refuse with a page of usage."""

    def refuse(message: str) -> None:
        raise ConfigError(f"{message}; {program()} --help shows what there is")

    parser = get_args_parser()
    parser.error = refuse
    arguments, unknown = parser.parse_known_args(argv)
    options = [option for option in unknown if option.startswith("-")]
    if options:
        key, _, value = options[0].lstrip("-").partition("=")
        hint = did_you_mean(key, known_keys(arguments), f"={value}" if value else "=...")
        raise ConfigError(f"there is no option {options[0]}: settings are written key=value{hint}")
    if unknown:
        raise ConfigError(
            f"settings stand on both sides of an option: write {' '.join(unknown)} together with the others"
        )
    modes = [arguments.run, arguments.cfg, arguments.multirun, arguments.shell_completion, arguments.info]
    if sum(map(bool, modes)) > 1:
        refuse("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if arguments.resolve and not (arguments.cfg or arguments.help):
        refuse("--resolve goes with --cfg or --help")
    if arguments.package and not arguments.cfg:
        refuse("--package goes with --cfg")
    return arguments


def compose(arguments: argparse.Namespace) -> Composition:
    """Everything Hydra is going to run: one job, or all those of a sweep; ConfigError for what it cannot compose."""
    for override in arguments.overrides:
        key, _, value = override.lstrip("+").partition("=")
        secret = key.startswith("hydra.job.env_set.") and _is_written_secret(key.rpartition(".")[2], value)
        if secret or (key.startswith("hydra.") and has_password(value)):
            raise _written(key)
    try:
        with started_hydra(arguments) as hydra:
            return _composition(hydra, arguments)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explained(error, arguments)) from error
    except OSError as error:
        raise ConfigError(f"{error.filename or 'the working directory'} cannot be read: {error.strerror}") from error


def _is_written_secret(name: str, value: str) -> bool:
    return is_secret(name) and "${" not in value


def _written(key: str) -> ConfigError:
    return ConfigError(f"{key} would be written into files: give the secret in the shell's environment")


def start_job(argv: Sequence[str], job: Callable[[DictConfig], Any]) -> Any:
    """What `job` returns when Hydra runs it with this command line: in a run folder of its own, with its logging set up."""
    arguments = parse_arguments(argv)
    with started_hydra(arguments) as hydra:
        return hydra.run(arguments.config_name or "config", job, arguments.overrides).return_value


def _composition(hydra: Hydra, arguments: argparse.Namespace) -> Composition:
    loader = hydra.config_loader
    given = OverridesParser.create(config_loader=loader).parse_overrides(arguments.overrides)
    swept = arguments.multirun or any(override.is_sweep_override() for override in given)
    mode = RunMode.MULTIRUN if swept else RunMode.RUN
    name = arguments.config_name or "config"
    cfg = loader.load_configuration(name, arguments.overrides, mode, validate_sweep_overrides=False)
    # As Hydra does it: hydra.mode=MULTIRUN, in a preset too, asks for a sweep as -m does.
    mode = RunMode.MULTIRUN if arguments.multirun else cfg.hydra.mode or RunMode.RUN
    loader.validate_sweep_overrides_legal(given, mode, from_shell=True)
    _check_hydra(cfg, arguments, mode)
    # Iterated over, the list would resolve an override's ${...}.
    overrides = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
    if mode == RunMode.RUN:
        folder = None
        with suppress(OmegaConfBaseException):
            folder = Path(str(cfg.hydra.run.dir)).absolute()
        return Composition([(without_hydra(cfg), overrides)], folder=folder)
    if not cfg.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        # The sweeper makes its jobs up while it runs: what can be known before is what they have in common.
        return _with_sweep([(cfg, overrides)], overrides, known=False)
    params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *overrides])
    for override in parsed:
        if getattr(override.value(), "shuffle", False):  # Hydra draws once more when it starts the jobs
            raise ConfigError(f"{override.input_line}: shuffle() has another order each time; leave it out")
    jobs = BasicSweeper.split_arguments(parsed, None)[0]
    if not jobs:
        given = " ".join([*params, *overrides])
        raise ConfigError(f"the sweep has no job, since a glob() or range() in it has no value: {given}")
    composed = [(loader.load_sweep_config(cfg, list(job)), list(job)) for job in jobs]
    return _with_sweep(composed, [*params, *overrides], known=True)


def _check_hydra(cfg: DictConfig, arguments: argparse.Namespace, mode: RunMode) -> None:
    """Raise ConfigError for keys of Hydra's own that would do nothing here, or harm a run."""
    keys = overridden(arguments.overrides)
    shown_only = arguments.cfg or arguments.info or arguments.help
    for key in keys if not shown_only else ():
        if mode == RunMode.RUN and key.startswith(
            ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep.", "hydra.sweeper")
        ):
            raise ConfigError(f"{key} would do nothing for a single run: give it with -m")
        if mode == RunMode.MULTIRUN and key.startswith("hydra.run."):
            raise ConfigError(f"{key} would do nothing in a sweep: its folder is hydra.sweep.dir")
    variables = OmegaConf.to_container(cfg.hydra.job.env_set, resolve=False)
    for name, value in variables.items():
        if _is_written_secret(str(name), str(value)):
            raise _written(f"hydra.job.env_set.{name}")
    if shown_only:
        return
    if cfg.hydra.job.chdir:
        raise ConfigError(
            "hydra.job.chdir=true: paths are from where a command is given, in its jobs too; leave it out"
        )
    resumable = cfg.hydra.output_subdir == str(HYDRA_FILE.parent)
    if OmegaConf.select(cfg, "task") == "train" and not resumable and "resume" not in keys:
        raise ConfigError("hydra.output_subdir: a run without its .hydra folder could not be resumed; leave it out")


def _with_sweep(jobs: Jobs, overrides: list[str], known: bool) -> Composition:
    """The jobs, still with their `hydra`, as those of a sweep; `known` says whether they are all of them."""
    launched = [cfg.copy() for cfg, _ in jobs]
    composed = [(without_hydra(cfg), job) for cfg, job in jobs]
    try:
        name = sweep_id(overrides, [config_hash(cfg) for cfg, _ in composed])
    except (OmegaConfBaseException, TypeError, AttributeError):
        return Composition(composed)  # the check of every value comes next, and says which is wrong
    folder = Path(launched[0].hydra.sweep.dir.replace(SWEEP_ID, name)).absolute()
    folders = []
    for number, cfg in enumerate(launched if known else []):
        with open_dict(cfg):
            cfg.hydra.job.num = number
        folders.append(folder / str(cfg.hydra.sweep.subdir))
    data_sets = tuple(cfg.hydra.runtime.choices.get("data") for cfg in launched)
    return Composition(composed, Sweep(name, folder, composed, data_sets, tuple(folders)))
