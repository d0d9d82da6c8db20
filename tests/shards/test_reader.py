"""Random access to shards: samples are what was written, in any thread, and damage is named."""

from __future__ import annotations

import gc
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_shards import ADAPTIVE, CRYSTALS, CUBE, PER_SHARD, TABLES, damage, flip_byte, real_crystals, write_shards

from dist_train.config import GridSpec
from dist_train.crystal.frames import placed, representable
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import ShardError
from dist_train.shards import reader as reading
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader, check_shards, whole


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


@pytest.mark.parametrize("spec", [ADAPTIVE, GridSpec(frame="window", random_rotation=True, random_origin=True)])
def test_structures_are_voxelised_as_the_grids_that_are_stored(tmp_path: Path, spec: GridSpec) -> None:
    """Bit for bit, and each copy by its own rotation and origin."""
    crystals = real_crystals(6, spec, "materials_project")
    copies = 2 if spec.random_rotation else 1
    stored, alone = (
        ShardReader(Index.read(write_shards(tmp_path / store, crystals, spec, store, copies=copies).root), "train")
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
    compact = ShardReader(write_shards(tmp_path, real_crystals(CRYSTALS), encoding="compact"), "train")
    for place in range(CRYSTALS):
        one, other = raw[place], compact[place]
        np.testing.assert_array_equal(one.species_DHW, other.species_DHW)
        assert one.density_CDHW.dtype == other.density_CDHW.dtype
        np.testing.assert_allclose(one.density_CDHW, other.density_CDHW, rtol=0, atol=0.0045 * one.density_CDHW.max() + 1e-3)
        assert one.crystal.to_json() == other.crystal.to_json()


@pytest.mark.parametrize(("store", "encoding"), [("grids", "raw"), ("grids", "compact"), ("structures", "raw")])
def test_threads_that_read_at_once_read_the_same(tmp_path: Path, store: str, encoding: str) -> None:
    reader = ShardReader(write_shards(tmp_path, real_crystals(12), store=store, encoding=encoding), "train")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(reader.__getitem__, [*range(12)] * 3))
    for place, record in zip([*range(12)] * 3, found, strict=True):
        np.testing.assert_array_equal(record.density_CDHW, reader[place].density_CDHW)
        np.testing.assert_array_equal(record.species_DHW, reader[place].species_DHW)
        assert record.crystal.id == reader[place].crystal.id


def test_a_sample_that_is_not_what_the_index_says_is_named(index: Index, tmp_path: Path) -> None:
    """Right checksums are no proof: the index may be of other bytes."""

    def read(index: Index, **changes: object) -> None:
        shard, *others = index.shards
        first = replace(shard.samples[0], **changes)  # type: ignore[arg-type]
        shards = (replace(shard, samples=(first, *shard.samples[1:])), *others)
        with pytest.raises(ShardError, match=rf"{first.key} .* is damaged .*run dist-train verify"):
            ShardReader(replace(index, shards=shards), "train")[0]

    sample = index.shards[0].samples[0]
    read(index, shape=(16, 16, 8))
    read(index, members={name: (2**62, 5) for name in sample.members})
    read(index, members={name: (0, 2**62) for name in sample.members})
    whole = ShardReader(index, "train")._members(index.shards[0], sample)
    read(index, members={"structure.json": sample.members["species.npy"]}, crc32=zlib.crc32(whole["species.npy"]))
    alone = write_shards(tmp_path, real_crystals(2), store="structures")
    read(alone, shape=(16, 16, 8))
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


def test_what_is_whole_is_read_past_damage(own_index: Index) -> None:
    for place in (0, 2):
        damage(own_index, place)
    reader = ShardReader(own_index, "train")
    assert [r.crystal.id for r in whole(reader.__getitem__, range(5))] == [reader.entries[i][1].id for i in (1, 3, 4)]
    assert whole(reader.crystal, ()) == []
    with pytest.raises(ShardError, match=reader.entries[2][1].key):
        whole(reader.crystal, (0, 2))


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
    with pytest.raises(ShardError) as caught:
        check_shards(own_index, ("train",))
    for told in (f"3 shards of {own_index.root}", f"{second.name} is missing", f"{third.name} has 0 bytes", "verify"):
        assert told in str(caught.value)
    reader = ShardReader(own_index, "train")
    for place, path in 2 * ((0, first), (PER_SHARD, second), (2 * PER_SHARD, third)):
        with pytest.raises(ShardError, match=path.name):
            reader[place]


def test_whole_shards_of_the_splits_asked_for_pass_the_check(tmp_path: Path) -> None:
    index = write_shards(tmp_path, real_crystals(12), per_shard=4, val=4)
    (tmp_path / index.split("val")[0].name).unlink()
    check_shards(index, ("train",))
    with pytest.raises(ShardError, match=r"1 shards of .*val-000000\.tar is missing"):
        check_shards(index, ("train", "val"))


def test_a_long_list_of_missing_shards_is_cut(tmp_path: Path) -> None:
    index = write_shards(tmp_path, real_crystals(8), per_shard=1)
    for shard in index.shards:
        (tmp_path / shard.name).unlink()
    with pytest.raises(ShardError, match=r"8 shards of .*train-000004\.tar is missing and 3 more; run dist-train verify"):
        check_shards(index, ("train",))


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_not_the_end_of_the_process(own_index: Index) -> None:
    reader = ShardReader(own_index, "train")
    assert reader[0]
    os.truncate(own_index.root / own_index.shards[0].name, 1024)
    with pytest.raises(ShardError, match=r"is damaged \(crc32"):
        reader[PER_SHARD - 1]


def test_few_files_are_open_at_a_time_and_none_after_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "OPEN_FILES", 3)
    reader = ShardReader(write_shards(tmp_path, real_crystals(CRYSTALS), per_shard=1), "train")

    def held() -> int:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(link) and os.readlink(link).startswith(str(tmp_path)) for link in links)

    with ThreadPoolExecutor(4) as pool:
        ids = [record.crystal.id for record in pool.map(reader.__getitem__, [*range(CRYSTALS)] * 20)]
    assert ids == [sample.id for _, sample in reader.entries] * 20
    assert held() == 3
    del reader
    gc.collect()
    assert held() == 0
