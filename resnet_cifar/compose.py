"""From the command line to configurations: what Hydra is going to run, composed once before it starts."""

import argparse
import inspect
import os
import re
import secrets
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from hydra import version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from resnet_cifar.errors import ConfigError
from resnet_cifar.fingerprint import config_hash, sweep_id
from resnet_cifar.suggestions import closest, did_you_mean, dotted, keys
from resnet_cifar.sweep_worker import gpus_of_a_job

VERSION_BASE = "1.3"
PACKAGE = Path(__file__).resolve().parent
# A wheel carries conf/ inside the package; in a checkout it lies beside it.
INSTALLED = (PACKAGE / "conf").is_dir()
CONF = PACKAGE / "conf" if INSTALLED else PACKAGE.parent / "conf"
# The plugins' launchers behind our presets, and the extra that installs each.
LAUNCHER_EXTRAS = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "cluster"}
HYDRA_FILE = Path(".hydra", "hydra.yaml")  # in a run's folder: how Hydra was called
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


def outputs() -> str:
    """The `${outputs:}` of conf/config.yaml: the checkout's outputs/, or of the working directory for an installed wheel."""
    return str((Path.cwd() if INSTALLED else PACKAGE.parent) / "outputs")


def presets() -> str:
    """The `${presets:}` of the help text: a line for each experiment/*.yaml, the first of its header; `--config-dir`'s too."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    folders = [Path(source.path, "experiment") for source in sources if source.scheme() == "file"]
    paths = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}  # the first one counts
    lines = []
    for _, path in sorted(paths.items()):
        comments = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        purpose = next((line for line in comments if not line.startswith("@package")), "")
        lines += _in_columns(path.stem, purpose)
    return "\n".join(lines)


def groups() -> str:
    """The `${groups:}` of the help text: the options of each group but the presets, those of `--config-dir` among them."""
    loader, lines = GlobalHydra.instance().config_loader(), []
    for group in sorted(set(loader.list_groups("")) - {"experiment", "hydra"}):
        lines += _in_columns(group, ", ".join(sorted(loader.get_group_options(group))))
    return "\n".join(lines)


def _in_columns(name: str, text: str) -> list[str]:
    line = f"{name:<14}{text}".rstrip()
    return textwrap.wrap(line, 80, initial_indent="  ", subsequent_indent=16 * " ", break_on_hyphens=False)


# When imported, so that the worker processes of a parallel launcher have them too.
OmegaConf.register_new_resolver("outputs", outputs, replace=True)
OmegaConf.register_new_resolver("presets", presets, replace=True)
OmegaConf.register_new_resolver("groups", groups, replace=True)
OmegaConf.register_new_resolver("gpus_of_a_job", gpus_of_a_job, replace=True)
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(3), use_cache=True, replace=True)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as Hydra's own parser reads it; raises ConfigError for what it would refuse with a page of usage."""

    def refuse(message: str) -> None:
        raise ConfigError(f"{message}; python run.py --help shows what there is")

    parser = get_args_parser()
    parser.error = refuse
    arguments, unknown = parser.parse_known_args(argv)
    options = [option for option in unknown if option.startswith("-")]
    if options:
        key, _, value = options[0].lstrip("-").partition("=")
        hint = did_you_mean(key, _known_keys(arguments), f"={value}" if value else "=...")
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
    return arguments


def quoted(path: Path | str) -> str:
    """The path as a value on Hydra's command line, whatever characters it has."""
    return "'" + str(path).replace("'", "\\'") + "'"


def compose(arguments: argparse.Namespace) -> Composition:
    """Everything Hydra is going to run: one job, or all those of a sweep; ConfigError for what it cannot compose."""
    try:
        with _hydra(arguments) as hydra:
            return _composition(hydra, arguments)
    except (HydraException, OmegaConfBaseException, yaml.MarkedYAMLError, ValueError) as error:
        raise ConfigError(_reason(error, arguments)) from error


def start_job(overrides: Sequence[str], job: Callable[[DictConfig], Any]) -> Any:
    """What `job` returns when Hydra runs it with these overrides: in a run folder of its own, with its logging set up."""
    with _hydra(parse_arguments(overrides)) as hydra:
        return hydra.run("config", job, list(overrides)).return_value


@contextmanager
def _hydra(arguments: argparse.Namespace) -> Iterator[Hydra]:
    version.setbase(VERSION_BASE)
    search_path = create_automatic_config_search_path(None, "resnet_cifar.__main__", arguments.config_path or str(CONF))
    if arguments.config_dir is not None:
        if not os.path.isdir(arguments.config_dir):
            raise ConfigError(f"--config-dir {arguments.config_dir}: there is no such folder")
        path = f"file://{os.path.abspath(arguments.config_dir)}"
        search_path.prepend("command-line", path, SearchPathQuery(provider="schema"))
    try:
        yield Hydra.create_main_hydra2("resnet_cifar", search_path)
    finally:
        GlobalHydra.instance().clear()


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
    overrides = _as_written(cfg)
    if mode == RunMode.RUN:
        folder = None
        with suppress(OmegaConfBaseException):
            folder = Path(str(cfg.hydra.run.dir)).absolute()
        return Composition([(_without_hydra(cfg), overrides)], folder=folder)
    if not cfg.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        # The sweeper makes its jobs up while it runs: what can be known before is what they have in common.
        return _with_sweep([(cfg, overrides)], overrides, known=False)
    params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *overrides])
    jobs = BasicSweeper.split_arguments(parsed, None)[0]
    if not jobs:
        given = " ".join([*params, *overrides])
        raise ConfigError(f"the sweep has no job, since a glob() or range() in it has no value: {given}")
    composed = [(loader.load_sweep_config(cfg, list(job)), list(job)) for job in jobs]
    return _with_sweep(composed, [*params, *overrides], known=True)


def _with_sweep(jobs: Jobs, overrides: list[str], known: bool) -> Composition:
    """The jobs, still with their `hydra`, as those of a sweep; `known` says whether they are all of them."""
    launched = [cfg.copy() for cfg, _ in jobs]
    composed = [(_without_hydra(cfg), job) for cfg, job in jobs]
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


def _as_written(cfg: DictConfig) -> list[str]:
    # Iterated over, the list would resolve an override's ${...}.
    return OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _reason(error: Exception, arguments: argparse.Namespace) -> str:
    """Hydra's, OmegaConf's or YAML's error in one or two lines that name the key and what would be right."""
    if isinstance(error, yaml.MarkedYAMLError):
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        if dotted(key) != key:
            return f"cannot read {key}: a place in a list is written with a dot: {dotted(key)}{equals}{value}"
        if not equals:
            spaced = any(override.startswith("=") or override.endswith("=") for override in arguments.overrides)
            hint = ", without a space" if spaced else _option_called(key)
            return f"cannot read {key}: settings are written key=value{hint}"
        if value.startswith("~") and value[1:2] not in ("", "/"):
            return f"cannot read {error.override}: a value does not begin with ~, write a home folder out"
        if value.startswith("~"):
            return f"cannot read {error.override}: write the home folder out, \"{key}='$HOME{value[1:]}'\""
        written = f"{key}={quoted(value)}"
        written = shlex.quote(written) if set('$`"\\!') & set(written) else f'"{written}"'
        return f"cannot read {error.override}: special characters want quotes, the shell's and Hydra's: {written}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error)
    first_line = (str(error) or str(error.__cause__)).splitlines()[0]
    if ambiguous := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?: requires|$)", first_line):
        return f"{ambiguous[1]} is a sweep over several values: run it with -m, python run.py -m {ambiguous[1]}"
    if present := re.match(r"Multiple values for (\w+)|Could not append .* already at '([^']*)'", first_line):
        key = present[1] or present[2]
        return f"{key} has a value already: write {key}=..., once and without a +"
    if unknown := re.match(r"Could not (?:override|delete from config\.) '([^']*)'", first_line):
        key = unknown[1]
        given = [override.partition("=") for override in arguments.overrides]
        value = next((equals + value for name, equals, value in given if name == key), "")
        if key.startswith("hydra.launcher."):
            another = not any(override.startswith("hydra/launcher=") for override in arguments.overrides)
            return f"{key} is no key of this launcher{': give hydra/launcher=parallel or another' if another else ''}"
        if options := _options_with(key):
            return f"{key} is not a key here: it goes with {' or '.join(options)}"
        return f"{key} is not a key{did_you_mean(key, _known_keys(arguments), value) or _with_a_plus(key, value, arguments)}"
    return f"{first_line} (given: {' '.join(arguments.overrides)})"


def _option_called(name: str) -> str:
    from resnet_cifar.schema import Task  # late: --help and --cfg need no types

    options = [("task", task) for task in get_args(Task)] + [
        (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml")
    ]
    meant = sorted(f"{key}={option}" for key, option in options if option == name)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _options_with(key: str) -> list[str]:
    """The options of conf/ that have the key which the chosen ones lack, as `scheduler=one_cycle`."""
    section, _, name = key.partition(".")
    found = []
    for path in sorted((CONF / section).glob("*.yaml")) if name and section != "experiment" else ():
        with suppress(yaml.YAMLError, OmegaConfBaseException):
            option = OmegaConf.load(path)
            if name != "defaults" and name in option.get(section, option):
                found.append(f"{section}={path.stem}")
    return found


def _with_a_plus(key: str, value: str, arguments: argparse.Namespace) -> str:
    """For a key that is not in the configuration and could be: what a `_target_` or Grad-CAM takes beside what is there."""
    from resnet_cifar.targets import resolve  # late: the target's own imports take seconds

    section, _, name = key.rpartition(".")
    if not section or not value:
        return ""
    if section == "explain.layers":
        return f"; another layer wants a +: +{key}{value}"
    target = OmegaConf.select(_group_choices_alone(arguments), f"{section}._target_")
    with suppress(ConfigError, ValueError):  # a target that cannot be imported, or has no signature
        if target and (taken := closest(name, inspect.signature(resolve(target)).parameters)):
            return f"; another argument of {target.rpartition('.')[2]} wants a +: +{section}.{taken[0]}{value}"
    return ""


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = error.missing_cfg_file.rpartition("/")
    if group == "hydra/launcher" and option in LAUNCHER_EXTRAS:
        return f'hydra/launcher={option} is not installed: pip install -e ".[{LAUNCHER_EXTRAS[option]}]"'
    if not error.options:
        return str(error).splitlines()[0]
    return f"{group}={option}: choose from {', '.join(error.options)}{did_you_mean(option, error.options)}"


def _known_keys(arguments: argparse.Namespace) -> list[str]:
    """Every key that can be overridden, and the groups."""
    known = keys(OmegaConf.to_container(_group_choices_alone(arguments), resolve=False))
    return [*(key for key in known if not key.endswith("._target_")), *_groups()]


def _group_choices_alone(arguments: argparse.Namespace) -> DictConfig:
    """The configuration as composed from the command line's group choices alone, as far as they are right."""
    choices = [override for override in arguments.overrides if override.partition("=")[0] in _groups()]
    for overrides in (choices, []):
        with suppress(ConfigCompositionException), _hydra(arguments) as hydra:
            return _without_hydra(hydra.config_loader.load_configuration("config", overrides, RunMode.MULTIRUN))
    return OmegaConf.create()


def _groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir()}
