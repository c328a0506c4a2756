"""The end of a sweep: its leaderboard on the terminal, in files, with figures, and as one summary run in MLflow."""

import csv
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from resnet_cifar import checkpoint, explain, leaderboard, parts, sweep_figures, sweep_store
from resnet_cifar.console import say, shown
from resnet_cifar.delivery import reason
from resnet_cifar.errors import StorageError
from resnet_cifar.evaluation import restore_parts
from resnet_cifar.leaderboard import SEED, Result, score
from resnet_cifar.report import save_figure
from resnet_cifar.suggestions import program
from resnet_cifar.sweep_plan import FAILED, Plan, job_name, load_plan, short_names

GRID_IMAGES, GRID_RUNS = 6, 7
NOTE_ROWS = 25  # MLflow cuts a note at 8000 characters


def publish(folder: Path, settings: DictConfig) -> None:
    """Print, write, draw and log what the sweep in `folder` found; a figure that fails is a warning.

    Raises:
        StorageError: the tracking store takes no summary; all else is done by then.
    """
    plan = load_plan(folder)
    found = leaderboard.results(plan)
    rows, metric = leaderboard.table(found), leaderboard.ranked_by(found)
    ranked = f", ranked by {metric}" if any(score(result, metric) is not None for result in found) else ""
    heading = f"Sweep {plan.id}: {len(found)} job{'s' if len(found) > 1 else ''}{ranked}"
    command = f"`{program()} {shlex.join(plan.command)}`\n"
    table = f"# {heading}\n\n{leaderboard.verdict(rows)}\n\n{leaderboard.markdown(rows)}\n\n{command}"
    leaderboard.write_csv(folder / "leaderboard.csv", rows)
    leaderboard.write_csv(folder / "runs.csv", leaderboard.rows_of_runs(found))
    (folder / "leaderboard.md").write_text(table, encoding="utf-8")
    draw(folder, found, metric)
    there = [name for name in ("leaderboard.csv", "leaderboard.md", "figures", FAILED) if (folder / name).exists()]
    where = f"folder   {shown(folder)}: {', '.join(there)}"
    say(f"\n{heading}\n\n{leaderboard.text(rows)}\n\n{where}")
    if settings.tracking.uri is not None:
        more = f"\n\nThe other {len(rows) - NOTE_ROWS} points are in leaderboard.csv." if len(rows) > NOTE_ROWS else ""
        note = (
            f"{leaderboard.verdict(rows)}\n\n{leaderboard.markdown(rows[:NOTE_ROWS], gap='&emsp;')}{more}\n\n{command}"
        )
        _log(plan, folder, settings, note, found, metric)


def _log(plan: Plan, folder: Path, settings: DictConfig, note: str, found: Sequence[Result], metric: str) -> None:
    varied = [
        name for key, name in short_names(list(found[0].values)).items() if key != SEED or len(found[0].values) == 1
    ]
    name = f"sweep of {', '.join(varied)} ({plan.id})" if varied else f"sweep ({plan.id})"
    try:
        summary = sweep_store.log_summary(settings, plan.id, name, note, folder)
    except Exception as error:
        message = f"The sweep's summary is not in MLflow ({reason(error)}).\nThe same command again adds it."
        raise StorageError(message) from error
    best_first = sorted(found, key=lambda result: score(result, metric) or -1, reverse=True)
    run_ids = [run_id for result in best_first if (run_id := sweep_store.run_id(result.folder))]
    say("\n".join(sweep_store.where_to_look(settings.tracking.uri, summary, run_ids)))


def draw(folder: Path, found: Sequence[Result], metric: str) -> None:
    """The figures over all finished runs; a sweep without any has none."""
    finished = [result for result in found if score(result, metric) is not None]
    if not finished:
        return
    for key, name in short_names(list(finished[0].values)).items():
        if key != SEED:
            save_figure(folder, f"accuracy_against_{name}", partial(_against, key, finished, metric))
    points = ranked_points([result for result in finished if result.history], metric)
    if not points:  # a sweep of evaluations: no training, no curves, and the pictures are in the runs' own figures
        return
    save_figure(folder, "learning_curves", lambda: _curves(points))
    save_figure(folder, "grad_cam", lambda: _grid([point[0] for point in points]))


def ranked_points(finished: Sequence[Result], metric: str) -> list[list[Result]]:
    """The points, the highest mean first as in the leaderboard; of each its runs, the best first."""

    def rank(*results: Result) -> tuple[float, float]:
        return mean(_known_score(result, metric) for result in results), mean(
            leaderboard.or_worst(result.loss, sign=-1) for result in results
        )

    points = leaderboard.points(sorted(finished, key=rank, reverse=True))
    return sorted(points, key=lambda point: rank(*point), reverse=True)


def _known_score(result: Result, metric: str) -> float:
    accuracy = score(result, metric)
    assert accuracy is not None  # only of what is finished
    return accuracy


def _point(result: Result, without: str = "") -> str:
    """What a run varied beside its seed and `without`."""
    return job_name({key: value for key, value in result.values.items() if key not in (SEED, without)}, None)


def _against(key: str, finished: Sequence[Result], metric: str) -> Figure:
    scores = [_known_score(result, metric) for result in finished]
    others = [_point(result, without=key) for result in finished]
    return sweep_figures.accuracy_against(key, [result.values[key] for result in finished], scores, others, metric)


def _curves(points: Sequence[Sequence[Result]]) -> Figure:
    runs = [(_point(run), [row["eval_accuracy"] for row in run.history]) for point in points for run in point]
    on = {run.evaluated_on for point in points for run in point}
    return sweep_figures.learning_curves(runs, f"{on.pop() if len(on) == 1 else 'val or test'}/accuracy")


def _grid(best_of_points: Sequence[Result]) -> Figure:
    """The most confident mistakes of the best point's best run, as the best run of each point sees them."""
    restored = [(result, *_restore(result.folder)) for result in best_of_points[:GRID_RUNS]]
    cfg = restored[0][1]
    test_images = parts.load_test(cfg.data)
    chosen = test_images[_mistakes(best_of_points[0].folder)]
    classes, runs = chosen.classes, []
    for result, run_cfg, run_built in restored:
        # Other images or classes would be another question.
        if run_built.classes != classes or run_cfg.data.dataset != cfg.data.dataset:
            continue
        inputs = run_built.augment.normalise(chosen.images.to(run_built.device))
        layer = next(iter(run_cfg.explain.layers.values()))
        heat_maps, _ = explain.grad_cam(run_built.network, inputs, chosen.labels, layer)
        with torch.no_grad():
            predictions = [classes[place] for place in run_built.network.eval()(inputs).argmax(1).tolist()]
        runs.append({"name": job_name(result.values, None), "heat_maps": heat_maps, "predictions": predictions})
    shown_images = chosen.images.permute(0, 2, 3, 1).numpy()
    labels = [classes[label] for label in chosen.labels.tolist()]
    return sweep_figures.grad_cam_grid(shown_images, labels, runs, next(iter(cfg.explain.layers)))


def _restore(folder: Path) -> tuple[DictConfig, Any]:
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.trainer.device = "auto"  # the jobs may have run where there were GPUs
    return cfg, restore_parts(cfg, checkpoint.load(folder))


def _mistakes(folder: Path) -> torch.Tensor:
    """Indices of the most confident mistakes in `predictions.csv`, or of the least confident images where there are none."""
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    ordered = sorted(wrong or rows, key=lambda row: float(row["confidence"]), reverse=bool(wrong))
    return torch.from_numpy(np.array([int(row["index"]) for row in ordered[:GRID_IMAGES]]))
