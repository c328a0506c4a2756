"""What a run leaves in its folder: predictions, figures and the summary in words."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import resnet_cifar  # its `figures` come when the first is drawn: training does not wait for matplotlib
from resnet_cifar import explain
from resnet_cifar.augment import Normalise
from resnet_cifar.data import Images
from resnet_cifar.loop import Evaluation
from resnet_cifar.lr_finder import RangeTest
from resnet_cifar.tables import append_csv, read_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET_ACCURACY = 90  # the assignment's

log = logging.getLogger(__name__)


def save_figure(folder: Path, name: str, draw: "Callable[[], Figure]") -> None:
    """Draw and save `figures/<name>.png`; a figure that fails is a warning, since the run is worth more than its picture."""
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        draw().savefig(folder / "figures" / f"{name}.png")
    except Exception as error:
        log.warning("figures/%s.png was not drawn: %s: %s", name, type(error).__name__, error)
        log.debug("figures/%s.png", name, exc_info=True)


def model_summary(model: nn.Module, image_shape: Sequence[int]) -> str:
    """The network layer by layer at batch 20: kernels, shapes, parameters and mult-adds, as in the assignment's table.

    `image_shape` is (C, H, W). Raises RuntimeError where the model cannot take such images.
    """
    from torchinfo import summary

    columns = ("kernel_size", "input_size", "output_size", "num_params", "mult_adds", "trainable")
    with torch.random.fork_rng(devices=[]):  # it draws its images on the CPU, of several processes in the first alone
        table = summary(
            model,
            input_size=(20, *image_shape),
            depth=4,
            col_names=columns,
            row_settings=("var_names",),
            verbose=0,
            device=next(model.parameters()).device,  # else it moves the model to a GPU, where there is one
        )
    return str(table).replace("Units.GIGABYTES", "G").replace("Units.MEGABYTES", "M").replace("Units.KILOBYTES", "K")


def write_summary(path: Path, model: nn.Module, image_shape: Sequence[int]) -> None:
    """`model_summary.txt`; a model it cannot describe is a warning."""
    try:
        path.write_text(model_summary(model, image_shape), encoding="utf-8")
    except Exception as error:
        log.warning("%s was not written: %s: %s", path.name, type(error).__name__, str(error).partition("\n")[0])


def write_predictions(path: Path, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """`predictions.csv`: index in the data set, label, prediction and the confidence (0..1) in it, a row per image."""
    # float64: many confident mistakes round to 1.0 in float32, and a sweep's summary would find them in another order.
    confidences, predictions = logits.double().softmax(1).max(1)
    path.unlink(missing_ok=True)
    rows = zip(labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    append_csv(
        path,
        [
            {
                "index": index,
                "label": classes[label],
                "prediction": classes[prediction],
                "confidence": confidence,
            }
            for index, (label, prediction, confidence) in enumerate(rows)
        ],
    )


def draw_training_images(
    folder: Path,
    batches: Iterator[tuple[Tensor, Tensor]],
    num_images: int,
    normalise: Normalise,
    classes: Sequence[str],
) -> None:
    """The first of the augmented, normalised images (N, C, H, W) and labels (N,) of `batches`, as the network sees them."""

    def draw() -> "Figure":
        images, labels = (tensor[:num_images] for tensor in next(batches))
        return resnet_cifar.figures.sample_training_images(
            _for_display(normalise.undo(images)), labels.tolist(), classes
        )

    save_figure(folder, "sample_training_images", draw)


def draw_lr_finder(folder: Path, curve: RangeTest, chosen_lr: float, select: str) -> None:
    """The range test's curve with the learning rate it led to."""
    save_figure(folder, "lr_finder", lambda: resnet_cifar.figures.lr_finder(curve.lrs, curve.losses, chosen_lr, select))


def draw_curves(folder: Path, evaluated_on: str, steps_per_epoch: int, label_smoothing: float) -> None:
    """Loss and accuracy by epoch and the learning rate by step, from the tables in the folder."""
    if (folder / "history.csv").exists():
        history = read_csv(folder / "history.csv")
        draw = partial(resnet_cifar.figures.loss_and_accuracy, history, evaluated_on, label_smoothing)
        save_figure(folder, "loss_and_accuracy", draw)
    if (folder / "lr_history.csv").exists():
        lrs = [row["lr"] for row in read_csv(folder / "lr_history.csv")]
        save_figure(folder, "lr_history", lambda: resnet_cifar.figures.lr_history(lrs, steps_per_epoch))


def draw_confusion_matrix(folder: Path, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """How often each class was taken for each other."""
    matrix = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(matrix, (labels.numpy(), logits.argmax(1).numpy()), 1)
    save_figure(folder, "confusion_matrix", lambda: resnet_cifar.figures.confusion_matrix(matrix, classes))


def explain_mistakes(
    folder: str | Path,
    network: nn.Module,
    images: Images,
    logits: Tensor,
    normalise: Normalise,
    layers: Mapping[str, str],
    num_images: int = 20,
) -> None:
    """Draw the most confident mistakes on `images`, and what each layer saw there for the correct and the predicted class.

    Where there are no mistakes, the least confident images. `logits` (N, K) are of all `images`, which lie on the network's
    device; `layers` are names in the figures and module paths. Writes misclassified_images.png and
    grad_cam_<correct|predicted>_<name>.png into `folder`/figures; a figure that fails, as of a wrong layer, is a warning.
    """
    folder = Path(folder)
    labels = images.labels.cpu()
    selection = explain.select_images(logits, labels, num_images, "test")
    index = torch.from_numpy(selection.indices)
    chosen, true = images[index.to(images.labels.device)], labels[index]
    about = {
        "labels": true.tolist(),
        "predictions": selection.predictions.tolist(),
        "confidences": selection.confidences.tolist(),
        "classes": images.classes,
        "title": selection.title,
    }
    shown = _for_display(chosen.images)
    save_figure(folder, "misclassified_images", lambda: resnet_cifar.figures.misclassified_images(shown, **about))
    targets = {"correct": true, "predicted": torch.from_numpy(selection.predictions)}
    for against, (name, layer) in itertools.product(targets, layers.items()):
        _save_grad_cam(folder, network, normalise, chosen.images, targets[against], layer, name, against, **about)


def explain_pictures(
    folder: Path,
    network: nn.Module,
    pictures: Images,
    names: Sequence[str],
    logits: Tensor,
    normalise: Normalise,
    layers: Mapping[str, str],
    num_images: int,
) -> None:
    """What each layer saw in a user's own pictures for the class it predicts."""
    confidences, predictions = (tensor[:num_images] for tensor in logits.softmax(1).max(1))
    about = {
        "labels": None,
        "names": names[:num_images],
        "predictions": predictions.tolist(),
        "confidences": confidences.tolist(),
        "classes": pictures.classes,
        "title": f"{len(predictions)} of {len(names)} pictures",
    }
    chosen = pictures.images[:num_images]
    for name, layer in layers.items():
        _save_grad_cam(folder, network, normalise, chosen, predictions, layer, name, "predicted", **about)


def _save_grad_cam(
    folder: Path,
    network: nn.Module,
    normalise: Normalise,
    images: Tensor,
    targets: Tensor,
    layer: str,
    name: str,
    against: str,
    **about: Any,
) -> None:
    def draw() -> "Figure":
        heat_maps, map_size = explain.grad_cam(network, normalise(images), targets, layer)
        return resnet_cifar.figures.grad_cam(
            _for_display(images), heat_maps, layer=name, map_size=map_size, against=against, **about
        )

    save_figure(folder, f"grad_cam_{against}_{name}", draw)


def write_pictures(path: Path, names: Sequence[str], logits: Tensor, classes: Sequence[str]) -> list[str]:
    """`predictions.csv` for a user's own pictures: name, prediction and the confidence (0..1) in it; returned as lines too."""
    confidences, predictions = logits.softmax(1).max(1)
    path.unlink(missing_ok=True)
    rows = [
        {"picture": name, "prediction": classes[prediction], "confidence": round(confidence, 6)}
        for name, prediction, confidence in zip(names, predictions.tolist(), confidences.tolist(), strict=True)
    ]
    append_csv(path, rows)
    return [f"{row['picture']}: {row['prediction']} ({row['confidence']:.1%})" for row in rows]


def training_note(folder: Path, evaluated_on: str, test: Evaluation, max_lr: float | None) -> str:
    """The run in two lines of Markdown: MLflow folds more away on the run's page, which has the name above them."""
    history = read_csv(folder / "history.csv")
    best, last = max(history, key=lambda row: row["eval_accuracy"]), history[-1]
    reached = next((row["epoch"] for row in history if row["eval_accuracy"] >= TARGET_ACCURACY), None)
    seconds = sum(row["epoch_seconds"] for row in history)
    peak = "no peak" if max_lr is None else f"max LR {max_lr:.6g}"
    target = f"{TARGET_ACCURACY}% first reached in epoch {reached}" if reached else f"{TARGET_ACCURACY}% not reached"
    epochs = f"{last['epoch']} epoch{'s' if last['epoch'] > 1 else ''}"
    took = f"{seconds / 60:.1f} min" if seconds > 600 else f"{seconds:.1f} s"
    return (
        f"**Test accuracy {test.accuracy:.2f}%**, loss {test.loss:.4f}, after {epochs} ({peak}).\n\n"
        f"Best {evaluated_on} accuracy {best['eval_accuracy']:.2f}% in epoch {best['epoch']}, {target}; "
        f"the epochs took {took}."
    )


def _for_display(images: Tensor) -> np.ndarray:
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images  # grey as colours
    return images.detach().cpu().permute(0, 2, 3, 1).numpy()
