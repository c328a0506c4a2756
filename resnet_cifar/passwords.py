"""Passwords inside URIs: found, so that they are refused before they are written anywhere, and blotted out of messages."""

import re

_USER_AND_PASSWORD = re.compile(r"://[^\s@:]*:[^@]+@|https?://[^\s/@]+@")
_NAMED = re.compile(r"(?i)([?&;](?:\w*password|passwd|pwd|\w*token|\w*secret\w*|api_?key)=)[^&;\s'\"]+")


def has_password(text: str) -> bool:
    """Whether a text holds a URI with a password: `scheme://user:password@host` or `...?password=...`."""
    return bool(_USER_AND_PASSWORD.search(text) or _NAMED.search(text))


def without_passwords(text: str) -> str:
    """The text with everything before the host of a URI, and every value named password or token, replaced by ***."""
    return _NAMED.sub(r"\1***", re.sub(r"://.*@", "://***@", text))
