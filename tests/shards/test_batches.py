"""Batches: those of the plan, in order, whatever reads them; damage is passed over and named; structures lie afresh."""

from __future__ import annotations

import os
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_shards import ADAPTIVE, CRYSTALS, CUBE, damage, flip_byte, real_crystals, rewritten_member, write_shards

from dist_train.config import GridSpec
from dist_train.crystal.frames import representable
from dist_train.errors import ShardError
from dist_train.models.autoencoder import CrystalBatch, cell_numbers
from dist_train.models.structure_batch import StructureBatch
from dist_train.models.voxelize_batch import voxelize_batch
from dist_train.shards import batches as batching
from dist_train.shards.batches import CPU, TrainBatch, cells, collate, train_batches
from dist_train.shards.index import Index
from dist_train.shards.order import BatchPlan
from dist_train.shards.reader import Record, ShardReader

CUBE_SHAPE = (16, 16, 16)
WAIT_S = 10
META = torch.device("meta")
"""No CPU and no data: what is asked of the loader for a device that makes grids itself."""


def plan_of(
    reader: ShardReader, global_batch: int = 4, epochs: int = 2, rank: int = 0, ranks: int = 1, window: int = 2**16,
    group: int | None = None,
) -> BatchPlan:  # fmt: skip
    return BatchPlan(reader.shapes, reader.shard_sizes, global_batch, epochs, 3, rank, ranks, window, group)


def batches_of(reader: ShardReader, plan: BatchPlan, **settings: object) -> list[TrainBatch]:
    return list(train_batches(reader, plan, 0, plan.steps, **settings))  # type: ignore[arg-type]


def equal(one: CrystalBatch, other: CrystalBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


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


def test_mixed_shapes_are_not_collated(tmp_path: Path) -> None:
    reader = ShardReader(write_shards(tmp_path, real_crystals(20, ADAPTIVE, "materials_project"), ADAPTIVE), "train")
    assert len(set(reader.shapes)) > 1
    records = [reader[place] for place in range(20)]
    with pytest.raises(ShardError, match=r"a batch needs grids of one shape, these 20 have 1 x \d+ x \d+ x \d+ \(mp-"):
        collate(records)
    assert len(collate([r for r in records if r.species_DHW.shape == reader.shapes[0]]).density_BCDHW) >= 1


def test_cells_are_those_of_the_models_whatever_else_is_in_the_batch() -> None:
    crystals = real_crystals(40, ADAPTIVE, "materials_project")
    lattices = np.stack([crystal.lattice_A for crystal in crystals])
    expected = cell_numbers(np.stack([crystal.lengths_angles for crystal in crystals]))
    np.testing.assert_allclose(cells(lattices), expected, rtol=1e-6, atol=1e-6)
    for row in range(40):
        np.testing.assert_array_equal(cells(lattices[row : row + 1])[0], cells(lattices)[row])


# Loading


@pytest.mark.parametrize("encoding", ["raw", "compact"])
@pytest.mark.parametrize("threads", [1, 4])
def test_batches_are_those_of_the_plan(tmp_path: Path, encoding: str, threads: int) -> None:
    reader = ShardReader(write_shards(tmp_path, real_crystals(CRYSTALS), encoding=encoding), "train")
    plan = plan_of(reader, window=7)
    got = batches_of(reader, plan, threads=threads)
    assert [item.step for item in got] == list(range(10))
    for item in got:
        assert equal(item.batch.to(CPU), collate([reader[place] for place in plan.places(item.step)]))
        assert item.damaged == ()
        assert item.batch.weight_B.tolist() == [1.0] * 4


@pytest.mark.parametrize("store", ["grids", "structures"])
def test_batches_of_mixed_shapes_come_in_parts_of_one_shape_each(tmp_path: Path, store: str) -> None:
    """Of two ranks, whose slices cut a group in two."""
    index = write_shards(tmp_path, real_crystals(40, ADAPTIVE, "materials_project"), ADAPTIVE, store=store)
    reader = ShardReader(index, "train")
    shapes = set()
    for rank in range(2):
        plan = plan_of(reader, global_batch=6, window=10, rank=rank, ranks=2, group=2)
        found = batches_of(reader, plan)
        assert max(len(item.parts) for item in found) > 1
        for item in found:
            made, places = [part.to(CPU) for part in item.parts], plan.places(item.step).tolist()
            shapes |= {batch.shape for batch in made}
            assert [shape for batch in made for shape in [batch.shape] * batch.size] == [reader.shapes[p] for p in places]
            atoms = torch.cat([batch.composition_BZ for batch in made]).sum(1).tolist()
            assert atoms == [len(reader.crystal(place)) for place in places]
            for batch in made if store == "grids" else ():
                assert equal(batch, collate([reader[places.pop(0)] for _ in range(batch.size)]))
    assert len(shapes) > 1


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 9, 10])
def test_resuming_at_any_step_gives_the_same_batches(index: Index, start: int) -> None:
    """Step 5 is the first of the second epoch."""
    reader = ShardReader(index, "train")
    plan = plan_of(reader)
    whole = batches_of(reader, plan)
    rest = list(train_batches(ShardReader(index, "train"), plan, start, plan.steps))
    assert [item.step for item in rest] == list(range(start, 10))
    for one, other in zip(rest, whole[start:], strict=True):
        assert equal(one.batch.to(CPU), other.batch.to(CPU))


def test_ranks_read_the_parts_of_the_same_batch(index: Index) -> None:
    reader = ShardReader(index, "train")
    one = batches_of(reader, plan_of(reader))
    two = [batches_of(reader, plan_of(reader, rank=rank, ranks=2)) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        joined = CrystalBatch(*(torch.cat(tensors) for tensors in zip(*(part.batch for part in parts), strict=True)))
        assert equal(whole.batch.to(CPU), joined)


def test_an_unforeseen_error_of_a_thread_reaches_the_consumer_in_its_turn(index: Index) -> None:
    """A plan of a larger split: the first batch with a place that isn't there raises, those before it are whole."""
    reader = ShardReader(index, "train")
    plan = BatchPlan([CUBE_SHAPE] * 40, [40], 2, 3, 1, 0, 1)
    bad = next(step for step in range(plan.steps) if max(plan.places(step)) >= CRYSTALS)
    steps: list[int] = []
    with pytest.raises(IndexError):
        steps.extend(item.step for item in train_batches(reader, plan, 0, plan.steps, threads=4))
    assert steps == list(range(bad))
    assert not reading_threads()


@pytest.mark.parametrize("taken", [1, 3])
def test_leaving_early_stops_the_threads(index: Index, taken: int) -> None:
    reader = ShardReader(index, "train")
    batches = train_batches(reader, plan_of(reader, epochs=1000), 0, 5000)
    assert len(list(islice(batches, taken))) == taken
    assert reading_threads()
    batches.close()  # type: ignore[attr-defined]
    assert not reading_threads()


class Slow(ShardReader):
    """Reads that take a while, of which the places are noted."""

    seconds = 0.0

    def read_raw(self, places, *arrays):  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("read", []).extend(places)
        time.sleep(self.seconds * len(places))
        return super().read_raw(places, *arrays)


class SlowByOne(ShardReader):
    """Reads of single samples take a while."""

    seconds = 0.0

    def __getitem__(self, place: int) -> Record:
        time.sleep(self.seconds)
        return super().__getitem__(place)


@pytest.mark.parametrize(
    ("encoding", "slow", "limit"), [("raw", Slow, "AT_ONCE"), ("raw", Slow, "MOST_FILES"), ("compact", SlowByOne, "AT_ONCE")]
)
def test_leaving_does_not_wait_for_whole_batches(
    tmp_path: Path, encoding: str, slow: type[Slow | SlowByOne], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, limit, 1)
    reader = slow(write_shards(tmp_path, real_crystals(CRYSTALS), encoding=encoding), "train")
    plan = BatchPlan(reader.shapes, reader.shard_sizes, 22, 1000, 3, 0, 1)
    batches = train_batches(reader, plan, 0, plan.steps, threads=1)
    next(batches)
    time.sleep(0.3)
    reader.seconds = 0.5
    next(batches)  # read ahead before; the batch that is begun now takes 11 s
    time.sleep(0.2)
    began = time.perf_counter()
    batches.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - began < 3


def test_an_error_of_the_consumer_stops_the_threads(index: Index) -> None:
    reader = ShardReader(index, "train")

    def consume() -> None:
        for _ in train_batches(reader, plan_of(reader, epochs=1000), 0, 5000):
            raise KeyError("the step failed")

    with pytest.raises(KeyError):
        consume()
    for thread in reading_threads():
        thread.join(WAIT_S)
    assert not reading_threads()


def test_memory_of_batches_is_used_again_when_nobody_holds_them(index: Index) -> None:
    """A view of a batch is enough to hold it."""
    reader = ShardReader(index, "train")
    plan = plan_of(reader, epochs=20)
    places, held, expected = set(), [], []
    for item in train_batches(reader, plan, 0, plan.steps):
        places.add(item.batch.density_BCDHW.data_ptr())
        if item.step % 25 == 0:
            held.append(item.batch.to(CPU).species_BDHW[1:].flatten())
            expected.append(held[-1].clone())
    assert len(places) <= 4 + len(held) < plan.steps
    assert all(torch.equal(one, other) for one, other in zip(held, expected, strict=True))
    assert len({tensor.data_ptr() for tensor in held}) == len(held)


@pytest.mark.parametrize("threads", [1, 3])
def test_only_a_few_batches_are_read_ahead(index: Index, threads: int) -> None:
    """A slow consumer doesn't make the threads read the whole epoch into memory."""
    reader = Slow(index, "train")
    batches = train_batches(reader, plan_of(reader, epochs=1000), 0, 5000, threads=threads)
    next(batches)
    time.sleep(0.5)
    batches.close()  # type: ignore[attr-defined]
    assert len(reader.read) == 4 * (1 + threads)


# Damage


@pytest.mark.parametrize(("store", "encoding"), [("grids", "raw"), ("grids", "compact"), ("structures", "raw")])
def test_a_damaged_sample_is_named_and_left_out_and_the_others_are_untouched(
    tmp_path: Path, store: str, encoding: str
) -> None:
    index = write_shards(tmp_path, real_crystals(CRYSTALS), store=store, encoding=encoding)
    reader = ShardReader(index, "train")
    plan = plan_of(reader, window=9)
    whole = batches_of(reader, plan)
    named = damage(index, 13)
    found = batches_of(ShardReader(index, "train"), plan)
    times = 0
    for before, after in zip(whole, found, strict=True):
        one, other = before.batch.to(CPU), after.batch.to(CPU)
        places = plan.places(before.step).tolist()
        hit = places.index(13) if 13 in places else None
        kept = [row for row in range(4) if row != hit]
        assert all(torch.equal(a[kept], b[kept]) for a, b in zip(one, other, strict=True))
        assert other.weight_B.tolist() == [float(row != hit) for row in range(4)]
        assert len(after.damaged) == (hit is not None)
        if hit is not None:
            times += 1
            assert all(name in after.damaged[0] for name in (*named, str(index.root), "run dist-train verify"))
            assert not other.density_BCDHW[hit].any()
            assert not other.species_BDHW[hit].any()
            assert other.cell_B6[hit].isfinite().all()
            assert other.composition_BZ[hit].sum().log().isfinite()
    assert times


MEMBER_BYTES = [
    (member, at)
    for member, places in (("density.npy", (0, 9, 60, 127, 128, -1)), ("species.npy", (0, 127, 128, 999, -1)))
    for at in places
] + [("structure.json", 0), ("structure.json", 90), ("structure.json", -1)]  # fmt: skip


@pytest.mark.parametrize(("member", "at"), MEMBER_BYTES)
def test_a_damaged_byte_in_any_part_of_a_sample_is_found(own_index: Index, member: str, at: int) -> None:
    """In the headers, which say what the numbers are, as in the numbers and the structure."""
    shard, sample = own_index.samples("train")[10]
    offset, size = sample.members[member]
    flip_byte(own_index.root / shard.name, offset + at % size)
    reader = ShardReader(own_index, "train")
    plan = plan_of(reader, global_batch=22, epochs=1)
    (item,) = batches_of(reader, plan)
    assert len(item.damaged) == 1
    assert all(told in item.damaged[0] for told in (sample.key, sample.id, shard.name, "crc32"))
    assert plan.places(0)[item.batch.to(CPU).weight_B == 0].tolist() == [10]


def test_a_shard_that_is_cut_while_it_is_read_names_the_samples_behind_the_cut(own_index: Index) -> None:
    shard = own_index.shards[0]
    reader = ShardReader(own_index, "train")
    plan = plan_of(reader, global_batch=22, epochs=1)
    assert batches_of(reader, plan)[0].damaged == ()
    os.truncate(own_index.root / shard.name, shard.samples[5].members["species.npy"][0] + 1000)
    (item,) = batches_of(reader, plan)
    assert sorted(told.split()[1] for told in item.damaged) == [sample.key for sample in shard.samples[5:]]
    assert all(shard.name in told for told in item.damaged)


def test_a_damaged_sample_is_the_same_for_any_number_of_ranks(own_index: Index) -> None:
    damage(own_index, 5)
    reader = ShardReader(own_index, "train")
    found = {}
    for ranks in (1, 2, 4):
        parts = [batches_of(reader, plan_of(reader, rank=rank, ranks=ranks)) for rank in range(ranks)]
        joined = [CrystalBatch(*map(torch.cat, zip(*(part[step].batch for part in parts)))) for step in range(10)]
        found[ranks] = joined, [[told for part in parts for told in part[step].damaged] for step in range(10)]
    for ranks in (2, 4):
        assert all(map(equal, found[1][0], found[ranks][0]))
        assert found[1][1] == found[ranks][1]
    assert sum(map(len, found[1][1])) >= 1


def test_more_damaged_samples_than_allowed_stop_the_run_and_name_the_last(own_index: Index) -> None:
    named = {place: damage(own_index, place) for place in (2, 9, 17)}
    reader = ShardReader(own_index, "train")
    plan = plan_of(reader, epochs=20)
    assert len({told for item in batches_of(reader, plan, max_damaged=3) for told in item.damaged}) == 3
    for allowed in (0, 2):
        seen: list[str] = []
        message = rf"{allowed + 1} damaged samples so far, data.max_damaged {allowed} .*the last: sample .*dist-train verify"
        batches = train_batches(reader, plan, 0, plan.steps, max_damaged=allowed)
        with pytest.raises(ShardError, match=message) as caught:
            seen.extend(told for item in batches for told in item.damaged)
        assert len(set(seen)) <= allowed
        last = [place for place, names in named.items() if names[0] in str(caught.value)]
        assert len(last) == 1
        assert not any(named[last[0]][0] in told for told in seen)


def test_a_shard_that_is_gone_stops_the_run(own_index: Index) -> None:
    (own_index.root / own_index.shards[1].name).unlink()
    reader = ShardReader(own_index, "train")
    with pytest.raises(ShardError, match=r"train-000001\.tar can't be read: .*run dist-train verify"):
        batches_of(reader, plan_of(reader))


CELL = b'{"id":"x","frac":[[0,0,0]],"lattice_A":[[5,0,0],[0,5,0],[0,0,5]],"numbers":'
NO_CRYSTALS = (
    b"[]", b"{", b'{"numbers":[]}', b'{"lattice_A":1,"numbers":[1]}', b'{"lattice_A":NaN,"numbers":[1]}',
    CELL + b"[0]}", CELL + b"[1000000000000]}",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_CRYSTALS)
def test_a_structure_that_is_none_is_damage_though_its_checksum_is_right(own_index: Index, text: bytes) -> None:
    """The bytes are anybody's, and so is the index."""
    index = rewritten_member(own_index, 3, "structure.json", text)
    reader = ShardReader(index, "train")
    told = [message for item in batches_of(reader, plan_of(reader)) for message in item.damaged]
    assert told
    assert all("structure.json holds no crystal" in message for message in told)


# Structures


def structures(folder: Path, spec: GridSpec = CUBE, count: int = CRYSTALS, copies: int = 1) -> ShardReader:
    crystals = real_crystals(count, spec)
    return ShardReader(write_shards(folder, crystals, spec, "structures", copies=copies), "train")


WINDOW = GridSpec(frame="window", shape=16, box_A=4.5, random_rotation=True, random_origin=True)
UNIT = GridSpec(frame="unit", shape=24, box_A=6.9, random_rotation=True)
MOVED = CUBE.model_copy(update={"random_origin": True})


def test_structures_are_the_grids_that_would_be_stored(tmp_path: Path, index: Index) -> None:
    """Where nothing is random; made in one way, stored in another: to float16 and the error that the batch states."""
    stored, reader = ShardReader(index, "train"), structures(tmp_path)
    plan = plan_of(reader, window=9)
    for one, other in zip(batches_of(stored, plan), batches_of(reader, plan), strict=True):
        grids, made = one.batch.to(CPU), other.batch.to(CPU)
        torch.testing.assert_close(made.density_BCDHW, grids.density_BCDHW.float(), rtol=1e-3, atol=2e-6)
        assert torch.equal(made.species_BDHW, grids.species_BDHW)
        assert torch.equal(made.cell_B6, grids.cell_B6)
        assert torch.equal(made.composition_BZ, grids.composition_BZ)


@pytest.mark.parametrize("spec", [MOVED, WINDOW, UNIT], ids=["cell", "window", "unit"])
def test_structures_lie_elsewhere_in_each_epoch_and_the_same_whatever_reads_them(tmp_path: Path, spec: GridSpec) -> None:
    reader = structures(tmp_path, spec, 8)
    plan = plan_of(reader, epochs=3)
    seen: dict[int, list[torch.Tensor]] = {place: [] for place in range(8)}
    for item in batches_of(reader, plan):
        for place, density in zip(plan.places(item.step).tolist(), item.batch.to(CPU).density_BCDHW, strict=True):
            seen[place].append(density)
    assert all(not torch.allclose(a, b, atol=0.1) for found in seen.values() for a, b in zip(found, found[1:]))
    resumed = list(train_batches(ShardReader(reader.index, "train"), plan, 3, plan.steps, threads=3))
    halves = [batches_of(reader, plan_of(reader, epochs=3, rank=rank, ranks=2)) for rank in range(2)]
    for item in resumed:
        joined = CrystalBatch(*map(torch.cat, zip(*(half[item.step].batch for half in halves))))
        for number, density in enumerate(item.batch.to(CPU).density_BCDHW):
            place = int(plan.places(item.step)[number])
            torch.testing.assert_close(density, seen[place][item.step // plan.steps_per_epoch], rtol=0, atol=1e-6)
            torch.testing.assert_close(density, joined.density_BCDHW[number], rtol=0, atol=1e-6)
        assert torch.equal(item.batch.weight_B, joined.weight_B)


def test_nothing_random_means_the_same_grids_in_each_epoch(tmp_path: Path) -> None:
    reader = structures(tmp_path, CUBE, 4)
    plan = plan_of(reader, epochs=4)
    rows = [
        {p: row for p, row in zip(plan.places(item.step).tolist(), item.batch.to(CPU).density_BCDHW, strict=True)}
        for item in batches_of(reader, plan)
    ]
    for later in rows[1:]:
        for place in range(4):
            torch.testing.assert_close(later[place], rows[0][place], rtol=0, atol=1e-6)


def test_copies_of_a_crystal_lie_apart(tmp_path: Path) -> None:
    reader = structures(tmp_path, MOVED, 4, copies=2)
    (unmade,) = batches_of(reader, plan_of(reader, global_batch=8, epochs=1), device=META)
    assert isinstance(unmade.batch, StructureBatch)
    assert len(set(unmade.batch.seeds)) == 8
    (item,) = batches_of(reader, plan_of(reader, global_batch=8, epochs=1))
    order = np.argsort(plan_of(reader, global_batch=8, epochs=1).places(0))
    one, other = item.batch.to(CPU).density_BCDHW[order].view(4, 2, *item.batch.to(CPU).density_BCDHW.shape[1:]).unbind(1)
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in zip(one, other, strict=True))


def test_structures_in_shards_are_representable_as_they_are(tmp_path: Path) -> None:
    """What the grid was checked for before it was written needs no check again."""
    for number, spec in enumerate((CUBE, MOVED, ADAPTIVE)):
        reader = structures(tmp_path / str(number), spec, 8)
        for place in range(8):
            crystal = reader.crystal(place)
            again = representable(crystal, spec)
            np.testing.assert_allclose(again.lattice_A, crystal.lattice_A, atol=1e-9)


def test_units_keep_the_images_that_they_were_stored_with(tmp_path: Path) -> None:
    """Centring again moves no atom of a cluster to another cell, though many lie outside of their own."""
    spec = UNIT.model_copy(update={"random_rotation": False})
    reader = structures(tmp_path, spec, 8)
    (item,) = batches_of(reader, plan_of(reader, global_batch=8, epochs=1), device=META)
    batch = item.batch
    assert isinstance(batch, StructureBatch)
    assert any((row < 0).any() or (row >= 1).any() for row in batch.crystals.frac_BN3)
    made, (density, species) = batch.to(CPU), voxelize_batch(batch.crystals, spec)
    torch.testing.assert_close(made.density_BCDHW, density, rtol=0, atol=1e-5)
    assert torch.equal(made.species_BDHW, species)


def test_a_device_that_is_no_cpu_gets_structures_whose_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    reader = structures(tmp_path, MOVED)
    damage(reader.index, 3)
    plan = plan_of(reader, global_batch=11, epochs=1)
    for item, made in zip(batches_of(reader, plan, device=META), batches_of(reader, plan), strict=True):
        batch, whole = item.batch, made.batch.to(CPU)
        assert isinstance(batch, StructureBatch)
        assert batch.size == whole.size == 11
        assert item.damaged == made.damaged
        assert equal(batch.to(CPU), whole)
        for part in (slice(0, 4), slice(4, 11)):
            rows = batch.rows(part).to(CPU)
            torch.testing.assert_close(rows.density_BCDHW, whole.density_BCDHW[part], rtol=0, atol=1e-6)
            assert torch.equal(rows.species_BDHW, whole.species_BDHW[part])
            assert torch.equal(rows.weight_B, whole.weight_B[part])


# Substitution


def test_substituted_structures_are_new_in_each_epoch_and_the_same_again(tmp_path: Path) -> None:
    """Cells and compositions go with them; ranks and resuming change nothing."""
    reader = ShardReader(write_shards(tmp_path, real_crystals(CRYSTALS), store="structures"), "train")
    plan = plan_of(reader, epochs=2)
    plain, found = batches_of(reader, plan), batches_of(reader, plan, substitution=0.5)
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.batch.composition_BZ.sum(1), other.batch.composition_BZ.sum(1))
        density = other.batch.to(CPU)
        present = [set(species[species > 0].tolist()) for species in density.species_BDHW]
        counted = [set(row.nonzero()[:, 0].tolist()) for row in other.batch.composition_BZ]
        assert present == counted
    atoms = [
        {place: row.tolist() for item in half for place, row in zip(plan.places(item.step), item.batch.composition_BZ)}
        for half in (found[:5], found[5:])
    ]
    assert any(atoms[0][place] != atoms[1][place] for place in atoms[0].keys() & atoms[1].keys())
    rest = list(train_batches(ShardReader(reader.index, "train"), plan, 3, plan.steps, substitution=0.5))
    halves = [batches_of(reader, plan_of(reader, rank=rank, ranks=2), substitution=0.5) for rank in range(2)]
    for one, other in zip(rest, found[3:], strict=True):
        assert equal(one.batch.to(CPU), other.batch.to(CPU))
    for whole, *parts in zip(found, *halves, strict=True):
        joined = torch.cat([part.batch.composition_BZ for part in parts])
        assert torch.equal(whole.batch.composition_BZ, joined)
