"""The latent store: reading against the images it was made of, other programs' view of it, and every kind of damage."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import expected_latents, file_bytes, make_store
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jlt.config import LatentShape
from jlt.errors import JLTError
from jlt.images.source import SkippedImage
from jlt.latents.manifest import ShardRecord, StoreManifest, read_manifest, write_manifest
from jlt.latents.shards import ShardFile
from jlt.latents.store import LatentStore, verify_store, write_store
from jlt.storage.files import sealed_text, sha256_file

COUNT = 37


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "store"
    make_store(folder)
    return folder


@pytest.fixture(scope="module")
def victim(intact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose files every test puts back."""
    return Path(shutil.copytree(intact, tmp_path_factory.mktemp("victim") / "store"))


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "store"))


def test_opening_shows_what_is_stored(intact: Path) -> None:
    store = LatentStore.open(intact)
    assert len(store) == COUNT
    assert store.shape == LatentShape(channels=48, height=2, width=2, num_classes=3)
    assert store.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(store.labels, np.arange(COUNT) % 3)
    assert [record.count for record in store.manifest.shards] == [10, 10, 10, 7]
    assert store.identity()["count"] == COUNT
    json.dumps(store.identity())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.booleans()), max_size=60))
def test_gather_returns_the_latents_of_the_requested_images(intact: Path, requested: list[tuple[int, bool]]) -> None:
    store = LatentStore.open(intact)
    indices = np.array([index for index, _ in requested], dtype=np.int64)
    flips = np.array([flip for _, flip in requested], dtype=bool)
    latents, labels = store.gather(indices, flips)
    assert latents.shape == (len(requested), 48, 2, 2)
    assert (latents.dtype, labels.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(labels.numpy(), indices % 3)
    for row, (index, flip) in enumerate(requested):
        np.testing.assert_allclose(latents[row].numpy(), expected_latents(index, flip), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 37, 100])
def test_batches_are_the_store_in_order(intact: Path, batch_size: int) -> None:
    batches = list(LatentStore.open(intact).batches(batch_size))
    assert [len(latents) for latents, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    latents = torch.cat([latents for latents, _ in batches]).numpy()
    np.testing.assert_allclose(latents, [expected_latents(index) for index in range(COUNT)], atol=1e-6)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]).numpy(), np.arange(COUNT) % 3)


def test_safetensors_itself_reads_the_shards(intact: Path) -> None:
    tensors = load_file(intact / "shard-00001.safetensors")
    assert set(tensors) == {"latents", "latents_flip", "labels", "index"}
    np.testing.assert_array_equal(tensors["index"], np.arange(10, 20))
    np.testing.assert_array_equal(tensors["labels"], np.arange(10, 20) % 3)
    np.testing.assert_allclose(tensors["latents"], [expected_latents(i) for i in range(10, 20)], atol=1e-6)
    np.testing.assert_allclose(tensors["latents_flip"], [expected_latents(i, True) for i in range(10, 20)], atol=1e-6)
    entries = ShardFile(intact / "shard-00001.safetensors").read_entries()
    assert [entries[name].offset % 64 for name in ("latents", "latents_flip")] == [0, 0]
    assert [entries[name].offset % 8 for name in ("labels", "index")] == [0, 0]


def test_shards_that_safetensors_wrote_are_read(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(3, 2), "labels": np.array([5, 6, 7])}
    save_file(tensors, tmp_path / "s.safetensors", metadata={"made": "elsewhere"})
    file = ShardFile(tmp_path / "s.safetensors")
    entries = file.read_entries()
    np.testing.assert_array_equal(file.read_array(entries["labels"]), [5, 6, 7])
    rows = bytearray(8)
    file.read_into(memoryview(rows), entries["a"].offset + entries["a"].row_bytes)
    np.testing.assert_array_equal(np.frombuffer(rows, dtype=np.float16), [2, 3, 4, 5])


def test_wrong_requests(intact: Path, tmp_path: Path) -> None:
    store = LatentStore.open(intact)
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match="37"):
            store.gather(np.array([index]))
    make_store(tmp_path / "plain", flips=False)
    plain = LatentStore.open(tmp_path / "plain")
    plain.gather(np.array([0]), np.array([False]))
    with pytest.raises(JLTError, match="no flipped latents"):
        plain.gather(np.array([0]), np.array([True]))


def test_an_intact_store_has_no_problems(intact: Path) -> None:
    assert verify_store(intact) == []


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """Another content: changed bits, a zeroed tail, or another length."""
    kind = draw(st.sampled_from(["bits", "zeros", "truncated", "too long"]))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "bits":
        damaged = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            damaged[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(damaged)
    if kind == "zeros":
        return content[:place] + bytes(len(content) - place)
    return content[:place] if kind == "truncated" else content + draw(st.binary(min_size=1, max_size=9))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damage_anywhere_is_found_in_exactly_that_file(victim: Path, data: st.DataObject) -> None:
    contents = file_bytes(victim)
    name = data.draw(st.sampled_from(sorted(contents)))
    damaged = data.draw(damages(contents[name]))
    assume(damaged != contents[name])
    (victim / name).write_bytes(damaged)
    try:
        problems = verify_store(victim)
        assert len(problems) == 1
        assert [other for other in contents if other in problems[0].removesuffix("is not the manifest's.")] == [name]
        with pytest.raises(JLTError, match=name):
            LatentStore.open_verified(victim)
    finally:
        (victim / name).write_bytes(contents[name])


@settings(deadline=None, max_examples=10)
@given(pair=st.lists(st.sampled_from([f"shard-0000{shard}.safetensors" for shard in range(4)]), min_size=2, max_size=2))
def test_shards_in_each_others_place_are_both_named(victim: Path, pair: list[str]) -> None:
    assume(pair[0] != pair[1])
    contents = file_bytes(victim)
    for name, other in zip(pair, reversed(pair), strict=True):
        (victim / name).write_bytes(contents[other])
    try:
        problems = verify_store(victim)
        assert len(problems) == 2
        assert [name in problem for name, problem in zip(sorted(pair), problems, strict=True)] == [True, True]
    finally:
        for name in pair:
            (victim / name).write_bytes(contents[name])


def test_only_reading_everything_finds_a_changed_value(copy: Path) -> None:
    path = copy / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] + b"\x01" + path.read_bytes()[-999:])
    LatentStore.open(copy)
    with pytest.raises(JLTError, match=r"damaged: .*shard-00002.*SHA-256"):
        LatentStore.open_verified(copy)


def test_verifying_a_small_store_prints_nothing(intact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_store(intact) == []
    assert len(LatentStore.open_verified(intact)) == COUNT
    assert capsys.readouterr() == ("", "")


def test_every_flipped_bit_of_a_manifest_is_refused_at_opening(copy: Path) -> None:
    content = (copy / "manifest.json").read_bytes()
    for place in range(0, 8 * len(content), 61):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (copy / "manifest.json").write_bytes(damaged)
        with pytest.raises(JLTError, match=r"manifest\.json"):
            LatentStore.open(copy)


def test_changed_files_are_refused_at_opening(copy: Path) -> None:
    first, last = copy / "shard-00000.safetensors", copy / "shard-00003.safetensors"
    content = last.read_bytes()
    changes = {
        "truncated": lambda: last.write_bytes(content[:-1]),
        "too long": lambda: last.write_bytes(content + b"\0"),
        "missing": lambda: last.unlink(),
        "not in the manifest": lambda: shutil.copy(first, copy / "shard-00004.safetensors"),
    }
    for wrong, change in changes.items():
        change()
        with pytest.raises(JLTError, match=wrong):
            LatentStore.open(copy)
        problems = verify_store(copy)
        assert len(problems) == 1
        assert wrong in problems[0]
        assert ("shard-00004" if "not in" in wrong else last.name) in problems[0]
        last.write_bytes(content)
        (copy / "shard-00004.safetensors").unlink(missing_ok=True)


def test_all_problems_are_named(copy: Path) -> None:
    (copy / "shard-00000.safetensors").unlink()
    (copy / "shard-00001.safetensors").write_bytes(b"short")
    path = copy / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    found = " ".join(verify_store(copy))
    assert all(f"shard-0000{shard}" in found for shard in (0, 1, 2))
    assert "shard-00003" not in found


def test_things_that_are_no_files_are_named(copy: Path) -> None:
    path = copy / "shard-00001.safetensors"
    content = path.read_bytes()
    changes = {
        "is not a file": path.mkdir,
        "is not a file\\.": lambda: os.mkfifo(path),
        "is missing": lambda: path.symlink_to(copy / "nowhere"),
        "cannot be read": lambda: path.symlink_to(path),
    }
    for wrong, change in changes.items():
        path.unlink()
        change()
        with pytest.raises(JLTError, match=f"{path.name} {wrong}"):
            LatentStore.open(copy)
        assert len(verify_store(copy)) == 1
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)
    (copy / "manifest.json").unlink()
    os.mkfifo(copy / "manifest.json")
    with pytest.raises(JLTError, match=r"manifest.json is not a file"):
        LatentStore.open(copy)


def test_a_file_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    problems = verify_store(copy)
    assert [problem.endswith("cannot be read (Permission denied).") for problem in problems] == [True] * 4


def test_links_and_hidden_files_do_no_harm(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "shard-00000.safetensors", tmp_path / "elsewhere")
    (copy / "shard-00000.safetensors").symlink_to(tmp_path / "elsewhere")
    (copy / ".shard-00001.2147483647.partial.safetensors").write_bytes(b"left by a killed process")
    (copy / ".encoding").mkdir(exist_ok=True)
    assert verify_store(copy) == []
    LatentStore.open(copy).gather(np.arange(COUNT))


def rewrite(folder: Path, **changes: object) -> None:
    """Write a manifest that is valid in itself, as another program could."""
    content = {**vars(read_manifest(folder)), **changes}
    write_manifest(folder, StoreManifest(**content))


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    for edited in (text.replace('"resolution": 8', '"resolution": 16'), text.replace("\n  ", "\n "), text + "\n"):
        assert edited != text
        path.write_text(edited)
        with pytest.raises(JLTError, match="edited or damaged"):
            LatentStore.open(copy)
        assert verify_store(copy) == [str(path) + " was edited or damaged: its content does not match its own SHA-256."]


def test_a_manifest_that_does_not_fit_its_shards_is_refused(copy: Path) -> None:
    rewrite(copy, class_names=("a", "b"))
    with pytest.raises(JLTError, match=r"labels from 0 to 2.*2 classes"):
        LatentStore.open(copy)
    assert len(verify_store(copy)) == 1
    rewrite(copy, class_names=("a", "b", "c"), height=1)
    with pytest.raises(JLTError, match="48, 2, 2.*48, 1, 2"):
        LatentStore.open(copy)
    rewrite(copy, height=2, dtype="float16")
    with pytest.raises(JLTError, match="F32.*F16"):
        LatentStore.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 36}, "count differs from the sum over its shards"),
        ({"shards": ()}, "count differs from the sum over its shards"),
        ({"count": 0, "shards": ()}, "count must be 1 or more, not 0"),
        ({"height": -2}, "height must be from 1 to 65,536, not -2"),
        ({"height": 10**18}, "height must be from 1 to 65,536"),
        ({"resolution": 10**9}, "resolution must be from 1"),
        ({"count": 10**18, "shards": (ShardRecord("a", 10**18, 9, ""),)}, "fewer bytes than its latents"),
        ({"mean": 10**9}, "means are not between"),
        ({"std": -1.0}, "std must be 0 or more"),
        ({"channels": 47}, "of another number of channels"),
        ({"channel_std": (1.0,)}, "of another number of channels"),
        ({"minimum": 9.0}, "minimum is above its maximum"),
        ({"dtype": "bfloat16"}, "dtype must be one of float16, float32"),
        ({"class_names": ()}, "names no classes"),
        ({"class_names": 3}, "class_names must be"),
        ({"shards": (ShardRecord("../a.safetensors", 37, 9, ""),)}, "which is not in the folder"),
        ({"shards": (ShardRecord("a", 20, 9, ""), ShardRecord("a", 17, 9, ""))}, "names a shard twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(copy: Path, changes: dict[str, object], message: str) -> None:
    content = {**read_manifest(copy).content(), **json.loads(json.dumps(changes, default=vars))}
    (copy / "manifest.json").write_text(sealed_text(content))
    with pytest.raises(JLTError, match=rf"manifest\.json .*{message}"):
        LatentStore.open(copy)
    assert len(verify_store(copy)) == 1


def test_a_manifest_with_a_number_that_is_none(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    for number in ("NaN", "1e999"):
        (copy / "manifest.json").write_text(re.sub(r'"mean": [^,]*', f'"mean": {number}', text, count=1))
        with pytest.raises(JLTError, match=r"manifest\.json is not readable JSON"):
            LatentStore.open(copy)


def replace_tensors(folder: Path, shard: int, **tensors: np.ndarray | None) -> None:
    """Save a shard again with other tensors, and seal a manifest that has its new hash."""
    manifest = read_manifest(folder)
    path = folder / manifest.shards[shard].file
    changed = {name: values for name, values in {**load_file(path), **tensors}.items() if values is not None}
    save_file(changed, path)
    record = dataclasses.replace(manifest.shards[shard], bytes=path.stat().st_size, sha256=sha256_file(path))
    rewrite(folder, shards=(*manifest.shards[:shard], record, *manifest.shards[shard + 1 :]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.arange(10), "wrong images"),
        (np.arange(19, 9, -1), "wrong images"),
        (np.arange(11, 21), "wrong images"),
        (np.arange(10, 20).astype(np.int32), "does not hold the position"),
        (None, "does not hold the position"),
    ],
)
def test_positions_that_are_not_those_of_the_source(copy: Path, index: np.ndarray | None, message: str) -> None:
    replace_tensors(copy, 1, index=index)
    problems = verify_store(copy)
    assert len(problems) == 1
    assert re.search(f"shard-00001.* {message}", problems[0])


def test_images_that_are_neither_stored_nor_skipped(copy: Path) -> None:
    assert read_manifest(copy).skipped == ()
    rewrite(copy, skipped=(SkippedImage(3, "noise/3.png", "is no image"),))
    assert ["37 latents and 1 skipped images, and 37 images" in problem for problem in verify_store(copy)] == [True]
    rewrite(copy, skipped=(), source={"kind": "noise", "count": 38})
    assert ["37 latents and 0 skipped images, and 38 images" in problem for problem in verify_store(copy)] == [True]


def test_a_million_latents_open_within_a_second(tmp_path: Path) -> None:
    rows, rng = 8000, np.random.default_rng(0)
    latents = rng.normal(0, 1, (rows, 4, 1, 1)).astype(np.float16)
    labels = rng.integers(0, 1000, rows)
    write_store(tmp_path / "store", ({"latents": latents, "labels": labels} for _ in range(160)), 1000)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        store = LatentStore.open(tmp_path / "store")
        seconds.append(time.perf_counter() - begin)
    assert len(store) == 1_280_000
    assert min(seconds) < 1


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(copy: Path) -> None:
    store = LatentStore.open(copy)
    os.truncate(copy / "shard-00001.safetensors", 1000)
    with pytest.raises(JLTError, match="shard-00001.*truncated"):
        store.gather(np.array([0, 19]))


def header_of(tensors: dict[str, list[object]]) -> bytes:
    fields = {
        name: dict(zip(("dtype", "shape", "data_offsets"), tensor, strict=True)) for name, tensor in tensors.items()
    }
    header = json.dumps(fields).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\xff" * 8, "header claims"),
        (b"\x02" + bytes(7) + b"[]", "does not parse"),
        (header_of({}) + b"more", "describes 10 bytes and the file has 14"),
        (header_of({"a": ["F16", [2], [0, 2]]}) + bytes(2), "does not parse"),
        (header_of({"a": ["F16", [1], [2, 4]]}) + bytes(4), "does not parse"),
        (header_of({"a": ["F16", [1], [0, 2]], "b": ["F16", [1], [0, 2]]}) + bytes(2), "does not parse"),
        (header_of({"a": ["F16", [-1, -1], [0, 2]]}) + bytes(2), "does not parse"),
        (header_of({"a": ["F16", [1.0], [0, 2]]}) + bytes(2), "does not parse"),
        (header_of({"a": ["X", [1], [0, -2]]}), "does not parse"),
        (header_of({"a": ["F16", [1], [0, 2, 3]]}) + bytes(2), "does not parse"),
        (b"\x40\x9c" + bytes(6) + b"[" * 40_000, "does not parse"),
        (b"\x05" + bytes(7) + b'{"a":', "does not parse"),
    ],
)
def test_files_that_are_no_shards(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(JLTError, match=f"x.safetensors.*{message}"):
        ShardFile(tmp_path / "x.safetensors").read_entries()


def test_folders_that_are_no_stores(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match="not a latent store"):
        LatentStore.open(tmp_path)
    assert len(verify_store(tmp_path / "nowhere")) == 1
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(JLTError, match="no hash of itself|schema version"):
        LatentStore.open(tmp_path)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_many_shards_do_not_exhaust_file_descriptors(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jlt.latents.store.MAX_OPEN_SHARDS", 2)
    before = open_files()
    store = LatentStore.open(intact)
    latents, _ = store.gather(np.arange(COUNT - 1, -1, -1))
    assert open_files() - before == 2
    np.testing.assert_allclose(latents[7].numpy(), expected_latents(COUNT - 8), atol=1e-6)
    del store
    assert open_files() == before


def test_few_permitted_files_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store", count=12, shard_size=1)
    monkeypatch.setattr("jlt.latents.store.resource.getrlimit", lambda _: (16, 16))
    before = open_files()
    store = LatentStore.open(tmp_path / "store")
    assert open_files() - before == 4
    latents, _ = store.gather(np.arange(12))
    np.testing.assert_allclose(latents[11].numpy(), expected_latents(11), atol=1e-6)
