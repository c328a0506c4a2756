"""The command line from outside: what it prints, how it exits, what it leaves on disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_cifar import __main__, compose, composition_errors, experiment, hydra_setup, sweep_summary
from resnet_cifar.errors import DataError, DivergedError, StorageError
from resnet_cifar.suggestions import program

ROOT = Path(__file__).parent.parent
TINY = [
    "tracking=none",
    "data=digits",
    "trainer.epochs=1",
    "model.width=0.125",
    "data.train_size=64",
    "data.test_size=20",
]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, logging_put_back):
    """Run `main` in this process with the given arguments: exit code, stdout, stderr."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, f"output_dir={tmp_path}/outputs"])
        try:
            __main__.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def job(monkeypatch):
    """Let each job do what the given function does with its configuration, in the place of an experiment."""
    return lambda function: monkeypatch.setattr(experiment, "run", function)


def python(*arguments, **environment):
    """Run Python in the checkout in a process of its own."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def assert_short(message):
    assert 1 <= len(message.splitlines()) <= 3, message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("max_lr=0.1", "did you mean scheduler.max_lr=0.1?"),
        ("epochs=3", "did you mean trainer.epochs=3?"),
        ("trainer.epoch=3", "did you mean trainer.epochs=3?"),
        ("optimizer.betas=[0.9,0.9]", "another argument of Adam wants a +: +optimizer.betas=[0.9,0.9]"),
        ("optimizer.amsgrd=true", "wants a +: +optimizer.amsgrad=true"),
        ("explain.layers.mine=prep", "another layer wants a +: +explain.layers.mine=prep"),
        ("explain.layers.layer_1=layer_1", "another layer wants a +: +explain.layers.layer_1=layer_1"),
        ("model.depth=3", "model.depth is not a key\n"),
        ("explain.layers={mine:prep}", "another one wants a +: +explain.layers={mine:prep}"),
        ("augmentation.transforms[0].padding=2", "with a dot: augmentation.transforms.0.padding=2"),
        ("modle=custom_resnet", "did you mean model=custom_resnet?"),
        ("--epochs=3", "did you mean trainer.epochs=3?"),
        ("--epochs 3", "did you mean trainer.epochs=...?"),
        ("optimizer=sgd optimizer.momentm=0.5", "did you mean optimizer.momentum=0.5?"),
        ("optimizer=sdg", "optimizer=sdg: choose from adam, adamw, muon, sgd"),
        ("experiment=quick_start", "did you mean quickstart?"),
        ("~trainer.epoch", "did you mean trainer.epochs?"),
        ("+seed=1", "seed has a value already"),
        ("+experiment=quickstart", "experiment has a value already"),
        ("scheduler.div_factor=10,25", "run it with -m"),
        ("optimizer=adam,sgd", "run it with -m"),
        ("seed=range(0,3) trainer.epochs=2", "run.py -m 'seed=range(0,3)' trainer.epochs=2 "),
        ("hydro=1", "hydro is not a key\n"),
        ("seed=1 -m trainer.epochs=2", "write trainer.epochs=2"),
        ("seed", "cannot read seed: settings are written key=value\n"),
        ("seed = 1", "settings are written key=value, without a space\n"),
        ("evaluate checkpoint=x", "did you mean task=evaluate?"),
        ("quickstart", "did you mean experiment=quickstart?"),
        ("seed=[1", "cannot read seed=[1"),
        ("output_dir=~/Ü", "write the home folder out, \"output_dir='$HOME/Ü'\""),
        ("output_dir=~", "\"output_dir='$HOME'\""),
        ("output_dir=~bob/x", "write a home folder out"),
        ("output_dir=a,b(", "shell's and Hydra's: \"output_dir='a,b('\""),
        ("output_dir=a`b(", "shell's and Hydra's: 'output_dir='\"'\"'a`b('\"'\"''"),
        ("scheduler=cosine scheduler.pct_start=0.3", "it goes with scheduler=one_cycle"),
        ("-m seed=0,1 hydra.launcher.n_jobs=4", "give hydra/launcher=parallel"),
        ("-m experiment=glob(lab*)", "a glob() or range() in it has no value"),
        ("model.explain=3", "model.explain is not a key; did you mean"),
        ("data.defaults=3", "data.defaults is not a key\n"),
        ("-m experiment=record scheduler=one_cycle,cosine", "take it out: ~scheduler.max_lr"),
        ("hydra/launcher=nothing", "hydra/launcher=nothing: choose from"),
        ("--config-dir /nowhere", "/nowhere"),
        ("+hydra.job.env_set.MLFLOW_TRACKING_PASSWORD=hunter2", "would be written into files"),
        ("-m hydra.sweeper=null", "hydra.sweeper=null"),
        ("-m hydra.sweeper.params={seed:'0,1'}", "(given: "),
        ("-m seed=0,1 tracking=none hydra.sweep.subdir=same", "gives several jobs one folder"),
        ("-m tracking.experiment=a,b", "tracking.experiment is not the same in all jobs"),
        ("--multirun --cfg job", "only one of"),
        ("--cfg job max_lr=0.1", "did you mean scheduler.max_lr=0.1?"),
        ("--help optimizer=sdg", "choose from adam, adamw, muon, sgd"),
        ("hydra.run.dir=${nowhere}", "nowhere"),
        ("seed=true", "seed=true should be a valid integer"),
        ("-m seed=0,x", "seed=x should be a valid integer"),
        ("-m seed=0 trainer.epochs=range(0,2)", "trainer.epochs=0"),
        ("-m optimizer=adam,sdg", "choose from adam, adamw, muon, sgd"),
        ("-m seed=interval(0,1)", "INTERVAL_SWEEP"),
        ("-m seed=0, 1, 2", "without spaces: seed=0,1,2"),
        ("data.mean=[0.5, 0.5, 0.5]", "without spaces: data.mean=[0.5,0.5,0.5]"),
        ("explain.layers={a: layer_1}", "without spaces: explain.layers={a:layer_1}"),
        ("hydra/launcher=parallel", "give it with -m"),
        ("hydra.sweep.dir=here", "give it with -m"),
        ("-m seed=0,1 hydra.run.dir=here", "its folder is hydra.sweep.dir"),
        ("-m seed=shuffle(range(4))", "has another order each time"),
        ("-m seed=0,1,0 tracking=none", "one job twice: seed=0 "),
        ("hydra.job.chdir=true", "leave it out"),
        ("hydra.output_subdir=null", "could not be resumed"),
        ("hydra.job.env_set.A=1", "a new one wants a +: +hydra.job.env_set.A=1"),
        ("trainer={epoch:3}", "did you mean trainer.epochs?"),
        ("-p optimizer", "--package goes with --cfg"),
        ("trainer.device=0", "trainer.device=0 should be auto, cpu, mps, cuda or cuda:N"),
        ("tracking.experiment=2026", "in two pairs of quotes: tracking.experiment=\"'...'\""),
        ("seed=${oc.env:HOME}", "'seed=${oc.decode:${oc.env:HOME}}'"),
        ("experiment=laptop lr_finder.end_lr=1", "lr_finder.end_lr would do nothing: it is for"),
        ("hydra.job.env_set.MY_TOKEN=hunter2", "would be written into files"),
        ("hydra/sweeper=basic", "give it with -m"),
        ("scheduler=constant lr_finder.end_lr=1", "it is for task=find_lr, or a training with scheduler.max_lr=find"),
        ("task=sync checkpoint=x", "checkpoint=x would do nothing with task=sync"),
        ("sweep.dry_run=True", "give it with -m"),
        ("sweep.rerun=all", "give it with -m"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_a_short_message_before_anything_is_written(
    command, tmp_path, arguments, part
):
    code, out, err = command(*arguments.split())
    assert (code, out) == (2, "")
    assert part in err
    assert_short(err)
    assert not list(tmp_path.iterdir())


def test_a_password_in_a_line_that_cannot_be_read_is_not_printed(command):
    code, _, err = command("tracking.uri=[postgresql://me:s3cr3t@host/db")
    assert code == 2
    assert "s3cr3t" not in err


def test_a_preset_of_the_users_own_needs_no_comment(command, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 1\n")
    assert "\n  mine\n" in command("--config-dir", str(tmp_path), "--help")[1]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("# @package _global_\nseed: [1\ntask: train\n", "mine.yaml, line 3: not valid YAML"),
        ("# @package _global_\nseed: 1\nseed: 2\n", "mine.yaml, line 3: not valid YAML: found duplicate key seed"),
        ("# @package _global_\ntrainer:\n  epoch: 3\n", "trainer.epoch is not a key; did you mean trainer.epochs?"),
        ("# @package _global_\ndefaults:\n  - override /optimizer: sdg\n", "choose from adam, adamw, muon, sgd"),
        ("# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,x\n", "seed=x"),
        (
            "trainer:\n  epochs: 3\n",
            "experiment is not a key: the first line of such a file has to be # @package _global_",
        ),
        ("# @package _global_\nhydra:\n  launcher:\n    n_jobs: 4\n", "n_jobs"),
        ("# @package _global_\ndefaults: [mine]\n", "(given: experiment=mine"),
        ("# @package _global_\nseed: \x01\n", "(given: experiment=mine"),
        ("# @package _global_\nresume: outputs/runs/x\n", "resume in a YAML file would continue nothing"),
    ],
)
def test_a_wrong_preset_of_the_users_own_is_refused(command, tmp_path, text, part):
    preset = tmp_path / "conf" / "experiment" / "mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(text)
    code, _, err = command("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert code == 2
    assert part in err
    assert_short(err)


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(command, monkeypatch):
    monkeypatch.setitem(composition_errors.LAUNCHER_EXTRAS, "not_installed", "parallel")
    code, _, err = command("-m", "hydra/launcher=not_installed", "seed=0,1")
    assert code == 2
    assert 'pip install -e ".[parallel]"' in err


def test_a_whole_run_ends_with_0_and_leaves_its_log_in_its_folder(command, tmp_path):
    code, out, err = command(*TINY, "task=find_lr", "lr_finder.num_iter=3")
    assert code == 0, err
    [folder] = (tmp_path / "outputs" / "runs").iterdir()
    logged = (folder / "run.log").read_text()
    assert out.strip()
    assert all(line in logged for line in out.splitlines())


def test_a_device_that_is_not_there_ends_with_2(command):
    code, _, err = command(*TINY, "trainer.device=cuda:99")
    assert code == 2
    assert_short(err)


def test_an_output_folder_that_cannot_be_written_ends_with_5(command, tmp_path):
    (tmp_path / "outputs").write_text("a file in the way")
    code, _, err = command(*TINY)
    assert code == 5
    assert_short(err)


def test_the_errors_of_a_run_give_its_exit_code_and_its_message_once(command, job, tmp_path):
    def no_images(cfg):
        raise DataError("there are no images here\nset data.root=...")

    job(no_images)
    code, out, err = command()
    assert (code, out, err) == (3, "", "there are no images here\nset data.root=...\n")
    [log] = tmp_path.glob("outputs/runs/*/run.log")
    assert "there are no images here" in log.read_text()


def test_an_unforeseen_error_ends_with_1_and_leaves_its_traceback_in_the_log(command, job, tmp_path):
    job(lambda cfg: 1 / 0)
    code, _, err = command()
    [log] = tmp_path.glob("outputs/runs/*/run.log")
    assert code == 1
    assert err == f"ZeroDivisionError: division by zero\nthe traceback is in {log}\n"
    assert "Traceback" in log.read_text()


def test_hydra_full_error_shows_the_traceback(command, job, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    job(lambda cfg: 1 / 0)
    code, _, err = command()
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("exit_code", [0, 6, 130, 143])
def test_a_run_that_exits_by_itself_keeps_its_exit_code(command, job, exit_code):
    job(lambda cfg: sys.exit(exit_code))
    assert command()[0] == exit_code


def test_an_interrupt_ends_with_130(command, job):
    def interrupt(cfg):
        raise KeyboardInterrupt

    job(interrupt)
    code, _, err = command()
    assert (code, err) == (130, "interrupted\n")


def test_a_job_that_fails_in_a_sweep_stops_no_other_and_the_sweep_ends_with_1(command, job, tmp_path):
    seeds = []

    def fail_for_some(cfg):
        seeds.append(cfg.seed)
        if cfg.seed == 0:
            raise DivergedError("the loss is not finite")
        if cfg.seed == 1:
            sys.exit(4)
        return 1 / (cfg.seed - 2)

    job(fail_for_some)
    code, _, err = command("-m", "seed=0,1,2,3", "hydra.sweeper.max_batch_size=2")
    assert (code, seeds) == (1, [0, 1, 2, 3])
    assert "3 of the sweep's jobs failed" in err
    [failed] = tmp_path.glob("outputs/sweeps/*/failed_jobs.txt")
    assert [line.partition(" ")[0] for line in failed.read_text().splitlines()] == ["0", "1", "2"]
    assert sorted(path.parent.name for path in failed.parent.glob("*/run.log")) == ["0", "1", "2", "3"]


def test_a_sweep_without_failures_ends_with_0(command, job, outputs, tmp_path):
    job(lambda cfg: 0.0)
    assert command("-m", "seed=0,1")[0] == 0
    assert not list(tmp_path.glob("outputs/sweeps/*/failed_jobs.txt"))


@pytest.mark.parametrize(("error", "code"), [(KeyError("a column"), 1), (StorageError("the store is down"), 5)])
def test_a_sweep_whose_summary_fails_says_so_and_does_not_end_with_0(
    command, job, outputs, monkeypatch, tmp_path, error, code
):
    def fail(*_):
        raise error

    job(lambda cfg: 0.0)
    monkeypatch.setattr(sweep_summary, "publish", fail)
    ended, _, err = command("-m", "seed=0,1")
    assert ended == code
    assert str(error) in err and "Traceback" not in err
    assert bool(list(tmp_path.glob("outputs/sweeps/*/summary_error.txt"))) == (code == 1)


@pytest.mark.parametrize("signal_code", [130, 143])
def test_a_signal_ends_the_whole_sweep(command, job, outputs, signal_code):
    seeds = []

    def stop(cfg):
        seeds.append(cfg.seed)
        sys.exit(signal_code)

    job(stop)
    code, _, err = command("-m", "seed=0,1")
    assert (code, seeds) == (signal_code, [0])
    assert "The same command again goes on with the whole sweep." in err


def test_two_runs_of_the_same_second_have_folders_of_their_own(command, job, tmp_path):
    job(lambda cfg: 0.0)
    for _ in range(2):
        command("hydra.run.dir=${output_dir}/runs/same_second_${unique:}")
    command()
    names = sorted(folder.name for folder in (tmp_path / "outputs" / "runs").iterdir())
    assert len(names) == 3 and re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{6}", names[0])


def test_help_is_a_documentation(command):
    code, out, _ = command("--help")
    assert code == 0
    assert len(re.findall(r"^python run.py", out, flags=re.MULTILINE)) == 5
    for path in (hydra_setup.CONF / "experiment").glob("*.yaml"):
        purpose = path.read_text().splitlines()[1].lstrip("# ")
        assert f"{path.stem} {purpose}" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    for group in ("model", "data", "augmentation", "optimizer", "scheduler", "tracking"):
        options = sorted(path.stem for path in (hydra_setup.CONF / group).glob("*.yaml"))
        assert f"{group} {', '.join(options)}" in " ".join(out.split())


def test_the_help_has_the_users_own_options_too(command, tmp_path):
    for group in ("model", "experiment"):
        (tmp_path / "own" / group).mkdir(parents=True)
        (tmp_path / "own" / group / "mine.yaml").write_text("# What it is for\n")
    shown = " ".join(command("--config-dir", str(tmp_path / "own"), "--help")[1].split())
    assert "model custom_resnet, mine" in shown and "mine What it is for quickstart" in shown


def test_the_keys_in_the_help_exist(command):
    _, out, _ = command("--help")
    [(cfg, _)] = compose.compose(compose.parse_arguments([])).jobs
    main_keys = re.findall(r"^  ([\w.]+)", out.partition("Main keys")[2], flags=re.MULTILINE)
    assert len(main_keys) > 10
    for key in main_keys:
        section, _, name = key.rpartition(".")
        assert name in (cfg[section] if section else cfg), key


@pytest.mark.parametrize(
    "flags",
    [
        ["--help"],
        ["--cfg", "job"],
        ["--hydra-help"],
        ["--version"],
        ["--info", "searchpath"],
        ["--cfg", "hydra", "hydra/launcher=parallel"],
    ],
)
def test_flags_that_only_show_something_import_nothing_heavy(flags):
    code = (
        f"import sys; sys.argv = ['run.py', *{flags}]\n"
        "from resnet_cifar.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    shown = python("-c", code)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout


def test_shell_completion_completes():
    completed = python("run.py", "-sc", "query=bash", COMP_LINE="run.py opti", COMP_POINT="11")
    assert (completed.returncode, completed.stdout.split()) == (0, ["optimizer.", "optimizer="])


@pytest.mark.parametrize(
    "value", ["data.dataset=cifar10,cifar100", "trainer=fast seed=0,1", "task=evaluate checkpoint=0,1"]
)
def test_values_of_a_wrong_type_are_refused_in_a_sweep_as_in_a_run(command, value):
    code, _, err = command("-m", *value.split())
    assert (code, "should be a valid" in err) == (2, True), err


def test_a_failure_that_nobody_reads_is_recorded_all_the_same(tmp_path):
    arguments = ["-m", *TINY, "seed=0", "explain.layers.layer_3=nowhere", "tracking=none", f"output_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "run.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    process.stderr.close()
    assert process.wait() == 1
    [failed] = tmp_path.glob("sweeps/*/failed_jobs.txt")
    assert "nowhere" in failed.read_text()


def test_a_reader_who_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "run.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()


@pytest.mark.parametrize("unbuffered", ["", "1"])  # a line that is printed fails, or one that is flushed
def test_a_run_goes_on_when_its_reader_has_left(tmp_path, unbuffered):
    process = subprocess.Popen(
        [sys.executable, "run.py", *TINY, "task=find_lr", f"output_dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()
    [status] = (tmp_path / "runs").glob("*/status.txt")
    assert status.read_text() == "FINISHED\n"


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ("run.py", "python run.py"),
        ("/my clone/run.py", "python '/my clone/run.py'"),
        ("/usr/bin/resnet-cifar", "resnet-cifar"),
        ("/lib/resnet_cifar/__main__.py", "python -m resnet_cifar"),
        ("/lib/ipykernel_launcher.py", "python run.py"),
        ("/lib/pytest/__main__.py", "python run.py"),
    ],
)
def test_commands_to_be_pasted_begin_as_this_one_did(monkeypatch, called, said):
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == said


def test_run_py_and_the_module_are_the_same_command():
    script, module = python("run.py", "--cfg", "job", "seed=7"), python("-m", "resnet_cifar", "--cfg", "job", "seed=7")
    assert script.returncode == module.returncode == 0
    assert script.stdout == module.stdout
    assert "seed: 7" in script.stdout


def test_the_default_output_folder_is_the_checkouts_whatever_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    [(cfg, _)] = compose.compose(compose.parse_arguments([])).jobs
    assert cfg.output_dir == str(ROOT / "outputs")


def test_an_installed_wheel_writes_into_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setattr(hydra_setup, "INSTALLED", True)
    monkeypatch.chdir(tmp_path)
    assert hydra_setup.outputs() == str(tmp_path / "outputs")
