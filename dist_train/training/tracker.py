"""Metrics on disk first: rank 0 appends them to `metrics.jsonl`; uploaders read that file, so no outage loses anything."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """What the train loop tells of itself."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step, for ever; must return at once."""


class Spool:
    """Appends one JSON line a record: {"step", "time" (ms since 1970), "metrics"}.

    A resumed run computes again what lay between its checkpoint and its end. Those records are there already, with the
    same losses, and are not written twice: there is one record for each step and set of metric names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()
        self._written = {(record["step"], *sorted(record["metrics"])) for record in read_spool(path)}
        self._stream = path.open("a")

    def _drop_torn_line(self) -> None:
        """A kill in the middle of a write leaves a last line without its end."""
        if self.path.exists():
            data = self.path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        key = (step, *sorted(metrics))
        if key in self._written:
            return
        self._written.add(key)
        self._stream.write(json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": metrics}) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


class NoTracker:
    """For ranks other than 0."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        return


def read_spool(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a spool, in order."""
    return (record for record, _ in read_on(path, 0))


def read_series(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every metric in a spool, by name."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in read_spool(path):
        for name, value in record["metrics"].items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    return series


def read_on(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The records from a byte offset on, each with the offset after it; a line that is still being written is left."""
    if path.exists():
        with path.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if line.endswith(b"\n"):
                    offset += len(line)
                    yield json.loads(line), offset
