"""What a voxelising job will write, decided before it starts: pure functions of the settings and of what was scanned."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train.config import DataConfig, SplitName, is_split_name
from dist_train.crystal.interop import same_crystal
from dist_train.crystal.lattice import compact_lattice
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError
from dist_train.shards.scan import Rejected, Row, ScanResult, read_part


@dataclass(frozen=True)
class ShardTask:
    """A planned shard: its name, its split and its samples in order; `first` is the ordinal of the first of them.

    entries: a row and the index of its copy for each sample.
    """

    name: str
    split: str
    first: int
    entries: tuple[tuple[Row, int], ...]


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(formula: str, splits: dict[SplitName, float]) -> str:
    """The split of a reduced formula; all crystals of a formula share it."""
    place, total = unit_hash("split", formula), 0.0
    for name, share in splits.items():
        total += share
        if place < total:
            return name
    return name


def read_split_ids(files: dict[SplitName, Path]) -> dict[str, str]:
    """Split by id, of the files of `data.split_ids`. Raises DataError for one that can't be read, or an id in two."""
    found: dict[str, str] = {}
    for split, path in files.items():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.split_ids.{split}: {path} can't be read: {error}") from None
        for id in filter(None, map(str.strip, lines)):
            if found.setdefault(id, split) != split:
                raise DataError(f"data.split_ids: {id} is in the files of both {found[id]} and {split}")
    return found


def distinct(results: Iterable[ScanResult]) -> tuple[list[Row], list[Rejected]]:
    """Rows in their order, ids that occur twice taken out; and every rejected input, these included."""
    rejected: list[Rejected] = []
    rows: dict[str, Row] = {}
    for result in results:
        rejected += result.rejected
        for row in result.rows:
            if row.id in rows:
                other = rows[row.id]
                reason = f"{row.id}: this id is already taken by {other.file} of {other.input}"
                rejected.append(Rejected(row.id, row.input, row.file, "plan", reason))
            else:
                rows[row.id] = row
    return list(rows.values()), rejected


def alike(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    """Groups of rows among which duplicates may be: of one composition, with volumes that differ by under 1 %."""
    by_composition: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        by_composition[row.formula, row.atoms].append(row)
    groups: list[tuple[Row, ...]] = []
    for members in by_composition.values():
        volumes = np.array([row.volume_A3 for row in members])
        order = np.argsort(volumes, kind="stable")
        gaps = np.flatnonzero(np.diff(volumes[order]) > 0.01 * volumes[order][:-1]) + 1
        # The order of the inputs decides which of two is kept.
        groups += [tuple(members[i] for i in sorted(group)) for group in np.split(order, gaps) if len(group) > 1]
    return groups


def find_duplicates(groups: Sequence[Sequence[Row]], work: Path, tolerance_A: float) -> list[tuple[str, str]]:
    """(id, id of the crystal before it in its group that it equals) of every duplicate."""
    found: list[tuple[str, str]] = []
    for group in groups:
        kept: list[Crystal] = []
        edges = np.empty((len(group), 3))
        for row in group:
            crystal = read_part(work, row)
            # A comparison takes milliseconds and polymorphs come by the thousand: first those whose cells may be the same.
            mine = np.sort(np.linalg.norm(compact_lattice(crystal.lattice_A), axis=1))
            reach = 2 * tolerance_A * mine / np.cbrt(crystal.volume_A3)
            near = np.flatnonzero((np.abs(edges[: len(kept)] - mine) < reach).all(1))
            same = next((kept[i] for i in near if same_crystal(crystal, kept[i], tolerance_A)), None)
            if same:
                found.append((crystal.id, same.id))
            else:
                edges[len(kept)] = mine
                kept.append(crystal)
    return found


def without(rows: Iterable[Row], duplicates: dict[str, str]) -> tuple[list[Row], list[Rejected]]:
    """The other rows, and the duplicates as rejected ones."""
    kept: list[Row] = []
    rejected: list[Rejected] = []
    for row in rows:
        if row.id in duplicates:
            reason = f"{row.id}: duplicate of {duplicates[row.id]}, the same reduced cell and atoms"
            rejected.append(Rejected(row.id, row.input, row.file, "plan", reason))
        else:
            kept.append(row)
    return kept, rejected


def split_rows(rows: Iterable[Row], data: DataConfig) -> tuple[dict[str, list[Row]], list[Rejected]]:
    """The rows of each split, by listed ids, then by column, then by the hash of the formula."""
    by_id = read_split_ids(data.split_ids)
    splits: dict[str, list[Row]] = defaultdict(list)
    rejected: list[Rejected] = []
    for row in rows:
        split = by_id.get(row.id) or (row.split if data.split_column else split_of(row.formula, data.splits))
        if split is None or not is_split_name(split):
            reason = f"{row.id}: {split!r} in the column {data.split_column!r} names no split"
            rejected.append(Rejected(row.id, row.input, row.file, "plan", reason))
        else:
            splits[split].append(row)
    known = [*({} if data.split_column else data.splits), *data.split_ids]
    order = dict.fromkeys([*known, *sorted(splits)])
    return {split: splits[split] for split in order if split in splits}, rejected


def plan_shards(splits: dict[str, list[Row]], data: DataConfig) -> list[ShardTask]:
    """The shards of the rows of each split.

    Within a split the order is that of the hash of the id, so that families, sources and copies mix.
    """
    return [task for split, rows in splits.items() for task in _shards_of(split, rows, data)]


def _shards_of(split: str, rows: list[Row], data: DataConfig) -> Iterator[ShardTask]:
    entries = [(row, copy) for row in rows for copy in range(data.copies)]
    entries.sort(key=lambda entry: (unit_hash("order", entry[0].id, *([entry[1]] if entry[1] else [])), entry[0].id))
    for shard, start in enumerate(range(0, len(entries), data.samples_per_shard)):
        chosen = tuple(entries[start : start + data.samples_per_shard])
        yield ShardTask(f"{split}-{shard:06d}.tar", split, start, chosen)
