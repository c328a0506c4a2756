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
    data=digits data.train_size=64 data.test_size=20 data.batch_size=32 model.width=0.125 trainer.epochs=1
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

    return run


def test_what_is_missing_is_measured_and_what_is_there_is_not(measure):
    _, rows = measure("--rows", "first")
    assert [(row["row"], row["seed"], row["split"], row["epochs"]) for row in rows] == [("first", "0", "test", "1")]
    assert 0 <= float(rows[0]["accuracy"]) <= 100 and 0 <= float(rows[0]["accuracy_flip_tta"]) <= 100
    missing, rows = measure("--list")
    assert "other, seed 0" in missing and "first" not in missing and len(rows) == 1
