"""A training run small enough for tests: a few dozen real perovskites in real shards, and tiny networks."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from dist_train.config import RunConfig, load_config
from dist_train.shards.index import Index
from dist_train.shards.plan import discover, plan_shards, scan_chunk
from dist_train.shards.writer import build_shard

ROOT = Path(__file__).parents[1]

SETTINGS = (
    "grid.shape=12",
    "grid.max_spacing_A=0.5",
    "grid.channels=[occupancy, period]",
    "data.samples_per_shard=24",
    "data.splits={train: 0.7, val: 0.15, test: 0.15}",
    "model.latent=8",
    "model.vae_widths=[4, 8]",
    "model.unet_width=4",
    "model.unet_levels=2",
    "train.epochs=3",
    "train.global_batch_size=12",
    "train.unet_share=0.5",
    "train.warmup_steps=2",
    "train.log_every=1",
    "train.validate_every=4",
    "train.checkpoint_every=4",
    "train.precision=fp32",
    "engine.name=torch",
)


def small_config(folder: Path, *overrides: str) -> RunConfig:
    """The config of a run below `folder`; its shards are those of `write_small_shards`."""
    paths = (f"data.shards={folder}/shards", f"run_dir={folder}/run")
    return load_config(None, (*SETTINGS, *paths, *overrides))


def write_small_shards(folder: Path, crystals: int = 72) -> Index:
    """Voxelise the first perovskites of the sample data in this process, as the Ray tasks do."""
    table = folder / "few.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(ROOT / "data" / "sample" / "perov_5.parquet").slice(0, crystals), table)
    config = small_config(folder)
    work, root = folder / "work", config.data.shards
    chunks = discover([str(table)])
    results = [scan_chunk(i, chunk, work, config.grid, config.data.splits) for i, chunk in enumerate(chunks)]
    tasks, rejected = plan_shards(results, config.data)
    records = tuple(build_shard(task, root, work, config.grid) for task in tasks)
    counts = {"inputs": crystals, "accepted": crystals - len(rejected), "rejected": len(rejected)}
    index = Index(root, {"grid": config.grid.model_dump(mode="json")}, "test", "test", counts, records)
    index.write()
    return index
