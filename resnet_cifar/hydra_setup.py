"""Hydra as this project starts it: where conf/ lies, the resolvers in it, and a Hydra to compose with."""

import argparse
import functools
import os
import secrets
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from resnet_cifar.errors import ConfigError
from resnet_cifar.suggestions import keys
from resnet_cifar.sweep_worker import gpus_of_a_job

VERSION_BASE = "1.3"
if sys.version_info >= (3, 14):
    # Its argparse looks into every help text at once, and one of Hydra 1.3's is no text yet: Hydra's issue 3121.
    argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
PACKAGE = Path(__file__).resolve().parent
# A wheel carries conf/ inside the package; in a checkout it lies beside it.
INSTALLED = (PACKAGE / "conf").is_dir()
CONF = PACKAGE / "conf" if INSTALLED else PACKAGE.parent / "conf"


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
    return _groups(tuple(source.path for source in GlobalHydra.instance().config_loader().get_sources()))


# Cached, since every composition resolves the help text, each job of a sweep is one, and looking takes a tenth of a second.
@functools.cache
def _groups(sources: tuple[str, ...]) -> str:
    loader, lines = GlobalHydra.instance().config_loader(), []
    for group in sorted(set(loader.list_groups("")) - {"experiment", "hydra"}):
        lines += _in_columns(group, ", ".join(sorted(loader.get_group_options(group))))
    return "\n".join(lines)


def _in_columns(name: str, text: str) -> list[str]:
    line = f"{name:<14}{text}".rstrip()
    return textwrap.wrap(line, 80, initial_indent="  ", subsequent_indent=16 * " ", break_on_hyphens=False)


def set_by_presets(runtime: DictConfig, overrides: Sequence[str]) -> tuple[str, ...]:
    """The dotted keys that the presets of a job set, each once; `runtime` is Hydra's own account of it."""
    chosen = [override.partition("=")[2].strip("[]") for override in overrides if override.startswith("experiment=")]
    names = [runtime.choices.experiment] if runtime.choices.get("experiment") else ",".join(chosen).split(",")
    folders = [
        Path(source.path, "experiment") for source in runtime.get("config_sources") or () if source.schema == "file"
    ]
    return tuple(dict.fromkeys(key for name in names if name for key in _keys_of(name.strip(), folders, set())))


def _keys_of(preset: str, folders: Sequence[Path], seen: set[str]) -> Iterator[str]:
    path = next((path for folder in folders if (path := folder / f"{preset}.yaml").is_file()), None)
    if path is None or preset in seen:
        return
    seen.add(preset)
    option = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    for entry in option.pop("defaults", []):
        group, option_of_it = (entry, "") if isinstance(entry, str) else next(iter(entry.items()))
        name = group.partition("@")[0] + (f"/{option_of_it}" if option_of_it else "")
        if name.startswith("/experiment/"):  # another preset, which this one changes
            yield from _keys_of(name.removeprefix("/experiment/"), folders, seen)
        elif not name.startswith("/") and name != "_self_":  # one in the same folder
            yield from _keys_of((PurePosixPath(preset).parent / name).as_posix(), folders, seen)
    yield from keys(option)


# When imported, so that the worker processes of a parallel launcher have them too.
OmegaConf.register_new_resolver("outputs", outputs, replace=True)
OmegaConf.register_new_resolver("presets", presets, replace=True)
OmegaConf.register_new_resolver("groups", groups, replace=True)
OmegaConf.register_new_resolver("gpus_of_a_job", gpus_of_a_job, replace=True)
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(3), use_cache=True, replace=True)


@contextmanager
def started_hydra(arguments: argparse.Namespace) -> Iterator[Hydra]:
    """A Hydra with this command line's --config-path and --config-dir, for as long as the context lasts.

    Raises:
        ConfigError: there is no such --config-dir.
    """
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


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The configuration itself, taken out of what Hydra needs to run it."""
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
