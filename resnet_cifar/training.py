"""A training put together from its configuration: what it starts from, its parts, and the state that going on needs."""

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_cifar import checkpoint, parts
from resnet_cifar.augment import untouched_generators
from resnet_cifar.data import Images, seeded, steps_per_epoch
from resnet_cifar.distributed import ALONE, World
from resnet_cifar.environment import without_environment
from resnet_cifar.errors import ConfigError, DataError
from resnet_cifar.loop import Progress, Training, autocast

START_AGAIN = "Without its folder\ncheckpoints/ the run starts again from its first epoch"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a training starts from: the parts, the images on the device, and the checkpoint it goes on from, if any."""

    built: parts.Parts
    train: Images
    eval_images: Images  # evaluated after each epoch: the test images, or those that `data.val_size` holds out
    test: Images
    state: dict[str, Any] | None


def load(cfg: DictConfig, resumed: Path | None = None, world: World = ALONE) -> Start:
    """The images, the network with its initial weights, and the checkpoint in the folder of a `resumed` run.

    Raises:
        ConfigError, DataError: the parts do not go together, which would end the training later.
    """
    if world.rank > 0:
        world.wait_for_first()  # it may have to download the images
    train_images, val_images = parts.load_train_and_val(cfg.data)
    test_images = parts.load_test(cfg.data)
    if world.rank == 0:
        world.wait_for_first()
    if test_images.classes != train_images.classes:
        raise DataError(
            f"The training images have the classes {', '.join(train_images.classes)};\n"
            f"the test images have {', '.join(test_images.classes)}."
        )
    built = parts.build_parts(cfg, train_images.classes)
    # Stopped before its first checkpoint, a run starts again.
    state = None
    if resumed is not None and checkpoint.exists(resumed / "checkpoints"):
        state = checkpoint.load(resumed, built.network, START_AGAIN)
    if state is not None and state.get("precision", built.precision) != built.precision:
        log.warning(
            "It goes on in %s, in which it began; here it would have begun in %s.", state["precision"], built.precision
        )
        built = dataclasses.replace(built, precision=state["precision"])
        parts.multiply_matrices_in(built.precision)
    train_images, test_images = train_images.to(built.device), test_images.to(built.device)
    eval_images = test_images if val_images is None else val_images.to(built.device)
    rehearse(cfg, built, train_images, test_images)
    return Start(built, train_images, eval_images, test_images, state)


def rehearse(cfg: DictConfig, built: parts.Parts, train_images: Images, test_images: Images) -> None:
    """Try what a training does, on a copy of the network and at most two images, before anything is done in earnest.

    Raises:
        ConfigError: images, augmentation, network, optimizer and schedule do not go together.
    """
    device, total_steps = built.device, _total_steps(cfg, train_images)
    parts.check_rise(cfg.scheduler, total_steps)
    if cfg.trainer.ema_decay**total_steps > 0.5:
        log.warning(
            "trainer.ema_decay=%g of %d steps: the average, which is evaluated, is mostly of the first steps' weights.",
            cfg.trainer.ema_decay,
            total_steps,
        )
    if (
        cfg.optimizer._target_ == "resnet_cifar.muon.Muon"
        and any(parameter.ndim == 4 for parameter in built.network.parameters())
        and not any("Norm" in type(module).__name__ for module in built.network.modules())
    ):
        log.warning(
            "Muon rescales the weights of convolutions, which only a normalisation behind them undoes: this network has none."
        )
    with untouched_generators(device):
        network = _copy(cfg, built)
        _try_step(cfg, dataclasses.replace(built, network=network), train_images)
        # Batch norm cannot train on one number a channel; without SyncBatchNorm each process has its own.
        last_batch = len(train_images) % cfg.data.batch_size or cfg.data.batch_size
        share = max(1, last_batch // cfg.trainer.devices if device.type == "cpu" else last_batch)
        few, shown = train_images[: min(2, share)], built.augment.normalise(test_images.images[:2])
        first, last = (_augmented(built, few, cfg.seed, epoch) for epoch in (1, cfg.trainer.epochs))
        if last.shape[1:] != shown.shape[1:]:
            log.warning("Training ends on images of %s pixels, and %s are evaluated.", _size(last), _size(shown))
        for epoch, images in ((1, first), (cfg.trainer.epochs, last)):
            try:
                _try_network(cfg, built, network.train(), images)
            except ConfigError:
                if share <= 2:
                    raise
                # It may divide a batch, as ghost batch norm does.
                whole = _augmented(built, train_images[:share], cfg.seed, epoch)
                _try_network(cfg, built, network, whole)
        with torch.no_grad():
            _try_network(cfg, built, network.eval(), shown)


def _copy(cfg: DictConfig, built: parts.Parts) -> nn.Module:
    try:
        return copy.deepcopy(built.network)
    except Exception:  # torch's old weight_norm, for one
        return parts.build_model(cfg.model, len(built.classes), built.device, cfg.trainer.channels_last, cfg.seed)


def _try_step(cfg: DictConfig, built: parts.Parts, train_images: Images) -> None:
    peak = cfg.scheduler.get("max_lr")
    training = build_training(cfg, built, train_images, cfg.optimizer.lr if peak == "find" else peak)
    assert training.scheduler is not None  # a configuration always has one
    for parameter in built.network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    training.optimizer.step()
    training.scheduler.step()
    for name, part in ((cfg.optimizer._target_, training.optimizer), (cfg.scheduler._target_, training.scheduler)):
        if not checkpoint.is_plain(part.state_dict()):
            raise ConfigError(
                f"{name} has a state that no checkpoint could be read back with: keep plain numbers and tensors in it,\n"
                "none of NumPy's"
            )


def _augmented(built: parts.Parts, images: Images, seed: int, epoch: int) -> torch.Tensor:
    try:
        return built.augment(images.images, seeded(seed, device=built.device), epoch=epoch)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"augmentation.transforms cannot be used on these images: {reason}") from error


def _try_network(cfg: DictConfig, built: parts.Parts, network: nn.Module, images: torch.Tensor) -> None:
    name, num_classes, precision, number = cfg.model._target_, len(built.classes), built.precision, len(images)
    said = f"{name}, given {number} image{'s' if number > 1 else ''} of {_size(images)} pixels,"
    try:
        with autocast(images.device, precision):
            logits = network(images)
    except Exception as error:  # a model of the user's own can raise anything
        reason = f"{said} fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        last_batch = "\nThe last batch has no more for a process: change data.batch_size or data.train_size"
        raise ConfigError(reason + last_batch * (network.training and number == 1)) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (number, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"{said} should return logits of {(number, num_classes)}, a row for each: it returns {found}")


def _size(images: torch.Tensor) -> str:
    return "x".join(map(str, images.shape[2:]))


def begin(cfg: DictConfig, start: Start, max_lr: float | None, world: World = ALONE) -> tuple[Training, Progress]:
    """The training with the peak `max_lr`, None for a schedule that has none, at its beginning or where its checkpoint was."""
    training, progress = build_training(cfg, start.built, start.train, max_lr, world), Progress()
    if start.state is not None:
        restore(training, start.built.network, progress, start.state)
    return training, progress


def build_training(
    cfg: DictConfig, built: parts.Parts, train_images: Images, max_lr: float | None, world: World = ALONE
) -> Training:
    """Optimizer and schedule over the network, which is replicated where `world` asks for it and compiled where `cfg` does."""
    scheduler = cfg.scheduler if max_lr is None else OmegaConf.merge(cfg.scheduler, {"max_lr": max_lr})
    optimizer = parts.build_optimizer(cfg.optimizer, cfg.param_groups, built.network)
    # Without a decay the average would be the weights themselves.
    averaged = MovingAverage(built.network, cfg.trainer.ema_decay) if cfg.trainer.ema_decay else None
    model = world.replicate(built.network)
    if cfg.trainer.compile:
        model = cast(nn.Module, torch.compile(model))
    return Training(
        model=model,
        optimizer=optimizer,
        scheduler=parts.build_scheduler(scheduler, optimizer, _total_steps(cfg, train_images)),
        augment=built.augment,
        epochs=cfg.trainer.epochs,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        precision=built.precision,
        label_smoothing=cfg.trainer.label_smoothing,
        averaged=averaged,
        world=world,
    )


def _total_steps(cfg: DictConfig, train_images: Images) -> int:
    return cfg.trainer.epochs * steps_per_epoch(train_images, cfg.data.batch_size)


class MovingAverage(AveragedModel):
    """An exponential moving average of weights and batch-norm statistics, bit for bit torch's.

    torch's own update waits for a GPU at every step: it copies its counter there, for averages of another kind.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights and buffers of `model`; the first time, onto them."""
        own, new = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        for floating in (True, False):  # batch norm's counters of batches are whole numbers
            places = [place for place, tensor in enumerate(own) if tensor.is_floating_point() == floating]
            if not places:
                continue
            pair = [own[place] for place in places], [new[place] for place in places]
            if self.n_averaged == 0:
                torch._foreach_copy_(*pair)
            else:
                assert self.multi_avg_fn is not None  # given to __init__
                self.multi_avg_fn(*pair, self.n_averaged)
        self.n_averaged += 1


def training_state(
    cfg: DictConfig, built: parts.Parts, training: Training, progress: Progress, max_lr: float | None
) -> dict[str, Any]:
    """All that going on needs, as plain types and tensors."""
    assert training.scheduler is not None  # a configuration always has one
    return {
        "config": without_environment(cfg),
        "classes": list(built.classes),
        "max_lr": max_lr,
        "precision": training.precision,
        "model": built.network.state_dict(),
        "averaged": None if training.averaged is None else training.averaged.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "progress": {
            **dataclasses.asdict(progress),
            "loss_sum": float(progress.loss_sum),
            "correct": int(progress.correct),
        },
    }


def restore(training: Training, network: nn.Module, progress: Progress, state: dict[str, Any]) -> None:
    """Put a checkpoint's state into the parts, which then go on bit for bit as if they had never stopped."""
    network.load_state_dict(state["model"])
    if training.averaged is not None:
        training.averaged.load_state_dict(state["averaged"])
    training.optimizer.load_state_dict(state["optimizer"])
    assert training.scheduler is not None  # a configuration always has one
    training.scheduler.load_state_dict(state["scheduler"])
    for name, value in state["progress"].items():
        setattr(progress, name, value)
