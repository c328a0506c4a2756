"""Measure what `studies.yaml` asks for and `results.csv` does not have yet, a run after the other.

    python experiments/accuracy/measure.py full_size --data-root ../shared/data
    python experiments/accuracy/measure.py ablation --data-root ../shared/data --seeds 0 1 2

A run that was killed goes on where it stopped when the command is given again. `results.csv` gets a row as soon as a run ends.
Runs of a study are told apart by row and seed. `--list` says what is there and what is not, and runs nothing.
"""

import argparse
import csv
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

from omegaconf import OmegaConf

from resnet_cifar import recording, tracking
from resnet_cifar.errors import StorageError
from resnet_cifar.report import TARGET_ACCURACY, append_csv, read_csv

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.csv"


def main() -> None:
    studies = OmegaConf.to_container(OmegaConf.load(HERE / "studies.yaml"), resolve=True)
    arguments = parser(studies).parse_args()
    study = studies[arguments.study]
    rows = {row: overrides for row, overrides in study["rows"].items() if not arguments.rows or row in arguments.rows}
    for seed in arguments.seeds or study["seeds"]:  # seed by seed: a study that is interrupted has compared all rows
        for row, overrides in rows.items():
            if (arguments.study, row, str(seed)) in measured():
                continue
            command = [*shlex.split(f"{study['all']} {overrides}"), f"seed={seed}"]
            print(f"{arguments.study}: {row}, seed {seed}: python run.py {shlex.join(command)}", flush=True)
            if not arguments.list:
                folder = Path(arguments.output_dir, arguments.study, f"{row}_seed_{seed}").absolute()
                run(command, folder, arguments.data_root)
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
    arguments.add_argument("--list", action="store_true", help="say what is not measured yet, and run nothing")
    return arguments


def measured() -> set[tuple[str, str, str]]:
    """Study, row and seed of each row of the results."""
    if not RESULTS.exists():
        return set()
    with RESULTS.open(newline="") as file:
        return {(row["study"], row["row"], row["seed"]) for row in csv.DictReader(file)}


def run(overrides: list[str], folder: Path, data_root: str) -> None:
    """Run or resume it to its end; the process' exit code is ours where that fails."""
    if (folder / "config.yaml").exists():
        command = [f"resume={folder}"]
    else:
        command = [*overrides, f"data.root={Path(data_root).absolute()}", f"hydra.run.dir={folder}"]
    code = subprocess.run([sys.executable, str(ROOT / "run.py"), *command], cwd=ROOT).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def result(folder: Path) -> dict[str, object]:
    """The row of a finished run, from its files and from MLflow."""
    cfg = OmegaConf.load(folder / "config.yaml")
    tracked = tracking.Store(cfg.tracking.uri).client.get_run(recording.run_id(folder)).data
    history = read_csv(folder / "history.csv")
    held_out = cfg.data.val_size > 0  # a choice is made on held-out images: the test accuracy is not even written down
    return {
        "split": "val" if held_out else "test",
        "accuracy": history[-1]["eval_accuracy"],
        "accuracy_flip_tta": "" if held_out else tracked.metrics.get("test/accuracy_flip_tta", ""),
        "loss": history[-1]["eval_loss"],
        "epochs": len(history),
        "first_epoch_over_90": next((row["epoch"] for row in history if row["eval_accuracy"] >= TARGET_ACCURACY), ""),
        "max_lr": tracked.params.get("scheduler.max_lr", ""),
        "seconds": round(sum(row["epoch_seconds"] for row in history)),
        "device": f"{tracked.tags['device_name']}, {tracked.tags['threads']} threads",
        "precision": tracked.tags["precision"],
        "commit": tracked.tags.get("git_commit", ""),
        "date": date.today().isoformat(),
        "overrides": " ".join(word for word in tracked.tags["overrides"].split() if not word.startswith("data.root=")),
    }


if __name__ == "__main__":
    main()
