"""Files of published weights: where they come from, where they are kept, and their download."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from jlt.errors import JLTError, unknown_name
from jlt.runtime.progress import bar, inform
from jlt.storage.files import atomic_path, sha256_file

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
    """Return the folder of fetched files: $JLT_CACHE, or .cache/jlt at home."""
    return Path(os.environ.get("JLT_CACHE") or "~/.cache/jlt").expanduser()


def fetch(name: str) -> Path:
    """Return the path of a published file, downloaded if it is not there or damaged.

    JLTError for an unknown name, a download that fails and a file of another hash, which is not kept.
    """
    if name not in PUBLISHED:
        raise unknown_name("file to fetch", name, PUBLISHED)
    published = PUBLISHED[name]
    path = cache_folder() / published.file
    if path.is_file() and sha256_file(path).startswith(published.sha256):
        return path
    inform(f"Fetching {published.url}")
    with atomic_path(path) as temporary:
        found = _download(published.url, temporary)
        if not found.startswith(published.sha256):
            raise JLTError(
                f"{published.url} gave another file: its SHA-256 begins with {found[:8]}, not with {published.sha256}. "
                "Nothing was kept; something between here and there may have answered in its place."
            )
    return path


def _download(url: str, path: Path) -> str:
    """Write what a URL gives to a file and return its SHA-256."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    digest, done = hashlib.sha256(), 0
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as answer, path.open("wb") as file:
            length = answer.headers.get("Content-Length")
            with bar(f"Fetching {path.name}", int(length) if length else None) as shown:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    shown.show(done)
    except HTTPError as error:
        # An error page is an answer too, with a connection of its own to close.
        error.close()
        raise JLTError(f"{url} cannot be fetched: the server answers {error.code} {error.reason}.") from error
    except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise JLTError(
            f"{url} cannot be fetched ({getattr(error, 'reason', None) or error}): where there is no way to it, "
            "download it elsewhere and name the file with --features-path."
        ) from error
    if length and done != int(length):
        raise JLTError(f"{url} broke off after {done} of {length} bytes: fetch it again.")
    return digest.hexdigest()
