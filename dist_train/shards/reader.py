"""Random access to the samples of a split, from any thread, without torch.

Files are read with `pread`, not mapped: a file that is cut or a disk that fails while it is read is then an error that names
the sample, where a mapping would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.frames import grid_shape
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import n_channels, voxelize
from dist_train.errors import CrystalError, ShardError
from dist_train.shards.codec import MEMBERS, crc_of, decode_crystal, decode_sample, npy_header
from dist_train.shards.half import to_half
from dist_train.shards.index import Index, Sample, ShardRecord
from dist_train.shards.order import Places, Shape
from dist_train.shards.raw import read_rows

T = TypeVar("T")
OPEN_FILES = 256
"""Shards that a reader keeps open; opening one takes some microseconds, and processes may often have 1,024."""
LISTED_SHARDS = 5


class DamagedSample(ShardError):
    """A sample whose bytes are not what the index says, or hold no crystal."""


class Record(NamedTuple):
    """A sample as read: float16 [C, D, H, W], uint8 [D, H, W] and its crystal."""

    density_CDHW: NDArray[np.float16]
    species_DHW: NDArray[np.uint8]
    crystal: Crystal


def whole(read: Callable[[int], T], places: Iterable[int]) -> list[T]:
    """What `read` gives for these places, damaged samples left out. Raises DamagedSample where all are damaged."""
    found: list[T] = []
    damage: DamagedSample | None = None
    for place in places:
        try:
            found.append(read(place))
        except DamagedSample as error:
            damage = error
    if damage and not found:
        raise damage
    return found


class ShardReader:
    """The samples of a split by their places; shards are opened (remote ones fetched) when first touched."""

    def __init__(self, index: Index, split: str) -> None:
        self.index, self.split = index, split
        self.shards = index.split(split)
        self.entries = index.samples(split)
        self._file = lru_cache(OPEN_FILES)(self._open)
        self._by_name = {shard.name: shard for shard in self.shards}

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> list[Shape]:
        """Grid shape of every sample, from the index."""
        return [sample.shape for _, sample in self.entries]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [len(shard.samples) for shard in self.shards]

    @cached_property
    def grid(self) -> GridSpec:
        """The grid of the samples."""
        return self.index.grid

    def __getitem__(self, place: int) -> Record:
        """The sample at a place of the split; a structure alone is voxelised here.

        Raises DamagedSample naming it where its bytes are damaged, ShardError where its shard can't be read.
        """
        shard, sample = self.entries[place]
        try:
            density, species, crystal = decode_sample(self._members(shard, sample))
            if density is None or species is None:
                grid = voxelize(crystal, self.grid)
                density, species = to_half(grid.density_CDHW), grid.species_DHW
            if density.shape != (n_channels(self.grid), *sample.shape):
                raise ValueError(f"density has the shape {density.shape}, {(n_channels(self.grid), *sample.shape)} expected")
        except (ValueError, CrystalError) as error:
            raise self._damaged(shard, sample, str(error)) from None
        return Record(density, species, crystal)

    def crystal(self, place: int) -> Crystal:
        """The crystal alone, of the shape that the index says. Raises as `__getitem__` does."""
        shard, sample = self.entries[place]
        try:
            crystal = decode_crystal(self._members(shard, sample)["structure.json"])
            shape = grid_shape(crystal.lattice_A, self.grid)
            if shape != sample.shape:
                raise ValueError(f"shape {shape} for this cell, {sample.shape} expected")
        except (KeyError, ValueError, CrystalError) as error:
            raise self._damaged(shard, sample, str(error)) from None
        return crystal

    def read_raw(
        self, places: Places, density_BCDHW: NDArray[np.float16], species_BDHW: NDArray[np.uint8]
    ) -> list[memoryview | None]:
        """Read raw samples into the rows of C-ordered arrays, each byte once; the `structure.json` of each, undecoded.

        None where it is damaged, no raw one, or not of the shape of a row: `__getitem__` then tells.
        Keeps open as many files more as it reads from. Raises ShardError where a shard can't be read.
        """
        spans = self._spans[places]
        numbers = spans[:, 0].tolist()
        files = {number: self._file(self.shards[number].name) for number in set(numbers) - {-1}}
        fds = np.array([files[number].fd if number in files else -1 for number in numbers], np.int32)
        one, other = (npy_header(array.shape[1:], array.dtype) for array in (density_BCDHW, species_BDHW))
        return read_rows(fds, spans[:, 1:], (one, other), density_BCDHW, species_BDHW)

    @cached_property
    def _spans(self) -> NDArray[np.int64]:
        """[samples, 8] number of the shard, offset and bytes of the three members, crc32; -1 and zeros where it is no raw
        sample, or the index is wrong about it."""
        rows = []
        for number, shard in enumerate(self.shards):
            end = min(shard.bytes, 2**62)
            for sample in shard.samples:
                spans = tuple(sample.members.values())
                raw = tuple(sample.members) == MEMBERS["raw"] and max(map(sum, spans)) <= end and 0 <= sample.crc32 < 2**32
                rows.append((number, *chain(*spans), sample.crc32) if raw else (-1, *[0] * 7))
        return np.array(rows, np.int64)

    def _members(self, shard: ShardRecord, sample: Sample) -> dict[str, bytes]:
        """The bytes of each member, checked."""
        file, members = self._file(shard.name), {}
        for name, (offset, size) in sample.members.items():
            if offset + size > shard.bytes:
                raise self._damaged(shard, sample, f"{name} ends at byte {offset + size}, the shard at {shard.bytes}")
            try:
                members[name] = os.pread(file.fd, size, offset)
            except OSError as error:
                raise self._damaged(shard, sample, f"{name} can't be read: {error.strerror}") from None
        if (crc := crc_of(members.values())) != sample.crc32:
            raise self._damaged(shard, sample, f"crc32 {crc:08x}, {sample.crc32:08x} expected")
        return members

    def _damaged(self, shard: ShardRecord, sample: Sample, what: str) -> DamagedSample:
        where = f"sample {sample.key} ({sample.id}) of {self.index.where(shard)}"
        return DamagedSample(f"{where} is damaged ({what}); {self.index.remedy}")

    def _open(self, name: str) -> _File:
        shard = self._by_name[name]
        try:
            file = _File(self.index.open(shard))
            size = os.fstat(file.fd).st_size
        except OSError as error:
            raise ShardError(f"shard {self.index.where(shard)} can't be read: {error}; {self.index.remedy}") from None
        if size != shard.bytes:
            raise ShardError(
                f"shard {self.index.where(shard)} has {size} bytes, {shard.bytes} expected; {self.index.remedy}"
            )
        return file


class _File:
    """A file descriptor, closed when the last thread that reads it lets go: its number may then go to another file."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def check_shards(index: Index, splits: Iterable[str]) -> None:
    """Raise ShardError naming shards of these splits that are missing or of another size than the index says."""
    sizes = index.shard_sizes()
    faults = [
        f"{shard.name} is missing" if shard.name not in sizes else
        f"{shard.name} has {sizes[shard.name]} bytes, {shard.bytes} expected"
        for split in splits for shard in index.split(split) if sizes.get(shard.name) != shard.bytes
    ]  # fmt: skip
    if faults:
        more = f" and {len(faults) - LISTED_SHARDS} more" if len(faults) > LISTED_SHARDS else ""
        raise ShardError(
            f"{len(faults)} shards of {index.place} can't be read: {'; '.join(faults[:LISTED_SHARDS])}{more}; {index.remedy}"
        )
