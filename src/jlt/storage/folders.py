"""Folders of work: what a path in one of their files may lead to, who may write, and what killed processes left.

A folder that a user names may be a link; below it nothing is written or removed through one. A process claims a folder
for one piece of work before it writes, and holds it by a lock that ends with the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jlt.errors import JLTError
from jlt.storage.files import (
    WORK,
    difference,
    format_difference,
    fsync_path,
    partial_path,
    read_marker,
    recorded,
    write_marker,
)

LOCK = ".lock"
ATTEMPTS = 1000
"""Tries to lock a folder while other processes remove theirs."""
PARTIAL = re.compile(r"\.(?P<stem>.+)\.(?P<process>\d+)(-[0-9a-f]+)?\.partial(?P<suffix>\..+)?")
"""The names that `partial_path` makes."""


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file that another file in `folder` names; JLTError if it, links followed, is outside."""
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        # A null character, a name that is too long, or links in a circle.
        inside = False
    if not inside:
        raise JLTError(f"{name!r} leads out of {folder}: a file may name only files in its own folder.")
    return folder / name


def stays_inside(name: str) -> bool:
    """Return whether a name in a file stays in its folder, by its text; what a link leads to needs a hash."""
    parts = PurePath(name).parts
    return bool(parts) and not PurePath(name).is_absolute() and ".." not in parts and "\0" not in name


def require_unlinked(root: Path, path: Path) -> None:
    """Raise JLTError if `path`, or a folder between it and `root`, is a link; `root` itself may be one."""
    for part in (path, *path.parents):
        if part == root:
            return
        if part.is_symlink():
            raise JLTError(
                f"{part} is a link, and nothing in {root} is written or removed through one: put a folder in its place."
            )


def open_unlinked(path: Path, flags: int) -> int:
    """Open a file and return its descriptor; JLTError for a link, which may lead to a file of other work."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise JLTError(f"{path} is a link, and nothing is written through one: remove it.") from error
        raise


def remove_tree(root: Path, folder: Path) -> None:
    """Remove a folder in `root`, if it is there; JLTError if it, or a folder between the two, is a link."""
    require_unlinked(root, folder)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Claim:
    """A folder for one piece of work: the JSON values `identity` describe it, in the sealed file `marker`."""

    folder: Path
    marker: str
    identity: Mapping[str, Any]
    free: Collection[str] = ()
    """Keys of the identity that may change."""
    allowed: Collection[str] = ()
    """Entries that the folder may hold before the work begins."""

    def is_begun(self) -> bool:
        """Return whether the folder holds this work, and not only room for it.

        JLTError for a file, for a folder of other work, which shows the difference, and for one that holds other files.
        """
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise JLTError(f"{folder} is a file: name a folder.")
        if (folder / self.marker).is_file():
            stored = read_marker(folder / self.marker)[0]
            if differences := difference(stored, recorded(self.identity), free=self.free):
                raise JLTError(
                    f"{folder} holds other work, which differs in: {format_difference(differences)}. "
                    "Name another folder, or delete this one to start over."
                )
            return True
        entries = {entry.name for entry in folder.iterdir()} - {*self.allowed, LOCK} if folder.exists() else set()
        if foreign := sorted(name for name in entries if not PARTIAL.fullmatch(name)):
            raise JLTError(
                f"{folder} exists and holds other files, such as {foreign[0]}: choose an empty or new folder."
            )
        return False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder as its only writer, and leave it as it is; JLTError as `is_begun` and `lock_folder`."""
        self.is_begun()
        with lock_folder(self.folder):
            # Another process may have claimed it in between.
            self.is_begun()
            yield

    def begin(self) -> None:
        """Write the marker, and remove what killed processes left incomplete; the folder must be held.

        Called when nothing can be refused any more: until then a refusal leaves the folder as it was. What may change
        leaves the identity of the work, to which the files in the folder belong.
        """
        remove_leftovers(self.folder)
        identity, path = recorded(self.identity), self.folder / self.marker
        stored, work = read_marker(path) if path.is_file() else (None, "")
        if stored != identity:
            write_marker(path, {**identity, WORK: work} if work else identity, self.free)


@contextlib.contextmanager
def lock_folder(folder: Path, root: Path | None = None) -> Iterator[None]:
    """Hold a folder as its only writer; JLTError if another process does. The lock ends with its process.

    `root` is the folder that the user named, where it is not `folder` itself: JLTError for a link between the two. A
    folder that was made for its lock, and is empty at the end, is removed.
    """
    require_unlinked(root or folder, folder)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    lock = _lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Before it is released; a file of another process or of the user stays.
            if os.fstat(lock).st_size == 0 and os.path.samestat(os.fstat(lock), os.lstat(folder / LOCK)):
                (folder / LOCK).unlink()
        os.close(lock)
        for part in made:
            with contextlib.suppress(OSError):
                part.rmdir()


def _lock(folder: Path) -> int:
    """Return the descriptor of a folder's lock, which holds it until it is closed."""
    for _ in range(ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
            lock = open_unlinked(folder / LOCK, os.O_RDWR | os.O_CREAT)
            opened.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what = f"Another process is writing into {folder}"
                raise JLTError(f"{what}: wait for it, or name another folder.") from error
            # The process that held it before may have removed the file or the folder in between.
            if os.path.samestat(os.fstat(lock), os.lstat(folder / LOCK)):
                opened.pop_all()
                return lock
    raise JLTError(f"No file can be made in {folder}: name another folder.")


@contextlib.contextmanager
def whole_folder(folder: Path, is_same: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yield a folder, empty but for its lock, that becomes `folder`, by a rename and flushed to disk, at the end.

    Every process has its own one. What killed processes left is removed. JLTError if `folder` holds something by then,
    unless `is_same` returns that another process was faster with the same.
    """
    folder = folder.absolute()
    remove_leftovers(folder.parent, folder.name)
    partial = partial_path(folder)
    with lock_folder(partial):
        try:
            yield partial
            for path in partial.rglob("*"):
                fsync_path(path)
            # As late as possible, since it protects the folder from processes that remove what others left.
            (partial / LOCK).unlink()
            fsync_path(partial)
            try:
                partial.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not is_same():
                    raise JLTError(f"{folder} is not empty any more: name another folder.") from error
            fsync_path(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove files and folders that killed processes of this machine left incomplete, in a folder and all below it.

    With a `name`, only what was to be this file or folder, and only directly in the folder: others may be writing.
    """
    for place, folders, files in os.walk(folder):
        found = {entry: match for entry in (*folders, *files) if (match := PARTIAL.fullmatch(entry))}
        for entry, match in found.items():
            if name in ("", match["stem"] + (match["suffix"] or "")):
                _remove_left(Path(place, entry), int(match["process"]))
        folders[:] = [] if name else [entry for entry in folders if entry not in found]


def _remove_left(path: Path, process: int) -> None:
    """Remove a file, a link or a folder of a process that has ended, as far as this is allowed."""
    with contextlib.suppress(OSError, JLTError):
        if path.is_symlink() or not path.is_dir():
            if not _is_alive(process):
                path.unlink()
        elif (path / LOCK).is_file():
            # The lock of one that is being written is held, whatever process and machine writes.
            with lock_folder(path):
                shutil.rmtree(path, ignore_errors=True)
        elif not _is_alive(process):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Return whether another process of this machine has a number; this one has written nothing yet."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
