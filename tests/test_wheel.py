"""The wheel, installed alone: it carries the presets, and runs them from an empty folder."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("resnet_cifar", "conf", "setup.cfg", "pyproject.toml", "README.md")
SMALL = ("trainer.epochs=1", "data.train_size=128", "data.test_size=40", "lr_finder.num_iter=8", "explain.num_images=2")


def done(*command, **options):
    completed = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since building leaves files beside the sources, and finds files there that an earlier build has left.
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    done(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the commands of an environment with the wheel, its dependencies borrowed from this one."""
    environment = tmp_path_factory.mktemp("environment")
    done(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    done(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    [packages] = (environment / "lib").glob("*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin"


def test_it_carries_every_file_of_conf(wheel):
    inside = {name.removeprefix("resnet_cifar/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("conf/**/*.yaml")} <= inside


def test_it_runs_a_preset_in_an_empty_folder_and_writes_into_it(installed, empty_database, tmp_path):
    (tmp_path / "outputs").mkdir()
    shutil.copy(empty_database, tmp_path / "outputs")
    printed = done(installed / "resnet-cifar", "experiment=quickstart", *SMALL, cwd=tmp_path, env={})
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    assert (run / "status.txt").read_text() == "FINISHED\n"
    assert f"outputs/runs/{run.name}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_its_module_is_the_same_command(installed, tmp_path):
    shown = done(installed / "python", "-m", "resnet_cifar", "--cfg", "job", "experiment=session_10", cwd=tmp_path)
    assert "seed: 0" in shown
    assert not list(tmp_path.iterdir())
