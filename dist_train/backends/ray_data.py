"""Shards as a Ray dataset, read by their index: safe decoding, every sample checked, one block a shard."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.errors import ShardError
from dist_train.shards.index import Index, record_from_json
from dist_train.shards.random_access import read_sample

if TYPE_CHECKING:
    from ray.data import Dataset


def read_shards(root: Path | str, split: str, skip_damaged: bool = False) -> Dataset:
    """The samples of a split as rows of a Ray dataset.

    Columns: key, id, copy; density float16 [C, D, H, W] and species uint8 [D, H, W] where the shards hold grids;
    lattice_A [3, 3] in angstrom, frac [N, 3], numbers [N]. The folder must be seen by every node.
    Raises ShardError for a folder without an index or split; while it is read, for a damaged sample (and Ray ends the
    job), unless `skip_damaged` leaves these out.
    """
    import ray.data

    root = Path(root).absolute()
    shards = Index.read(root).split(split)
    rows = [{"record": shard.to_json()} for shard in shards]
    blocks = ray.data.from_items(rows, override_num_blocks=len(rows))
    return blocks.flat_map(partial(_samples, root=root, skip_damaged=skip_damaged))


def _samples(row: dict[str, Any], root: Path, skip_damaged: bool) -> Iterator[dict[str, Any]]:
    shard = record_from_json(row["record"])
    for sample in shard.samples:
        try:
            density, species, crystal = read_sample(root, shard, sample)
        except ShardError:
            if skip_damaged:
                continue
            raise
        grids = {} if density is None else {"density": density, "species": species}
        structure = {"lattice_A": crystal.lattice_A, "frac": crystal.frac_N3, "numbers": crystal.numbers_N}
        yield {"key": sample.key, "id": sample.id, "copy": sample.copy, **grids, **structure}
