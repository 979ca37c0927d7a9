"""Encoding: what is stored, interruption at any point, and everything that is refused."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from data_helpers import CONFIG, NoiseSource, PatchAutoencoder, expected_latents, file_bytes, make_store, noise_image
from image_zoo import write_zoo
from noise_source import LethalSource
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from jlt.autoencoders.load import load_autoencoder
from jlt.errors import JLTError
from jlt.images.registry import open_source
from jlt.images.source import Selected
from jlt.latents import encoding as encode_module
from jlt.latents import encoding_job as job_module
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode, encode_source
from jlt.latents.manifest import read_manifest
from jlt.latents.store import LatentStore, verify_store

COUNT = 37


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an encoding that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    make_store(folder)
    return file_bytes(folder)


def test_the_manifest_describes_the_store(tmp_path: Path) -> None:
    manifest = make_store(tmp_path / "store")
    assert manifest == read_manifest(tmp_path / "store")
    assert sorted(file_bytes(tmp_path / "store")) == [
        "manifest.json",
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]
    assert (manifest.resolution, manifest.count, manifest.flips, manifest.dtype) == (8, COUNT, True, "float32")
    assert manifest.autoencoder["normalisation"] == {"kind": "scale", "scale": 3**0.5}
    assert manifest.source == {"kind": "noise", "count": COUNT}
    values = np.array([expected_latents(i, flip) for i in range(COUNT) for flip in (False, True)])
    np.testing.assert_allclose(manifest.channel_mean, values.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(manifest.channel_std, values.std((0, 2, 3)), rtol=1e-6)
    assert manifest.std == pytest.approx(values.std(), rel=1e-6)


def test_float16_rounds_once(tmp_path: Path) -> None:
    make_store(tmp_path / "store", dtype="float16")
    latents, _ = LatentStore.open(tmp_path / "store").gather(np.arange(COUNT))
    assert latents.dtype == torch.float16
    # Half a unit in the last place at values up to 2 is 2^-11.
    np.testing.assert_allclose(latents.numpy(), [expected_latents(i) for i in range(COUNT)], atol=2**-11 + 1e-6)


def test_shard_and_batch_sizes_leave_the_latents_as_they_are(tmp_path: Path) -> None:
    for number, (batch_size, shard_size) in enumerate([(1, 37), (64, 100), (5, 1)]):
        folder = tmp_path / str(number)
        make_store(folder, batch_size=batch_size, shard_size=shard_size)
        latents, labels = LatentStore.open(folder).gather(np.arange(COUNT))
        np.testing.assert_allclose(latents.numpy(), [expected_latents(i) for i in range(COUNT)], atol=1e-6)
        np.testing.assert_array_equal(labels.numpy(), np.arange(COUNT) % 3)


def test_the_digits_as_pixels_through_the_registry(tmp_path: Path) -> None:
    config = EncodeConfig("digits", "pixels", resolution=8, batch_size=64, flips=False)
    manifest = encode(config, tmp_path / "store")
    assert (manifest.count, manifest.channels, manifest.height) == (1797, 3, 8)
    store = LatentStore.open(tmp_path / "store")
    latents, labels = store.gather(np.array([0, 1796]))
    digits = load_digits()
    grey = np.rint(digits.images[[0, 1796]] * 255 / 16) / 127.5 - 1
    np.testing.assert_allclose(latents.float().numpy(), np.repeat(grey[:, None], 3, axis=1), atol=1e-3)
    np.testing.assert_array_equal(labels.numpy(), digits.target[[0, 1796]])
    # Pixels are exempt from the check of their scale, which is 0.75 for digits and may be anything.
    assert manifest.autoencoder["normalisation"] == {"kind": "none"}


def test_the_same_command_on_a_finished_store_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_store(tmp_path / "store")
    monkeypatch.setattr(PatchAutoencoder, "encode", None)
    assert make_store(tmp_path / "store") == first


class Stopped(Exception):
    """Any event that ends the process at a chosen point."""


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    owner: object = encode_module,
    name: str = "write_manifest",
    source: NoiseSource | None = None,
    config: EncodeConfig = CONFIG,
) -> None:
    """Encode until a function is called, by default the one that completes the store."""

    def stop(*args: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Stopped):
            encode_source(source or NoiseSource(COUNT), PatchAutoencoder(), config, folder)


@pytest.mark.parametrize(
    ("function", "call"),
    [("encode.sha256_file", 1), ("encode.sha256_file", 4), ("encode.write_manifest", 1), ("encode.write_text", 1)]
    + [("job.write_text", call) for call in range(1, 5)]
    + [("rmtree", 1)],
)
def test_interrupted_between_any_two_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], function: str, call: int
) -> None:
    module, _, name = function.rpartition(".")
    owner = {"": shutil, "encode": encode_module, "job": job_module}[module]
    original, calls = getattr(owner, name), 0

    def interrupted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(Stopped):
            make_store(tmp_path / "store")
    make_store(tmp_path / "store")
    assert file_bytes(tmp_path / "store") == whole


def test_resuming_keeps_intact_shards_and_makes_the_others_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "store"
    interrupt(monkeypatch, folder)
    with pytest.raises(JLTError, match="unfinished"):
        LatentStore.open(folder)
    damaged, lost = folder / "shard-00001.safetensors", folder / "shard-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    lost.unlink()
    (folder / ".encoding" / "shard-00003.json").write_text("{")
    (folder / ".shard-00002.2147483647.partial.safetensors").write_bytes(b"left by a killed process")
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    make_store(folder)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    assert file_bytes(folder) == whole
    printed = capsys.readouterr().err
    assert "1 of 4 shards are already complete" in printed
    assert "shard-00001.safetensors or its entry in .encoding is damaged" in printed


# As make_store, and slowly enough to be hit anywhere.
SLOWLY = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from data_helpers import CONFIG, NoiseSource, PatchAutoencoder, encode_source
source, autoencoder = NoiseSource(37), PatchAutoencoder(delay=0.02)
Path(sys.argv[2]).touch()
encode_source(source, autoencoder, CONFIG, Path(sys.argv[1]))
sys.exit()
"""


@pytest.mark.slow
def test_killed_again_and_again_the_store_is_byte_for_byte_the_same(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder, rng, kills = tmp_path / "store", random.Random(0), 0
    for attempt in range(12):
        ready = tmp_path / f"ready{attempt}"
        child = forked.start([str(folder), str(ready)], plant=SLOWLY)
        while not ready.exists() and child.poll() is None:
            time.sleep(0.005)
        # The last attempts are left alone, so that the test ends on any machine.
        if attempt < 5:
            time.sleep(rng.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
        child.wait(timeout=120)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        kills += 1
        assert not (folder / "manifest.json").exists() or verify_store(folder) == []
    assert kills >= 2
    make_store(folder)
    assert file_bytes(folder) == whole


def test_different_arguments_on_the_same_folder_are_refused_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for finished in (True, False):
        folder = tmp_path / str(finished)
        make_store(folder) if finished else interrupt(monkeypatch, folder)
        before = file_bytes(folder)
        with pytest.raises(JLTError, match=r"dtype: 'float32' -> 'float16'; encoding.batch_size: 4 -> 8\)"):
            make_store(folder, dtype="float16", batch_size=8)
        with pytest.raises(JLTError, match=r"source.count: 37 -> 36\)"):
            make_store(folder, count=36)
        with pytest.raises(JLTError, match=r"autoencoder.normalisation.scale: 1.73.* -> 1.5\)"):
            encode_source(NoiseSource(COUNT), PatchAutoencoder(scale=1.5), CONFIG, folder)
        assert file_bytes(folder) == before


def test_foreign_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JLTError, match="other files"):
        make_store(tmp_path)
    with pytest.raises(JLTError, match="is a file"):
        make_store(tmp_path / "notes.txt")
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(JLTError, match="no hash of itself|schema version"):
        make_store(tmp_path)
    assert file_bytes(tmp_path) == {"notes.txt": b"mine", "manifest.json": b'{"name": "a web page"}'}


def test_two_encodings_into_one_folder(tmp_path: Path) -> None:
    def encode_again(latents: torch.Tensor) -> torch.Tensor:
        with pytest.raises(JLTError, match="Another process"):
            make_store(tmp_path / "store")
        return latents

    encode_source(NoiseSource(COUNT), PatchAutoencoder(change=encode_again), CONFIG, tmp_path / "store")
    assert verify_store(tmp_path / "store") == []


@pytest.mark.parametrize(("scale", "measured"), [(1.77 * 3**0.5, "1.7"), (0.4, "0.2")])
def test_latents_that_are_not_normalised_are_refused_with_figures(tmp_path: Path, scale: float, measured: str) -> None:
    with pytest.raises(JLTError, match=rf"not normalised. Their standard deviation is {measured}.*0.5 to 1.5"):
        encode_source(NoiseSource(COUNT), PatchAutoencoder(scale), CONFIG, tmp_path / "several")
    one_shard = dataclasses.replace(CONFIG, shard_size=COUNT)
    with pytest.raises(JLTError, match="not normalised"):
        encode_source(NoiseSource(COUNT), PatchAutoencoder(scale), one_shard, tmp_path / "store")
    assert not list((tmp_path / "store").glob("*.safetensors"))
    # No shard was finished, so the folder accepts the corrected arguments.
    make_store(tmp_path / "store")


def test_only_a_codec_without_normalisation_is_exempt(tmp_path: Path) -> None:
    encode_source(NoiseSource(COUNT), PatchAutoencoder(0.1, kind="none"), CONFIG, tmp_path / "store")
    assert LatentStore.open(tmp_path / "store").manifest.std < 0.1


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e5, "float16")])
def test_latents_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, dtype: str) -> None:
    batches = itertools.count(1)

    def break_second(latents: torch.Tensor) -> torch.Tensor:
        if next(batches) == 2:
            latents[1, 5, 0, 0] = value
        return latents

    config = dataclasses.replace(CONFIG, flips=False, dtype=dtype)
    with pytest.raises(JLTError, match=rf"noise/5.png are not finite in {dtype}: 1 of 192 values"):
        encode_source(NoiseSource(COUNT), PatchAutoencoder(change=break_second), config, tmp_path / "store")


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match=r"noise/23.png.*floating-point"):
        encode_source(NoiseSource(COUNT, bad=[23]), PatchAutoencoder(), CONFIG, tmp_path / "noise")
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    Image.new("RGB", (9, 8), "red").save(images / "1.png")
    (images / "2.png").write_bytes((images / "1.png").read_bytes()[:40])
    config = dataclasses.replace(CONFIG, images=str(images.parent), autoencoder="pixels")
    with pytest.raises(JLTError, match=r"a/2.png is of no image format"):
        encode(config, tmp_path / "folder")
    Image.new("RGB", (9, 8), "red").save(images / "2.png")
    assert encode(config, tmp_path / "folder").count == 2


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match="10 is not a multiple of 4"):
        make_store(tmp_path / "store", resolution=10)
    with pytest.raises(JLTError, match="batch_size must be from 1"):
        make_store(tmp_path / "store", batch_size=0)
    with pytest.raises(JLTError, match="did you mean pixels"):
        encode(EncodeConfig("digits", "pixel"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_shards_hold_where_their_latents_come_from(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    index = np.concatenate([load_file(path)["index"] for path in sorted((tmp_path / "store").glob("*.safetensors"))])
    np.testing.assert_array_equal(index, np.arange(COUNT))


def test_the_first_of_many_shards_is_judged_before_the_rest_is_made(tmp_path: Path) -> None:
    batches: list[int] = []
    autoencoder = PatchAutoencoder(0.4, delay=0.01, change=lambda latents: (batches.append(len(latents)), latents)[1])
    config = dataclasses.replace(CONFIG, batch_size=64, shard_size=256, flips=False)
    with pytest.raises(JLTError, match="not normalised"):
        encode_source(NoiseSource(6000), autoencoder, config, tmp_path / "store")
    # All latents would fit into the queue, and yet the failure of the writer is noticed at once.
    assert sum(batches) < 1500


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_listed_on_request(tmp_path: Path, workers: int) -> None:
    # A whole shard (10-19), a whole batch (20-23), the first and the last image.
    bad = [0, *range(10, 20), *range(20, 24), 31, 36]
    config = dataclasses.replace(CONFIG, on_bad_image="skip", workers=workers)
    manifest = encode_source(NoiseSource(COUNT, bad), PatchAutoencoder(), config, tmp_path / "store")
    good = [index for index in range(COUNT) if index not in bad]
    assert [image.index for image in manifest.skipped] == bad
    assert manifest.skipped[0].image == "noise/0.png"
    assert "floating-point" in manifest.skipped[0].reason
    assert (manifest.count, len(manifest.shards)) == (len(good), 3)
    assert verify_store(tmp_path / "store") == []
    store = LatentStore.open(tmp_path / "store")
    for flip in (False, True):
        latents, labels = store.gather(np.arange(len(good)), np.full(len(good), flip))
        np.testing.assert_allclose(latents.numpy(), [expected_latents(i, flip) for i in good], atol=1e-6)
        np.testing.assert_array_equal(labels.numpy(), np.array(good) % 3)
    index = np.concatenate([load_file(path)["index"] for path in sorted((tmp_path / "store").glob("*.safetensors"))])
    np.testing.assert_array_equal(index, good)
    # A shard that lost rows is the same file as one that never had them, but for the positions.
    values = np.array([expected_latents(i, flip) for i in good for flip in (False, True)])
    assert manifest.std == pytest.approx(values.std(), rel=1e-6)


def test_an_encoding_that_stopped_at_a_bad_image_resumes_without_it(tmp_path: Path) -> None:
    source = NoiseSource(COUNT, [23])
    with pytest.raises(JLTError, match=r"noise/23.png .*floating-point.*--on-bad-image skip"):
        encode_source(source, PatchAutoencoder(), CONFIG, tmp_path / "store")
    skipping = dataclasses.replace(CONFIG, on_bad_image="skip")
    encode_source(source, PatchAutoencoder(), skipping, tmp_path / "store")
    encode_source(source, PatchAutoencoder(), skipping, tmp_path / "whole")
    assert file_bytes(tmp_path / "store") == file_bytes(tmp_path / "whole")


def test_skipped_images_are_reported_when_an_encoding_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = NoiseSource(COUNT, [3])
    skipping = dataclasses.replace(CONFIG, on_bad_image="skip")
    interrupt(monkeypatch, tmp_path / "store", source=source, config=skipping)
    with pytest.raises(JLTError, match=r"earlier attempt skipped noise/3.png"):
        encode_source(source, PatchAutoencoder(), CONFIG, tmp_path / "store")
    encode_source(source, PatchAutoencoder(), skipping, tmp_path / "store")
    with pytest.raises(JLTError, match=r"earlier attempt skipped noise/3.png"):
        encode_source(source, PatchAutoencoder(), CONFIG, tmp_path / "store")


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, on_bad_image="skip")
    with pytest.raises(JLTError, match="None of the 12 images"):
        encode_source(NoiseSource(12, range(12)), PatchAutoencoder(), config, tmp_path / "store")


def test_worker_processes_make_the_same_store(tmp_path: Path, whole: dict[str, bytes]) -> None:
    make_store(tmp_path / "store", workers=3)
    assert file_bytes(tmp_path / "store") == whole


def test_a_killed_worker_process_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(JLTError, match="killed it for lack of memory"):
        encode_source(LethalSource(COUNT), PatchAutoencoder(), dataclasses.replace(CONFIG, workers=2), tmp_path / "s")


def some_digits() -> Selected:
    return Selected(open_source("digits"), np.arange(300))


def test_bfloat16_is_autocast_and_is_in_the_manifest(tmp_path: Path) -> None:
    config = EncodeConfig("digits", "tiny", resolution=32, batch_size=256, flips=False, dtype="float32")
    tiny = load_autoencoder("tiny")
    exact = encode_source(some_digits(), tiny, config, tmp_path / "float32")
    rounding = dataclasses.replace(config, precision="bfloat16")
    rounded = encode_source(some_digits(), tiny, rounding, tmp_path / "bfloat16")
    assert (exact.encoding or {})["precision"] == "float32"
    assert (rounded.encoding or {})["precision"] == "bfloat16"
    one, other = (LatentStore.open(tmp_path / name).gather(np.arange(300))[0] for name in ("float32", "bfloat16"))
    error = (one - other).square().mean().sqrt().item()
    # A rounding to 8 bits per layer; equal latents would mean that nothing was cast.
    assert 1e-4 < error < 0.05
    with pytest.raises(JLTError, match="encoding.precision: 'bfloat16' -> 'float32'"):
        encode_source(some_digits(), tiny, config, tmp_path / "bfloat16")


def test_a_preview_shows_originals_over_reconstructions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "store", preview=True)
    with Image.open(tmp_path / "store" / "preview.png") as sheet:
        pixels = np.array(sheet.convert("RGB"))
    # The codec loses nothing, so both rows show the images themselves, enlarged 20 times, at 1 level of rounding.
    originals = [np.kron(noise_image(index), np.ones((20, 20, 1))) for index in (0, 36)]
    found = [
        (row, column)
        for original in originals
        for row in range(0, pixels.shape[0] - 160)
        for column in (12, 12 + 7 * 164)
        if np.abs(pixels[row : row + 160, column : column + 160].astype(int) - original).max() <= 1
    ]
    assert [column for _, column in found] == [12, 12, 12 + 7 * 164, 12 + 7 * 164]
    assert found[1][0] - found[0][0] == 164
    assert "8 images above their reconstructions" in capsys.readouterr().err
    assert verify_store(tmp_path / "store") == []


def test_a_damaged_store_is_repaired_in_place(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    make_store(folder)
    flipped, lost = folder / "shard-00001.safetensors", folder / "shard-00003.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    lost.unlink()
    with pytest.raises(JLTError, match=r"shard-00003.safetensors is missing.*--repair"):
        make_store(folder)
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    make_store(folder, repair=True)
    assert file_bytes(folder) == whole
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched


def test_a_repair_that_gives_other_bytes_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    make_store(folder)
    damaged = folder / "shard-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    before = file_bytes(folder)
    config = dataclasses.replace(CONFIG, repair=True)
    drifted = PatchAutoencoder(change=lambda latents: latents * (1 + 2**-20))
    with pytest.raises(JLTError, match=r"shard-00001.safetensors is left as it is.*new folder"):
        encode_source(NoiseSource(COUNT), drifted, config, folder)
    assert file_bytes(folder) == before


def test_a_disk_that_is_too_small_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 37 images in two orientations of 48 x 2 x 2 float32 numbers: 57 kB.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 50_000))
    with pytest.raises(JLTError, match=r"missing latents take 0.1 MB in .*, and only 0.1 MB are free"):
        make_store(tmp_path / "store")


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_every_kind_of_image(tmp_path: Path, exif: str, workers: int) -> None:
    animals = write_zoo(tmp_path / "zoo")
    config = EncodeConfig(
        str(tmp_path / "zoo"), "pixels", resolution=32, batch_size=5, shard_size=8, flips=False, dtype="float32"
    )
    config = dataclasses.replace(config, exif=exif, workers=workers)
    with pytest.raises(JLTError, match=r"zoo/bad/empty.jpg holds no bytes"):
        encode(config, tmp_path / "store")
    manifest = encode(dataclasses.replace(config, on_bad_image="skip"), tmp_path / "store")
    listed = {Path(image.image).relative_to(tmp_path / "zoo").as_posix(): image.reason for image in manifest.skipped}
    assert sorted(listed) == [name for name, animal in animals.items() if animal.reason]
    assert all(animals[name].reason in reason for name, reason in listed.items())
    assert (manifest.encoding or {})["exif"] == exif
    good = {name: animal for name, animal in animals.items() if not animal.reason}
    latents, labels = LatentStore.open(tmp_path / "store").gather(np.arange(len(good)))
    for latent, label, (name, animal) in zip(latents, labels.tolist(), good.items(), strict=True):
        assert manifest.class_names[label] == name.partition("/")[0]
        pixels = (latent.permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(pixels - animal.crop(exif)).max() <= animal.tolerance + 1e-3, name


def test_threads_are_part_of_the_arguments_and_nothing_else_decides_their_number(tmp_path: Path) -> None:
    config = EncodeConfig("digits", "tiny", resolution=32, shard_size=150, flips=False, dtype="float32")
    before = torch.get_num_threads()
    stores = {}
    for environment, threads in ((1, 2), (2, 2), (2, 1)):
        torch.set_num_threads(environment)
        folder = tmp_path / f"{environment}-{threads}"
        config = dataclasses.replace(config, threads=threads)
        manifest = encode_source(some_digits(), load_autoencoder("tiny"), config, folder)
        assert torch.get_num_threads() == environment
        assert (manifest.encoding or {})["threads"] == threads
        stores[environment, threads] = file_bytes(folder)
    torch.set_num_threads(before)
    assert stores[1, 2] == stores[2, 2]
    assert stores[2, 1]["manifest.json"] != stores[2, 2]["manifest.json"]


def test_the_manifest_names_device_and_versions(tmp_path: Path) -> None:
    (made_with,) = make_store(tmp_path / "store").made_with
    assert made_with["torch"] == torch.__version__
    assert made_with["device"].startswith("cpu ")


def test_a_store_resumed_on_another_machine_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, tmp_path / "store")
    (tmp_path / "store" / "shard-00002.safetensors").unlink()
    elsewhere = {"device": "another", "torch": "0", "pillow": "0"}
    with monkeypatch.context() as patch:
        patch.setattr(job_module.EncodingJob, "made_with", lambda self: elsewhere)
        manifest = make_store(tmp_path / "store")
    assert len(manifest.made_with) == 2
    assert elsewhere in manifest.made_with


def test_a_shard_of_abandoned_arguments_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is killed between renaming a shard and saving its facts; then the arguments change."""
    interrupt(monkeypatch, tmp_path / "store", job_module.EncodingJob, "save_facts")
    stray = tmp_path / "store" / "shard-00003.safetensors"
    stray.write_bytes((tmp_path / "store" / "shard-00000.safetensors").read_bytes())
    make_store(tmp_path / "store", shard_size=COUNT)
    assert verify_store(tmp_path / "store") == []


def test_a_repair_reports_what_it_cannot_repair(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    make_store(folder)
    (folder / "shard-00009.safetensors").write_bytes(b"of another program")
    (folder / ".shard-00001.2147483647.partial.safetensors").write_bytes(b"left by a killed repair")
    for repair in (False, True):
        with pytest.raises(JLTError, match=r"shard-00009.safetensors is not in the manifest"):
            make_store(folder, repair=repair)
    assert not list(folder.glob(".shard-*"))


def test_a_store_inside_its_images_is_refused(tmp_path: Path) -> None:
    write_zoo(tmp_path / "zoo")
    with pytest.raises(JLTError, match="is inside the folder of images"):
        encode(EncodeConfig(str(tmp_path / "zoo"), "pixels", resolution=32), tmp_path / "zoo" / "latents")
    assert not (tmp_path / "zoo" / "latents").exists()


def test_shards_without_a_manifest_are_not_other_files(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(JLTError, match="without its manifest"):
        make_store(tmp_path / "store")


def test_a_preview_looks_on_where_all_its_picks_are_bad(tmp_path: Path) -> None:
    picks = sorted({round(place) for place in np.linspace(0, COUNT - 1, 8)})
    config = dataclasses.replace(CONFIG, preview=True, on_bad_image="skip")
    encode_source(NoiseSource(COUNT, picks), PatchAutoencoder(), config, tmp_path / "store")
    assert (tmp_path / "store" / "preview.png").is_file()


def test_a_preview_far_below_the_stated_psnr_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_zoo(tmp_path / "zoo")
    config = EncodeConfig(str(tmp_path / "zoo"), "tiny", resolution=32, preview=True, on_bad_image="skip", workers=0)
    encode(config, tmp_path / "store")
    assert "not trained for these images" in capsys.readouterr().err
