"""Samples on disk: exactly the requested ones, with any files there before; images that are read back or refused."""

import copy
import dataclasses
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import Trap, file_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jlt.autoencoders.load import load_autoencoder
from jlt.config import SampleConfig
from jlt.errors import JLTError
from jlt.evaluation.image_files import open_images
from jlt.experiments.recipes import resolve_recipe
from jlt.images.contact_sheet import GAP, MARGIN, SheetText, draw_sheet
from jlt.images.digits import Digits
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.store import LatentStore
from jlt.sampling import save
from jlt.sampling.sampler import ImageSampler, LatentSampler, open_sampler
from jlt.sampling.save import save_samples
from jlt.storage import rows
from jlt.storage.folders import lock_folder
from jlt.timesteps import sampling_grid
from jlt.training.checkpoint import open_checkpoint
from jlt.training.loop import train

CONFIG = SampleConfig(num=23, batch_size=5, steps=3, cfg_scale=1.5)


class FewDigits(Digits):
    """The first digits of the bundled set."""

    def __len__(self):
        return 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of the digits recipe after some steps, so that what it draws depends on noise, time and label."""
    folder = tmp_path_factory.mktemp("samples")
    encoding = EncodeConfig(images="digits", autoencoder="tiny", resolution=32, flips=False)
    encode_source(FewDigits(), load_autoencoder("tiny"), encoding, folder / "latents")
    store = LatentStore.open(folder / "latents")
    config = dataclasses.replace(resolve_recipe("digits", store.shape), steps=60, batch_size=16, checkpoint_every=30)
    train(config, store, folder / "run")
    return open_checkpoint(folder / "run")


@pytest.fixture
def sampler(checkpoint):
    def make(**changes):
        return open_sampler(checkpoint, dataclasses.replace(CONFIG, **changes))

    return make


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> Path:
    """What an undisturbed sampling leaves; tests must not change it."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    save_samples(open_sampler(checkpoint, CONFIG), folder, "png")
    return folder


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def stack(folder: Path) -> np.ndarray:
    return np.concatenate([images.numpy() for images, _ in open_images(folder).batches(7)])


# ---- drawing into a folder ----


def test_exactly_the_requested_number_of_images_where_batches_and_classes_do_not_divide(whole):
    names = visible(whole)
    assert names == [*(f"{index:06d}.png" for index in range(23)), "protocol.json"]
    images = stack(whole)
    assert (images.shape, images.dtype) == ((23, 32, 32, 3), np.uint8)
    # Each is an image of its own.
    assert len({image.tobytes() for image in images}) == 23


@pytest.mark.parametrize("batch_size", [1, 7, 23, 64])
def test_image_i_is_the_same_for_any_batch_size(sampler, whole, tmp_path, batch_size):
    """Products of other shapes round otherwise, which may move a pixel across the border of its level."""
    written = save_samples(sampler(batch_size=batch_size), tmp_path / "samples.d", "png")
    assert visible(written) == visible(whole)
    difference = stack(written).astype(int) - stack(whole)
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3


def test_autoguidance_from_an_earlier_checkpoint_and_from_other_weights(checkpoint, sampler, whole, tmp_path):
    earlier = str(checkpoint.folder.with_name("step_0000030"))
    ways = {"earlier": {"autoguide": earlier}, "raw": {"autoguide_ema": "none"}}
    for name, way in ways.items():
        guided = sampler(num=9, **way)
        images = stack(save_samples(guided, tmp_path / name, "png"))
        assert not np.array_equal(images, stack(whole)[:9]), name
        folder = Path(earlier) if name == "earlier" else checkpoint.folder
        assert guided.protocol()["autoguide"]["checkpoint"] == open_checkpoint(folder).sha256
        again = stack(save_samples(sampler(num=9, **way), tmp_path / f"{name} again", "png"))
        assert np.array_equal(again, images)
        # Where the guide has no effect, it leaves the image as it is.
        off = sampler(num=2, cfg_interval=(0.999, 1.0), **way)
        plain = sampler(num=2, cfg_interval=(0.999, 1.0))
        assert torch.equal(next(off.latent_sampler.batches()).latents, next(plain.latent_sampler.batches()).latents)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"autoguide_ema": "0.99"}, "cannot guide itself"),
        ({"autoguide_ema": "0.98"}, "There is no EMA"),
        ({"autoguide_ema": "none", "cfg_scale": 1.0}, "no effect at cfg_scale 1"),
        ({"autoguide": "nowhere"}, "nowhere"),
    ],
)
def test_guides_that_cannot_be_are_refused(sampler, way, message):
    with pytest.raises(JLTError, match=message):
        sampler(**way)


def test_image_i_is_the_same_for_any_count(sampler, whole, tmp_path):
    fewer = stack(save_samples(sampler(num=9), tmp_path / "fewer", "png"))
    assert np.array_equal(fewer, stack(whole)[:9])


def test_image_i_depends_on_seed_label_and_weights(sampler, whole, tmp_path):
    first = stack(whole)[0]
    for name, change in {"seed": {"seed": 1}, "label": {"labels": "7"}, "ema": {"ema": "none"}}.items():
        other = stack(save_samples(sampler(num=1, **change), tmp_path / name, "png"))[0]
        assert not np.array_equal(other, first), name


def test_formats_hold_the_same_images(sampler, whole, tmp_path):
    images = stack(whole)
    array = save_samples(sampler(), tmp_path / "npz", "npz")
    with np.load(array, allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], images)
        assert file["arr_1"].tolist() == [index % 10 for index in range(23)]
    with Image.open(save_samples(sampler(), tmp_path / "grid", "grid")) as grid:
        text = SheetText(captions=[str(index % 10) for index in range(23)])
        assert np.array_equal(np.asarray(grid), np.asarray(draw_sheet(images, 5, text, min_side=96)))
    for folder in ("npz", "grid"):
        assert len(visible(tmp_path / folder)) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"num": 22}, "count: 23 -> 22"),
        ({"solver": "euler"}, "solver: 'heun' -> 'euler'"),
        ({"cfg_interval": (0.1, 1.0)}, "cfg_interval"),
        ({"ema": "none"}, "ema: '0.99' -> 'none'"),
        ({"form": "npz"}, "format: 'png' -> 'npz'"),
    ],
)
def test_images_of_another_protocol_are_refused_and_left(sampler, tmp_path, change, named):
    form = change.get("form", "png")
    change = {key: value for key, value in change.items() if key != "form"}
    out = save_samples(sampler(), tmp_path / "out", "png")
    before = file_bytes(out)
    with pytest.raises(JLTError, match=named):
        save_samples(sampler(**change), out, form)
    assert file_bytes(out) == before


def test_images_of_another_checkpoint_are_refused(checkpoint, sampler, tmp_path):
    out = save_samples(sampler(), tmp_path / "out", "png")
    earlier = open_checkpoint(checkpoint.folder.with_name("step_0000030"))
    with pytest.raises(JLTError, match="checkpoint: "):
        save_samples(open_sampler(earlier, CONFIG), out, "png")


def recording(sampler, sizes: list[int], batches: int = 1000):
    """The sampler; it lists how many images it decodes at a time, and stops after some batches, as by a kill."""
    autoencoder = copy.copy(sampler.autoencoder)

    def decode(latents):
        if len(sizes) == batches:
            raise KeyboardInterrupt
        sizes.append(len(latents))
        return sampler.autoencoder.decode(latents)

    autoencoder.decode = decode
    return dataclasses.replace(sampler, autoencoder=autoencoder)


def interrupted(sampler, out: Path, form: str = "png") -> None:
    """Leave what a sampling that is interrupted after two batches leaves."""
    with pytest.raises(KeyboardInterrupt):
        save_samples(recording(sampler, [], batches=2), out, form)


def test_the_same_command_completes_an_interrupted_folder(sampler, whole, tmp_path):
    out = tmp_path / "out"
    interrupted(sampler(), out)
    assert len(list(out.glob("*.png"))) == 10
    (out / "000003.png").unlink()
    save_samples(sampler(), out, "png")
    assert file_bytes(out) == file_bytes(whole)
    save_samples(sampler(batch_size=4), out, "png")
    assert file_bytes(out) == file_bytes(whole)


@pytest.mark.parametrize("form", ["npz", "grid"])
def test_an_interrupted_array_or_grid_is_absent_rather_than_short_and_is_continued(sampler, tmp_path, form):
    out, undisturbed = tmp_path / "out", save_samples(sampler(), tmp_path / "undisturbed", form)
    interrupted(sampler(), out, form)
    assert not list(out.glob("[!.]*.npz")) + list(out.glob("[!.]*.png"))
    # Three of five batches are left, and one that holds a row which was damaged since.
    rows = (out / ".images.rows").read_bytes()
    (out / ".images.rows").write_bytes(rows[:7] + b"\0" * 40 + rows[47:])
    written = []
    assert save_samples(recording(sampler(), written), out, form).read_bytes() == undisturbed.read_bytes()
    assert written == [5, 5, 5, 3]
    assert visible(out) == visible(undisturbed.parent)


def test_a_folder_is_completed_to_more_images(sampler, whole, tmp_path):
    out = save_samples(sampler(num=9), tmp_path / "out", "png")
    save_samples(sampler(), out, "png")
    assert file_bytes(out) == file_bytes(whole)


def test_a_foreign_image_is_refused(sampler, tmp_path):
    out = save_samples(sampler(num=9), tmp_path / "out", "png")
    (out / "extra.jpg").write_bytes((out / "000008.png").read_bytes())
    with pytest.raises(JLTError, match="holds extra.jpg, which is none of the 9 images"):
        save_samples(sampler(num=9), out, "png")


def test_an_array_and_its_images_need_room_before_the_first(sampler, tmp_path, monkeypatch):
    drawing = sampler(num=9)
    left = [int(1.5 * 9 * 3 * drawing.resolution**2)]
    reserve = rows._reserve

    def take(path, size):
        left[0] -= size
        reserve(path, size)

    monkeypatch.setattr(rows, "_reserve", take)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=left[0]))
    monkeypatch.setattr(ImageSampler, "batches", lambda *arguments: pytest.fail("an image was drawn"))
    with pytest.raises(JLTError, match=r"9 images take .* make room first"):
        save_samples(drawing, tmp_path / "out", "npz")


def test_a_compiled_network_sees_batches_of_one_size(sampler, monkeypatch):
    plain, seen = [batch.images for batch in sampler(num=9, batch_size=4).batches()], []
    drawing, batches = sampler(num=9, batch_size=4), LatentSampler.batches
    compiled = dataclasses.replace(drawing, config=dataclasses.replace(drawing.config, compile=True))
    monkeypatch.setattr(LatentSampler, "batches", lambda self, numbers: batches(self, seen.extend(numbers) or numbers))
    filled = list(compiled.batches())
    assert [len(part) for part in seen] == [4, 4, 4]
    assert [len(batch.labels) for batch in filled] == [4, 4, 1]
    assert all((a.images.int() - b.int()).abs().max() <= 1 for a, b in zip(filled, plain, strict=True))


def test_an_image_beyond_the_last_is_refused(sampler, tmp_path):
    out = save_samples(sampler(num=9), tmp_path / "out", "png")
    (out / "000009.png").write_bytes((out / "000008.png").read_bytes())
    with pytest.raises(JLTError, match="holds 000009.png, which is none of the 9 images"):
        save_samples(sampler(num=9), out, "png")


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_disk_without_room_is_refused_before_the_first_image(sampler, tmp_path, monkeypatch, form):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10_000))
    drawn = []
    with pytest.raises(JLTError, match="make room first"):
        save_samples(recording(sampler(), drawn), tmp_path / "out", form)
    assert drawn == []


def test_two_writers_do_not_share_a_folder(sampler, tmp_path):
    out = save_samples(sampler(num=3), tmp_path / "out", "png")
    with lock_folder(out), pytest.raises(JLTError, match="Another process is writing"):
        save_samples(sampler(num=4), out, "png")


def test_an_image_records_its_label_and_the_source_of_its_class(whole):
    with Image.open(whole / "000013.png") as image:
        assert {key: image.text[key] for key in ("label", "classes")} == {"label": "3", "classes": "digits"}


def test_what_a_kill_leaves_half_written_is_no_image(sampler, whole, tmp_path):
    """A process that was killed while it wrote an image has left its temporary file."""
    out = tmp_path / "out"
    interrupted(sampler(), out)
    (out / ".000010.2147483647.partial.png").write_bytes((whole / "000010.png").read_bytes()[:100])
    save_samples(sampler(), out, "png")
    assert np.array_equal(stack(out), stack(whole))


# ---- pictures ----


def test_a_strip_ends_with_the_image_and_an_interpolation_begins_with_it(sampler, whole):
    drawing, images = sampler(num=5, batch_size=5), stack(whole).astype(int)
    strip = save._strip(drawing, range(4))
    assert strip.shape[:2] == (4, len(sampling_grid(drawing.config)))
    assert abs(strip[:, -1] - images[:4]).max() <= 1
    between = save._interpolation(drawing, range(4))
    assert between.shape[:2] == (2, save.COLUMNS)
    assert abs(between[:, 0] - images[:4:2]).max() <= 1


def test_a_picture_is_drawn_of_two_checkpoints(checkpoint, sampler, tmp_path):
    config = dataclasses.replace(CONFIG, num=4, batch_size=2)
    checkpoints = checkpoint, open_checkpoint(checkpoint.folder.with_name("step_0000030"))
    samplers = [open_sampler(one, config) for one in checkpoints]
    for kind in save.TITLES:
        written = save.save_picture(samplers, tmp_path / kind, kind, ["later", "earlier"])
        with Image.open(written) as picture:
            assert picture.size[0] > 4 * 96
    with pytest.raises(JLTError, match="must be even"):
        save.save_picture([sampler(num=3)], tmp_path / "odd", "interpolation")


# ---- the sheet ----


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), columns=st.integers(1, 5), side=st.integers(1, 4), enlarged=st.integers(1, 3))
def test_a_sheet_holds_each_image_in_its_place_and_nothing_else(n, columns, side, enlarged):
    images = np.random.default_rng(n).integers(0, 200, (n, side, side, 3), dtype=np.uint8)
    sheet = np.asarray(draw_sheet(images, columns, min_side=enlarged * side))
    shown, rows = enlarged * side, -(-n // columns)
    assert sheet.shape == (*(2 * MARGIN + count * (shown + GAP) - GAP for count in (rows, columns)), 3)
    rest = sheet.copy()
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = (MARGIN + place * (shown + GAP) for place in (row, column))
        area = (slice(top, top + shown), slice(left, left + shown))
        assert np.array_equal(sheet[area], image.repeat(enlarged, axis=0).repeat(enlarged, axis=1))
        rest[area] = 255
    assert (rest == 255).all()


def test_text_on_a_sheet_covers_no_image():
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    text = SheetText(
        "A title", rows=["one", "a very long name of a row " * 9], columns=["a", "b", "c"], captions=["x\ny"] * 6
    )
    sheet = np.asarray(draw_sheet(images, 3, text, min_side=40))
    assert (sheet == 0).all(axis=2).sum() == 6 * 40 * 40
    assert sheet.shape[1] < 500


# ---- reading ----


def array_file(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def pixels(*shape, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def test_an_array_is_read_with_its_labels(tmp_path):
    images, labels = pixels(7, 4, 4, 3), np.arange(7, dtype=np.int32)
    opened = open_images(array_file(tmp_path / "a.npz", arr_0=images, arr_1=labels))
    batches = list(opened.batches(3))
    assert opened.resolution == 4
    assert [len(part) for part, _ in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate([part.numpy() for part, _ in batches]), images)
    assert np.concatenate([part.numpy() for _, part in batches]).tolist() == labels.tolist()
    unlabelled = open_images(array_file(tmp_path / "b.npz", arr_0=images))
    assert [labels for _, labels in unlabelled.batches(5)] == [None, None]


def test_object_arrays_and_pickles_are_refused_and_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    objects = array_file(tmp_path / "objects.npz", arr_0=np.array([Trap(sprung)], dtype=object))
    bare = tmp_path / "bare.npz"
    bare.write_bytes(pickle.dumps(Trap(sprung)))
    for path in (objects, bare):
        with pytest.raises(JLTError, match=path.name) as raised:
            open_images(path)
        # numpy would advise to run it.
        assert "allow_pickle" not in str(raised.value)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": pixels(2, 4, 4, 3, dtype=np.float32)}, "holds float32 .*uint8"),
        ({"arr_0": pixels(2, 4, 4, 3, dtype=np.int64)}, "holds int64 .*uint8"),
        ({"arr_0": pixels(2, 4, 5, 3)}, "(2, 4, 5, 3).*square"),
        ({"arr_0": pixels(2, 3, 4, 4)}, "(2, 3, 4, 4)"),
        ({"arr_0": pixels(2, 4, 4)}, "(2, 4, 4)"),
        ({"images": pixels(2, 4, 4, 3)}, "arr_0"),
        ({"arr_0": pixels(0, 4, 4, 3)}, "no images"),
        ({"arr_0": pixels(5, 4, 4, 3), "arr_1": np.arange(4)}, "arr_1|labels"),
        ({"arr_0": pixels(2, 4, 4, 3), "arr_1": np.eye(2, dtype=np.int64)}, "arr_1|labels"),
        ({"arr_0": pixels(2, 4, 4, 3), "arr_1": np.array(["cat", "dog"])}, "wrong.npz"),
        ({"arr_0": pixels(2, 4, 4, 3), "arr_1": np.array([0.5, 1.5])}, "arr_1|labels"),
    ],
    ids=lambda value: "+".join(f"{v.dtype}{v.shape}" for v in value.values()) if isinstance(value, dict) else "",
)
def test_arrays_that_are_no_images_are_refused_with_what_they_hold(tmp_path, arrays, message):
    path = array_file(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(JLTError, match=message.replace("(", r"\(").replace(")", r"\)")):
        list(open_images(path).batches(2))


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "no zip", "bare array"])
def test_damaged_arrays_are_refused_by_name(tmp_path, damage):
    path = array_file(tmp_path / "damaged.npz", arr_0=pixels(9, 8, 8, 3))
    content = bytearray(path.read_bytes())
    if damage == "bare array":
        np.save(tmp_path / "array.npy", pixels(9, 8, 8, 3))
        path = path.with_name("array.npy").rename(path)
    else:
        flipped = content.copy()
        flipped[len(content) // 2] ^= 1
        path.write_bytes({"empty": b"", "truncated": content[:-60], "flipped": flipped, "no zip": b"text"}[damage])
    with pytest.raises(JLTError, match=r"damaged\.npz"):
        list(open_images(path).batches(4))


def test_a_folder_is_read_in_the_order_of_names_as_rgb(tmp_path):
    image = pixels(4, 4, 3)
    Image.fromarray(image).save(tmp_path / "000001.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "000000.png")
    (tmp_path / "protocol.json").write_text("{}")
    opened = open_images(tmp_path)
    ((images, labels),) = opened.batches(8)
    assert (opened.resolution, labels) == (4, None)
    assert np.array_equal(images[1].numpy(), image)
    assert np.array_equal(images[0].numpy(), image[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "holds no images"),
        ({"a.png": (4, 4), "b.png": (5, 5)}, r"b\.png has 5x5 pixels, not 4x4"),
        ({"a.png": (4, 4), "b.png": (4, 5)}, r"b\.png has 5x4 pixels, not 4x4"),
        ({"a.png": (4, 6)}, r"a\.png has 6x4 pixels"),
        ({"a.png": (4, 4), "b.png": None}, r"b\.png is of no image format"),
    ],
)
def test_folders_that_are_no_samples_are_refused(tmp_path, images, message):
    for name, size in images.items():
        if size is None:
            (tmp_path / name).write_bytes(b"no image")
        else:
            Image.fromarray(pixels(*size, 3)).save(tmp_path / name)
    with pytest.raises(JLTError, match=message):
        list(open_images(tmp_path).batches(2))


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JLTError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")
