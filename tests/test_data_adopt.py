"""Adopted shards: read back against the arrays they were saved from, and everything that is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import file_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from jlt.config import SampleConfig
from jlt.errors import JLTError, UsageError
from jlt.experiments.recipes import resolve_recipe
from jlt.latents import adoption as adopting
from jlt.latents.adoption import adopt
from jlt.latents.manifest import StoreManifest, read_manifest
from jlt.latents.store import LatentStore, verify_store
from jlt.sampling.sampler import open_sampler
from jlt.training.checkpoint import open_checkpoint
from jlt.training.loop import train

Arrays = dict[str, np.ndarray]
SHAPE = (128, 2, 2)


def arrays(count: int, seed: int, dtype: str = "float16", flips: bool = True, shape: tuple[int, ...] = SHAPE) -> Arrays:
    rng = np.random.default_rng(seed)
    names = ("latents", "latents_flip") if flips else ("latents",)
    latents = {name: rng.normal(0.1, 1, (count, *shape)).astype(dtype) for name in names}
    return {**latents, "labels": rng.integers(0, 7, count).astype(np.int64)}


def save(folder: Path, numbers: tuple[int, int], tensors: Arrays, name: str = "latents_rank{:02d}_shard{:03d}") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name.format(*numbers)}.safetensors"
    save_file(tensors, path, metadata={"total_size": "something", "dtype": "torch.float16"})
    return path


def save_set(folder: Path, **changes: Any) -> list[Arrays]:
    """Shards 0 and 1 of rank 0, shard 0 of rank 1."""
    tensors = [arrays(count, seed, **changes) for seed, count in enumerate((5, 3, 8))]
    for numbers, shard in zip(((0, 0), (0, 1), (1, 0)), tensors, strict=True):
        save(folder, numbers, shard)
    return tensors


def joined(tensors: list[Arrays], name: str) -> np.ndarray:
    return np.concatenate([shard[name] for shard in tensors])


@pytest.mark.parametrize(("dtype", "flips"), [("float16", True), ("float32", False)])
def test_an_adopted_store_reads_as_what_was_saved(tmp_path: Path, dtype: str, flips: bool) -> None:
    tensors = save_set(tmp_path, dtype=dtype, flips=flips)
    before = file_bytes(tmp_path)
    manifest = adopt(tmp_path)
    after = file_bytes(tmp_path)
    assert {name: content for name, content in after.items() if name != "manifest.json"} == before
    store = LatentStore.open_verified(tmp_path)
    assert verify_store(tmp_path) == []
    assert store.manifest == manifest == read_manifest(tmp_path)
    order = np.random.default_rng(0).permutation(16)
    latents, labels = store.gather(order)
    np.testing.assert_array_equal(latents.numpy(), joined(tensors, "latents")[order])
    np.testing.assert_array_equal(labels.numpy(), joined(tensors, "labels")[order])
    if flips:
        flipped, _ = store.gather(order, np.ones(16, dtype=bool))
        np.testing.assert_array_equal(flipped.numpy(), joined(tensors, "latents_flip")[order])


def test_the_manifest_says_what_the_files_hold(tmp_path: Path) -> None:
    tensors = save_set(tmp_path)
    manifest = adopt(tmp_path)
    values = np.concatenate([joined(tensors, name) for name in ("latents", "latents_flip")]).astype(np.float64)
    np.testing.assert_allclose(manifest.mean, values.mean(), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, values.std(), rtol=1e-12)
    np.testing.assert_allclose(manifest.channel_mean, values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(manifest.channel_std, values.std((0, 2, 3)), rtol=1e-9)
    assert (manifest.minimum, manifest.maximum) == (values.min(), values.max())
    assert (manifest.count, manifest.flips, manifest.dtype, manifest.resolution) == (16, True, "float16", 32)
    assert manifest.class_names == tuple("0123456"[: 1 + joined(tensors, "labels").max()])
    assert manifest.encoding is None
    assert manifest.source == {"kind": "adopted", "count": 16}
    assert manifest.autoencoder == {
        "name": "flux2",
        "source": "black-forest-labs/FLUX.2-klein-4B",
        "class": "AutoencoderKLFlux2",
        "weights_sha256": None,
        "normalisation": {"kind": "as adopted"},
        "channels": 128,
        "downsampling": 16,
        "posterior": "mode",
    }
    names = ["latents_rank00_shard000", "latents_rank00_shard001", "latents_rank01_shard000"]
    for record, name, shard in zip(manifest.shards, names, tensors, strict=True):
        content = (tmp_path / record.file).read_bytes()
        assert record.file == f"{name}.safetensors"
        assert (record.count, record.bytes) == (len(shard["labels"]), len(content))
        assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_shards_follow_their_numbers_and_not_their_names(tmp_path: Path) -> None:
    for rank in range(11):
        for shard in range(12 if rank == 10 else 2):
            tensors = arrays(1, 100 * rank + shard)
            tensors["labels"][:] = 12 * rank + shard
            save(tmp_path, (rank, shard), tensors, "latents_rank{}_shard{}")
    adopt(tmp_path)
    expected = [12 * rank + shard for rank in range(11) for shard in range(12 if rank == 10 else 2)]
    np.testing.assert_array_equal(LatentStore.open(tmp_path).labels, expected)


@settings(deadline=None, max_examples=20)
@given(
    order=st.permutations(["latents", "latents_flip", "labels", "extra", "odd"]),
    odd=st.integers(0, 9),
    wide=st.booleans(),
)
def test_tensors_in_any_order_at_any_offset(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], odd: int, wide: bool
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    tensors = arrays(5, seed=odd)
    tensors["labels"] = tensors["labels"].astype(np.int64 if wide else np.int32)
    tensors |= {"extra": np.arange(6, dtype=np.uint8), "odd": np.zeros(odd, dtype=np.uint8)}
    write_by_hand(folder / "latents_rank0_shard0.safetensors", {name: tensors[name] for name in order})
    adopt(folder)
    assert verify_store(folder) == []
    latents, labels = LatentStore.open(folder).gather(np.arange(5), np.array([0, 1, 0, 1, 1], dtype=bool))
    np.testing.assert_array_equal(latents.numpy()[[0, 2]], tensors["latents"][[0, 2]])
    np.testing.assert_array_equal(latents.numpy()[[1, 3, 4]], tensors["latents_flip"][[1, 3, 4]])
    np.testing.assert_array_equal(labels.numpy(), tensors["labels"])


def write_by_hand(path: Path, tensors: Arrays) -> None:
    """Write tensors in the order given, wherever that puts them; the library sorts and aligns them."""
    names = {"float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
    fields, end = {}, 0
    for name, values in tensors.items():
        offsets = [end, end := end + values.nbytes]
        fields[name] = {"dtype": names[values.dtype.name], "shape": values.shape, "data_offsets": offsets}
    header = json.dumps(fields).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(v.tobytes() for v in tensors.values()))


def test_threads_and_block_sizes_change_nothing_but_the_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_set(tmp_path)
    manifests: list[StoreManifest] = []
    for threads in (1, 3, 8):
        manifests.append(adopt(tmp_path, threads=threads))
        (tmp_path / "manifest.json").unlink()
    assert manifests[0] == manifests[1] == manifests[2]
    monkeypatch.setattr(adopting, "BLOCK_BYTES", 1)
    rows = adopt(tmp_path)
    assert rows.shards == manifests[0].shards
    np.testing.assert_allclose(rows.channel_std, manifests[0].channel_std, rtol=1e-12)


def test_adopting_again_reads_no_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_set(tmp_path)
    manifest = adopt(tmp_path)
    monkeypatch.setattr(adopting, "_read", None)
    assert adopt(tmp_path) == manifest
    with pytest.raises(JLTError, match=r"with different arguments.*resolution: 32 -> 64.*remove its manifest\.json"):
        adopt(tmp_path, autoencoder_path="elsewhere/vae", resolution=64)
    with pytest.raises(JLTError, match=r"class_names: \['0', .*\] -> 11 values"):
        adopt(tmp_path, class_names=("cat", *"abcdefghij"))
    (tmp_path / "latents_rank01_shard000.safetensors").unlink()
    with pytest.raises(JLTError, match=r"damaged: .*rank01_shard000.safetensors is missing"):
        adopt(tmp_path)


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ([(0, 0), (0, 2)], "rank 0 shard 1 missing"),
        ([(0, 1), (1, 0)], "rank 0 shard 0 missing"),
        ([(0, 0), (2, 0), (2, 3)], "rank 1, rank 2 shard 1, rank 2 shard 2 missing"),
        ([(4, 0)], "rank 0, rank 1, rank 2 and more missing"),
        ([(0, 10**12)], "rank 0 shard 0, rank 0 shard 1, rank 0 shard 2 and more missing"),
    ],
)
def test_gaps_in_the_numbering_are_named(tmp_path: Path, numbers: list[tuple[int, int]], missing: str) -> None:
    for place in numbers:
        save(tmp_path, place, arrays(1, 0))
    with pytest.raises(JLTError, match=f"gaps: {missing}"):
        adopt(tmp_path)


def test_ranks_may_end_at_different_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_set(tmp_path)
    adopt(tmp_path)
    assert capsys.readouterr().err == ""  # both ranks wrote eight
    (tmp_path / "manifest.json").unlink()
    save(tmp_path, (1, 1), arrays(2, 9))
    adopt(tmp_path)
    assert "from 8 (rank 0) to 10" in capsys.readouterr().err


def test_repeated_latents_are_counted_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = save_set(tmp_path)
    padded = arrays(3, 5)
    padded["latents"][1:] = tensors[0]["latents"][:2]
    save(tmp_path, (0, 2), padded)
    assert adopt(tmp_path).count == 19
    assert "2 of 19 latents are exact copies of others" in capsys.readouterr().err


def set_of(change: Callable[[Arrays], object], **options: Any) -> Arrays:
    tensors = arrays(3, 7, **options)
    change(tensors)
    return tensors


def nan(tensors: Arrays) -> None:
    tensors["latents_flip"][2, 5, 1, 0] = np.nan


def infinite(tensors: Arrays) -> None:
    tensors["latents"][1, 0, 0, :] = (np.inf, -np.inf)


def negative(tensors: Arrays) -> None:
    tensors["labels"][1] = -1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (set_of(nan), r"latents_flip that are not finite, row 2 first"),
        (set_of(infinite), r"latents that are not finite, row 1 first"),
        (set_of(negative), r"labels from -1 to .*count from 0"),
        (set_of(lambda found: found.update(labels=found["labels"][:, None])), r"labels as I64 \(3, 1\)"),
        (set_of(lambda found: found.update(labels=found["labels"].astype(np.float32))), r"labels as F32"),
        (set_of(lambda found: found.pop("labels")), r"holds no labels"),
        (set_of(lambda found: found.update(latents_flip=found["latents_flip"][:2])), r"different shapes"),
        (set_of(lambda found: found.update({n: values[:0] for n, values in found.items()})), r"shape \(0, 128, 2, 2\)"),
        (set_of(lambda _: None, dtype="float64"), r"in F64: convert it first, to float16 or float32"),
        (set_of(lambda _: None, dtype="float32"), r"float32 latents.*but .*shard000.* float16 latents"),
        (set_of(lambda _: None, flips=False), r"without flips.*with flips"),
        (set_of(lambda _: None, shape=(128, 2, 3)), r"128x2x3.*128x2x2"),
        (set_of(lambda _: None, shape=(512,)), r"shape \(3, 512\)"),
    ],
)
def test_a_shard_that_does_not_fit_is_named(
    tmp_path: Path, tensors: Arrays, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopting, "BLOCK_BYTES", 2048)  # two latents
    save_set(tmp_path)
    path = save(tmp_path, (1, 1), tensors)
    with pytest.raises(JLTError, match=f"{path.name}.* {message}"):
        adopt(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_bfloat16_is_refused_by_name(tmp_path: Path) -> None:
    latents = torch.zeros(2, 128, 2, 2, dtype=torch.bfloat16)
    tensors = {"latents": latents, "labels": torch.zeros(2, dtype=torch.int64)}
    save_torch_file(tensors, tmp_path / "latents_rank0_shard0.safetensors")
    with pytest.raises(JLTError, match=r"rank0_shard0.*latents in bfloat16.*convert it first"):
        adopt(tmp_path)


@pytest.mark.parametrize(
    ("scale", "shift", "figures"), [(1.77, 0, "deviation is 1.7"), (1, 3, "mean 3"), (0.2, 0, "deviation is 0.2")]
)
def test_latents_that_are_not_normalised_are_refused(tmp_path: Path, scale: float, shift: float, figures: str) -> None:
    for shard in range(3):
        tensors = arrays(20, shard, flips=False)
        tensors["latents"] = (tensors["latents"] - 0.1) * np.float16(scale) + np.float16(shift)
        save(tmp_path, (0, shard), tensors)
    with pytest.raises(JLTError, match=rf"not normalised.*{figures}.*VA-VAE"):
        adopt(tmp_path)


def test_folders_with_nothing_or_too_much(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match="not a folder"):
        adopt(tmp_path / "nowhere")
    with pytest.raises(JLTError, match=r"no files named latents_rank0_shard0\.safetensors"):
        adopt(tmp_path)
    save_set(tmp_path)
    (tmp_path / "latents_stats.pt").write_bytes(b"never opened")
    (tmp_path / "._latents_rank09_shard000.safetensors").write_bytes(b"written by another operating system")
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"")
    with pytest.raises(JLTError, match=r"holds model\.safetensors, which is not a shard"):
        adopt(tmp_path)
    foreign.unlink()
    save(tmp_path, (1, 0), arrays(1, 1), "latents_rank{}_shard{}")
    with pytest.raises(JLTError, match="the same number"):
        adopt(tmp_path)
    (tmp_path / "latents_rank1_shard0.safetensors").unlink()
    adopt(tmp_path)


def test_things_named_like_shards(tmp_path: Path) -> None:
    save_set(tmp_path)
    odd = tmp_path / "latents_rank01_shard001.safetensors"
    odd.mkdir()
    with pytest.raises(JLTError, match="shard001.* is not a file"):
        adopt(tmp_path)
    odd.rmdir()
    os.mkfifo(odd)
    with pytest.raises(JLTError, match="shard001.* is not a file"):
        adopt(tmp_path)
    odd.unlink()
    odd.symlink_to(tmp_path / "nowhere")
    with pytest.raises(JLTError, match="shard001.* cannot be read"):
        adopt(tmp_path)
    odd.unlink()
    elsewhere = shutil.move(tmp_path / "latents_rank01_shard000.safetensors", tmp_path / "elsewhere.bin")
    (tmp_path / "latents_rank01_shard000.safetensors").symlink_to(elsewhere)
    assert adopt(tmp_path).count == 16
    assert verify_store(tmp_path) == []


def test_arguments_that_name_the_autoencoder(tmp_path: Path) -> None:
    save_set(tmp_path, shape=(32, 4, 4))
    with pytest.raises(JLTError, match=r"float16 latents of 32x4x4 with flips.*'flux2' does not make of 64 pixels"):
        adopt(tmp_path)
    with pytest.raises(UsageError, match="did you mean flux2"):
        adopt(tmp_path, "flux")
    with pytest.raises(UsageError, match="--autoencoder-path"):
        adopt(tmp_path, "kl")
    with pytest.raises(UsageError, match="no weights"):
        adopt(tmp_path, "pixels", "some/where")
    for resolution in (33, -32, 2):
        with pytest.raises(JLTError, match=f"does not make of {resolution} pixels"):
            adopt(tmp_path, "kl", "some/where", resolution)
    manifest = adopt(tmp_path, "kl", "some/where")
    assert (manifest.resolution, manifest.autoencoder["downsampling"]) == (32, 8)
    (tmp_path / "manifest.json").unlink()
    manifest = adopt(tmp_path, "kl", "some/where", 64)
    assert (manifest.resolution, manifest.autoencoder["downsampling"]) == (64, 16)
    assert (manifest.autoencoder["source"], manifest.autoencoder["channels"]) == ("some/where", 32)


def test_pixels_are_taken_as_they_are(tmp_path: Path) -> None:
    tensors = arrays(4, 0, flips=False, shape=(3, 8, 8))
    save(tmp_path, (0, 0), {**tensors, "latents": tensors["latents"] * np.float16(0.1)})
    assert adopt(tmp_path, "pixels").resolution == 8


def test_classes_by_name(tmp_path: Path) -> None:
    save_set(tmp_path)
    with pytest.raises(JLTError, match="labels from 0 to .*there are 3 class names"):
        adopt(tmp_path, class_names=("a", "b", "c"))
    names = tuple("abcdefghij")
    assert adopt(tmp_path, class_names=names).class_names == names
    assert LatentStore.open(tmp_path).shape.num_classes == 10


def test_a_wild_label_is_refused(tmp_path: Path) -> None:
    tensors = arrays(4, 0)
    tensors["labels"][2] = 2**50
    save(tmp_path, (0, 0), tensors)
    with pytest.raises(JLTError, match="largest label is 1125899906842624"):
        adopt(tmp_path)


def test_training_takes_an_adopted_store(tmp_path: Path) -> None:
    latents, rng = tmp_path / "latents", np.random.default_rng(0)
    for shard in range(3):
        tensors = arrays(16, shard, shape=(16, 4, 4))
        tensors["labels"] = rng.integers(0, 10, 16).astype(np.int32)
        save(latents, (0, shard), tensors)
    adopt(latents, "tiny", class_names=tuple("0123456789"))
    store = LatentStore.open(latents)
    config = resolve_recipe("digits", store.shape)
    train(dataclasses.replace(config, steps=2, batch_size=16), store, tmp_path / "run")
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.step == 2
    images = next(open_sampler(checkpoint, SampleConfig(num=2, steps=1)).batches()).images
    assert images.shape == (2, 32, 32, 3)
