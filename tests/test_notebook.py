"""The notebook, executed without a screen on the quickstart preset; and what is committed of it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from resnet_cifar import notebook
from resnet_cifar.errors import ConfigError, StorageError

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "experiments" / "session_10" / "session_10.ipynb"
# Less of everything: the path is the same.
SMALL = (
    "trainer.epochs=2 trainer.device=cpu data.train_size=128 data.test_size=60 model.width=0.125 "
    "lr_finder.num_iter=8 explain.num_images=4"
)
FIGURES = 9  # samples, LR finder, curves, LR history, mistakes, four heat maps


def outputs_of(cells, kind):
    return [output for cell in cells for output in cell.get("outputs", []) if output.output_type == kind]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cells):
    return sum("image/png" in output.data for output in outputs_of(cells, "display_data"))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_from_the_first_cell_to_the_link_to_mlflow(committed, monkeypatch, outputs):
    for name, value in {"PRESET": "quickstart", "OVERRIDES": f"{SMALL} output_dir={outputs}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # so that the first cell finds the package whether installed or not
    executed = nbformat.from_dict(committed)
    folder = {"metadata": {"path": NOTEBOOK.parent}}
    NotebookClient(executed, timeout=300, kernel_name="python3", resources=folder).execute()
    assert pictures(executed.cells) == FIGURES
    [run] = (outputs / "runs").iterdir()
    assert (run / "status.txt").read_text() == "FINISHED\n"
    [training] = [cell for cell in executed.cells if "loss_and_accuracy" in cell.source]
    assert "epoch 1/2 " in printed(training) and "|" in printed(training)
    assert "?workflowType=machine_learning" in printed(executed.cells[-1])


def test_it_is_committed_with_its_outputs_and_small(committed):
    assert NOTEBOOK.stat().st_size < 2_000_000
    assert pictures(committed.cells) == FIGURES
    assert outputs_of(committed.cells, "error") == []
    assert [output for output in outputs_of(committed.cells, "stream") if output.name == "stderr"] == []


def test_it_has_no_logic_of_its_own(committed):
    for cell in committed.cells[2:]:
        if cell.cell_type == "code":
            assert not any(line.startswith((" ", "def ", "for ", "if ")) for line in cell.source.splitlines())


def test_a_wrong_setting_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.epochs"):
        notebook.begin("trainer.epochs=0", f"output_dir={tmp_path}/outputs")
    assert not list(tmp_path.iterdir())


def test_options_of_ones_own_are_taken_from_their_folder(tmp_path, logging_put_back):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    cfg, _ = notebook.begin("--config-dir", str(tmp_path), "experiment=mine", f"output_dir={tmp_path}/outputs")
    assert cfg.seed == 7


@pytest.mark.parametrize("setting", ["sweep.dry_run=true", "sweep.rerun=all"])
def test_what_would_do_nothing_is_refused_as_on_the_command_line(setting, tmp_path):
    with pytest.raises(ConfigError, match="would do nothing for a single run"):
        notebook.begin(setting, f"output_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["task=find_lr", "resume=outputs/runs/x", "hydra.mode=MULTIRUN"])
def test_another_task_than_training_is_refused(setting, tmp_path):
    with pytest.raises(ConfigError, match=r"to python run\.py"):
        notebook.begin(setting, f"output_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(StorageError, match="holds a run already"):
        notebook.begin(f"hydra.run.dir={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
