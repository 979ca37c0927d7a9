"""Files of published weights: their addresses, their folder, and their download."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from jlt.errors import JLTError, unknown_name
from jlt.runtime.progress import bar, inform
from jlt.storage.files import atomic_path, sha256_file
from jlt.storage.folders import remove_leftovers

TIMEOUT_SECONDS = 20.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A file on the web, with the first digits of its SHA-256."""

    url: str
    file: str
    sha256: str


INCEPTION = Published(
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    file="pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)
PUBLISHED = {"inception": INCEPTION}


def cache_folder() -> Path:
    """Return the folder of downloaded files: $JLT_CACHE, or ~/.cache/jlt."""
    return Path(os.environ.get("JLT_CACHE") or "~/.cache/jlt").expanduser()


def fetch(name: str) -> Path:
    """Return the path of a published file; download it if it is missing or damaged.

    UsageError for an unknown name; JLTError for a download that fails, and for a file of another hash, which is
    deleted.
    """
    if name not in PUBLISHED:
        raise unknown_name("file to fetch", name, PUBLISHED)
    published = PUBLISHED[name]
    path = cache_folder() / published.file
    if path.is_file() and sha256_file(path).startswith(published.sha256):
        return path
    inform(f"Downloading {published.url}")
    remove_leftovers(path.parent, path.name)
    with atomic_path(path) as temporary:
        found = _download(published.url, temporary)
        if not found.startswith(published.sha256):
            raise JLTError(
                f"{published.url} gave another file: its SHA-256 begins with {found[:8]}, not with {published.sha256}. "
                "The file was deleted; a proxy may have answered instead of the server."
            )
    return path


def _download(url: str, path: Path) -> str:
    """Download a URL to a file and return its SHA-256."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    digest, done = hashlib.sha256(), 0
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as answer, path.open("wb") as file:
            length = answer.headers.get("Content-Length")
            with bar(f"Downloading {path.name}", int(length) if length else None) as shown:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    shown.show(done)
    except HTTPError as error:
        # An error page is a response too, and its connection must be closed.
        error.close()
        raise JLTError(f"{url} cannot be downloaded: the server answers {error.code} {error.reason}.") from error
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise JLTError(
            f"{url} cannot be downloaded ({getattr(error, 'reason', None) or error}): download it on another machine "
            "and name the file with --features-path."
        ) from error
    if length and done != int(length):
        raise JLTError(f"The download of {url} stopped after {done} of {length} bytes: try again.")
    return digest.hexdigest()
