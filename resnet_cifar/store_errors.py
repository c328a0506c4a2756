"""A tracking store that cannot be used: noticed in time, and said so that a reader knows what to do."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

from filelock import Timeout

from resnet_cifar.delivery import reason
from resnet_cifar.errors import StorageError, UserError

T = TypeVar("T")
DENIED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")  # MLflow's names


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError: names, proxies and drivers have time limits of their own, or none."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # not an executor's, which Python would wait for at its end
    wait([outcome], seconds)
    if not outcome.done():
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return outcome.result()


@contextmanager
def user_errors(uri: str) -> Iterator[None]:
    """Turns what goes wrong with the store into a StorageError that says what to do."""
    advice = "Check that it is there and can be written, or run with tracking=none."
    try:
        yield
    except UserError:
        raise
    except Timeout:
        advice = "Another process has held its .lock file for five minutes: stop that process."
        raise StorageError(f"The tracking store {uri} is locked.\n{advice}") from None
    except Exception as error:
        text = str(error)
        if "database is locked" in text:
            advice = "Another program holds it: close that program, or give another tracking.uri."
        elif "out-of-date database schema" in text or "Can't locate revision" in text:
            advice = (
                "Another MLflow version wrote it: pip install -U mlflow, and if it is older: mlflow db upgrade URI."
            )
        elif re.search(r"not a database|malformed|table \w+ already exists|duplicate column", text):
            advice = "The file is damaged: move it away, a new one is made, or restore a copy."
        elif "error code 401" in text or "error code 403" in text or getattr(error, "error_code", None) in DENIED:
            advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        elif uri.startswith("http"):
            advice = "Start the server or correct tracking.uri, or run with tracking=none."
        raise StorageError(f"The tracking store {uri} cannot be used ({reason(error)}).\n{advice}") from None
