"""The features of a sampler's images, on disk while they are drawn, so that processes share the work and resume it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jlt.evaluation.extractor import FeatureExtractor
from jlt.evaluation.feature_table import arrays_of, open_table
from jlt.evaluation.real_images import CHUNK
from jlt.runtime.processes import Group, stop_together
from jlt.runtime.progress import bar, inform
from jlt.sampling.sampler import ImageBatch, ImageSampler, batches_of
from jlt.storage.files import lock_folder
from jlt.storage.rows import RowTable, unwritten


def table_folder(sampler: ImageSampler, extractor: FeatureExtractor, place: Path) -> Path:
    """Return the folder in `place` for the features of a sampler, the same for any number of images."""
    identity = {**sampler.protocol(), "count": None, "extractor": extractor.identity()}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return place / f"{sampler.checkpoint.folder.name}-{digest}"


@contextlib.contextmanager
def drawn_features(sampler: ImageSampler, extractor: FeatureExtractor, place: Path, group: Group) -> Iterator[RowTable]:
    """Draw the images that a table in `place` does not have yet, in all processes; yield the full table, locked.

    A table of fewer images grows to this many. Stopped if any process is to stop: the written rows stay, and the same
    call resumes. JLTError if another program draws into the same table, or if the processes do not share its folder.
    """
    folder, num = table_folder(sampler, extractor, place), sampler.config.num
    with contextlib.ExitStack() as held:

        def find() -> list[range]:
            held.enter_context(lock_folder(folder, place))
            written = open_table(folder, extractor, num).written()
            if written.any():
                inform(f"{written.sum()} of {len(written)} images were drawn before.")
            return unwritten(batches_of(num, sampler.config.batch_size), written)

        missing = group.on_rank0(find)
        images, drawn = sum(map(len, missing)), group.begin()
        with stop_together(group) as until_stopped, bar("sampling and measuring", images) as shown:
            table = open_table(folder, extractor, num)
            batches = until_stopped(sampler.batches(missing[group.rank :: group.size]))
            for start, pixels, labels in aligned(batches):
                table.write(start, {**arrays_of(extractor(pixels)), "labels": labels.numpy()})
                shown.show(group.add(drawn, len(labels)))
        group.on_rank0(table.require_full)
        yield table


def aligned(
    batches: Iterable[ImageBatch], size: int = CHUNK
) -> Iterator[tuple[int, UInt8[Tensor, "n h w 3"], Int64[Tensor, " n"]]]:
    """Yield the same numbered images cut at multiples of `size`, as far as they are consecutive.

    An extractor then gets the same batches as in `evaluate_images`, and so the same digits. Ranges that are no
    multiples of `size` and are shared among processes change the last digits.
    """
    waiting: ImageBatch | None = None
    for batch in batches:
        if waiting is not None and waiting.start + len(waiting.labels) == batch.start:
            images, labels = torch.cat((waiting.images, batch.images)), torch.cat((waiting.labels, batch.labels))
            batch = ImageBatch(waiting.start, images, labels)
        elif waiting is not None:
            yield waiting.start, waiting.images, waiting.labels
        end = batch.start + len(batch.labels)
        cuts = [batch.start, *range((batch.start // size + 1) * size, end + 1, size)]
        for cut, next_cut in pairwise(cuts):
            part = slice(cut - batch.start, next_cut - batch.start)
            yield cut, batch.images[part], batch.labels[part]
        rest = slice(cuts[-1] - batch.start, None)
        left = ImageBatch(cuts[-1], batch.images[rest], batch.labels[rest])
        waiting = left if len(left.labels) else None
    if waiting is not None:
        yield waiting.start, waiting.images, waiting.labels
