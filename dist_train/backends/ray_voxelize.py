"""Voxelising on Ray: scan tasks, then one idempotent task a shard. The only file that imports ray.

A task raises nothing for a bad crystal (it returns a `Rejected` row) and writes nothing that another task writes, so Ray
may retry it, and a second run redoes only what is missing.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dist_train import __version__
from dist_train.config import RunConfig
from dist_train.errors import DataError, DistTrainError, ShardError
from dist_train.files import write_text
from dist_train.progress import Progress
from dist_train.shards.index import INDEX_NAME, REJECTED_NAME, Index, config_hash
from dist_train.shards.plan import (
    Chunk,
    Rejected,
    ShardTask,
    discover,
    plan_shards,
    scan_chunk,
)
from dist_train.shards.writer import build_shard

WORK_NAME = ".work"
OBJECT_STORE_BYTES = 100 * 2**20
"""Tasks exchange rows, not grids: Ray's smallest store is enough."""


def voxelize(config: RunConfig) -> Index:
    """Voxelise `config.data.inputs` into `config.data.shards` and return the finished index.

    Raises DataError where nothing is found or too much is rejected, ShardError where the folder holds another run or
    the disk is full.
    """
    root = config.data.shards
    chunks = discover(config.data.inputs)
    resolved = {"data": _what(config), "grid": config.grid.model_dump(mode="json"), "inputs": _fingerprint(chunks)}
    digest = config_hash(resolved)
    if (done := _existing(root, digest)) is not None:
        return done
    work = _open_work(root, digest)
    try:
        index = _run(config, chunks, resolved, digest, work)
    finally:
        # A task that was ended in the middle of a file can't tidy up after itself.
        for leaving in work.glob(".*.tmp"):
            leaving.unlink()
    index.write()
    shutil.rmtree(work)
    return index


def _run(config: RunConfig, chunks: list[Chunk], resolved: dict[str, Any], digest: str, work: Path) -> Index:
    """Scan, plan and build; the index of what is then on disk."""
    root, grid = config.data.shards, config.grid
    with _Ray(config) as ray_map:
        scans = [(part, chunk, work, grid, config.data.splits) for part, chunk in enumerate(chunks)]
        tasks, rejected = plan_shards(ray_map("scan", scan_chunk, scans, [len(c) for c in chunks]), config.data)
        _write_rejected(root, rejected)
        _check_rejected(root, sum(map(len, chunks)), rejected, config.data.max_rejected_fraction)
        builds = [(task, root, work, grid) for task in tasks]
        records = ray_map("voxelise", build_shard, builds, [len(t.rows) for t in tasks])
    return Index(root, resolved, digest, __version__, _counts(chunks, tasks, rejected), tuple(records))


def _what(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the bytes; workers and addresses don't."""
    return config.data.model_dump(mode="json", include={"inputs", "splits", "samples_per_shard"})


def _fingerprint(chunks: Iterable[Chunk]) -> list[tuple[str, int]]:
    """Name and size of every input file, so that other inputs under the same path are noticed."""
    files = {(chunk.root / name) for chunk in chunks for name in chunk.files}
    return sorted((str(path), path.stat().st_size if path.exists() else 0) for path in files)


def _existing(root: Path, digest: str) -> Index | None:
    """The finished index, where the folder holds just what is asked for; None where shards are still to be made."""
    if not (root / INDEX_NAME).exists():
        strangers = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
        if strangers and WORK_NAME not in strangers:
            raise ShardError(
                f"output folder {root} is not empty ({len(strangers)} entries, such as {strangers[0]}) and holds no "
                "shards; set data.shards to a new folder"
            )
        return None
    shutil.rmtree(root / WORK_NAME, ignore_errors=True)  # left by a kill just after the index was written
    index = Index.read(root)
    if index.config_hash != digest:
        raise ShardError(
            f"output folder {root} holds another run (config {index.config_hash}, this one is {digest}); "
            "set data.shards to a new folder or remove that one"
        )
    whole = all((root / s.name).is_file() and (root / s.name).stat().st_size == s.bytes for s in index.shards)
    return index if whole else None


def _open_work(root: Path, digest: str) -> Path:
    """The folder of parts and records of this job; an interrupted job of the same config is taken up again."""
    work = root / WORK_NAME
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"output folder {root} can't be made: {error.strerror}") from None
    marker = work / "config_hash"
    if marker.exists() and marker.read_text() != digest:
        raise ShardError(f"output folder {root} holds an unfinished job of another config; remove it or set data.shards")
    write_text(marker, digest)
    return work


def _write_rejected(root: Path, rejected: Sequence[Rejected]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "file", "stage", "reason"])
    table.writerows((r.id, r.file, r.stage, r.reason) for r in sorted(rejected, key=lambda r: (r.file, r.id)))
    write_text(root / REJECTED_NAME, text.getvalue())


def _check_rejected(root: Path, inputs: int, rejected: Sequence[Rejected], limit: float) -> None:
    if len(rejected) == inputs:
        raise DataError(f"all {inputs} inputs were rejected; the reasons are in {root / REJECTED_NAME}")
    if len(rejected) > limit * inputs:
        raise DataError(
            f"{len(rejected)} of {inputs} inputs were rejected, more than data.max_rejected_fraction {limit}; "
            f"the reasons are in {root / REJECTED_NAME}"
        )


def _counts(chunks: Sequence[Chunk], tasks: Sequence[ShardTask], rejected: Sequence[Rejected]) -> dict[str, int]:
    inputs, accepted = sum(map(len, chunks)), sum(len(task.rows) for task in tasks)
    assert inputs == accepted + len(rejected), (inputs, accepted, len(rejected))
    stages = {f"rejected_{stage}": sum(r.stage == stage for r in rejected) for stage in ("parse", "grid", "plan")}
    return {"inputs": inputs, "accepted": accepted, "rejected": len(rejected), **stages}


class _Ray:
    """A context with a Ray cluster (joined, or started for this job) that yields an ordered parallel map."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __enter__(self) -> Callable[..., list[Any]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        data = self.config.data
        own = {"num_cpus": data.workers, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        if data.ray_address:
            _check_reachable(data.ray_address)
        try:
            # 'local' starts a cluster even where the environment or the machine knows another.
            ray.init(
                address=data.ray_address or "local", logging_level="ERROR", log_to_driver=False,
                **({} if data.ray_address else own),
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = data.ray_address or "a local cluster"
            raise DistTrainError(f"Ray could not be reached ({where}): {error}; check data.ray_address") from None
        return self.map

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def map(self, label: str, function: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: list[int]) -> list[Any]:
        """function(*a) for every a as Ray tasks, in order; a bounded number is in flight; progress in crystals."""
        import ray

        task = ray.remote(num_cpus=1, max_retries=3)(function)
        results: list[Any] = [None] * len(arguments)
        flying: dict[Any, int] = {}
        waiting = iter(range(len(arguments)))
        with Progress(label, sum(sizes), "crystals") as progress:
            while True:
                while len(flying) < 4 * self.config.data.workers and (place := next(waiting, None)) is not None:
                    flying[task.remote(*arguments[place])] = place
                if not flying:
                    return results
                (ready,), _ = ray.wait(list(flying), num_returns=1)
                place = flying.pop(ready)
                try:
                    results[place] = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    raise self._readable(error) from None
                progress.update(sizes[place])

    def _readable(self, error: Any) -> Exception:
        """A task's error as the user should see it."""
        cause = error.cause
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            root = self.config.data.shards
            return ShardError(
                f"the disk of {root} is full; free space and run the same command again: it goes on from there"
            )
        return cause if isinstance(cause, DistTrainError) else error


def _check_reachable(address: str) -> None:
    """Raise DistTrainError where nobody listens at 'host:port': ray itself would try for minutes without a word."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise DistTrainError(f"no Ray cluster answers at data.ray_address {address}: {error}") from None
