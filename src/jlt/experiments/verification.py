"""Everything that jlt wrote into a folder, compared with its hashes; files without a seal can be accepted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from jlt.errors import JLTError
from jlt.evaluation.reference import UNSEALED, Reference, unsealed_reference
from jlt.interop.export import RECORD, require_intact
from jlt.latents.manifest import MANIFEST_NAME
from jlt.latents.store import STATE_FOLDER, verify_store
from jlt.results.ablation import Ablation
from jlt.results.evaluation import Evaluation
from jlt.results.files import ResultFile, parse_result, read_result, write_result
from jlt.results.geometry import GEOMETRY, INSIDE, ErrorByDirection, Geometry
from jlt.results.price import Price
from jlt.results.run import CONFIG, LOG, log_line, parse_config, parse_line, read_config, read_log, read_run
from jlt.results.sweep import Sweep
from jlt.sampling.save import ARRAY, PROTOCOL, read_drawn
from jlt.storage.files import (
    MARKERS,
    PLACE,
    SEAL,
    atomic_path,
    place_of,
    read_json,
    read_marker,
    sealed_text,
    with_place,
    work_of,
    write_marker,
    write_text,
)
from jlt.storage.seals import is_intact, seal_file
from jlt.training.checkpoint import is_checkpoint_or_run, verify_checkpoints
from jlt.training.state import free_to_change

Check = Callable[[Path, bool], object]
"""Reads a file, and raises a JLTError if it is damaged; if the flag is set, one without a seal is sealed first."""


def verify(folder: Path, seal: bool = False) -> list[str]:
    """Return every problem of the files that jlt wrote into a folder and below; empty if there are none.

    With `seal`, files that earlier versions or editors left without a seal are accepted as they are, if what they hold
    is possible. Links and hidden files are left out.
    """
    whole: list[Callable[[], list[str]]] = []
    checks: list[tuple[Path, Check]] = []
    for place in _folders(folder):
        if _is_store(place):
            whole.append(partial(_problems, verify_store, place / MANIFEST_NAME, seal))
        elif (place / MANIFEST_NAME).exists() or place.parent.name in ("checkpoints", "snapshots"):
            whole.append(partial(_problems, verify_checkpoints, place / MANIFEST_NAME, seal))
        else:
            checks += _checks(place)
    if not whole and not checks:
        return verify_store(folder)
    # A log is compared with the other files of its run.
    checks.sort(key=lambda entry: entry[1] is _check_log)
    problems = [problem for path, check in checks if (problem := _problem(path, check, seal))]
    # A file that others belong to is the problem of each of them.
    return list(dict.fromkeys([*problems, *(problem for find in whole for problem in find())]))


def _problems(find: Callable[[Path], list[str]], manifest: Path, seal: bool) -> list[str]:
    """Return what is found in the folder of a manifest."""
    with contextlib.suppress(JLTError):
        if seal and SEAL not in (content := read_json(manifest)):
            write_text(manifest, sealed_text(with_place(content, manifest)))
    return find(manifest.parent)


def _problem(path: Path, check: Check, seal: bool) -> str | None:
    try:
        check(path, seal)
    except JLTError as error:
        return str(error)
    return None


def _folders(folder: Path) -> Iterator[Path]:
    for place, inner, _ in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in ("wandb", "tensorboard"))
        yield Path(place)


def _is_store(place: Path) -> bool:
    return (place / STATE_FOLDER).is_dir() or (
        (place / MANIFEST_NAME).exists() and not is_checkpoint_or_run(place) and place.parent.name != "snapshots"
    )


def _checks(place: Path) -> Iterator[tuple[Path, Check]]:
    """Yield the files of one folder with what checks each, the ones that others belong to first."""
    for path in (place / name for name in (*MARKERS, PROTOCOL, "quickstart.json")):
        if path.is_file() and (path.name != CONFIG or _is_run(place)):
            yield path, _check_marker
    kinds = {kind.FILE: kind for kind in (Ablation, Sweep, Price)} | {GEOMETRY: Geometry, INSIDE: ErrorByDirection}
    results: dict[str, type[ResultFile]] = {**kinds}
    for path in sorted(place.glob("*.json")):
        kind = Evaluation if place.name in ("evaluations", "points") else results.get(path.name)
        if kind is not None:
            yield path, partial(_check_result, kind)
        elif path.with_suffix(".npz").is_file():
            yield path, _check_reference
    if (place / LOG).is_file():
        yield place / LOG, _check_log
    if (place / RECORD).is_file():
        yield place / RECORD, _check_export
    for path in sorted([*place.glob("*.png"), place / ARRAY]):
        if path.is_file() and ((place / PROTOCOL).is_file() or place.name == "samples"):
            yield path, _check_image


def _is_run(place: Path) -> bool:
    """Return whether the `config.json` of a folder is that of a run, and not of an autoencoder."""
    if any((place / name).exists() for name in (LOG, "checkpoints", "evaluations")):
        return True
    with contextlib.suppress(JLTError):
        return {"prediction", "network"} <= read_json(place / CONFIG).keys()
    return False


def _check_marker(path: Path, seal: bool) -> None:
    if seal and SEAL not in (content := read_json(path)):
        config = path.name == CONFIG and parse_config(path, content)[0]
        write_marker(path, content, free=free_to_change(config) if config else ())
    if path.name == CONFIG:
        read_config(path.parent)
    elif path.name == PROTOCOL:
        read_drawn(path)
    else:
        read_marker(path)


def _check_result(kind: type[ResultFile], path: Path, seal: bool) -> None:
    content = read_json(path)
    if seal and SEAL not in content:
        write_result(path, parse_result(kind, path, content))
    found = read_result(kind, path)
    if seal and kind.PLACED and PLACE not in content and place_of(path):
        write_result(path, found)


def _check_reference(path: Path, seal: bool) -> None:
    content = read_json(path)
    if seal and content.get("schema") == UNSEALED:
        write_result(path, unsealed_reference(content))
    Reference.load(path.with_suffix(".npz"))


def _check_export(path: Path, seal: bool) -> None:
    if seal and SEAL not in (content := read_json(path)):
        write_text(path, sealed_text(content))
    require_intact(path.parent)


def _check_log(path: Path, seal: bool) -> None:
    if seal:
        lines = path.read_bytes().splitlines(keepends=True)
        work = work_of(path.parent)
        for number, text in enumerate(lines):
            # The last line may be torn.
            if b'"seal"' not in text and text.endswith(b"\n"):
                parse_line(text, text, f"{path}, line {number + 1}")
                lines[number] = log_line(json.loads(text), work).encode()
        if lines != path.read_bytes().splitlines(keepends=True):
            write_text(path, b"".join(lines).decode())
    log = read_run(path.parent).log if (path.parent / CONFIG).is_file() else read_log(path)
    if log.notes:
        raise JLTError(" ".join(log.notes))


def _check_image(path: Path, seal: bool) -> None:
    run = path.parent.parent
    protocol = path.parent / PROTOCOL
    work = read_marker(protocol)[1] if protocol.is_file() else work_of(run)
    intact = is_intact(path, path.name, work)
    if intact is None and seal:
        with atomic_path(path) as temporary:
            shutil.copyfile(path, temporary)
            seal_file(temporary, path.name, work)
    elif not intact and (protocol.is_file() or intact is False):
        raise JLTError(f"{path} is damaged, unsealed, or no file of this work: run the command that drew it again.")
