"""Reading shards: a pure order, ranks that share each global batch, resuming anywhere, damage that is named."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_shards import ADAPTIVE, CUBE, TABLES, real_crystals
from small_shards import write_shards as write_real_shards

from dist_train.config import GridSpec
from dist_train.crystal.frames import placed, representable
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import ShardError
from dist_train.models.autoencoder import CrystalBatch
from dist_train.shards.index import Index
from dist_train.shards.reader import BatchPlan, Shape, ShardReader, collate, epoch_batches, train_batches

CRYSTALS = 22
PER_SHARD = 8
WAIT_S = 10
ONE_SHAPE = (16, 16, 16)
SHAPES = st.lists(st.sampled_from([ONE_SHAPE, (8, 16, 24), (8, 8, 8), (8, 8)]), max_size=100).map(
    lambda shapes: shapes + [ONE_SHAPE] * 12
)
"""Of splits where one shape at least fills a batch of 12."""


def write_shards(folder: Path) -> Index:
    """Real perovskites in three shards of the training split."""
    return write_real_shards(folder, real_crystals(CRYSTALS), per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def own_index(tmp_path: Path) -> Index:
    """Shards that a test may damage."""
    return write_shards(tmp_path)


def plan(samples: int, global_batch: int = 4, epochs: int = 2, rank: int = 0, ranks: int = 1) -> BatchPlan:
    return BatchPlan([ONE_SHAPE] * samples, global_batch, epochs, seed=3, rank=rank, ranks=ranks)


def equal(one: CrystalBatch, other: CrystalBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def flip_byte(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)


def damage(index: Index, place: int) -> tuple[str, str, str]:
    """Flip a byte in the middle of the density of a sample; returns what a message has to name."""
    shard, sample = index.samples("train")[place]
    offset, size = sample.members["density.npy"]
    flip_byte(index.root / shard.name, offset + size // 2)
    return sample.key, sample.id, shard.name


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


# Samples


def test_samples_are_the_voxelised_crystals(index: Index) -> None:
    reader = ShardReader(index, "train")
    crystals = [item for item in read_parquet_rows(TABLES / "perov_5.parquet", 0, CRYSTALS) if isinstance(item, Crystal)]
    assert len(reader) == len(crystals) == CRYSTALS
    for place, source in enumerate(crystals):
        crystal = representable(source, CUBE)
        grid = voxelize(crystal, CUBE)
        record = reader[place]
        np.testing.assert_array_equal(record.density_CDHW, grid.density_CDHW.astype(np.float16))
        np.testing.assert_array_equal(record.species_DHW, grid.species_DHW)
        for held in (record.crystal, reader.crystal(place)):
            assert held.id == crystal.id
            np.testing.assert_array_equal(held.frac_N3, crystal.frac_N3)
            np.testing.assert_array_equal(held.numbers_N, crystal.numbers_N)


def test_a_batch_holds_its_records(index: Index) -> None:
    reader = ShardReader(index, "train")
    records = [reader[place] for place in (5, 20, 5)]
    batch = collate(records)
    assert batch.density_BCDHW.dtype == torch.float16
    assert batch.density_BCDHW.shape[0] == batch.species_BDHW.shape[0] == batch.cell_B6.shape[0] == 3
    for row, record in enumerate(records):
        np.testing.assert_array_equal(batch.density_BCDHW[row].numpy(), record.density_CDHW)
        np.testing.assert_array_equal(batch.species_BDHW[row].numpy(), record.species_DHW)
        counts = {z: int(n) for z, n in enumerate(batch.composition_BZ[row].tolist()) if n}
        assert counts == record.crystal.composition
    batch.density_BCDHW.zero_()
    assert reader[5].density_CDHW.any(), "a batch is a copy: changing it must not reach the shard"


@pytest.mark.parametrize("spec", [ADAPTIVE, GridSpec(frame="window", random_rotation=True, random_origin=True)])
def test_structures_are_voxelised_as_the_grids_that_are_stored(tmp_path: Path, spec: GridSpec) -> None:
    """Bit for bit, and each copy by its own rotation and origin."""
    crystals = real_crystals(6, spec, "materials_project")
    copies = 2 if spec.random_rotation else 1
    stored, alone = (
        ShardReader(Index.read(write_real_shards(tmp_path / store, crystals, spec, store, copies=copies).root), "train")
        for store in ("grids", "structures")
    )
    assert stored.shapes == alone.shapes
    assert len(stored) == len(alone) == 6 * copies
    for place in range(len(stored)):
        one, other = stored[place], alone[place]
        assert other.density_CDHW.dtype == np.float16
        np.testing.assert_array_equal(one.density_CDHW, other.density_CDHW)
        np.testing.assert_array_equal(one.species_DHW, other.species_DHW)
        expected = placed(crystals[place // copies], spec, place % copies)
        assert one.crystal.to_json() == other.crystal.to_json() == alone.crystal(place).to_json() == expected.to_json()
        assert one.species_DHW.shape == stored.shapes[place]


def test_compact_samples_are_the_raw_ones_but_for_the_last_digits(tmp_path: Path, index: Index) -> None:
    raw = ShardReader(index, "train")
    compact = ShardReader(write_real_shards(tmp_path, real_crystals(CRYSTALS), encoding="compact"), "train")
    for place in range(CRYSTALS):
        one, other = raw[place], compact[place]
        np.testing.assert_array_equal(one.species_DHW, other.species_DHW)
        assert one.density_CDHW.dtype == other.density_CDHW.dtype
        np.testing.assert_allclose(one.density_CDHW, other.density_CDHW, rtol=0, atol=0.0045 * one.density_CDHW.max() + 1e-3)
        assert one.crystal.to_json() == other.crystal.to_json()


@pytest.mark.parametrize(("store", "encoding"), [("grids", "raw"), ("grids", "compact"), ("structures", "raw")])
def test_threads_that_read_at_once_read_the_same(tmp_path: Path, store: str, encoding: str) -> None:
    reader = ShardReader(write_real_shards(tmp_path, real_crystals(12), store=store, encoding=encoding), "train")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.__getitem__, [*range(12)] * 3))
    for place, record in zip([*range(12)] * 3, found, strict=True):
        np.testing.assert_array_equal(record.density_CDHW, reader[place].density_CDHW)
        np.testing.assert_array_equal(record.species_DHW, reader[place].species_DHW)
        assert record.crystal.id == reader[place].crystal.id


def test_batches_of_structures_are_those_of_grids(tmp_path: Path, index: Index) -> None:
    alone = ShardReader(write_real_shards(tmp_path, real_crystals(CRYSTALS), store="structures"), "train")
    stored = train_batches(ShardReader(index, "train"), plan(CRYSTALS), 0, 10)
    for (_, one), (_, other) in zip(stored, train_batches(alone, plan(CRYSTALS), 0, 10), strict=True):
        assert equal(one, other)


def test_mixed_shapes_are_not_collated(tmp_path: Path) -> None:
    reader = ShardReader(write_real_shards(tmp_path, real_crystals(20, ADAPTIVE, "materials_project"), ADAPTIVE), "train")
    assert len(set(reader.shapes)) > 1
    records = [reader[place] for place in range(20)]
    with pytest.raises(ShardError, match=r"a batch needs grids of one shape, these 20 have 1 x \d+ x \d+ x \d+ \(mp-"):
        collate(records)
    assert len(collate([r for r in records if r.species_DHW.shape == reader.shapes[0]]).density_BCDHW) >= 1


def test_a_sample_that_is_not_what_the_index_says_is_named(index: Index, tmp_path: Path) -> None:
    """Right checksums are no proof: the index may be of other bytes."""

    def reading(index: Index, **changes: object) -> None:
        shard, *others = index.shards
        first = replace(shard.samples[0], **changes)  # type: ignore[arg-type]
        shards = (replace(shard, samples=(first, *shard.samples[1:])), *others)
        with pytest.raises(ShardError, match=rf"{first.key} .* is damaged .*run dist-train verify"):
            ShardReader(replace(index, shards=shards), "train")[0]

    sample = index.shards[0].samples[0]
    reading(index, shape=(16, 16, 8))
    reading(index, members={name: (2**62, 5) for name in sample.members})
    whole = ShardReader(index, "train")._members(index.shards[0], sample)
    reading(index, members={"structure.json": sample.members["species.npy"]}, crc32=zlib.crc32(whole["species.npy"]))
    alone = write_real_shards(tmp_path, real_crystals(2), store="structures")
    reading(alone, shape=(16, 16, 8))
    small = alone.config | {"grid": CUBE.model_dump(mode="json") | {"max_spacing_A": 0.1}}
    with pytest.raises(ShardError, match=r"is damaged \(spacing of"):
        ShardReader(replace(alone, config=small), "train")[0]


def test_damaged_sample_is_named_and_the_others_are_read(own_index: Index) -> None:
    named = damage(own_index, 13)
    reader = ShardReader(own_index, "train")
    with pytest.raises(ShardError, match="is damaged") as caught:
        reader[13]
    assert all(name in str(caught.value) for name in named)
    with pytest.raises(ShardError, match="run dist-train verify"):
        reader.crystal(13)
    assert [reader.crystal(place).id for place in range(CRYSTALS) if place != 13] == [
        sample.id for place, (_, sample) in enumerate(own_index.samples("train")) if place != 13
    ]


@pytest.mark.parametrize("member", ["density.npy", "species.npy", "structure.json"])
@pytest.mark.parametrize("at", [0, -1])
def test_any_member_is_checked_to_its_ends(own_index: Index, member: str, at: int) -> None:
    shard, sample = own_index.samples("train")[0]
    offset, size = sample.members[member]
    flip_byte(own_index.root / shard.name, offset + at % size)
    with pytest.raises(ShardError, match=sample.key):
        ShardReader(own_index, "train")[0]


def test_cut_and_missing_shards_are_named(own_index: Index) -> None:
    first, second, third = (own_index.root / shard.name for shard in own_index.shards)
    first.write_bytes(first.read_bytes()[:-512])
    second.unlink()
    third.write_bytes(b"")
    reader = ShardReader(own_index, "train")
    for place, path in 2 * ((0, first), (PER_SHARD, second), (2 * PER_SHARD, third)):
        with pytest.raises(ShardError, match=path.name):
            reader[place]


# Order


def batches(shapes: list[Shape], global_batch: int, epoch: int = 0, seed: int = 3) -> list[list[int]]:
    """The global batches of an epoch, as one rank sees them."""
    whole = BatchPlan(shapes, global_batch, epoch + 1, seed, 0, 1)
    first = epoch * whole.steps_per_epoch
    return [whole.places(step).tolist() for step in range(first, whole.steps)]


@given(SHAPES, st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_batches_of_an_epoch(shapes: list[Shape], global_batch: int, seed: int, epoch: int) -> None:
    """Full, of one shape, without a sample twice, and as many of each shape as fill batches."""
    found = batches(shapes, global_batch, epoch, seed)
    places = [place for batch in found for place in batch]
    assert len(places) == len(set(places))
    assert {len(batch) for batch in found} == {global_batch}
    assert all(len({shapes[place] for place in batch}) == 1 for batch in found)
    taken, there = Counter(shapes[place] for place in places), Counter(shapes)
    assert all(taken[shape] == n // global_batch * global_batch for shape, n in there.items())
    whole = BatchPlan(shapes, global_batch, 3, seed, 0, 1)
    assert whole.dropped == len(shapes) - len(places)
    assert whole.never_seen == sum(n for n in there.values() if n < global_batch)
    assert whole.steps == 3 * whole.steps_per_epoch == 3 * len(found)


@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_order_is_pure(shapes: list[Shape], seed: int, epoch: int) -> None:
    first = epoch_batches(BatchPlan(shapes, 1, epoch + 1, seed, 0, 1), epoch)
    np.random.default_rng().random(3)
    np.testing.assert_array_equal(first, epoch_batches(BatchPlan(shapes, 1, epoch + 2, seed, 1, 2), epoch))


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
    whole = BatchPlan([ONE_SHAPE] * n, 4, epochs, 0, 0, 1)
    for epoch in range(epochs):
        counts[np.arange(n), epoch_batches(whole, epoch).ravel()] += 1
    chi_squared = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert abs(chi_squared - (n - 1) ** 2) < 5 * (2 * (n - 1) ** 2) ** 0.5


def test_what_an_epoch_drops_differs_from_epoch_to_epoch() -> None:
    seen = {place for epoch in range(30) for batch in batches([ONE_SHAPE] * 10, 4, epoch) for place in batch}
    assert seen == set(range(10))


@given(SHAPES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_ranks_share_each_global_batch(shapes: list[Shape], quarter: int, epochs: int, seed: int) -> None:
    """For 1, 2 and 4 ranks: as many steps on every rank, and the slices of a step are the same batch, without overlap."""
    seen = {}
    for ranks in (1, 2, 4):
        plans = [BatchPlan(shapes, 4 * quarter, epochs, seed, rank, ranks) for rank in range(ranks)]
        (steps,) = {p.steps for p in plans}
        slices = [[p.places(step).tolist() for p in plans] for step in range(steps)]
        assert all(len(part) == 4 * quarter // ranks for parts in slices for part in parts)
        seen[ranks] = [[place for part in parts for place in part] for parts in slices]
    assert seen[1] == seen[2] == seen[4]
    assert seen[1] == [batch for epoch in range(epochs) for batch in batches(shapes, 4 * quarter, epoch, seed)]


def test_a_split_without_a_full_batch_is_refused() -> None:
    with pytest.raises(ShardError, match=r"7 samples of 1 grid shapes, at most 7 of one shape, .*global_batch_size 8"):
        plan(7, global_batch=8)
    assert plan(8, global_batch=8).steps == 2
    mixed = [(8, 8, 8)] * 5 + [(16, 8, 8)] * 6
    with pytest.raises(ShardError, match=r"11 samples of 2 grid shapes, at most 6 of one shape, .*lower it or voxelise"):
        BatchPlan(mixed, 8, 2, 3, 0, 1)
    assert (BatchPlan(mixed, 6, 2, 3, 0, 1).steps, BatchPlan(mixed, 6, 2, 3, 0, 1).never_seen) == (2, 5)


def test_a_step_is_looked_up_without_ordering_its_epoch_anew() -> None:
    """150,000 samples: a lookup must not cost what an epoch does."""
    whole = plan(150_000, global_batch=8)
    whole.places(0)
    before = epoch_batches.cache_info()
    for step in range(1000):
        whole.places(step)
    after = epoch_batches.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (0, 1000)


# Batches


def test_batches_are_those_of_the_plan(index: Index) -> None:
    reader, batches = ShardReader(index, "train"), plan(CRYSTALS)
    got = list(train_batches(reader, batches, 0, batches.steps))
    assert [step for step, _ in got] == list(range(10))
    for step, batch in got:
        assert equal(batch, collate([reader[place] for place in batches.places(step)]))


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 9, 10])
def test_resuming_at_any_step_gives_the_same_batches(index: Index, start: int) -> None:
    """Step 5 is the first of the second epoch."""
    batches = plan(CRYSTALS)
    whole = list(train_batches(ShardReader(index, "train"), batches, 0, batches.steps))
    rest = list(train_batches(ShardReader(index, "train"), batches, start, batches.steps))
    assert [step for step, _ in rest] == list(range(start, 10))
    assert all(equal(one, other) for (_, one), (_, other) in zip(rest, whole[start:], strict=True))


def test_ranks_read_the_parts_of_the_same_batch(index: Index) -> None:
    reader = ShardReader(index, "train")
    one = train_batches(reader, plan(CRYSTALS), 0, 10)
    two = [train_batches(reader, plan(CRYSTALS, rank=rank, ranks=2), 0, 10) for rank in range(2)]
    for (_, whole), *parts in zip(one, *two, strict=True):
        joined = CrystalBatch(*(torch.cat(tensors) for tensors in zip(*(batch for _, batch in parts), strict=True)))
        assert equal(whole, joined)


def test_an_error_of_the_thread_reaches_the_consumer(own_index: Index) -> None:
    batches = plan(CRYSTALS)
    bad = int(batches.places(3)[1])
    named = damage(own_index, bad)
    steps: list[int] = []
    with pytest.raises(ShardError, match="is damaged") as caught:
        steps.extend(step for step, _ in train_batches(ShardReader(own_index, "train"), batches, 0, batches.steps))
    assert steps == [0, 1, 2]
    assert all(name in str(caught.value) for name in named)
    assert not reading_threads()


def test_an_unforeseen_error_of_the_thread_reaches_the_consumer_too(index: Index) -> None:
    longer = plan(10 * CRYSTALS)
    with pytest.raises(IndexError):
        list(train_batches(ShardReader(index, "train"), longer, 0, longer.steps))
    assert not reading_threads()


@pytest.mark.parametrize("taken", [1, 3])
def test_leaving_early_stops_the_thread(index: Index, taken: int) -> None:
    batches = train_batches(ShardReader(index, "train"), plan(CRYSTALS, epochs=1000), 0, 5000)
    assert len(list(islice(batches, taken))) == taken
    (thread,) = reading_threads()
    batches.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_an_error_of_the_consumer_stops_the_thread(index: Index) -> None:
    def consume() -> None:
        for _ in train_batches(ShardReader(index, "train"), plan(CRYSTALS, epochs=1000), 0, 5000):
            raise KeyError("the step failed")

    with pytest.raises(KeyError):
        consume()
    for thread in reading_threads():
        thread.join(WAIT_S)
    assert not reading_threads()


def test_only_a_few_batches_are_read_ahead(index: Index) -> None:
    """A slow consumer doesn't make the thread read the whole epoch into memory."""
    reader = ShardReader(index, "train")
    read: list[int] = []

    class Counting(ShardReader):
        def __getitem__(self, place: int):  # type: ignore[no-untyped-def]
            read.append(place)
            return reader[place]

    batches = train_batches(Counting(index, "train"), plan(CRYSTALS, epochs=1000), 0, 5000)
    next(batches)
    threading.Event().wait(0.5)
    batches.close()
    assert len(read) <= 4 * 4
