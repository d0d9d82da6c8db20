"""The order of samples: a pure function of seed and epoch, which ranks share, local in windows of shards."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.errors import ShardError
from dist_train.shards.order import BatchPlan, Shape, epoch_order

ONE_SHAPE = (16, 16, 16)
SHAPES = st.lists(st.sampled_from([ONE_SHAPE, (8, 16, 24), (8, 8, 8), (8, 8)]), max_size=100).map(
    lambda shapes: shapes + [ONE_SHAPE] * 12
)
"""Of splits where one shape at least fills a batch of 12."""
WINDOWS = st.integers(1, 130)


def make_plan(
    shapes: list[Shape], global_batch: int, epochs: int = 2, seed: int = 3, rank: int = 0, ranks: int = 1,
    window: int = 2**16, per_shard: int = 7, group: int | None = None,
) -> BatchPlan:  # fmt: skip
    full, rest = divmod(len(shapes), per_shard)
    sizes = [per_shard] * full + [rest] * (rest > 0)
    return BatchPlan(shapes, sizes, global_batch, epochs, seed, rank, ranks, window, group)


def epoch_batches(plan: BatchPlan, epoch: int) -> np.ndarray:
    return plan.order(epoch).batches


def batches(shapes: list[Shape], global_batch: int, epoch: int = 0, seed: int = 3, window: int = 2**16) -> list[list[int]]:
    """The global batches of an epoch, as one rank sees them."""
    whole = make_plan(shapes, global_batch, epoch + 1, seed, window=window)
    first = epoch * whole.steps_per_epoch
    return [whole.places(step).tolist() for step in range(first, whole.steps)]


@given(SHAPES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1), st.integers(0, 50), WINDOWS)
def test_batches_of_an_epoch(
    shapes: list[Shape], group: int, groups: int, seed: int, epoch: int, window: int
) -> None:  # fmt: skip
    """Full, in groups of one shape, without a sample twice, and as many of each shape as fill groups of whole batches."""
    size = group * groups
    plan = make_plan(shapes, size, epoch + 1, seed, window=window, group=group)
    found = epoch_batches(plan, epoch)
    places = found.ravel().tolist()
    assert len(places) == len(set(places))
    assert found.shape[1] == size
    assert all(len({shapes[place] for place in alike}) == 1 for alike in found.reshape(-1, group).tolist())
    taken, there = Counter(shapes[place] for place in places), Counter(shapes)
    full = {shape: n // group * group for shape, n in there.items()}
    assert all(taken[shape] <= n for shape, n in full.items())
    assert sum(full.values()) - size < len(places) <= sum(full.values())
    assert plan.dropped == len(shapes) - len(places)
    assert plan.never_seen == sum(n for n in there.values() if n < group)
    assert plan.steps == (epoch + 1) * plan.steps_per_epoch == (epoch + 1) * len(found)


def test_a_batch_mixes_shapes_as_the_crystals_do() -> None:
    """Three in four samples of one shape: the same share of groups, in every batch nearly, and not always in front."""
    shapes = [(8, 8, 8) if i % 4 else (16, 8, 8) for i in range(4000)]
    found = epoch_batches(make_plan(shapes, 64, group=4), 0)
    rare = np.array([[shapes[place] == (16, 8, 8) for place in batch] for batch in found.tolist()])
    assert rare.mean() == pytest.approx(0.25, abs=0.01)
    assert rare.mean(1).std() < 0.08
    assert 0.1 < rare[:, 0].mean() < 0.5


@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(0, 1000), WINDOWS)
def test_order_is_pure(shapes: list[Shape], seed: int, epoch: int, window: int) -> None:
    first = epoch_batches(make_plan(shapes, 1, epoch + 1, seed, window=window), epoch)
    np.random.default_rng().random(3)
    other = make_plan(shapes, 1, epoch + 2, seed, rank=1, ranks=2, window=window)
    np.testing.assert_array_equal(first, epoch_batches(other, epoch))


def test_order_changes_with_seed_and_epoch() -> None:
    orders = {str(batches([ONE_SHAPE] * 50, 5, epoch, seed)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_batches_of_all_shapes_mix() -> None:
    """Not all of one shape first: in each half of an epoch, on average, half of the batches of a shape."""
    shapes = [(8, 8, 8)] * 200 + [(16, 16, 16)] * 200
    early = [sum(shapes[batch[0]] == (8, 8, 8) for batch in batches(shapes, 4, seed=seed)[:50]) for seed in range(20)]
    assert 20 < np.mean(early) < 30
    assert len(set(early)) > 1


def test_one_shape_is_permuted_uniformly() -> None:
    """Every sample comes equally often at every place of an epoch: chi squared of 24 x 24 counts."""
    n, epochs = 24, 2000
    counts = np.zeros((n, n))
    whole = make_plan([ONE_SHAPE] * n, 4, epochs, 0)
    for epoch in range(epochs):
        counts[np.arange(n), epoch_batches(whole, epoch).ravel()] += 1
    chi_squared = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert abs(chi_squared - (n - 1) ** 2) < 5 * (2 * (n - 1) ** 2) ** 0.5


@pytest.mark.parametrize("window", [1, 5, 2**16])
def test_what_an_epoch_drops_differs_from_epoch_to_epoch(window: int) -> None:
    """In the long run it is each sample equally often, whatever the windows."""
    left = Counter(
        place
        for epoch in range(700)
        for place in set(range(35)) - {p for batch in batches([ONE_SHAPE] * 35, 4, epoch, window=window) for p in batch}
    )
    assert sum(left.values()) == 3 * 700
    assert min(left[place] for place in range(35)) > 60 - 6 * 60**0.5
    assert max(left.values()) < 60 + 6 * 60**0.5


@given(SHAPES, st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**32 - 1), WINDOWS, st.sampled_from([None, 2, 3]))
def test_ranks_share_each_global_batch(
    shapes: list[Shape], sixth: int, epochs: int, seed: int, window: int, group: int | None
) -> None:
    """For 2, 1, 3 ranks: as many steps on every rank, and the slices of a step are the same batch, without overlap."""
    seen = {}
    for ranks in (2, 1, 3):
        plans = [make_plan(shapes, 6 * sixth, epochs, seed, rank, ranks, window, group=group) for rank in range(ranks)]
        (steps,) = {p.steps for p in plans}
        slices = [[p.places(step).tolist() for p in plans] for step in range(steps)]
        assert all(len(part) == 6 * sixth // ranks for parts in slices for part in parts)
        seen[ranks] = [[place for part in parts for place in part] for parts in slices]
    assert seen[1] == seen[2] == seen[3]
    if group is None:
        assert seen[1] == [batch for epoch in range(epochs) for batch in batches(shapes, 6 * sixth, epoch, seed, window)]


# Windows


@given(st.integers(12, 400), st.integers(1, 12), WINDOWS, st.integers(1, 40), st.integers(0, 99))
def test_reading_stays_in_two_windows_of_shards(
    samples: int, global_batch: int, window: int, per_shard: int, seed: int
) -> None:
    """Each batch needs only shards of its own window and, where it began there, of the one before."""
    plan = make_plan([ONE_SHAPE] * samples, global_batch, seed=seed, window=max(window, global_batch), per_shard=per_shard)
    reached = [plan.window_of(step) for step in range(plan.steps)]
    assert reached == sorted(reached)
    assert reached[0] == 0
    windows = len(plan.cuts) - 1
    for step, at in enumerate(reached):
        known = {*plan.shards_of(at).tolist()}
        if at % windows:
            known |= {*plan.shards_of(at - 1).tolist()}
        assert {place // per_shard for place in plan.places(step).tolist()} <= known


@given(st.integers(12, 400), WINDOWS, st.integers(1, 40))
def test_windows_of_an_epoch_hold_every_shard_once_and_as_many_samples_as_asked_for(
    samples: int, window: int, per_shard: int
) -> None:
    plan = make_plan([ONE_SHAPE] * samples, 1, window=window, per_shard=per_shard)
    for epoch in range(2):
        count = len(plan.cuts) - 1
        windows = [plan.shards_of(epoch * count + at).tolist() for at in range(count)]
        assert sorted(number for numbers in windows for number in numbers) == list(range(len(plan.shard_sizes)))
        sizes = [sum(plan.shard_sizes[number] for number in numbers) for numbers in windows]
        assert count == 1 or min(sizes) > window - per_shard  # the last shard of the index may be a small one
        assert count == 1 or max(sizes) < 2 * window + 2 * per_shard


def test_a_split_of_less_than_two_windows_is_shuffled_whole() -> None:
    """The first batch of 190 samples in windows of 100 reaches all over the split."""
    plan = make_plan([ONE_SHAPE] * 190, 100, window=100, per_shard=10)
    assert len(plan.cuts) == 2
    assert len({place // 10 for place in plan.places(0).tolist()}) > 17


def test_neighbours_of_one_window_are_elsewhere_in_the_next_epoch() -> None:
    """Not the same windows in another order: what is read together changes."""
    plan = make_plan([ONE_SHAPE] * 4000, 100, window=400, per_shard=40)
    first, second = ({*plan.order(epoch).batches[:4].ravel().tolist()} for epoch in range(2))
    assert len(first & second) < 200


@pytest.mark.parametrize("window", [2**16, 2**22])
def test_a_million_samples_of_many_shapes_are_ordered_at_once(window: int) -> None:
    """0.1 s here; a plain loop over samples takes several."""
    shapes = [(8 * (i % 40), 8, 8) for i in range(10**6)]
    plan = make_plan(shapes, 64, window=window, per_shard=250)
    plan.counts.sum()
    began = time.process_time()
    plan.places(plan.steps_per_epoch)
    assert time.process_time() - began < 1.5


def test_a_split_without_a_full_batch_is_refused() -> None:
    with pytest.raises(ShardError, match=r"7 samples of 1 grid shapes, 0 of them in groups of 8 .*global_batch_size 8"):
        make_plan([ONE_SHAPE] * 7, 8)
    assert make_plan([ONE_SHAPE] * 8, 8).steps == 2
    mixed = [(8, 8, 8)] * 5 + [(16, 8, 8)] * 6
    with pytest.raises(ShardError, match=r"11 samples of 2 grid shapes, 0 of them in groups of 8 .*lower it or voxelise"):
        make_plan(mixed, 8)
    assert (make_plan(mixed, 6).steps, make_plan(mixed, 6).never_seen) == (2, 5)
    assert (make_plan(mixed, 8, group=2).steps, make_plan(mixed, 8, group=2).never_seen) == (2, 0)


def test_a_step_is_looked_up_without_ordering_its_epoch_anew() -> None:
    """150,000 samples: a lookup must not cost what an epoch does."""
    whole = make_plan([ONE_SHAPE] * 150_000, 8)
    whole.places(0)
    before = epoch_order.cache_info()
    for step in range(1000):
        whole.places(step)
    after = epoch_order.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (0, 1000)
