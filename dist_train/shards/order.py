"""The order of samples: a pure function of the seed, the epoch and the index. No rank, no worker and no clock is in it.

Shards come in random order, and that stream is cut into windows of whole shards whose samples are shuffled together, so that
data larger than the memory (or the cache of remote shards) are read from the disk once an epoch. Split into one stream for
each grid shape, the samples fill groups; groups come in the order in which they are full, and each few that follow each
other are a batch. So a batch mixes grid shapes as the crystals do, and a rare shape has to fill a group only.
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
    """Which samples each rank sees at each step.

    shapes: of every sample of the split; shard_sizes: samples of each of its shards. Both in the order of the index.
    group: samples that follow each other in a global batch and have one grid shape, a divisor of it; None: all of it.
    window: fewest samples that are shuffled together, if shards are of one size; at most two shards less than twice as many,
    unless that is the whole split.
    An epoch leaves out the samples of each shape that come after its last full group, and the last groups where they don't
    fill a batch: others in each epoch, equally many.
    The samples of a group lie in one window or in two that follow each other; those of a shape that takes longer than a
    window to fill a group lie further apart.
    Raises ShardError where the groups don't fill a global batch.
    """

    shapes: Sequence[Shape]
    shard_sizes: Sequence[int]
    global_batch: int
    epochs: int
    seed: int
    rank: int
    ranks: int
    window: int = 2**16
    group: int | None = None

    def __post_init__(self) -> None:
        assert sum(self.shard_sizes) == len(self.shapes) and self.global_batch % self.group_size == 0
        if self.steps_per_epoch == 0:
            raise ShardError(
                f"the training split has {len(self.shapes)} samples of {len(self.counts)} grid shapes, "
                f"{self.groups * self.group_size} of them in groups of {self.group_size} of one shape, fewer than "
                f"train.global_batch_size {self.global_batch}; lower it or voxelise more crystals"
            )

    @property
    def group_size(self) -> int:
        return self.group or self.global_batch

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
    def groups(self) -> int:
        """Full groups of an epoch, those after its last batch included."""
        return int((self.counts // self.group_size).sum())

    @property
    def steps_per_epoch(self) -> int:
        return self.groups * self.group_size // self.global_batch

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def never_seen(self) -> int:
        """Samples of shapes that don't fill a group: no epoch has them."""
        return int(self.counts[self.counts < self.group_size].sum())

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
    """The order of an epoch: a pure function of shapes, shard sizes, global batch, group, window, seed and epoch."""
    rng, size = np.random.Generator(np.random.PCG64([plan.seed, epoch])), plan.group_size
    sizes = np.asarray(plan.shard_sizes, np.int64)
    shards = rng.permutation(len(sizes))
    # A sample's place is where its shard starts in the index, plus how far it lies behind the shard's start in the stream.
    starts = np.concatenate([[0], np.cumsum(sizes[shards])])
    stream = np.repeat((np.cumsum(sizes) - sizes)[shards] - starts[:-1], sizes[shards]) + np.arange(len(plan.shapes))
    bounds = starts[plan.cuts]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        rng.shuffle(stream[start:stop])
    by_shape = np.argsort(plan.shape_numbers[stream], kind="stable")
    alike = np.split(by_shape, np.cumsum(plan.counts)[:-1])
    groups = np.concatenate([of_one[: len(of_one) // size * size] for of_one in alike]).reshape(-1, size)
    groups = groups[np.argsort(groups[:, -1])]
    batches = groups.ravel()[: plan.steps_per_epoch * plan.global_batch].reshape(-1, plan.global_batch)
    return EpochOrder(stream[batches], np.searchsorted(bounds, batches[:, -1], side="right") - 1, shards)
