"""Sends later what runs could not deliver while they lived."""

import logging
from pathlib import Path

from resnet_cifar.delivery import Journal, Record, has_no_such_run, is_refused, reason
from resnet_cifar.errors import StorageError
from resnet_cifar.tracking import Store

log = logging.getLogger(__name__)


def sync_all(output_dir: Path, uri: str | None = None) -> int:
    """Sends the undelivered records of all runs under `output_dir` and returns their number.

    `uri` is where their tracking store is now, if it has moved; what is not of a run there is kept.
    Runs that are still going are left alone. Raises StorageError when something could not be sent; sending again
    repeats nothing.
    """
    delivered, left = 0, 0
    for path in sorted(output_dir.rglob("tracking.jsonl")):
        try:
            journal = Journal(path.parent)
        except StorageError as error:
            log.info("Left alone: %s", error)
            continue
        before = len(journal.pending())
        refused: list[Record] = []
        try:
            if before:
                _send_pending(journal, refused, uri)
        except Exception as error:
            log.warning("%s: %s", path.parent, reason(error))
        finally:
            journal.close()
        after = len(journal.pending())
        sent = before - after - len(refused)
        delivered, left = delivered + sent, left + after
        if before:
            said = f", {len(refused)} refused for good" if refused else ""
            log.info("%s: %d records sent%s, %d left", path.parent, sent, said, after)
    if left:
        raise StorageError(f"{left} tracking records could not be sent; the lines above say why.\nTry again later.")
    return delivered


def _send_pending(journal: Journal, refused: list[Record], uri: str | None) -> None:
    known = next(record for record in reversed(journal.records) if record["kind"] == "start")
    store = Store(uri or known["uri"], create=False)
    for record in journal.pending():
        try:
            store.deliver(record, journal.folder)
        except Exception as error:
            removed = uri is None and has_no_such_run(error)  # a store that was named now may be another one
            if removed or is_refused(error):
                refused.append(record)
                log.warning("%s: %s is refused (%s)", journal.folder, record["kind"], reason(error))
            elif record["kind"] in ("file", "model"):
                log.warning("%s: %s", journal.folder, reason(error))
                continue
            else:
                raise
        journal.mark_sent(record)
    if not journal.pending() and journal.records[-1]["kind"] != "finish":
        store.mark_killed(store.client.get_run(known["run"]))
