"""The training loop: it yields a record per step and per epoch, and knows neither tracker nor plot."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from resnet_cifar.augment import Augmentation, Normalise
from resnet_cifar.data import Images, seed_of, steps_per_epoch, training_batches
from resnet_cifar.distributed import ALONE, World
from resnet_cifar.errors import DivergedError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `step` counts from 1 over the whole training; `lr` is the first parameter group's.

    `loss` () is the whole batch's mean, with label smoothing, still on the device.
    """

    epoch: int
    step: int
    lr: float
    loss: Tensor


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, from 1: losses are means per image, accuracies percentages, `lr` is the one its last step used.

    `train_*` are over the augmented images as the weights moved, the loss with label smoothing; `eval_*` are of the weights
    after the epoch, or of their average where there is one, without it.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    eval_loss: float
    eval_accuracy: float
    images_per_second: float  # of the training steps and what is done with their records
    epoch_seconds: float  # the same and the evaluation


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per image, accuracy in percent, and logits (N, K) float32 on the CPU."""

    loss: float
    accuracy: float
    logits: Tensor


@dataclass
class Progress:
    """Where training is; with the states of model, optimizer and scheduler all that going on needs."""

    epoch: int = 1
    batch: int = 0  # batches of this epoch already trained on
    loss_sum: float | Tensor = 0.0  # over this epoch's images so far
    correct: int | Tensor = 0
    lr: float = 0.0  # the one the last step used
    seconds: float = 0.0  # of this epoch so far, also before an interruption


@dataclass
class Training:
    """The parts of one training; `seed` sets the order of the images and the augmentation of every step."""

    model: nn.Module
    optimizer: Optimizer
    augment: Augmentation
    epochs: int
    batch_size: int
    scheduler: LRScheduler | None = None  # stepped after every batch
    seed: int = 0
    precision: Precision = "fp32"
    label_smoothing: float = 0.0  # of the training loss: Szegedy et al., arXiv:1512.00567
    averaged: AveragedModel | None = None  # updated after every step, and evaluated in the model's place
    world: World = ALONE  # the processes that share every batch; with more than one, `model` is under DDP


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 autocast on `device` where `precision` asks for it, else a context that changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def fit(
    training: Training, train: Images, eval_images: Images, progress: Progress | None = None
) -> Iterator[StepRecord | EpochRecord]:
    """Train from `progress`, or the beginning, to the last epoch and evaluate on `eval_images` after each.

    Model and images lie on the same device. `progress` and the parts are consistent with each other at every yield: that
    is where a checkpoint may be taken. Every step seeds torch's own generator, which dropout draws from.

    Raises:
        DivergedError: the loss is not finite. On a CPU before the optimizer step; elsewhere, where looking at every loss
            would stall the device, at the end of the epoch; and there where only the evaluation's is not.
    """
    progress = progress or Progress()
    while progress.epoch <= training.epochs:
        epoch, started = progress.epoch, time.perf_counter() - progress.seconds
        for record in train_epoch(training, train, progress):
            progress.seconds = time.perf_counter() - started
            yield record
        train_loss, train_accuracy = float(progress.loss_sum) / len(train), 100 * int(progress.correct) / len(train)
        if not math.isfinite(train_loss):
            raise diverged(training, train, progress)
        trained = time.perf_counter()
        evaluation = evaluate(
            training.averaged or training.model,
            *(eval_images, training.augment.normalise, training.batch_size, training.precision),
            world=training.world,
        )
        if not math.isfinite(evaluation.loss):  # the last step broke weights that had a finite loss
            raise diverged(training, train, progress)
        finished = time.perf_counter()
        progress.epoch, progress.batch, progress.loss_sum, progress.correct = epoch + 1, 0, 0.0, 0
        progress.seconds = 0.0
        yield EpochRecord(
            epoch=epoch,
            lr=progress.lr,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            eval_loss=evaluation.loss,
            eval_accuracy=evaluation.accuracy,
            images_per_second=len(train) / (trained - started),
            epoch_seconds=finished - started,
        )


def train_epoch(training: Training, train: Images, progress: Progress) -> Iterator[StepRecord]:
    """The steps of the current epoch that are not done yet; the scheduler is stepped after each but the training's last."""
    model, optimizer, world = training.model, training.optimizer, training.world
    device = train.labels.device
    steps = steps_per_epoch(train, training.batch_size)
    batches = training_batches(
        *(train, training.augment, training.batch_size, training.seed, progress.epoch, progress.batch, world)
    )
    model.train()
    for images, labels in batches:
        lr = float(optimizer.param_groups[0]["lr"])
        batch_size = min(training.batch_size, len(train) - progress.batch * training.batch_size)  # of all processes
        # For dropout: by the step, as augmentation is, and by the process, whose images are others.
        own_seed = seed_of(training.seed, 2, progress.epoch, progress.batch, world.rank)
        torch.default_generator.manual_seed(own_seed)  # torch.manual_seed takes 0.7 ms where CUDA is not used
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(own_seed)
        with autocast(device, training.precision):
            logits = model(images)
            # float: in fp32 under every device's autocast, whatever its list of operations.
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=training.label_smoothing)
            loss = loss * world.weight(batch_size)
        batch_loss = world.mean(loss.detach())
        if device.type == "cpu" and not torch.isfinite(batch_loss):
            raise diverged(training, train, dataclasses.replace(progress, batch=progress.batch + 1, lr=lr))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if training.averaged is not None:
            training.averaged.update_parameters(model)
        progress.batch += 1
        progress.lr = lr
        progress.loss_sum += batch_loss * batch_size
        own = len(world.share(batch_size))
        progress.correct += world.sum((logits.detach().argmax(1) == labels)[:own].sum())
        step = (progress.epoch - 1) * steps + progress.batch
        # OneCycleLR stepped once more after the last batch extrapolates below zero, the reference's -5.9e-06.
        if training.scheduler is not None and step < training.epochs * steps:
            training.scheduler.step()
        yield StepRecord(progress.epoch, step, lr, batch_loss)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    normalise: Normalise,
    batch_size: int = 512,
    precision: Precision = "fp32",
    flip: bool = False,
    world: World = ALONE,
) -> Evaluation:
    """Loss, accuracy and logits on `images`, which lie on the model's device; the model's mode is put back.

    Nothing is augmented, the loss not smoothed. With `flip` the logits are means over each image and its mirror image:
    test-time augmentation. Each process of `world` takes a share of every batch.
    """
    was_training = model.training
    model.eval()
    try:
        world.share_buffers(model)
        logits = []
        with autocast(images.labels.device, precision):
            for batch in images.images.split(batch_size):
                own = world.take(batch)
                views = [normalise(own), normalise(own.flip(-1))] if flip else [normalise(own)]
                own_logits = sum(model(view).float() for view in views) / len(views)
                logits.append(world.gather(own_logits, len(batch)))
    finally:
        model.train(was_training)
    all_logits = torch.cat(logits)
    loss = F.cross_entropy(all_logits, images.labels).item()
    accuracy = 100 * (all_logits.argmax(1) == images.labels).sum().item() / len(images)
    return Evaluation(loss, accuracy, all_logits.cpu())


def diverged(training: Training, train: Images, progress: Progress) -> DivergedError:
    """What to tell a user whose loss is not finite in the step that `progress` has reached, on a GPU by that step."""
    step = (progress.epoch - 1) * steps_per_epoch(train, training.batch_size) + progress.batch
    when = f"{'in' if train.labels.device.type == 'cpu' else 'by'} epoch {progress.epoch}, step {step}"
    return DivergedError(
        f"The loss is not a finite number {when}, at LR {progress.lr:.6g}: training stopped.\n"
        "Lower scheduler.max_lr (or optimizer.lr with a constant schedule), or raise scheduler.div_factor."
    )
