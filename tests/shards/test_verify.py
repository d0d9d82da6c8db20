"""Shards against their index: every damage is found, put down to its sample, and never hangs or ends the check."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_shards import ADAPTIVE, CUBE, altered_byte, real_crystals, rehashed, write_shards

from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import VoxelGrid, voxelize
from dist_train.errors import ShardError
from dist_train.files import sha256
from dist_train.shards.codec import add_member, encode_sample, open_tar
from dist_train.shards.index import Index, Sample, ShardRecord
from dist_train.shards.verify import QUARANTINE, Fault, quarantine, verify, verify_shard

CRYSTALS, PER_SHARD = 7, 3
BLOCK = 512
KINDS = [("grids", "raw"), ("grids", "compact"), ("structures", "raw")]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_shards(tmp_path / "shards", real_crystals(CRYSTALS), per_shard=PER_SHARD)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """For tests that leave the files as they were."""
    store, encoding = request.param
    folder = tmp_path_factory.mktemp("shared")
    return write_shards(folder, real_crystals(CRYSTALS), store=store, encoding=encoding, per_shard=PER_SHARD)


def check(index: Index, shard: int = 0, quick: bool = False) -> list[Fault]:
    return verify_shard(index.root, index.shards[shard], index.grid, quick)


def owner(record: ShardRecord, place: int) -> str:
    """The sample in whose blocks a byte of a tar lies; '' behind the last."""
    for sample in record.samples:
        offset, size = list(sample.members.values())[-1]
        if place < offset + -(-size // BLOCK) * BLOCK:
            return sample.key
    return ""


# Whole shards


@pytest.mark.parametrize("grid", [CUBE, ADAPTIVE, GridSpec(frame="window")], ids=["cube", "adaptive", "window"])
@pytest.mark.parametrize(("store", "encoding"), KINDS)
def test_whole_shards_have_no_fault(tmp_path: Path, grid: GridSpec, store: str, encoding: str) -> None:
    written = write_shards(tmp_path, real_crystals(5, grid), grid, store, encoding, copies=2, val=1)
    index = Index.read(written.root)
    assert verify(index, workers=1) == verify(index, workers=1, quick=True) == []


def test_workers_find_the_same_faults_in_the_same_order(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    (index.root / index.shards[0].name).unlink()
    (index.root / index.shards[2].name).write_bytes(b"")
    alone = verify(index, workers=1)
    assert [fault.shard for fault in alone] == [index.shards[0].name, *2 * [index.shards[2].name]]
    assert verify(index, workers=2, progress=True) == alone
    assert "3/3" in capsys.readouterr().err


# Damaged files


def test_every_byte_of_a_shard_is_covered_by_quick_and_by_deep(tmp_path: Path) -> None:
    """Each byte in turn; the deep check finds it with nothing to compare the whole file with, and names the sample."""
    index = write_shards(tmp_path, real_crystals(2), store="structures", per_shard=2)
    record = index.shards[0]
    path = index.root / record.name
    assert max(at + size for sample in record.samples for at, size in sample.members.values()) < 3000
    for place in [*range(3000), *range(3000, record.bytes, 97), record.bytes - 1]:
        with altered_byte(path, place, 1 << place % 8):
            found = [fault for fault in check(index) if fault.what != "sha256 differs"]
            assert [fault.sample for fault in found] == [owner(record, place)], place
            if place % 64 == 0:
                assert [fault.what for fault in check(index, quick=True)] == ["sha256 differs"]
    assert check(index) == []


@given(data=st.data())
def test_any_altered_byte_is_found_and_its_sample_is_named(shared: Index, data: st.DataObject) -> None:
    record = shared.shards[0]
    place, xor = data.draw(st.integers(0, record.bytes - 1)), data.draw(st.integers(1, 255))
    with altered_byte(shared.root / record.name, place, xor):
        first, second = check(shared)
        assert first == Fault(record.name, "", "sha256 differs")
        assert second.sample == owner(record, place)
        (forged,) = verify(rehashed(shared), workers=1)
        assert forged == second
        assert check(shared, quick=True) == [first]


def test_all_damaged_samples_are_named_and_only_they(index: Index) -> None:
    record = index.shards[0]
    path = index.root / record.name
    first, _, third = record.samples
    with (
        altered_byte(path, first.members["structure.json"][0] + 3, 1),
        altered_byte(path, third.members["density.npy"][0] - 1, 1),
        altered_byte(path, third.members["species.npy"][0] + 200, 1),
    ):
        sha, one, two = check(index)
    assert sha.sample == ""
    assert (one.sample, two.sample) == (first.key, third.key)
    assert "crc32" in one.what
    assert "tar header of density.npy" in two.what


@pytest.mark.parametrize("size", [0, 1, 511, 512, 600, 70_000, -10_240, -1])
def test_a_cut_names_the_samples_beyond_it(index: Index, size: int) -> None:
    record = index.shards[0]
    path = index.root / record.name
    raw = path.read_bytes()
    size = size % record.bytes
    path.write_bytes(raw[:size])
    whole, *rest = check(index)
    assert whole.what == f"{size} bytes, {record.bytes} expected"
    lost = [s.key for s in record.samples if s.members["structure.json"][0] + s.members["structure.json"][1] > size]
    assert [fault.sample for fault in rest] == lost
    assert all(fault.what.startswith("cut: ") for fault in rest)
    assert check(index, quick=True) == [whole]


@pytest.mark.parametrize("more", [b"x", bytes(10_240), b"rubbish" * 5000])
def test_appended_bytes_are_found(index: Index, more: bytes) -> None:
    record = index.shards[0]
    path = index.root / record.name
    path.write_bytes(path.read_bytes() + more)
    found = check(index)
    assert found == [Fault(record.name, "", f"{record.bytes + len(more)} bytes, {record.bytes} expected")]
    (forged,) = verify(rehashed(index), workers=1)
    assert forged == Fault(
        record.name, "", f"{record.bytes + len(more)} bytes, {record.bytes} expected for the samples in the index"
    )


def alter(index: Index, change: Callable[[bytearray, ShardRecord], object]) -> None:
    path = index.root / index.shards[0].name
    raw = bytearray(path.read_bytes())
    change(raw, index.shards[0])
    path.write_bytes(raw)


def zero_header(raw: bytearray, record: ShardRecord) -> None:
    start = record.samples[1].members["species.npy"][0]
    raw[start - BLOCK : start] = bytes(BLOCK)


def swap_members(raw: bytearray, record: ShardRecord) -> None:
    """Species of the first two samples, with their headers."""
    (one, size), (two, other) = (record.samples[i].members["species.npy"] for i in (0, 1))
    assert size == other
    one, two, size = one - BLOCK, two - BLOCK, size + BLOCK
    raw[one : one + size], raw[two : two + size] = raw[two : two + size], raw[one : one + size]


def swap_data(raw: bytearray, record: ShardRecord) -> None:
    """Densities of the first two samples, beneath the right headers."""
    (one, size), (two, _) = (record.samples[i].members["density.npy"] for i in (0, 1))
    raw[one : one + size], raw[two : two + size] = raw[two : two + size], raw[one : one + size]


def insert_block(raw: bytearray, record: ShardRecord) -> None:
    start = record.samples[1].members["density.npy"][0] - BLOCK
    raw[start:start] = bytes(BLOCK)
    del raw[-BLOCK:]


def zero_all(raw: bytearray, record: ShardRecord) -> None:
    raw[:] = bytes(len(raw))


@pytest.mark.parametrize(
    ("change", "damaged"),
    [(zero_header, [1]), (swap_members, [0, 1]), (swap_data, [0, 1]), (insert_block, [1, 2]), (zero_all, [0, 1, 2])],
)
def test_altered_blocks_name_their_samples(
    index: Index, change: Callable[[bytearray, ShardRecord], object], damaged: list[int]
) -> None:
    alter(index, change)
    whole, *rest = check(index)
    assert whole.what == "sha256 differs"
    assert [fault.sample for fault in rest if fault.sample] == [index.shards[0].samples[i].key for i in damaged]
    assert verify(rehashed(index), workers=1) == rest


@given(st.data())
def test_any_rubbish_in_place_of_a_shard_is_survived(shared: Index, data: st.DataObject) -> None:
    """Random blocks moved, repeated, dropped and overwritten."""
    path = shared.root / shared.shards[0].name
    content = path.read_bytes()
    blocks = [content[i : i + BLOCK] for i in range(0, len(content), BLOCK)]
    for _ in range(data.draw(st.integers(1, 3))):
        at, to = (data.draw(st.integers(0, len(blocks) - 1)) for _ in range(2))
        kind = data.draw(st.sampled_from(["move", "drop", "fill"]))
        block = blocks.pop(at) if kind != "fill" else data.draw(st.binary(min_size=0, max_size=BLOCK))
        if kind != "drop":
            blocks.insert(to, block)
    path.write_bytes(b"".join(blocks))
    try:
        assert bool(check(shared)) == (path.read_bytes() != content)
        assert bool(verify(rehashed(shared), workers=1)) == (path.read_bytes() != content)
    finally:
        path.write_bytes(content)


# What is no file


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "kept").write_text("kept")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "missing"),
        (make_directory, "no regular file"),
        (os.mkfifo, "no regular file"),
        (make_loop, "no regular file"),
        (lambda path: path.symlink_to("/nowhere"), "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    ],
    ids=["missing", "directory", "FIFO", "loop of links", "link to nothing", "link to a device"],
)
@pytest.mark.timeout(20)
def test_what_is_no_file_is_told_and_moved_away(index: Index, make: Callable[[Path], object], told: str) -> None:
    path = index.root / index.shards[1].name
    path.unlink()
    make(path)
    faults = verify(index, workers=1)
    assert faults == [Fault(path.name, "", told)] == verify(index, workers=1, quick=True)
    assert len(quarantine(index, faults)) == (told != "missing")
    assert not os.path.lexists(path)


def test_a_link_counts_as_its_file(tmp_path: Path, index: Index) -> None:
    path = index.root / index.shards[0].name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert check(index) == []
    with altered_byte(tmp_path / "elsewhere", 3, 1):
        assert len(check(index)) == 2


def test_a_file_that_cannot_be_read_is_a_fault(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert check(index) == [Fault(index.shards[0].name, "", "can't be read: Permission denied")]


# An index that lies


def lie(index: Index, sample: int = 1, **changes: object) -> list[Fault]:
    record = index.shards[0]
    samples = list(record.samples)
    samples[sample] = replace(samples[sample], **changes)  # type: ignore[arg-type]
    return verify_shard(index.root, replace(record, samples=tuple(samples)), index.grid)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": "another"}, "'another' in the index"),
        ({"shape": (8, 16, 16)}, r"shape \(16, 16, 16\) for this cell, \(8, 16, 16\) in the index"),
        ({"shape": (16, 16)}, r"\(16, 16\) in the index"),
        ({"crc32": 5}, "00000005 expected"),
        ({"key": "train000000001x"}, "tar header"),
        ({"members": {}}, "crc32 00000000"),
        ({"key": "k" * 300}, "name is too long"),
    ],
)
def test_an_index_that_lies_of_a_sample(index: Index, changes: dict[str, object], told: str) -> None:
    first, *rest = lie(index, **changes)
    assert first.sample == changes.get("key", index.shards[0].samples[1].key)
    assert re.search(told, first.what)
    assert "members" in changes or not rest


@pytest.mark.parametrize("place", [(0, 5), (512, 2**62), (10**30, 5), (2**62, 5), (512, 0)], ids=str)
def test_an_index_that_lies_of_places_breaks_nothing(shared: Index, place: tuple[int, int]) -> None:
    sample = shared.shards[0].samples[1]
    for name in sample.members:
        faults = lie(shared, members={**sample.members, name: place})
        assert sample.key in [fault.sample for fault in faults]


def test_members_in_another_order_are_told(index: Index) -> None:
    sample = index.shards[0].samples[1]
    (fault,) = lie(index, members=dict(reversed(sample.members.items())))
    assert "structure.json is at byte" in fault.what


def test_samples_missing_from_the_index_or_from_the_shard_are_told(index: Index) -> None:
    record = index.shards[0]
    fewer = replace(record, samples=record.samples[:2])
    assert "something lies behind the last sample of the index" in [
        fault.what for fault in verify_shard(index.root, fewer, index.grid)
    ]
    last = record.samples[-1]
    end = last.members["structure.json"][0] + BLOCK
    more = replace(last, key="train000000003", members={"structure.json": (end + BLOCK, 100)})
    faults = verify_shard(index.root, replace(record, samples=(*record.samples, more)), index.grid)
    assert more.key in [fault.sample for fault in faults]


def test_an_index_that_lies_of_the_shard(index: Index) -> None:
    record = index.shards[0]
    for changes, told in (
        ({"elements": (1, 2)}, "the index says [1, 2]"),
        ({"sha256": "0"}, "sha256 differs"),
        ({"bytes": 1}, f"{record.bytes} bytes, 1 expected"),
        ({"samples": record.samples[::-1]}, "train000000002.density.npy is at byte"),
    ):
        faults = verify_shard(index.root, replace(record, **changes), index.grid)  # type: ignore[arg-type]
        assert any(told in f"{fault.sample}.{fault.what}" for fault in faults), told


def test_another_grid_than_that_of_the_samples_is_told(index: Index) -> None:
    for grid, told in (
        (GridSpec(shape=16, max_spacing_A=0.5), "density has the shape"),
        (GridSpec(shape=24), "shape (24, 24, 24) for this cell"),
        (GridSpec(shape=12, max_spacing_A=0.1), "spacing of"),
    ):
        faults = verify_shard(index.root, index.shards[0], grid)
        assert [fault.sample for fault in faults] == [sample.key for sample in index.shards[0].samples]
        assert all(told in fault.what for fault in faults)
    with pytest.raises(ShardError, match="no usable grid"):
        verify(replace(index, config={}), workers=1)


def forged(folder: Path, members: dict[str, bytes], crystal: Crystal, *keys: str) -> list[Fault]:
    """The faults of a shard, right in every byte of tar and index, of samples with these members."""
    folder.mkdir()
    samples = []
    path = folder / "train-000000.tar"
    with path.open("wb") as stream, open_tar(stream) as tar:
        for key in keys or ("train000000000",):
            places = {name: (add_member(tar, f"{key}.{name}", data), len(data)) for name, data in members.items()}
            samples.append(Sample(key, crystal.id, 0, (16, 16, 16), zlib.crc32(b"".join(members.values())), places))
    size, digest = path.stat().st_size, sha256(path)
    record = ShardRecord(path.name, "train", size, digest, tuple(crystal.composition), tuple(samples))
    return verify_shard(folder, record, CUBE)


def test_content_that_can_not_be_is_told(tmp_path: Path) -> None:
    (crystal,) = real_crystals(1)
    good = voxelize(crystal, CUBE)
    nan, species = encode_sample(crystal, good)["density.npy"], good.species_DHW.copy()
    half = np.frombuffer(nan, np.float16, offset=128).copy()
    half[77] = np.nan
    species[3, 3, 3] = 103
    other = {**json.loads(crystal.to_json()), "id": "other"}
    raw = encode_sample(crystal, good)
    cases = {
        "density is not finite": raw | {"density.npy": nan[:128] + half.tobytes()},
        "species [103] that": encode_sample(crystal, VoxelGrid(good.density_CDHW, species)),
        "density has the shape": encode_sample(crystal, VoxelGrid(good.density_CDHW[:3], good.species_DHW)),
        "the id is 'other'": raw | {"structure.json": json.dumps(other).encode()},
        "not an .npy": raw | {"species.npy": b"PK\3\4"},
        "no crystal": raw | {"structure.json": b"{}"},
        "none of": {"density.pyd": b"", **raw},
    }
    assert forged(tmp_path / "good", raw, crystal) == []
    for number, (told, members) in enumerate(cases.items()):
        (fault,) = forged(tmp_path / str(number), members, crystal)
        assert fault.sample == "train000000000"
        assert told in fault.what


def test_keys_that_fall_repeat_or_hold_a_dot_are_told(tmp_path: Path) -> None:
    (crystal,) = real_crystals(1)
    members = encode_sample(crystal, None)
    assert forged(tmp_path / "rising", members, crystal, "a", "b") == []
    for number, (keys, wrong) in enumerate(((("b", "a"), "a"), (("a", "a"), "a"), (("a", "mp-1.5"), "mp-1.5"))):
        (fault,) = forged(tmp_path / str(number), members, crystal, *keys)
        assert fault.sample == wrong
        assert "keys hold no dot and rise" in fault.what


# Quarantine


def test_quarantine_moves_damaged_shards_and_overwrites_nothing(index: Index) -> None:
    path = index.root / index.shards[0].name
    content = path.read_bytes()
    moved = []
    for number in range(3):
        path.write_bytes(b"damaged %d" % number)
        faults = verify(index, workers=1)
        assert len(faults) > 1
        moved += quarantine(index, faults)
        assert not path.exists()
    assert [p.read_bytes() for p in moved] == [b"damaged 0", b"damaged 1", b"damaged 2"]
    assert {p.parent for p in moved} == {index.root / QUARANTINE}
    assert quarantine(index, verify(index, workers=1)) == []
    path.write_bytes(content)
    assert verify(index, workers=1) == []
    assert quarantine(index, []) == []


def test_quarantine_takes_links_and_not_what_they_lead_to(tmp_path: Path, index: Index) -> None:
    path, target = index.root / index.shards[0].name, tmp_path / "target"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)
    target.write_bytes(b"damaged")
    (moved,) = quarantine(index, verify(index, workers=1))
    assert moved.is_symlink()
    assert target.read_bytes() == b"damaged"
