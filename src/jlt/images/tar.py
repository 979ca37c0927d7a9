"""Images in tar files, as webdataset writes them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from jlt.errors import JLTError
from jlt.images.reading import FORMATS, decode_image, require_size
from jlt.images.sharded import MOST_CLASSES, ShardedSource, no_class
from jlt.images.source import require_index
from jlt.runtime.progress import track

BLOCK = tarfile.BLOCKSIZE
LARGEST_JSON = 2**24


class Member(NamedTuple):
    """A file in a tar file: its name, the offsets of its header and its content, and the bytes of its content."""

    name: str
    header: int
    start: int
    size: int

    @property
    def base(self) -> str:
        """The name after the last slash."""
        return self.name.rpartition("/")[2]

    @property
    def key(self) -> str:
        """The name up to the first dot after the last slash, which the files of one sample share."""
        return self.name[: len(self.name) - len(self.base)] + self.base.partition(".")[0]

    @property
    def suffix(self) -> str:
        """The part after the last dot, in lower case."""
        return self.name.rpartition(".")[2].lower()


class TarShards(ShardedSource):
    """The samples of tar files: consecutive members with the same key (the name up to its first dot).

    A sample has one image and a label: a member `.cls` that holds an integer, or else `.json` with `label` or `cls`, an
    integer or a string. Integer labels are named by `class_names`, or else by the name that all samples of a class have
    in their .json (`class_name`, or the folder in `filename`, as in timm's ImageNet), or else by the numbers. String
    labels are sorted. Samples keep the order of the files and their members; other members are ignored.

    Opening reads all headers and labels and keeps the offset of each image, so that any image is one read.
    """

    kind = "tar"

    def _read_listing(self, class_names: Sequence[str] | None) -> None:
        index = _Index()
        file_starts = [0]
        for file in track(self._files, f"reading the headers of {self.name}"):
            index.add(file)
            file_starts.append(len(index.labels))
        if not index.labels:
            raise JLTError(f"{self.path} holds tar files without a single image.")
        self._file_starts = np.array(file_starts)
        self._headers, self._starts, self._sizes, labels = (
            np.array(column, dtype=np.int64) for column in (index.headers, index.starts, index.sizes, index.labels)
        )
        self._set_classes(labels, index.code_of, class_names, index.agreed_names())
        index.listing.update(json.dumps(self.class_names).encode())
        self.listing_sha256 = index.listing.hexdigest()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        require_index(index, self)
        size = int(self._sizes[index])
        require_size(size, lambda: self.describe(index))
        path = self._files[self._file_number(index)]
        with _opened(path) as file:
            data = os.pread(file.fileno(), size, int(self._starts[index]))
        if len(data) < size:
            raise _truncated(path)
        return decode_image(data, lambda: self.describe(index)), int(self._labels[index])

    def describe(self, index: int) -> str:
        """Return the tar file and the name of the member."""
        path = self._files[self._file_number(index)]
        with _opened(path) as file:
            return f"{path.name} member {_any_member(path, file, int(self._headers[index])).name}"


class _Index:
    """The place of each image in a sequence of tar files, and its label: a number, or the code of a name."""

    def __init__(self) -> None:
        self.headers, self.starts, self.sizes, self.labels = array("q"), array("q"), array("q"), array("q")
        self.code_of: dict[str, int] = {}
        self.listing = hashlib.sha256()
        self._name_of: dict[int, str | None] = {}
        suffixes = Image.registered_extensions()
        self._image_suffixes = frozenset(suffix[1:] for suffix, kind in suffixes.items() if kind in FORMATS)

    def add(self, path: Path) -> None:
        """Add the samples of a tar file; JLTError if it is damaged, or a sample lacks its image or its label."""
        with _opened(path) as file:
            self.listing.update(json.dumps([path.name, os.fstat(file.fileno()).st_size]).encode())
            for key, members in itertools.groupby(_members(path, file), key=lambda member: member.key):
                self._add_sample(f"{key} in {path.name}", file, list(members))

    def _add_sample(self, sample: str, file: BinaryIO, members: Sequence[Member]) -> None:
        image = _only(sample, "image", [member for member in members if member.suffix in self._image_suffixes])
        label_file = _only(sample, ".cls", [member for member in members if member.suffix == "cls"])
        json_file = _only(sample, ".json", [member for member in members if member.suffix == "json"])
        if image is None or (label_file is None and json_file is None):
            lacking = "image" if image is None else "label (.cls or .json)"
            found = ", ".join(member.base for member in members)
            raise JLTError(f"{sample} has no {lacking}, only {found}: add one, or remove the sample.")
        fields = _read_json(sample, file, json_file) if json_file else {}
        value = _read_cls(sample, file, label_file) if label_file else fields.get("label", fields.get("cls"))
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise JLTError(f"{sample} has no label in its .json: an integer or a string `label` (or `cls`) is needed.")
        label = self._label(sample, value, _class_name(fields))
        for column, number in zip(
            (self.headers, self.starts, self.sizes, self.labels), (*image[1:], label), strict=True
        ):
            column.append(number)
        self.listing.update(f"{image.name}\0{image.size}\0{value}\0".encode(errors="surrogatepass"))

    def _label(self, sample: str, value: int | str, name: str | None) -> int:
        """Return a label as a number, and keep the class name that the sample gives it."""
        if self.labels and isinstance(value, str) != bool(self.code_of):
            kind = "names" if self.code_of else "numbers"
            raise JLTError(f"{sample} has the label {value!r}; the labels before it are {kind}.")
        if isinstance(value, str):
            return self.code_of.setdefault(value, len(self.code_of))
        if not 0 <= value < MOST_CLASSES:
            raise no_class(sample, value)
        if self._name_of.setdefault(value, name) != name:
            self._name_of[value] = None
        return value

    def agreed_names(self) -> tuple[str, ...] | None:
        """Return the class names in the samples; None unless each class has exactly one and no two share it."""
        if not self._name_of or None in self._name_of.values():
            return None
        names = [self._name_of.get(label) or str(label) for label in range(max(self._name_of) + 1)]
        return tuple(names) if len(set(names)) == len(names) else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise JLTError(f"{path} cannot be read ({error.strerror}).") from error


def _only(sample: str, kind: str, members: Sequence[Member]) -> Member | None:
    if len(members) > 1:
        names = " and ".join(member.base for member in members)
        raise JLTError(f"{sample} has more than one {kind}, {names}: a sample needs one.")
    return members[0] if members else None


def _read_cls(sample: str, file: BinaryIO, member: Member) -> int:
    text = os.pread(file.fileno(), min(member.size, BLOCK), member.start)
    try:
        return int(text)
    except ValueError as error:
        raise JLTError(f"{sample} has {text[:40]!r} in its .cls: an integer is needed.") from error


def _read_json(sample: str, file: BinaryIO, member: Member) -> dict[str, Any]:
    if member.size > LARGEST_JSON:
        raise JLTError(f"{sample} has a .json of {member.size:,} bytes: at most {LARGEST_JSON:,} are read.")
    try:
        fields = json.loads(os.pread(file.fileno(), member.size, member.start))
    except (ValueError, RecursionError) as error:
        raise JLTError(f"{sample} has a .json that does not parse ({error}).") from error
    if not isinstance(fields, dict):
        raise JLTError(f"{sample} has a .json that is not an object with a `label`.")
    return fields


def _class_name(fields: dict[str, Any]) -> str | None:
    name = fields.get("class_name")
    if name is None:
        # timm/imagenet-1k-wds: "filename": "n01440764/n01440764_3778.JPEG"
        name = str(fields.get("filename", "")).rpartition("/")[0].rpartition("/")[2]
    return name if isinstance(name, str) and name else None


def _members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield the files of a tar file that are not hidden; JLTError if it is damaged.

    This function reads plain headers itself, three times as fast as tarfile, which reads all other headers.
    """
    end, offset = os.fstat(file.fileno()).st_size, 0
    while True:
        block = os.pread(file.fileno(), BLOCK, offset)
        if len(block) < BLOCK:
            raise _truncated(path)
        if not any(block):
            # tar fills its last record, of 20 blocks, with zeros; content beyond it was appended by `cat`.
            if any(os.pread(file.fileno(), 21 * BLOCK, offset)):
                raise JLTError(f"{path} continues after its end at byte {offset}: joined tar files cannot be read.")
            return
        member = _plain_member(block, offset)
        is_pax = block[156:157] == b"x"
        if member is None or (is_pax and _changes_content(file, member)):
            member, is_pax = _any_member(path, file, offset), False
        if member.size < 0:
            raise JLTError(f"{path} is damaged: {member.name} has a size of {member.size} bytes.")
        if member.start + member.size > end:
            raise _truncated(path)
        # Content is padded to whole blocks.
        offset = member.start + -(-member.size // BLOCK) * BLOCK
        if not (is_pax or _is_ignored(member.base)):
            yield member


def _is_ignored(base: str) -> bool:
    # Directories, which have no base name here; files of file managers (.name) and of webdataset (__name__); and names
    # without a dot, which webdataset ignores too.
    stem, dot, _ = base.partition(".")
    return not (stem and dot) or (stem.startswith("__") and stem.endswith("__"))


def _plain_member(block: bytes, offset: int) -> Member | None:
    """Return the member of a complete header (POSIX.1-1988, "ustar") or of a pax header; None for other headers."""
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
    # GNU tar stores times where POSIX has the beginning of a long name.
    prefix = block[345:500].partition(b"\0")[0] if block[263:265] == b"00" else b""
    text = b"/".join(filter(None, (prefix, name))).decode(errors="surrogateescape")
    return None if text.endswith("/") else Member(text, offset, offset + BLOCK, size)


def _changes_content(file: BinaryIO, header: Member) -> bool:
    """Return whether a pax header changes the name, size or kind of its member, rather than times and owners."""
    records = os.pread(file.fileno(), min(header.size, 2**20), header.start)
    return any(key in records for key in (b" path=", b" linkpath=", b" size=", b" hdrcharset=", b" GNU.sparse"))


def _any_member(path: Path, file: BinaryIO, offset: int) -> Member:
    """Return the member whose first header is at `offset`, as tarfile reads it; its name is empty if it is no file."""
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            info, following = archive.next(), archive.offset
        if info is None:
            raise tarfile.ReadError("no header")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise JLTError(f"{path} cannot be read as a tar file ({error} at byte {offset}): download it again.") from error
    if info.islnk() or info.issym() or info.issparse():
        raise JLTError(f"{info.name} in {path} is a link or a sparse file: write the tar file with plain files.")
    if not info.isreg():
        return Member("", offset, info.offset_data, following - info.offset_data)
    return Member(info.name, offset, info.offset_data, info.size)


def _truncated(path: Path) -> JLTError:
    return JLTError(f"{path} is truncated: download it again.")
