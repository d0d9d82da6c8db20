"""The voxelising job in this process, without Ray: the same tasks, one after another."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from dist_train.config import DataConfig, GridSpec
from dist_train.shards.discover import discover
from dist_train.shards.index import Index, config_hash
from dist_train.shards.plan import distinct, plan_shards, split_rows
from dist_train.shards.scan import read_scan, scan_chunk
from dist_train.shards.writer import build_shard


def few_rows(table: Path, rows: int, folder: Path) -> str:
    """The first rows of a table, as a table in a folder; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(table).slice(0, rows), folder / "few.parquet")
    return str(folder / "few.parquet")


def write_shards(data: DataConfig, grid: GridSpec) -> Index:
    """Voxelise `data.inputs` into `data.shards`."""
    work, found = data.shards.parent / "work", discover(data.inputs)
    for part, chunk in enumerate(found.chunks):
        scan_chunk(part, chunk, work, data, grid)
    results = [result for part in range(len(found.chunks)) if (result := read_scan(work, part))]
    rows, rejected = distinct(results)
    splits, _ = split_rows(rows, data)
    records = tuple(build_shard(task, data.shards, work, data, grid) for task in plan_shards(splits, data))
    config = {"data": data.model_dump(mode="json", exclude={"shards"}), "grid": grid.model_dump(mode="json")}
    counts = {"inputs": len(rows) + len(rejected), "accepted": len(rows), "rejected": len(rejected)}
    index = Index(data.shards, config, config_hash(config), "test", counts, records)
    index.write()
    return index
