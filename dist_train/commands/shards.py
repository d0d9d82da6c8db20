"""The verbs that make and check shards."""

from __future__ import annotations

from pathlib import Path

from dist_train.config import RunConfig
from dist_train.errors import DataError
from dist_train.shards.index import Index, verify


def voxelize(config: RunConfig) -> str:
    """Voxelise on Ray; returns a summary."""
    from dist_train.backends.ray_voxelize import voxelize as run

    index = run(config)
    c = index.counts
    splits = {split: sum(len(s.samples) for s in index.shards if s.split == split) for split in config.data.splits}
    size = sum(shard.bytes for shard in index.shards)
    return (
        f"{c['inputs']} inputs = {c['accepted']} accepted + {c['rejected']} rejected "
        f"({c['rejected_parse']} unreadable, {c['rejected_grid']} that the grid can't hold, {c['rejected_plan']} doubled)\n"
        f"{', '.join(f'{split} {n}' for split, n in splits.items())} crystals in {len(index.shards)} shards, "
        f"{size / 2**20:.0f} MiB: {index.root}"
    )


def verify_shards(root: Path) -> str:
    """Check every shard of a folder against its index. Raises DataError naming the damaged ones."""
    index = Index.read(root)
    faults = list(verify(index))
    if faults:
        listed = "\n".join(f"  {name}: {fault}" for name, fault in faults)
        raise DataError(f"{len(faults)} of {len(index.shards)} shards of {root} are damaged:\n{listed}")
    return f"{len(index.shards)} shards, {sum(len(s.samples) for s in index.shards)} samples: all as the index says"
