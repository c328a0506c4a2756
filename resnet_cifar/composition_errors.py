"""Why a command line cannot be composed: Hydra's, OmegaConf's and YAML's errors in words that say what would be right."""

import argparse
import inspect
import re
import shlex
from contextlib import suppress
from typing import get_args

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from resnet_cifar.errors import ConfigError
from resnet_cifar.hydra_setup import CONF, INSTALLED, started_hydra, without_hydra
from resnet_cifar.suggestions import closest, did_you_mean, dotted, keys, program, quoted

# The plugins' launchers behind our presets, and the extra that installs each.
LAUNCHER_EXTRAS = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "cluster"}

# Sections of Hydra's own for entries of the user's.
OPEN = ("hydra.job.env_set.", "hydra.callbacks.", "hydra.sweeper.params.")

# What Hydra, OmegaConf and YAML raise for files and values of a user's; the last four where Hydra did not expect them.
COMPOSITION_ERRORS = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError),
    *(RecursionError, AssertionError, AttributeError, TypeError),
)


def explained(error: Exception, arguments: argparse.Namespace) -> str:
    """Hydra's, OmegaConf's or YAML's error in one or two lines that name the key and what would be right."""
    if isinstance(error, yaml.MarkedYAMLError):
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override), arguments)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error)
    first_line, *more = (str(error) or str(error.__cause__ or type(error).__name__)).splitlines()
    if first_line.endswith("raised while composing config:"):
        first_line = " ".join([first_line, *more[:1]])
    if first_line.startswith("Error merging override") and error.__cause__ is not None:
        first_line += f": {str(error.__cause__).partition(chr(10))[0]}"
    if ambiguous := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?: requires|$)", first_line):
        options = [("--config-dir", arguments.config_dir), ("--config-path", arguments.config_path)]
        given = [word for option, value in options if value for word in (option, value)]
        command = shlex.join(["-m", *given, *arguments.overrides])
        return f"{ambiguous[1]} is a sweep over several values: run it with -m,\n{program()} {command}"
    if present := re.match(r"Multiple values for (\w+)|Could not append .* already at '([^']*)'", first_line):
        key = present[1] or present[2]
        return f"{key} has a value already: write {key}=..., once and without a +"
    if unknown := re.match(r"Could not (?:override|delete from config\.) '([^']*)'", first_line):
        return _unknown_key(unknown[1], arguments)
    return f"{first_line} (given: {' '.join(arguments.overrides)})"


def _unreadable(override: str, arguments: argparse.Namespace) -> str:
    key, equals, value = override.partition("=")
    if dotted(key) != key:
        return f"cannot read {key}: a place in a list is written with a dot: {dotted(key)}{equals}{value}"
    if not equals:
        spaced = any(override.startswith("=") or override.endswith("=") for override in arguments.overrides)
        hint = ", without a space" if spaced else _option_called(key)
        return f"cannot read {key}: settings are written key=value{hint}"
    if joined := _without_spaces(override, arguments.overrides):
        return f"cannot read {override}: lists and sweeps are written without spaces: {joined}"
    if value.startswith("~") and value[1:2] not in ("", "/"):
        return f"cannot read {override}: a value does not begin with ~, write a home folder out"
    if value.startswith("~"):
        return f"cannot read {override}: write the home folder out, \"{key}='$HOME{value[1:]}'\""
    written = f"{key}={quoted(value)}"
    written = shlex.quote(written) if set('$`"\\!') & set(written) else f'"{written}"'
    return f"cannot read {override}: special characters want quotes, the shell's and Hydra's: {written}"


def _without_spaces(override: str, overrides: list[str]) -> str:
    """A list or a sweep that spaces have parted, put together again; empty where it is none."""
    if override not in overrides:
        return ""
    joined, *rest = overrides[overrides.index(override) :]
    while (
        rest
        and "=" not in rest[0]
        and (joined.endswith(",") or sum(map(joined.count, "[{")) > sum(map(joined.count, "}]")))
    ):
        joined += rest.pop(0)
    return joined if joined != override else ""


def _option_called(name: str) -> str:
    from resnet_cifar.schema import Task  # late: --help and --cfg need no types

    options = [f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.stem == name]
    meant = [f"task={name}"] if name in get_args(Task) else sorted(options)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _unknown_key(key: str, arguments: argparse.Namespace) -> str:
    given = [override.partition("=") for override in arguments.overrides]
    value = next((equals + value for name, equals, value in given if name == key), "")
    if key.startswith("hydra.launcher."):
        another = not any(override.startswith("hydra/launcher=") for override in arguments.overrides)
        return f"{key} is no key of this launcher{': give hydra/launcher=parallel or another' if another else ''}"
    if value and f"{key}.".startswith(OPEN):
        return f"{key} is not there yet; a new one wants a +: +{key}{value}"
    if options := _options_with(key):
        return f"{key} is not a key here: it goes with {' or '.join(options)}"
    known = known_keys(arguments)
    if key in known:  # what is given is a mapping, with a key that is not there
        there = [name for name in re.findall(r"[{,]\s*(\w+)\s*:", value) if f"{key}.{name}" not in known]
        hints = [hint for name in there if (hint := did_you_mean(f"{key}.{name}", known))]
        return f"{key} has no entry of such a name{hints[0] if hints else f'; another one wants a +: +{key}{value}'}"
    if key.startswith("explain.layers.") and value:
        return f"{key} is not a key; another layer wants a +: +{key}{value}"
    return f"{key} is not a key{did_you_mean(key, known, value) or _with_a_plus(key, value, arguments)}"


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
    """For a key that is not in the configuration and could be: what a `_target_` takes beside what is there."""
    from resnet_cifar.targets import resolve  # late: the target's own imports take seconds

    section, _, name = key.rpartition(".")
    if not section or not value:
        return ""
    target = OmegaConf.select(_group_choices_alone(arguments), f"{section}._target_")
    with suppress(ConfigError, ValueError):  # a target that cannot be imported, or has no signature
        if target and (taken := closest(name, inspect.signature(resolve(target)).parameters)):
            return f"; another argument of {target.rpartition('.')[2]} wants a +: +{section}.{taken[0]}{value}"
    return ""


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = error.missing_cfg_file.rpartition("/")
    if group == "hydra/launcher" and option in LAUNCHER_EXTRAS:
        extra = LAUNCHER_EXTRAS[option]
        where = ", in an environment of its own" if extra == "cluster" else ""
        what = f'"resnet-cifar[{extra}]"' if INSTALLED else f'-e ".[{extra}]"'
        return f"hydra/launcher={extra} is not installed: pip install {what}{where}"
    if not error.options:
        return str(error).splitlines()[0]
    return f"{group}={option}: choose from {', '.join(error.options)}{did_you_mean(option, error.options)}"


def known_keys(arguments: argparse.Namespace) -> list[str]:
    """Every key that can be overridden, and the groups."""
    known = keys(OmegaConf.to_container(_group_choices_alone(arguments), resolve=False))
    return [*(key for key in known if not key.endswith("._target_")), *_groups()]


def _group_choices_alone(arguments: argparse.Namespace) -> DictConfig:
    """The configuration as composed from the command line's group choices alone, as far as they are right."""
    choices = [override for override in arguments.overrides if override.partition("=")[0] in _groups()]
    for overrides in (choices, []):
        with suppress(*COMPOSITION_ERRORS), started_hydra(arguments) as hydra:
            return without_hydra(hydra.config_loader.load_configuration("config", overrides, RunMode.MULTIRUN))
    return OmegaConf.create()


def _groups() -> set[str]:
    return {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
