"""Passwords: found in URIs, so that they are refused before they are written anywhere, and blotted out of messages."""

import os
import re

_USER_AND_PASSWORD = re.compile(r"://[^\s@:]*:[^@]+@|https?://[^\s/@]+@")
_NAMED = re.compile(r"(?i)([?&;](?:\w*password|passwd|pwd|\w*token|\w*secret\w*|api_?key)=)[^&;\s'\"]+")
_SECRET_VARIABLE = re.compile(r"(?i)passw|token(?!iz)|secret|credential|(api|access|private)_?key")


def has_password(text: str) -> bool:
    """Whether a text holds a URI with a password: `scheme://user:password@host` or `...?password=...`."""
    return bool(_USER_AND_PASSWORD.search(text) or _NAMED.search(text))


def without_passwords(text: str) -> str:
    """The text with everything before the host of a URI, and every value named password or token, replaced by ***.

    The values of environment variables with such names count too, wherever they stand.
    """
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= 6:  # shorter ones would blot out ordinary words
            text = text.replace(value, "***")
    # A password may hold almost anything, but not the next setting of a command line.
    return _NAMED.sub(r"\1***", re.sub(r"://(?:(?!\s[\w./+~@-]+=).)*@", "://***@", text))


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return bool(_SECRET_VARIABLE.search(name))
