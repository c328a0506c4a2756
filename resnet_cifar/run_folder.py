"""What a run's folder says: whose it is, how the run ended, and whether a process is at work in it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from resnet_cifar.console import setting
from resnet_cifar.delivery import read_records
from resnet_cifar.errors import CheckpointError, StorageError
from resnet_cifar.fingerprint import config_hash
from resnet_cifar.suggestions import program

STATUS = "status.txt"
HYDRA_FILE = Path(".hydra", "hydra.yaml")  # how Hydra was called


def status(folder: Path) -> tuple[str, str]:
    """FINISHED, FAILED or KILLED and the reason, from a run's folder; empty where the run has not come to an end."""
    path = folder / STATUS
    word, _, reason = path.read_text(encoding="utf-8").partition("\n") if path.exists() else ("", "", "")
    return word, reason.strip()


def configuration(folder: Path) -> DictConfig | None:
    """The configuration of the run in the folder, if there is one: a folder given by hand can hold another sweep's."""
    try:
        cfg = OmegaConf.load(folder / "config.yaml")
    except (FileNotFoundError, YAMLError, OmegaConfBaseException):
        return None
    whole = isinstance(cfg, DictConfig) and "tracking" in cfg  # a crash of the machine can leave it empty
    return cfg if whole else None


def has_finished(folder: Path, key: str) -> bool:
    """Whether the folder holds a FINISHED run of the configuration with this hash."""
    cfg = configuration(folder) if status(folder)[0] == "FINISHED" else None
    return cfg is not None and config_hash(cfg) == key


def is_stopped(folder: Path, cfg: DictConfig) -> bool:
    """Whether the folder holds this job, stopped on the way, and tracked where it would be tracked now."""
    if status(folder)[0] in ("FINISHED", "FAILED"):
        return False
    before = configuration(folder)
    if before is None or not (folder / HYDRA_FILE).exists():
        return False
    tracked_alike = (before.tracking.uri, before.tracking.experiment) == (cfg.tracking.uri, cfg.tracking.experiment)
    return tracked_alike and config_hash(before) == config_hash(cfg)


def check_unused(folder: Path) -> None:
    """Raise StorageError where the folder holds a run already."""
    if (folder / "config.yaml").exists():
        goes_on = f",\nor go on with the run: {program()} {setting('resume', folder)}"
        finished = status(folder)[0] == "FINISHED"
        raise StorageError(
            f"{folder} holds a run already: give another folder, or none, as hydra.run.dir{'' if finished else goes_on}"
        )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, or of a sweep, against other processes.

    Raises:
        StorageError: another one holds it.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise StorageError(f"Another process is working in {folder}. Wait for it or stop it.") from error


def find_run(reference: str, outputs: Path, key: str) -> Path:
    """The folder of a run, given as such or as the id of an MLflow run somewhere under `outputs`; `key` is where it was given.

    Raises:
        CheckpointError: there is no such run.
    """
    folder = Path(reference).absolute()
    try:
        if (folder / "config.yaml").is_file():
            return folder
    except OSError as error:  # another user's
        raise CheckpointError(f"{key}={reference} cannot be read: {error.strerror}.") from error
    for journal in outputs.rglob("tracking.jsonl") if reference.isalnum() else ():
        with suppress(OSError):
            if run_id(journal.parent) == reference and (journal.parent / "config.yaml").is_file():
                return journal.parent
    raise CheckpointError(
        f"{key}={reference}: there is no such run. Give the folder of a run, which holds its config.yaml,\n"
        f"or the id of an MLflow run whose folder lies under {outputs}"
    )


def run_id(folder: Path) -> str | None:
    """The MLflow run that the folder's journal belongs to."""
    return next((record["run"] for record in read_records(folder / "tracking.jsonl")), None)
