"""Images on disk: a folder of image files, or an .npz in the format of ADM's evaluator."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from jlt.errors import JLTError
from jlt.images.reading import MOST_PIXELS, read_image
from jlt.storage.files import UNREADABLE_ARRAYS, why_unreadable
from jlt.storage.folders import path_inside

LabelledBatch = tuple[UInt8[Tensor, "_ h w 3"], Int64[Tensor, " _"] | None]
IMAGES = "arr_0.npy"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder:
    """Square image files of one size in the order of their names, with the labels in their metadata.

    `resolution` is the side in pixels, `paths` are the files. There are labels if the first file has one, and `classes`
    is the kind of image source that defines them, None where it is not recorded.
    """

    def __init__(self, folder: Path) -> None:
        visible = (path for path in folder.iterdir() if not path.name.startswith("."))
        self.paths = sorted(path for path in visible if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise JLTError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
        for path in self.paths:
            if path.is_symlink():
                path_inside(folder, path.name)
        first = self._read(self.paths[0], None)
        self.resolution, self.classes = first.width, first.info.get("classes")
        self._labelled = "label" in first.info

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Yield the images with their labels; JLTError for an image of another size or without its label."""
        for start in range(0, len(self.paths), batch_size):
            paths = self.paths[start : start + batch_size]
            images = [self._read(path, self.resolution) for path in paths]
            pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
            if self._labelled:
                yield pixels, torch.tensor([_label(path, image) for path, image in zip(paths, images, strict=True)])
            else:
                yield pixels, None

    def _read(self, path: Path, resolution: int | None) -> Image.Image:
        image: Image.Image = read_image(path)
        side = resolution or image.width
        if image.size != (side, side):
            raise JLTError(f"{path} has {image.width}x{image.height} pixels, not {side}x{side}.")
        return image


def _label(path: Path, image: Image.Image) -> int:
    try:
        return int(image.info["label"])
    except (KeyError, ValueError) as error:
        raise JLTError(f"{path} has no label, unlike images before it: keep images of one command here.") from error


class ImageArray:
    """`arr_0`, uint8 (N, H, H, 3), read batch by batch, and the labels `arr_1` if the file has them.

    `resolution`, `paths` and `classes` are as in `ImageFolder`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.paths = path, [path]
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                with file.zip.open(IMAGES) as images:
                    shape, fortran_order, dtype = _header(images)
                _require_sizes(file.zip, shape)
                labels = file.get("arr_1")
                self.classes = str(file["classes"]) if "classes" in file else None
        except UNREADABLE_ARRAYS as error:
            raise JLTError(f"{path} is not an .npz of images under arr_0 ({why_unreadable(error)}).") from error
        if labels is not None and not np.issubdtype(labels.dtype, np.integer):
            raise JLTError(f"{path} holds labels (arr_1) of type {labels.dtype}: integers are needed.")
        self.labels = None if labels is None else labels.astype(np.int64)
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            order = " in Fortran order" if fortran_order else ""
            raise JLTError(f"{path} holds {dtype} {shape}{order}: square images are uint8 (N, H, H, 3).")
        if shape[0] == 0 or (self.labels is not None and self.labels.shape != shape[:1]):
            raise JLTError(f"{path} holds no images, or not one label in arr_1 for each of them.")
        self._shape, self.resolution = shape, shape[1]

    def __len__(self) -> int:
        return self._shape[0]

    def batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Yield the images with their labels; JLTError if the file is damaged."""
        image = self._shape[1:]
        try:
            with zipfile.ZipFile(self._path) as file, file.open(IMAGES) as images:
                _header(images)
                for start in range(0, len(self), batch_size):
                    count = min(batch_size, len(self) - start)
                    content = images.read(count * math.prod(image))
                    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, *image)
                    labels = None if self.labels is None else torch.from_numpy(self.labels[start : start + count])
                    yield pixels, labels
                # zipfile compares the checksum when it reaches the end.
                images.read(1)
        except UNREADABLE_ARRAYS as error:
            raise JLTError(f"{self._path} is damaged ({error}).") from error


def _require_sizes(archive: zipfile.ZipFile, shape: tuple[int, ...]) -> None:
    """Raise ValueError, before anything is read, for images beyond all limits and for more than a label of each."""
    if math.prod(shape[1:]) > 3 * MOST_PIXELS:
        raise ValueError(f"its images have {math.prod(shape[1:]):,} values")
    for entry in archive.infolist():
        if entry.filename != IMAGES and entry.file_size > 8 * math.prod(shape[:1]) + 2**20:
            raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes")


def _header(array: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and type of an array that numpy wrote."""
    version = np.lib.format.read_magic(array)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(array)
    return np.lib.format.read_array_header_2_0(array)


def open_images(path: Path) -> ImageFolder | ImageArray:
    """Open a folder or an .npz of images; JLTError if it is missing or holds no valid images."""
    if not path.exists():
        raise JLTError(f"{path} does not exist.")
    if not (path.is_dir() or path.is_file()):
        raise JLTError(f"{path} is neither a folder nor a file.")
    return ImageFolder(path) if path.is_dir() else ImageArray(path)
