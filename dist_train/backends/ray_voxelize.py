"""Voxelising on Ray: scan tasks, then one idempotent task a shard.

A task raises nothing for a bad crystal (it returns a `Rejected` row) and writes nothing that another task writes, so Ray
may retry it, and a second run redoes only what is missing.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np

from dist_train import __version__
from dist_train.config import DataConfig, GridSpec
from dist_train.crystal.elements import NUMBERS
from dist_train.dataset_card import PICTURES_NAME, Card, write_card
from dist_train.errors import DataError, DistTrainError, ShardError, kind_of
from dist_train.files import write_text
from dist_train.progress import Progress
from dist_train.shards.discover import Found, discover
from dist_train.shards.index import INDEX_NAME, REJECTED_NAME, Index, ShardRecord, config_hash
from dist_train.shards.plan import (
    alike,
    distinct,
    find_duplicates,
    plan_shards,
    read_split_ids,
    split_rows,
    without,
)
from dist_train.shards.scan import Rejected, Row, ScanResult, read_scan, scan_chunk
from dist_train.shards.writer import build_shard

WORK_NAME = ".work"
OBJECT_STORE_BYTES = 100 * 2**20
"""Tasks exchange rows, not grids: Ray's smallest store is enough."""
MAX_RETRIES = 5
"""Of a task whose worker or node is lost; a task that fails by itself isn't retried."""
GROUPS_PER_TASK = 64
FULL = (errno.ENOSPC, errno.EDQUOT)
DECIDING = {
    "inputs", "licences", "splits", "split_column", "split_ids", "drop_duplicates", "duplicate_tolerance_A", "store",
    "encoding", "copies", "samples_per_shard", "seconds_per_file", "memory_per_file_MB",
}  # fmt: skip
"""Settings that decide the bytes; workers and addresses don't."""


def repair(index: Index, workers: int) -> Index:
    """Build missing and damaged shards of a finished run again, from its own settings and inputs."""
    own = {"shards": index.root, "workers": workers, "max_rejected_fraction": 1}  # what was rejected was accepted so
    return voxelize(DataConfig.model_validate(index.config["data"] | own), index.grid)


def voxelize(data: DataConfig, grid: GridSpec, cluster: Cluster | None = None) -> Index:
    """Voxelise `data.inputs` into `data.shards` and return the finished index; on a given cluster, or one for this job.

    Raises DataError where nothing is found or too much is rejected, ShardError where the folder holds another run or
    the disk is full.
    """
    data = data.model_copy(update={"shards": data.folder.absolute()})  # a worker may have another working directory
    try:
        return _voxelize(data, grid, cluster)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ShardError(
            f"the disk of {data.shards} is full; free space and run the same command again: it goes on from there"
        ) from None


def _voxelize(data: DataConfig, grid: GridSpec, cluster: Cluster | None) -> Index:
    root = data.folder
    found = discover(data.inputs)
    resolved = {
        "data": data.model_dump(mode="json", include=DECIDING),
        "grid": grid.model_dump(mode="json"),
        # Other inputs under the same paths are noticed by their sizes.
        "read": {
            "files": len(found.sizes),
            "bytes": sum(found.sizes.values()),
            "sizes_sha256": _digest(found.sizes),
            "split_ids_sha256": _digest(read_split_ids(data.split_ids)),
        },
    }
    digest = config_hash(resolved)
    index = _existing(root, digest)
    if index and _is_whole(index):
        _tidy(root)
        shutil.rmtree(root / WORK_NAME, ignore_errors=True)  # left by a kill just after the index was written
        return index
    work = _open_work(root, digest)
    for record in index.shards if index else ():
        write_text(work / f"{record.name}.json", record.to_json())  # what is still whole isn't built again
    try:
        with nullcontext(cluster) if cluster else Cluster(data) as ray:
            index = _run(ray, data, grid, found, resolved, digest, work)
    finally:
        _tidy(root)
    index.write()
    shutil.rmtree(work)
    return index


def _tidy(root: Path) -> None:
    """Remove what tasks and jobs that were ended in the middle of a file left behind."""
    for folder in (root, root / WORK_NAME, root / PICTURES_NAME):
        for leaving in folder.glob(".*.tmp"):
            leaving.unlink(missing_ok=True)  # a task that is just being ended may be faster


def _run(
    ray: Cluster, data: DataConfig, grid: GridSpec, found: Found, resolved: dict[str, Any], digest: str, work: Path
) -> Index:
    """Scan, plan and build; the index of what is then on disk."""
    root = data.folder
    refused = [Rejected(file, given, file, "parse", f"{file}: {reason}") for given, file, reason in found.refused]
    rows, rejected = distinct(_scan(ray, found, data, grid, work))
    groups = alike(rows) if data.drop_duplicates else []
    batches = [groups[start : start + GROUPS_PER_TASK] for start in range(0, len(groups), GROUPS_PER_TASK)]
    same = ray.map(
        "duplicates", find_duplicates, [(batch, work, data.duplicate_tolerance_A) for batch in batches],
        [sum(map(len, batch)) for batch in batches],
    )  # fmt: skip
    rows, doubled = without(rows, dict(pair for pairs in same for pair in pairs))
    splits, unnamed = split_rows(rows, data)
    rejected = [*refused, *rejected, *doubled, *unnamed]
    accepted = sum(map(len, splits.values()))
    _write_rejected(root, rejected)
    _check_rejected(root, accepted + len(rejected), rejected, data.max_rejected_fraction)
    tasks = plan_shards(splits, data)
    records = ray.map(
        "voxelise" if data.store == "grids" else "write", build_shard,
        [(task, root, work, data, grid) for task in tasks], [len(task.entries) for task in tasks],
    )  # fmt: skip
    counts = {
        "inputs": accepted + len(rejected),
        "accepted": accepted,
        "rejected": len(rejected),
        **{f"rejected_{stage}": sum(r.stage == stage for r in rejected) for stage in ("parse", "grid", "plan")},
        "duplicates": len(doubled),
        "ignored_files": found.ignored,
        "listed_ids_not_found": len(read_split_ids(data.split_ids).keys() - {row.id for row in rows}),
        "samples": accepted * data.copies,
    }
    write_card(root, _card(data, resolved, digest, counts, splits, rejected, records))
    return Index(root, resolved, digest, __version__, counts, tuple(records))


def _scan(ray: Cluster, found: Found, data: DataConfig, grid: GridSpec, work: Path) -> list[ScanResult]:
    """The results of all chunks, of which those that aren't there yet are scanned."""
    results = [read_scan(work, part) for part in range(len(found.chunks))]
    missing = [part for part, result in enumerate(results) if result is None]
    ray.map(
        "scan", scan_chunk, [(part, found.chunks[part], work, data, grid) for part in missing],
        [len(found.chunks[part]) for part in missing],
        lambda counts: {"accepted": counts[0], "rejected": counts[1]},
    )  # fmt: skip
    for part in missing:
        results[part] = read_scan(work, part)
    return [result for result in results if result]


def _digest(value: dict[str, Any]) -> str:
    """SHA-256 of a mapping, whatever its order; '' of an empty one."""
    return hashlib.sha256(json.dumps(sorted(value.items())).encode()).hexdigest() if value else ""


def _card(
    data: DataConfig, resolved: dict[str, Any], digest: str, counts: dict[str, int], splits: dict[str, list[Row]],
    rejected: Sequence[Rejected], records: Sequence[ShardRecord],
) -> Card:  # fmt: skip
    rows = [row for members in splits.values() for row in members]
    taken, refused = Counter(row.input for row in rows), Counter(r.input for r in rejected)
    elements = Counter(NUMBERS[symbol] for row in rows for symbol in re.findall("[A-Z][a-z]?", row.formula))
    kinds = Counter((r.stage, kind_of(r.reason.removeprefix(f"{r.id}: "))) for r in rejected)
    shapes = Counter(sample.shape for record in records for sample in record.samples)
    return Card(
        config=resolved,
        config_hash=digest,
        code_version=__version__,
        counts=counts,
        splits={split: (len(members), len(members) * data.copies) for split, members in splits.items()},
        sources=[
            (given, data.licences.get(given, ""), taken[given], refused[given]) for given in dict.fromkeys(data.inputs)
        ],
        rejected_reasons=[(*kind, count) for kind, count in kinds.most_common()],
        atoms=np.array([row.atoms for row in rows]),
        volumes_A3=np.array([row.volume_A3 for row in rows]),
        elements=dict(elements),
        split_of=np.repeat(np.arange(len(splits)), [len(members) for members in splits.values()]),
        shapes={(d, h, w): count for (d, h, w), count in shapes.items()} if data.store == "grids" else {},
        bytes=sum(record.bytes for record in records),
    )


def _existing(root: Path, digest: str) -> Index | None:
    """The index, where the folder holds just what is asked for; None where it holds nothing or an unfinished job."""
    if not (root / INDEX_NAME).exists():
        strangers = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
        if strangers and WORK_NAME not in strangers:
            raise ShardError(
                f"output folder {root} is not empty ({len(strangers)} entries, such as {strangers[0]}) and holds no "
                "shards; set data.shards to a new folder"
            )
        return None
    index = Index.read(root)
    if index.config_hash != digest:
        raise ShardError(
            f"output folder {root} holds another run (config {index.config_hash}, this one is {digest}); "
            "set data.shards to a new folder or remove that one"
        )
    return index


def _is_whole(index: Index) -> bool:
    """Whether all shards are there in their sizes; `dist-train verify` reads them."""
    paths = ((index.root / shard.name, shard.bytes) for shard in index.shards)
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


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


class Cluster:
    """A context that joins a Ray cluster, or starts one, when the first tasks are mapped, and leaves it at the end."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.in_flight = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_flight:
            import ray

            ray.shutdown()

    def start(self) -> None:
        """Join or start it. Raises DistTrainError where none answers, or none of its nodes has room for a task."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        data = self.data
        # A job submitted to a cluster finds it there.
        address = data.ray_address or os.environ.get("RAY_ADDRESS")
        own = {"num_cpus": data.workers, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        if address:
            _check_reachable(address)
        try:
            # 'local' starts a cluster even where the machine knows another.
            ray.init(address=address or "local", logging_level="ERROR", log_to_driver=False, **({} if address else own))
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = address or "a local cluster"
            raise DistTrainError(
                f"Ray could not be reached ({where}): {error}; check data.ray_address or RAY_ADDRESS"
            ) from None
        needed = {"CPU": data.cpus_per_task, "memory": (data.memory_per_task_MB or 0) * 10**6}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = [node for node in nodes if all(node.get(name, 0) >= amount for name, amount in needed.items())]
        self.in_flight = 2 + 2 * int(sum(node["CPU"] for node in fit) / data.cpus_per_task)
        if not fit:  # Ray would wait forever for one
            has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('memory', 0) / 1e6:.0f} MB" for node in nodes[:8])
            raise DistTrainError(
                f"no node of the Ray cluster ({has}) has room for a task: data.cpus_per_task {data.cpus_per_task:g}, "
                f"data.memory_per_task_MB {data.memory_per_task_MB}"
            )

    def map(
        self, label: str, function: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: list[int],
        figures: Callable[[Any], dict[str, int]] = lambda result: {},
    ) -> list[Any]:  # fmt: skip
        """function(*a) for every a as Ray tasks, in order; a bounded number is in flight.

        sizes: crystals of each. figures: counts in a task's result, whose sums are shown behind the progress bar.
        """
        if not arguments:
            return []
        if not self.in_flight:
            self.start()
        import ray

        memory = {"memory": self.data.memory_per_task_MB * 10**6} if self.data.memory_per_task_MB else {}
        task = ray.remote(num_cpus=self.data.cpus_per_task, max_retries=MAX_RETRIES, **memory)(function)
        results: list[Any] = [None] * len(arguments)
        totals: Counter[str] = Counter()
        flying: dict[Any, int] = {}
        waiting = iter(range(len(arguments)))
        with Progress(label, sum(sizes), "crystals") as progress:
            while True:
                while len(flying) < self.in_flight and (place := next(waiting, None)) is not None:
                    flying[task.remote(*arguments[place])] = place
                if not flying:
                    return results
                (ready,), _ = ray.wait(list(flying), num_returns=1)
                place = flying.pop(ready)
                try:
                    results[place] = ray.get(ready)
                except ray.exceptions.RayError as error:
                    raise self._readable(label, error) from None
                totals.update(figures(results[place]))
                progress.update(sizes[place], **totals)

    def _readable(self, label: str, error: Exception) -> Exception:
        """A task's error as the user should see it."""
        cause = getattr(error, "cause", None)
        if cause is None:
            return DistTrainError(
                f"{label}: the workers of a task were lost {MAX_RETRIES + 1} times ({' '.join(str(error).split())[:300]}); "
                "run the same command again: it goes on from there"
            )
        if isinstance(cause, DistTrainError) or (isinstance(cause, OSError) and cause.errno in FULL):
            return cause
        return error


def _check_reachable(address: str) -> None:
    """Raise DistTrainError where nobody listens at 'host:port': ray itself would try for minutes without a word."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise DistTrainError(f"no Ray cluster answers at data.ray_address {address}: {error}") from None
