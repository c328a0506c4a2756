"""A training put together from its configuration: what it starts from, its parts, and the state that going on needs."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_cifar import checkpoint, parts, resume
from resnet_cifar.data import Images, steps_per_epoch
from resnet_cifar.distributed import ALONE, World
from resnet_cifar.environment import without_environment
from resnet_cifar.loop import Progress, Training
from resnet_cifar.recording import Invocation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a training starts from: the parts, the images on the device, and the checkpoint it goes on from, if any."""

    built: parts.Parts
    train: Images
    held_out: Images  # evaluated after each epoch: the test images, or those that `data.val_size` holds out
    test: Images
    state: dict[str, Any] | None


def load(cfg: DictConfig, invocation: Invocation, world: World = ALONE) -> Start:
    """The images, the network with its initial weights, and a resumed run's checkpoint."""
    if world.rank > 0:
        world.from_first(0)  # it may have to download the images
    train_images, val_images = parts.load_train_and_val(cfg.data)
    test_images = parts.load_test(cfg.data)
    if world.rank == 0:
        world.from_first(0)
    built = parts.build_parts(cfg, train_images.classes)
    # Stopped before its first checkpoint, a run starts again.
    resumable = invocation.resumed and checkpoint.exists(invocation.folder)
    state = checkpoint.load(invocation.folder, built.network) if resumable else None
    if state is not None and state.get("precision", built.precision) != built.precision:
        log.warning(
            "It goes on in %s, in which it began; here it would have begun in %s.", state["precision"], built.precision
        )
        built = dataclasses.replace(built, precision=state["precision"])
    train_images, test_images = train_images.to(built.device), test_images.to(built.device)
    held_out = test_images if val_images is None else val_images.to(built.device)
    return Start(built, train_images, held_out, test_images, state)


def begin(cfg: DictConfig, start: Start, max_lr: float | None, world: World = ALONE) -> tuple[Training, Progress]:
    """The training with the peak `max_lr`, None for a schedule that has none, at its beginning or where its checkpoint was."""
    training, progress = build_training(cfg, start.built, start.train, max_lr, world), Progress()
    if start.state is not None:
        resume.restore(training, start.built.network, progress, start.state)
    return training, progress


def build_training(
    cfg: DictConfig, built: parts.Parts, train_images: Images, max_lr: float | None, world: World = ALONE
) -> Training:
    """Optimizer and schedule over the network, which is replicated where `world` asks for it and compiled where `cfg` does."""
    scheduler = cfg.scheduler if max_lr is None else OmegaConf.merge(cfg.scheduler, {"max_lr": max_lr})
    optimizer = parts.build_optimizer(cfg.optimizer, cfg.param_groups, built.network)
    total_steps = cfg.trainer.epochs * steps_per_epoch(train_images, cfg.data.batch_size)
    averaged = averaged_model(built.network, cfg.trainer.ema_decay)
    model = world.replicate(built.network)
    return Training(
        model=torch.compile(model) if cfg.trainer.compile else model,
        optimizer=optimizer,
        scheduler=parts.build_scheduler(scheduler, optimizer, total_steps),
        augment=built.augment,
        epochs=cfg.trainer.epochs,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        precision=built.precision,
        label_smoothing=cfg.trainer.label_smoothing,
        averaged=averaged,
        world=world,
    )


def averaged_model(network: torch.nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of weights and batch-norm statistics; None for a decay of 0, the weights themselves."""
    if decay == 0:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def training_state(
    cfg: DictConfig, built: parts.Parts, training: Training, progress: Progress, max_lr: float | None
) -> dict[str, Any]:
    """All that going on needs, as plain types and tensors."""
    return {
        "config": without_environment(cfg),
        "classes": list(built.classes),
        "max_lr": max_lr,
        "precision": training.precision,
        "model": built.network.state_dict(),
        "averaged": None if training.averaged is None else training.averaged.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "rng": resume.generator_states(built.device),
        "progress": {
            **dataclasses.asdict(progress),
            "loss_sum": float(progress.loss_sum),
            "correct": int(progress.correct),
        },
    }
