"""The order of samples: a pure function of the seed, the epoch and the index. No rank, no worker and no clock is in it.

Shards come in random order, and that stream is cut into windows of whole shards whose samples are shuffled together, so that
data larger than the memory (or the cache of remote shards) are read from the disk once an epoch. Split into one stream for
each grid shape, the samples fill batches; batches come in the order in which they are full.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import ShardError

Shape = tuple[int, ...]
Places = NDArray[np.int64]
_ordering = threading.Lock()


class EpochOrder(NamedTuple):
    """batches: [steps, global batch] places of all ranks; windows: [steps] number of the window that holds each batch's last
    sample; shards: numbers of the shards in the order of the stream."""

    batches: Places
    windows: Places
    shards: Places


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which samples each rank sees at each step; the samples of a global batch have one grid shape.

    shapes: of every sample of the split; shard_sizes: samples of each of its shards. Both in the order of the index.
    window: fewest samples that are shuffled together, if shards are of one size; at most two shards less than twice as many,
    unless that is the whole split.
    An epoch leaves out the samples of each shape that come after its last full batch: others in each epoch, equally many.
    The samples of a batch lie in one window or in two that follow each other; those of a shape that takes longer than a
    window to fill a batch lie further apart.
    Raises ShardError where no shape has the samples of a global batch.
    """

    shapes: Sequence[Shape]
    shard_sizes: Sequence[int]
    global_batch: int
    epochs: int
    seed: int
    rank: int
    ranks: int
    window: int = 2**16

    def __post_init__(self) -> None:
        assert sum(self.shard_sizes) == len(self.shapes)
        if self.steps_per_epoch == 0:
            most = max(self.counts.tolist(), default=0)
            raise ShardError(
                f"the training split has {len(self.shapes)} samples of {len(self.counts)} grid shapes, at most {most} of "
                f"one shape, fewer than train.global_batch_size {self.global_batch}; lower it or voxelise more crystals"
            )

    @cached_property
    def shape_numbers(self) -> NDArray[np.uint16]:
        """[samples] number of each one's shape, by rising shape."""
        number = {shape: i for i, shape in enumerate(sorted(set(self.shapes)))}
        return np.fromiter(map(number.__getitem__, self.shapes), np.uint16, len(self.shapes))

    @cached_property
    def counts(self) -> Places:
        """Samples of each shape."""
        return np.bincount(self.shape_numbers)

    @cached_property
    def steps_per_epoch(self) -> int:
        return int((self.counts // self.global_batch).sum())

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def never_seen(self) -> int:
        """Samples of shapes that don't fill a global batch: no epoch has them."""
        return int(self.counts[self.counts < self.global_batch].sum())

    @property
    def dropped(self) -> int:
        """Samples that an epoch leaves out, those never seen included; the others change from epoch to epoch."""
        return len(self.shapes) - self.steps_per_epoch * self.global_batch

    @cached_property
    def cuts(self) -> Places:
        """Where in an epoch's order of shards each window begins, and the last one ends: the same in every epoch."""
        shards = len(self.shard_sizes)
        windows = max(1, shards // -(-self.window * shards // len(self.shapes)))
        return np.arange(windows + 1) * shards // windows

    def order(self, epoch: int) -> EpochOrder:
        """The whole epoch, made once for all threads that ask; the last two epochs are kept."""
        with _ordering:
            return epoch_order(self, epoch)

    def places(self, step: int) -> Places:
        """The places that this rank reads for a step, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.ranks
        return self.order(epoch).batches[batch, self.rank * share : (self.rank + 1) * share]

    def window_of(self, step: int) -> int:
        """The window that holds the last sample of a step's batch, counted from that of step 0 through all epochs."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return epoch * (len(self.cuts) - 1) + int(self.order(epoch).windows[batch])

    def shards_of(self, window: int) -> Places:
        """Numbers of the shards of a window, counted as in `window_of`, in the order of the stream."""
        epoch, within = divmod(window, len(self.cuts) - 1)
        return self.order(epoch).shards[self.cuts[within] : self.cuts[within + 1]]


@lru_cache(maxsize=2)
def epoch_order(plan: BatchPlan, epoch: int) -> EpochOrder:
    """The order of an epoch: a pure function of shapes, shard sizes, global batch, window, seed and epoch."""
    rng, size = np.random.Generator(np.random.PCG64([plan.seed, epoch])), plan.global_batch
    sizes = np.asarray(plan.shard_sizes, np.int64)
    shards = rng.permutation(len(sizes))
    # A sample's place is where its shard starts in the index, plus how far it lies behind the shard's start in the stream.
    starts = np.concatenate([[0], np.cumsum(sizes[shards])])
    stream = np.repeat((np.cumsum(sizes) - sizes)[shards] - starts[:-1], sizes[shards]) + np.arange(len(plan.shapes))
    bounds = starts[plan.cuts]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        rng.shuffle(stream[start:stop])
    by_shape = np.argsort(plan.shape_numbers[stream], kind="stable")
    groups = np.split(by_shape, np.cumsum(plan.counts)[:-1])
    batches = np.concatenate([group[: len(group) // size * size] for group in groups]).reshape(-1, size)
    batches = batches[np.argsort(batches[:, -1])]
    return EpochOrder(stream[batches], np.searchsorted(bounds, batches[:, -1], side="right") - 1, shards)
