"""Types and ranges of every key, without a default: a configuration is checked here before anything starts.

The defaults live in conf/. Beside a `_target_` further keys are the target's own keyword arguments, which are checked
against its signature when it is built (targets.py).
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NotRequired

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

from resnet_cifar.conflicts import conflicts, idle
from resnet_cifar.environment import without_environment
from resnet_cifar.errors import ConfigError
from resnet_cifar.passwords import has_password
from resnet_cifar.suggestions import did_you_mean, keys
from resnet_cifar.targets import ALLOWED, is_allowed

GLOBAL = ": the first line of such a file has to be # @package _global_"


def _matching(
    pattern: str, allowed: str, when: type[AfterValidator | BeforeValidator] = AfterValidator
) -> AfterValidator | BeforeValidator:
    def check(value: Any) -> Any:
        if not re.fullmatch(pattern, str(value)):
            raise ValueError(f"should be {allowed}")
        return value

    return when(check)


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, _matching(r".*\S.*", "a text that is not empty")]
Device = Annotated[str, _matching(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, mps, cuda or cuda:N", BeforeValidator)]
FileName = Annotated[str, _matching(r"[\w.-]*\w[\w.-]*", "letters, digits, '_', '-' and '.'")]
RunName = Annotated[str, _matching(r"(?!\.+$)[^/\\\n]*[^/\\\s][^/\\\n]*", "a name, not a path: without '/' and '\\'")]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Positive], Field(min_length=3, max_length=3)]
# Strict: true is no 1, "1" no 1 and 1.0 no integer.
closed = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
open_to_arguments = with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))


@open_to_arguments
class Target(TypedDict):
    _target_: Text


@open_to_arguments
class Optimizer(TypedDict):
    _target_: Text
    lr: Positive
    weight_decay: NotRequired[NotNegative]
    momentum: NotRequired[BelowOne]
    betas: NotRequired[Annotated[list[BelowOne], Field(min_length=2, max_length=2)]]
    nesterov: NotRequired[bool]


@open_to_arguments
class Muon(TypedDict):
    muon_momentum: BelowOne
    newton_schulz_steps: Annotated[
        int, Field(ge=1, le=6)
    ]  # of more, rounding to bf16 makes the largest singular values grow
    sgd_lr_factor: Positive


@open_to_arguments
class OneCycle(TypedDict):
    max_lr: Literal["find"] | Positive
    pct_start: Annotated[float, Field(gt=0, lt=1)]
    div_factor: Positive
    final_div_factor: Positive
    anneal_strategy: Literal["cos", "linear"]
    three_phase: bool
    cycle_momentum: NotRequired[bool]  # not in the configurations of older runs


@open_to_arguments
class CustomResNet(TypedDict):
    width: Positive
    inner_shortcut: bool
    logit_scale: Positive


@open_to_arguments
class RandomCrop(TypedDict):
    size: Count
    padding: CountOrZero
    padding_mode: Literal["constant", "reflect"]


@open_to_arguments
class RandomHorizontalFlip(TypedDict):
    p: Fraction


@open_to_arguments
class Cutout(TypedDict):
    size: Annotated[int, Field(ge=1, le=32)]
    fill: Annotated[list[Fraction], Field(min_length=3, max_length=3)]


@open_to_arguments
class ProgressiveResize(TypedDict):
    first: Annotated[int, Field(ge=8, le=32)]  # smaller ones the network pools away
    epochs: Count


# The arguments of these are part of the contract; those of other targets are the target's own affair.
ARGUMENTS = {
    "resnet_cifar.augment.Cutout": Cutout,
    "resnet_cifar.augment.ProgressiveResize": ProgressiveResize,
    "resnet_cifar.augment.RandomCrop": RandomCrop,
    "resnet_cifar.augment.RandomHorizontalFlip": RandomHorizontalFlip,
    "resnet_cifar.custom_resnet.CustomResNet": CustomResNet,
    "resnet_cifar.muon.Muon": Muon,
    "torch.optim.lr_scheduler.OneCycleLR": OneCycle,
}


@closed
class Augmentation(TypedDict):
    transforms: list[Target]


@closed
class Data(TypedDict):
    dataset: Target
    root: Text | None
    batch_size: Count
    train_size: Count | None
    test_size: Count | None
    val_size: CountOrZero
    mean: Channels
    std: Deviations


@closed
class Trainer(TypedDict):
    epochs: Count
    device: Device
    devices: Count
    precision: Literal["auto", "fp32", "bf16"]
    channels_last: bool
    compile: bool
    label_smoothing: BelowOne
    ema_decay: BelowOne
    flip_tta: bool
    checkpoint_minutes: Positive


@closed
class ParamGroups(TypedDict):
    norm_bias_lr_factor: Positive
    decay_norm_and_bias: bool


@closed
class LRFinder(TypedDict):
    end_lr: Positive
    num_iter: Annotated[int, Field(ge=2)]
    step_mode: Literal["exp", "linear"]
    select: Literal["min_loss", "steepest", "valley"]


@closed
class Explain(TypedDict):
    num_images: Annotated[int, Field(ge=1, le=200)]  # explained in one batch, drawn in one figure
    images: Text | None
    layers: dict[FileName, Text]


@closed
class Tracking(TypedDict):
    uri: Text | None
    artifacts: Text | None
    experiment: Text | None
    run_name: RunName | None


@closed
class Sweep(TypedDict):
    rerun: Literal["unfinished", "all"]
    dry_run: bool


Task = Literal["train", "find_lr", "evaluate", "explain", "sync"]


@closed
class Config(TypedDict):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    task: Task
    checkpoint: Text | None
    resume: Text | None
    output_dir: Text
    model: Target
    augmentation: Augmentation
    data: Data
    optimizer: Optimizer
    scheduler: Target
    tracking: Tracking
    trainer: Trainer
    param_groups: ParamGroups
    lr_finder: LRFinder
    explain: Explain
    sweep: Sweep


def check_jobs(jobs: Sequence[tuple[DictConfig, Sequence[str]]]) -> None:
    """Raise ConfigError for a job that cannot be run, or a key that was given and none of them has a use for."""
    for cfg, _ in jobs:
        check(cfg)
    for problem in idle(jobs):
        raise ConfigError(problem)


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, in at most three lines, for a value, key or combination that cannot be run."""
    container = resolved(cfg)
    written = without_environment(cfg)
    # In this order, each only when the one before found nothing: a password is never quoted in another's message.
    for problems in (_passwords(container), _violations(container, written), conflicts(container)):
        lines = "\n".join(problems).splitlines()
        if lines:
            raise ConfigError("\n".join(lines if len(lines) <= 3 else [*lines[:2], f"and {len(lines) - 2} more"]))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values; raises ConfigError for an interpolation without a value behind it."""
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        broken = [key for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False)) if _is_broken(cfg, key)]
        reason = re.sub("^KeyError raised while resolving interpolation: ", "", str(error).splitlines()[0])
        raise ConfigError(f"{', '.join(broken)}: {reason}") from error


def _is_broken(cfg: DictConfig, key: str) -> bool:
    try:
        OmegaConf.select(cfg, key, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError):
        return True
    return False


def _passwords(container: dict[str, Any]) -> Iterator[str]:
    for key, value in leaves(container):
        if isinstance(value, str) and has_password(value):
            yield (
                f"{key} holds a password, which would be kept in the run's files: take it out of the URI and set\n"
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, or PGPASSWORD for PostgreSQL"
            )


def _violations(container: dict[str, Any], written: dict[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for location, kind, message in _type_errors(container):
        key, given = _locate(written, location)
        if kind == "missing":
            key, hint = ".".join(map(str, location)), ""
            if location[0] in (container.get(location[0]) or ()):
                hint = GLOBAL
            elif key == "explain.layers":
                hint = ": modules of the model for Grad-CAM, as +explain.layers.last=<the module's path>"
            reasons[f"{key} is required{hint}"] = []
        elif kind == "extra_forbidden":
            hint = did_you_mean(key, set(keys(container)) - {key})
            if key == "experiment":
                hint = GLOBAL
            reasons[f"{key} is not a key{hint}"] = []
        else:
            allowed = re.sub(r"^(Value error, )?(\w+ (?=should))?should | after validation.*", "", message)
            if kind == "string_type" and isinstance(given, int | float):
                allowed += f"; as a text it stands in two pairs of quotes: {key}=\"'...'\""
            if kind in ("int_type", "float_type", "bool_type") and str(given).startswith("${oc.env:"):
                allowed += f"; what is in the environment is text: '{key}=${{oc.decode:{given}}}'"
            reasons.setdefault(f"{key}={_as_yaml(given)} should ", []).append(allowed)
    for key, value in leaves(container):
        if isinstance(value, float) and not math.isfinite(value):
            reasons[f"{key}={value} should "] = ["be a finite number"]
        if key.endswith("._target_") and isinstance(value, str) and not is_allowed(value):
            reasons[f"{key}={value} should "] = [f"be {ALLOWED}"]
    for start, alternatives in reasons.items():
        yield start + " or ".join(alternatives)


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_errors(container: dict[str, Any]) -> Iterator[tuple[tuple, str, str]]:
    """Where in the configuration, what kind of error and its message, as pydantic has them."""
    schemas: list[tuple[tuple, dict, type]] = [((), container, Config)]
    schemas += [(path, node, ARGUMENTS[node["_target_"]]) for path, node in _known_targets(container)]
    for path, value, schema in schemas:
        try:
            TypeAdapter(schema).validate_python(value)
        except ValidationError as error:
            for violation in error.errors(include_url=False):
                yield path + violation["loc"], violation["type"], violation["msg"]


def _known_targets(container: Any, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    if isinstance(container, dict) and container.get("_target_") in ARGUMENTS:
        yield path, container
    branches = container.items() if isinstance(container, dict) else enumerate(container)
    for part, value in branches:
        if isinstance(value, dict | list):
            yield from _known_targets(value, (*path, part))


def _locate(container: Any, location: tuple) -> tuple[str, Any]:
    """The dotted key and its value; parts of pydantic's location that name a union's branch are no part of the key."""
    key: list[str] = []
    for part in location:
        inside = dict(enumerate(container)) if isinstance(container, list) else container
        if not isinstance(inside, dict) or part not in inside:
            break
        key.append(str(part))
        container = inside[part]
    return ".".join(key), container


def leaves(container: Any, parent: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of everything in a tree of plain dicts and lists that is neither."""
    branches = container.items() if isinstance(container, dict) else enumerate(container)
    for part, value in branches:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{parent}{part}.")
        else:
            yield f"{parent}{part}", value
