"""Images in parquet files, as the Hugging Face Hub stores collections."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from jlt.errors import JLTError
from jlt.images.reading import BadImageError, decode_image, read_image
from jlt.images.sharded import ShardedSource
from jlt.images.source import require_index
from jlt.storage.folders import path_inside

if TYPE_CHECKING:
    # Elsewhere imported at the place of use, so that other sources do not load it.
    from pyarrow import DataType, Schema
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 16
"""Images read from a row group at a time, and so held in memory."""
BUFFER_BYTES = 1 << 20
"""Bytes of a row group read at a time."""


class Parquet(ShardedSource):
    """The rows of parquet files with the columns `image` and `label`.

    `image` is a struct of `bytes` and `path`, or the bytes themselves. Where a row has only a path, it names a file in
    the folder of the parquet file. `label` is an integer or a string. Integer labels are named by `class_names`, or
    else by the names that the Hub's library writes into the schema, or else by the numbers. String labels are sorted.

    Opening reads the labels and no image. Reading in ascending order holds a few images in memory, whatever the size of
    a row group; a step back, or over many rows, reads the row group up to that row.
    """

    kind = "parquet"

    def _read_listing(self, class_names: Sequence[str] | None) -> None:
        tables = [_Table(file) for file in self._files]
        for table in tables[1:]:
            if table.columns != tables[0].columns:
                raise JLTError(
                    f"{table.file.name} and {tables[0].file.name} differ in their columns image and label: "
                    "move the files of each kind to their own folder."
                )
        groups = [(number, group) for number, table in enumerate(tables) for group in range(len(table.group_rows))]
        self._file_of_group, self._group_in_file = np.array(groups, dtype=np.int32).reshape(-1, 2).T
        self._group_starts = np.cumsum([0, *(rows for table in tables for rows in table.group_rows)])
        self._file_starts = np.cumsum([0, *(sum(table.group_rows) for table in tables)])
        if not len(self):
            raise JLTError(f"{self.path} holds parquet files without a single row.")
        self._has_paths = tables[0].has_paths
        self._cursor: _Cursor | None = None
        code_of: dict[str, int] = {}
        labels = np.concatenate([table.labels(code_of) for table in tables])
        self._set_classes(labels, code_of, class_names, tables[0].class_names)
        listing = hashlib.sha256(json.dumps(self.class_names).encode())
        for file, part in zip(self._files, np.split(self._labels, self._file_starts[1:-1]), strict=True):
            listing.update(json.dumps([file.name, file.stat().st_size, len(part)]).encode())
            listing.update(part.astype("<i4").tobytes())
        self.listing_sha256 = listing.hexdigest()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        require_index(index, self)
        label = int(self._labels[index])
        file, group, row = self._place(index)
        if self._cursor is None or self._cursor.file != file:
            self._cursor = _Cursor(file)
        value = self._cursor.value(group, row)
        content = value if isinstance(value, dict) else {"bytes": value}
        if content["bytes"] is not None:
            return decode_image(content["bytes"], lambda: self.describe(index)), label
        if not content.get("path"):
            raise BadImageError(self.describe(index), "holds neither bytes nor a path")
        return read_image(path_inside(file.parent, content["path"]), lambda: self.describe(index)), label

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cursor": None}

    def describe(self, index: int) -> str:
        """Return the file, the row in it, and the path in that row."""
        file, group, row = self._place(index)
        described = f"{file.name} row {index - int(self._file_starts[self._file_number(index)])}"
        with contextlib.suppress(JLTError):
            # Without reading the bytes of any image.
            image = _Cursor(file, "image.path").value(group, row) if self._has_paths else None
            if image and image["path"]:
                return f"{described} ({image['path']})"
        return described

    def _place(self, index: int) -> tuple[Path, int, int]:
        """Return the file of an image, its row group there, and its row in that group."""
        group = int(np.searchsorted(self._group_starts, index, side="right")) - 1
        file = self._files[self._file_of_group[group]]
        return file, int(self._group_in_file[group]), index - int(self._group_starts[group])


class _Table:
    """The parts of a parquet file that are read at opening: its columns, row groups and labels."""

    def __init__(self, file: Path) -> None:
        from pyarrow import types

        self.file = file
        with _reading(file), _open(file) as parquet:
            image, label = _column_types(file, parquet.schema_arrow)
            self.class_names = _class_names(parquet.schema_arrow)
            self.columns = (image, label, self.class_names)
            self.has_paths = types.is_struct(image) and image.get_field_index("path") >= 0
            metadata = parquet.metadata
            self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            column = parquet.read(columns=["label"], use_threads=False).column("label")
        kind = label.value_type if types.is_dictionary(label) else label
        self._labels_are_names = types.is_string(kind) or types.is_large_string(kind)
        if not (self._labels_are_names or types.is_integer(kind)):
            raise JLTError(f"{file} has a column label of type {kind}: integers or strings are needed.")
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise JLTError(f"{file.name} row {row} has no label: add it, or remove the row.")
        self._labels = column.cast(kind)

    def labels(self, code_of: dict[str, int]) -> Int64[np.ndarray, " n"]:
        """Return the label of each row; names become numbers by `code_of`, and new names are added to it."""
        if not self._labels_are_names:
            return self._labels.to_numpy().astype(np.int64)
        encoded = self._labels.combine_chunks().dictionary_encode()
        codes = [code_of.setdefault(name, len(code_of)) for name in encoded.dictionary.to_pylist()]
        return np.array(codes, dtype=np.int64)[encoded.indices.to_numpy()]


def _column_types(file: Path, schema: Schema) -> tuple[DataType, DataType]:
    """Return the types of the columns image and label; JLTError if one is missing or image does not hold bytes."""
    from pyarrow import types

    for column in ("image", "label"):
        if schema.names.count(column) != 1:
            raise JLTError(f"{file} has no column {column}, only {', '.join(schema.names)}: rename one.")
    image, label = (schema.field(column).type for column in ("image", "label"))
    content = image.field("bytes").type if types.is_struct(image) and image.get_field_index("bytes") >= 0 else image
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise JLTError(f"{file} has a column image of type {content}: the bytes of image files are needed.")
    return image, label


def _class_names(schema: Schema) -> tuple[str, ...] | None:
    """Return the class names that the Hub's library (datasets) writes into the schema."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features["label"]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    valid = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if valid and len(set(names)) == len(names) else None


class _Cursor:
    """One open parquet file, and a position in one of its row groups from which reading moves forward."""

    def __init__(self, file: Path, column: str = "image") -> None:
        self.file, self._column = file, column
        with _reading(file):
            self._parquet = _open(file)
        self._group, self._start = -1, 0
        self._values: Any = []

    def value(self, group: int, row: int) -> Any:
        """Return the value in a row of a row group; JLTError if the file is damaged."""
        with _reading(self.file):
            if group != self._group or row < self._start:
                self._batches = self._parquet.iter_batches(
                    BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
                )
                self._group, self._start, self._values = group, 0, []
            while row >= self._start + len(self._values):
                # If this read fails, the next one starts at the beginning of the group.
                self._group = -1
                values = next(self._batches).column(0)
                self._group, self._start, self._values = group, self._start + len(self._values), values
            return self._values[row - self._start].as_py()


def _open(file: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    # Without pre_buffer, and with a buffer, a row group is read one page at a time instead of whole.
    return ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn pyarrow's errors into a JLTError that names the file."""
    import pyarrow

    try:
        yield
    # StopIteration: fewer rows than the file's directory lists. ValueError: text that is not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
        reason = str(error).partition("\n")[0] or "it ends too soon"
        raise JLTError(f"{file} cannot be read as a parquet file ({reason}): download or write it again.") from error
