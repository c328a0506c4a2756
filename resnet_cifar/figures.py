"""The figures of a run: arrays in, `matplotlib.figure.Figure` out; nothing is shown, nothing is saved.

Every figure is 9 inches wide, so that its text of 9 to 12 points stays readable where the MLflow UI shows it, some 900
pixels wide. Images are (N, H, W, 3), uint8 or floats in 0..1, and are drawn pixel by pixel.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK, MUTED, TRAIN, EVAL, MARK = "#1f2937", "#6b7280", "#94a3b8", "#1d4ed8", "#b91c1c"
HEAT_MAP_COLOURS = "turbo"
SELECTED_AT = {"min_loss": "lowest loss", "steepest": "steepest descent", "valley": "valley"}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titley": 1.0,  # else matplotlib looks for ticks above every panel, the half of drawing a grid
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#e5e7eb",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@matplotlib.rc_context(STYLE)
def sample_training_images(images: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> Figure:
    """Training images as the network sees them, augmented but not normalised, each under its class name."""
    figure, panels = _grid(len(images), 5, 1.9, "Training images as the network sees them, augmented")
    for axes, image, label in zip(panels, images, labels, strict=True):
        axes.imshow(image)
        axes.set_title(shortened(classes[label]), fontsize=10, loc="center", parse_math=False)
    return figure


@matplotlib.rc_context(STYLE)
def misclassified_images(
    images: np.ndarray,
    labels: Sequence[int],
    predictions: Sequence[int],
    confidences: Sequence[float],
    classes: Sequence[str],
    title: str,
) -> Figure:
    """Images, each under its true and its predicted class with the confidence (0..1) of the prediction."""
    figure, panels = _grid(len(images), 5, 2.4, title)
    first_lines = [f"true: {shortened(classes[label])}" for label in labels]
    captions = _captions(first_lines, predictions, confidences, classes, "\nconfidence {:.1%}")
    for axes, image, caption in zip(panels, images, captions, strict=True):
        axes.imshow(image)
        axes.set_title(caption, fontsize=9, loc="center", parse_math=False)
    return figure


@matplotlib.rc_context(STYLE)
def grad_cam(
    images: np.ndarray,
    heat_maps: np.ndarray,
    labels: Sequence[int] | None,
    predictions: Sequence[int],
    confidences: Sequence[float],
    classes: Sequence[str],
    layer: str,
    map_size: tuple[int, int],
    against: Literal["correct", "predicted"],
    title: str,
    names: Sequence[str] = (),
) -> Figure:
    """Each image beside itself under its heat map, (N, H, W) in 0..1, for its `correct` or its `predicted` class.

    Pictures without labels (`labels=None`, against `predicted`) carry their `names` instead of a true class. A map of
    zeros is said in words, for it is a result and not a fault: nothing at that layer speaks for the class.
    """
    heading = f"Grad-CAM against the {against} class: {layer}, {map_size[0]}x{map_size[1]} map\n{title}"
    figure, panels = _grid(len(images), 4, 1.62, heading, footer=0.2)
    if labels is None:
        first_lines = [shortened(name, 24) for name in names]
    else:
        first_lines = [f"true: {shortened(classes[label])}" for label in labels]
    explained = predictions if labels is None or against == "predicted" else labels
    captions = _captions(first_lines, predictions, confidences, classes, " ({:.1%})")
    for axes, image, heat_map, target, caption in zip(panels, images, heat_maps, explained, captions, strict=True):
        _draw_pair(axes, _unit(image), heat_map, shortened(classes[target]))
        axes.set_title(caption, fontsize=9, loc="center", parse_math=False)
    draw_heat_map_colours(figure, panels)
    return figure


@matplotlib.rc_context(STYLE)
def loss_and_accuracy(
    history: Sequence[Mapping[str, float]], evaluated_on: str, label_smoothing: float = 0.0
) -> Figure:
    """Mean loss per image and accuracy (%) of every epoch, on the training images and on `evaluated_on` (test or val).

    A training with `label_smoothing` minimises another loss than is evaluated, and the legend says so.
    Rows have `epoch` from 1, `train_loss`, `train_accuracy`, `eval_loss` and `eval_accuracy`.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    best, last = max(history, key=lambda row: row["eval_accuracy"]), history[-1]
    titles = {
        "loss": f"Loss: final {evaluated_on} {last['eval_loss']:.3f}",
        "accuracy": f"Accuracy: final {evaluated_on} {last['eval_accuracy']:.2f}%, "
        f"best {best['eval_accuracy']:.2f}% (epoch {best['epoch']})",
    }
    for axes, (quantity, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        smoothed = quantity == "loss" and label_smoothing
        train = f"train, labels smoothed by {label_smoothing:g}" if smoothed else "train"
        for split, name, colour in (("train", train, TRAIN), ("eval", evaluated_on, EVAL)):
            axes.plot(epochs, [row[f"{split}_{quantity}"] for row in history], "o-", color=colour, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel("mean loss per image" if quantity == "loss" else "accuracy (%)")
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="best")
    axes.plot(best["epoch"], best["eval_accuracy"], "o", color=MARK, markersize=8, fillstyle="none", zorder=3)
    return figure


@matplotlib.rc_context(STYLE)
def lr_finder(
    lrs: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray, chosen_lr: float, select: str
) -> Figure:
    """The range test's loss over its learning rates, with the one that `select` chose; Smith, arXiv:1506.01186."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(lrs, losses, color=EVAL)
    axes.set_xscale("log")
    axes.axvline(chosen_lr, color=MARK, linestyle="--", linewidth=1.2)
    nearest = int(np.argmin(np.abs(np.log(np.asarray(lrs) / chosen_lr))))
    axes.plot(chosen_lr, losses[nearest], "o", color=MARK, markersize=7, label=f"max LR {chosen_lr:.4g}")
    axes.set_title(f"Learning rate range test: max LR {chosen_lr:.4g}, at the {SELECTED_AT[select]}")
    axes.legend(loc="best")
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel("loss")
    return figure


@matplotlib.rc_context(STYLE)
def lr_history(lrs: Sequence[float], steps_per_epoch: int) -> Figure:
    """The learning rate of every optimizer step, over epochs."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, len(lrs) + 1) / steps_per_epoch
    peak = int(np.argmax(lrs))
    axes.plot(epochs, lrs, color=EVAL, marker="o" if len(lrs) == 1 else None)
    if min(lrs) < lrs[peak]:
        axes.plot(epochs[peak], lrs[peak], "o", color=MARK, markersize=7)
        course = f"first {lrs[0]:.4g}, peak {lrs[peak]:.4g} at epoch {epochs[peak]:.1f}, last {lrs[-1]:.4g}"
    else:
        course = f"{lrs[0]:.4g} in all steps"
    axes.set_title(f"Learning rate: {course}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate of the step")
    axes.set_xlim(0, np.ceil(epochs[-1]))
    axes.set_ylim(0, 1.08 * lrs[peak])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def confusion_matrix(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts (C, C), true classes in rows, coloured by their share of the row; over 20 classes, colours alone."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # The square root spreads the few per cent in which mistakes lie; on a linear scale all but the diagonal is white.
    drawn = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    ticks = range(0, len(classes), -(-len(classes) // 40))  # as many as have room
    names = [shortened(classes[tick], 24) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(
        f"Confusion matrix: {np.trace(matrix) / matrix.sum():.2%} of {matrix.sum():,} images correct", fontsize=12
    )
    axes.spines[:].set_visible(False)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if shares[row, column] > 0.35 else INK if count else TRAIN
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], format="{x:.0%}")
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    return figure


def _grid(count: int, columns: int, row_height: float, title: str, footer: float = 0.0) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    heading = 0.1 + 0.3 * (1 + title.count("\n"))
    figure = Figure(figsize=(9, rows * row_height + heading + footer), layout=ConstrainedLayoutEngine(h_pad=0.06))
    figure.suptitle(title, x=0.01, ha="left")
    panels = list(figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": (), "yticks": ()}).flat)
    for axes in panels:
        axes.set_axis_off()
    return figure, panels[:count]


def _captions(
    first_lines: Sequence[str],
    predictions: Sequence[int],
    confidences: Sequence[float],
    classes: Sequence[str],
    confidence_format: str,
) -> list[str]:
    return [
        f"{first_line}\npredicted: {shortened(classes[prediction])}{confidence_format.format(confidence)}"
        for first_line, prediction, confidence in zip(first_lines, predictions, confidences, strict=True)
    ]


def _draw_pair(axes: Axes, image: np.ndarray, heat_map: np.ndarray, target: str) -> None:
    height, width, _ = image.shape
    gap = max(1, width // 16)
    if not heat_map.any():
        axes.text(
            1.5 * width + gap - 0.5,
            height / 2,
            f"no evidence\nfor {target}",
            color="white",
            ha="center",
            va="center",
            fontsize=8,
            parse_math=False,
        )
    axes.imshow(np.concatenate([image, np.ones((height, gap, 3)), overlay(image, heat_map)], axis=1))


def draw_heat_map_colours(figure: Figure, panels: Sequence[Axes]) -> None:
    """A bar under the panels that says what the colours of `overlay` mean."""
    bar = figure.colorbar(
        ScalarMappable(cmap=HEAT_MAP_COLOURS), ax=panels, location="bottom", shrink=0.4, aspect=40, pad=0.02
    )
    bar.set_ticks([0, 1], labels=["least evidence in this image", "most evidence in this image"])
    bar.outline.set_visible(False)


def overlay(image: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) in 0..1 under its heat map (H, W); dark and grey where nothing in it speaks for the class."""
    if not heat_map.any():
        return np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2) / 3
    return (image + matplotlib.colormaps[HEAT_MAP_COLOURS](heat_map)[..., :3]) / 2


def _unit(image: np.ndarray) -> np.ndarray:
    return image / 255 if image.dtype == np.uint8 else image


def shortened(name: str, length: int = 14) -> str:
    """The name with at most `length` characters; a longer one ends in an ellipsis."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
