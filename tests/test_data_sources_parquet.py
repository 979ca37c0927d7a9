"""Parquet files as the Hub writes them: layouts, class names, the order of reading, memory, and damage."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_zoo import assert_is_zoo, encoded, png, zoo
from PIL import Image

from jlt.errors import JLTError, UsageError
from jlt.images.parquet import Parquet
from jlt.images.reading import BadImageError
from jlt.images.registry import open_source
from jlt.images.source import ImageSource

HUB_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(
    path: Path,
    images: list[Any],
    labels: Any,
    names: list[str] | None = None,
    kind: pa.DataType = HUB_IMAGE,
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array(images, type=kind), "label": pa.array(labels)})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    pq.write_table(table, path, **options)
    return path


def rows(values: range) -> list[dict[str, Any]]:
    return [{"bytes": png(value), "path": f"image_{value}.png"} for value in values]


def values(source: ImageSource, order: Any) -> list[int]:
    return [source[int(index)][0].getpixel((0, 0)) for index in order]


def test_every_kind_of_image_of_the_zoo(tmp_path: Path) -> None:
    animals = zoo()
    names = list(animals)
    images = [{"bytes": animals[name][0], "path": name} for name in names]
    classes = [name.partition("/")[0] for name in names]
    write(tmp_path / "zoo.parquet", images, classes, row_group_size=7)
    source = open_source(str(tmp_path))
    assert source.class_names == ("bad", "common", "odd")
    assert_is_zoo(source, names)
    assert_is_zoo(pickle.loads(pickle.dumps(source)), names)


def test_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    data, names = tmp_path / "imagenet-1k" / "data", ["tench", "shark", "hen"]
    write(data / "train-00000-of-00002.parquet", rows(range(7)), [0, 1, 0, 1, 2, 0, 0], names)
    write(data / "train-00001-of-00002.parquet", rows(range(7, 12)), [2] * 5, names, row_group_size=2)
    write(data / "test-00000-of-00001.parquet", rows(range(3)), [-1] * 3, names)
    (tmp_path / "imagenet-1k" / "README.md").touch()
    spec = str(tmp_path / "imagenet-1k")
    with pytest.raises(UsageError, match=r"test \(1 files\), train \(2 files\)"):
        open_source(spec)
    with pytest.raises(JLTError, match=r"test-00000-of-00001.parquet row 0 \(image_0.png\) has the label -1"):
        open_source(spec, split="test")
    source = open_source(spec, split="train")
    assert source.name == "imagenet-1k"
    assert source.class_names == ("tench", "shark", "hen")
    assert values(source, range(12)) == list(range(12))
    assert [source[i][1] for i in range(12)] == [0, 1, 0, 1, 2, 0, 0, 2, 2, 2, 2, 2]
    assert source.describe(6) == "train-00000-of-00002.parquet row 6 (image_6.png)"
    assert source.describe(11) == "train-00001-of-00002.parquet row 4 (image_11.png)"
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            source[outside]


def test_any_order_of_reading_gives_the_same_images(tmp_path: Path) -> None:
    # Groups below, at and above the number of rows that are taken at a time.
    for number, size in enumerate((100, 16, 5)):
        write(tmp_path / f"{number}.parquet", rows(range(80 * number, 80 * number + 80)), [0] * 80, row_group_size=size)
    source = open_source(str(tmp_path))
    runs = np.random.default_rng(0).permutation(240).reshape(-1, 5)
    for order in (range(240), range(239, -1, -1), runs.ravel(), [*range(40, 60), *range(10, 30), 0, 239, 0]):
        assert values(source, order) == list(order)


def _values_in_worker(source: Parquet, start: int) -> list[int]:
    return values(source, range(start, start + 20))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_from_a_source_that_was_read_from(tmp_path: Path, method: str) -> None:
    source = Parquet(tmp_path, [write(tmp_path / "a.parquet", rows(range(90)), [0] * 90)])
    assert values(source, [30]) == [30]
    with multiprocessing.get_context(method).Pool(1) as pool:
        other = pool.apply_async(_values_in_worker, (source, 25))
        assert values(source, range(31, 90)) == list(range(31, 90))
        assert other.get(60) == list(range(25, 45))


def test_images_next_to_the_file_and_missing_images(tmp_path: Path) -> None:
    (tmp_path / "jpg").mkdir()
    (tmp_path / "jpg" / "9.png").write_bytes(png(9))
    images = [{"bytes": None, "path": "jpg/9.png"}, {"bytes": None, "path": "jpg/8.png"}, None]
    images += [{"bytes": None, "path": None}, {"bytes": b"", "path": "x.png"}]
    source = Parquet(tmp_path, [write(tmp_path / "a.parquet", images, [0] * 5)])
    assert values(source, [0]) == [9]
    nowhere = r"a.parquet row 1 \(jpg/8.png\) cannot be read \(No such"
    for index, reason in ((1, nowhere), (2, "neither"), (3, "neither"), (4, "no bytes")):
        with pytest.raises(BadImageError, match=reason):
            source[index]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_plain_column_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    source = Parquet(tmp_path, [write(tmp_path / "a.parquet", [png(3), png(4), b"x"], [2, 0, 0], kind=kind)])
    assert values(source, [0, 1]) == [3, 4]
    assert source.class_names == ("0", "1", "2")
    with pytest.raises(BadImageError, match="a.parquet row 2 is of no image format"):
        source[2]


FRUIT = pa.array(["pear", "fig", "pear", "apple"])


@pytest.mark.parametrize("labels", [FRUIT, FRUIT.cast(pa.large_string()), FRUIT.dictionary_encode()])
def test_names_as_labels_are_sorted_over_all_files(tmp_path: Path, labels: pa.Array) -> None:
    files = [
        write(tmp_path / "0.parquet", rows(range(4)), labels),
        write(tmp_path / "1.parquet", rows(range(2)), labels.slice(2), row_group_size=1),
    ]
    source = Parquet(tmp_path, files)
    assert source.class_names == ("apple", "fig", "pear")
    assert [source[i][1] for i in range(6)] == [2, 1, 2, 0, 2, 0]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match="--class-names does not apply"):
        open_source(str(tmp_path), class_names=str(tmp_path / "names.txt"))


def test_names_from_a_file_take_precedence(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows(range(3)), pa.array([0, 2, 1], pa.uint8()), ["x", "y", "z"])
    names = tmp_path / "names.txt"
    names.write_text("n01440764\r\nn01443537\r\nn01484850\r\n\n\n")
    assert open_source(str(file), class_names=str(names)).class_names == ("n01440764", "n01443537", "n01484850")
    for text, reason in (
        ("a\nb\n", r"row 1 \(image_1.png\) has the label 2, and labels go from 0 to 1"),
        ("a\n\nb\n", "no name on line 2"),
        ("a\nb\na\n", "'a' on lines 1 and 3"),
        ("", "no name on line 1"),
    ):
        names.write_text(text)
        with pytest.raises(JLTError, match=reason):
            open_source(str(file), class_names=str(names))
    names.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(JLTError, match="text file of class names"):
        open_source(str(file), class_names=str(names))


def test_invalid_collections_are_refused_at_opening(tmp_path: Path) -> None:
    good = write(tmp_path / "0.parquet", rows(range(2)), [0, 1])
    cases = [
        (write(tmp_path / "null.parquet", rows(range(2)), [0, None]), "null.parquet row 1 has no label"),
        (write(tmp_path / "float.parquet", rows(range(2)), [0.0, 1.0]), "label of type double"),
        (write(tmp_path / "keys.parquet", rows(range(2)), [0, 10**12]), "label 1000000000000, and labels go from"),
        (write(tmp_path / "text.parquet", ["a"], [0], kind=pa.string()), "image of type string"),
        (write(tmp_path / "none.parquet", [], pa.array([], pa.int64())), "without a single row"),
    ]
    pq.write_table(pa.table({"img": [b""], "label": [0]}), tmp_path / "img.parquet")
    cases.append((tmp_path / "img.parquet", "no column image, only img, label"))
    for file, reason in cases:
        with pytest.raises(JLTError, match=reason):
            Parquet(file, [file])
    for other in (
        write(tmp_path / "1.parquet", rows(range(2)), ["a", "b"]),
        write(tmp_path / "1.parquet", rows(range(2)), [0, 1], ["a", "b"]),
        write(tmp_path / "1.parquet", [png(0)], [0], kind=pa.binary()),
    ):
        with pytest.raises(JLTError, match="1.parquet and 0.parquet differ"):
            Parquet(tmp_path, [good, other])


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "0123456789abcdef", rows(range(3)), [0, 1, 0])
    data = tmp_path / "snapshots" / "main" / "data"
    data.mkdir(parents=True)
    (data / "train-00000-of-00001.parquet").symlink_to(blob)
    for spec in (data.parent, data, data / "train-00000-of-00001.parquet"):
        source = open_source(str(spec))
        assert values(source, range(3)) == [0, 1, 2]
        assert source.describe(1) == "train-00000-of-00001.parquet row 1 (image_1.png)"
        assert source.identity()["path"] == str(spec)
    blob.unlink()
    with pytest.raises(JLTError, match="train-00000-of-00001.parquet"):
        open_source(str(data))


def test_identity_follows_names_sizes_and_labels(tmp_path: Path) -> None:
    def identity(images: range, labels: list[int], name: str = "a.parquet", **options: Any) -> str:
        file = write(tmp_path / name, rows(images), labels, **options)
        return json.dumps(Parquet(tmp_path, [file]).identity())

    first = identity(range(3), [0, 1, 0])
    assert identity(range(3), [0, 1, 0]) == first
    others = [identity(range(3), [0, 1, 1]), identity(range(3), [0, 1, 0], "b.parquet")]
    others += [identity(range(3), [0, 1, 0], compression="gzip"), identity(range(4), [0, 1, 0, 1])]
    assert len({first, *others}) == 5


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def test_damage_names_the_file(tmp_path: Path) -> None:
    images = [encoded(Image.fromarray(noise(number)), "PNG") for number in range(60)]
    options = {"kind": pa.binary(), "write_page_checksum": True, "use_dictionary": False, "write_batch_size": 4}
    content = write(tmp_path / "a.parquet", images, [0] * 60, **options, data_page_size=10_000).read_bytes()
    damaged = tmp_path / "b.parquet"
    for wrong in (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", content[:-500], content[:5000], b""):
        damaged.write_bytes(wrong)
        with pytest.raises(JLTError, match="b.parquet cannot be read as a parquet file"):
            Parquet(tmp_path, [damaged])
    # A damaged page in the middle, which opening does not read. Every image is read as written, or an error names the
    # file, in any order of reading.
    middle = len(content) // 2
    damaged.write_bytes(content[:middle] + b"\x00" * 64 + content[middle + 64 :])
    source = Parquet(tmp_path, [damaged])
    for order in (range(60), range(59, -1, -1), np.random.default_rng(0).integers(0, 60, 200)):
        intact = [int(index) for index in order if reads_as_written(source, int(index))]
        assert set(intact) >= {int(index) for index in order if index < 16}
        assert len(intact) < len(order)


def reads_as_written(source: ImageSource, index: int) -> bool:
    try:
        image, _ = source[index]
    except JLTError as error:
        if isinstance(error, BadImageError) or "b.parquet cannot be read as a parquet file" not in str(error):
            raise
        return False
    np.testing.assert_array_equal(np.asarray(image), noise(index))
    return True


def test_memory_is_bounded_by_pages_rather_than_by_row_groups(tmp_path: Path) -> None:
    # Pages of one image, as for images beyond a megabyte, or of eight: 120 MB in one row group.
    blob = np.random.default_rng(0).bytes(200_000)
    write(
        tmp_path / "a.parquet",
        [blob] * 600,
        [0] * 600,
        kind=pa.binary(),
        use_dictionary=False,
        compression="none",
        write_batch_size=8,
    )
    assert (tmp_path / "a.parquet").stat().st_size > 115e6
    script = (
        "import contextlib, resource, sys; from pathlib import Path\n"
        "from jlt.images.reading import BadImageError; from jlt.images.parquet import Parquet\n"
        "path = Path(sys.argv[1]); source = Parquet(path, [path])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for index in range(len(source)):\n"
        "    with contextlib.suppress(BadImageError): source[index]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = subprocess.run([sys.executable, "-c", script, tmp_path / "a.parquet"], capture_output=True, check=True)
    assert int(grown.stdout) * 1024 < 40e6


def test_opening_other_sources_does_not_load_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "class" / "0.png")
    # Not the digits: scikit-learn itself imports pandas, and with it pyarrow, where it is installed.
    script = "import sys; from jlt.images.registry import open_source; open_source(sys.argv[1])\n"
    script += "assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
