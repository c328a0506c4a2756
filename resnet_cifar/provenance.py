"""Where a run's numbers come from: the code's git commit, library versions and the hardware, as MLflow tags."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def tags(device: torch.device, precision: str) -> dict[str, str]:
    """Tag names to values; the git ones are there when the package lies in a checkout."""
    return {
        **_git(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),  # importing it costs a second or two, and data=digits does without
        "cuda": str(torch.version.cuda) if device.type == "cuda" else "none",
        "device": device.type,
        "device_name": device_name(device),
        "threads": str(torch.get_num_threads()),
        "precision": precision,
    }


# What a CPU computes with, the fastest last: names alone do not tell, virtual machines call many processors the same.
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "sve", "sve_bf16")


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with its best instructions: `AMD EPYC (avx512_bf16)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
        best = [instructions for instructions in INSTRUCTIONS if capabilities.get(instructions)][-1:]
        return " ".join([name, *(f"({instructions})" for instructions in best)])
    return platform.machine()


def _git() -> dict[str, str]:
    checkout = Path(__file__).resolve().parent.parent
    try:
        root, commit = _run_git(checkout, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(root) != checkout:
            return {}  # installed somewhere inside another project's checkout
        dirty = bool(_run_git(checkout, "status", "--porcelain", "--", "resnet_cifar", "conf", "run.py"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def _run_git(folder: Path, *arguments: str) -> str:
    # Another user's checkout too, as in a container; its code is running already.
    command = ["git", "-c", f"safe.directory={folder}", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
