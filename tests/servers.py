"""What tests that start a server of their own share: a port, and waiting until it answers."""

import socket
import time

import requests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_up(page: str) -> bool:
    try:
        return requests.get(page, timeout=5).ok
    except requests.ConnectionError:
        return False


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    assert condition()
