"""A training run small enough for tests: a few dozen real perovskites in real shards, and tiny networks."""

from __future__ import annotations

from pathlib import Path

from sharding import few_rows, write_shards

from dist_train.config import RunConfig, load_config
from dist_train.shards.index import Index

ROOT = Path(__file__).parents[1]

SETTINGS = (
    "grid.shape=12",
    "grid.max_spacing_A=0.5",
    "grid.channels=[occupancy, period]",
    "data.samples_per_shard=24",
    "data.splits={train: 0.7, val: 0.15, test: 0.15}",
    "model.latent=10",
    "prior.steps=20",
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
    config = small_config(folder)
    table = few_rows(ROOT / "data" / "sample" / "perov_5.parquet", crystals, folder)
    return write_shards(config.data.model_copy(update={"inputs": (table,)}), config.grid)


def write_mixed_shards(folder: Path) -> Path:
    """Crystals of several grid shapes below `folder`; the folder of their shards."""
    config = small_config(folder / "mixed", "grid.shape=adaptive")
    table = few_rows(ROOT / "data" / "sample" / "materials_project.parquet", 60, folder / "mixed")
    write_shards(config.data.model_copy(update={"inputs": (table,)}), config.grid)
    return config.data.shards
