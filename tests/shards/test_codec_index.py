"""Bytes of samples and the index that points at them: round trips, hostile bytes, reproducible tars."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_shards import ADAPTIVE, CUBE, real_crystals, write_shards

from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import VoxelGrid, voxelize
from dist_train.errors import ShardError
from dist_train.files import sha256
from dist_train.shards import codec
from dist_train.shards.codec import MEMBERS, add_member, decode_sample, encode_sample, open_tar, read_npy
from dist_train.shards.half import to_half
from dist_train.shards.index import INDEX_NAME, SCHEMA_VERSION, Index, config_hash, record_from_json

CRYSTALS = 9
RICH = GridSpec(channels=("occupancy", "period", "group"))
TRICLINIC = Crystal("waves", [[4, 0, 0], [1.5, 3.8, 0], [1.2, 1.1, 3.9]], [[0.1, 0.2, 0.3], [0.6, 0.6, 0.7]], [8, 22])


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_shards(tmp_path / "shards", real_crystals(CRYSTALS), val=2)


def real_sample(grid: GridSpec = CUBE) -> tuple[Crystal, VoxelGrid]:
    (crystal,) = real_crystals(1, grid)
    return crystal, voxelize(crystal, grid)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0), allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=allow_pickle)
    return stream.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def same(one: Crystal, other: Crystal) -> bool:
    return one.to_json() == other.to_json()


# Members


@given(hnp.arrays(st.sampled_from([np.uint8, np.float16]), hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)))
def test_an_npy_member_gives_back_the_array(array: np.ndarray) -> None:
    back = read_npy(memoryview(npy(array)), array.dtype.type)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("encoding", ["raw", "compact"])
def test_members_are_plain_files_that_numpy_reads(encoding: str) -> None:
    crystal, grid = real_sample()
    members = encode_sample(crystal, grid, encoding)  # type: ignore[arg-type]
    assert tuple(members) == MEMBERS[encoding]
    *arrays, structure = members.items()
    for (name, data), shape in zip(arrays, (grid.density_CDHW.shape, grid.species_DHW.shape), strict=True):
        if name.endswith(".zst"):
            data = pa.input_stream(io.BytesIO(data), compression="zstd").read()
        assert np.load(io.BytesIO(data), allow_pickle=False).shape == shape
    assert same(Crystal.from_json(structure[1]), crystal)


def test_a_raw_sample_gives_back_grid_and_crystal() -> None:
    crystal, grid = real_sample()
    density, species, back = decode_sample(encode_sample(crystal, grid))
    assert density is not None
    assert density.dtype == np.float16
    np.testing.assert_array_equal(density, grid.density_CDHW.astype(np.float16))
    np.testing.assert_array_equal(species, grid.species_DHW)
    assert same(back, crystal)


@pytest.mark.parametrize("table", ["perov_5", "materials_project"])
def test_a_compact_sample_gives_back_all_but_the_last_digits(table: str) -> None:
    """The stated error holds for each voxel of each channel, empty channels stay empty, and it is smaller by far."""
    for crystal in real_crystals(6, RICH, table):
        grid = voxelize(crystal, RICH)
        members = encode_sample(crystal, grid, "compact")
        density, species, back = decode_sample(members)
        assert density is not None
        assert density.dtype == np.float16
        peaks = grid.density_CDHW.max((1, 2, 3))
        errors = np.abs(density - grid.density_CDHW).max((1, 2, 3))
        assert (errors <= 0.0045 * peaks).all()
        assert errors.max() > 0
        assert not density[peaks == 0].any()
        np.testing.assert_array_equal(species, grid.species_DHW)
        assert same(back, crystal)
        assert sum(map(len, members.values())) < sum(map(len, encode_sample(crystal, grid).values())) / 20


@given(
    hnp.arrays(np.float32, (2, 3, 2, 2), elements=st.floats(0, 60_000, width=32)),
    hnp.arrays(np.uint8, (3, 2, 2)),
    st.sampled_from([1e-4, 1.0]),
)
def test_any_grid_keeps_the_stated_error(density: np.ndarray, species: np.ndarray, scale: float) -> None:
    grid = VoxelGrid(density * np.float32(scale), species)
    back, labels, _ = decode_sample(encode_sample(TRICLINIC, grid, "compact"))
    assert back is not None
    peaks = grid.density_CDHW.max((1, 2, 3), keepdims=True)
    # float16 has no numbers between 0 and 6e-8: half of that is lost by raw too.
    assert (np.abs(back - grid.density_CDHW) <= 0.0045 * peaks + 3e-8).all()
    np.testing.assert_array_equal(labels, species)


def test_a_structure_alone_and_its_copy() -> None:
    crystal, grid = real_sample()
    members = encode_sample(crystal, None, "raw", 3)
    assert tuple(members) == MEMBERS["structures"]
    assert json.loads(members["structure.json"])["copy"] == 3
    density, species, back = decode_sample(members)
    assert (density, species) == (None, None)
    assert same(back, crystal)
    assert members == encode_sample(crystal, None, "compact", 3)
    for encoding in ("raw", "compact"):
        assert "copy" not in json.loads(encode_sample(crystal, grid, encoding, 0)["structure.json"])  # type: ignore[arg-type]
        assert json.loads(encode_sample(crystal, grid, encoding, 1)["structure.json"])["copy"] == 1  # type: ignore[arg-type]


def test_only_compact_samples_tell_maxima() -> None:
    crystal, grid = real_sample()
    assert "density_max" not in json.loads(encode_sample(crystal, grid)["structure.json"])
    row = json.loads(encode_sample(crystal, grid, "compact")["structure.json"])
    assert row["density_max"] == grid.density_CDHW.max((1, 2, 3)).tolist()


def test_rounding_below_zero_is_zero_and_negative_densities_are_refused_by_compact() -> None:
    density = voxelize(TRICLINIC, CUBE, algorithm="reciprocal").density_CDHW
    density[0, 0, 0, 0] = -1e-6
    grid = VoxelGrid(density, np.zeros(density.shape[1:], np.uint8))
    back, _, _ = decode_sample(encode_sample(TRICLINIC, grid, "compact"))
    assert back is not None
    assert back.min() == 0
    below = VoxelGrid(density - np.float32(0.1), grid.species_DHW)
    with pytest.raises(ShardError, match=r"waves: density down to -0\.1.*data\.encoding=raw"):
        encode_sample(TRICLINIC, below, "compact")
    assert decode_sample(encode_sample(TRICLINIC, below))[0] is not None


@pytest.mark.parametrize("encoding", ["raw", "compact"])
def test_densities_beyond_float16_are_refused(encoding: str) -> None:
    grid = VoxelGrid(np.full((1, 2, 2, 2), 7e4, np.float32), np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(ShardError, match=r"waves: .*values up to 7e\+04, float16 holds at most 65504; raise grid\.sigma_A"):
        encode_sample(TRICLINIC, grid, encoding)  # type: ignore[arg-type]


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-65519, 65519, width=32)))
def test_half_precision_is_that_of_numpy(values: np.ndarray) -> None:
    np.testing.assert_array_equal(to_half(values).view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_half_precision_rounds_every_tie_to_even() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    for values in (halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), -ties):
        np.testing.assert_array_equal(to_half(values).view(np.uint16), values.astype(np.float16).view(np.uint16))
    for beyond in (65520, 1e30, np.inf, -np.inf, np.nan, -7e4):
        with pytest.raises(ValueError, match="float16 holds at most 65504"):
            to_half(np.array([0, beyond], np.float32))


# Bytes of others


def hostile() -> dict[str, dict[str, bytes]]:
    """Members that no writer of ours makes, by what is wrong with them."""
    crystal, grid = real_sample()
    raw, compact = encode_sample(crystal, grid), encode_sample(crystal, grid, "compact")
    row = json.loads(compact["structure.json"])
    half = grid.density_CDHW.astype(np.float16)
    header = npy(np.zeros(4, np.uint8))

    def told(shape: bytes) -> bytes:
        """An .npy whose header tells another shape, of the same length."""
        return header.replace(b"(4,), }" + b" " * (len(shape) - 4), shape + b", }")

    def maxima(value: object) -> dict[str, bytes]:
        return compact | {"structure.json": json.dumps({**row, "density_max": value}).encode()}

    def structure(**changes: object) -> dict[str, bytes]:
        kept = {k: v for k, v in (row | changes).items() if v is not None}
        return {"structure.json": json.dumps(kept).encode()}

    arrays = {
        "objects": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        "fortran order": npy(np.asfortranarray(half)),
        "version 2": npy(half, (2, 0)),
        "float64": npy(half.astype(np.float64)),
        "big endian": npy(half.astype(">f2")),
        "named fields": npy(np.zeros(3, [("a", "u1")])),
        "code in the header": npy(half).replace(b"False", b"exit("),
        "negative shape": told(b"(-1,)"),
        "shape that overflows": told(b"(4294967296, 4294967296)"),
        "huge shape": told(b"(999999999, 999999999)"),
        "no header": b"",
        "a long header": b"\x93NUMPY\x01\x00\xff\xff{" + b"(" * 60_000,
        "one value more": npy(half) + b"\0\0",
        "three axes": npy(half[0]),
        "another shape": npy(half[:, :8]),
    }
    bomb = zstd(npy(np.zeros((1, 2**14, 2**14), np.uint8)) + b"\0")
    frames = {
        "zstd of rubbish": b"\x28\xb5\x2f\xfd" + bytes(range(60)),
        "no zstd": b"rubbish, and not a frame at all",
        "empty frame": zstd(b""),
        "cut frame": compact["density.npy.zst"][:-9],
        "frame and more": compact["density.npy.zst"] + b"more",
        "two frames": compact["density.npy.zst"] * 2,
        "magic alone": b"\x28\xb5\x2f\xfd",
        "half a header": b"\x28\xb5\x2f\xfd\xc0",
        "a bomb": bomb,
        "frame that tells 2^63 bytes": b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x7f" + b"\1\0\0",
        "frame without a size": b"\x28\xb5\x2f\xfd\x00\x58\1\0\0",
        "float16 in zstd": zstd(npy(half)),
    }
    return {
        **{f"density: {what}": raw | {"density.npy": data} for what, data in arrays.items()},
        **{f"species: {what}": raw | {"species.npy": data} for what, data in arrays.items()},
        **{f"compact: {what}": compact | {"density.npy.zst": data} for what, data in frames.items()},
        **{f"compact species: {what}": compact | {"species.npy.zst": data} for what, data in frames.items()},
        **{
            f"density_max {value!r:.20}": maxima(value)
            for value in (
                None, 1, [], [1.0], "11111111", [[1.0]] * 8, ["1"] * 8, [-1.0] * 8, [1e300] * 8, [10**400] * 8,
                [float("nan")] * 8, [float("inf")] * 8, [None] * 8, [True] * 8, {"a": 1}, [1.0, [2.0]],
            )
        },
        "no json": {"structure.json": b"\xff{"},
        "a list": {"structure.json": b"[]"},
        "deep json": {"structure.json": b"[" * 100_000},
        "no lattice": structure(lattice_A=None),
        "lattice of text": structure(lattice_A="cubic"),
        "flat lattice": structure(lattice_A=[[1, 0, 0], [2, 0, 0], [0, 0, 1]]),
        "infinite lattice": structure(lattice_A=[[float("inf")] * 3] * 3),
        "ragged positions": structure(frac=[[0, 0, 0], [0]]),
        "a position missing": structure(frac=row["frac"][1:]),
        "no atoms": structure(frac=[], numbers=[]),
        "element 119": structure(numbers=[119] * len(row["numbers"])),
        "element 0": structure(numbers=[0] * len(row["numbers"])),
        "element 10^30": structure(numbers=[10**30] * len(row["numbers"])),
        "no members": {},
        "no structure": {k: v for k, v in raw.items() if k != "structure.json"},
        "no species": {k: v for k, v in raw.items() if k != "species.npy"},
        "both encodings": raw | compact,
        "a pickle": {"density.pyd": b"", "structure.json": raw["structure.json"]},
    }  # fmt: skip


def refused(members: dict[str, bytes]) -> bool:
    try:
        decode_sample(members)
    except ValueError:
        return True
    return False


def test_hostile_members_are_value_errors_and_fill_no_memory() -> None:
    found = hostile()
    assert len({frozenset(members.items()) for members in found.values()}) == len(found)
    for what, members in found.items():
        tracemalloc.start()
        try:
            assert refused(members), what
            assert tracemalloc.get_traced_memory()[1] < 2**25, what
        finally:
            tracemalloc.stop()


def test_the_limit_of_what_a_frame_unpacks_to_holds_for_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    crystal, grid = real_sample()
    members = encode_sample(crystal, grid, "compact")
    size = len(npy(grid.density_CDHW.astype(np.uint8)))
    monkeypatch.setattr(codec, "MAX_BYTES", size)
    decode_sample(members)
    encode_sample(crystal, grid, "compact")
    monkeypatch.setattr(codec, "MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"zstd frame of {size} bytes when unpacked.*at most {size - 1}"):
        decode_sample(members)
    with pytest.raises(ShardError, match=r"data\.encoding=raw"):
        encode_sample(crystal, grid, "compact")


@given(st.data(), st.sampled_from(["raw", "compact"]))
def test_altered_and_cut_members_are_read_or_are_value_errors(data: st.DataObject, encoding: str) -> None:
    members = encode_sample(*real_sample(), encoding)  # type: ignore[arg-type]
    name = data.draw(st.sampled_from(sorted(members)))
    raw = bytearray(members[name])
    place = data.draw(st.integers(0, min(len(raw), 200) - 1) | st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(raw), members[name][:place]):
        try:
            density, species, _ = decode_sample(members | {name: damaged})
        except ValueError:
            continue
        assert density is not None
        assert species is not None
        assert density.shape[1:] == species.shape
        assert name == "structure.json" or len(damaged) == len(members[name])


# Tars


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


@pytest.mark.parametrize("encoding", ["raw", "compact"])
@pytest.mark.parametrize("grid", [CUBE, ADAPTIVE], ids=["cube", "adaptive"])
def test_equal_crystals_give_equal_tars(tmp_path: Path, grid: GridSpec, encoding: str) -> None:
    crystals = real_crystals(5, grid)
    first, second = (write_shards(tmp_path / name, crystals, grid, encoding=encoding) for name in ("first", "second"))
    for one, other in zip(first.shards, second.shards, strict=True):
        assert (first.root / one.name).read_bytes() == (second.root / other.name).read_bytes()
    assert first.shards == second.shards
    assert (first.root / INDEX_NAME).read_bytes() == (second.root / INDEX_NAME).read_bytes()


def test_another_grid_gives_other_bytes(tmp_path: Path, index: Index) -> None:
    grid = GridSpec(shape=16, max_spacing_A=0.5, channels=("period", "occupancy"))
    other = write_shards(tmp_path / "other", real_crystals(CRYSTALS, grid), grid, val=2)
    assert other.digest != index.digest
    assert other.config_hash != index.config_hash


def test_tars_hold_nothing_of_time_or_user(index: Index) -> None:
    for shard in index.shards:
        with tarfile.open(index.root / shard.name) as tar:
            kept = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in tar.getmembers()}
        assert kept == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


@pytest.mark.parametrize(("store", "encoding"), [("grids", "raw"), ("grids", "compact"), ("structures", "raw")])
def test_the_index_points_at_every_byte(tmp_path: Path, store: str, encoding: str) -> None:
    """Against the standard library's reading of the tar: same members, same order, same offsets, right checksums."""
    names = MEMBERS["structures" if store == "structures" else encoding]
    index = Index.read(write_shards(tmp_path, real_crystals(CRYSTALS), store=store, encoding=encoding).root)
    for shard in index.shards:
        raw = (index.root / shard.name).read_bytes()
        assert (len(raw), sha256(index.root / shard.name)) == (shard.bytes, shard.sha256)
        expected = [(f"{s.key}.{name}", *s.members[name]) for s in shard.samples for name in names]
        with tarfile.open(index.root / shard.name) as tar:
            assert [(m.name, m.offset_data, m.size) for m in tar.getmembers()] == expected
        for sample in shard.samples:
            assert tuple(sample.members) == names
            parts = [raw[start : start + size] for start, size in sample.members.values()]
            assert zlib.crc32(b"".join(parts)) == sample.crc32
            assert decode_sample(dict(zip(names, parts, strict=True)))[2].id == sample.id


# Index


@pytest.mark.parametrize("grid", [CUBE, ADAPTIVE], ids=["cube", "adaptive"])
def test_index_gives_back_what_was_written(tmp_path: Path, grid: GridSpec) -> None:
    crystals = real_crystals(CRYSTALS, grid, "materials_project")
    index = write_shards(tmp_path, crystals, grid, "structures", copies=2, val=2)
    back = Index.read(index.root)
    assert back == index
    assert back.digest == index.digest
    assert back.grid == grid
    assert (back.store, back.encoding) == ("structures", "raw")
    assert len(back.samples("train")) == 14
    assert [sample.copy for _, sample in back.samples("val")] == [0, 1, 0, 1]


def test_index_is_plain_json_with_one_line_a_sample(index: Index) -> None:
    text = (index.root / INDEX_NAME).read_text()
    document = json.loads(text)
    assert document["schema_version"] == SCHEMA_VERSION == 2
    assert (document["digest"], document["counts"]) == (index.digest, index.counts)
    lines = [json.loads(line.rstrip(",")) for line in text.splitlines() if line.startswith('{"key"')]
    written = [sample for shard in document["shards"] for sample in shard["samples"]]
    assert lines == written == [json.loads(json.dumps(asdict(s))) for shard in index.shards for s in shard.samples]
    for shard, record in zip(document["shards"], index.shards, strict=True):
        assert shard["keys"] == [record.first_key, record.last_key] == [record.samples[0].key, record.samples[-1].key]


def test_a_record_alone_can_be_kept_as_json(index: Index) -> None:
    for record in index.shards:
        assert record_from_json(record.to_json()) == record
        assert record_from_json(json.dumps(asdict(record))) == record


def test_index_can_be_moved_with_its_shards(tmp_path: Path, index: Index) -> None:
    index.root.rename(tmp_path / "moved")
    assert Index.read(tmp_path / "moved") == replace(index, root=tmp_path / "moved")


def test_elements_are_those_of_the_split(index: Index) -> None:
    crystals = real_crystals(CRYSTALS)
    assert index.elements("val") == tuple(sorted({int(z) for c in crystals[7:] for z in c.numbers_N}))
    assert index.elements("train") == tuple(sorted({int(z) for c in crystals[:7] for z in c.numbers_N}))


def test_a_split_that_is_not_there_is_named(index: Index) -> None:
    with pytest.raises(ShardError, match=r"no shard of split 'test'; it has \['train', 'val'\]"):
        index.split("test")


def test_another_schema_is_refused(index: Index) -> None:
    path = index.root / INDEX_NAME
    document = json.loads(path.read_text())
    for version in (1, 3):
        path.write_text(json.dumps({**document, "schema_version": version}))
        with pytest.raises(ShardError, match=f"schema version {version}, this program reads 2"):
            Index.read(index.root)


def test_missing_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no finished shards; run dist-train voxelize"):
        Index.read(tmp_path)


def test_cut_index_is_refused(index: Index) -> None:
    path = index.root / INDEX_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"can't be read"):
        Index.read(index.root)


def test_an_index_without_a_grid_is_told(index: Index) -> None:
    for config in ({}, {"grid": {"shape": 1}}):
        with pytest.raises(ShardError, match=r"index\.json has no usable grid"):
            assert replace(index, config=config).grid


def test_config_hash_tells_every_change() -> None:
    """The order of keys too: crystals go to splits in theirs."""
    assert config_hash({"a": 1, "b": {"c": 2}}) == config_hash({"a": 1, "b": {"c": 2}})
    assert config_hash({"a": {"c": 2, "d": 3}}) != config_hash({"a": {"d": 3, "c": 2}})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": [1, 2]}) != config_hash({"a": [2, 1]})


@pytest.mark.parametrize("text", ["[]", '{"schema_version": 2}', "not json", "\xff", "[" * 100_000])
def test_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match=INDEX_NAME):
        Index.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../elsewhere.tar"}, {"name": "/etc/passwd"}, {"name": ""}, {"name": ".."}, {"samples": []},
        {"samples": [1]}, {"samples": None}, {"bytes": "many"}, {"bytes": float("inf")}, {"elements": 3},
    ],
)  # fmt: skip
def test_an_index_with_a_wrong_shard_is_refused(index: Index, change: dict[str, object]) -> None:
    path = index.root / INDEX_NAME
    document = json.loads(path.read_text())
    document["shards"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=r"index\.json is damaged"):
        Index.read(index.root)


@pytest.mark.parametrize("members", [{}, {"density.npy": [512]}, {"density.npy": [-1, 5]}, {"density.npy": [0, -5]}, []])
def test_an_index_with_a_wrong_sample_is_refused(index: Index, members: object) -> None:
    path = index.root / INDEX_NAME
    document = json.loads(path.read_text())
    document["shards"][0]["samples"][1]["members"] = members
    path.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=r"index\.json is damaged"):
        Index.read(index.root)
