"""One experiment: configuration -> parts -> loop -> records -> tracking and figures. The one place that sees every side."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from resnet_cifar import checkpoint, parts, provenance, report, tracking
from resnet_cifar.augment import Augmentation
from resnet_cifar.data import Images, steps_per_epoch, training_batches
from resnet_cifar.deployed_model import DeployedModel
from resnet_cifar.errors import CheckpointError
from resnet_cifar.explain import load_pictures
from resnet_cifar.loop import EpochRecord, Evaluation, Progress, StepRecord, Training, evaluate, fit
from resnet_cifar.lr_finder import range_test, suggest
from resnet_cifar.progress import ProgressDisplay
from resnet_cifar.signals import StopRequest, stop_requests
from resnet_cifar.tracked_run import NoRun

# What people compare runs by, as far as a configuration has it; group choices and whatever was overridden join these.
COMPARED = (
    *("seed", "data.batch_size", "data.train_size", "model.width", "model.inner_shortcut", "optimizer.weight_decay"),
    *("scheduler.pct_start", "scheduler.div_factor", "scheduler.final_div_factor", "trainer.epochs"),
)
COMPARED_GROUPS = ("data", "augmentation", "optimizer", "scheduler")

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float | None:
    """Do `cfg.task` in Hydra's run folder; `train` returns the accuracy (%) that runs are compared by, the others nothing."""
    tasks = {"train": train, "find_lr": find_lr, "evaluate": evaluate_checkpoint, "explain": explain_checkpoint}
    with logging_redirect_tqdm():
        return tasks[cfg.task](cfg, Path(HydraConfig.get().runtime.output_dir))


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every task works with."""

    device: torch.device
    precision: str
    network: nn.Module
    augment: Augmentation
    classes: tuple[str, ...]


def build_parts(cfg: DictConfig, classes: tuple[str, ...]) -> Parts:
    """Network and augmentation on the device that the configuration names."""
    device, channels_last = parts.choose_device(cfg.trainer.device), cfg.trainer.channels_last
    return Parts(
        device=device,
        precision=parts.choose_precision(cfg.trainer.precision, device),
        network=parts.build_model(cfg.model, len(classes), device, channels_last, cfg.seed),
        augment=parts.build_augmentation(cfg.augmentation, cfg.data, channels_last),
        classes=classes,
    )


def train(cfg: DictConfig, folder: Path) -> float:
    """The whole assignment: find the learning rate, train, evaluate, explain, record."""
    parts.check_targets(cfg)
    parts.choose_device(cfg.trainer.device)
    train_images, val_images = parts.load_train_and_val(cfg.data)
    test_images = parts.load_split(cfg.data, train=False)
    built = build_parts(cfg, train_images.classes)
    train_images, test_images = train_images.to(built.device), test_images.to(built.device)
    evaluated_on = "test" if val_images is None else "val"
    held_out = test_images if val_images is None else val_images.to(built.device)

    with tracked(cfg, folder, built) as tracked_run:
        describe(cfg, folder, built, train_images)
        max_lr = choose_max_lr(cfg, folder, built, train_images, tracked_run)
        training = build_training(cfg, built, train_images, max_lr)
        progress = Progress()
        save = lambda: checkpoint.save(training_state(cfg, built, training, progress, max_lr), folder / "checkpoints")  # noqa: E731
        display = ProgressDisplay(
            training.epochs,
            steps_per_epoch(train_images, training.batch_size),
            len(train_images),
            evaluated_on,
            estimate=built.device.type == "cpu",
        )
        with stop_requests() as stop:
            records = fit(training, train_images, held_out, progress)
            try:
                final = follow(
                    records, folder, tracked_run, display, progress, save, cfg.trainer.checkpoint_minutes, stop
                )
            finally:
                display.close()
                report.draw_curves(folder, evaluated_on, display.steps_per_epoch)
        checkpoint.keep_only_last(folder / "checkpoints")
        test = evaluate_and_explain(cfg, folder, built, test_images, "test")
        if evaluated_on == "val":
            tracked_run.log_metrics({"test/loss": test.loss, "test/accuracy": test.accuracy}, step=training.epochs)
        log_model(cfg, built, test_images, tracked_run)
        tracked_run.set_tags({tracking.NOTE: report.training_note(folder, evaluated_on, test, max_lr, run_name(cfg))})
        log.info("Test accuracy %.2f%% after %d epochs, loss %.4f.", test.accuracy, final.epoch, test.loss)
    return final.eval_accuracy


def find_lr(cfg: DictConfig, folder: Path) -> None:
    """The LR finder alone: its curve and the learning rate it would choose."""
    parts.check_targets(cfg)
    parts.choose_device(cfg.trainer.device)
    train_images, _ = parts.load_train_and_val(cfg.data)
    built = build_parts(cfg, train_images.classes)
    with tracked(cfg, folder, built) as tracked_run:
        found = find_max_lr(cfg, folder, built, train_images.to(built.device), tracked_run)
        tracked_run.log_params({"scheduler.max_lr": found})
        tracked_run.set_tags({tracking.NOTE: f"LR finder ({cfg.lr_finder.select}): **{found:.6g}**"})


def evaluate_checkpoint(cfg: DictConfig, folder: Path) -> None:
    """Loss, accuracy, predictions and explanations of a checkpoint on the test images."""
    cfg, state = with_checkpoint(cfg)
    parts.check_targets(cfg)
    images = parts.load_split(cfg.data, train=False)
    built = restore_parts(cfg, state)
    with tracked(cfg, folder, built) as tracked_run:
        test = evaluate_and_explain(cfg, folder, built, images.to(built.device), "test")
        tracked_run.log_metrics(
            {"test/loss": test.loss, "test/accuracy": test.accuracy}, step=state["progress"]["epoch"] - 1
        )
        tracked_run.set_tags(
            {tracking.NOTE: f"`{cfg.checkpoint}` on {len(images)} test images: **{test.accuracy:.2f}%**"}
        )
        log.info("Test accuracy %.2f%% on %d images, loss %.4f.", test.accuracy, len(images), test.loss)


def explain_checkpoint(cfg: DictConfig, folder: Path) -> None:
    """Grad-CAM of a checkpoint: of its mistakes on the test images, or of the pictures in the folder `explain.images`."""
    if cfg.explain.images is None:
        return evaluate_checkpoint(cfg, folder)
    cfg, state = with_checkpoint(cfg)
    names, pictures = load_pictures(cfg.explain.images, size=32)
    built = restore_parts(cfg, state)
    with tracked(cfg, folder, built) as tracked_run:
        unknown = torch.zeros(len(pictures), dtype=torch.long)
        images = Images(pictures, unknown, built.classes).to(built.device)
        logits = evaluate(built.network, images, built.augment.normalise, cfg.data.batch_size, built.precision).logits
        report.write_pictures(folder / "predictions.csv", names, logits, built.classes)
        for line in (folder / "predictions.csv").read_text().splitlines()[1:][: cfg.explain.num_images]:
            log.info("%s", line.replace(",", "  "))
        report.explain_pictures(
            folder,
            built.network,
            pictures,
            names,
            logits,
            built.augment.normalise,
            built.classes,
            dict(cfg.explain.layers),
            cfg.explain.num_images,
        )
        tracked_run.set_tags({tracking.NOTE: f"`{cfg.checkpoint}` on {len(names)} pictures of `{cfg.explain.images}`"})
    return None


@contextmanager
def tracked(cfg: DictConfig, folder: Path, built: Parts) -> Iterator[NoRun]:
    """The run in MLflow from its start to FINISHED, FAILED or KILLED; whatever happens, the folder's files go there."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    tracked_run = tracking.start(
        **{key: cfg.tracking[key] for key in ("uri", "artifacts", "experiment")},
        run_name=run_name(cfg),
        folder=folder,
        params=compared_params(cfg),
        tags={
            "task": cfg.task,
            "overrides": " ".join(HydraConfig.get().overrides.task) or "none",
            **provenance.tags(built.device, built.precision),
        },
    )
    log.info("Run folder %s", folder)
    try:
        yield tracked_run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        log_files(folder, tracked_run)
        reason = "Stopped by a signal." if stopped else f"{type(error).__name__}: {error}"
        tracked_run.finish("KILLED" if stopped else "FAILED", note=reason)
        raise
    log_files(folder, tracked_run)
    tracked_run.finish("FINISHED")
    if tracked_run.url:
        log.info("MLflow run %s: %s", tracked_run.run_id, tracked_run.url)


def follow(
    records: Iterator[StepRecord | EpochRecord],
    folder: Path,
    tracked_run: NoRun,
    display: ProgressDisplay,
    progress: Progress,
    save: Callable[[], None],
    checkpoint_minutes: float,
    stop: StopRequest,
) -> EpochRecord:
    """Show, write and track the records of a training as they come, with checkpoints between; the last epoch's record.

    Raises SystemExit with the signal's exit code after a checkpoint, at the first batch's end after a signal.
    """
    steps: list[dict[str, Any]] = []
    saved = time.monotonic()
    for record in records:
        if isinstance(record, StepRecord):
            display.step(record, progress)
            steps.append({"step": record.step, "epoch": record.epoch, "lr": record.lr, "loss": record.loss})
        else:
            display.epoch(record)
            report.append_csv(folder / "history.csv", [dataclasses.asdict(record)])
            tracked_run.log_metrics(epoch_metrics(record, display.evaluated_on), step=record.epoch)
            final = record
        if isinstance(record, EpochRecord) or stop.signal_number or time.monotonic() - saved > 60 * checkpoint_minutes:
            if steps:
                report.append_csv(folder / "lr_history.csv", [{**row, "loss": row["loss"].item()} for row in steps])
                steps.clear()
            save()
            saved = time.monotonic()
        if stop.signal_number:
            log.warning("Stopped by signal %d in epoch %d; checkpoint saved.", stop.signal_number, record.epoch)
            raise SystemExit(stop.exit_code)
    return final


def choose_max_lr(
    cfg: DictConfig, folder: Path, built: Parts, train_images: Images, tracked_run: NoRun
) -> float | None:
    """The peak of the schedule, found or given, logged as such; None for a schedule that has none."""
    max_lr = OmegaConf.select(cfg, "scheduler.max_lr")
    if max_lr is None:
        return None
    if max_lr == "find":
        max_lr, source = find_max_lr(cfg, folder, built, train_images, tracked_run), "find"
    else:
        source = "given"
    tracked_run.log_params({"scheduler.max_lr": max_lr})
    tracked_run.set_tags({"max_lr_source": source})
    return max_lr


def find_max_lr(cfg: DictConfig, folder: Path, built: Parts, train_images: Images, tracked_run: NoRun) -> float:
    """The learning rate the range test suggests; its curve goes to lr_finder.csv, a figure and the tracked run."""
    finder = cfg.lr_finder
    log.info("LR finder: %d iterations from %g to %g", finder.num_iter, cfg.optimizer.lr, finder.end_lr)
    batches = itertools.chain.from_iterable(
        training_batches(train_images, built.augment, cfg.data.batch_size, cfg.seed, epoch)
        for epoch in itertools.count()
    )
    curve = range_test(
        built.network,
        parts.build_optimizer(cfg.optimizer, built.network),
        batches,
        end_lr=finder.end_lr,
        num_iter=finder.num_iter,
        step_mode=finder.step_mode,
        precision=built.precision,
    )
    points = list(enumerate(zip(curve.lrs.tolist(), curve.losses.tolist(), strict=True), start=1))
    report.append_csv(folder / "lr_finder.csv", [{"iteration": i, "lr": lr, "loss": loss} for i, (lr, loss) in points])
    tracked_run.log_series(
        [point for i, (lr, loss) in points for point in (("lr_finder/lr", lr, i), ("lr_finder/loss", loss, i))]
    )
    found = suggest(curve, finder.select)
    report.draw_lr_finder(folder, curve, found, finder.select)
    log.info("LR finder: %s suggests max_lr %.6g", finder.select, found)
    return found


def build_training(cfg: DictConfig, built: Parts, train_images: Images, max_lr: float | None) -> Training:
    """Optimizer and schedule over the network, compiled where asked for."""
    if max_lr is not None:
        cfg = OmegaConf.merge(cfg, {"scheduler": {"max_lr": max_lr}})
    optimizer = parts.build_optimizer(cfg.optimizer, built.network)
    total_steps = cfg.trainer.epochs * steps_per_epoch(train_images, cfg.data.batch_size)
    return Training(
        model=torch.compile(built.network) if cfg.trainer.compile else built.network,
        optimizer=optimizer,
        scheduler=parts.build_scheduler(cfg.scheduler, optimizer, total_steps),
        augment=built.augment,
        epochs=cfg.trainer.epochs,
        batch_size=cfg.data.batch_size,
        seed=cfg.seed,
        precision=built.precision,
    )


def training_state(
    cfg: DictConfig, built: Parts, training: Training, progress: Progress, max_lr: float | None
) -> dict[str, Any]:
    """All that going on needs, as plain types and tensors."""
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "classes": list(built.classes),
        "max_lr": max_lr,
        "model": built.network.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "progress": {
            "epoch": progress.epoch,
            "batch": progress.batch,
            "loss_sum": float(progress.loss_sum),
            "correct": int(progress.correct),
        },
    }


def with_checkpoint(cfg: DictConfig) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration with model and data as the checkpoint has them (data keys given on the command line aside), and its state."""
    state = checkpoint.load(Path(cfg.checkpoint))
    saved = OmegaConf.create(state["config"])
    given = [override.partition("=")[0] for override in HydraConfig.get().overrides.task]
    data = cfg.data if "data" in given else saved.data
    for key in given:
        if key.startswith("data."):
            OmegaConf.update(data, key.removeprefix("data."), OmegaConf.select(cfg, key))
    if data.root is not None and "root" in data.dataset:
        data.dataset.root = data.root
    cfg = cfg.copy()
    cfg.model, cfg.data, cfg.augmentation, cfg.explain.layers = (
        saved.model,
        data,
        saved.augmentation,
        saved.explain.layers,
    )
    return cfg, state


def restore_parts(cfg: DictConfig, state: dict[str, Any]) -> Parts:
    """The parts with the checkpoint's weights."""
    built = build_parts(cfg, tuple(state["classes"]))
    try:
        built.network.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"{cfg.checkpoint} holds another model: {str(error).splitlines()[0]}") from error
    return built


def evaluate_and_explain(cfg: DictConfig, folder: Path, built: Parts, images: Images, name: str) -> Evaluation:
    """Loss and accuracy of the network on `images`; predictions and figures go to the folder."""
    if images.classes != built.classes:
        raise CheckpointError(
            f"The checkpoint knows the classes {', '.join(built.classes)};\nthe images have {', '.join(images.classes)}."
        )
    normalise = built.augment.normalise
    evaluation = evaluate(built.network, images, normalise, cfg.data.batch_size, built.precision)
    labels = images.labels.cpu()
    report.write_predictions(folder / "predictions.csv", evaluation.logits, labels, images.classes)
    report.draw_confusion_matrix(folder, evaluation.logits, labels, images.classes)
    report.explain_mistakes(
        folder,
        built.network,
        images,
        evaluation.logits,
        normalise,
        dict(cfg.explain.layers),
        cfg.explain.num_images,
        name,
    )
    return evaluation


def describe(cfg: DictConfig, folder: Path, built: Parts, train_images: Images) -> None:
    """The network's summary and the first augmented training images, before anything is trained."""
    shape = tuple(train_images.images.shape[1:])
    (folder / "model_summary.txt").write_text(report.model_summary(built.network, shape))
    batches = training_batches(train_images, built.augment, cfg.data.batch_size, cfg.seed, epoch=1)
    images, labels = (tensor[: cfg.explain.num_images] for tensor in next(batches))
    report.draw_training_images(folder, images, labels, built.augment.normalise, built.classes)


def log_model(cfg: DictConfig, built: Parts, images: Images, tracked_run: NoRun) -> None:
    """The network with its normalisation inside, as an MLflow model of raw pictures."""
    model = DeployedModel(built.network, list(cfg.data.mean), list(cfg.data.std))
    example = images.images[:2].permute(0, 2, 3, 1).cpu().numpy()
    tracked_run.log_model(model, example, {"classes": list(built.classes)})


def log_files(folder: Path, tracked_run: NoRun) -> None:
    """Every file a person may want to see in MLflow, under the names it has in the run's folder."""
    for pattern in ("config.yaml", "*.txt", "*.csv", "run.log", "figures/*.png", f"checkpoints/{checkpoint.LAST}"):
        for path in sorted(folder.glob(pattern)):
            parent = path.parent.relative_to(folder).as_posix()
            tracked_run.log_file(path, None if parent == "." else parent)


def epoch_metrics(record: EpochRecord, evaluated_on: str) -> dict[str, float]:
    """An epoch's record under the names of the metrics."""
    return {
        "train/loss": record.train_loss,
        "train/accuracy": record.train_accuracy,
        f"{evaluated_on}/loss": record.eval_loss,
        f"{evaluated_on}/accuracy": record.eval_accuracy,
        "schedule/lr": record.lr,
        "speed/images_per_second": record.images_per_second,
        "speed/epoch_seconds": record.epoch_seconds,
    }


def compared_params(cfg: DictConfig) -> dict[str, Any]:
    """The parameters that runs are compared by: flat dotted keys, `scheduler.max_lr` aside, which may have to be found first."""
    choices = HydraConfig.get().runtime.choices
    given = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
    params: dict[str, Any] = {group: choices[group] for group in COMPARED_GROUPS}
    for key in (*COMPARED, *given):
        value = OmegaConf.select(cfg, key)
        if value is not None and not OmegaConf.is_config(value) and not key.startswith("tracking."):
            params[key] = value
    params.pop("scheduler.max_lr", None)
    return params


def run_name(cfg: DictConfig) -> str:
    """`tracking.run_name`, or the preset and what was overridden."""
    if cfg.tracking.run_name:
        return cfg.tracking.run_name
    preset = HydraConfig.get().runtime.choices.get("experiment") or cfg.task
    given = [
        o
        for o in HydraConfig.get().overrides.task
        if not o.startswith(("experiment=", "tracking", "data.root=", "output_dir="))
    ]
    return " ".join([str(preset), *given])[:120]
