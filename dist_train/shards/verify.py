"""Whether shards are what their index says, byte for byte, and where not, which samples are damaged."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from dist_train.config import GridSpec
from dist_train.crystal.frames import grid_shape
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import n_channels
from dist_train.errors import CrystalError
from dist_train.files import fsync
from dist_train.progress import Progress
from dist_train.shards.codec import crc_of, decode_sample, member_info, padded
from dist_train.shards.index import Index, Sample, ShardRecord

QUARANTINE = "quarantined"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a shard, or with one of its samples (the sample's key, '' for the shard itself)."""

    shard: str
    sample: str
    what: str


def verify(index: Index, workers: int, quick: bool = False, progress: bool = False) -> list[Fault]:
    """All faults of all shards, in their order, checked in `workers` processes; `progress` shows a bar.

    quick: sizes and hashes only, which find every change of a file but not an index that lies.
    """
    check = partial(verify_shard, index.root, grid=index.grid, quick=quick)
    found: list[Fault] = []
    with Progress("verify", len(index.shards), "shards", shown=progress) as bar:
        for faults in parallel_map(check, index.shards, min(workers, len(index.shards)), chunk=1):
            found += faults
            bar.update(1, faults=len(found))
    return found


def verify_shard(root: Path, record: ShardRecord, grid: GridSpec, quick: bool = False) -> list[Fault]:
    """The faults of one shard: size and SHA-256, then every byte of the tar and the content of every sample.

    A symbolic link counts as the file that it leads to.
    """
    found: list[Fault] = []
    try:
        for key, what in _faults(root / record.name, record, grid, quick):
            found.append(Fault(record.name, key, what))
    except OSError as error:
        found.append(Fault(record.name, "", f"can't be read: {error.strerror or error}"))
    return found


def quarantine(index: Index, faults: Iterable[Fault]) -> list[Path]:
    """Move the shards that have faults into `root/quarantined`, never over what is there; returns their new places.

    The next voxelising finds them missing and builds them again. A shard that isn't there is passed over.
    """
    moved = []
    for name in dict.fromkeys(fault.shard for fault in faults):
        path, folder = index.root / name, index.root / QUARANTINE
        if not os.path.lexists(path):
            continue
        folder.mkdir(exist_ok=True)
        target, number = folder / name, 0
        while os.path.lexists(target):
            number += 1
            target = folder / f"{name}.{number}"
        path.rename(target)
        moved.append(target)
    if moved:
        fsync(index.root / QUARANTINE)
        fsync(index.root)
    return moved


def _faults(path: Path, record: ShardRecord, grid: GridSpec, quick: bool) -> Iterator[tuple[str, str]]:
    """(sample or '', what is wrong)"""
    if not path.is_file():  # opening a FIFO or a device could wait forever
        yield "", "no regular file" if os.path.lexists(path) else "missing"
        return
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != record.bytes:
            yield "", f"{size} bytes, {record.bytes} expected"
        elif hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
            yield "", "sha256 differs"
        if not quick:
            yield from _content_faults(stream, size, record, grid)


def _content_faults(stream: IO[bytes], size: int, record: ShardRecord, grid: GridSpec) -> Iterator[tuple[str, str]]:
    """Walks the tar by what it must hold: names and sizes in the index decide every byte but the members' own."""
    start, last, elements = 0, "", set[int]()
    damaged = False
    for sample in record.samples:
        try:
            members = _read_members(stream, size, sample, start)
            elements.update(_checked(members, sample, last, grid).composition)
        except (ValueError, CrystalError) as error:
            damaged = True
            yield sample.key, str(error)
        start += sum(_span(length) for _, length in sample.members.values())
        last = sample.key
    end = padded(start + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
    if size == record.bytes != end:
        yield "", f"{size} bytes, {end} expected for the samples in the index"
    stream.seek(min(start, size))
    if any(stream.read(min(end - start, size))):
        yield "", "something lies behind the last sample of the index"
    if not damaged and tuple(sorted(elements)) != record.elements:
        yield "", f"elements {sorted(elements)}, the index says {list(record.elements)}"


def _span(size: int) -> int:
    """Bytes of a member in a tar: one block of header, then its data in whole blocks."""
    return tarfile.BLOCKSIZE + padded(size)


def _read_members(stream: IO[bytes], file_size: int, sample: Sample, start: int) -> dict[str, bytes]:
    """The members of a sample whose first header is at byte `start`. Raises ValueError where the tar differs."""
    members = {}
    for name, (offset, size) in sample.members.items():
        if offset != start + tarfile.BLOCKSIZE:
            raise ValueError(f"{name} is at byte {offset} in the index, {start + tarfile.BLOCKSIZE} expected")
        header = member_info(f"{sample.key}.{name}", size).tobuf(tarfile.USTAR_FORMAT)  # refuses a negative size
        if start + _span(size) > file_size:
            raise ValueError(f"cut: {name} ends at byte {start + _span(size)}, the file at {file_size}")
        stream.seek(start)
        block = stream.read(_span(size))
        if block[: tarfile.BLOCKSIZE] != header:
            raise ValueError(f"the tar header of {name} is damaged")
        data, rest = block[tarfile.BLOCKSIZE :][:size], block[tarfile.BLOCKSIZE + size :]
        if any(rest):
            raise ValueError(f"{name} is not followed by zeros")
        members[name] = data
        start += _span(size)
    if (crc := crc_of(members.values())) != sample.crc32:
        raise ValueError(f"crc32 {crc:08x}, {sample.crc32:08x} expected")
    return members


def _checked(members: dict[str, bytes], sample: Sample, last: str, grid: GridSpec) -> Crystal:
    """The crystal of a sample. Raises ValueError or CrystalError where its content can't be."""
    if "." in sample.key or sample.key <= last:
        raise ValueError(f"key {sample.key!r} after {last!r}: keys hold no dot and rise")
    density, species, crystal = decode_sample(members)
    if crystal.id != sample.id:
        raise ValueError(f"the id is {crystal.id!r}, {sample.id!r} in the index")
    shape = grid_shape(crystal.lattice_A, grid)
    if shape != sample.shape:
        raise ValueError(f"shape {shape} for this cell, {sample.shape} in the index")
    if density is None or species is None:
        return crystal
    if density.shape != (n_channels(grid), *shape):
        raise ValueError(f"density has the shape {density.shape}, {(n_channels(grid), *shape)} expected")
    if not np.isfinite(density).all():
        raise ValueError("density is not finite")
    # Crystals hold atomic numbers up to MAX_Z, so this bounds the labels too.
    strange = set(np.flatnonzero(np.bincount(species.ravel())).tolist()) - {0, *crystal.composition}
    if strange:
        raise ValueError(f"species {sorted(strange)} that the crystal doesn't hold")
    return crystal
