"""Which process a run belongs to, so that a later one can tell whether it is gone."""

import getpass
import os
import socket
import sys
from pathlib import Path

from resnet_cifar.delivery import is_abandoned

HIDDEN = "hidden"  # another user's process, where /proc is mounted with hidepid


def identity(folder: Path) -> dict[str, str]:
    """The tags that name this process: host, boot, pid, when it started (clock ticks since boot), run folder.

    The boot carries the pid namespace, since two containers count their pids apart; where the system has no /proc
    (not Linux) boot and start are empty.
    """
    return {
        "process.host": socket.gethostname(),
        "process.boot": _boot(),
        "process.pid": str(os.getpid()),
        "process.started": _started(os.getpid()),
        "process.folder": str(folder.resolve()),
    }


def origin() -> dict[str, str]:
    """MLflow's own tags for who started a run, and with what."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return {"mlflow.user": user, "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}


def is_gone(tags: dict[str, str]) -> bool:
    """Whether the process that `identity` described has ended; False when this machine cannot know."""
    if tags.get("process.host") != socket.gethostname():
        return False
    if _boot() and tags.get("process.boot") == _boot():
        return _started(int(tags["process.pid"])) not in (tags["process.started"], HIDDEN)
    # Booted since, or another container: only the lock on the run's folder can tell.
    return "process.folder" in tags and is_abandoned(Path(tags["process.folder"]))


def is_alive(tags: dict[str, str]) -> bool:
    """Whether `identity` described another process of this machine, and it runs."""
    here = (socket.gethostname(), _boot())
    if not _boot() or (tags.get("process.host"), tags.get("process.boot")) != here:
        return False
    pid = int(tags["process.pid"])
    return pid != os.getpid() and _started(pid) == tags["process.started"]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _boot() -> str:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        # The name in parentheses may hold spaces; the state follows it, the start time is field 22 of the line.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return HIDDEN if _exists(pid) else ""
    return "" if fields[0] in "ZX" else fields[19]
