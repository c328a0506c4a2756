"""The tasks on a checkpoint: evaluate it, explain its mistakes, or explain pictures of the user's own."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from resnet_cifar import checkpoint, parts, provenance, report, schema, tracking
from resnet_cifar.data import Images
from resnet_cifar.errors import CheckpointError, ConfigError
from resnet_cifar.explain import load_pictures
from resnet_cifar.loop import Evaluation, evaluate
from resnet_cifar.parts import Parts, build_parts
from resnet_cifar.recording import Invocation, recorded
from resnet_cifar.run_folder import find_run
from resnet_cifar.suggestions import overridden
from resnet_cifar.tracked_run import Run

log = logging.getLogger(__name__)


def evaluate_checkpoint(cfg: DictConfig, invocation: Invocation) -> None:
    """Loss, accuracy, predictions and explanations of a checkpoint on the test images."""
    cfg, state = with_checkpoint(cfg, invocation.overrides)
    parts.check_targets(cfg)
    built = restore_parts(cfg, state)
    images = parts.load_test(cfg.data).to(built.device)
    with recorded(cfg, invocation, provenance.tags(built.device, built.precision)) as tracked_run:
        test = evaluate_and_explain(cfg, invocation.folder, built, images)
        trained_epochs = state["progress"]["epoch"] - 1
        tracked_run.log_metrics({"test/loss": test.loss, "test/accuracy": test.accuracy}, step=trained_epochs)
        if cfg.trainer.flip_tta:
            log_flip_accuracy(cfg, built, images, tracked_run, trained_epochs)
        tracked_run.set_tags(
            {tracking.NOTE: f"`{cfg.checkpoint}` on {len(images)} test images: **{test.accuracy:.2f}%**"}
        )
        log.info("Test accuracy %.2f%%, loss %.4f, on %d images.", test.accuracy, test.loss, len(images))


def explain_checkpoint(cfg: DictConfig, invocation: Invocation) -> None:
    """Grad-CAM of a checkpoint: of its mistakes on the test images, or of the pictures in the folder `explain.images`."""
    if cfg.explain.images is None:
        return evaluate_checkpoint(cfg, invocation)
    cfg, state = with_checkpoint(cfg, invocation.overrides)
    parts.check_targets(cfg)
    built = restore_parts(cfg, state)
    names, pictures = load_pictures(cfg.explain.images, size=32)
    images = Images(pictures, torch.zeros(len(pictures), dtype=torch.long), built.classes).to(built.device)
    with recorded(cfg, invocation, provenance.tags(built.device, built.precision)) as tracked_run:
        normalise = built.augment.normalise
        logits = evaluate(built.network, images, normalise, cfg.data.batch_size, built.precision).logits
        lines = report.write_pictures(invocation.folder / "predictions.csv", names, logits, built.classes)
        for line in lines[: cfg.explain.num_images]:
            log.info("%s", line)
        report.explain_pictures(
            invocation.folder,
            built.network,
            images,
            names,
            logits,
            normalise,
            cfg.explain.layers,
            cfg.explain.num_images,
        )
        tracked_run.set_tags({tracking.NOTE: f"`{cfg.checkpoint}` on {len(names)} pictures of `{cfg.explain.images}`"})
    return None


def with_checkpoint(cfg: DictConfig, overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration with the checkpoint's own model and data, and its state; what was typed of these is kept.

    Raises:
        CheckpointError: there is no such checkpoint, or what it brings along is no configuration of this program.
    """
    given = Path(cfg.checkpoint)
    try:
        found = given if given.exists() else find_run(cfg.checkpoint, Path(cfg.output_dir), "checkpoint")
        state = checkpoint.load(found)
    except OSError as error:  # another user's
        raise CheckpointError(f"checkpoint={given} cannot be read: {error.strerror}.") from error
    saved, cfg = OmegaConf.create(state["config"]), cfg.copy()
    typed = overridden(overrides)
    if "model" in typed:  # the layers to look at come with it
        saved.explain.layers = cfg.explain.layers
    for section in ("model", "data", "augmentation", "explain.layers"):
        chosen = OmegaConf.select(cfg if section in typed else saved, section)
        for key in typed:
            if key.startswith(f"{section}."):
                value = OmegaConf.select(cfg, key)
                OmegaConf.update(chosen, key.removeprefix(f"{section}."), value, force_add=True)
            elif key.startswith(f"~{section}."):
                where, _, name = key.removeprefix(f"~{section}.").rpartition(".")
                holder = OmegaConf.select(chosen, where) if where else chosen
                if holder is not None and name in holder and holder[name] is not None:
                    del holder[name]
        OmegaConf.update(cfg, section, chosen, merge=False)
    if "data.root" in typed and "data.dataset.root" not in typed and "root" in cfg.data.dataset:
        cfg.data.dataset.root = cfg.data.root
    try:
        schema.check(cfg)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        if any(key in reason for key in typed):  # what was typed does not go with the checkpoint
            raise
        raise CheckpointError(f"The configuration in {cfg.checkpoint} cannot be used: {reason}") from error
    return cfg, state


def restore_parts(cfg: DictConfig, state: dict[str, Any]) -> Parts:
    """The parts with the checkpoint's weights."""
    built = build_parts(cfg, tuple(map(str, state["classes"])))
    try:
        built.network.load_state_dict(checkpoint.evaluated_weights(state))
    except RuntimeError as error:
        raise CheckpointError(f"{cfg.checkpoint} holds another model: {str(error).splitlines()[0]}") from error
    return built


def log_flip_accuracy(cfg: DictConfig, built: Parts, images: Images, tracked_run: Run, epoch: int) -> None:
    """The accuracy with test-time augmentation, under a name of its own beside that of the single view."""
    flipped = evaluate(built.network, images, built.augment.normalise, cfg.data.batch_size, built.precision, flip=True)
    tracked_run.log_metrics({"test/accuracy_flip_tta": flipped.accuracy}, step=epoch)
    log.info("Test accuracy %.2f%% with each image's mirror image (flip TTA).", flipped.accuracy)


def evaluate_and_explain(cfg: DictConfig, folder: Path, built: Parts, images: Images) -> Evaluation:
    """Loss and accuracy of the network on the test images; predictions and figures go to the folder."""
    if images.classes != built.classes:
        raise CheckpointError(
            f"The network knows the classes {', '.join(built.classes)};\nthe images have {', '.join(images.classes)}."
        )
    normalise = built.augment.normalise
    evaluation = evaluate(built.network, images, normalise, cfg.data.batch_size, built.precision)
    labels = images.labels.cpu()
    report.write_predictions(folder / "predictions.csv", evaluation.logits, labels, images.classes)
    report.draw_confusion_matrix(folder, evaluation.logits, labels, images.classes)
    report.explain_mistakes(
        folder, built.network, images, evaluation.logits, normalise, cfg.explain.layers, cfg.explain.num_images
    )
    return evaluation
