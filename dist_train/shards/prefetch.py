"""Fetches the remote shards that are read next: those of training's next window, or of a split from its start."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np

from dist_train.errors import ShardError
from dist_train.shards.index import ShardRecord
from dist_train.shards.order import BatchPlan
from dist_train.shards.reader import ShardReader
from dist_train.shards.remote import ShardCache

FETCHERS = 4
"""Shards of a rank that are fetched at the same time."""


class Prefetch:
    """A thread that keeps one window ahead of the steps [start, stop), whose shards are fetched in the order of the stream.

    Raises ShardError where the cache can't hold two windows, which would be fetched again and again.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[ShardRecord], plan: BatchPlan, start: int, stop: int) -> None:
        check_room(cache, shards, plan)
        self._cache, self._shards, self._plan, self._steps = cache, shards, plan, (start, stop)
        self._window, self._moved, self._stopped = -1, threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()
        self._thread.join()

    def reached(self, step: int) -> None:
        """The batch of a step is being used."""
        with self._moved:
            self._window = self._plan.window_of(step)
            self._moved.notify()

    def _work(self) -> None:
        start, stop = self._steps
        if start >= stop:
            return
        first = self._plan.window_of(start)
        last = ((stop - 1) // self._plan.steps_per_epoch + 1) * (len(self._plan.cuts) - 1) - 1
        with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as pool:
            for window in range(first, last + 1):
                with self._moved:
                    while not self._stopped and max(self._window, first) < window - 1:
                        self._moved.wait()
                if self._stopped:
                    return
                for _ in pool.map(self._fetch, self._plan.shards_of(window).tolist()):
                    pass

    def _fetch(self, number: int) -> None:
        if not self._stopped:
            _try_fetch(self._cache, self._shards[number])


def fetched(reader: ShardReader, count: int) -> Iterator[int]:
    """The first `count` places of a split, in order; the next few shards, if remote, are fetched meanwhile."""
    cache, ends = reader.index.cache, np.cumsum(reader.shard_sizes).tolist()
    shards = reader.shards[: int(np.searchsorted(ends, count)) + 1]
    ahead = min(FETCHERS, cache.limit // max(shard.bytes for shard in shards) - 1) if cache else 0
    if cache is None or ahead < 1:
        yield from range(count)
        return
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="fetch")
    try:
        for number, (start, stop) in enumerate(zip([0, *ends], ends[: len(shards)])):
            for coming in shards[number + ahead * (number > 0) : number + ahead + 1]:
                pool.submit(_try_fetch, cache, coming)
            yield from range(start, min(stop, count))
    finally:
        pool.shutdown(cancel_futures=True)


def _try_fetch(cache: ShardCache, shard: ShardRecord) -> None:
    with suppress(ShardError, OSError):  # whoever needs the shard raises it, in its turn
        cache.fetch(shard, wait=False)


def check_room(cache: ShardCache, shards: Sequence[ShardRecord], plan: BatchPlan) -> None:
    """Raise ShardError where the cache holds neither the split nor two windows of it."""
    largest = int(np.diff(plan.cuts).max())
    needed = min(sum(shard.bytes for shard in shards), 2 * largest * max(shard.bytes for shard in shards))
    if needed > cache.limit:
        raise ShardError(
            f"data.cache_MB {cache.limit // 10**6} can't hold two windows of data.shuffle_window {plan.window} samples, "
            f"{needed // 10**6} MB of {cache.remote}; raise the first or lower the second"
        )
