"""Bytes of samples and the index that points at them: round trips, reproducible tars, damage that is found."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dist_train.config import GridSpec
from dist_train.crystal.frames import representable
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import VoxelGrid, voxelize
from dist_train.errors import ShardError
from dist_train.files import sha256
from dist_train.shards.codec import MEMBERS, add_member, encode_sample, open_tar, read_npy
from dist_train.shards.index import INDEX_NAME, SCHEMA_VERSION, Index, config_hash, verify
from dist_train.shards.plan import Chunk, ShardTask, scan_chunk
from dist_train.shards.writer import build_shard

TABLE = Path(__file__).parents[2] / "data" / "sample" / "perov_5.parquet"
CUBE = GridSpec(shape=16, max_spacing_A=0.5, channels=("occupancy", "period"))
ADAPTIVE = GridSpec(shape="adaptive")
CRYSTALS = 9
PER_SHARD = 4


def write_shards(folder: Path, grid: GridSpec) -> Index:
    """Real perovskites in small shards of two splits, without Ray."""
    root, work = folder / "shards", folder / "work"
    scan = scan_chunk(0, Chunk(TABLE.parent, (TABLE.name,), 0, CRYSTALS), work, grid, {"train": 1.0})
    tasks = [
        ShardTask(f"{split}-{number:06d}.tar", split, first, scan.rows[start:stop])
        for split, number, first, start, stop in (("train", 0, 0, 0, 4), ("train", 1, 4, 4, 7), ("val", 0, 0, 7, 9))
    ]
    records = tuple(build_shard(task, root, work, grid) for task in tasks)
    config = {"data": {"samples_per_shard": PER_SHARD}, "grid": grid.model_dump(mode="json")}
    counts = {"inputs": CRYSTALS, "accepted": CRYSTALS, "rejected": 0}
    index = Index(root, config, config_hash(config), "0", counts, records)
    index.write()
    return index


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_shards(tmp_path, CUBE)


def real_sample() -> tuple[Crystal, VoxelGrid]:
    crystal = next(item for item in read_parquet_rows(TABLE, 0, 5) if isinstance(item, Crystal))
    crystal = representable(crystal, CUBE)
    return crystal, voxelize(crystal, CUBE)


# Members


@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)))
def test_an_npy_member_gives_back_the_array(array: np.ndarray) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    back = read_npy(memoryview(stream.getvalue()))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_a_sample_gives_back_grid_and_crystal() -> None:
    crystal, grid = real_sample()
    members = encode_sample(crystal, grid)
    assert tuple(members) == MEMBERS
    density, species = (read_npy(memoryview(members[name])) for name in MEMBERS[:2])
    assert density.dtype == np.float16
    assert density.shape == (grid.density_CDHW.shape[0], 16, 16, 16)
    np.testing.assert_array_equal(density, grid.density_CDHW.astype(np.float16))
    assert species.dtype == np.uint8
    np.testing.assert_array_equal(species, grid.species_DHW)
    assert set(np.unique(species)) - {0} == set(crystal.numbers_N.tolist())
    back = Crystal.from_json(members["structure.json"])
    assert back.id == crystal.id
    np.testing.assert_array_equal(back.lattice_A, crystal.lattice_A)
    np.testing.assert_array_equal(back.frac_N3, crystal.frac_N3)
    np.testing.assert_array_equal(back.numbers_N, crystal.numbers_N)


def test_members_are_plain_npy_files_that_numpy_reads_without_pickle() -> None:
    crystal, grid = real_sample()
    data = encode_sample(crystal, grid)["density.npy"]
    np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), read_npy(memoryview(data)))


def test_arrays_that_need_pickle_or_another_order_are_refused() -> None:
    objects, fortran, newer = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(objects, np.array([{"a": 1}], dtype=object), version=(1, 0), allow_pickle=True)
    np.lib.format.write_array(fortran, np.asfortranarray(np.zeros((2, 3))), version=(1, 0))
    np.lib.format.write_array(newer, np.zeros((2, 3)), version=(2, 0))
    for stream in (objects, fortran, newer):
        with pytest.raises(ValueError, match=r"objects|version"):
            read_npy(memoryview(stream.getvalue()))


def test_a_cut_npy_is_an_error() -> None:
    crystal, grid = real_sample()
    data = encode_sample(crystal, grid)["species.npy"]
    for size in (0, 5, 60, len(data) - 1):
        with pytest.raises(ValueError):  # noqa: PT011 (numpy words each cut in its own way)
            read_npy(memoryview(data[:size]))


@given(st.lists(st.binary(max_size=1300), max_size=6))
def test_offsets_of_members_are_those_that_tarfile_finds(contents: list[bytes]) -> None:
    stream = io.BytesIO()
    with open_tar(stream) as tar:
        offsets = [add_member(tar, f"k{i}.bin", data) for i, data in enumerate(contents)]
    whole = stream.getvalue()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    assert [member.offset_data for member in members] == offsets
    assert [whole[start : start + len(data)] for start, data in zip(offsets, contents, strict=True)] == contents


# Shards


@pytest.mark.parametrize("grid", [CUBE, ADAPTIVE], ids=["cube", "adaptive"])
def test_equal_crystals_give_equal_tars(tmp_path: Path, grid: GridSpec) -> None:
    first, second = (write_shards(tmp_path / name, grid) for name in ("first", "second"))
    for one, other in zip(first.shards, second.shards, strict=True):
        assert (first.root / one.name).read_bytes() == (second.root / other.name).read_bytes()
    assert first.shards == second.shards
    assert (first.root / INDEX_NAME).read_bytes() == (second.root / INDEX_NAME).read_bytes()


def test_another_grid_gives_other_bytes(tmp_path: Path, index: Index) -> None:
    other = write_shards(tmp_path / "other", GridSpec(shape=16, max_spacing_A=0.5, channels=("period", "occupancy")))
    assert other.digest != index.digest
    assert other.config_hash != index.config_hash


def test_tars_hold_nothing_of_time_or_user(index: Index) -> None:
    for shard in index.shards:
        with tarfile.open(index.root / shard.name) as tar:
            kept = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar.getmembers()}
        assert kept == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_the_index_points_at_every_byte(index: Index) -> None:
    """Against the standard library's reading of the tar: same members, same order, same offsets, right checksums."""
    for shard in index.shards:
        raw = (index.root / shard.name).read_bytes()
        assert (len(raw), sha256(index.root / shard.name)) == (shard.bytes, shard.sha256)
        expected = [(f"{s.key}.{name}", *s.members[name]) for s in shard.samples for name in MEMBERS]
        with tarfile.open(index.root / shard.name) as tar:
            assert [(m.name, m.offset_data, m.size) for m in tar.getmembers()] == expected
        elements = set()
        for sample in shard.samples:
            parts = [raw[start : start + size] for start, size in (sample.members[name] for name in MEMBERS)]
            crystal = Crystal.from_json(parts[2])
            elements |= set(crystal.numbers_N.tolist())
            assert zlib.crc32(b"".join(parts)) == sample.crc32
            assert (crystal.id, read_npy(memoryview(parts[1])).shape) == (sample.id, sample.shape)
            assert "." not in sample.key
        assert shard.elements == tuple(sorted(elements))


def test_keys_are_unique_and_rise_within_a_split(index: Index) -> None:
    for split, count in (("train", 7), ("val", 2)):
        assert [sample.key for _, sample in index.samples(split)] == [f"{split}{i:09d}" for i in range(count)]


def test_a_whole_shard_is_not_built_again_and_a_damaged_one_is(tmp_path: Path, index: Index) -> None:
    paths = [index.root / shard.name for shard in index.shards]
    os.utime(paths[0], ns=(1, 1))
    paths[1].write_bytes(paths[1].read_bytes()[:-1] + b"\1")
    paths[2].unlink()
    assert write_shards(tmp_path, CUBE) == index
    assert paths[0].stat().st_mtime_ns == 1
    assert not list(verify(index))


# Index


def test_index_gives_back_what_was_written(index: Index) -> None:
    back = Index.read(index.root)
    assert back == index
    assert back.digest == index.digest
    assert len(back.samples("train")) == 7


def test_index_can_be_moved_with_its_shards(tmp_path: Path, index: Index) -> None:
    index.root.rename(tmp_path / "moved")
    moved = Index.read(tmp_path / "moved")
    assert moved == replace(index, root=tmp_path / "moved")
    assert not list(verify(moved))


def test_elements_are_those_of_the_split(index: Index) -> None:
    crystals = [item for item in read_parquet_rows(TABLE, 0, CRYSTALS) if isinstance(item, Crystal)]
    assert index.elements("val") == tuple(sorted({int(z) for c in crystals[7:] for z in c.numbers_N}))
    assert index.elements("train") == tuple(sorted({int(z) for c in crystals[:7] for z in c.numbers_N}))


def test_a_split_that_is_not_there_is_named(index: Index) -> None:
    with pytest.raises(ShardError, match=r"no shard of split 'test'; it has \['train', 'val'\]"):
        index.split("test")


def test_newer_schema_is_refused(index: Index) -> None:
    path = index.root / INDEX_NAME
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ShardError, match=f"schema version {SCHEMA_VERSION + 1}, this program reads {SCHEMA_VERSION}"):
        Index.read(index.root)


def test_missing_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no finished shards; run dist-train voxelize"):
        Index.read(tmp_path)


def test_cut_index_is_refused(index: Index) -> None:
    path = index.root / INDEX_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"can't be read"):
        Index.read(index.root)


def test_config_hash_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": [1, 2]}) != config_hash({"a": [2, 1]})


def test_verify_finds_every_kind_of_damage(index: Index) -> None:
    assert not list(verify(index))
    missing, cut, flipped = (index.root / shard.name for shard in index.shards)
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-512])
    raw = bytearray(flipped.read_bytes())
    raw[len(raw) // 2] ^= 1
    flipped.write_bytes(raw)
    whole = index.shards[1].bytes
    assert list(verify(index)) == [
        (missing.name, "missing"),
        (cut.name, f"{whole - 512} bytes, {whole} expected"),
        (flipped.name, "sha256 differs"),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("whole"), CUBE)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_verify_finds_any_flipped_bit(whole: Index, place: float, bit: int) -> None:
    path = whole.root / whole.shards[0].name
    content = path.read_bytes()
    raw = bytearray(content)
    raw[int(place * len(raw))] ^= 1 << bit
    path.write_bytes(raw)
    try:
        assert list(verify(whole)) == [(path.name, "sha256 differs")]
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("text", ["[]", '{"schema_version": 1}', '{"schema_version": 1, "shards": [{}]}', "not json"])
def test_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ShardError, match=INDEX_NAME):
        Index.read(tmp_path)
