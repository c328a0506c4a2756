"""From the configuration to the parts of a training: device, images, model, optimizer, scheduler, augmentation."""

import contextlib
import ctypes
import functools
import inspect
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resnet_cifar.augment import Augmentation, Normalise
from resnet_cifar.data import Images, as_images, dataset_error, hold_out, subset
from resnet_cifar.errors import ConfigError, DataError
from resnet_cifar.explain import check_layer
from resnet_cifar.loop import Precision
from resnet_cifar.targets import check_arguments, instantiate, resolve

# The arguments by which torch's schedulers are told how many steps there are; left out of the YAML, the data sets them.
LENGTH_ARGUMENTS = ("total_steps", "T_max", "total_iters")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What every task works with."""

    device: torch.device
    precision: Precision
    network: nn.Module
    augment: Augmentation
    classes: tuple[str, ...]


def build_parts(cfg: DictConfig, classes: tuple[str, ...]) -> Parts:
    """Network and augmentation on the device that the configuration names."""
    device, channels_last = choose_device(cfg.trainer.device), cfg.trainer.channels_last
    if device.type == "cpu":
        keep_freed_memory()
    if device.index is not None:  # whose generator every step seeds, and what libraries take that are not told
        torch.accelerator.set_device_index(device.index)
    network = build_model(cfg.model, len(classes), device, channels_last, cfg.seed)
    for layer in cfg.explain.layers.values():
        check_layer(network, layer)
    precision = choose_precision(cfg.trainer.precision, device)
    multiply_matrices_in(precision)
    return Parts(
        device=device,
        precision=precision,
        network=network,
        augment=build_augmentation(cfg.augmentation, cfg.data, channels_last),
        classes=classes,
    )


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, then MPS, then the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 1)
    if (device.index or 0) >= count:
        raise ConfigError(
            f"trainer.device={name}: there is no such device here ({count} of that kind). Use trainer.device=auto"
        )
    return device


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free for the tensors of the next step; without glibc nothing changes.

    By default it returns every block of over 32 MB to the system and takes new pages for the next, which the system
    clears first: mallopt(3). What that costs: experiments/speed.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def multiply_matrices_in(precision: Precision) -> None:
    """Let float32 products outside autocast, which are Muon's, take the faster ways that bf16 allows: oneDNN, TF32.

    And fp32 be fp32: by default cuDNN computes convolutions in TF32.
    """
    torch.set_float32_matmul_precision("medium" if precision == "bf16" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "bf16"


def check_devices(device: torch.device, devices: int) -> None:
    """Raise ConfigError where fewer devices are there than processes want one each; a CPU is shared."""
    count = torch.get_device_module(device.type).device_count()
    if device.type != "cpu" and devices > count:
        raise ConfigError(
            f"trainer.devices={devices}: there are {count} devices of the kind {device.type} here. "
            "Use fewer, or trainer.device=cpu"
        )


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """`fp32` or `bf16`; `auto` is bf16 where the hardware computes in it: without its instructions a CPU only gets slower."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # the instruction sets that multiply bf16 matrices
        native = device.type == "cpu" and any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))
    if name == "bf16" and not native:
        log.warning("trainer.precision=bf16: this %s has no bf16 instructions, fp32 would be faster.", device.type)
    return ("bf16" if native else "fp32") if name == "auto" else name


def check_targets(cfg: DictConfig) -> None:
    """Refuse a `_target_` that is not allowed, or arguments it does not take, before any data is loaded."""
    check_arguments(cfg.data.dataset, "train")
    check_arguments(cfg.model, "num_classes")
    check_arguments(cfg.optimizer, "params")
    _check_step(cfg.optimizer._target_)
    one_cycle = cfg.scheduler._target_.endswith(".OneCycleLR")
    for name in ("last_epoch", *(("total_steps", "epochs", "steps_per_epoch") if one_cycle else ())):
        if cfg.scheduler.get(name, -1) != -1:  # of last_epoch torch's own default
            raise ConfigError(
                f"scheduler.{name}={cfg.scheduler[name]}: the schedule begins and ends with the training; leave it out"
            )
    check_arguments(cfg.scheduler, "optimizer", *_length_arguments(cfg.scheduler))
    if "metrics" in inspect.signature(resolve(cfg.scheduler._target_).step).parameters:
        raise ConfigError(
            f"scheduler._target_={cfg.scheduler._target_} waits for a metric; a schedule here is stepped after every batch"
        )
    for transform in cfg.augmentation.transforms:
        check_arguments(transform)
    takes = inspect.signature(resolve(cfg.optimizer._target_)).parameters
    if cfg.task == "train" and _cycles_momentum(cfg.scheduler) and not {"momentum", "betas"} & takes.keys():
        raise ConfigError(
            f"optimizer._target_={cfg.optimizer._target_} has no momentum, which the schedule would cycle:\n"
            "give scheduler.cycle_momentum=false with it"
        )


def _check_step(optimizer: str) -> None:
    closure = inspect.signature(resolve(optimizer).step).parameters.get("closure")
    wants_closure = closure is not None and closure.default is closure.empty
    if wants_closure or optimizer.endswith(".SparseAdam"):
        wants = "a closure" if wants_closure else "sparse gradients"
        raise ConfigError(f"optimizer._target_={optimizer} wants {wants}, which a training here does not have")


def _cycles_momentum(scheduler: DictConfig) -> bool:
    argument = inspect.signature(resolve(scheduler._target_)).parameters.get("cycle_momentum")
    return argument is not None and scheduler.get("cycle_momentum", argument.default)


def load_test(data: DictConfig) -> Images:
    """The test images, the first `data.test_size` of them.

    Raises:
        DataError: the data set is missing, corrupt or cannot be downloaded.
    """
    return subset(_load(data, train=False)[0], data.test_size, "data.test_size")


def load_train_and_val(data: DictConfig) -> tuple[Images, Images | None]:
    """The training images and, where `data.val_size` holds some out of them, the validation images.

    Raises:
        DataError: as `load_test`.
    """
    train, val = _load(data, train=True)
    train = subset(train, data.train_size, "data.train_size", f" beside data.val_size={data.val_size}" if val else "")
    if data.batch_size > len(train):
        raise ConfigError(f"data.batch_size={data.batch_size}: larger than the {len(train)} training images.")
    return train, val


def _load(data: DictConfig, train: bool) -> tuple[Images, Images | None]:
    try:
        images, held_out = _read(OmegaConf.to_yaml(data.dataset, resolve=True), train, data.val_size if train else 0)
    except (OSError, RuntimeError, EOFError) as error:
        subfolder = getattr(resolve(data.dataset._target_), "base_folder", "")
        raise dataset_error(error, data.root, subfolder) from error
    if (channels := images.images.shape[1]) != len(data.mean):
        raise DataError(
            f"The images of {data.dataset._target_} have {channels} channels; they should have {len(data.mean)}."
        )
    return images, held_out


@functools.lru_cache(maxsize=2)
def _read(dataset: str, train: bool, val_size: int) -> tuple[Images, Images | None]:
    # Once for all the jobs of a sweep, which would otherwise read, verify and divide the same images each time.
    node = OmegaConf.create(dataset)
    images = None
    if "download" in node:
        with contextlib.suppress(RuntimeError):  # torchvision's "not found or corrupted"
            # With download=True torchvision verifies files that are there twice.
            images = as_images(instantiate(node, train=train, download=False))
    if images is None:
        with contextlib.ExitStack() as alone:
            if node.get("download") and node.get("root"):  # a parallel sweep's jobs would break each other's archive
                Path(node.root).mkdir(parents=True, exist_ok=True)
                alone.enter_context(FileLock(Path(node.root, ".download.lock")))
            images = as_images(instantiate(node, train=train))
    return hold_out(images, val_size) if val_size else (images, None)


def build_model(model: DictConfig, num_classes: int, device: torch.device, channels_last: bool, seed: int) -> nn.Module:
    """The network on its device, its initial weights set by `seed` alone."""
    torch.manual_seed(seed)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return instantiate(model, num_classes=num_classes).to(device, memory_format=memory_format)


def build_optimizer(optimizer: DictConfig, param_groups: DictConfig, model: nn.Module) -> Optimizer:
    """The optimizer, a group for each factor of the learning rate and each decay, in the order of the model's parameters."""
    norm_layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norm_biases = {layer.bias for layer in norm_layers if layer.bias is not None}
    if param_groups.norm_bias_lr_factor != 1 and not norm_biases:
        raise ConfigError("param_groups.norm_bias_lr_factor would do nothing: the model has no batch norm with a bias")
    grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        factor = param_groups.norm_bias_lr_factor if parameter in norm_biases else 1.0
        decays = param_groups.decay_norm_and_bias or parameter.ndim > 1
        grouped.setdefault((factor, decays), []).append(parameter)
    groups = [
        {"params": parameters, "lr": optimizer.lr * factor, **({} if decays else {"weight_decay": 0.0})}
        for (factor, decays), parameters in grouped.items()
    ]
    return instantiate(optimizer, params=groups)


def check_rise(scheduler: DictConfig, total_steps: int) -> None:
    """Refuse a one-cycle schedule whose rise has too few of the `total_steps` for torch; warn where it has none."""
    rise = total_steps * scheduler.get("pct_start", 0)
    said = f"scheduler.pct_start={scheduler.get('pct_start')} of {total_steps} steps is"
    if rise == 1:  # torch divides by the steps of the rise less one
        raise ConfigError(f"{said} one step, in which nothing can rise; give more or less")
    if 0 < rise < 1 and scheduler.get("three_phase"):  # torch's second phase would start below the first one's start
        raise ConfigError(f"{said} less than one, with which a schedule of three phases never rises; give more")
    if 0 < rise < 1:
        log.warning("%s less than one: nothing rises, the learning rate only falls.", said)


def build_scheduler(scheduler: DictConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule over `total_steps` optimizer steps."""
    supplied: dict[str, Any] = dict.fromkeys(_length_arguments(scheduler), total_steps)
    groups = optimizer.param_groups
    if "max_lr" in scheduler and len(groups) > 1:  # one peak for each, in the proportion of their learning rates
        supplied["max_lr"] = [scheduler.max_lr * group["lr"] / groups[0]["lr"] for group in groups]
    return instantiate(scheduler, optimizer=optimizer, **supplied)


def build_augmentation(augmentation: DictConfig, data: DictConfig, channels_last: bool) -> Augmentation:
    """The transforms in the order of the list, normalised by the data set's mean and deviation."""
    transforms = [instantiate(transform) for transform in augmentation.transforms]
    return Augmentation(transforms, Normalise(list(data.mean), list(data.std), channels_last))


def _length_arguments(scheduler: DictConfig) -> list[str]:
    accepted = inspect.signature(resolve(scheduler._target_)).parameters
    return [name for name in LENGTH_ARGUMENTS if name in accepted and name not in scheduler]
