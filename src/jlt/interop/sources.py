"""Where a checkpoint comes from: a file or folder of this machine, or the Hub; and exports as runs."""

from __future__ import annotations

from pathlib import Path

from jlt.errors import UsageError
from jlt.evaluation.fetch import cache_folder
from jlt.interop.import_pipeline import import_pipeline
from jlt.interop.pipeline_settings import INDEX
from jlt.storage.files import sealed_sha256, sha256_file
from jlt.storage.weights import hub_file, hub_folder

HUB = "hub:"
REMEDY = "download it yourself, and name the local copy."
DATA = ("*.json", "*.safetensors")
"""Files of an exported folder that a run is made of: its code is not downloaded."""


def local_path(source: str) -> Path:
    """Return a local path: `source` itself, or the download of hub:user/name/file or of the folder hub:user/name.

    UsageError for a name that is no Hub id; JLTError if it cannot be downloaded.
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


def run_of_export(path: Path) -> Path:
    """Return the run folder of an exported folder or file, made in the cache at the first call; JLTError as import."""
    files = [file for kind in DATA for file in path.rglob(kind)] if path.is_dir() else [path]
    identity = sealed_sha256({str(file.relative_to(path)): sha256_file(file) for file in files})
    run = cache_folder() / "exports" / identity[:16]
    return run if run.exists() else import_pipeline(path, run)
