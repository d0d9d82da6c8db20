"""Samples as batches of tensors, read ahead by threads: the only module of these that sees torch."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from math import prod
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.lattice import MIN_VOLUME_A3
from dist_train.crystal.structure import Crystal
from dist_train.crystal.substitute import substituted
from dist_train.crystal.voxelize import n_channels
from dist_train.errors import ShardError
from dist_train.models.autoencoder import CrystalBatch
from dist_train.models.crystal_tensors import CrystalTensors
from dist_train.models.structure_batch import StructureBatch
from dist_train.shards.order import BatchPlan, Places, Shape
from dist_train.shards.prefetch import Prefetch
from dist_train.shards.reader import DamagedSample, Record, ShardReader

CPU = torch.device("cpu")
AT_ONCE, MOST_FILES = 2**24, 64
"""Bytes of samples that a thread reads before it looks whether anybody still waits for them, from at most so many files."""
STAND_IN = Crystal("stand-in", 5.0 * np.eye(3), np.zeros((1, 3)), np.array([1]))
"""What stands in place of a damaged sample, with weight 0: its cell and composition keep every loss finite."""


class TrainBatch(NamedTuple):
    """This rank's share of a step's global batch, in parts of one grid shape each.

    damaged: a message for each sample in it that was passed over.
    """

    step: int
    parts: tuple[CrystalBatch | StructureBatch, ...]
    damaged: tuple[str, ...] = ()

    @property
    def batch(self) -> CrystalBatch | StructureBatch:
        """The whole share, where it has one grid shape."""
        (part,) = self.parts
        return part


def train_batches(
    reader: ShardReader, plan: BatchPlan, start: int, stop: int, device: torch.device = CPU, threads: int = 2,
    max_damaged: int = 100, substitution: float = 0.0,
) -> Iterator[TrainBatch]:  # fmt: skip
    """The batches of the steps [start, stop), in order, read by threads at most `threads` + 1 batches ahead.

    For a CUDA device they lie in page-locked memory, and structures come as a StructureBatch, whose grids that device makes;
    for the CPU the threads make these. substitution: chance of each of their elements (see `crystal.substitute`).
    Leaving the iterator early stops the threads.
    Raises ShardError for a shard that can't be read, and for more different damaged samples than `max_damaged`; errors of
    a thread are raised here, in the order of the steps.
    """
    stopped, ahead, damaged, memory = threading.Event(), deque[Future[TrainBatch]](), set[str](), _Memory()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="batches")
    cache = reader.index.cache
    with Prefetch(cache, reader.shards, plan, start, stop) if cache else nullcontext() as prefetch:
        try:
            for step in range(start, stop):
                while len(ahead) <= threads and step + len(ahead) < stop:
                    ahead.append(pool.submit(_read, reader, plan, step + len(ahead), device, stopped, memory, substitution))
                item = ahead.popleft().result()
                if prefetch:
                    prefetch.reached(step)
                damaged.update(item.damaged)
                if len(damaged) > max_damaged:
                    raise ShardError(
                        f"{len(damaged)} damaged samples so far, data.max_damaged {max_damaged} are passed over; the last: "
                        f"{item.damaged[-1]}"
                    )
                yield item
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _read(
    reader: ShardReader, plan: BatchPlan, step: int, device: torch.device, stopped: threading.Event, memory: _Memory,
    substitution: float,
) -> TrainBatch:  # fmt: skip
    parts, damaged = list[CrystalBatch | StructureBatch](), list[str]()

    def go_on() -> None:
        if stopped.is_set():
            raise ShardError("nobody waits for this batch any more")

    for places in _alike(plan, plan.places(step)):
        if reader.index.store == "structures":
            seed = f"{plan.seed}\0{step // plan.steps_per_epoch}"
            structures, found = _structures(reader, places, go_on, seed, substitution)
            parts.append(structures.to(device) if device.type == "cpu" else structures)
        else:
            grids, found = _grids(reader, places, go_on, None if device.type == "cuda" else memory)
            parts.append(grids)
        damaged.extend(found)
    return TrainBatch(step, tuple(parts), tuple(damaged))


def _alike(plan: BatchPlan, places: Places) -> list[Places]:
    """The places cut where the grid shape changes."""
    return np.split(places, np.flatnonzero(np.diff(plan.shape_numbers[places])) + 1)


def _grids(
    reader: ShardReader, places: Places, go_on: Callable[[], None], memory: _Memory | None
) -> tuple[CrystalBatch, tuple[str, ...]]:
    """Stored grids, each byte copied once, from the file into the batch: in `memory`, or page-locked where there is none."""
    shape = reader.entries[int(places[0])][1].shape
    sizes = (len(places), n_channels(reader.grid), *shape), (len(places), *shape)
    if memory:
        density, species = memory.empty(sizes[0], np.float16), memory.empty(sizes[1], np.uint8)
    else:
        density, species = (
            torch.empty(size, dtype=d, pin_memory=True) for size, d in zip(sizes, (torch.float16, torch.uint8))
        )
    about, damaged, texts = _About(len(places)), [], list[memoryview | None]()
    densities, labels = density.numpy(), species.numpy()
    at_once = max(1, min(MOST_FILES, AT_ONCE // (densities[0].nbytes + labels[0].nbytes)))
    while len(texts) < len(places):
        go_on()
        rows = slice(len(texts), len(texts) + at_once)
        texts += reader.read_raw(places[rows], densities[rows], labels[rows])
    about.fill_from_json({row: text for row, text in enumerate(texts) if text is not None})
    for row in np.flatnonzero(~about.sound()).tolist():  # not raw, or damaged
        go_on()
        try:
            record = reader[int(places[row])]
            densities[row], labels[row] = record.density_CDHW, record.species_DHW
            about.fill(row, record.crystal)
        except DamagedSample as error:
            damaged.append(str(error))
            densities[row], labels[row] = 0, 0
            about.fill(row, STAND_IN, weight=0.0)
    return CrystalBatch(density, species, *about.tensors(pinned=memory is None)), tuple(damaged)


class _Memory:
    """Memory of batches that nobody holds any more, for the next ones: the system would clear each page of new memory,
    which costs as much time as the reading."""

    def __init__(self) -> None:
        self._blocks: list[tuple[NDArray[np.uint8], weakref.ref[NDArray[Any]]]] = []
        self._lock = threading.Lock()

    def empty(self, shape: Shape, dtype: type[np.generic]) -> Tensor:
        """A tensor of any content."""
        size = prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            free = sorted((len(block), number) for number, (block, array) in enumerate(self._blocks) if array() is None)
            fitting = [number for length, number in free if length >= size] or [number for _, number in free[-1:]]
            block = self._blocks.pop(fitting[0])[0] if fitting else np.empty(0, np.uint8)
            if len(block) < size:
                block = np.empty(size, np.uint8)
            array = block[:size].view(dtype).reshape(shape)
            self._blocks.append((block, weakref.ref(array)))  # the tensor's storage holds the array
        return torch.from_numpy(array)


def _structures(
    reader: ShardReader, places: Places, go_on: Callable[[], None], seed: str, substitution: float
) -> tuple[StructureBatch, tuple[str, ...]]:
    """Structures alone; their random elements, rotations and origins are a pure function of the seed and each sample."""
    crystals, seeds, about, damaged = [], [], _About(len(places)), []
    elements = reader.index.elements("train") if substitution else ()
    for row, place in enumerate(places.tolist()):
        go_on()
        sample = reader.entries[place][1]
        digest = hashlib.sha256(f"{seed}\0{sample.id}\0{sample.copy}".encode()).digest()
        try:
            crystal, weight = reader.crystal(place), 1.0
            if substitution:
                own = int.from_bytes(digest[8:16], "big")
                crystal = substituted(crystal, reader.grid, elements, substitution, own)
        except DamagedSample as error:
            damaged.append(str(error))
            crystal, weight = STAND_IN, 0.0
        crystals.append(crystal)
        about.fill(row, crystal, weight)
        seeds.append(int.from_bytes(digest[:8], "big"))
    d, h, w = reader.entries[int(places[0])][1].shape
    batch = StructureBatch(CrystalTensors.of(crystals), reader.grid, (d, h, w), tuple(seeds), *about.tensors(pinned=False))
    return batch, tuple(damaged)


class _About:
    """Cells, compositions and weights of a batch."""

    def __init__(self, size: int) -> None:
        self.lattice_B33 = np.zeros((size, 3, 3))
        self.composition_BZ = np.zeros((size, MAX_Z + 1), np.float32)
        self.weight_B = np.ones(size, np.float32)

    def fill(self, row: int, crystal: Crystal, weight: float = 1.0) -> None:
        self.lattice_B33[row] = crystal.lattice_A
        self.composition_BZ[row] = np.bincount(crystal.numbers_N, minlength=MAX_Z + 1)
        self.weight_B[row] = weight

    def fill_from_json(self, texts: dict[int, memoryview]) -> None:
        """From the `structure.json` of rows, their checksums being right; none is filled where one holds no crystal."""
        with suppress(LookupError, TypeError, ValueError, RecursionError):
            counts, listed, cells_A = list[int](), list[int](), list[Any]()
            for text in texts.values():  # one by one: many at once would call the garbage collector
                values = orjson.loads(text)
                counts.append(len(values["numbers"]))
                listed += values["numbers"]
                cells_A.append(values["lattice_A"])
            rows, numbers, lattices = np.fromiter(texts, np.int64), np.array(listed), np.array(cells_A, np.float64)
            if lattices.shape[1:] == (3, 3) and min(counts) and 1 <= numbers.min() <= numbers.max() <= MAX_Z:
                places = np.repeat(rows * (MAX_Z + 1), counts) + numbers
                shape = self.composition_BZ.shape
                self.composition_BZ[:] = np.bincount(places, minlength=self.composition_BZ.size).reshape(shape)
                self.lattice_B33[rows] = lattices

    def sound(self) -> NDArray[np.bool_]:
        """[B] which cells are filled and have a volume."""
        with np.errstate(all="ignore"):
            volumes = np.abs(np.linalg.det(self.lattice_B33))
        sound: NDArray[np.bool_] = (volumes >= MIN_VOLUME_A3) & (volumes < np.inf)
        return sound

    def tensors(self, pinned: bool) -> tuple[Tensor, Tensor, Tensor]:
        """cell_B6, composition_BZ and weight_B."""
        arrays = cells(self.lattice_B33), self.composition_BZ, self.weight_B
        cell, composition, weight = (torch.from_numpy(array) for array in arrays)
        return (cell.pin_memory(), composition.pin_memory(), weight.pin_memory()) if pinned else (cell, composition, weight)


def cells(lattice_B33: NDArray[np.float64]) -> NDArray[np.float32]:
    """[B, 6] `models.autoencoder.cell_numbers` of lattices; none depends on the others."""
    lengths = np.sqrt((lattice_B33**2).sum(2))
    cosines = [
        (lattice_B33[:, i] * lattice_B33[:, j]).sum(1) / (lengths[:, i] * lengths[:, j]) for i, j in ((1, 2), (0, 2), (0, 1))
    ]
    return np.column_stack([np.log(lengths), *cosines]).astype(np.float32)


def collate(records: list[Record]) -> CrystalBatch:
    """Records as a CrystalBatch of copies. Raises ShardError where their shapes differ."""
    shapes = {record.density_CDHW.shape: record.crystal.id for record in records}
    if len(shapes) > 1:
        told = ", ".join(f"{_times(shape)} ({id})" for shape, id in shapes.items())
        raise ShardError(f"a batch needs grids of one shape, these {len(records)} have {told}; group them by shape")
    about = _About(len(records))
    for row, record in enumerate(records):
        about.fill(row, record.crystal)
    return CrystalBatch(
        torch.from_numpy(np.stack([record.density_CDHW for record in records])),
        torch.from_numpy(np.stack([record.species_DHW for record in records])),
        *about.tensors(pinned=False),
    )


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
