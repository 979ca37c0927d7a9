"""Encoding: images through a frozen autoencoder into a latent store, once, so that training never sees a pixel.

Worker processes decode images ahead of the autoencoder, and a thread writes latents behind it. Every process takes its
share of the shards. A shard is written whole or not at all, with a note of its hash and sums, and the manifest comes
last. Started again with the same words, an encoding keeps the sound shards and makes the others.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jlt.autoencoders.contract import Autoencoder
from jlt.autoencoders.load import load_autoencoder
from jlt.errors import JLTError
from jlt.images.decoding import bad_image, load_batches
from jlt.images.folders import ClassFolders
from jlt.images.registry import open_source
from jlt.images.source import ImageSource, SkippedImage
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding_batch import EncodedBatch, encode_batch, exact_arithmetic, require_finite
from jlt.latents.encoding_job import EncodingJob, FinishedShard
from jlt.latents.manifest import MANIFEST_NAME, ShardRecord, StoreManifest, read_manifest, write_manifest
from jlt.latents.preview import preview
from jlt.latents.shards import ShardWriter, keep_rows
from jlt.latents.statistics import LatentSums
from jlt.latents.store import STATE_FOLDER, VERIFY_THREADS, LatentStore, shard_problem
from jlt.runtime.background import BackgroundWorker
from jlt.runtime.environment import cores
from jlt.runtime.processes import Group, join_group, local_world_size, require_same_arguments
from jlt.runtime.progress import bar, inform
from jlt.runtime.signals import until_stopped
from jlt.storage.files import (
    atomic_path,
    difference,
    format_difference,
    lock_folder,
    read_sealed_json,
    sealed_text,
    sha256_file,
    write_text,
)

BYTES_BEHIND = 2**27
"""Latents that may wait to be written, so that computing goes on while a finished shard is flushed and hashed."""
MAX_WORKERS = 16
BATCHES_PER_WORKER = 4
"""With less to do than this, starting a worker takes longer than its work."""
ENOUGH_TO_JUDGE = 256
"""Images from which on the scale of the first shard's latents says something about all."""


def encode(config: EncodeConfig, out: Path, device: str = "cpu") -> StoreManifest:
    """Encode a collection of images into the latent store `out` and return its manifest.

    Continues where an encoding with the same words was interrupted, and returns at once where it is complete.
    Processes that torchrun started share the work. JLTError if the folder holds anything else or was begun with other
    words, if an image does not decode (unless such are skipped), if the latents are not finite or not normalised.
    """
    source = open_source(config.images, config.split, config.class_names)
    autoencoder = load_autoencoder(config.autoencoder, config.autoencoder_path, device, config.posterior)
    return encode_source(source, autoencoder, config, out)


def encode_source(source: ImageSource, autoencoder: Autoencoder, config: EncodeConfig, out: Path) -> StoreManifest:
    """Encode an opened source with a loaded autoencoder; otherwise as `encode`."""
    _require_outside(source, out)
    job = EncodingJob(source, autoencoder, config, out)
    with join_group() as group, contextlib.ExitStack() as held:
        require_same_arguments(group, job.words(), "encode")
        missing = group.on_rank0(lambda: _begin(job, held))
        if missing is not None:
            _make_shards(job, missing, group)
            group.wait()
            group.on_rank0(lambda: _complete(job))
    return read_manifest(out)


def _require_outside(source: ImageSource, out: Path) -> None:
    """Raise a JLTError for a store among class folders: the next look at the images would take it for a class."""
    if isinstance(source, ClassFolders) and out.resolve().is_relative_to(source.folder):
        raise JLTError(f"{out} lies among the images in {source.folder}: name a folder elsewhere.")


Missing = dict[int, str | None]
"""The shards to make, each with the SHA-256 that it must get where a finished store is repaired."""


def _begin(job: EncodingJob, held: contextlib.ExitStack) -> Missing | None:
    """Claim the folder for as long as `held` lasts, and return what is missing; None for a finished store."""
    words, missing = job.words(), None
    if (job.out / MANIFEST_NAME).exists():
        manifest = read_manifest(job.out)
        content = manifest.content()
        _require_same_words(job.out, {name: content[name] for name in words}, words)
        job.require_policy(manifest.skipped)
        if job.config.repair:
            missing = _damaged(job, manifest, held)
        else:
            _require_whole(job)
            inform(f"{job.out} is finished already; jlt verify compares it with its hashes.")
    else:
        held.enter_context(_claimed(job.out, words))
        missing = dict.fromkeys(job.missing())
        finished = (job.recall(shard) for shard in range(job.num_shards) if shard not in missing)
        job.require_policy([image for shard in finished for image in shard.skipped])
        _require_space(job, missing)
    if missing and len(missing) < job.num_shards:
        inform(f"{job.out}: {job.num_shards - len(missing)} of {job.num_shards} shards are there already")
    if job.config.preview:
        preview(job)
    return missing


def _require_whole(job: EncodingJob) -> None:
    """Raise a JLTError if a look at the files of a finished store shows damage."""
    try:
        LatentStore.open(job.out)
    except JLTError as error:
        raise JLTError(f"{error} --repair makes missing and damaged shards again; others are yours to move.") from error
    if (job.out / STATE_FOLDER).is_dir():
        # Left by a process that was killed right after it had written the manifest, unless somebody repairs.
        with contextlib.suppress(JLTError), lock_folder(job.out / STATE_FOLDER):
            shutil.rmtree(job.out / STATE_FOLDER, ignore_errors=True)


def _damaged(job: EncodingJob, manifest: StoreManifest, held: contextlib.ExitStack) -> Missing:
    """Hold a finished store for repair, and return those of its shards that are not what the manifest says."""
    held.enter_context(lock_folder(job.out / STATE_FOLDER))
    _remove_leftovers(job.out)
    shards = {job.shard_path(shard).name: shard for shard in range(job.num_shards)}
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        problems = list(pool.map(lambda record: shard_problem(job.out, record), manifest.shards))
    for problem in filter(None, problems):
        inform(f"{problem} It is made again.")
    return {
        shards[record.file]: record.sha256 for record, problem in zip(manifest.shards, problems, strict=True) if problem
    }


def _require_space(job: EncodingJob, missing: Missing) -> None:
    needed = sum(len(job.rows(shard)) for shard in missing) * job.batch_bytes // job.config.batch_size
    free = shutil.disk_usage(job.out).free
    if needed > free:
        raise JLTError(
            f"The latents still to be made take {needed / 1e9:.3g} GB, and {job.out} has {free / 1e9:.3g} GB free."
        )


def _complete(job: EncodingJob) -> None:
    if not (job.out / MANIFEST_NAME).exists():
        write_manifest(job.out, job.manifest())
    shutil.rmtree(job.out / STATE_FOLDER, ignore_errors=True)
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
    batches = [rows for shard in shards for rows in job.batches(shard)]
    workers = _workers(job, len(batches))
    for pixels in load_batches(job.source, batches, job.config.resolution, job.config.exif, workers):
        if pixels.bad and job.config.on_bad_image == "stop":
            raise bad_image(pixels.bad[0])
        yield encode_batch(job, pixels)


def _workers(job: EncodingJob, num_batches: int) -> int:
    if job.config.workers is not None:
        return job.config.workers
    if job.source.in_memory:
        return 0
    return min(MAX_WORKERS, max(1, cores() // local_world_size()), num_batches // BATCHES_PER_WORKER)


def _write_shards(job: EncodingJob, shards: Missing, batches: Iterator[EncodedBatch]) -> None:
    """Write the batches of some shards, which come in order."""
    for shard, must_be in shards.items():
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
                # Rather after the first shard than after a day.
                job.require_normalised(sums)
            sha256 = sha256_file(temporary)
            if must_be not in (None, sha256):
                raise JLTError(
                    f"{path} was left as it is: made again it is another one than the manifest says. The images have "
                    f"changed, or what makes latents of them: {job.made_with()} now, "
                    f"{list(read_manifest(job.out).made_with)} then. Encode into a new folder."
                )
        if must_be:
            continue
        if count:
            record = ShardRecord(path.name, count, path.stat().st_size, sha256)
            job.remember(shard, FinishedShard(record, sums, tuple(skipped), job.made_with()))
        else:
            path.unlink()
            job.remember(shard, FinishedShard(None, None, tuple(skipped), job.made_with()))


def _write_batch(job: EncodingJob, writer: ShardWriter, row: int, batch: EncodedBatch) -> LatentSums:
    """Write a batch at a row of its shard and return its sums; JLTError if a latent is not finite."""
    sums = LatentSums.zero(job.autoencoder.channels)
    if not len(batch.index):
        return sums
    writer.write("index", row, batch.index)
    writer.write("labels", row, batch.labels)
    # In this order always: another order of additions could change the last bit of a sum.
    for name in job.orientations:
        require_finite(job, batch, name)
        stored = batch.latents[name].cpu().numpy()
        writer.write(name, row, stored)
        sums = sums.add(stored)
    return sums


@contextlib.contextmanager
def _claimed(out: Path, words: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for one encoding with these words; JLTError if anybody or anything else has it."""
    state = out / STATE_FOLDER
    if out.exists() and not out.is_dir():
        raise JLTError(f"{out} is a file: name a folder for the latent store.")
    if not state.is_dir() and any(out.glob("shard-*.safetensors")):
        raise JLTError(f"{out} holds shards of a store whose manifest is lost: encode into a new folder.")
    if not state.is_dir() and out.is_dir() and any(out.iterdir()):
        raise JLTError(
            f"{out} holds other files and is left as it is: name a new or empty folder for the latent store."
        )
    state.mkdir(parents=True, exist_ok=True)
    with lock_folder(state):
        words_path = state / "words.json"
        # Words bind from the first finished shard on, so that a refused first attempt can be corrected in place.
        if words_path.exists() and any(state.glob("shard-*.json")):
            _require_same_words(out, read_sealed_json(words_path), words)
        else:
            # A shard that was not noted may be of other words.
            _remove(out.glob("shard-*.safetensors"))
        write_text(words_path, sealed_text(words))
        _remove_leftovers(out)
        yield


def _remove_leftovers(out: Path) -> None:
    """Remove what killed processes were writing."""
    _remove(out.glob(".shard-*.partial*"))


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink()


def _require_same_words(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    lines = difference(before, now)
    if lines:
        raise JLTError(
            f"{out} was encoded with other words ({format_difference(lines)}): use those, or name another folder."
        )
