"""Images in tar files, as webdataset writes them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from jlt.errors import JLTError, UsageError
from jlt.images.labels import MOST_CLASSES, no_class, numbered_classes, sorted_classes
from jlt.images.sharded import ShardedSource
from jlt.images.source import decode_image, require_index
from jlt.runtime.progress import track

BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file in a tar file: its name, where its header and its content begin, and the bytes of its content."""

    name: str
    header: int
    start: int
    size: int

    @property
    def key(self) -> str:
        """The name up to the first dot after the last slash, which the files of one sample share."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def ending(self) -> str:
        """What follows the last dot, in small letters."""
        return self.name.rpartition(".")[2].lower()


class TarShards(ShardedSource):
    """The samples of tar files: neighbouring members with the same key (the name up to its first dot).

    A sample has one image and a label: a member `.cls` that holds an integer, else `.json` with `label` or `cls`, an
    integer or a string. Names of integer labels are `class_names`, else what all samples of a class agree on in their
    .json (`class_name`, or the folder in `filename`, as in timm's ImageNet), else the numbers; strings are sorted.
    Samples are in the order of the files and of their members. Other members are ignored.

    Opening reads all headers and labels, and remembers where each image lies, so that any image is one read.
    """

    kind = "tar"

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        class_names: tuple[str, ...] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, files, options)
        index = _Index()
        starts = [0]
        for file in track(self._files, f"reading the headers of {self.name}"):
            index.add(file)
            starts.append(len(index.labels))
        if not index.labels:
            raise JLTError(f"{path} holds tar files without a single image.")
        self._file_starts = np.array(starts)
        self._headers, self._starts, self._sizes, labels = (
            np.array(column, dtype=np.int64) for column in (index.headers, index.starts, index.sizes, index.labels)
        )
        if not index.code_of:
            names = class_names if class_names is not None else index.agreed_names()
            self.class_names, self._labels = numbered_classes(labels, names, self.describe), labels.astype(np.int32)
        elif class_names is None:
            self.class_names, self._labels = sorted_classes(labels, list(index.code_of))
        else:
            raise UsageError(f"--class-names has no meaning for {path}: its labels are names already.")
        index.listing.update(json.dumps(self.class_names).encode())
        self.listing_sha256 = index.listing.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        require_index(index, self)
        size = int(self._sizes[index])
        path = self._path_of(index)
        with _opened(path) as file:
            data = os.pread(file.fileno(), size, int(self._starts[index]))
        if len(data) < size:
            raise _truncated(path)
        return decode_image(data, lambda: self.describe(index)), int(self._labels[index])

    def describe(self, index: int) -> str:
        """Return the tar file and the name of the member."""
        path = self._path_of(index)
        with _opened(path) as file:
            return f"{path.name} member {_any_member(path, file, int(self._headers[index])).name}"

    def _path_of(self, index: int) -> Path:
        return self._files[int(np.searchsorted(self._file_starts, index, side="right")) - 1]


class _Index:
    """Where each image of a sequence of tar files lies, and its label: a number, or the code of a name."""

    def __init__(self) -> None:
        self.headers, self.starts, self.sizes, self.labels = array("q"), array("q"), array("q"), array("q")
        self.code_of: dict[str, int] = {}
        self.listing = hashlib.sha256()
        self._noted: dict[int, str | None] = {}
        self._endings = _image_endings()

    def add(self, path: Path) -> None:
        """Add the samples of a tar file; JLTError if it is damaged, or a sample lacks its image or its label."""
        with _opened(path) as file:
            self.listing.update(json.dumps([path.name, os.fstat(file.fileno()).st_size]).encode())
            for key, members in itertools.groupby(_members(path, file), key=lambda member: member.key):
                self._add_sample(f"{key} in {path.name}", file, list(members))

    def _add_sample(self, sample: str, file: BinaryIO, members: Sequence[Member]) -> None:
        image = _only(sample, "image", [member for member in members if member.ending in self._endings])
        label_file = _only(sample, ".cls", [member for member in members if member.ending == "cls"])
        json_file = _only(sample, ".json", [member for member in members if member.ending == "json"])
        if image is None or (label_file is None and json_file is None):
            lacking = "image" if image is None else "label (.cls or .json)"
            found = ", ".join(member.name.rpartition("/")[2] for member in members)
            raise JLTError(f"{sample} has no {lacking} beside it, but {found}: add one, or take the sample out.")
        fields = _read_json(sample, file, json_file) if json_file else {}
        written = _read_cls(sample, file, label_file) if label_file else fields.get("label", fields.get("cls"))
        if isinstance(written, bool) or not isinstance(written, int | str):
            raise JLTError(f"{sample} has no label in its .json: an integer or a string `label` (or `cls`) is needed.")
        self._add_image(sample, image, written, _noted_name(fields))

    def _add_image(self, sample: str, image: Member, written: int | str, name: str | None) -> None:
        if self.labels and isinstance(written, str) != bool(self.code_of):
            raise JLTError(f"{sample} has the label {written!r}; others are {'names' if self.code_of else 'numbers'}.")
        if isinstance(written, str):
            label = self.code_of.setdefault(written, len(self.code_of))
        elif 0 <= written < MOST_CLASSES:
            label = written
            if self._noted.setdefault(label, name) != name:
                self._noted[label] = None
        else:
            raise no_class(sample, written)
        for column, value in zip(
            (self.headers, self.starts, self.sizes, self.labels), (*image[1:], label), strict=True
        ):
            column.append(value)
        self.listing.update(f"{image.name}\0{image.size}\0{written}\0".encode(errors="surrogatepass"))

    def agreed_names(self) -> tuple[str, ...] | None:
        """The names that the samples note for their classes, where each class has one and no two share it."""
        if None in self._noted.values():
            return None
        names = [self._noted.get(label) or str(label) for label in range(max(self._noted) + 1)]
        return tuple(names) if len(set(names)) == len(names) else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise JLTError(f"{path} cannot be read ({error.strerror}).") from error


def _image_endings() -> frozenset[str]:
    endings = Image.registered_extensions()
    return frozenset(ending[1:] for ending, kind in endings.items() if kind in Image.OPEN)


def _only(sample: str, kind: str, members: Sequence[Member]) -> Member | None:
    if len(members) > 1:
        names = " and ".join(member.name.rpartition("/")[2] for member in members)
        raise JLTError(f"{sample} has more than one {kind}, {names}: a sample needs one.")
    return members[0] if members else None


def _read_cls(sample: str, file: BinaryIO, member: Member) -> int:
    text = os.pread(file.fileno(), min(member.size, BLOCK), member.start)
    try:
        return int(text)
    except ValueError as error:
        raise JLTError(f"{sample} has {text[:40]!r} in its .cls: an integer is needed.") from error


def _read_json(sample: str, file: BinaryIO, member: Member) -> dict[str, Any]:
    try:
        fields = json.loads(os.pread(file.fileno(), member.size, member.start))
    except (ValueError, RecursionError) as error:
        raise JLTError(f"{sample} has a .json that does not parse ({error}).") from error
    if not isinstance(fields, dict):
        raise JLTError(f"{sample} has a .json that is no object with a `label`.")
    return fields


def _noted_name(fields: dict[str, Any]) -> str | None:
    name = fields.get("class_name")
    if name is None:
        # timm/imagenet-1k-wds: "filename": "n01440764/n01440764_3778.JPEG"
        name = str(fields.get("filename", "")).rpartition("/")[0].rpartition("/")[2]
    return name if isinstance(name, str) and name else None


def _members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield the files of a tar file that are not hidden; JLTError if it is damaged.

    Headers are read here, several times faster than by tarfile, which is asked about all but the plain ones.
    """
    end, offset = os.fstat(file.fileno()).st_size, 0
    while True:
        block = os.pread(file.fileno(), BLOCK, offset)
        if len(block) < BLOCK:
            raise _truncated(path)
        if not any(block):
            _require_end(path, file, offset)
            return
        member = _plain_member(block, offset)
        is_note = block[156:157] == b"x"
        if member is None or (is_note and _is_about_content(file, member)):
            member, is_note = _any_member(path, file, offset), False
        if member.size < 0:
            raise JLTError(f"{path} is damaged: {member.name} has a size of {member.size} bytes.")
        if member.start + member.size > end:
            raise _truncated(path)
        offset = _after(member)
        if not (is_note or _ignored(member.name.rpartition("/")[2])):
            yield member


def _after(member: Member) -> int:
    """Where the next header begins: content is filled up to whole blocks."""
    return member.start + -(-member.size // BLOCK) * BLOCK


def _ignored(base: str) -> bool:
    # Directories, which have no base name here; notes of file managers (.name) and of webdataset (__name__); and what
    # webdataset overlooks, a name without a dot.
    stem, dot, _ = base.partition(".")
    return not (stem and dot) or (stem.startswith("__") and stem.endswith("__"))


def _plain_member(block: bytes, offset: int) -> Member | None:
    """The member of a header that says all about it (POSIX.1-1988, "ustar"), or a pax header; None for others."""
    if block[156:157] not in b"0x\0" or block[257:265] not in (b"ustar\x0000", b"ustar  \0"):
        return None
    try:
        size, checksum = int(block[124:136].strip(b" \0"), 8), int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    # The checksum counts its own eight bytes as spaces.
    if size < 0 or checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    name = block[:100].partition(b"\0")[0]
    # GNU tar keeps times where POSIX has the beginning of a long name.
    prefix = block[345:500].partition(b"\0")[0] if block[263:265] == b"00" else b""
    text = b"/".join(filter(None, (prefix, name))).decode(errors="surrogateescape")
    return None if text.endswith("/") else Member(text, offset, offset + BLOCK, size)


def _is_about_content(file: BinaryIO, header: Member) -> bool:
    """Whether the records of a pax header change what its member is, rather than note times and owners."""
    records = os.pread(file.fileno(), min(header.size, 2**20), header.start)
    return any(key in records for key in (b" path=", b" linkpath=", b" size=", b" hdrcharset=", b" GNU.sparse"))


def _any_member(path: Path, file: BinaryIO, offset: int) -> Member:
    """The member whose first header lies at `offset`, as tarfile understands it; without a name if it is no file."""
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            info, following = archive.next(), archive.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise JLTError(f"{path} does not read as a tar file ({error} at byte {offset}): fetch it again.") from error
    if info is None:
        raise JLTError(f"{path} does not read as a tar file (no header at byte {offset}): fetch it again.")
    if info.islnk() or info.issym() or info.issparse():
        raise JLTError(f"{info.name} in {path} is a link or a sparse file: write the tar file with plain files.")
    if not info.isreg():
        return Member("", offset, info.offset_data, following - info.offset_data)
    return Member(info.name, offset, info.offset_data, info.size)


def _require_end(path: Path, file: BinaryIO, offset: int) -> None:
    # tar fills its last record, of 20 blocks, with zeros; what follows beyond was appended by `cat`.
    if any(os.pread(file.fileno(), 21 * BLOCK, offset)):
        raise JLTError(f"{path} goes on after its end at byte {offset}: tar files that were joined cannot be read.")


def _truncated(path: Path) -> JLTError:
    return JLTError(f"{path} is truncated: fetch it again.")
