"""Images in parquet files, as the Hugging Face Hub stores collections."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from jlt.errors import JLTError, UsageError
from jlt.images.labels import numbered_classes, sorted_classes
from jlt.images.sharded import ShardedSource
from jlt.images.source import BadImageError, decode_image, read_image, require_index
from jlt.storage.files import path_inside

if TYPE_CHECKING:
    # Imported where it is used otherwise: nothing else should pay for it.
    from pyarrow import ChunkedArray, Schema
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 16
"""Images that are taken from a row group at a time, and so held in memory."""
BUFFER_BYTES = 1 << 20
"""Bytes of a row group that are read at a time."""


class Parquet(ShardedSource):
    """The rows of parquet files with the columns `image` and `label`.

    `image` is a struct of `bytes` and `path`, or the bytes themselves; where a row has a path alone, it is of a
    file in the folder of the parquet file. `label` is an integer or a string. Names of integer labels are
    `class_names`, else those that the Hub's library noted in the schema, else the numbers; strings are sorted.

    Opening reads the labels and no image. Reading in ascending order keeps a few images in memory, whatever the size
    of a row group; going back, or on by many rows, reads the row group up to there.
    """

    kind = "parquet"

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        class_names: tuple[str, ...] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, files, options)
        tables = [_Opened(file) for file in self._files]
        for table in tables[1:]:
            if not table.columns_equal(tables[0]):
                raise JLTError(
                    f"{table.file.name} and {tables[0].file.name} differ in their columns image and label: "
                    "give the files of each kind a folder of their own."
                )
        groups = [(number, group) for number, table in enumerate(tables) for group in range(len(table.group_rows))]
        self._file_of_group, self._group_in_file = np.array(groups, dtype=np.int32).reshape(-1, 2).T
        self._group_starts = np.cumsum([0, *(rows for table in tables for rows in table.group_rows)])
        self._file_starts = np.cumsum([0, *(sum(table.group_rows) for table in tables)])
        if not len(self):
            raise JLTError(f"{path} holds parquet files without a single row.")
        self._has_paths = tables[0].has_paths
        self._cursor: _Cursor | None = None
        self.class_names, self._labels = self._read_labels(tables, class_names)
        self.listing_sha256 = self._hash_listing()

    def __len__(self) -> int:
        return int(self._group_starts[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        require_index(index, self)
        label = int(self._labels[index])
        group = int(np.searchsorted(self._group_starts, index, side="right")) - 1
        file = self._files[self._file_of_group[group]]
        value = self._row(group, index - int(self._group_starts[group]))
        content = value if isinstance(value, dict) else {"bytes": value}
        if content["bytes"] is not None:
            return decode_image(content["bytes"], lambda: self.describe(index)), label
        if not content.get("path"):
            raise BadImageError(self.describe(index), "holds neither bytes nor a path")
        return read_image(path_inside(file.parent, content["path"]), lambda: self.describe(index)), label

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cursor": None}

    def describe(self, index: int) -> str:
        """Return the file, the row in it, and the path that the row notes."""
        number = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        row = index - int(self._file_starts[number])
        place = f"{self._files[number].name} row {row}"
        with contextlib.suppress(JLTError):
            if self._has_paths and (path := _read_path(self._files[number], row)):
                return f"{place} ({path})"
        return place

    def _row(self, group: int, row: int) -> Any:
        """The value of the image column in a row of a row group, the groups of all files being counted on."""
        file = self._files[self._file_of_group[group]]
        if self._cursor is None or self._cursor.file != file:
            self._cursor = _Cursor(file)
        return self._cursor.value(int(self._group_in_file[group]), row)

    def _read_labels(
        self, tables: Sequence[_Opened], names: tuple[str, ...] | None
    ) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
        if not tables[0].labels_are_names:
            labels = np.concatenate([table.label_numbers() for table in tables])
            chosen = names if names is not None else tables[0].noted_names
            return numbered_classes(labels, chosen, self.describe), labels.astype(np.int32)
        if names is not None:
            raise UsageError(f"--class-names has no meaning for {self.path}: its labels are names already.")
        code_of: dict[str, int] = {}
        codes = np.concatenate([table.label_codes(code_of) for table in tables])
        return sorted_classes(codes, list(code_of))

    def _hash_listing(self) -> str:
        listing = hashlib.sha256(json.dumps(self.class_names).encode())
        for number, file in enumerate(self._files):
            labels = self._labels[self._file_starts[number] : self._file_starts[number + 1]]
            listing.update(json.dumps([file.name, file.stat().st_size, len(labels)]).encode())
            listing.update(labels.astype("<i4").tobytes())
        return listing.hexdigest()


class _Opened:
    """What is read of a parquet file when its source is opened."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        self.file = file
        with _sound(file), _open(file) as parquet:
            self.schema: Schema = parquet.schema_arrow
            self._require_columns()
            metadata = parquet.metadata
            self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._labels: ChunkedArray = parquet.read(columns=["label"], use_threads=False).column("label")
        kind = self._labels.type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        self.labels_are_names = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if not (self.labels_are_names or pyarrow.types.is_integer(kind)):
            raise JLTError(f"{file} has a column label of type {kind}: integers or strings are needed.")
        if self._labels.null_count:
            row = self._labels.is_null().index(True).as_py()
            raise JLTError(f"{file.name} row {row} has no label: correct it, or take the row out.")
        self._labels = self._labels.cast(kind)

    def _require_columns(self) -> None:
        import pyarrow

        names = self.schema.names
        for column in ("image", "label"):
            if names.count(column) != 1:
                raise JLTError(f"{self.file} has no column {column}, but {', '.join(names)}: rename one.")
        kind = self.schema.field("image").type
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
            raise JLTError(f"{self.file} has a column image of type {kind}: the bytes of image files are needed.")

    def columns_equal(self, other: _Opened) -> bool:
        """Whether the columns that matter, and the class names that the schema notes, are the same."""
        mine, others = ([table.schema.field(column).type for column in ("image", "label")] for table in (self, other))
        return mine == others and self.noted_names == other.noted_names

    @property
    def has_paths(self) -> bool:
        """Whether the images have paths beside their bytes."""
        import pyarrow

        kind = self.schema.field("image").type
        return pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0

    @property
    def noted_names(self) -> tuple[str, ...] | None:
        """The class names that the Hub's library (datasets) notes in the schema."""
        noted = (self.schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(noted)["info"]["features"]["label"]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        sound = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        return tuple(names) if sound and len(set(names)) == len(names) else None

    def label_numbers(self) -> Int[np.ndarray, " n"]:
        """The labels of all rows."""
        return self._labels.to_numpy().astype(np.int64)

    def label_codes(self, code_of: dict[str, int]) -> Int[np.ndarray, " n"]:
        """A number for the name in each row; new names get the next numbers."""
        encoded = self._labels.combine_chunks().dictionary_encode()
        codes = [code_of.setdefault(name, len(code_of)) for name in encoded.dictionary.to_pylist()]
        return np.array(codes, dtype=np.int64)[encoded.indices.to_numpy()]


class _Cursor:
    """One open parquet file, and a place in one of its row groups from which reading goes forwards."""

    def __init__(self, file: Path, column: str = "image") -> None:
        self.file, self._column = file, column
        with _sound(file):
            self._parquet = _open(file)
        self._group, self._start = -1, 0
        self._values: Any = []

    def rows(self, group: int) -> int:
        """Return the number of rows in a row group."""
        return self._parquet.metadata.row_group(group).num_rows

    def value(self, group: int, row: int) -> Any:
        """Return the value in a row of a row group; JLTError if the file is damaged."""
        if group != self._group or row < self._start:
            self._seek(group)
        while row >= self._start + len(self._values):
            # Until there are more rows: if there are none, it is from the beginning of the group that reading goes on.
            self._group = -1
            with _sound(self.file):
                values = next(self._batches).column(0)
            self._group, self._start, self._values = group, self._start + len(self._values), values
        with _sound(self.file):
            return self._values[row - self._start].as_py()

    def _seek(self, group: int) -> None:
        with _sound(self.file):
            self._batches = self._parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        self._group, self._start, self._values = group, 0, []


def _read_path(file: Path, row: int) -> str | None:
    """The path that a row notes, read without the bytes of any image."""
    cursor = _Cursor(file, "image.path")
    group = 0
    while row >= (rows := cursor.rows(group)):
        row, group = row - rows, group + 1
    image = cursor.value(group, row)
    return image["path"] if image else None


def _open(file: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    # Without pre_buffer, and with a buffer, a row group is read a page at a time rather than whole.
    return ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True)


@contextlib.contextmanager
def _sound(file: Path) -> Iterator[None]:
    """Make an error of reading one that names the file."""
    import pyarrow

    try:
        yield
    # StopIteration: fewer rows than the file's directory says. ValueError: text that is no UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
        reason = str(error).partition("\n")[0] or "it ends too soon"
        raise JLTError(f"{file} does not read as a parquet file ({reason}): fetch it or make it again.") from error
