"""Where a checkpoint comes from: a file or folder of this machine, or the Hub; and exports as runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from jlt.errors import JLTError, UsageError
from jlt.evaluation.fetch import cache_folder
from jlt.interop.importing import write_run
from jlt.interop.pipeline_settings import INDEX
from jlt.interop.read_export import read_export
from jlt.storage.files import read_sealed_json, sealed_text, write_text
from jlt.storage.weights import hub_file, hub_folder
from jlt.training.checkpoint import Checkpoint, open_checkpoint

HUB = "hub:"
REMEDY = "download it yourself, and name the local copy."
DATA = ("*.json", "*.safetensors")
"""Files of an exported folder that a run is made of: its code is not downloaded."""
COARSEST_TIMES = 2 * 10**9
"""Nanoseconds between the times that a file system distinguishes, at most."""


def local_path(source: str) -> Path:
    """Return a local path: `source` itself, or the download of hub:user/name/file or of the folder hub:user/name.

    UsageError for a name without user or repository; JLTError if it cannot be downloaded.
    """
    if not source.startswith(HUB):
        return Path(source)
    user, _, rest = source.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not (user and name):
        raise UsageError(f"{source!r} is not on the Hub: hub:user/name or hub:user/name/file is expected.")
    repository = f"{user}/{name}"
    return hub_file(repository, file, REMEDY) if file else hub_folder(repository, INDEX, DATA, REMEDY)


def is_exported(path: Path) -> bool:
    """Return whether a path looks like what `jlt export` writes: a pipeline folder, or a safetensors file."""
    return (path / INDEX).is_file() or (path.is_file() and path.suffix == ".safetensors")


def open_source(source: str | os.PathLike[str]) -> Checkpoint:
    """Open what a user names as a checkpoint: a run (its newest), a checkpoint, an export, or hub:user/name.

    An export becomes a run in the cache first. JLTError as for an import, and for what holds no checkpoint.
    """
    path = local_path(os.fspath(source))
    return _open_export(path, os.fspath(source)) if is_exported(path) else open_checkpoint(path)


def _open_export(path: Path, source: str) -> Checkpoint:
    """Open the run of an export in the cache; what is unchanged since it was last opened is not read again."""
    cache = cache_folder() / "exports"
    known = cache / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}.json"
    begun, stamps = time.time_ns(), _stamps(path)
    with contextlib.suppress(JLTError):
        found = read_sealed_json(known)
        if found["stamps"] == stamps:
            return open_checkpoint(cache / found["run"])
    imported = read_export(path, source)
    checkpoint = write_run(imported, cache / imported.facts["sha256"][:16])
    # A file that changes again within the resolution of its times would have the same stamp.
    if _stamps(path) == stamps and begun - max(changed for *_, changed in stamps.values()) > COARSEST_TIMES:
        write_text(known, sealed_text({"stamps": stamps, "run": checkpoint.run.name}))
    return checkpoint


def _stamps(path: Path) -> dict[str, list[int]]:
    """Return size, inode, and times of modification and of change of each file, which no edit leaves all equal."""
    files = [file for kind in DATA for file in path.rglob(kind)] if path.is_dir() else [path]
    facts = {str(file.relative_to(path)): file.stat() for file in sorted(files) if file.is_file()}
    return {name: [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in facts.items()}
