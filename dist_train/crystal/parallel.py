"""Ordered maps over processes or threads, with a bounded number of items in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

PRELOADED = ["dist_train.crystal.decode_box"]
"""What processes need not import themselves: numpy, scipy, numba and the kernels, half a second."""
CHUNKS_IN_FLIGHT = 4
"""Of each process: enough that none waits, few enough that the items in memory don't grow with their number."""


def parallel_map(function: Callable[[T], R], items: Iterable[T], workers: int, chunk: int = 16) -> Iterator[R]:
    """function(item) for every item, in order, over processes; at most one worker means this process.

    Processes are forked from one that has imported little and runs no threads, as a fork of one with threads may hang:
    `function` must be importable. They start in a few hundredths of a second, the first ones in half a second.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    waiting = iter(items)
    chunks = iter(lambda: list(islice(waiting, chunk)), [])
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pool = ProcessPoolExecutor(workers, mp_context=context)
    for found in in_order(pool, partial(_each, function), chunks, CHUNKS_IN_FLIGHT * workers):
        yield from found


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """function(item) for every item, in order, at most `ahead` of them before they are asked for; ends with the pool."""
    flying = deque[Future[R]]()
    try:
        for item in items:
            flying.append(pool.submit(function, item))
            if len(flying) > ahead:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _each(function: Callable[[T], R], items: list[T]) -> list[R]:
    return [function(item) for item in items]
