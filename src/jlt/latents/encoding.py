"""Encoding: images through a frozen autoencoder into a latent store, once, so that training needs no pixels.

Worker processes decode images ahead of the autoencoder, and a thread writes latents behind it. Every process takes its
share of the shards. A shard is written whole or not at all, then a file with its hash and sums, and the manifest comes
last. The same command again resumes: it keeps the intact shards and makes the others.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jlt.autoencoders.contract import Autoencoder, psnr
from jlt.autoencoders.load import load_autoencoder
from jlt.errors import JLTError
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.images.decoding import PixelBatch, bad_image, default_workers, load_batch, load_batches
from jlt.images.folders import ClassFolders
from jlt.images.reading import BadImageError
from jlt.images.registry import open_source
from jlt.images.source import ImageSource, SkippedImage
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding_job import EncodedBatch, EncodingJob, FinishedShard, encode_batch, require_finite
from jlt.latents.manifest import MANIFEST_NAME, LatentSums, ShardRecord, StoreManifest, read_manifest, write_manifest
from jlt.latents.shards import ShardWriter, keep_rows
from jlt.latents.store import STATE_FOLDER, VERIFY_THREADS, LatentStore, shard_problem
from jlt.runtime.environment import exact_arithmetic
from jlt.runtime.processes import Group, join_group, require_same_arguments
from jlt.runtime.progress import bar, inform
from jlt.runtime.signals import until_stopped
from jlt.runtime.workers import BackgroundWorker
from jlt.storage.files import (
    atomic_path,
    difference,
    format_difference,
    read_sealed_json,
    sealed_text,
    sha256_file,
    write_text,
)
from jlt.storage.folders import lock_folder, remove_leftovers, remove_tree
from jlt.storage.rows import require_space

BYTES_BEHIND = 2**27
"""Latents that may wait to be written, so that computing goes on while a finished shard is flushed and hashed."""
BATCHES_PER_WORKER = 4
"""With fewer batches, a worker takes longer to start than to work."""
ENOUGH_TO_JUDGE = 256
"""Images in the first shard from which on its latents show whether all are normalised."""
ARGUMENTS_FILE = "words.json"
"""In the state folder: the arguments of an unfinished encoding."""


def encode(config: EncodeConfig, out: Path, device: str = "cpu") -> StoreManifest:
    """Encode a collection of images into the latent store `out` and return its manifest.

    Resumes an interrupted encoding with the same arguments, and returns at once if the store is complete. Processes
    that torchrun started share the work. JLTError if the folder holds anything else or an encoding with different
    arguments, if an image does not decode (unless such images are skipped), and if latents are not finite or not
    normalised.
    """
    source = open_source(config.images, config.split, config.class_names)
    autoencoder = load_autoencoder(config.autoencoder, config.autoencoder_path, device, config.posterior)
    return encode_source(source, autoencoder, config, out)


def encode_source(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, out: Path) -> StoreManifest:
    """Encode an opened source with a loaded autoencoder; otherwise as `encode`."""
    if isinstance(source, ClassFolders) and out.resolve().is_relative_to(source.folder):
        # The next encoding would take the store for a class.
        raise JLTError(f"{out} is inside the folder of images {source.folder}: name a folder elsewhere.")
    job = EncodingJob(source, autoencoder, config, out)
    with join_group() as group, contextlib.ExitStack() as held:
        require_same_arguments(group, job.arguments(), "encode")
        missing = group.on_rank0(lambda: _begin(job, held))
        if missing is not None:
            _make_shards(job, missing, group)
            group.wait()
            group.on_rank0(lambda: _complete(job))
    return read_manifest(out)


Missing = dict[int, str | None]
"""The shards to make; where a finished store is repaired, each with its SHA-256 in the manifest."""


def _begin(job: EncodingJob, held: contextlib.ExitStack) -> Missing | None:
    """Claim the folder until `held` closes, and return the missing shards; None for a finished store."""
    arguments = job.arguments()
    missing: Missing | None = None
    if (job.out / MANIFEST_NAME).exists():
        manifest = read_manifest(job.out)
        content = manifest.content()
        _require_same(job.out, {name: content[name] for name in arguments}, arguments)
        job.require_skipping_allowed(manifest.skipped)
        if job.config.repair:
            missing = _damaged(job, manifest, held)
        else:
            _require_undamaged(job)
            inform(f"{job.out} is already complete and intact.")
    else:
        held.enter_context(_claimed(job.out, arguments))
        missing = dict.fromkeys(job.missing())
        finished = (job.load_facts(shard) for shard in range(job.num_shards) if shard not in missing)
        job.require_skipping_allowed([image for facts in finished for image in facts.skipped])
        images = sum(len(job.rows(shard)) for shard in missing)
        require_space(job.out, images * job.batch_bytes // job.config.batch_size, "The missing latents")
    if missing and len(missing) < job.num_shards:
        inform(f"{job.out}: {job.num_shards - len(missing)} of {job.num_shards} shards are already complete")
    if missing:
        for note in (*job.source.notes(), *_enlarged(job)):
            inform(note)
    if job.config.preview:
        preview(job)
    return missing


def _enlarged(job: EncodingJob) -> Iterator[str]:
    """Yield a sentence if images of the source, of which a few are looked at, are smaller than their crops."""
    if job.source.in_memory:
        # The bundled sets are made for a larger size.
        return
    sides = []
    for row in _spread_rows(job):
        with contextlib.suppress(BadImageError):
            sides.append(min(job.source[row][0].size))
    small = [side for side in sides if side < job.config.resolution]
    if small:
        found = f"{min(small)} px" if min(small) == max(small) else f"{min(small)} to {max(small)} px"
        which = "All images" if len(small) == len(sides) else f"{len(small)} of {len(sides)} images"
        yield (
            f"{which} that were looked at have a short side of {found} and are enlarged to {job.config.resolution} px: "
            f"--resolution {max(small)} keeps their size, where the autoencoder can."
        )


def _require_undamaged(job: EncodingJob) -> None:
    """Raise a JLTError that names what is damaged in a finished store, after reading all of it."""
    try:
        LatentStore.open_verified(job.out)
    except JLTError as error:
        raise JLTError(f"{error} --repair encodes missing and damaged shards again; move other files away.") from error
    if (job.out / STATE_FOLDER).is_dir():
        # Left by a process that was killed right after it wrote the manifest, unless another process repairs.
        with contextlib.suppress(JLTError), lock_folder(job.out / STATE_FOLDER, job.out):
            remove_leftovers(job.out)
            remove_tree(job.out, job.out / STATE_FOLDER)


def _damaged(job: EncodingJob, manifest: StoreManifest, held: contextlib.ExitStack) -> Missing:
    """Lock a finished store for repair, and return those of its shards that differ from the manifest."""
    held.enter_context(lock_folder(job.out / STATE_FOLDER, job.out))
    remove_leftovers(job.out)
    shards = {job.shard_path(shard).name: shard for shard in range(job.num_shards)}
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        problems = list(pool.map(lambda record: shard_problem(job.out, record), manifest.shards))
    for problem in filter(None, problems):
        inform(f"{problem} It is encoded again.")
    return {
        shards[record.file]: record.sha256 for record, problem in zip(manifest.shards, problems, strict=True) if problem
    }


def _complete(job: EncodingJob) -> None:
    if not (job.out / MANIFEST_NAME).exists():
        write_manifest(job.out, job.manifest())
    remove_tree(job.out, job.out / STATE_FOLDER)
    LatentStore.open(job.out)


def _make_shards(job: EncodingJob, missing: Missing, group: Group) -> None:
    """Make this process's share of the missing shards, with a bar that counts the images of all processes."""
    share = {shard: missing[shard] for shard in list(missing)[group.rank :: group.size]}
    total = sum(len(job.rows(shard)) for shard in missing)
    if not total:
        return
    depth = max(2, BYTES_BEHIND // job.batch_bytes)
    start = time.monotonic()
    with (
        bar(f"encoding {job.source.name}", total) as shown,
        exact_arithmetic(job.config.threads),
        BackgroundWorker[EncodedBatch](lambda batches: _write_shards(job, share, batches), depth) as writer,
        contextlib.closing(_encoded(job, list(share))) as batches,
    ):
        for batch in until_stopped(batches):
            writer.put(batch)
            done = group.add("images", len(batch.rows))
            shown.show(done, f"{done / (time.monotonic() - start):.3g} img/s")


def _encoded(job: EncodingJob, shards: Sequence[int]) -> Generator[EncodedBatch, None, None]:
    """Yield the latents of some shards, batch by batch."""
    config, batches = job.config, [rows for shard in shards for rows in job.batches(shard)]
    workers = config.workers
    if workers is None:
        workers = default_workers(job.source, len(batches), BATCHES_PER_WORKER)
    for pixels in load_batches(job.source, batches, config.resolution, config.exif, workers):
        if pixels.bad and config.on_bad_image == "stop":
            raise bad_image(pixels.bad[0])
        yield encode_batch(job, pixels)


def _write_shards(job: EncodingJob, shards: Missing, batches: Iterator[EncodedBatch]) -> None:
    """Write the batches of some shards, which arrive in order."""
    for shard, expected_sha256 in shards.items():
        count, sums = 0, LatentSums.zero(job.autoencoder.channels)
        skipped: list[SkippedImage] = []
        path = job.shard_path(shard)
        with atomic_path(path) as temporary:
            with ShardWriter(temporary, job.layout(len(job.rows(shard)))) as writer:
                for batch in itertools.islice(batches, len(job.batches(shard))):
                    sums = sums.merge(_write_batch(job, writer, count, batch))
                    count += len(batch.index)
                    skipped += batch.bad
            if skipped:
                keep_rows(temporary, job.layout(count))
            if shard == 0 and (count >= ENOUGH_TO_JUDGE or job.num_shards == 1):
                # After the first shard, not after a day.
                sums.require_normalised(job.autoencoder.identity())
            sha256 = sha256_file(temporary)
            if expected_sha256 not in (None, sha256):
                raise JLTError(
                    f"{path} is left as it is, since encoding it again gives other bytes than the manifest's. The "
                    f"images have changed, or the autoencoder's environment: {job.made_with()} now, "
                    f"{list(read_manifest(job.out).made_with)} then. Encode into a new folder."
                )
        if expected_sha256:
            continue
        record = ShardRecord(path.name, count, path.stat().st_size, sha256) if count else None
        if not count:
            path.unlink()
        job.save_facts(shard, FinishedShard(record, sums if count else None, tuple(skipped), job.made_with()))


def _write_batch(job: EncodingJob, writer: ShardWriter, row: int, batch: EncodedBatch) -> LatentSums:
    """Write a batch at a row of its shard and return its sums; JLTError if a latent is not finite."""
    sums = LatentSums.zero(job.autoencoder.channels)
    if not len(batch.index):
        return sums
    writer.write("index", row, batch.index)
    writer.write("labels", row, batch.labels)
    # Always in this order: another order of additions could change the last bit of a sum.
    for name in job.orientations:
        require_finite(job, batch, name)
        stored = batch.latents[name].cpu().numpy()
        writer.write(name, row, stored)
        sums = sums.add(stored)
    return sums


@contextlib.contextmanager
def _claimed(out: Path, arguments: dict[str, Any]) -> Iterator[None]:
    """Lock the folder for one encoding with these arguments; JLTError if it holds or is used for anything else."""
    state = out / STATE_FOLDER
    if out.exists() and not out.is_dir():
        raise JLTError(f"{out} is a file: name a folder for the latent store.")
    if not state.is_dir() and any(out.glob("shard-*.safetensors")):
        raise JLTError(f"{out} holds shards of a store without its manifest: encode into a new folder.")
    if not state.is_dir() and out.is_dir() and any(out.iterdir()):
        raise JLTError(f"{out} holds other files and is left as it is: name a new or empty folder.")
    with lock_folder(state, out):
        path = state / ARGUMENTS_FILE
        # Arguments are binding from the first finished shard on, so a refused first attempt can be corrected in place.
        if path.exists() and any(state.glob("shard-*.json")):
            _require_same(out, read_sealed_json(path), arguments)
        else:
            # A shard without its facts may be of other arguments.
            for shard in out.glob("shard-*.safetensors"):
                shard.unlink()
        write_text(path, sealed_text(arguments))
        remove_leftovers(out)
        yield


def _require_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if differences := difference(before, now):
        raise JLTError(
            f"{out} was encoded with different arguments ({format_difference(differences)}): "
            "use those, or name another folder."
        )


PREVIEW_NAME = "preview.png"
IMAGES = 8
FAR_BELOW = 10.0
"""Decibels below the autoencoder's own measurement at which a warning is printed."""
MIN_SIDE = 160


def preview(job: EncodingJob) -> float:
    """Write `preview.png` into the folder of the store and return the PSNR in dB over its images.

    The images are spread evenly over the source. JLTError if none of them can be used.
    """
    pixels = _spread(job)
    with exact_arithmetic(job.config.threads):
        encoded = encode_batch(job, pixels)
        reconstructed = job.autoencoder.decode(encoded.latents["latents"].float()).cpu()
    originals = torch.from_numpy(pixels.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    overall = psnr(originals, reconstructed)
    captions = [
        f"{job.source.class_names[label]}\n{psnr(original[None], other[None]):.1f} dB"
        for label, original, other in zip(pixels.labels.tolist(), originals, reconstructed, strict=True)
    ]
    config = job.config
    title = f"{job.autoencoder.name}, {config.resolution} px, {config.precision}, stored as {config.dtype}: "
    title += f"originals above, reconstructions below, {overall:.1f} dB over all"
    decoded = ((reconstructed + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    text = SheetText(title=title, captions=[""] * len(captions) + captions)
    sheet = draw_sheet(np.concatenate((pixels.pixels, decoded)), len(captions), text, MIN_SIDE)
    path = job.out / PREVIEW_NAME
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    inform(f"{path}: {len(captions)} images above their reconstructions, {overall:.1f} dB.")
    stated = job.autoencoder.held_out_psnr
    if stated and overall < stated - FAR_BELOW:
        inform(f"The autoencoder's file states {stated:.1f} dB on its own images: it was not trained for these images.")
    return overall


def _spread_rows(job: EncodingJob) -> list[int]:
    return sorted({round(place) for place in np.linspace(0, len(job.source) - 1, IMAGES)})


def _spread(job: EncodingJob) -> PixelBatch:
    """Return up to `IMAGES` usable images, from the start, the end and between."""
    total, config = len(job.source), job.config

    def load(row: int) -> PixelBatch:
        return load_batch(job.source, range(row, row + 1), config.resolution, config.exif)

    loaded = [load(row) for row in _spread_rows(job)]
    bad = [image for batch in loaded for image in batch.bad]
    if bad and config.on_bad_image == "stop":
        raise bad_image(bad[0])
    if len(bad) == len(loaded):
        first = next((batch for batch in map(load, range(total)) if len(batch.index)), None)
        if first is None:
            raise JLTError(f"None of the {total} images of {job.source.name} can be used.")
        loaded = [first]
    index, labels, pixels = (
        np.concatenate([getattr(batch, name) for batch in loaded]) for name in ("index", "labels", "pixels")
    )
    return PixelBatch(range(total), index, labels, pixels, tuple(bad))
