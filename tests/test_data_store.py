"""The latent store: reading against the images it was made of, other programs' view of it, and every kind of damage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import expected_latents, file_bytes, make_store
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jlt.data.manifest import StoreManifest, read_manifest, write_manifest
from jlt.data.shape import LatentShape
from jlt.data.shards import ShardFile
from jlt.data.store import LatentStore, verify_store
from jlt.errors import JLTError

COUNT = 37


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "store"
    make_store(folder)
    return folder


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def test_opening_shows_what_is_stored(sound: Path) -> None:
    store = LatentStore.open(sound)
    assert len(store) == COUNT
    assert store.shape == LatentShape(channels=48, height=2, width=2, num_classes=3)
    assert store.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(store.labels, np.arange(COUNT) % 3)
    assert [record.count for record in store.manifest.shards] == [10, 10, 10, 7]
    assert store.identity()["count"] == COUNT
    json.dumps(store.identity())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.booleans()), max_size=60))
def test_gather_gives_the_latents_of_the_images_asked_for(sound: Path, asked: list[tuple[int, bool]]) -> None:
    store = LatentStore.open(sound)
    indices = np.array([index for index, _ in asked], dtype=np.int64)
    flips = np.array([flip for _, flip in asked], dtype=bool)
    latents, labels = store.gather(indices, flips)
    assert latents.shape == (len(asked), 48, 2, 2)
    assert (latents.dtype, labels.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(labels.numpy(), indices % 3)
    for row, (index, flip) in enumerate(asked):
        np.testing.assert_allclose(latents[row].numpy(), expected_latents(index, flip), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 10, 37, 100])
def test_batches_are_the_store_in_order(sound: Path, batch_size: int) -> None:
    batches = list(LatentStore.open(sound).batches(batch_size))
    assert [len(latents) for latents, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    latents = torch.cat([latents for latents, _ in batches]).numpy()
    np.testing.assert_allclose(latents, [expected_latents(index) for index in range(COUNT)], atol=1e-6)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]).numpy(), np.arange(COUNT) % 3)


def test_safetensors_itself_reads_the_shards(sound: Path) -> None:
    tensors = load_file(sound / "shard-00001.safetensors")
    assert set(tensors) == {"latents", "latents_flip", "labels", "index"}
    np.testing.assert_array_equal(tensors["index"], np.arange(10, 20))
    np.testing.assert_array_equal(tensors["labels"], np.arange(10, 20) % 3)
    np.testing.assert_allclose(tensors["latents"], [expected_latents(i) for i in range(10, 20)], atol=1e-6)
    np.testing.assert_allclose(tensors["latents_flip"], [expected_latents(i, True) for i in range(10, 20)], atol=1e-6)
    entries = ShardFile(sound / "shard-00001.safetensors").read_entries()
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


def test_wrong_requests(sound: Path, tmp_path: Path) -> None:
    store = LatentStore.open(sound)
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match="37"):
            store.gather(np.array([index]))
    make_store(tmp_path / "plain", flips=False)
    plain = LatentStore.open(tmp_path / "plain")
    plain.gather(np.array([0]), np.array([False]))
    with pytest.raises(JLTError, match="no flipped latents"):
        plain.gather(np.array([0]), np.array([True]))


def test_a_sound_store_has_no_problems(sound: Path) -> None:
    assert verify_store(sound) == []


def test_every_flipped_bit_is_found_and_named(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for name, content in file_bytes(copy).items():
        places = [int(rng.integers(8 * len(content))) for _ in range(60)] + [0, 8 * 8, 8 * len(content) - 1]
        for place in places:
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << place % 8
            (copy / name).write_bytes(damaged)
            problems = verify_store(copy)
            assert len(problems) == 1, (name, place)
            assert name in problems[0]
        (copy / name).write_bytes(content)
    assert verify_store(copy) == []


def test_every_flipped_bit_of_a_manifest_is_refused_at_opening(copy: Path) -> None:
    content = (copy / "manifest.json").read_bytes()
    for place in range(0, 8 * len(content), 61):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (copy / "manifest.json").write_bytes(damaged)
        with pytest.raises(JLTError, match=r"manifest\.json"):
            LatentStore.open(copy)


def test_a_zeroed_tail_is_found(copy: Path) -> None:
    path = copy / "shard-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-512] + bytes(512))
    assert [path.name in problem for problem in verify_store(copy)] == [True]


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


def rewrite(folder: Path, **changes: object) -> None:
    """Write a manifest that is valid in itself, as a program that does not know better would."""
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
    rewrite(copy, class_names=("a", "b", "c"), channels=47)
    with pytest.raises(JLTError, match="48, 2, 2.*47, 2, 2"):
        LatentStore.open(copy)
    rewrite(copy, channels=48, dtype="float16")
    with pytest.raises(JLTError, match="F32.*F16"):
        LatentStore.open(copy)


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(copy: Path) -> None:
    store = LatentStore.open(copy)
    os.truncate(copy / "shard-00001.safetensors", 1000)
    with pytest.raises(JLTError, match="shard-00001.*truncated"):
        store.gather(np.array([0, 19]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\xff" * 8, "header claims"),
        (b"\x02" + bytes(7) + b"[]", "does not parse"),
        (b"\x02" + bytes(7) + b"{}", "does not parse"),
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


def test_many_shards_do_not_exhaust_file_descriptors(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jlt.data.store.MAX_OPEN_SHARDS", 2)
    before = open_files()
    store = LatentStore.open(sound)
    latents, _ = store.gather(np.arange(COUNT - 1, -1, -1))
    assert open_files() - before == 2
    np.testing.assert_allclose(latents[7].numpy(), expected_latents(COUNT - 8), atol=1e-6)
    del store
    assert open_files() == before
