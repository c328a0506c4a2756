"""The files of runs: where they are, and putting them there whole or not at all, without a second copy on the disk."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit


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
    from urllib.request import url2pathname  # late: it imports http.client and ssl, and --help comes through here

    return Path(url2pathname(urlsplit(uri).path)) if urlsplit(uri).scheme in ("", "file") else None


def write_whole(path: Path, text: str) -> None:
    """Put the text there as UTF-8, its line ends as they are, whole or not at all: under another name first."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # a link left under that name would be written through
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)


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
