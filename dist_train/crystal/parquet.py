"""Tables of crystals: Parquet files with a crystal a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.crystal.inputs import Source
from dist_train.crystal.interop import accept, checked_lattice, one_line, right_handed
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.files import atomic_path

PARQUET_COLUMNS = ("id", "a", "b", "c", "alpha", "beta", "gamma", "z", "frac")

BATCH_ROWS = 1024

_LENGTH, _ANGLE = {"unit": "angstrom"}, {"unit": "degree"}
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        *(pa.field(name, pa.float64(), metadata=_LENGTH) for name in PARQUET_COLUMNS[1:4]),
        *(pa.field(name, pa.float64(), metadata=_ANGLE) for name in PARQUET_COLUMNS[4:7]),
        pa.field("z", pa.list_(pa.uint8()), metadata={"unit": "atomic number"}),
        pa.field("frac", pa.list_(pa.float64()), metadata={"unit": "cell edge"}),
    ]
)


def parquet_length(path: Path | Source) -> int:
    """Rows of a table of crystals; DataError where it can't be read or lacks a column."""
    with _open_parquet(path) as table:
        return int(table.metadata.num_rows)


def read_parquet_rows(
    path: Path | Source, start: int, stop: int, max_atoms: int | None = None
) -> Iterator[Crystal | tuple[str, CrystalError]]:
    """The crystals of rows start <= row < stop, in order; for a bad row its id and what is wrong with it.

    Columns: id; a, b, c in angstrom; alpha, beta, gamma in degrees; z, a list of N atomic numbers; frac, a flat list
    of 3 N fractional coordinates. A row of over `max_atoms` atoms is a bad one; None takes any number.
    Raises DataError for a table that can't be read, lacks a column or is shorter.
    """
    length = parquet_length(path)
    if not 0 <= start <= stop <= length:
        raise DataError(f"{path}: rows {start} to {stop} asked for, the table has {length}")
    return (_row_crystal(values, row, max_atoms) for row, values in _rows(path, start, stop))


def _rows(path: Path | Source, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, values by column), of only the row groups needed, in batches: a large group is never held as objects."""
    with _open_parquet(path) as table:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        ends = np.cumsum(sizes).tolist()
        groups = [group for group, end in enumerate(ends) if end > start and end - sizes[group] < stop]
        first = ends[groups[0]] - sizes[groups[0]] if groups else stop
        try:
            for batch in table.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(PARQUET_COLUMNS)):
                skip = max(start - first, 0)
                yield from enumerate(batch.slice(skip, max(stop - first - skip, 0)).to_pylist(), first + skip)
                first += batch.num_rows
                if first >= stop:
                    return
        except pa.ArrowMemoryError:
            raise
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: rows from {first} on can't be read: {one_line(error)}") from error


def read_column(path: Path | Source, name: str, start: int, stop: int) -> list[Any]:
    """The values of another column in the rows start <= row < stop. Raises DataError where it is missing or unreadable."""
    with _open_parquet(path) as table:
        if name not in table.schema_arrow.names:
            raise DataError(f"{path}: no column {name!r}; it has {table.schema_arrow.names}")
        try:
            values: list[Any] = table.read([name])[name].slice(start, stop - start).to_pylist()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: column {name!r} can't be read: {one_line(error)}") from error
        return values


def _open_parquet(path: Path | Source) -> pq.ParquetFile:
    if isinstance(path, Path) and not path.is_file():
        raise DataError(f"{path}: no file")
    try:
        table = pq.ParquetFile(path if isinstance(path, Path) else path.open())
        missing = [name for name in PARQUET_COLUMNS if name not in table.schema_arrow.names]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no readable Parquet table: {one_line(error)}") from error
    if missing:
        table.close()
        raise DataError(f"{path}: columns {missing} are missing, needed are {list(PARQUET_COLUMNS)}")
    return table


def _row_crystal(values: dict[str, Any], row: int, max_atoms: int | None) -> Crystal | tuple[str, CrystalError]:
    id = f"row {row}" if values["id"] is None else str(values["id"])
    try:
        numbers, frac = np.asarray(values["z"]), np.asarray(values["frac"], dtype=np.float64)
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu") or frac.shape != (3 * len(numbers),):
            raise CrystalError(
                f"{id}: z of shape {numbers.shape} and {numbers.dtype}, frac of {frac.shape}; "
                "N whole numbers and 3 N coordinates are needed"
            )
        parameters = np.array([values[name] for name in PARQUET_COLUMNS[1:7]], dtype=np.float64)
        return accept(Crystal(id, checked_lattice(parameters, id), frac, numbers), max_atoms or len(numbers))
    except CrystalError as error:
        return id, error
    except (TypeError, ValueError, OverflowError) as error:
        return id, CrystalError(f"{id}: a value of another type than needed: {one_line(error)}")


def write_parquet(path: Path, crystals: Iterable[Crystal]) -> None:
    """A table of the crystals in their order, atomically, with PARQUET_COLUMNS as `read_parquet_rows` wants them.

    The unit of a column is in its metadata. Cells are stated by lengths and angles: orientation is lost, a left-handed
    cell is inverted with its coordinates, all else is kept to the last bits. Equal crystals give equal bytes.
    Takes crystals that pass `Crystal.checked`.
    """
    waiting = iter(crystals)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as table:
        while batch := list(islice(waiting, BATCH_ROWS)):
            table.write_table(pa.Table.from_pylist([_row_values(crystal) for crystal in batch], _SCHEMA))


def _row_values(crystal: Crystal) -> dict[str, Any]:
    """Values by column of one crystal."""
    crystal = right_handed(crystal)
    cell, z, frac = crystal.lengths_angles.tolist(), crystal.numbers_N.tolist(), crystal.frac_N3.ravel().tolist()
    return dict(zip(PARQUET_COLUMNS, [crystal.id, *cell, z, frac], strict=True))
