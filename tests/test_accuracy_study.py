"""The script of the accuracy study measures what its results do not have yet, and nothing twice."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDIES = """
tiny:
  seeds: [0]
  all: >-
    data.train_size=64 data.test_size=20 data.batch_size=32 model.width=0.125 trainer.epochs=1
    scheduler.max_lr=0.01 explain.num_images=1 trainer.flip_tta=true output_dir={outputs}
  rows:
    first: ""
    other: trainer.label_smoothing=0.1
"""


@pytest.fixture
def measure(tmp_path, outputs):
    """Run the script on a study of two tiny runs, in a folder of its own."""
    study = tmp_path / "experiments" / "accuracy"
    study.mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / "accuracy" / "measure.py", study)
    (study / "studies.yaml").write_text(STUDIES.format(outputs=outputs))
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")

    def run(*arguments):
        command = [sys.executable, str(study / "measure.py"), "tiny", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stdout + done.stderr
        results = study / "results.csv"
        return done.stdout, list(csv.DictReader(results.open())) if results.exists() else []

    run.folder = study
    return run


def test_what_is_missing_is_measured_and_what_is_there_is_not(measure, cifar10):
    _, rows = measure("--rows", "first", "--data-root", str(cifar10), "--tracking", "none")
    assert [(row["row"], row["seed"], row["split"], row["epochs"]) for row in rows] == [("first", "0", "test", "1")]
    assert rows[0]["precision"] and rows[0]["max_lr"] == "0.01" and "tracking" not in rows[0]["overrides"]
    assert 0 <= float(rows[0]["accuracy"]) <= 100 and 0 <= float(rows[0]["accuracy_flip_tta"]) <= 100
    history = list(csv.DictReader((measure.folder / "histories" / "tiny" / "first_seed_0.csv").open()))
    assert [row["eval_accuracy"] for row in history] == [rows[0]["accuracy"]]
    said, rows = measure("--list")
    there, missing = said.splitlines()
    assert there == f"tiny: first, seed 0: {rows[0]['accuracy']}% in results.csv, not run again"
    assert missing.startswith("tiny: other, seed 0: python run.py ") and len(rows) == 1


def test_a_run_that_ended_without_a_row_is_not_trained_again(measure, cifar10):
    arguments = ("--rows", "first", "--data-root", str(cifar10), "--tracking", "none")
    _, rows = measure(*arguments)
    (measure.folder / "results.csv").unlink()  # as if it had been killed before it wrote the row
    said, again = measure(*arguments)
    assert "nothing to resume" in said and again == rows


def test_a_folder_of_other_values_is_not_taken_for_the_row(measure, outputs, tmp_path):
    folder = tmp_path / "runs" / "tiny" / "first_seed_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 7\n")
    with pytest.raises(AssertionError, match="holds a run of other values"):
        measure("--rows", "first", "--output-dir", str(tmp_path / "runs"))


def test_report_compares_rows_at_equal_seeds(measure):
    runs = [("first", 0, 90.0), ("first", 1, 92.0), ("other", 0, 91.0), ("other", 1, 92.5), ("other", 2, 70.0)]
    histories = measure.folder / "histories" / "tiny"
    histories.mkdir(parents=True)
    with (measure.folder / "results.csv").open("w") as file:
        csv.writer(file).writerows([("study", "row", "seed", "split", "accuracy", "accuracy_flip_tta")])
        for row, seed, accuracy in runs:
            csv.writer(file).writerow(("tiny", row, seed, "test", accuracy, accuracy + 0.5))
            (histories / f"{row}_seed_{seed}.csv").write_text(f"epoch,eval_accuracy\n1,{accuracy / 2}\n2,{accuracy}\n")
    table, _ = measure("--report")
    assert table.splitlines() == [
        "| row | test/accuracy | deviation | runs | with flip TTA | difference |",
        "| --- | --- | --- | --- | --- | --- |",
        "| first | 91.00% | ± 1.41 | 2 | 91.50% | - |",
        "| other | 84.50% | ± 12.58 | 3 | 85.00% | +0.75 ± 0.25 |",
    ]
    assert all((measure.folder / "figures" / f"tiny{name}.png").stat().st_size > 10_000 for name in ("", "_final"))
