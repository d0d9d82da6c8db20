"""What a voxelising job will read and write, decided before it starts: pure functions of the config and the inputs.

1. `discover` lists the inputs as `Chunk`s of CIF files or table rows.
2. `scan_chunk` parses a chunk, checks that the grid can hold each crystal and leaves the accepted ones, as the grid will
   hold them, in a JSON-lines part file; it returns a `Row` for each and a `Rejected` for the others.
3. `plan_shards` gives every row its split (by formula) and place (by the hash of its id): the `ShardTask`s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import DataConfig, GridSpec
from dist_train.crystal import cif, parquet
from dist_train.crystal.frames import placed, representable
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.files import atomic_path

CIF_SUFFIXES = (".cif", ".cif.gz")
CIFS_PER_CHUNK, ROWS_PER_CHUNK = 64, 1024


@dataclass(frozen=True)
class Chunk:
    """Inputs of one scan task: CIF files of one root, or the rows [start, stop) of one Parquet table."""

    root: Path
    files: tuple[str, ...]
    start: int = 0
    stop: int = 0

    def __len__(self) -> int:
        return self.stop - self.start or len(self.files)


@dataclass(frozen=True)
class Row:
    """An accepted crystal: its input file, its split, and where it lies in a part file (bytes)."""

    id: str
    file: str
    split: str
    part: int
    offset: int
    length: int


@dataclass(frozen=True)
class Rejected:
    """An input that was not taken, and why; stage is 'parse', 'grid' or 'plan'."""

    id: str
    file: str
    stage: str
    reason: str


@dataclass(frozen=True)
class ScanResult:
    """What a scan task found; the crystals themselves are in the part file."""

    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True)
class ShardTask:
    """A planned shard: its name, its split and its crystals in order; `first` is the ordinal of the first of them."""

    name: str
    split: str
    first: int
    rows: tuple[Row, ...]


def discover(inputs: Iterable[str]) -> list[Chunk]:
    """The inputs in a fixed order, cut into chunks.

    Raises DataError for a path that is missing or unreadable, of an unknown kind, or without any crystal.
    """
    chunks: list[Chunk] = []
    for given in inputs:
        try:
            found = list(_chunks_of(Path(given)))
        except PermissionError as error:
            raise DataError(f"input {error.filename} can't be read: {error.strerror}; check its permissions") from None
        if not found:
            raise DataError(f"no crystals found in {given}: expected *.cif or *.cif.gz files in it, or a *.parquet table")
        chunks += found
    if not chunks:
        raise DataError("data.inputs is empty: name at least one folder of CIF files or Parquet table")
    return chunks


def _chunks_of(path: Path) -> Iterator[Chunk]:
    if path.suffix == ".parquet":
        for start in range(0, length := parquet.parquet_length(path), ROWS_PER_CHUNK):
            yield Chunk(path.parent, (path.name,), start, min(start + ROWS_PER_CHUNK, length))
        return
    if path.is_file() and path.name.endswith(CIF_SUFFIXES):
        yield Chunk(path.parent, (path.name,))
        return
    if not path.is_dir():
        raise DataError(f"input {path} is neither a folder, a CIF file nor a Parquet table; check data.inputs")
    files = sorted(str(p.relative_to(path)) for p in _walk(path) if p.name.endswith(CIF_SUFFIXES))
    for start in range(0, len(files), CIFS_PER_CHUNK):
        yield Chunk(path, tuple(files[start : start + CIFS_PER_CHUNK]))


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder; unlike rglob it raises PermissionError for a folder that can't be listed."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def scan_chunk(part: int, chunk: Chunk, parts: Path, grid: GridSpec, splits: dict[str, float]) -> ScanResult:
    """Parse and check a chunk; accepted crystals go to `parts/part-NNNNNN.jsonl`, written atomically."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    with atomic_path(parts / part_name(part)) as temporary, temporary.open("wb") as stream:
        for id, file, crystal in read_chunk(chunk, grid.max_atoms):
            if isinstance(crystal, CrystalError):
                rejected.append(Rejected(id, file, "parse", str(crystal)))
                continue
            try:
                crystal = placed(representable(crystal, grid), grid)
            except CrystalError as error:
                rejected.append(Rejected(id, file, "grid", str(error)))
                continue
            line = crystal.to_json().encode() + b"\n"
            rows.append(Row(id, file, split_of(crystal.formula, splits), part, stream.tell(), len(line)))
            stream.write(line)
    return ScanResult(tuple(rows), tuple(rejected))


def part_name(part: int) -> str:
    return f"part-{part:06d}.jsonl"


def read_chunk(chunk: Chunk, max_atoms: int) -> Iterator[tuple[str, str, Crystal | CrystalError]]:
    """(id, file, crystal or the reason it can't be read) of every input of a chunk."""
    if chunk.stop:
        table = chunk.files[0]
        for item in parquet.read_parquet_rows(chunk.root / table, chunk.start, chunk.stop, max_atoms):
            id, crystal = (item.id, item) if isinstance(item, Crystal) else item
            yield id, table, crystal
        return
    for file in chunk.files:
        id = file.removesuffix(".gz").removesuffix(".cif")
        try:
            # The id keeps the folders below the input, so that equal names in two of them stay apart.
            yield id, file, cif.read_cif(chunk.root / file, max_atoms, id)
        except CrystalError as error:
            yield id, file, error


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(formula: str, splits: dict[str, float]) -> str:
    """The split of a reduced formula; all crystals of a formula share it."""
    place, total = unit_hash("split", formula), 0.0
    for name, share in splits.items():
        total += share
        if place < total:
            return name
    return name


def plan_shards(results: Iterable[ScanResult], config: DataConfig) -> tuple[list[ShardTask], list[Rejected]]:
    """The shards of all scanned rows, and every rejected input (ids that occur twice included).

    Within a split the order is that of the hash of the id, so that families and sources mix.
    """
    rejected: list[Rejected] = []
    rows: dict[str, Row] = {}
    for result in results:
        rejected += result.rejected
        for row in result.rows:
            if row.id in rows:
                reason = f"{row.id}: this id is already taken by {rows[row.id].file} of another input"
                rejected.append(Rejected(row.id, row.file, "plan", reason))
            else:
                rows[row.id] = row
    ordered = sorted(rows.values(), key=lambda row: (unit_hash("order", row.id), row.id))
    tasks: list[ShardTask] = []
    for split in config.splits:
        members = [row for row in ordered if row.split == split]
        for shard, start in enumerate(range(0, len(members), config.samples_per_shard)):
            chosen = tuple(members[start : start + config.samples_per_shard])
            tasks.append(ShardTask(f"{split}-{shard:06d}.tar", split, start, chosen))
    return tasks, rejected
