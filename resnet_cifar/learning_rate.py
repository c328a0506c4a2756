"""The peak of the schedule: given, or found by the range test; and the task `find_lr`, which does nothing else."""

import itertools
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from resnet_cifar import parts, provenance, report
from resnet_cifar.data import Images, training_batches
from resnet_cifar.lr_finder import range_test, suggest
from resnet_cifar.recording import Invocation, log_range_test, recorded
from resnet_cifar.tables import append_csv
from resnet_cifar.tracked_run import Run
from resnet_cifar.tracking import NOTE

log = logging.getLogger(__name__)


def find_lr(cfg: DictConfig, invocation: Invocation) -> None:
    """The LR finder alone: its curve and the learning rate it would choose."""
    parts.check_targets(cfg)
    parts.choose_device(cfg.trainer.device)
    train_images, _ = parts.load_train_and_val(cfg.data)
    built = parts.build_parts(cfg, train_images.classes)
    with recorded(cfg, invocation, provenance.tags(built.device, built.precision)) as tracked_run:
        found = find_max_lr(cfg, invocation.folder, built, train_images.to(built.device))
        log_range_test(invocation.folder, tracked_run)
        tracked_run.log_params({"scheduler.max_lr": found})
        tracked_run.set_tags({NOTE: f"LR finder, {cfg.lr_finder.select}: **{found:.6g}**"})


def choose_max_lr(
    cfg: DictConfig, folder: Path, built: parts.Parts, train_images: Images, tracked_run: Run
) -> float | None:
    """The peak of the schedule, found or given, logged as such; None for a schedule that has none."""
    max_lr, source = OmegaConf.select(cfg, "scheduler.max_lr"), "given"
    if max_lr is None:
        return None
    if max_lr == "find":
        max_lr, source = find_max_lr(cfg, folder, built, train_images), "find"
    tracked_run.log_params({"scheduler.max_lr": max_lr})
    tracked_run.set_tags({"max_lr_source": source})
    return max_lr


def find_max_lr(cfg: DictConfig, folder: Path, built: parts.Parts, train_images: Images) -> float:
    """The learning rate the range test suggests; its curve goes to lr_finder.csv and a figure."""
    finder = cfg.lr_finder
    log.info("LR finder: %d iterations from %g to %g", finder.num_iter, cfg.optimizer.lr, finder.end_lr)
    batches = itertools.chain.from_iterable(
        training_batches(train_images, built.augment, cfg.data.batch_size, cfg.seed, epoch)
        for epoch in itertools.count()
    )
    curve = range_test(
        built.network,
        parts.build_optimizer(cfg.optimizer, cfg.param_groups, built.network),
        batches,
        end_lr=finder.end_lr,
        num_iter=finder.num_iter,
        step_mode=finder.step_mode,
        precision=built.precision,
        label_smoothing=cfg.trainer.label_smoothing,
    )
    points = list(enumerate(zip(curve.lrs.tolist(), curve.losses.tolist(), strict=True), start=1))
    (folder / "lr_finder.csv").unlink(missing_ok=True)
    append_csv(folder / "lr_finder.csv", [{"iteration": i, "lr": lr, "loss": loss} for i, (lr, loss) in points])
    found = suggest(curve, finder.select)
    report.draw_lr_finder(folder, curve, found, finder.select)
    log.info("LR finder: %s gives scheduler.max_lr=%.6g", finder.select, found)
    if found == curve.lrs[-1]:
        log.warning(
            "That is the end of the range, where the loss still fell: the peak may be too\n"
            "high. Look at lr_finder.png; lr_finder.select=steepest or valley choose lower."
        )
    return found
