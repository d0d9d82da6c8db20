"""Builds one planned shard: read the crystals, voxelise, write a temporary tar, rename. Idempotent and byte-reproducible."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.files import atomic_path, sha256, write_text
from dist_train.shards.codec import add_member, encode_sample, open_tar
from dist_train.shards.index import Sample, ShardRecord, record_from_json
from dist_train.shards.plan import Row, ShardTask, part_name


def build_shard(task: ShardTask, root: Path, work: Path, grid: GridSpec) -> ShardRecord:
    """Write `root/task.name` and its record in `work`; a shard that is there already, whole, is not built again."""
    record_path = work / f"{task.name}.json"
    record = _finished(root / task.name, record_path)
    if record is None:
        record = _build(task, root, work, grid)
        write_text(record_path, json.dumps(asdict(record)))
    return record


def _finished(path: Path, record_path: Path) -> ShardRecord | None:
    if not (path.is_file() and record_path.is_file()):
        return None
    record = record_from_json(record_path.read_text())
    return record if record.sha256 == sha256(path) else None


def _build(task: ShardTask, root: Path, work: Path, grid: GridSpec) -> ShardRecord:
    samples: list[Sample] = []
    elements: set[int] = set()
    with atomic_path(root / task.name, scratch=work) as temporary:
        with temporary.open("wb") as stream, open_tar(stream) as tar:
            for ordinal, crystal in enumerate(_crystals(task.rows, work), start=task.first):
                voxels = voxelize(crystal, grid)
                elements.update(crystal.composition)
                key, crc, members = f"{task.split}{ordinal:09d}", 0, {}
                for name, data in encode_sample(crystal, voxels).items():
                    members[name] = (add_member(tar, f"{key}.{name}", data), len(data))
                    crc = zlib.crc32(data, crc)
                samples.append(Sample(key, crystal.id, voxels.species_DHW.shape, crc, members))
        size, digest = temporary.stat().st_size, sha256(temporary)
    return ShardRecord(task.name, task.split, size, digest, tuple(sorted(elements)), tuple(samples))


def _crystals(rows: tuple[Row, ...], work: Path) -> Iterator[Crystal]:
    for row in rows:
        with (work / part_name(row.part)).open("rb") as stream:
            stream.seek(row.offset)
            yield Crystal.from_json(stream.read(row.length))
