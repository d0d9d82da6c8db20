"""A folder of latents: `part-00000.parquet` and so on, a row for each crystal, and `_embed.json`, which says of what.

Each part holds the identity of its job and its own counts in its schema's metadata: what was cut short, or is of another
job, isn't taken for a finished part.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dist_train import __version__
from dist_train.crystal.interop import one_line
from dist_train.errors import DataError, kind_of
from dist_train.files import atomic_path, write_text

ABOUT_NAME, FORMAT_VERSION = "_embed.json", 1
DECIDING = ("bundle_sha256", "input_digest", "decoded", "batch", "rows_per_part", "format_version")
"""What of a job decides the bytes of its parts; workers and the names of model and inputs don't."""
INFO = ("id", "input", "file", "row", "formula", "n_atoms", "digest")
_IDENTITY, _COUNTS = b"dist_train.job", b"dist_train.counts"


@dataclass(frozen=True)
class About:
    """What the rows of a folder are, as `_embed.json` has it.

    model: as it was asked for; resolved: its folder, or the version that its name stood for; bundle_sha256: of its
    SHA256SUMS. latent: numbers in a latent. decoded: each was decoded and compared. batch: crystals that the networks took
    at a time. units: files, archive members and table rows, one row each (a file of several crystals: one for each of them);
    parts: of `rows_per_part` units. columns: types by name. counts: None until the job is done.
    """

    model: str
    resolved: str
    bundle_sha256: str
    latent: int
    decoded: bool
    batch: int
    rows_per_part: int
    inputs: tuple[str, ...]
    input_digest: str
    units: int
    parts: int
    columns: dict[str, str]
    counts: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    code_version: str = __version__

    @property
    def identity(self) -> str:
        """SHA-256 of what decides the bytes."""
        return hashlib.sha256(json.dumps([getattr(self, name) for name in DECIDING]).encode()).hexdigest()


def schema_of(decoded: bool) -> pa.Schema:
    """Columns of a table of latents, with those of the decoded crystals.

    id; input, file, row: as given, in it, and the row of a table or the place in a file of several; formula (reduced) and
    n_atoms of the cell that the grid takes; digest: see `crystal.digest`; latent: posterior mean, all of one
    length (no fixed-size list: pyarrow 25 can't read one back with rows that have none). decoded_*, match, rms,
    valid: the decoded crystal against the true one (see `crystal.metrics.PairMetrics`); confidence: mean share of votes of
    its atoms. error: None, or stage and reason: 'parse' and 'grid' have no latent, 'decode' has one.
    """
    columns = [
        ("id", pa.string()), ("input", pa.string()), ("file", pa.string()), ("row", pa.int64()),
        ("formula", pa.string()), ("n_atoms", pa.int32()), ("digest", pa.uint64()),
        ("latent", pa.list_(pa.float32())),
    ]  # fmt: skip
    checks = [
        ("decoded_formula", pa.string()), ("decoded_n_atoms", pa.int32()), ("match", pa.bool_()), ("rms", pa.float64()),
        ("valid", pa.bool_()), ("confidence", pa.float64()),
    ]  # fmt: skip
    return pa.schema([*columns, *(checks if decoded else []), ("error", pa.string())])


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def write_part(folder: Path, number: int, rows: Sequence[dict[str, Any]], schema: pa.Schema, identity: str) -> None:
    """Write the rows of a part, atomically; equal rows give equal bytes."""
    told = {_IDENTITY: f"{identity} {number}".encode(), _COUNTS: json.dumps(_counts(rows)).encode()}
    with atomic_path(part_path(folder, number)) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata(told)), temporary, compression="zstd")


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Matched, as in `metrics.summarise`: a match that is structurally valid; reasons by their kinds."""
    matched = [row["rms"] for row in rows if row.get("match") and row["valid"]]
    return {
        "rows": len(rows),
        "embedded": sum(row.get("latent") is not None for row in rows),
        "decoded": sum(row.get("decoded_n_atoms") is not None for row in rows),
        "matched": len(matched),
        "valid": sum(bool(row.get("valid")) for row in rows),
        "rms_sum": float(sum(matched)),
        "reasons": dict(Counter(kind_of(row["error"]) for row in rows if row.get("error")).most_common()),
    }


def counts_of(folder: Path, number: int, identity: str) -> dict[str, Any] | None:
    """What a finished part of this job holds; None where it isn't there, whole and of this job."""
    try:
        told = pq.read_schema(part_path(folder, number)).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return json.loads(told[_COUNTS]) if told.get(_IDENTITY) == f"{identity} {number}".encode() else None


def summed(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all parts together."""
    reasons: Counter[str] = Counter()
    for one in counts:
        reasons.update(one["reasons"])
    totals = {name: sum(one[name] for one in counts) for name in counts[0] if name != "reasons"}
    return {**totals, "reasons": dict(reasons.most_common())}


def write_about(folder: Path, about: About) -> None:
    write_text(folder / ABOUT_NAME, json.dumps(asdict(about), indent=1) + "\n")


def read_about(folder: Path) -> About | None:
    """What a folder holds, None where it has no `_embed.json`. Raises DataError for one that can't be understood."""
    try:
        about = json.loads((folder / ABOUT_NAME).read_text())
        return About(**about | {"inputs": tuple(about["inputs"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / ABOUT_NAME} can't be read ({one_line(error)}); make the folder anew") from None


# The nearest rows


@dataclass(frozen=True)
class Neighbour:
    """A row near to a latent: the distance, in the unit asked for, and its columns `INFO`."""

    distance: float
    info: dict[str, Any]


def nearest(folder: Path, about: About, latent_QL: NDArray[np.float32], k: int, unit: float) -> list[list[Neighbour]]:
    """The k rows of a finished folder that are nearest to each latent, the nearest first; of equal ones, the first in order.

    The distance is Euclidean, over `unit`. Parts are read one after another, so that memory doesn't grow with the table.
    Raises DataError where a part is missing or damaged.
    """
    best_QK = np.empty((len(latent_QL), 0))
    where_QK2 = np.empty((len(latent_QL), 0, 2), dtype=np.int64)
    for number, rows, latent_NL in _latents(folder, about):
        # Not by the expansion of the square: it would lose the digits of those that are equal.
        distance_QN = np.stack([np.linalg.norm(latent_NL - latent, axis=1) for latent in latent_QL]) / unit
        places = np.broadcast_to(np.stack([np.full_like(rows, number), rows], axis=1), (len(latent_QL), len(rows), 2))
        best_QK, where_QK2 = np.hstack([best_QK, distance_QN]), np.hstack([where_QK2, places])
        order = np.argsort(best_QK, axis=1, kind="stable")[:, :k]
        best_QK = np.take_along_axis(best_QK, order, 1)
        where_QK2 = np.take_along_axis(where_QK2, order[..., None], 1)
    wanted = {number for number, _ in where_QK2.reshape(-1, 2).tolist()}
    infos = {number: _read(folder, number, INFO) for number in wanted}
    return [
        [Neighbour(float(distance), infos[number].slice(row, 1).to_pylist()[0]) for distance, (number, row) in zip(*both)]
        for both in zip(best_QK, where_QK2.tolist(), strict=True)
    ]


def _latents(folder: Path, about: About) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """(part, its rows that have a latent [N], these [N, latent])."""
    for number in range(about.parts):
        column = _read(folder, number, ("latent",))["latent"].combine_chunks()
        rows = np.flatnonzero(column.is_valid())
        values = column.drop_null().flatten().to_numpy()
        yield number, rows, values.reshape(len(rows), about.latent)


def _read(folder: Path, number: int, columns: Sequence[str]) -> pa.Table:
    path = part_path(folder, number)
    try:
        return pq.read_table(path, columns=list(columns), partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read: {one_line(error)}; run the same dist-train embed again") from None
