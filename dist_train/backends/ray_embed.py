"""Work by parts on Ray actors, each of which prepares itself once (pulls a model, say), then takes one part after another.

What is in flight is one part an actor, however many parts there are. The part of an actor that is lost goes to another one,
so parts must be such that can be done again.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from dist_train.backends.ray_voxelize import Cluster
from dist_train.config import DataConfig
from dist_train.errors import DistTrainError

T = TypeVar("T")
R = TypeVar("R")

MAX_DEATHS = 3
"""Actors that may be lost to one part, or one after another before any is ready."""


class _Actor:
    """Prepares itself with its first call, where an error is told as what it is."""

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]]) -> None:
        self._prepare = prepare
        self._work: Callable[[Any], Any] | None = None

    def do(self, part: Any) -> Any:
        self._work = self._work or self._prepare()
        return None if part is None else self._work(part)


def on_ray(
    prepare: Callable[[], Callable[[T], R]], parts: Sequence[T], workers: int | None, address: str | None
) -> Iterator[tuple[T, R]]:
    """(part, prepare()(part)) of all parts, as they are done, by so many actors of a CPU each.

    On the cluster of this address or of RAY_ADDRESS, else on one started for it; workers None: its CPUs.
    Raises what `prepare` or a part raised, and DistTrainError where actors are lost again and again.
    """
    with Cluster(DataConfig(workers=workers or os.cpu_count() or 1, ray_address=address)) as cluster:
        cluster.start()
        import ray

        actor: Any = ray.remote(num_cpus=1)(_Actor)
        waiting = deque(parts)
        flying: dict[Any, tuple[Any, T | None]] = {}
        deaths: Counter[int] = Counter()

        def start() -> None:
            # An actor gets its first part when it is ready: one that finds no room in a busy cluster holds none back.
            new = actor.remote(prepare)
            flying[new.do.remote(None)] = new, None

        for _ in range(min(workers or int(ray.cluster_resources()["CPU"]), len(parts))):
            start()
        while waiting or any(part is not None for _, part in flying.values()):
            (ready,), _ = ray.wait(list(flying), num_returns=1)
            worker, part = flying.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except ray.exceptions.RayError as error:
                key = -1 if part is None else id(part)
                deaths[key] += 1
                if deaths[key] >= MAX_DEATHS:
                    raise _lost(part, error) from None
                if part is not None:
                    waiting.append(part)
                start()
                continue
            deaths[-1] = 0
            if waiting:
                after = waiting.popleft()
                flying[worker.do.remote(after)] = worker, after
            if part is not None:
                yield part, result


def _cause(error: Exception) -> Exception:
    """An actor's error as the user should see it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, DistTrainError | OSError) else error


def _lost(part: object, error: Exception) -> DistTrainError:
    what = "an actor before it was ready" if part is None else f"the actor of {part}"
    return DistTrainError(
        f"{what} was lost {MAX_DEATHS} times ({' '.join(str(error).split())[:300]}); run the same command again, it goes on "
        "from there; if it isn't memory, look for the crystals that end it"
    )
