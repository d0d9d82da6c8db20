"""Samples by byte offset from memory-mapped shards, and the batches of a rank: the only module of these that sees torch.

The order of samples is a pure function of (seed, epoch, global index), whatever the number of ranks; a rank takes its
slice of each global batch, so every rank makes the same number of steps.
"""

from __future__ import annotations

import mmap
import queue
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.crystal.structure import Crystal
from dist_train.errors import ShardError
from dist_train.models.autoencoder import CrystalBatch, cell_numbers, composition_vector
from dist_train.shards.codec import MEMBERS, read_npy
from dist_train.shards.index import Index, Sample, ShardRecord


class Record(NamedTuple):
    """A sample as read: float16 [C, D, H, W], uint8 [D, H, W] (views of the mapped file) and its crystal."""

    density_CDHW: NDArray[np.float16]
    species_DHW: NDArray[np.uint8]
    crystal: Crystal


class ShardReader:
    """Random access to the samples of a split; shards are mapped when first touched."""

    def __init__(self, index: Index, split: str) -> None:
        self.index = index
        self.entries = index.samples(split)
        self._maps: dict[str, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int) -> Record:
        """The sample at a place of the split. Raises ShardError naming it where its bytes are damaged."""
        shard, sample = self.entries[place]
        members = self._members(shard, sample)
        density, species = (read_npy(members[i]) for i in (0, 1))
        return Record(density, species, Crystal.from_json(bytes(members[2])))  # type: ignore[arg-type]

    def crystal(self, place: int) -> Crystal:
        """The crystal alone."""
        return Crystal.from_json(bytes(self._members(*self.entries[place])[2]))

    def _members(self, shard: ShardRecord, sample: Sample) -> list[memoryview]:
        whole, crc, found = self._map(shard), 0, []
        for name in MEMBERS:
            offset, size = sample.members[name]
            found.append(whole[offset : offset + size])
            crc = zlib.crc32(found[-1], crc)
        if crc != sample.crc32:
            raise ShardError(
                f"sample {sample.key} ({sample.id}) of {self.index.root / shard.name} is damaged (crc32 {crc:08x}, "
                f"{sample.crc32:08x} expected); run dist-train verify {self.index.root}"
            )
        return found

    def _map(self, shard: ShardRecord) -> memoryview:
        if shard.name not in self._maps:
            path = self.index.root / shard.name
            try:
                with path.open("rb") as stream:
                    self._maps[shard.name] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ShardError(f"shard {path} can't be read: {error}; run dist-train verify {path.parent}") from None
            if len(self._maps[shard.name]) != shard.bytes:
                raise ShardError(f"shard {path} has {len(self._maps[shard.name])} bytes, {shard.bytes} expected")
        return memoryview(self._maps[shard.name])


def collate(records: list[Record]) -> CrystalBatch:
    """Records of one shape as a CrystalBatch (copied out of the mapped files)."""
    return CrystalBatch(
        torch.from_numpy(np.stack([record.density_CDHW for record in records])),
        torch.from_numpy(np.stack([record.species_DHW for record in records])),
        torch.from_numpy(cell_numbers(np.stack([record.crystal.lengths_angles for record in records]))),
        torch.from_numpy(np.stack([composition_vector(record.crystal) for record in records])),
    )


@lru_cache(maxsize=2)
def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The places of a split in the order of an epoch: a pure function of its arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(samples)


@dataclass(frozen=True)
class BatchPlan:
    """Which samples each rank sees at each step.

    Raises ShardError where the split has fewer samples than a global batch.
    """

    samples: int
    global_batch: int
    epochs: int
    seed: int
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ShardError(
                f"the training split has {self.samples} samples, fewer than train.global_batch_size {self.global_batch}; "
                "lower it or voxelise more crystals"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def places(self, step: int) -> NDArray[np.int64]:
        """The places that this rank reads for a step, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.samples, self.seed, epoch)
        share = self.global_batch // self.ranks
        start = batch * self.global_batch + self.rank * share
        return order[start : start + share]


def train_batches(reader: ShardReader, plan: BatchPlan, start: int, stop: int) -> Iterator[tuple[int, CrystalBatch]]:
    """(step, batch) for the steps [start, stop); a thread reads two batches ahead.

    An error of the thread is raised here; leaving the iterator early stops the thread.
    """
    ready: queue.Queue[tuple[int, CrystalBatch] | BaseException | None] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: tuple[int, CrystalBatch] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start, stop):
                if stopped.is_set():
                    return
                put((step, collate([reader[place] for place in plan.places(step)])))
            put(None)
        except Exception as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
