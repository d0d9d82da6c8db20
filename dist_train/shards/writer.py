"""Builds one planned shard: read the crystals, voxelise, write a temporary tar, rename. Idempotent and byte-reproducible."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, cast

from dist_train.config import DataConfig, GridSpec
from dist_train.crystal.frames import placed
from dist_train.crystal.voxelize import voxelize
from dist_train.files import atomic_path, sha256, write_text
from dist_train.shards.codec import add_member, crc_of, encode_sample, open_tar
from dist_train.shards.index import Sample, ShardRecord, record_from_json
from dist_train.shards.plan import ShardTask
from dist_train.shards.scan import read_part


def build_shard(task: ShardTask, root: Path, work: Path, data: DataConfig, grid: GridSpec) -> ShardRecord:
    """Write `root/task.name` and its record in `work`; a shard that is there already, whole, is not built again."""
    record_path = work / f"{task.name}.json"
    record = _finished(task, root / task.name, record_path)
    if record is None:
        record = _build(task, root, work, data, grid)
        write_text(record_path, record.to_json())
    return record


def _finished(task: ShardTask, path: Path, record_path: Path) -> ShardRecord | None:
    """The record of a shard that holds what is planned, byte for byte as it was written."""
    if not (path.is_file() and record_path.is_file()):
        return None
    record = record_from_json(record_path.read_text())
    planned = [(row.id, copy) for row, copy in task.entries] == [(sample.id, sample.copy) for sample in record.samples]
    whole = planned and record.bytes == path.stat().st_size and record.sha256 == sha256(path)
    return record if whole else None


def _build(task: ShardTask, root: Path, work: Path, data: DataConfig, grid: GridSpec) -> ShardRecord:
    samples: list[Sample] = []
    elements: set[int] = set()
    with atomic_path(root / task.name, scratch=work) as temporary:
        with temporary.open("wb") as file, open_tar(cast(BinaryIO, stream := _Hashed(file))) as tar:
            for ordinal, (row, copy) in enumerate(task.entries, start=task.first):
                crystal = placed(read_part(work, row), grid, copy)
                voxels = voxelize(crystal, grid) if data.store == "grids" else None
                elements.update(crystal.composition)
                key, encoded = f"{task.split}{ordinal:09d}", encode_sample(crystal, voxels, data.encoding, copy)
                members = {name: (add_member(tar, f"{key}.{name}", item), len(item)) for name, item in encoded.items()}
                samples.append(Sample(key, crystal.id, copy, row.shape, crc_of(encoded.values()), members))
        size, digest = temporary.stat().st_size, stream.digest.hexdigest()
    return ShardRecord(task.name, task.split, size, digest, tuple(sorted(elements)), tuple(samples))


class _Hashed:
    """A file that is hashed as it is written, once through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.tell = file.tell

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)
