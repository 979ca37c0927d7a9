"""Image sources: the digits against scikit-learn, folders of every kind of file, and errors that name the file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from image_zoo import assert_is_zoo, encoded, png, write_tar, write_zoo
from PIL import Image
from sklearn.datasets import load_digits

from jlt.errors import JLTError, UsageError
from jlt.images.folders import ClassFolders
from jlt.images.registry import choose_split, open_source, reopen_source
from jlt.images.source import Selected


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
    (tmp_path / "notes.txt").write_text("next to the classes, not in one")
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


def test_links_are_followed_inside_the_folder_and_each_folder_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save(folder / ".pool" / "one.png", 5)
    save(tmp_path / "elsewhere" / "private.png", 5)
    (folder / "a").mkdir(parents=True)
    (folder / "b").symlink_to(folder / ".pool")
    (folder / "a" / "two.png").symlink_to("../.pool/one.png")
    source = ClassFolders(folder)
    assert [source[i][1] for i in range(len(source))] == [0, 1]
    (tmp_path / "link").symlink_to(folder)
    assert len(ClassFolders(tmp_path / "link")) == 2
    for link, target, fault in (
        ("a/again", folder / "a", "reached a second time"),
        ("c", folder / ".pool", "reached a second time"),
        ("a/out.png", tmp_path / "elsewhere" / "private.png", "leads out of"),
        ("c", tmp_path / "elsewhere", "leads out of"),
        ("a/next.png", Path(f"{folder}next") / "x.png", "leads out of"),
    ):
        (folder / link).symlink_to(target)
        with pytest.raises(JLTError, match=rf"{link}.*{fault}"):
            ClassFolders(folder)
        (folder / link).unlink()


def test_folders_that_link_to_each_other_take_no_time(tmp_path: Path) -> None:
    for number in range(26):
        (tmp_path / "a" / f"{number}").mkdir(parents=True)
        for name in ("left", "right"):
            (tmp_path / "a" / f"{number}" / name).symlink_to(tmp_path / "a" / f"{(number + 1) % 26}")
    with pytest.raises(JLTError, match="reached a second time"):
        ClassFolders(tmp_path)


def test_every_kind_of_image_is_read_and_cropped(tmp_path: Path) -> None:
    names = sorted(write_zoo(tmp_path))
    source = ClassFolders(tmp_path)
    assert source.class_names == ("bad", "common", "odd")
    assert_is_zoo(pickle.loads(pickle.dumps(source)), names)


def test_files_that_do_not_decode_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
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
    with pytest.raises(JLTError, match="imagnet does not exist: name a folder"):
        open_source(str(tmp_path / "imagnet"))
    with pytest.raises(JLTError, match="holds no images"):
        open_source(str(tmp_path / "imagenet"))
    (tmp_path / "imagenet" / "n0").mkdir()
    with pytest.raises(JLTError, match="holds no images: put those of each class"):
        open_source(str(tmp_path / "imagenet"))
    (tmp_path / "one.parquet").write_bytes(b"")
    with pytest.raises(JLTError, match=r"one\.parquet cannot be read"):
        open_source(str(tmp_path / "one.parquet"))
    (tmp_path / "notes.txt").write_text("images")
    with pytest.raises(JLTError, match="neither .parquet nor .tar"):
        open_source(str(tmp_path / "notes.txt"))


def test_identity_is_the_hash_of_names_and_survives_any_bytes_in_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "z").mkdir()
    for name in (b"two words.png", b"\xff\xfe.png", "ü.png".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/" + name)).touch()
    source = pickle.loads(pickle.dumps(ClassFolders(tmp_path)))
    listing = b"a\0z\0\0" + b"a/two words.png\0" + "a/ü.png\0".encode() + b"a/\xff\xfe.png\0"
    assert source.identity()["listing_sha256"] == hashlib.sha256(listing).hexdigest()
    assert [Path(source.describe(i)).exists() for i in range(3)] == [True] * 3


def test_a_listing_is_small(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(2000):
        (tmp_path / "a" / f"n01440764_{number}.JPEG").touch()
    # A list of str takes 80 bytes for such a name before its characters are counted.
    assert len(pickle.dumps(ClassFolders(tmp_path))) < 2000 * 40


@pytest.mark.parametrize(("option", "value"), [("split", "train"), ("class_names", "names.txt")])
def test_options_that_do_not_apply_are_refused(tmp_path: Path, option: str, value: str) -> None:
    save(tmp_path / "a" / "1.png")
    flag = option.replace("_", "-")
    for spec in ("digits", str(tmp_path)):
        with pytest.raises(UsageError, match=f"--{flag} does not apply"):
            open_source(spec, **{option: value})


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_splits_are_distinguished_by_the_name_before_the_number(tmp_path: Path) -> None:
    files = touch(tmp_path, *(f"train-0000{n}-of-00003-a1b2c3d4e5f60789.parquet" for n in (2, 0, 1)))
    assert choose_split(files, None) == sorted(files)
    files += touch(tmp_path, "validation-00000-of-00001.parquet", "imagenet1k-test-000.tar", "imagenet1k-test-001.tar")
    with pytest.raises(UsageError, match=r"imagenet1k-test \(2 files\), train \(3 files\), val"):
        choose_split(files, None)
    assert [file.name for file in choose_split(files, "imagenet1k-test")] == [
        "imagenet1k-test-000.tar",
        "imagenet1k-test-001.tar",
    ]
    with pytest.raises(UsageError, match="did you mean validation"):
        choose_split(files, "valid")
    plain = touch(tmp_path, "1.tar", "0.tar")
    assert choose_split(plain, None) == plain[::-1]
    with pytest.raises(UsageError, match="leave out --split"):
        choose_split(plain, "train")


def test_missing_and_stale_files_of_a_numbered_set_are_named(tmp_path: Path) -> None:
    files = touch(tmp_path, *(f"train-{n:05d}-of-00009.parquet" for n in (0, 1, 3, 4, 5, 6, 8)))
    with pytest.raises(JLTError, match="lacks 2 of the 9 files of train: download train-00002, train-00007"):
        choose_split(files, None)
    for stale in ("train-00001-of-00009-0123abcd.parquet", "train-00000-of-00010.parquet", "train-7.parquet"):
        with pytest.raises(JLTError, match="several versions of train"):
            choose_split([*files, *touch(tmp_path, stale)], None)


def test_folders_that_are_not_one_collection(tmp_path: Path) -> None:
    touch(tmp_path, "a-0.tar", "a-0.parquet")
    with pytest.raises(JLTError, match="both .parquet and .tar"):
        open_source(str(tmp_path))
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("a-0.tar.gz", "a-0.tgz", "a-0.tar.zst"):
        file = touch(packed, name)[0]
        for spec in (packed, file):
            with pytest.raises(JLTError, match="decompress it first"):
                open_source(str(spec))
        file.unlink()
    # The archive that class folders were unpacked from may be next to them.
    touch(packed, "train.tar.gz")
    save(packed / "a" / "1.png")
    assert len(open_source(str(packed))) == 1


def test_postscript_is_no_image_and_starts_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    picture = tmp_path / "images" / "a" / "picture.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(JLTError, match="picture.jpg is of no image format"):
        ClassFolders(picture.parent.parent)[0]
    assert not marker.exists()


def test_a_source_is_opened_again_from_its_identity(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a" / "1.png", 5)
    for source in (open_source("digits"), open_source(str(tmp_path / "images"))):
        identity = json.loads(json.dumps(source.identity()))
        assert reopen_source(identity).identity() == identity
    save(tmp_path / "images" / "a" / "2.png", 5)
    with pytest.raises(JLTError, match="changed since they were encoded"):
        reopen_source(identity)
    with pytest.raises(JLTError, match="not available.*'adopted'"):
        reopen_source({"kind": "adopted", "count": 5})


def test_the_split_and_names_of_a_source_are_part_of_its_identity(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-000.tar", [("1.png", png(9)), ("1.cls", b"1")])
    source = open_source(str(tmp_path), "test", str(names))
    identity = json.loads(json.dumps(source.identity()))
    assert (identity["split"], identity["class_names"]) == ("test", str(names))
    assert reopen_source(identity).class_names == ("cat", "dog")


def test_selected_images_are_those_of_their_positions() -> None:
    digits = open_source("digits")
    some = Selected(digits, np.array([5, 0, 5]))
    assert [some.describe(index) for index in range(len(some))] == [digits.describe(index) for index in (5, 0, 5)]
    assert [some[index][1] for index in range(3)] == [digits[index][1] for index in (5, 0, 5)]
    assert some.identity() != Selected(digits, np.array([5, 5, 0])).identity()
    with pytest.raises(IndexError):
        some[3]


def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    with pytest.raises(JLTError, match=r"2\.png is not a file"):
        ClassFolders(tmp_path)[1]
