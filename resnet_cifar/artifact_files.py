"""Where the files of runs are, and putting them there without a second copy on the disk."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def artifact_location(artifacts: str | Path | None) -> str | None:
    """The address MLflow keeps for a folder, which is made; an address as it is, None for a server's own place.

    Raises:
        PermissionError: the folder cannot be written.
    """
    if artifacts is None:
        return None
    if "://" in str(artifacts):
        return str(artifacts)
    folder = Path(artifacts).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder.as_uri()


def local_folder(uri: str) -> Path | None:
    """The folder behind a run's artifact address; None where a server keeps it."""
    return Path(url2pathname(urlsplit(uri).path)) if urlsplit(uri).scheme in ("", "file") else None


def link_or_copy(source: Path, target: Path) -> None:
    """Put the file there, whole or not at all: under another name first. A hard link, or where there are none a copy."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, part)
    os.replace(part, target)
