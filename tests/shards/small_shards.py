"""Small shards of real crystals, made by the codec and the index alone: without plan, writer or Ray."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from dist_train.config import GridSpec
from dist_train.crystal.frames import grid_shape, placed, representable
from dist_train.crystal.parquet import parquet_length, read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError
from dist_train.files import sha256
from dist_train.shards.codec import add_member, crc_of, encode_sample, open_tar
from dist_train.shards.index import Index, Sample, ShardRecord, config_hash

TABLES = Path(__file__).parents[2] / "data" / "sample"
CUBE = GridSpec(shape=16, max_spacing_A=0.5, channels=("occupancy", "period"))
ADAPTIVE = GridSpec(shape="adaptive")
CRYSTALS, PER_SHARD = 22, 8
"""Of the shards of the fixtures."""


def real_crystals(count: int, grid: GridSpec = CUBE, table: str = "perov_5") -> list[Crystal]:
    """The first crystals of a table in data/sample that the grid can hold, as it holds them."""

    def fitting() -> Iterator[Crystal]:
        path = TABLES / f"{table}.parquet"
        for item in read_parquet_rows(path, 0, parquet_length(path)):
            if isinstance(item, Crystal):
                try:
                    yield representable(item, grid)
                except CrystalError:
                    continue

    return list(islice(fitting(), count))


def write_shards(
    folder: Path, crystals: Sequence[Crystal], grid: GridSpec = CUBE, store: str = "grids", encoding: str = "raw",
    per_shard: int = 4, val: int = 0, copies: int = 1,
) -> Index:  # fmt: skip
    """Shards of the split train, the last `val` crystals in a shard of the split val, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    split = len(crystals) - val
    records = []
    for name, members in (("train", crystals[:split]), ("val", crystals[split:])):
        pairs = [(crystal, copy) for crystal in members for copy in range(copies)]
        for number, start in enumerate(range(0, len(pairs), per_shard)):
            chosen = pairs[start : start + per_shard]
            records.append(write_shard(folder, f"{name}-{number:06d}.tar", name, start, chosen, grid, store, encoding))
    data = {"store": store, "encoding": encoding, "samples_per_shard": per_shard}
    config = {"data": data, "grid": grid.model_dump(mode="json")}
    counts = {"inputs": len(crystals), "accepted": len(crystals), "rejected": 0}
    index = Index(folder, config, config_hash(config), "0", counts, tuple(records))
    index.write()
    return index


def write_shard(
    folder: Path, name: str, split: str, first: int, pairs: Sequence[tuple[Crystal, int]], grid: GridSpec, store: str,
    encoding: str,
) -> ShardRecord:  # fmt: skip
    path, samples = folder / name, []
    with path.open("wb") as stream, open_tar(stream) as tar:
        for ordinal, (crystal, copy) in enumerate(pairs, start=first):
            crystal = placed(crystal, grid, copy)
            voxels = voxelize(crystal, grid) if store == "grids" else None
            key, crc, members = f"{split}{ordinal:09d}", 0, {}
            for member, data in encode_sample(crystal, voxels, encoding, copy).items():  # type: ignore[arg-type]
                members[member] = (add_member(tar, f"{key}.{member}", data), len(data))
                crc = zlib.crc32(data, crc)
            samples.append(Sample(key, crystal.id, copy, grid_shape(crystal.lattice_A, grid), crc, members))
    elements = tuple(sorted({int(z) for crystal, _ in pairs for z in crystal.numbers_N}))
    return ShardRecord(name, split, path.stat().st_size, sha256(path), elements, tuple(samples))


def rehashed(index: Index) -> Index:
    """The index of somebody who altered shards and wrote down their sizes and hashes anew."""
    records = []
    for record in index.shards:
        path = index.root / record.name
        records.append(replace(record, bytes=path.stat().st_size, sha256=sha256(path)))
    return replace(index, shards=tuple(records))


def flip_byte(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)


def damage(index: Index, place: int) -> tuple[str, str, str]:
    """Flip a byte in the middle of the first member of a training sample; returns what a message has to name."""
    shard, sample = index.samples("train")[place]
    offset, size = next(iter(sample.members.values()))
    flip_byte(index.root / shard.name, offset + size // 2)
    return sample.key, sample.id, shard.name


def rewritten_member(index: Index, place: int, name: str, data: bytes) -> Index:
    """The index of somebody who put other, shorter bytes into a member and wrote down its size and checksum anew."""
    shard, sample = index.samples("train")[place]
    path, members = index.root / shard.name, {**sample.members}
    members[name] = (members[name][0], len(data))
    with path.open("r+b") as stream:
        stream.seek(members[name][0])
        stream.write(data)
    raw = path.read_bytes()
    crc = crc_of(raw[offset : offset + size] for offset, size in members.values())
    samples = tuple(replace(s, members=members, crc32=crc) if s is sample else s for s in shard.samples)
    shards = tuple(replace(s, samples=samples) if s is shard else s for s in index.shards)
    return rehashed(replace(index, shards=shards))


@contextmanager
def altered_byte(path: Path, place: int, xor: int) -> Iterator[None]:
    """A byte of a file is another one within the block."""
    handle = os.open(path, os.O_RDWR)
    try:
        before = os.pread(handle, 1, place)
        os.pwrite(handle, bytes([before[0] ^ xor]), place)
        yield
        os.pwrite(handle, before, place)
    finally:
        os.close(handle)
