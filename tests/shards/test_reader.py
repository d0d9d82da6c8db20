"""Reading shards: a pure order, ranks that share each global batch, resuming anywhere, damage that is named."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.config import GridSpec
from dist_train.crystal.frames import representable
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import ShardError
from dist_train.models.autoencoder import CrystalBatch
from dist_train.shards.index import Index
from dist_train.shards.plan import Chunk, ShardTask, scan_chunk
from dist_train.shards.reader import BatchPlan, ShardReader, collate, epoch_order, train_batches
from dist_train.shards.writer import build_shard

TABLE = Path(__file__).parents[2] / "data" / "sample" / "perov_5.parquet"
GRID = GridSpec(shape=16, max_spacing_A=0.5, channels=("occupancy", "period"))
CRYSTALS = 22
PER_SHARD = 8
WAIT_S = 10


def write_shards(folder: Path) -> Index:
    """Real perovskites in three shards of the training split, without Ray."""
    root, work = folder / "shards", folder / "work"
    scan = scan_chunk(0, Chunk(TABLE.parent, (TABLE.name,), 0, CRYSTALS), work, GRID, {"train": 1.0})
    starts = range(0, CRYSTALS, PER_SHARD)
    tasks = [ShardTask(f"train-{at:06d}.tar", "train", at, scan.rows[at : at + PER_SHARD]) for at in starts]
    records = tuple(build_shard(task, root, work, GRID) for task in tasks)
    index = Index(root, {"grid": GRID.model_dump(mode="json")}, "0", "0", {"inputs": CRYSTALS}, records)
    index.write()
    return index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def own_index(tmp_path: Path) -> Index:
    """Shards that a test may damage."""
    return write_shards(tmp_path)


def plan(samples: int, global_batch: int = 4, epochs: int = 2, rank: int = 0, ranks: int = 1) -> BatchPlan:
    return BatchPlan(samples, global_batch, epochs, seed=3, rank=rank, ranks=ranks)


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
    crystals = [item for item in read_parquet_rows(TABLE, 0, CRYSTALS) if isinstance(item, Crystal)]
    assert len(reader) == len(crystals) == CRYSTALS
    for place, source in enumerate(crystals):
        crystal = representable(source, GRID)
        grid = voxelize(crystal, GRID)
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
    for place, path in ((0, first), (PER_SHARD, second), (2 * PER_SHARD, third)):
        with pytest.raises(ShardError, match=path.name):
            reader[place]


# Order


@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_order_of_an_epoch_is_a_permutation_and_pure(samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(samples))
    np.random.default_rng().random(3)
    np.testing.assert_array_equal(order, epoch_order(samples, seed, epoch))


def test_order_changes_with_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(st.integers(1, 6), st.integers(0, 30), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_ranks_share_each_global_batch(quarter: int, more: int, epochs: int, seed: int) -> None:
    """For 1, 2 and 4 ranks: as many steps on every rank, and the slices of a step are the same batch, without overlap."""
    batch = 4 * quarter
    samples = batch + more
    seen = {}
    for ranks in (1, 2, 4):
        plans = [BatchPlan(samples, batch, epochs, seed, rank, ranks) for rank in range(ranks)]
        assert {p.steps for p in plans} == {samples // batch * epochs}
        slices = [[p.places(step).tolist() for p in plans] for step in range(plans[0].steps)]
        assert all(len(part) == batch // ranks for parts in slices for part in parts)
        seen[ranks] = [[place for part in parts for place in part] for parts in slices]
    assert seen[1] == seen[2] == seen[4]
    per_epoch = samples // batch
    for epoch in range(epochs):
        places = [place for step in seen[1][epoch * per_epoch : (epoch + 1) * per_epoch] for place in step]
        assert places == epoch_order(samples, seed, epoch)[: per_epoch * batch].tolist()
        assert len(places) == len(set(places))


def test_a_split_smaller_than_a_global_batch_is_refused() -> None:
    with pytest.raises(ShardError, match=r"7 samples, fewer than train\.global_batch_size 8"):
        plan(7, global_batch=8)
    assert plan(8, global_batch=8).steps == 2


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
    longer = replace(plan(CRYSTALS), samples=10 * CRYSTALS)
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
