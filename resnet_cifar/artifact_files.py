"""Where the files of runs are, and putting them there without a second copy on the disk."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def artifact_location(artifacts: str | Path | None) -> str | None:
    if artifacts is None or "://" in str(artifacts):
        return artifacts and str(artifacts)
    folder = Path(artifacts).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder.as_uri()


def local_folder(uri: str) -> Path | None:
    return Path(url2pathname(urlsplit(uri).path)) if urlsplit(uri).scheme in ("", "file") else None


def link_or_copy(source: Path, target: Path) -> None:
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
