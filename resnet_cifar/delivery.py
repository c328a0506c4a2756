"""Records on their way to the tracking store: written to the run's folder first, then sent by threads of their own."""

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from resnet_cifar.errors import StorageError
from resnet_cifar.passwords import without_passwords

log = logging.getLogger(__name__)

Record = dict[str, Any]
RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
# What the store will never take, by MLflow's names for it. It says the first of a run in its trash too, which can be restored.
REFUSED, IN_THE_TRASH = "INVALID_PARAMETER_VALUE", "must be in the 'active' state"
GONE, NO_RUN = "RESOURCE_DOES_NOT_EXIST", "Run with id="


def reason(error: BaseException) -> str:
    """The first line of an error, short and without passwords; of a failed connection only what failed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    cause = re.search(r"\(Caused by \w+\((.*)\)\)", lines[0])
    text = cause[1].strip("\"'").rpartition(": ")[2] if cause else lines[0]
    return without_passwords(text)[:200]


class _Lines:
    """A file that grows by whole lines: after one cut short (a crash, a full disk) the next starts on its own line."""

    def __init__(self, path: Path, survives_power_cuts: bool = False) -> None:
        self._synced = survives_power_cuts
        self._torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)
        self.close = self._file.close

    def append(self, line: str) -> None:
        data = ("\n" * self._torn + line + "\n").encode()
        self._torn = True
        if self._file.write(data) != len(data):
            raise OSError("no space left")
        self._torn = False
        if self._synced:
            os.fsync(self._file.fileno())


class Journal:
    """The run folder's `tracking.jsonl`, a JSON record a line, and `tracking.sent`, the numbers of those delivered.

    Both only grow, and a line cut short by a crash is skipped. Raises StorageError when the folder cannot be written
    or another process has this journal open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tracking.jsonl"
        self._sent_path = folder / "tracking.sent"
        self._lock = FileLock(folder / "tracking.lock", thread_local=False)
        try:
            self._lock.acquire(timeout=0)
            self.records = list(read_records(self.path))
            self._sent = _read_sent(self._sent_path)
            # A checkpoint that is written next must not outlive the records before it.
            self._lines = _Lines(self.path, survives_power_cuts=True)
            self._sent_lines = _Lines(self._sent_path)
        except Timeout:
            raise StorageError(f"Another process is working in {folder}. Wait for it or stop it.") from None
        except OSError as error:
            raise StorageError(f"Cannot write to the run folder {folder}: {reason(error)}.") from None
        # Beyond the numbers in both files: a record that found the disk full may be known as sent only.
        self._next = 1 + max({record["n"] for record in self.records} | self._sent, default=0)
        self._writing = threading.Lock()

    def append(self, run_id: str, kind: str, **content: Any) -> Record:
        """Writes a record with the time in milliseconds and returns it, with or without room on the disk."""
        with self._writing:
            record = {"n": self._next, "run": run_id, "kind": kind, "time": int(time.time() * 1000), **content}
            self._next += 1
            self.records.append(record)
            try:
                self._lines.append(json.dumps(record, allow_nan=False))
            except OSError as error:
                log.warning("%s cannot be written (%s); what the store does not take now is lost.", self.path, error)
        return record

    def mark_sent(self, record: Record) -> None:
        """Notes that `record` needs no further delivery."""
        with self._writing:
            self._sent.add(record["n"])
            try:
                self._sent_lines.append(f"{record['n']} sent")
            except (OSError, ValueError):  # a full disk, a closed journal: it goes out twice, which is harmless
                log.debug("%s cannot be written", self._sent_path)

    def pending(self) -> list[Record]:
        """What is still to be delivered, in order, without the ends that a later start has overtaken."""
        last_start = max((record["n"] for record in self.records if record["kind"] == "start"), default=0)
        return [
            record
            for record in self.records
            if record["n"] not in self._sent
            and record["kind"] != "start"
            and not (record["kind"] == "finish" and record["n"] < last_start)
        ]

    def close(self) -> None:
        """Lets go of the files and of the folder."""
        with self._writing:
            self._lines.close()
            self._sent_lines.close()
            self._lock.release()


def is_abandoned(folder: Path) -> bool:
    """Whether a run has left its journal in `folder` and no process has it open."""
    lock = FileLock(folder / "tracking.lock", thread_local=False)
    try:
        if not (folder / "tracking.jsonl").is_file():
            return False
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # another user's folder may be closed to us
        return False
    lock.release()
    return True


def read_records(path: Path) -> Iterator[Record]:
    """The records of the journal at `path`, one that is not there having none; lines cut short are skipped."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def has_unsent_end(folder: Path, run_id: str) -> bool:
    """Whether the journal in `folder` ends with the run, and that is still to be delivered; False where it cannot be read."""
    try:
        turns = [record for record in read_records(folder / "tracking.jsonl") if record["kind"] in ("start", "finish")]
        sent = _read_sent(folder / "tracking.sent")
    except OSError:
        return False
    return bool(turns) and (turns[-1]["run"], turns[-1]["kind"]) == (run_id, "finish") and turns[-1]["n"] not in sent


def _read_sent(path: Path) -> set[int]:
    text = path.read_text() if path.exists() else ""
    return {int(number) for number in re.findall(r"^(\d+) sent$", text, re.MULTILINE)}


def is_refused(error: Exception) -> bool:
    """Whether sending the same record again cannot succeed: a value refused, a file gone."""
    refused = getattr(error, "error_code", None) == REFUSED and IN_THE_TRASH not in str(error)
    return refused or isinstance(error, FileNotFoundError)


def has_no_such_run(error: Exception) -> bool:
    """Whether the store does not have the record's run: it was removed for good, or this is another store."""
    return getattr(error, "error_code", None) == GONE and NO_RUN in str(error)


class Lane(threading.Thread):
    """Delivers records one after the other and tries again until each is sent or refused.

    With `in_order` a failing record holds the others back, as a store that is down does; without, the next ones go
    first, as with files, each of which can fail for reasons of its own.
    """

    def __init__(self, destination: str, journal: Journal, deliver: Callable[[Record], None], in_order: bool) -> None:
        super().__init__(name=f"send to the {destination}", daemon=True)
        self.failing = False
        self._destination, self._journal, self._deliver, self._in_order = destination, journal, deliver, in_order
        self._queue: deque[Record] = deque()
        self._changed = threading.Condition()
        self._stopped = self._hurried = False
        self._reported: set[str] = set()

    def put(self, record: Record) -> None:
        """Queues a record without waiting for anything."""
        with self._changed:
            self._queue.append(record)
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Waits until everything is delivered, `seconds` at most; says whether it is."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._queue, timeout=seconds)

    def stop(self) -> None:
        """Starts no further delivery."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self) -> None:
        """Delivers until stopped."""
        pause = RETRY_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                record = self._queue[0]
            if self._send(record):
                pause = RETRY_SECONDS
                continue
            self._rest(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    def _rest(self, seconds: float) -> None:
        with self._changed:
            if not self._in_order:
                self._queue.rotate(-1)
            self._changed.wait_for(lambda: self._stopped or self._hurried, timeout=seconds)
            if self._hurried:
                self._changed.wait_for(lambda: self._stopped, timeout=RETRY_SECONDS)

    def _send(self, record: Record) -> bool:
        try:
            self._deliver(record)
        except Exception as error:
            if not is_refused(error):
                self._report_failure(error)
                return False
            if (refusal := reason(error)) not in self._reported:
                log.warning("The %s refuses %s: %s", self._destination, record["kind"], refusal)
            self._reported.add(refusal)
        else:
            self._report_success()
        self._journal.mark_sent(record)
        with self._changed:
            self._queue.remove(record)
            self._changed.notify_all()
        return True

    def _report_failure(self, error: Exception) -> None:
        # Once per outage of a store; files fail for reasons of their own, each said once.
        if reason(error) not in self._reported and not (self._in_order and self.failing):
            log.warning(
                "The %s fails (%s). Training goes on; what it does not take is kept in %s and sent again.",
                *(self._destination, reason(error), self._journal.path),
            )
        self._reported.add(reason(error))
        self.failing = True

    def _report_success(self) -> None:
        if self.failing and self._in_order:
            log.info("The %s works again.", self._destination)
            self._reported.clear()
        self.failing = False
