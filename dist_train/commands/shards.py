"""The verbs that make and check shards."""

from __future__ import annotations

import difflib
from pathlib import Path

from dist_train.config import DataConfig, GridSpec
from dist_train.errors import ShardError
from dist_train.files import atomic_path
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.shards.verify import QUARANTINE, Fault, quarantine, verify

LISTED_FAULTS = 50


def voxelize(data: DataConfig, grid: GridSpec) -> str:
    """Voxelise on Ray; returns a summary."""
    from dist_train.backends.ray_voxelize import voxelize as run

    index = run(data, grid)
    c = index.counts
    splits: dict[str, int] = {}
    for shard in index.shards:
        splits[shard.split] = splits.get(shard.split, 0) + len(shard.samples)
    size = sum(shard.bytes for shard in index.shards)
    ignored = f"; {c['ignored_files']} files of no known format were passed over" if c["ignored_files"] else ""
    missing = c["listed_ids_not_found"]
    unlisted = f"\nCAUTION: {missing} ids of data.split_ids are not among the accepted crystals" if missing else ""
    doubled = f"{c['rejected_plan']} doubled" if not c["duplicates"] else f"{c['rejected_plan']} doubled ids or duplicates"
    return (
        f"{c['inputs']} inputs = {c['accepted']} accepted + {c['rejected']} rejected "
        f"({c['rejected_parse']} unreadable, {c['rejected_grid']} that the grid can't hold, {doubled}){ignored}\n"
        f"{', '.join(f'{split} {n}' for split, n in splits.items())} samples in {len(index.shards)} shards, "
        f"{size / 2**20:.0f} MiB: {data.shards}{unlisted}"
    )


def verify_shards(root: Path, workers: int, quick: bool, move: bool, mend: bool) -> str:
    """Check every shard of a folder against its index; `move` damaged ones aside, `mend` them from the inputs.

    Raises ShardError naming damaged shards and samples, unless they were mended.
    """
    index = Index.read(root)
    faults = verify(index, workers, quick, progress=True)
    whole = f"{len(index.shards)} shards, {sum(len(s.samples) for s in index.shards)} samples: all as the index says"
    if not faults:
        return whole
    damaged = sorted({fault.shard for fault in faults})
    told = f"{len(damaged)} of {len(index.shards)} shards of {root} are damaged:\n{_listed(faults)}"
    if not (move or mend):
        raise ShardError(f"{told}\nmend them with dist-train verify {root} --repair")
    moved = quarantine(index, faults)
    told += f"\n{len(moved)} moved to {root / QUARANTINE}"
    if not mend:
        raise ShardError(f"{told}; dist-train verify {root} --repair builds them again")
    from dist_train.backends.ray_voxelize import repair

    repair(index, workers)
    if left := verify(index, workers, quick, progress=True):
        raise ShardError(f"{told}\nbuilt again, but not as before:\n{_listed(left)}")
    return f"{told}\n{len(damaged)} built again from the inputs; {whole}"


def _listed(faults: list[Fault]) -> str:
    lines = [f"  {f.shard}{f' {f.sample}' if f.sample else ''}: {f.what}" for f in faults[:LISTED_FAULTS]]
    more = len(faults) - len(lines)
    return "\n".join([*lines, *([f"  and {more} more"] if more else [])])


def inspect_shards(root: str, cache_dir: Path | None, name: str | None, out: Path) -> str:
    """Describe the sample of a key or crystal id (the first one where none is named), and draw it to `out`.

    root: a folder, or a URL whose shards are kept below `cache_dir`.
    """
    from dist_train.inspect_sample import inspect_sample, sample_figure

    index = Index.read(root, cache_dir)
    entries = [(shard, sample) for shard in index.shards for sample in shard.samples]
    found = next((found for found in entries if name in (None, found[1].key, found[1].id)), None)
    if found is None:
        ids = [sample.id for _, sample in entries]
        close = [id for id in ids if str(name) in id][:3] or difflib.get_close_matches(str(name), ids, 3)
        told = f"; close to it: {', '.join(close)}" if close else ""
        raise ShardError(f"no sample of {root} has the key or id {name!r}{told}; all are in its index.json")
    shard, entry = found
    reader = ShardReader(index, shard.split)
    place = reader.entries.index(found)
    density, species, crystal = (None, None, reader.crystal(place)) if index.store == "structures" else reader[place]
    with atomic_path(out) as temporary:
        temporary.write_bytes(sample_figure(density, species, crystal, index.grid))
    text = inspect_sample(density, species, crystal, index.grid)
    where = f"{entry.key}, copy {entry.copy} of {entry.id}, in {index.where(shard)} ({shard.split})"
    return f"{where}\n{text}\npicture: {out}"
