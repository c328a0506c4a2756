"""Going on with an interrupted run: finding it, its own configuration, and how it was asked for."""

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from resnet_cifar import schema
from resnet_cifar.delivery import read_records
from resnet_cifar.errors import CheckpointError, ConfigError, StorageError
from resnet_cifar.hydra_setup import outputs, set_by_presets
from resnet_cifar.recording import Invocation
from resnet_cifar.run_folder import HYDRA_FILE, find_run, run_id, status
from resnet_cifar.suggestions import quoted
from resnet_cifar.tracked_run import SUMMARY

MOVABLE = ("data.root=", "tracking.uri=")


def command_line(argv: list[str]) -> list[str] | None:
    """The command line that continues the run `resume=...` names, in its folder; None when that run is finished.

    Beside it only `data.root=...` and `tracking.uri=...` are taken: the images or the server may have moved.

    Raises:
        ConfigError: something else is given beside it, which would change what is continued.
        CheckpointError: there is no such run.
        StorageError: its folder cannot be written.
    """
    given = next(argument for argument in argv if argument.lstrip("+").startswith("resume="))
    moved = [argument for argument in argv if argument.startswith(MOVABLE)]
    beside = [argument for argument in argv if argument not in (given, *moved)]
    if beside:
        raise ConfigError(f"A run is resumed with its own configuration: leave out {' '.join(beside)}")
    folder = find_run(given.partition("=")[2].strip("'\""), Path(outputs()), "resume")
    if not (folder / HYDRA_FILE).is_file():
        raise CheckpointError(
            f"{folder} is no run's own folder: there is no {HYDRA_FILE} in it. Give that, or the run's id"
        )
    if status(folder)[0] == "FINISHED":
        return None
    if not all(os.access(path, os.W_OK) for path in (folder, folder / "run.log") if path.exists()):
        raise StorageError(f"{folder} cannot be written: only who may write there can go on with the run.")
    return [f"resume={quoted(folder)}", *moved, f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]


def saved_run(folder: Path, root: str | None = None, uri: str | None = None) -> tuple[DictConfig, Invocation]:
    """The configuration a run started with, checked as if it were given now, and how it was asked for.

    `root` is where its images are now, `uri` where its tracking store is, if that has been said. Otherwise the store is the one
    that it was last in: the address in the configuration may be one from the working directory of that time.

    Raises:
        CheckpointError: one of its files cannot be read, or its values are no longer allowed.
    """
    try:
        cfg = OmegaConf.load(folder / "config.yaml")
        if root is not None and "root" in cfg.data.dataset:
            cfg.data.root = cfg.data.dataset.root = root
        starts = [record for record in read_records(folder / "tracking.jsonl") if record["kind"] == "start"]
        if uri is not None or starts:
            cfg.tracking.uri = uri or starts[-1]["uri"]
        schema.check(cfg)
        hydra = OmegaConf.load(folder / HYDRA_FILE).hydra
    except (ConfigError, OmegaConfBaseException, YAMLError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"The run in {folder} cannot go on, its configuration cannot be used: {reason}"
        ) from error
    known, overrides = run_id(folder), tuple(OmegaConf.to_container(hydra.overrides.task, resolve=False))
    recorded = _was_recorded(folder, known)
    invocation = Invocation(
        folder=folder,
        overrides=overrides,
        choices=dict(hydra.runtime.choices),
        preset=() if recorded else set_by_presets(hydra.runtime, overrides),
        resumed=True,
        run_id=known,
        recorded=recorded,
    )
    return cfg, invocation


def _was_recorded(folder: Path, run: str | None) -> bool:
    """Whether the run's parameters are where they belong: a kill may have come between its start and these."""
    if run is None:
        return (folder / SUMMARY).exists()
    return any(record["kind"] == "params" for record in read_records(folder / "tracking.jsonl"))
