"""Image sources: the digits against scikit-learn, folders of every kind of file, and errors that name the file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jlt.data.crop import centre_crop
from jlt.data.sources.folders import ClassFolders
from jlt.data.sources.registry import open_source
from jlt.errors import JLTError


def save(path: Path, value: int = 0, mode: str = "RGB", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value).save(path, **options)


def test_digits_are_scikit_learns() -> None:
    source, bunch = open_source("digits"), load_digits()
    assert len(source) == 1797
    assert source.class_names == tuple("0123456789")
    for index in (0, 1, 900, 1796):
        image, label = source[index]
        assert (image.mode, image.size) == ("L", (8, 8))
        assert label == bunch.target[index]
        np.testing.assert_allclose(np.array(image), bunch.images[index] * 255 / 16, atol=0.5)
    assert source.identity() == open_source("digits").identity()


def test_class_folders_are_sorted_nested_and_stable(tmp_path: Path) -> None:
    save(tmp_path / "b" / "2.png", 20)
    save(tmp_path / "b" / "nested" / "deeper" / "1.webp", 10, lossless=True)
    save(tmp_path / "a" / "10.bmp", 100)
    save(tmp_path / "a" / "no_suffix_at_all", 7, format="PNG")
    save(tmp_path / "a" / ".hidden.png")
    save(tmp_path / ".cache" / "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("beside the classes, not in one")
    source = open_source(str(tmp_path))
    assert source.class_names == ("a", "b", "empty")
    found = [(Path(source.describe(i)).relative_to(tmp_path).as_posix(), source[i][1]) for i in range(len(source))]
    assert found == [("a/10.bmp", 0), ("a/no_suffix_at_all", 0), ("b/2.png", 1), ("b/nested/deeper/1.webp", 1)]
    assert [np.array(source[i][0])[0, 0, 0] for i in range(4)] == [100, 7, 20, 10]
    for outside in (4, -1):
        with pytest.raises(IndexError):
            source[outside]


def test_identity_follows_the_list_of_files(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    before = ClassFolders(tmp_path).identity()
    assert ClassFolders(tmp_path / "a" / "..").identity() == before
    save(tmp_path / "a" / "2.png")
    after_file = ClassFolders(tmp_path).identity()
    (tmp_path / "b").mkdir()
    after_class = ClassFolders(tmp_path).identity()
    assert len({str(identity) for identity in (before, after_file, after_class)}) == 3


def test_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "one.png", 5)
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "two.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    source = ClassFolders(tmp_path / "set")
    assert [source[i][1] for i in range(len(source))] == [0, 1]
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "set" / "a")
    with pytest.raises(JLTError, match="links back"):
        ClassFolders(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("palette.png", "P", {"transparency": b"\x00"}),
        ("palette.gif", "P", {}),
        ("bilevel.tif", "1", {}),
        ("alpha.png", "RGBA", {}),
        ("grey_alpha.png", "LA", {}),
        ("deep.png", "I;16", {}),
        ("deep.tif", "I;16", {}),
    ],
)
def test_every_kind_of_image_goes_through_the_crop(tmp_path: Path, name: str, mode: str, options: dict) -> None:
    save(tmp_path / "a" / name, mode=mode, **options)
    image, _ = ClassFolders(tmp_path)[0]
    assert centre_crop(image, 4).shape == (4, 4, 3)


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a" / "rotated.jpg", exif=exif)
    assert ClassFolders(tmp_path)[0][0].size == (6, 4)


def test_files_that_do_not_decode_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "vanished.jpg").symlink_to(tmp_path / "nowhere")
    source = ClassFolders(tmp_path)
    assert len(source) == 4
    for index in range(4):
        with pytest.raises(JLTError, match=Path(source.describe(index)).name):
            source[index]


def test_sources_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match="did you mean digits"):
        open_source("digit")
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(JLTError, match="imagenet"):
        open_source(str(tmp_path / "imagnet"))
    with pytest.raises(JLTError, match="no class folders"):
        open_source(str(tmp_path / "imagenet"))
    (tmp_path / "imagenet" / "n0").mkdir()
    with pytest.raises(JLTError, match="no file in any"):
        open_source(str(tmp_path / "imagenet"))
    (tmp_path / "one.parquet").write_bytes(b"")
    with pytest.raises(JLTError, match="is a file"):
        open_source(str(tmp_path / "one.parquet"))
