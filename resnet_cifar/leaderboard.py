"""The table that answers a sweep's question: a row per job, seeds of one point reduced to mean, deviation and count."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from resnet_cifar.lr_finder import RangeTest, suggest
from resnet_cifar.run_folder import status
from resnet_cifar.sweep_plan import SKIP, Plan, job_name, short_names, short_value
from resnet_cifar.tables import append_csv, read_csv

SEED = "seed"


@dataclass(frozen=True)
class Result:
    """What became of a job; accuracy (%) and loss (mean per image) of the last epoch, seconds of all epochs.

    One that is not FINISHED has none of them, and no history. Nor has one that trained nothing, but for the accuracy, which is
    that on the test images, if any. The learning rate found is that of `task=find_lr`, whose only result it is.
    """

    name: str
    values: dict[str, str]
    folder: Path
    status: str
    error: str
    evaluated_on: str
    accuracy: float | None
    loss: float | None
    test_accuracy: float | None
    seconds: float | None
    history: list[dict[str, float]]
    found_lr: float | None = None


def results(plan: Plan) -> list[Result]:
    """The result of every job of a sweep, read from its folder."""
    return [_result(job.name, job.values, Path(job.result), skipped=job.action == SKIP) for job in plan.jobs]


def _result(name: str, values: dict[str, str], folder: Path, skipped: bool) -> Result:
    word, error = status(folder)
    # What was skipped is finished by the store's word; a copy from there has no status.
    word = "FINISHED" if skipped else word or "UNFINISHED"
    finished = word == "FINISHED"
    history = read_csv(folder / "history.csv") if finished and (folder / "history.csv").exists() else []
    held_out = history and (folder / "config.yaml").exists() and OmegaConf.load(folder / "config.yaml").data.val_size
    test_accuracy = _test_accuracy(folder) if finished else None
    return Result(
        name=name,
        values=values,
        folder=folder,
        status=word,
        error="" if finished else " ".join(error.split()),
        evaluated_on="val" if held_out else "test",
        accuracy=history[-1]["eval_accuracy"] if history else test_accuracy,
        loss=history[-1]["eval_loss"] if history else None,
        test_accuracy=test_accuracy,
        seconds=sum(row["epoch_seconds"] for row in history) if history else None,
        history=history,
        found_lr=_found_lr(folder) if finished and not history else None,
    )


def _found_lr(folder: Path) -> float | None:
    if not (folder / "lr_finder.csv").exists():
        return None
    rows, cfg = read_csv(folder / "lr_finder.csv"), OmegaConf.load(folder / "config.yaml")
    lrs, losses = (np.array([row[key] for row in rows]) for key in ("lr", "loss"))
    return suggest(RangeTest(lrs, losses), cfg.lr_finder.select)


def _test_accuracy(folder: Path) -> float | None:
    if not (folder / "predictions.csv").exists():
        return None
    with (folder / "predictions.csv").open(newline="") as file:
        # Of a user's own pictures nobody has told the labels.
        correct = [row["label"] == row["prediction"] for row in csv.DictReader(file) if "label" in row]
    return 100 * mean(correct) if correct else None


def ranked_by(found: Sequence[Result]) -> str:
    """`val/accuracy` where every finished job has one, else `test/accuracy`."""
    finished = [result for result in found if result.accuracy is not None]
    held_out = finished and all(result.evaluated_on == "val" for result in finished)
    return "val/accuracy" if held_out else "test/accuracy"


def score(result: Result, metric: str) -> float | None:
    """The accuracy (%) that `metric` names."""
    return result.test_accuracy if metric == "test/accuracy" and result.evaluated_on == "val" else result.accuracy


def points(found: Sequence[Result]) -> list[list[Result]]:
    """The results that differ in nothing but the seed, together; in the order of the sweep."""
    groups: dict[tuple, list[Result]] = {}
    for result in found:
        groups.setdefault(tuple((key, value) for key, value in result.values.items() if key != SEED), []).append(result)
    return list(groups.values())


def table(found: Sequence[Result]) -> list[dict[str, Any]]:
    """The leaderboard, best first: the varied values, the accuracy ranked by, and where seeds varied its deviation and count.

    Of equals the one with the lower loss is first.
    The deviation is the sample's, n - 1; an accuracy is a mean over the FINISHED runs of the point.
    """
    metric, loss = ranked_by(found), ranked_by(found).replace("accuracy", "loss")
    seeds = any(SEED in result.values for result in found)
    rows = []
    for group in points(found):
        scores = [value for value in (score(result, metric) for result in group) if value is not None]
        losses = [result.loss for result in group if result.loss is not None and metric.startswith(result.evaluated_on)]
        seconds = [result.seconds for result in group if result.seconds is not None]
        rates = [result.found_lr for result in group if result.found_lr is not None]
        words = [result.status for result in group]
        row: dict[str, Any] = {key: value for key, value in group[0].values.items() if key != SEED}
        row[metric] = round(mean(scores), 4) if scores else None
        if seeds:
            row["deviation"] = round(stdev(scores), 4) if len(scores) > 1 else None
            row["runs"] = len(scores)
        row[loss] = round(mean(losses), 6) if losses else None
        row["seconds"] = round(mean(seconds), 1) if seconds else None
        row["found_lr"] = " to ".join(f"{lr:.6g}" for lr in sorted({min(rates), max(rates)})) if rates else None
        row["status"] = (
            words[0]
            if len(group) == 1
            else ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words, reverse=True)))
        )
        row["error"] = "; ".join(dict.fromkeys(result.error for result in group if result.error))
        rows.append(row)
    return sorted(rows, key=lambda row: (or_worst(row[metric]), or_worst(row[loss], sign=-1)), reverse=True)


def or_worst(value: float | None, sign: int = 1) -> float:
    """`sign` times the value, by which rows are ordered; what has none comes last."""
    return -inf if value is None else sign * value


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The best point of a leaderboard and the next, in a sentence of Markdown."""
    measured = [row for row in rows if row[_metric(row)] is not None]
    if not measured:
        ended = any(re.search(r"\bFINISHED", row["status"]) for row in rows)
        return "**No accuracy was measured to rank by.**" if ended else "**No run came to its end.**"
    best, *rest = (_in_words(row) for row in measured[:2])
    return f"**Best: {best}.**" + (f" Next of {len(measured)}: {rest[0]}." if rest else "")


def _metric(row: dict[str, Any]) -> str:
    return next(key for key in row if key.endswith("/accuracy"))


def _in_words(row: dict[str, Any]) -> str:
    metric = _metric(row)
    point = job_name({key: row[key] for key in list(row)[: list(row).index(metric)]}, None)
    cells = [_cell(key, row[key], 0) for key in (metric, "deviation") if row.get(key) is not None]
    all_finished = re.fullmatch(r"(\d+ )?FINISHED", row["status"])  # a mean over those that came through says so
    runs = f" ({row['status']})" if not all_finished else f" ({row['runs']} runs)" if row.get("runs", 1) > 1 else ""
    return f"{point + ': ' if point else ''}{metric} {' '.join(cells)}{runs}"


def rows_of_runs(found: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for every job, in the order of the sweep, with what `table` reduces."""
    metric = ranked_by(found)
    return [
        {
            **result.values,
            metric: score(result, metric),
            "last_epoch_loss": result.loss,
            **({} if metric == "test/accuracy" else {"test/accuracy": result.test_accuracy}),
            "seconds": result.seconds,
            "found_lr": result.found_lr,
            "status": result.status,
            "error": result.error,
            "folder": result.folder,
        }
        for result in found
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV, in the place of what was there."""
    path.unlink(missing_ok=True)
    append_csv(path, rows)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal, in aligned columns; errors, which are long, cut short."""
    cells = _cells(rows, error_length=60)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def markdown(rows: Sequence[dict[str, Any]], gap: str = "") -> str:
    """The rows as a Markdown table; `gap` ends each cell, for MLflow, which shows columns without any between them."""
    cells = [[cell.replace("|", chr(92) + "|") + gap for cell in line] for line in _cells(rows, error_length=300)]
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(rows: Sequence[dict[str, Any]], error_length: int) -> list[list[str]]:
    nothing = {"runs": (0,)}  # beside None and "": a column of nothing else is left out
    keys = [key for key in rows[0] if any(row[key] not in (None, "", *nothing.get(key, ())) for row in rows)]
    names = {**short_names(keys), "seconds": "time"}
    # The metrics keep their names: what is ranked by must be said.
    head = [key if key.endswith(("/accuracy", "/loss")) else names[key] for key in keys]
    return [head, *([_cell(key, row[key], error_length) for key in keys] for row in rows)]


def _cell(key: str, value: Any, error_length: int) -> str:
    if value is None or value == "":
        return "-"
    if key == "seconds":
        return f"{int(value // 60)}:{value % 60:04.1f}"
    if key.endswith("/accuracy"):
        return f"{value:.2f}%"
    if key == "deviation":
        return f"± {value:.2f}"
    if key.endswith("/loss"):
        return f"{value:.4f}"
    if key == "error" and len(value) > error_length:
        return f"{value[: error_length - 1]}…"
    return short_value(str(value))
