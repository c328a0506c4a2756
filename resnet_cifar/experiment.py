"""One experiment: configuration -> parts -> loop -> records -> tracking and figures. The one place that sees every side."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIG_DFL

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from resnet_cifar import checkpoint, parts, provenance, report, resume, sweep, tracking
from resnet_cifar.data import Images, steps_per_epoch, training_batches
from resnet_cifar.deployed_model import DeployedModel
from resnet_cifar.distributed import ALONE, World
from resnet_cifar.evaluation import evaluate_and_explain, evaluate_checkpoint, explain_checkpoint, log_flip_accuracy
from resnet_cifar.fingerprint import config_hash, source_hash
from resnet_cifar.hydra_setup import set_by_presets
from resnet_cifar.learning_rate import choose_max_lr, find_lr
from resnet_cifar.loop import EpochRecord, Progress, StepRecord, Training, diverged, fit
from resnet_cifar.progress import ProgressDisplay
from resnet_cifar.recording import Invocation, epoch_metrics, failure, log_range_test, recorded
from resnet_cifar.run_folder import STATUS, check_unused, is_stopped, run_id, status
from resnet_cifar.signals import StopRequest, do_nothing, stop_requests
from resnet_cifar.suggestions import overridden
from resnet_cifar.sync import sync_all
from resnet_cifar.tables import TrainingTables, cut_tables, read_csv
from resnet_cifar.tracked_run import Run
from resnet_cifar.training import begin, load, training_state
from resnet_cifar.training_processes import launch

# Of the time, at most, for the checkpoints after epochs: on a GPU an epoch can take less than one of them.
SAVING_SHARE = 0.05

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float | None:
    """Do `cfg.task` in Hydra's run folder; `train` returns the accuracy (%) that runs are compared by, the others nothing."""
    cfg, invocation = asked_for(cfg)
    if not invocation.resumed:
        check_unused(invocation.folder)
    tasks = {
        "train": train,
        "find_lr": find_lr,
        "evaluate": evaluate_checkpoint,
        "explain": explain_checkpoint,
        "sync": sync,
    }
    return tasks[cfg.task](cfg, invocation)


def asked_for(cfg: DictConfig) -> tuple[DictConfig, Invocation]:
    """The running Hydra job's configuration, a resumed run's own in its place, and how it was asked for."""
    hydra, job = HydraConfig.get(), sweep.current_job()
    folder = Path(hydra.runtime.output_dir)
    overrides = tuple(OmegaConf.to_container(hydra.overrides.task, resolve=False))
    # Ray starts a job anew whose process was killed: what the sweep planned to run has been on its way by then.
    if cfg.resume is not None or (job is not None and is_stopped(folder, cfg)):
        root = cfg.data.root if "data.root" in overridden(overrides) else None
        cfg, invocation = resume.saved_run(folder, root, _typed_uri(cfg, overrides))
    else:
        preset = set_by_presets(hydra.runtime, overrides)
        invocation = Invocation(folder, overrides, dict(hydra.runtime.choices), preset=preset)
    return cfg, dataclasses.replace(
        invocation,
        name=job.name if job is not None else "",
        varied=tuple(job.values) if job is not None else (),
        place=sweep.place(),
        tags={}
        if invocation.recorded
        else {"config_hash": config_hash(cfg), "source_hash": source_hash(), **sweep.tags()},
    )


def _typed_uri(cfg: DictConfig, overrides: tuple[str, ...]) -> str | None:
    return cfg.tracking.uri if "tracking.uri" in overridden(overrides) else None


def train(cfg: DictConfig, invocation: Invocation) -> float:
    """The whole assignment: find the learning rate, train, evaluate, explain, record; the final accuracy (%)."""
    if cfg.trainer.devices == 1:
        take_part(ALONE, cfg, invocation)
    else:
        train_in_processes(cfg, invocation)
    return read_csv(invocation.folder / "history.csv")[-1]["eval_accuracy"]


def train_in_processes(cfg: DictConfig, invocation: Invocation) -> None:
    """`trainer.devices` processes, of which the first does all that one alone does; whatever ends one ends the run."""
    device = parts.choose_device(cfg.trainer.device)
    parts.check_devices(device, cfg.trainer.devices)
    ending = invocation.folder / STATUS
    before = ending.stat().st_mtime_ns if ending.exists() else None
    logs = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    try:
        launch(cfg.trainer.devices, device.type, logs, take_part, cfg, invocation)
    except Exception as error:
        known = run_id(invocation.folder)
        begun = known is not None if cfg.tracking.uri else (invocation.folder / "config.yaml").exists()
        as_before = before is not None and ending.exists() and ending.stat().st_mtime_ns == before
        if begun and not as_before and status(invocation.folder) != ("FAILED", failure(error)):
            # The process that recorded the run was killed, or only met the end of the one that failed.
            stopped = dataclasses.replace(invocation, resumed=True, run_id=known, recorded=True)
            with contextlib.suppress(BaseException), recorded(cfg, stopped, {}):
                raise error
        raise


def take_part(world: World, cfg: DictConfig, invocation: Invocation) -> None:
    """One process's part in a training: all of it for the first, only steps and evaluations for the others.

    What they hear from the first, all in this order: that the data are there, the peak of the schedule if it has one, and
    after each record the number of the signal that stops them, or 0.
    """
    if world.rank == 0:
        for _stage in train_in_stages(cfg, invocation, world):
            pass
        return
    start = load(cfg, invocation.folder if invocation.resumed else None, world)
    peak = OmegaConf.select(cfg, "scheduler.max_lr")
    unknown_here = 0
    training, progress = begin(cfg, start, None if peak is None else world.from_first(unknown_here), world)
    for _record in fit(training, start.train, start.eval_images, progress):
        stopped_by = world.from_first(unknown_here)
        if stopped_by:
            return


def train_in_stages(cfg: DictConfig, invocation: Invocation, world: World = ALONE) -> Iterator[str]:
    """`train` with a pause after each stage, whose name it yields: a notebook shows there what the folder holds by then."""
    folder, evaluated_on = invocation.folder, "val" if cfg.data.val_size else "test"
    parts.check_targets(cfg)  # imports torchvision, which would only take turns with MLflow's import
    parts.choose_device(cfg.trainer.device)
    with tracking.imported_meanwhile(cfg.tracking.uri):
        start = load(cfg, invocation.folder if invocation.resumed else None, world)
    built, train_images, test_images, state = start.built, start.train, start.test, start.state
    with recorded(cfg, invocation, provenance.tags(built.device, built.precision)) as tracked_run:
        report.write_summary(folder / "model_summary.txt", built.network, tuple(train_images.images.shape[1:]))
        yield "described"
        max_lr = state["max_lr"] if state else choose_max_lr(cfg, folder, built, train_images, tracked_run)
        yield "learning rate found"
        if max_lr is not None:
            world.from_first(max_lr)
        training, progress = begin(cfg, start, max_lr, world)
        steps = steps_per_epoch(train_images, training.batch_size)
        if state is not None:
            cut_tables(folder, progress, steps)
            log.info("Resumed in epoch %d after %d of %d batches.", progress.epoch, progress.batch, steps)
        display = progress_display(training, train_images, evaluated_on)

        def save() -> None:
            if not math.isfinite(float(progress.loss_sum)):  # known late where the loss is on an accelerator
                raise diverged(training, train_images, progress)
            checkpoint.save(training_state(cfg, built, training, progress, max_lr), folder / "checkpoints")

        with stop_requests(repeated=SIG_DFL if world.size == 1 else do_nothing) as stop, display:
            try:
                save()
                records = fit(training, train_images, start.eval_images, progress)
                minutes = cfg.trainer.checkpoint_minutes
                follow(records, folder, tracked_run, display, progress, save, minutes, stop, world)
            finally:
                seen = training_batches(train_images, built.augment, training.batch_size, cfg.seed, epoch=1)
                report.draw_training_images(
                    folder, seen, cfg.explain.num_images, built.augment.normalise, built.classes
                )
                report.draw_curves(folder, evaluated_on, steps, training.label_smoothing)
                log_range_test(folder, tracked_run)
        if stop.signal_number:  # it came after the last step, while the curves were drawn
            raise SystemExit(stop.exit_code)
        checkpoint.keep_only_last(folder / "checkpoints")
        if training.averaged is not None:
            built.network.load_state_dict(training.averaged.module.state_dict())
        yield "trained"
        test = evaluate_and_explain(cfg, folder, built, test_images)
        if evaluated_on == "val":
            tracked_run.log_metrics({"test/loss": test.loss, "test/accuracy": test.accuracy}, step=training.epochs)
        if cfg.trainer.flip_tta:
            log_flip_accuracy(cfg, built, test_images, tracked_run, training.epochs)
        yield "explained"
        log_model(cfg, built, test_images, tracked_run)
        note = report.training_note(folder, evaluated_on, test, max_lr)
        tracked_run.set_tags({tracking.NOTE: note})
        epochs = f"{training.epochs} epoch{'s' if training.epochs > 1 else ''}"
        log.info("Test accuracy %.2f%%, loss %.4f, after %s.", test.accuracy, test.loss, epochs)
    yield "recorded"


def progress_display(training: Training, train_images: Images, evaluated_on: str) -> ProgressDisplay:
    """The display of a training, which on a CPU also says when it will end."""
    costs, height = None, train_images.images.shape[2]
    if train_images.labels.device.type == "cpu":
        costs = [training.augment.share_of_pixels(height, epoch) for epoch in range(1, training.epochs + 1)]
    return ProgressDisplay(training.epochs, len(train_images), training.batch_size, evaluated_on, costs)


def sync(cfg: DictConfig, invocation: Invocation) -> None:
    """Send what earlier runs under `output_dir` could not: to where they are tracked, or to a `tracking.uri` that is given."""
    log.info("%d records sent.", sync_all(Path(cfg.output_dir), _typed_uri(cfg, invocation.overrides)))


def follow(
    records: Iterator[StepRecord | EpochRecord],
    folder: Path,
    tracked_run: Run,
    display: ProgressDisplay,
    progress: Progress,
    save: Callable[[], None],
    checkpoint_minutes: float,
    stop: StopRequest,
    world: World,
) -> None:
    """Show the records of a training as they come; write and track them before each checkpoint, the last after the last epoch.

    Raises SystemExit with the signal's exit code, after a checkpoint, at the end of the first batch after a signal.
    """
    tables = TrainingTables(folder)
    epochs: list[EpochRecord] = []  # not tracked yet
    saved, saving = time.monotonic(), 0.0  # when the last checkpoint was written, and the seconds that it took

    def write() -> None:
        tables.write()
        # Only now: a resumed run repeats what came after its checkpoint, on a GPU with other numbers; MLflow keeps the first.
        for record in epochs:
            tracked_run.log_metrics(epoch_metrics(record, display.evaluated_on), step=record.epoch)
        epochs.clear()

    try:
        for record in records:
            tables.add(record)
            if isinstance(record, StepRecord):
                display.step(record, progress)
            else:
                display.epoch(record)
                epochs.append(record)
            stopped_by = int(world.from_first(stop.signal_number))
            pause = 60 * checkpoint_minutes
            if isinstance(record, EpochRecord):
                pause = min(pause, saving / SAVING_SHARE)
            if stopped_by or time.monotonic() - saved > pause or progress.epoch > display.epochs:
                write()
                began = time.monotonic()
                save()
                saved = time.monotonic()
                saving = saved - began
            if stopped_by:
                log.warning("Signal %d in epoch %d; a checkpoint is saved.", stopped_by, record.epoch)
                raise SystemExit(128 + stopped_by)
    finally:
        write()


def log_model(cfg: DictConfig, built: parts.Parts, images: Images, tracked_run: Run) -> None:
    """The network with its normalisation inside, as an MLflow model of raw pictures."""
    model = DeployedModel(built.network, list(cfg.data.mean), list(cfg.data.std))
    example = images.images[:1].expand(2, -1, -1, -1).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    tracked_run.log_model(model, example, {"classes": list(built.classes)})
