"""The split of the global batch: it multiplies up, follows from what is set, or is refused with numbers that work."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlt.errors import JLTError
from jlt.experiments.recipes import resolve_recipe
from jlt.training.step import BatchSplit, split_batch


def config(batch_size: int, micro_batch_size: int = 0, accumulation: int = 0):
    return dataclasses.replace(
        resolve_recipe("digits"),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
    )


@pytest.mark.parametrize(
    ("settings", "processes", "split"),
    [
        ((64,), 1, (64, 1)),
        ((64,), 8, (8, 1)),
        ((64, 4), 8, (4, 2)),
        ((64, 0, 4), 8, (2, 4)),
        ((64, 2, 4), 8, (2, 4)),
        ((7,), 7, (1, 1)),
    ],
)
def test_what_is_not_set_follows(settings, processes, split):
    assert split_batch(config(*settings), processes) == BatchSplit(*split)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ((64,), 7, "batch_size 63 or 70"),
        ((4,), 8, "batch_size 8."),
        ((64, 5), 1, "micro_batch_size 4 or 8"),
        ((64, 100), 1, "micro_batch_size 64."),
        ((64, 0, 3), 2, "accumulation 2 or 4"),
        ((64, 3, 4), 2, "is 24, and batch_size is 64"),
        ((64, 3, 4), 2, "take 2 and 16 or 4 and 8"),
        ((64, 8, 3), 1, "take 8 and 8"),
        ((64,), 0, "at least one process"),
    ],
)
def test_what_does_not_multiply_up_is_refused_with_what_does(settings, processes, message):
    with pytest.raises(JLTError, match=re.escape(message)):
        split_batch(config(*settings), processes)


@given(*(st.integers(low, high) for low, high in ((1, 300), (0, 40), (0, 40), (1, 9))))
def test_a_split_multiplies_up(batch_size, micro_batch_size, accumulation, processes):
    try:
        split = split_batch(config(batch_size, micro_batch_size, accumulation), processes)
    except JLTError:
        return
    assert split.micro_batch_size * split.accumulation * processes == batch_size
    assert micro_batch_size in (0, split.micro_batch_size)
    assert accumulation in (0, split.accumulation)
