"""Measure what `studies.yaml` asks for and `results.csv` does not have yet, a run after the other.

    python experiments/accuracy/measure.py full_size --data-root ../shared/data
    python experiments/accuracy/measure.py ablation --data-root ../shared/data --seeds 0 1 2

A run that was killed goes on where it stopped when the command is given again. `results.csv` gets a row as soon as a run ends.
Its history goes to `histories/`. Runs of a study are told apart by row and seed: other `--seeds` are other runs. `--list` says
what is there and what is not, and runs nothing; `--report` prints the study's table and draws its learning curves and final
accuracies into `figures/`.
"""

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import mean, stdev

from omegaconf import OmegaConf

from resnet_cifar import leaderboard, sweep_figures
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.errors import StorageError
from resnet_cifar.fingerprint import config_hash
from resnet_cifar.leaderboard import SEED
from resnet_cifar.report import TARGET_ACCURACY
from resnet_cifar.tables import append_csv, read_csv
from resnet_cifar.tracked_run import SUMMARY

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.csv"
HISTORIES = HERE / "histories"
ELSEWHERE = ("data.root=", "tracking=")  # overrides that do not change a result


def main() -> None:
    studies = OmegaConf.to_container(OmegaConf.load(HERE / "studies.yaml"), resolve=True)
    arguments = parser(studies).parse_args()
    study = studies[arguments.study]
    if arguments.report:
        return report(arguments.study, first=next(iter(study["rows"])))
    unknown = set(arguments.rows or ()) - set(study["rows"])
    if unknown:
        sys.exit(f"{arguments.study} has no row {', '.join(sorted(unknown))}; its rows: {', '.join(study['rows'])}")
    rows = {row: overrides for row, overrides in study["rows"].items() if not arguments.rows or row in arguments.rows}
    for seed in arguments.seeds or study["seeds"]:  # seed by seed: a study that is interrupted has compared all rows
        for row, overrides in rows.items():
            name = f"{arguments.study}: {row}, seed {seed}"
            there = {(run["row"], run["seed"]): run["accuracy"] for run in measured(arguments.study)}
            if (row, str(seed)) in there:
                print(f"{name}: {there[row, str(seed)]}% in {RESULTS.name}, not run again")
                continue
            command = [*shlex.split(f"{study['all']} {overrides}"), f"seed={seed}"]
            print(f"{name}: python run.py {shlex.join(command)}", flush=True)
            if not arguments.list:
                folder = Path(arguments.output_dir, arguments.study, f"{row}_seed_{seed}").absolute()
                run([*command, f"tracking={arguments.tracking}"], folder, arguments.data_root)
                history(arguments.study, row, seed).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / "history.csv", history(arguments.study, row, seed))
                if not append_csv(RESULTS, [{"study": arguments.study, "row": row, "seed": seed, **result(folder)}]):
                    sys.exit(StorageError.exit_code)


def parser(studies: dict) -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("study", choices=studies)
    arguments.add_argument("--rows", nargs="*", help="these rows of the study alone")
    arguments.add_argument("--seeds", nargs="*", type=int, help="instead of the study's own")
    arguments.add_argument("--data-root", default=str(ROOT / "data"), help="the folder that holds cifar-10-batches-py")
    arguments.add_argument("--output-dir", default=str(ROOT / "outputs" / "accuracy"), help="for the runs' folders")
    arguments.add_argument("--tracking", choices=("mlflow", "none"), default="mlflow", help="none needs no MLflow")
    arguments.add_argument("--list", action="store_true", help="say what is measured and what is not, and run nothing")
    arguments.add_argument("--report", action="store_true", help="print and draw what is measured, and run nothing")
    return arguments


def measured(study: str) -> list[dict[str, str]]:
    """The study's rows of the results."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return [entry for entry in csv.DictReader(file) if entry["study"] == study]


def history(study: str, row: str, seed: int | str) -> Path:
    """Where the history of a run is kept: loss, accuracy and time of each epoch."""
    return HISTORIES / study / f"{row}_seed_{seed}.csv"


def report(study: str, first: str) -> None:
    """Prints the study's table in Markdown, best first, and draws `figures/<study>.png` (curves) and `<study>_final.png`.

    Accuracies (%) are means over seeds, the first with the sample's deviation. A difference is to the row `first`: the mean
    over the seeds that both have, with its standard error.
    """
    entries = measured(study)
    found = [finished(entry) for entry in entries]
    if not found:
        sys.exit(f"Nothing of {study} is measured yet.")
    metric = leaderboard.ranked_by(found)
    accuracies = {(run.values["row"], run.values[SEED]): run.accuracy for run in found}
    table = []
    for row in leaderboard.table(found):
        mine = {seed: accuracy for (name, seed), accuracy in accuracies.items() if name == row["row"] != first}
        pairs = [accuracy - accuracies[first, seed] for seed, accuracy in mine.items() if (first, seed) in accuracies]
        shown = {key: row[key] for key in ("row", metric, "deviation", "runs")}
        flipped = [entry["accuracy_flip_tta"] for entry in entries if entry["row"] == row["row"]]
        if all(flipped):
            shown["with flip TTA"] = f"{mean(map(float, flipped)):.2f}%"
        table.append({**shown, "difference": with_standard_error(pairs)})
    print(leaderboard.markdown(table))
    ranked = [run for row in table for run in found if run.values["row"] == row["row"]]
    finals = [(run.values["row"], run.accuracy) for run in ranked]
    curves = [(run.values["row"], [epoch["eval_accuracy"] for epoch in run.history]) for run in ranked if run.history]
    (HERE / "figures").mkdir(exist_ok=True)
    sweep_figures.final_accuracies(finals, first, metric).savefig(HERE / "figures" / f"{study}_final.png")
    if curves:
        sweep_figures.learning_curves(curves, metric).savefig(HERE / "figures" / f"{study}.png")


def finished(entry: dict[str, str]) -> leaderboard.Result:
    """A row of the results as the leaderboard takes it, with the run's history where that is kept."""
    path = history(entry["study"], entry["row"], entry["seed"])
    return leaderboard.Result(
        name=entry["row"],
        values={"row": entry["row"], SEED: entry["seed"]},
        folder=path.parent,
        status="FINISHED",
        error="",
        evaluated_on=entry["split"],
        accuracy=float(entry["accuracy"]),
        loss=None,
        test_accuracy=None,
        seconds=None,
        history=read_csv(path) if path.exists() else [],
    )


def with_standard_error(differences: list[float]) -> str:
    """The mean of differences and, from two on, its standard error."""
    if not differences:
        return ""
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.2f}{error}"


def run(overrides: list[str], folder: Path, data_root: str) -> None:
    """Run or resume it to its end; the process' exit code is ours where that fails."""
    command = [*overrides, f"data.root={Path(data_root).absolute()}", f"hydra.run.dir={folder}"]
    if (folder / "config.yaml").exists():
        asked_for = compose(parse_arguments(command)).jobs[0][0]
        if config_hash(asked_for) != config_hash(OmegaConf.load(folder / "config.yaml")):
            sys.exit(f"{folder} holds a run of other values than studies.yaml has now: move it away")
        command = [f"resume={folder}", f"data.root={Path(data_root).absolute()}"]
    code = subprocess.run([sys.executable, str(ROOT / "run.py"), *command], cwd=ROOT).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def result(folder: Path) -> dict[str, object]:
    """The row of a finished run, from its files."""
    cfg = OmegaConf.load(folder / "config.yaml")
    if not (folder / SUMMARY).exists():
        sys.exit(f"{folder} has no {SUMMARY}, its run is of an older version: move it away")
    said = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    params, tags = said["params"], {key.removeprefix("resumed."): value for key, value in said["tags"].items()}
    tags |= said["tags"]  # what a run began with, where it was recorded then
    history = read_csv(folder / "history.csv")
    held_out = cfg.data.val_size > 0  # a choice is made on held-out images: the test accuracy is not even written down
    return {
        "split": "val" if held_out else "test",
        "accuracy": history[-1]["eval_accuracy"],
        "accuracy_flip_tta": "" if held_out else said["metrics"].get("test/accuracy_flip_tta", ""),
        "loss": history[-1]["eval_loss"],
        "epochs": len(history),
        "first_epoch_over_90": next((row["epoch"] for row in history if row["eval_accuracy"] >= TARGET_ACCURACY), ""),
        "max_lr": params.get("scheduler.max_lr", ""),
        "seconds": round(sum(row["epoch_seconds"] for row in history)),
        "device": f"{tags['device_name']}, {tags['threads']} threads",
        "precision": tags["precision"],
        # The second of a run that went on under another one.
        "commit": " ".join(dict.fromkeys(filter(None, map(tags.get, ("git_commit", "resumed.git_commit"))))),
        "date": date.today().isoformat(),
        "overrides": shlex.join(word for word in shlex.split(tags["overrides"]) if not word.startswith(ELSEWHERE)),
    }


if __name__ == "__main__":
    main()
