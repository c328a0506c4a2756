"""Values that are right one by one and cannot be run together, or that a command gives where they would do nothing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from resnet_cifar.suggestions import overridden

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https")
FIRST_BETA = 0.9  # torch's: given beside it, the second one alone was meant


def conflicts(cfg: dict[str, Any]) -> Iterator[str]:
    """One sentence for each combination in a resolved configuration of right types that cannot be run."""
    yield from _task(cfg)
    yield from _devices(cfg)
    yield from _data(cfg)
    yield from _learning_rate(cfg)
    yield from _schedule(cfg["scheduler"])
    yield from _tracking(cfg["tracking"])


def idle(jobs: Sequence[tuple[Mapping[str, Any], Sequence[str]]]) -> Iterator[str]:
    """One sentence for each key that was given and that none of a command's jobs, configuration and overrides, has a use for."""
    first, *others = (dict(_unused(cfg, overrides)) for cfg, overrides in jobs)
    for key, problem in first.items():
        if all(key in other for other in others):
            yield problem


def _unused(cfg: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys that a job was given on purpose and that do nothing in it, each with the sentence that says so."""
    given, max_lr, optimizer = overridden(overrides), cfg["scheduler"].get("max_lr"), cfg["optimizer"]
    # Of the jobs that a sweeper of another kind makes up only what they have in common is known.
    may_search = _searches(cfg) or any(
        "find" in override for override in overrides if override.lstrip("+").startswith(("scheduler.max_lr=", "task="))
    )
    for key in given:
        if key.startswith("lr_finder.") and not may_search:
            yield key, f"{key} would do nothing: it is for task=find_lr, or a training with scheduler.max_lr=find"
    if cfg["task"] != "train":
        return
    if "optimizer.lr" in given and isinstance(max_lr, int | float) and not may_search:
        yield (
            "optimizer.lr",
            f"optimizer.lr={optimizer['lr']} would do nothing beside scheduler.max_lr={max_lr}: "
            "the one-cycle schedule overwrites it;\n"
            "give scheduler.max_lr alone, or scheduler=constant with optimizer.lr",
        )
    overwritten = {}
    if "optimizer.momentum" in given and "momentum" in optimizer:
        overwritten["optimizer.momentum"] = f"optimizer.momentum={optimizer['momentum']}"
    if (first_beta := optimizer.get("betas", [FIRST_BETA])[0]) != FIRST_BETA:
        overwritten["optimizer.betas"] = f"the first of optimizer.betas, {first_beta},"
    for key, momentum in overwritten.items() if cfg["scheduler"].get("cycle_momentum") else ():
        yield (
            key,
            f"{momentum} would do nothing: the one-cycle schedule overwrites it;\n"
            "give scheduler.cycle_momentum=false with it, or ++scheduler.base_momentum and max_momentum in its place",
        )


def _searches(cfg: Mapping[str, Any]) -> bool:
    """Whether the LR finder runs."""
    return cfg["task"] == "find_lr" or (cfg["task"] == "train" and cfg["scheduler"].get("max_lr") == "find")


def _task(cfg: dict[str, Any]) -> Iterator[str]:
    task, checkpoint = cfg["task"], cfg["checkpoint"]
    if task in ("evaluate", "explain") and checkpoint is None:
        yield f"task={task} needs checkpoint=...: a checkpoint file, a run folder or an MLflow run id"
    if task in ("train", "find_lr", "sync") and checkpoint is not None:
        yield f"checkpoint={checkpoint} would do nothing with task={task}: it is for task=evaluate and task=explain"
    if cfg["explain"]["images"] is not None and task != "explain":
        yield f"explain.images={cfg['explain']['images']} would do nothing with task={task}: it is for task=explain"


def _devices(cfg: dict[str, Any]) -> Iterator[str]:
    device, devices = cfg["trainer"]["device"], cfg["trainer"]["devices"]
    if devices == 1:
        return
    if cfg["task"] != "train":
        yield f"trainer.devices={devices} would do nothing with task={cfg['task']}: it is for task=train"
    if cfg["data"]["batch_size"] < devices:
        yield f"trainer.devices={devices} should be at most data.batch_size={cfg['data']['batch_size']}"
    if ":" in device:
        yield f"trainer.device={device} names one GPU beside trainer.devices={devices}: give trainer.device=cuda"


def _data(cfg: dict[str, Any]) -> Iterator[str]:
    data = cfg["data"]
    if "root" in data["dataset"] and data["dataset"]["root"] is None:
        yield "data.root is empty: it should be the folder that holds the images, or where they are downloaded to"
    digits = data["dataset"]["_target_"].endswith(".Digits")
    if digits and cfg["trainer"]["flip_tta"] and cfg["task"] in ("train", "evaluate"):
        yield "trainer.flip_tta makes other signs of digits: give trainer.flip_tta=false beside data=digits"
    if cfg["task"] not in ("train", "find_lr"):
        return
    size = data["train_size"]
    if size is not None and data["batch_size"] > size:
        yield f"data.batch_size={data['batch_size']} should be at most data.train_size={size}"
    for place, transform in enumerate(cfg["augmentation"]["transforms"]):
        if not transform["_target_"].endswith(".ProgressiveResize"):
            continue
        if transform["first"] % 4:
            yield f"augmentation.transforms.{place}.first={transform['first']} should be a multiple of 4: sizes grow by 4"
        if transform["epochs"] > cfg["trainer"]["epochs"]:
            yield (
                f"augmentation.transforms.{place}.epochs={transform['epochs']} should be at most trainer.epochs="
                f"{cfg['trainer']['epochs']}: training would end on small images"
            )
    flips = [each["_target_"] for each in cfg["augmentation"]["transforms"] if each["_target_"].endswith("Flip")]
    if digits and flips:
        yield f"{flips[0].rpartition('.')[2]} makes other signs of digits: give augmentation=crop_cutout beside data=digits"


def _learning_rate(cfg: dict[str, Any]) -> Iterator[str]:
    if not _searches(cfg):
        return
    start, end = cfg["optimizer"]["lr"], cfg["lr_finder"]["end_lr"]
    if end <= start:
        yield (
            f"lr_finder.end_lr={end} should be above optimizer.lr={start}, where the LR finder starts;\n"
            "to train without a search give the peak: scheduler.max_lr"
        )
    if cfg["param_groups"]["norm_bias_lr_factor"] != 1:
        yield "param_groups.norm_bias_lr_factor would do nothing in the LR finder: give scheduler.max_lr as a number"


def _schedule(scheduler: dict[str, Any]) -> Iterator[str]:
    if scheduler.get("three_phase") and scheduler["pct_start"] > 0.5:  # torch would cut off what follows
        rise = scheduler["pct_start"]
        yield f"scheduler.pct_start={rise} should be at most 0.5 with scheduler.three_phase=true: the fall is as long as the rise"


def _tracking(tracking: dict[str, Any]) -> Iterator[str]:
    uri = tracking["uri"]
    if uri is None:
        return
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    if scheme == "postgres":
        yield "tracking.uri starts with postgres://: MLflow's databases are written postgresql://host/database"
    elif ":memory:" in uri:
        yield f"tracking.uri={uri} ends with the process: give sqlite:///path/to/mlflow.db, or tracking=none"
    elif scheme == "sqlite" and not uri.startswith("sqlite:///"):
        yield f"tracking.uri={uri} should have three slashes before the path: sqlite:///path/to/mlflow.db"
    elif scheme not in (*DATABASES, *SERVERS):
        yield f"tracking.uri={uri} should be a database or a server: sqlite:///path/to/mlflow.db or http://host:5000"
    if tracking["experiment"] is None:
        yield "tracking.experiment is empty: it should be the name of the MLflow experiment that lists the runs"
    if scheme in DATABASES and tracking["artifacts"] is None:
        yield f"tracking.artifacts is empty: with a database ({scheme}) it should be the folder that keeps the files"
