"""The order of samples: a permutation per epoch, and a pure function of (seed, epoch, position)."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt.latents.loader import SampleOrder

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**64 - 1)
GOLDEN_INDICES = [2, 3, 5, 7, 0, 6, 1, 4, 9, 8, 3, 7, 2, 9, 6, 4, 8, 5, 0, 1]
GOLDEN_FLIPS = [1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0]


@settings(deadline=None)
@given(SIZES, SEEDS, st.integers(0, 10**9))
def test_every_index_comes_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    indices = SampleOrder(size, seed).indices(epoch * size, size)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(np.sort(indices), np.arange(size))


@settings(deadline=None)
@given(SIZES, SEEDS, st.integers(0, 1000), st.lists(st.integers(0, 400), max_size=5))
def test_any_split_gives_the_same_sequence(size: int, seed: int, start: int, counts: list[int]) -> None:
    whole, parts = SampleOrder(size, seed), SampleOrder(size, seed)
    starts = start + np.concatenate([[0], np.cumsum(counts, dtype=int)])
    pieces = list(zip(starts.tolist(), counts, strict=False))
    # Requested backwards: earlier requests must not matter.
    indices = [parts.indices(*piece) for piece in reversed(pieces)][::-1]
    flips = [parts.flips(*piece) for piece in reversed(pieces)][::-1]
    np.testing.assert_array_equal(np.concatenate([*indices, []]), whole.indices(start, sum(counts)))
    np.testing.assert_array_equal(np.concatenate([*flips, []]), whole.flips(start, sum(counts)))


@settings(deadline=None)
@given(
    st.integers(1, 120),
    SEEDS,
    st.integers(0, 10**9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_processes_and_workers_together_see_every_sample_once_an_epoch(
    size: int, seed: int, epoch: int, world: int, workers: int, per_process: int, shuffled: random.Random
) -> None:
    """Each of W processes reads its share of every global batch, its K workers take the steps in turn, in any order."""
    batch = world * per_process
    first, last = epoch * size, (epoch + 1) * size
    # All steps whose batch touches the epoch; what they hold of its neighbours is left out below.
    reads = [(step, rank) for step in range(first // batch, (last - 1) // batch + 1) for rank in range(world)]
    shuffled.shuffle(reads)
    orders = {(rank, worker): SampleOrder(size, seed) for rank in range(world) for worker in range(workers)}
    seen: dict[int, tuple[int, bool]] = {}
    for step, rank in reads:
        start, order = step * batch + rank * per_process, orders[rank, step % workers]
        drawn = zip(order.indices(start, per_process).tolist(), order.flips(start, per_process).tolist(), strict=True)
        for position, pair in enumerate(drawn, start):
            assert position not in seen
            seen[position] = pair
    pairs = [seen[position] for position in range(first, last)]
    assert sorted(index for index, _ in pairs) == list(range(size))
    alone = SampleOrder(size, seed)
    assert pairs == [*zip(alone.indices(first, size).tolist(), alone.flips(first, size).tolist(), strict=True)]


def test_a_jump_costs_the_same_anywhere() -> None:
    def seconds(position: int) -> float:
        order = SampleOrder(100_000, 0)
        begun = time.perf_counter()
        order.indices(position, 256)
        order.flips(position, 256)
        return time.perf_counter() - begun

    # Replaying even the epochs before 10^12, ten million of them, would take a day.
    near, far = (min(seconds(position) for _ in range(5)) for position in (0, 10**12))
    assert far < 3 * near


def test_a_batch_is_a_slice_of_an_epoch_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = SampleOrder._draw_epoch
    monkeypatch.setattr(SampleOrder, "_draw_epoch", lambda self, epoch: (drawn.append(epoch), draw(self, epoch))[1])
    order = SampleOrder(100, 0)
    for start in range(0, 1000, 7):
        order.indices(start, 7)
        order.flips(start, 7)
    assert drawn == list(range(11))


def test_epochs_seeds_and_flips_differ() -> None:
    order = SampleOrder(1000, 0)
    first, second = order.indices(0, 1000), order.indices(1000, 1000)
    assert (first != second).mean() > 0.99
    assert (first != SampleOrder(1000, 1).indices(0, 1000)).mean() > 0.99
    assert (order.flips(0, 1000) != order.flips(1000, 1000)).mean() == pytest.approx(0.5, abs=0.08)


def test_all_permutations_are_equally_likely() -> None:
    # Chi-square over the 24 orders of 4 samples in 24,000 epochs has mean 23 and standard deviation sqrt(46).
    drawn = SampleOrder(4, 7).indices(0, 4 * 24_000).reshape(-1, 4) @ [64, 16, 4, 1]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 23 + 5 * np.sqrt(46)


def test_flips_are_fair_and_independent_of_the_index() -> None:
    order = SampleOrder(50, 3)
    indices, flips = order.indices(0, 50 * 2000), order.flips(0, 50 * 2000)
    assert flips.dtype == np.bool_
    share = np.bincount(indices[flips], minlength=50) / 2000
    # Standard error of each share is sqrt(1/4/2000) = 0.011.
    np.testing.assert_allclose(share, 0.5, atol=5 * 0.0112)


def test_the_sequence_never_changes_between_versions() -> None:
    # A run that continues under another NumPy has to see its samples in the same order.
    order = SampleOrder(10, 0)
    assert order.indices(0, 20).tolist() == GOLDEN_INDICES
    assert order.flips(0, 20).astype(int).tolist() == GOLDEN_FLIPS


@settings(deadline=None)
@given(st.integers(-5, 0))
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(size, 0)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1)])
def test_negative_positions_are_refused(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="not negative"):
        SampleOrder(3, 0).indices(start, count)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        SampleOrder(3, seed)
