"""The figures of a sweep: results in, `matplotlib.figure.Figure` out, in the style of a run's own (figures.py)."""

import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from resnet_cifar.figures import EVAL, INK, MARK, MUTED, STYLE, draw_heat_map_colours, overlay, shortened
from resnet_cifar.sweep_plan import short_value

LINES = ("#1d4ed8", "#b91c1c", "#047857", "#b45309", "#7c3aed", "#0e7490", "#be185d", "#4d7c0f", "#475569", "#92400e")
OTHERS = "#cbd5e1"  # those that the legend has no colour for
LEGEND_WIDTH, LONGEST_TICK, TICKS_WIDTH = 36, 28, 95  # characters


@matplotlib.rc_context(STYLE)
def accuracy_against(
    key: str, values: Sequence[str], accuracies: Sequence[float], others: Sequence[str], metric: str
) -> Figure:
    """Accuracy (%) of every run over the value of `key` it had, and their mean at each value.

    `others` says for each run what else it varied, seeds aside; runs that share it are joined by a line of their own.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    ticks = sorted(set(values), key=_in_order)
    series = list(dict.fromkeys(others))
    for number, other in enumerate(series):
        colour = (LINES[number] if number < len(LINES) else OTHERS) if len(series) > 1 else EVAL
        mine = [(ticks.index(v), a) for v, a, o in zip(values, accuracies, others, strict=True) if o == other]
        places = sorted({place for place, _ in mine})
        means = [mean(accuracy for place, accuracy in mine if place == at) for at in places]
        # Beside each other, not over each other, where two series have the same value.
        shift = min(0.04, 0.6 / len(series)) * (number - (len(series) - 1) / 2)
        axes.plot([at + shift for at in places], means, color=colour, linewidth=1.4)
        axes.plot([at + shift for at, _ in mine], [a for _, a in mine], "o", color=colour, markersize=6, alpha=0.6)
    written = [
        value if len(value) <= LONGEST_TICK else f"…{value[1 - LONGEST_TICK :]}" for value in map(short_value, ticks)
    ]
    slanted = sum(len(value) + 2 for value in written) > TICKS_WIDTH
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(ticks)), written, parse_math=False, **turned)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set_xlabel(key)
    axes.set_ylabel(f"final {metric} (%)")
    axes.set_title("Final accuracy: a point per run, lines through the means")
    if len(series) > 1:
        _draw_legend(figure, [name or "mean" for name in series])
    return figure


@matplotlib.rc_context(STYLE)
def learning_curves(runs: Sequence[tuple[str, Sequence[float]]], metric: str) -> Figure:
    """Accuracy (%) by epoch of every run; seeds of one point have its name and colour, thin, under their mean.

    Names come best first, and in that order into the legend, which ends after ten. The axis begins at the lowest mean after
    a third of the epochs, from where on differences count; what is below is cut off.
    """
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for name, _ in runs))
    longest = max(len(accuracies) for _, accuracies in runs)
    lowest, highest = 100.0, 0.0
    for place, name in reversed(list(enumerate(names))):  # the best on top
        colour = LINES[place] if place < len(LINES) else OTHERS
        curves = [accuracies for other, accuracies in runs if other == name]
        average = [mean(at_epoch) for at_epoch in zip(*curves, strict=False)]  # as far as all of them came
        style = "o-" if len(average) < 4 else "-"
        for accuracies in curves if len(curves) > 1 else ():
            axes.plot(range(1, len(accuracies) + 1), accuracies, style, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(range(1, len(average) + 1), average, style, color=colour, linewidth=1.6)
        lowest = min([lowest, *(average[longest // 3 :] or average)])
        highest = max(highest, *(max(accuracies) for accuracies in curves))
    margin = 0.05 * (highest - lowest) + 0.1
    axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlim(0.5, longest + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{metric} (%)")
    how_many = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    axes.set_title(f"{metric} of {how_many}" + ("; thick: mean over seeds" if len(names) < len(runs) else ""))
    _draw_legend(figure, [name or "all runs" for name in names])
    return figure


@matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"})
def final_accuracies(runs: Sequence[tuple[str, float]], compared_with: str, metric: str) -> Figure:
    """Final accuracy (%): a line of points per name, one for each of its runs, with their mean; names come best first.

    A broken line goes through the mean of the name `compared_with`.
    """
    names = list(dict.fromkeys(name for name, _ in runs))
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        accuracies = [accuracy for other, accuracy in runs if other == name]
        axes.plot(accuracies, [place] * len(accuracies), "o", color=EVAL, markersize=6, alpha=0.5)
        if len(accuracies) > 1:
            axes.plot([mean(accuracies)], [place], "|", color=INK, markersize=16, markeredgewidth=2)
        if name == compared_with:
            axes.axvline(mean(accuracies), color=MUTED, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"final {metric} (%)")
    strokes = ", a stroke at their mean" if len(names) < len(runs) else ""
    axes.set_title(f"Final accuracy: a point per seed{strokes}", loc="left")
    return figure


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def grad_cam_grid(images: np.ndarray, labels: Sequence[str], runs: Sequence[Mapping[str, Any]], layer: str) -> Figure:
    """The same images in every run: a row per image, (N, H, W, 3) uint8, a column per run.

    A run has its `name`, `heat_maps` (N, H, W) in 0..1 against the true class, and its `predictions`, class names.
    """
    rows, columns = len(images), 1 + len(runs)
    names = [_in_column(str(run["name"]), 100 // columns) for run in ({"name": "image"}, *runs)]
    room = 112 // max(columns, 6)  # characters of a class's name
    heading = 0.5 + 0.15 * max(1 + name.count("\n") for name in names)
    height = heading + rows * (9 / max(columns, 6) + 0.22) + 0.4
    figure = Figure(figsize=(9, height), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - heading / height)))
    title = f"Grad-CAM against the true class, {layer}: the same images in every run; dark grey: no evidence"
    figure.suptitle(title, x=0.01, y=1 - 0.08 / height, ha="left", va="top")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, (image, label) in enumerate(zip(images / 255, labels, strict=True)):
        panels[row, 0].imshow(image)
        panels[row, 0].set_title(
            f"true: {shortened(label, room - 6)}", fontsize=8, loc="center", color=INK, parse_math=False
        )
        for column, run in enumerate(runs, start=1):
            heat_map, prediction = run["heat_maps"][row], run["predictions"][row]
            panels[row, column].imshow(overlay(image, heat_map))
            colour = MUTED if prediction == label else MARK
            panels[row, column].set_title(
                shortened(prediction, room), fontsize=8, loc="center", color=colour, parse_math=False
            )
    for axes, name in zip(panels[0], names, strict=True):
        written = axes.annotate(
            name, (0.5, 1.24), xycoords="axes fraction", ha="center", va="bottom", fontsize=9, fontweight="bold"
        )
        written.set_parse_math(False)
        written.set_in_layout(False)  # the images would make room for a long name
    for axes in panels.flat:
        axes.set_axis_off()
    draw_heat_map_colours(figure, list(panels.flat))
    return figure


def _draw_legend(figure: Figure, names: Sequence[str]) -> None:
    """The names beside the axes, in the order of LINES, as many as have a colour; a figure that is too low for it grows."""
    if (more := len(names) - len(LINES)) > 1:
        names = [*names[: len(LINES)], f"and {more} more"]
    labels = ["\n".join(textwrap.wrap(name, LEGEND_WIDTH)) for name in names]
    handles = [Line2D([], [], color=colour, linewidth=1.6) for colour in (*LINES, OTHERS)[: len(labels)]]
    legend = figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(max(figure.get_figheight(), 0.4 + 0.17 * lines + 0.06 * len(labels)))


def _in_column(name: str, width: int) -> str:
    """A run's name, `key=value key=value`, in lines of at most `width` characters."""
    words = name.replace("=", "= ").split() if len(name) > width else name.split()
    lines = [line for word in words for line in textwrap.wrap(word.replace("_", "_ "), width)]
    return "\n".join(line.replace("_ ", "_") for line in lines)


def _in_order(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value
