"""The command line: check what was asked for, let Hydra start it, end with the exit code that says how it went."""

import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from resnet_cifar import sweep, sweep_plan, sweep_worker
from resnet_cifar.compose import Composition, compose, parse_arguments
from resnet_cifar.console import log_failure, nobody_reads, say, short
from resnet_cifar.errors import ConfigError, StorageError, UserError
from resnet_cifar.hydra_setup import CONF, VERSION_BASE
from resnet_cifar.run_folder import check_unused
from resnet_cifar.signals import STOPPED
from resnet_cifar.suggestions import overridden

INTERRUPTED, BROKEN_PIPE = 130, 141  # the shell's: 128 and the number of the signal
TRACEBACK = "RESNET_CIFAR_TRACEBACK"  # what HYDRA_FULL_ERROR was when the process started


def main() -> None:
    """Run the command line in `sys.argv` and exit: 0 done, 1 failed, 2 to 6 as in errors.py, 130 interrupted."""
    # The imports make a million objects that stay: looking for garbage among them every 700 takes a quarter of the start.
    gc.set_threshold(100_000)
    # HYDRA_FULL_ERROR makes Hydra raise what goes wrong around a job instead of printing pages of it.
    with env_override({TRACEBACK: os.environ.get("HYDRA_FULL_ERROR", "0"), "HYDRA_FULL_ERROR": "1"}):
        try:
            if any(re.match(r"\+*resume=(?!null$)", argument) for argument in sys.argv[1:]):
                go_on(sys.argv[1:])
            composition = check_command_line(sys.argv[1:])
            if composition is not None and composition.sweep is not None:
                sys.argv[1:] = sweep_plan.prepare(sys.argv[1:], composition.sweep)
            hydra.main(config_path=str(CONF), config_name="config", version_base=VERSION_BASE)(job)()
        except KeyboardInterrupt:
            end(KeyboardInterrupt("interrupted"), INTERRUPTED)
        except UserError as error:
            end(error, error.exit_code)
        except BrokenPipeError:
            nobody_reads()
            sys.exit(BROKEN_PIPE)
        except OSError as error:
            end(error, StorageError.exit_code, f"output_dir cannot be written: {short(error)}")
        except (HydraException, OmegaConfBaseException) as error:
            end(error, ConfigError.exit_code)
        except Exception as error:
            end(error, UserError.exit_code)


def go_on(argv: list[str]) -> None:
    """Turn `resume=<run>` into the command line of that run's folder; exit where it is finished already."""
    from resnet_cifar import resume  # late: torch alone takes seconds

    continued = resume.command_line(argv)
    if continued is None:
        print("That run is finished: there is nothing to resume.")
        sys.exit(0)
    sys.argv[1:] = continued


def check_command_line(argv: Sequence[str]) -> Composition | None:
    """What the command line is going to run, if it runs something.

    Raises ConfigError for what cannot be run, before Hydra, the data or the tracking see anything of it.
    """
    arguments = parse_arguments(argv)
    if arguments.shell_completion or arguments.hydra_help or arguments.experimental_rerun:
        return None
    composition = compose(arguments)
    if arguments.help or arguments.cfg or arguments.info:
        return None
    from resnet_cifar import schema  # late: --help and --cfg need no types

    schema.check_jobs(composition.jobs)
    for cfg, overrides in composition.jobs:
        if composition.sweep is None and (cfg.sweep.dry_run or cfg.sweep.rerun == "all"):
            key = "dry_run=true" if cfg.sweep.dry_run else "rerun=all"
            raise ConfigError(f"sweep.{key} would do nothing for a single run: give it with -m")
        if cfg.resume is not None and "resume" not in overridden(overrides):
            raise ConfigError("resume in a YAML file would continue nothing: give it on the command line alone")
        if cfg.resume is None and composition.folder is not None:
            check_unused(composition.folder)  # before Hydra writes into it
    return composition


def job(cfg: DictConfig) -> float | None:
    """Run one job, as Hydra's task; when it fails, exit with its exit code, or in a sweep note it down and return None."""
    try:
        if sweep.is_finished():
            return None
        if "joblib" in HydraConfig.get().launcher["_target_"]:
            sweep_worker.end_with_sweep()
            if cfg.trainer.device in ("auto", "cuda"):  # another names its own
                sweep_worker.take_gpus(Path(HydraConfig.get().sweep.dir), cfg.trainer.devices)
        from resnet_cifar import experiment  # late: torch alone takes seconds

        return experiment.run(cfg)
    except SystemExit as stop:
        if stop.code in (None, 0):
            return None
        if stop.code in STOPPED:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                say(
                    "Without sweep.rerun=all the same command keeps what is finished and does the rest."
                    if cfg.sweep.rerun == "all"
                    else "The same command again goes on with the whole sweep.",
                    sys.stderr,
                )
            raise
        fail(cfg, stop, stop.code if isinstance(stop.code, int) else UserError.exit_code)
    except UserError as error:
        fail(cfg, error, error.exit_code)
    except Exception as error:
        fail(cfg, error, UserError.exit_code)
    return None


def fail(cfg: DictConfig, error: BaseException, exit_code: int) -> None:
    """Write into run.log and onto stderr why the running job failed; then exit, or in a sweep let the others go on."""
    settings = HydraConfig.get()
    log_failure(error)
    message = short(error)
    if not isinstance(error, UserError | SystemExit):
        message += f"\nthe traceback is in {settings.runtime.output_dir}/run.log"
    if settings.mode != RunMode.MULTIRUN:
        end(error, exit_code, message)
    say(f"job {settings.job.num} failed: {message}", sys.stderr)
    sweep.record_failure(cfg, error, message)


def end(error: BaseException, exit_code: int, message: str = "") -> None:
    """Exit with the error's message on stderr, and its traceback for whoever set HYDRA_FULL_ERROR=1."""
    if os.environ[TRACEBACK] == "1":
        traceback.print_exception(error)
    say(message or short(error), sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    # By its own name: a parallel launcher's worker processes import the job from there.
    from resnet_cifar.__main__ import main

    main()
