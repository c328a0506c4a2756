"""Values that come from environment variables: used, and never written down, since any of them may be a secret."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf


def without_environment(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values; what depends on an `${oc.env:...}` stays as it was written.

    A configuration made of it has the values of `cfg` wherever the environment variables have theirs.
    """
    written, resolved = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True))
    secrets = {str(value) for text, value in _interpolations(written, resolved) if "oc.env:" in text} - {""}
    return _hidden(written, resolved, secrets)


def _interpolations(written: Any, resolved: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(written, str):
        if "${" in written:
            yield written, resolved
    elif isinstance(written, dict | list):
        for key in written if isinstance(written, dict) else range(len(written)):
            yield from _interpolations(written[key], resolved[key])


def _hidden(written: Any, resolved: Any, secrets: set[str]) -> Any:
    if isinstance(written, dict):
        return {key: _hidden(written[key], resolved[key], secrets) for key in written}
    if isinstance(written, list):
        return [_hidden(*pair, secrets) for pair in zip(written, resolved, strict=True)]
    # An interpolation may reach the environment through another key: what it leads to tells.
    leads_there = isinstance(written, str) and "${" in written and any(text in str(resolved) for text in secrets)
    return written if leads_there else resolved
