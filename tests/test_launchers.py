"""Sweeps on the launcher presets: jobs that fail, interrupts and kills, the threads and the GPU of a job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from processes import REPOSITORY
from sweep_results import SWEEP, assert_one_run_for_each_seed, assert_seeds_1_and_2_failed

from resnet_cifar import sweep_worker
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.hydra_setup import CONF
from resnet_cifar.process_identity import _started

PARALLEL = "hydra/launcher=parallel"
CLUSTER = ("hydra/launcher=cluster", "hydra.launcher.ray.init.num_cpus=2")
WITHOUT = {
    "joblib": 'no joblib launcher: pip install -e ".[parallel]"',
    "submitit": 'no submitit launcher: pip install -e ".[slurm]"',
    "ray": 'no Ray launcher: pip install -e ".[test,cluster]" in an environment of its own',
}


def needs(launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher", reason=WITHOUT[launcher])


class Sweep:
    """`run.py` in a Python of its own: workers outlive a forked process that ends, and count their threads themselves."""

    def __init__(self, *arguments, printed, faults=None):
        environment = {
            **os.environ,
            "RAY_DEDUP_LOGS": "0",
            **({"PYTHONPATH": f"{faults}{os.pathsep}{REPOSITORY}"} if faults else {}),
        }
        environment.pop("OMP_NUM_THREADS", None)
        self._printed = printed
        with printed.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "run.py", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A shell that runs the tests in its background has them, and what they start, ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def ends(self):
        try:
            return self.process.wait(240)
        finally:
            self.process.kill()  # does nothing to one that has ended

    @property
    def output(self):
        return self._printed.read_text()


@pytest.fixture(scope="module", params=["joblib", pytest.param("ray", marks=pytest.mark.ray)])
def faulty(request, tmp_path_factory):
    """A sweep, two jobs at once: seed 1 raises, seed 2 exits, and Ray's worker dies under seed 3, which it starts again."""
    needs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    killed = request.param == "ray"
    # A worker is a Python of its own, which runs sitecustomize when it starts; Ray's servers do too, and are left alone.
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "if any(name in argument for name in ('popen_loky', 'default_worker.py') for argument in sys.orig_argv):\n"
        f"    sys.path.append({str(Path(__file__).parent)!r})\n"
        f"    import processes\n"
        f"    processes.at_the_first_job(processes.some_seeds_fail)\n"
        f"    if {killed}: processes.at_the_first_job(processes.seed_is_killed_once, 3, 12, {str(folder / 'killed')!r})\n"
    )
    launcher = CLUSTER if request.param == "ray" else [PARALLEL]
    # From a database that does not exist yet.
    arguments = [*SWEEP, *launcher, "seed=0,1,2,3", f"output_dir={folder / 'outputs'}"]
    sweep = Sweep(*arguments, printed=folder / "out", faults=folder)
    assert sweep.ends() == 1, sweep.output
    return folder, sweep.output


def test_failing_jobs_are_recorded_and_the_others_run(faulty):
    folder, printed = faulty
    assert_seeds_1_and_2_failed(folder / "outputs", printed)


def test_two_jobs_divide_the_cores(faulty):
    _, finished = assert_one_run_for_each_seed(faulty[0] / "outputs", [0, 3])
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    given = 1 if (faulty[0] / "killed").exists() else cores  # conf/hydra/launcher/cluster.yaml says 1
    assert {run.data.tags["threads"] for run in finished} == {str(given)}


@pytest.mark.parametrize("faulty", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_a_job_whose_ray_worker_is_killed_goes_on_in_its_own_run(faulty):
    folder, printed = faulty
    assert (folder / "killed").exists()
    assert "Resumed in epoch 2 after 0 of 8 batches" in printed
    found, _ = assert_one_run_for_each_seed(folder / "outputs", [0, 3])
    assert len(found) == 4


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_parallel_sweep_that_is_stopped_or_killed_leaves_no_process(outputs, tmp_path, number, exit_code):
    needs("joblib")
    tracked = ["tracking=none"] if number == signal.SIGKILL else []  # which takes all with it as it is
    arguments = [*SWEEP, PARALLEL, "seed=0,1,2,3", "trainer.epochs=100000", f"output_dir={outputs}"]
    sweep = Sweep(*arguments, *tracked, printed=tmp_path / "out")
    try:
        _wait(lambda: sweep.output.count("epoch ") > 4)
        workers = _descendants(sweep.process.pid)
        assert workers
        os.kill(sweep.process.pid, number)
        assert sweep.ends() == exit_code, sweep.output
        _wait(lambda: not any(_started(pid) for pid in workers))
    finally:
        sweep.process.kill()  # and its workers with it: it would go on for hours


def test_a_job_of_a_parallel_sweep_can_have_several_processes(tmp_path):
    needs("joblib")
    arguments = [*SWEEP, PARALLEL, "seed=0", "trainer.device=cpu", "trainer.devices=2", "tracking=none"]
    sweep = Sweep(*arguments, f"output_dir={tmp_path}", printed=tmp_path / "out")
    assert sweep.ends() == 0, sweep.output
    assert_finished(tmp_path)


def assert_finished(outputs):
    assert [path.read_text() for path in outputs.glob("sweeps/*/0/status.txt")] == ["FINISHED\n"]


def _wait(happened, seconds=240):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def _descendants(pid):
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return children + [each for child in children for each in _descendants(child)]


def test_submitit_runs_a_job_of_a_sweep(commands, tmp_path):
    needs("submitit")
    arguments = [
        *SWEEP,
        "hydra/launcher=submitit_local",
        "task=find_lr",
        "lr_finder.num_iter=4",
        "seed=0",
        "tracking=none",
    ]
    command = commands(*arguments, f"output_dir={tmp_path}", printed=tmp_path / "out")
    assert command.ends() == 0, command.output
    assert_finished(tmp_path)


@pytest.mark.parametrize(
    ("preset", "launcher"),
    [("parallel", "joblib"), ("slurm", "submitit"), pytest.param("cluster", "ray", marks=pytest.mark.ray)],
)
def test_a_launcher_preset_composes(preset, launcher):
    needs(launcher)
    composed = compose(parse_arguments(["-m", f"hydra/launcher={preset}", "seed=0,1"]))
    assert len(composed.jobs) == 2


def _launcher(*overrides):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)


def test_slurm_jobs_have_a_thread_for_each_core_of_theirs():
    needs("submitit")
    launcher = _launcher("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=6")
    assert launcher["setup"] == ["export OMP_NUM_THREADS=6"]


@pytest.mark.ray
@pytest.mark.parametrize(("there", "given"), [(0, 0), (1, 1), (8, 1)])
def test_a_ray_job_has_one_gpu_where_there_are_some(monkeypatch, there, given):
    needs("ray")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert _launcher("hydra/launcher=cluster")["ray"]["remote"] == {"num_cpus": 1, "num_gpus": given}


@pytest.mark.parametrize(
    ("there", "of_each", "expected"), [(2, 1, ["0", "1", "1"]), (4, 2, ["0,1", "2,3", "2,3"])], ids=["one", "two"]
)
def test_each_process_of_a_parallel_sweep_has_gpus_of_its_own(monkeypatch, tmp_path, there, of_each, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    seen, held = [], []
    for _process in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(sweep_worker, "_held", [])
        for _job in range(2):
            sweep_worker.take_gpus(tmp_path, of_each)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        held.append(sweep_worker._held)
    assert seen == expected
