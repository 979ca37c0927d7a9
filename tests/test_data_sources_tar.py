"""Tar files as webdataset, Python, GNU tar and test code by hand write them: samples, labels, offsets, and damage."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from image_zoo import assert_is_zoo, encoded, png, write_tar, zoo
from PIL import Image

from jlt.errors import JLTError, UsageError
from jlt.images.reading import BadImageError
from jlt.images.registry import open_source
from jlt.images.tar import TarShards


def samples(*keys: tuple[str, int, object]) -> list[tuple[str, bytes]]:
    """Members of samples, each a key, a grey value and a label."""
    return [
        member
        for key, value, label in keys
        for member in ((f"{key}.png", png(value)), (f"{key}.cls", str(label).encode()))
    ]


def opened(path: Path) -> TarShards:
    return TarShards(path, [path])


def content(source: TarShards) -> list[tuple[int, str]]:
    found = [source[index] for index in range(len(source))]
    return [(image.getpixel((0, 0)), source.class_names[label]) for image, label in found]


def test_every_kind_of_image_of_the_zoo(tmp_path: Path) -> None:
    names = list(zoo())
    members = []
    for name in names:
        key = name.partition(".")[0]
        members += [(name, zoo()[name][0]), (f"{key}.json", json.dumps({"label": name.partition("/")[0]}).encode())]
    write_tar(tmp_path / "zoo-0.tar", members[:20])
    write_tar(tmp_path / "zoo-1.tar", members[20:])
    source = open_source(str(tmp_path))
    assert source.class_names == ("bad", "common", "odd")
    assert_is_zoo(source, names)
    assert_is_zoo(pickle.loads(pickle.dumps(source)), names)


LONG = "folder_" * 12 + "/" + "n" * 90  # beyond the 100 characters of a first tar, within ustar's prefix
LONGER = "folder_" * 50 + "/" + "ü" * 90  # beyond ustar


@pytest.mark.parametrize(
    ("form", "mtime", "long"),
    [
        (tarfile.USTAR_FORMAT, 1.5e9, LONG),
        (tarfile.GNU_FORMAT, 1.5e9, LONGER),
        (tarfile.PAX_FORMAT, 1.5e9, LONGER),
        (tarfile.PAX_FORMAT, 1.5e9 + 0.25, "short"),  # a header of its own for the time
    ],
)
def test_all_formats_of_python_are_read(tmp_path: Path, form: int, mtime: float, long: str) -> None:
    members = samples(("a", 10, 0), (long, 20, 1), ("b.folder/c", 30, 2), ("ü", 40, 0))
    source = opened(write_tar(tmp_path / "x.tar", members, form, mtime))
    assert content(source) == [(10, "0"), (20, "1"), (30, "2"), (40, "0")]
    described = ["a.png", f"{long}.png", "b.folder/c.png", "ü.png"]
    assert [source.describe(index) for index in range(4)] == [f"x.tar member {name}" for name in described]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7"])
def test_all_formats_of_the_tar_program_are_read(tmp_path: Path, form: str) -> None:
    long = "l" * (60 if form == "v7" else 120 if form != "ustar" else 90)
    (tmp_path / "files" / long).mkdir(parents=True)
    for name, data in samples(("a", 10, 0), (f"{long}/b", 20, 1)):
        (tmp_path / "files" / name).write_bytes(data)
    command = ["tar", f"--format={form}", "--sort=name", "-C", str(tmp_path / "files"), "-cf", str(tmp_path / "x.tar")]
    subprocess.run([*command, "."], check=True)
    source = opened(tmp_path / "x.tar")
    assert sorted(content(source)) == [(10, "0"), (20, "1")]
    assert {source.describe(0), source.describe(1)} == {"x.tar member ./a.png", f"x.tar member ./{long}/b.png"}


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A header as POSIX 1003.1-2001 lays it out, written by hand."""
    fields = [name.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"00000000000\0"]
    fields += [b" " * 8, kind, b"\0" * 100, b"ustar\x0000", b"\0" * 64, b"0000000\0", b"0000000\0", b"\0" * 167]
    block = b"".join(fields)
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 512)


def test_a_tar_file_written_by_hand(tmp_path: Path) -> None:
    image, path, notes = png(50), b"by/hand/" + b"x" * 200, b"17 comment=hand!\n"
    # The length of a record counts its own three digits.
    records = [b"%d path=%s%s\n" % (len(path) + 14, path, ending) for ending in (b".png", b".cls")]
    assert [len(record) for record in records] == [len(path) + 14] * 2
    parts = [header(b"pax_global_header", len(notes), b"g"), padded(notes)]
    parts += [header(b"folder/", 0, b"5"), header(b"._a.png", 3), padded(b"mac")]
    for record, data in zip(records, (image, b"1"), strict=True):
        parts += [header(b"PaxHeaders/x", len(record), b"x"), padded(record), header(b"cut", len(data)), padded(data)]
    parts.append(b"\0" * 1024)
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    source = opened(tmp_path / "x.tar")
    assert content(source) == [(50, "1")]
    assert source.describe(0) == f"x.tar member {path.decode()}.png"


def test_samples_with_more_members_than_are_needed(tmp_path: Path) -> None:
    members = [("__info__.json", b"{}"), (".DS_Store", b"?"), ("README", b"no dot"), ("a.txt", b"a caption")]
    members += [("a.json", b'{"caption": "x", "label": 7}'), ("a.PNG", png(1)), ("a.cls", b"0\n"), ("a.emb.npy", b"?")]
    members += [("b.cls", b" 1 "), ("b.seg.webp", encoded(Image.new("L", (2, 2), 2), "WEBP", lossless=True))]
    source = opened(write_tar(tmp_path / "x.tar", members))
    # The label of .cls, which is the format's own, is taken before that of .json.
    assert [source[index][1] for index in range(2)] == [0, 1]


def test_labels_and_names_in_json(tmp_path: Path) -> None:
    def names(*fields: dict[str, object], class_names: tuple[str, ...] | None = None) -> tuple[list[int], list[str]]:
        members = []
        for number, field in enumerate(fields):
            members += [(f"{number}.png", png(0)), (f"{number}.json", json.dumps(field).encode())]
        path = write_tar(tmp_path / "x.tar", members)
        source = TarShards(path, [path], class_names)
        return [source[index][1] for index in range(len(source))], list(source.class_names)

    timm = {"filename": "n01440764/n01440764_1.JPEG", "height": 375, "label": 0, "width": 500}
    other = timm | {"filename": "n06596364/n06596364_2.JPEG", "label": 2}
    assert names(timm, other, timm) == ([0, 2, 0], ["n01440764", "1", "n06596364"])
    assert names(timm, other, class_names=("x", "y", "z")) == ([0, 2], ["x", "y", "z"])
    # No name where the samples of a class disagree, two classes share one, or one has none.
    assert names(timm, timm | {"filename": "n0/1.JPEG"})[1] == ["0"]
    assert names(timm, timm | {"label": 1})[1] == ["0", "1"]
    assert names(timm, {"label": 1, "filename": "bare.jpg"})[1] == ["0", "1"]
    assert names({"cls": 1, "class_name": "hen"}, {"cls": 0, "class_name": "cock"}) == ([1, 0], ["cock", "hen"])
    assert names({"label": "hen"}, {"label": "cock"}) == ([1, 0], ["cock", "hen"])
    with pytest.raises(UsageError, match="--class-names does not apply"):
        names({"label": "hen"}, class_names=("hen",))
    with pytest.raises(JLTError, match="1 in x.tar has the label 3; the labels before it are names"):
        names({"label": "hen"}, {"label": 3})
    with pytest.raises(JLTError, match="1 in x.tar has the label 'hen'; the labels before it are numbers"):
        names({"label": 3}, {"label": "hen"})
    with pytest.raises(JLTError, match=r"x.tar member 1.png has the label 5, and labels go from 0 to 1"):
        names({"label": 0}, {"label": 5}, class_names=("a", "b"))
    for label in (True, None, 1.5, [1]):
        with pytest.raises(JLTError, match="0 in x.tar has no label in its .json"):
            names({"label": label})


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k/a.png", b""), ("k/b.png", b""), ("k/b.cls", b"0")], "k/a in x.tar has no label .* only a.png"),
        ([("a.cls", b"0"), ("a.txt", b"")], "a in x.tar has no image, only a.cls, a.txt"),
        ([("a.png", b""), ("b.cls", b"0"), ("a.cls", b"0")], "a in x.tar has no label"),
        ([("a.png", b""), ("a.left.jpg", b""), ("a.cls", b"0")], "more than one image, a.png and a.left.jpg"),
        ([("a.png", b""), ("a.cls", b"0"), ("a.fine.cls", b"0")], "more than one .cls"),
        ([("a.png", b""), ("a.cls", b"cat")], r"a in x.tar has b'cat' in its .cls: an integer"),
        ([("a.png", b""), ("a.cls", b"-1")], "a in x.tar has the label -1, which is no class"),
        ([("a.png", b""), ("a.cls", b"9" * 30)], "labels go from 0 to 999999"),
        ([("a.png", b""), ("a.json", b"{")], "a in x.tar has a .json that does not parse"),
        ([("a.png", b""), ("a.json", b"[1]")], "a in x.tar has a .json that is not an object"),
        ([("README.md", b"")], "README in x.tar has no image"),
        ([], "without a single image"),
    ],
)
def test_invalid_samples_are_refused_by_name(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    with pytest.raises(JLTError, match=reason):
        opened(write_tar(tmp_path / "x.tar", members))


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        archive.addfile(link)
    with pytest.raises(JLTError, match=r"a\.png in .*x.tar is a link"):
        opened(tmp_path / "x.tar")


def test_a_tar_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", samples(("a", 1, 0), ("b", 2, 1))).read_bytes()
    end = whole.rstrip(b"\0")
    last = -(-len(end) // 512) * 512  # where the two blocks of zeros that end the archive begin
    for length in [*range(0, last, 128), last]:
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises(JLTError, match=r"x.tar is truncated"):
            opened(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole[: last + 1024])
    assert len(opened(tmp_path / "x.tar")) == 2


def test_damage_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples(("a", 1, 0), ("b", 2, 1)))
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(JLTError, match="x.tar continues after its end"):
        opened(path)
    path.write_bytes(whole[:1030] + b"\xff" + whole[1031:])
    with pytest.raises(JLTError, match="x.tar cannot be read as a tar file .*byte 1024"):
        opened(path)
    path.write_bytes(b"<html>404 Not Found</html>" * 100)
    with pytest.raises(JLTError, match="x.tar cannot be read as a tar file"):
        opened(path)
    path.write_bytes(whole)
    source = opened(path)
    path.write_bytes(whole[:520])
    with pytest.raises(JLTError, match="x.tar is truncated") as caught:
        source[0]
    assert not isinstance(caught.value, BadImageError)
    path.unlink()
    with pytest.raises(JLTError, match=r"x.tar cannot be read \(No such file"):
        source[0]


def test_files_are_in_the_order_of_their_names_and_splits_are_chosen(tmp_path: Path) -> None:
    write_tar(tmp_path / "imagenet1k-train-0001.tar", samples(("c", 3, 0)))
    write_tar(tmp_path / "imagenet1k-train-0000.tar", samples(("b", 1, 1), ("a", 2, 0)))
    write_tar(tmp_path / "imagenet1k-validation-00.tar", samples(("d", 4, 0)))
    source = open_source(str(tmp_path), split="imagenet1k-train")
    assert content(source) == [(1, "1"), (2, "0"), (3, "0")]
    with pytest.raises(UsageError, match=r"imagenet1k-train \(2 files\), imagenet1k-validation \(1 files\)"):
        open_source(str(tmp_path))
    names = tmp_path / "names.txt"
    names.write_text("x\ny\n")
    single = open_source(str(tmp_path / "imagenet1k-validation-00.tar"), class_names=str(names))
    assert content(single) == [(4, "x")]
    for outside in (-1, 1):
        with pytest.raises(IndexError):
            single[outside]


def test_identity_follows_members_and_labels(tmp_path: Path) -> None:
    def identity(*keys: tuple[str, int, object], name: str = "x.tar") -> str:
        return json.dumps(opened(write_tar(tmp_path / name, samples(*keys))).identity())

    first = identity(("a", 1, 0), ("b", 2, 1))
    assert identity(("a", 1, 0), ("b", 2, 1)) == first
    others = [identity(("a", 1, 1), ("b", 2, 0)), identity(("b", 1, 0), ("a", 2, 1)), identity(("a", 1, 0))]
    assert len({first, *others, identity(("a", 1, 0), ("b", 2, 1), name="y.tar")}) == 5


def _read_in_worker(source: TarShards) -> list[tuple[int, str]]:
    return content(source)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_from_a_source_that_was_read_from(tmp_path: Path, method: str) -> None:
    source = opened(write_tar(tmp_path / "x.tar", samples(*((f"{n}", n, 0) for n in range(50)))))
    expected = [(n, "0") for n in range(50)]
    assert content(source) == expected
    with multiprocessing.get_context(method).Pool(1) as pool:
        other = pool.apply_async(_read_in_worker, (source,))
        assert content(source) == expected
        assert other.get(60) == expected
    assert len(pickle.dumps(source)) < 50 * 40 + 2000


def test_a_size_below_zero_is_damage_and_no_endless_loop(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.png", b"abc")])
    content = bytearray(path.read_bytes())
    content[124:136] = b"-0000001000\0"
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    path.write_bytes(content)
    with pytest.raises(JLTError, match=r"a\.tar"):
        TarShards(tmp_path, [path])
