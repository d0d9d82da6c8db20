"""Samples by byte offset from memory-mapped shards, and the batches of a rank: the only module of these that sees torch.

The order of samples is a pure function of (seed, epoch), whatever the number of ranks; a rank takes its slice of each
global batch, so every rank makes the same number of steps.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError, ShardError
from dist_train.models.autoencoder import CrystalBatch, cell_numbers, composition_vector
from dist_train.shards.codec import crc_of, decode_crystal, decode_sample
from dist_train.shards.half import to_half
from dist_train.shards.index import Index, Sample, ShardRecord

Shape = tuple[int, ...]


class Record(NamedTuple):
    """A sample as read: float16 [C, D, H, W], uint8 [D, H, W] (views of the mapped file where raw) and its crystal."""

    density_CDHW: NDArray[np.float16]
    species_DHW: NDArray[np.uint8]
    crystal: Crystal


class ShardReader:
    """Random access to the samples of a split, from any thread; shards are mapped when first touched."""

    def __init__(self, index: Index, split: str) -> None:
        self.index = index
        self.entries = index.samples(split)
        self._maps: dict[str, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> list[Shape]:
        """Grid shape of every sample, from the index."""
        return [sample.shape for _, sample in self.entries]

    @cached_property
    def _grid(self) -> GridSpec:
        return self.index.grid

    def __getitem__(self, place: int) -> Record:
        """The sample at a place of the split; a structure alone is voxelised here.

        Raises ShardError naming it where its bytes are damaged.
        """
        shard, sample = self.entries[place]
        try:
            density, species, crystal = decode_sample(self._members(shard, sample))
            if density is None or species is None:
                grid = voxelize(crystal, self._grid)
                density, species = to_half(grid.density_CDHW), grid.species_DHW
        except (ValueError, CrystalError) as error:
            raise self._damaged(shard, sample, str(error)) from None
        if species.shape != sample.shape:
            raise self._damaged(shard, sample, f"shape {species.shape}, {sample.shape} expected")
        return Record(density, species, crystal)

    def crystal(self, place: int) -> Crystal:
        """The crystal alone."""
        shard, sample = self.entries[place]
        members = self._members(shard, sample)
        try:
            return decode_crystal(members["structure.json"])
        except (KeyError, ValueError) as error:
            raise self._damaged(shard, sample, str(error)) from None

    def _members(self, shard: ShardRecord, sample: Sample) -> dict[str, memoryview]:
        whole = self._map(shard)
        found = {name: whole[offset : offset + size] for name, (offset, size) in sample.members.items()}
        if (crc := crc_of(found.values())) != sample.crc32:
            raise self._damaged(shard, sample, f"crc32 {crc:08x}, {sample.crc32:08x} expected")
        return found

    def _damaged(self, shard: ShardRecord, sample: Sample, what: str) -> ShardError:
        root = self.index.root
        where = f"sample {sample.key} ({sample.id}) of {root / shard.name}"
        return ShardError(f"{where} is damaged ({what}); run dist-train verify {root}")

    def _map(self, shard: ShardRecord) -> memoryview:
        if shard.name not in self._maps:
            path = self.index.root / shard.name
            try:
                with path.open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ShardError(f"shard {path} can't be read: {error}; run dist-train verify {path.parent}") from None
            if len(mapped) != shard.bytes:
                raise ShardError(
                    f"shard {path} has {len(mapped)} bytes, {shard.bytes} expected; run dist-train verify {path.parent}"
                )
            self._maps[shard.name] = mapped
        return memoryview(self._maps[shard.name])


def collate(records: list[Record]) -> CrystalBatch:
    """Records as a CrystalBatch (copied out of the mapped files). Raises ShardError where their shapes differ."""
    shapes = {record.density_CDHW.shape: record.crystal.id for record in records}
    if len(shapes) > 1:
        told = ", ".join(f"{_times(shape)} ({id})" for shape, id in shapes.items())
        raise ShardError(f"a batch needs grids of one shape, these {len(records)} have {told}; group them by shape")
    return CrystalBatch(
        torch.from_numpy(np.stack([record.density_CDHW for record in records])),
        torch.from_numpy(np.stack([record.species_DHW for record in records])),
        torch.from_numpy(cell_numbers(np.stack([record.crystal.lengths_angles for record in records]))),
        torch.from_numpy(np.stack([composition_vector(record.crystal) for record in records])),
        torch.ones(len(records)),
    )


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which samples each rank sees at each step; the samples of a global batch have one grid shape.

    shapes: of every sample of the split. An epoch takes the samples of each shape in random order, drops those beyond its
    last full global batch, and puts the batches of all shapes in random order.
    Raises ShardError where no shape has the samples of a global batch.
    """

    shapes: Sequence[Shape]
    global_batch: int
    epochs: int
    seed: int
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            most = max(map(len, self.groups), default=0)
            raise ShardError(
                f"the training split has {len(self.shapes)} samples of {len(self.groups)} grid shapes, at most {most} of "
                f"one shape, fewer than train.global_batch_size {self.global_batch}; lower it or voxelise more crystals"
            )

    @cached_property
    def groups(self) -> list[NDArray[np.int64]]:
        """Places of the samples of each shape, by rising shape."""
        number = {shape: i for i, shape in enumerate(sorted(set(self.shapes)))}
        of_sample = np.array([number[shape] for shape in self.shapes], np.int64)
        return np.split(np.argsort(of_sample, kind="stable"), np.cumsum(np.bincount(of_sample))[:-1])

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(len(places) // self.global_batch for places in self.groups)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def never_seen(self) -> int:
        """Samples of shapes that don't fill a global batch: no epoch has them."""
        return sum(len(places) for places in self.groups if len(places) < self.global_batch)

    @property
    def dropped(self) -> int:
        """Samples that an epoch leaves out, those never seen included; the others change from epoch to epoch."""
        return len(self.shapes) - self.steps_per_epoch * self.global_batch

    def places(self, step: int) -> NDArray[np.int64]:
        """The places that this rank reads for a step, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.ranks
        return epoch_batches(self, epoch)[batch, self.rank * share : (self.rank + 1) * share]


@lru_cache(maxsize=2)
def epoch_batches(plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
    """[steps, global batch] places of all ranks: a pure function of the shapes, the global batch, the seed and the epoch."""
    rng, size = np.random.Generator(np.random.PCG64([plan.seed, epoch])), plan.global_batch
    kept = [rng.permutation(places)[: len(places) // size * size] for places in plan.groups]
    return rng.permutation(np.concatenate(kept).reshape(-1, size))


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
