"""Crystals from and to other programs: pymatgen structures and Parquet tables.

The only file that imports pymatgen, inside functions, since the import takes seconds and most reading doesn't need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial import cKDTree

from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.lattice import FloatArray, compact_lattice, from_lengths_angles, image_offsets, too_thin
from dist_train.crystal.structure import MAX_EDGE_A, Crystal, wrap
from dist_train.errors import CrystalError, DataError

if TYPE_CHECKING:
    from pymatgen.core.structure import Structure

MIN_DISTANCE_A = 0.5
"""Atoms closer than this are overlapping, the limit of structural validity in the field (H2 has 0.74 A)."""

PARQUET_COLUMNS = ("id", "a", "b", "c", "alpha", "beta", "gamma", "z", "frac")

BATCH_ROWS = 1024


def checked_lattice(parameters: FloatArray, id: str) -> FloatArray:
    """[3, 3] lattice of lengths in angstrom and angles in degrees, or CrystalError where they span no cell."""
    lengths, angles = parameters[:3], parameters[3:]
    if not (np.isfinite(parameters).all() and (lengths > 0).all() and (angles > 0).all() and (angles < 180).all()):
        raise CrystalError(f"{id}: no cell has the lengths {lengths.tolist()} A and angles {angles.tolist()} degrees")
    if lengths.max() > MAX_EDGE_A:
        raise CrystalError(f"{id}: cell edge of {lengths.max():.4g} A, at most {MAX_EDGE_A:.0f} A are taken")
    try:
        return from_lengths_angles(parameters)
    except ValueError as error:
        raise CrystalError(f"{id}: {error}") from error


def accept(crystal: Crystal, max_atoms: int) -> Crystal:
    """The crystal as it is, or CrystalError; overlap is looked for in the reduced cell, where few images are near."""
    lattice = compact_lattice(crystal.checked(max_atoms).lattice_A)
    if too_thin(lattice):
        raise CrystalError(f"{crystal.id}: reduced cell of edges {np.linalg.norm(lattice, axis=1).round(3)} A is too thin")
    cart_N3 = wrap(crystal.cart_N3 @ np.linalg.inv(lattice)) @ lattice
    shifts = image_offsets(lattice, MIN_DISTANCE_A) @ lattice
    images = cKDTree((cart_N3 + shifts[:, None]).reshape(-1, 3))
    nearest, _ = images.query(cart_N3, k=2, distance_upper_bound=MIN_DISTANCE_A)  # the first of the two is the atom
    shortest = nearest[:, 1].min()
    if np.isfinite(shortest):
        raise CrystalError(f"{crystal.id}: overlapping atoms, {shortest:.3f} A apart; {MIN_DISTANCE_A} A are needed")
    return crystal


def symmetry_operations(given: dict[str, Any], id: str) -> tuple[FloatArray, FloatArray]:
    """[O, 3, 3] rotations and [O, 3] translations of fractional coordinates, as pymatgen reads these CIF items.

    given: listed operations, or the names and number of a space group, under the spelling that pymatgen looks for.
    """
    with _pymatgen(id):
        from pymatgen.io.cif import CifBlock, CifParser

        parser: Any = CifParser.from_str("data_x\n_x 1")
        operations = parser.get_symops(CifBlock(given, [], "x"))
    rotations = np.array([operation.rotation_matrix for operation in operations])
    # pymatgen falls back to P1 with a warning: a wrong crystal for a file that does state its symmetry.
    fell_back = any("Defaulting to P1" in warning for warning in parser.warnings)
    singular = not np.allclose(np.abs(np.linalg.det(rotations)), 1.0)
    without_identity = not (rotations == np.eye(3)).all((1, 2)).any()
    if fell_back or singular or without_identity:
        raise CrystalError(f"{id}: symmetry not understood: {str(next(iter(given.values())))[:60]!r}")
    return rotations, np.array([operation.translation_vector for operation in operations])


@contextmanager
def _pymatgen(id: str) -> Iterator[None]:
    """Silence for pymatgen's warnings, and CrystalError for its errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (CrystalError, ImportError):
            raise
        # pymatgen raises whatever went wrong first inside: KeyError, ZeroDivisionError, LinAlgError, AssertionError...
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CrystalError(f"{id}: pymatgen can't take it: {type(error).__name__}: {reason}") from error


def to_pymatgen(crystal: Crystal) -> Structure:
    """A pymatgen Structure of the same cell and atoms, in the same order."""
    with _pymatgen(crystal.id):
        from pymatgen.core.lattice import Lattice
        from pymatgen.core.structure import Structure

        return Structure(Lattice(crystal.lattice_A), crystal.numbers_N.tolist(), crystal.frac_N3)


def from_pymatgen(structure: Structure, id: str) -> Crystal:
    """A Crystal of the same cell and atoms, in the same order; oxidation states are dropped.

    Raises CrystalError for disorder, dummy species and isotopes.
    """
    numbers = []
    for site in structure:
        if not site.is_ordered:
            raise CrystalError(f"{id}: disordered, a site holds {site.species_string}")
        element = getattr(site.specie, "element", site.specie)  # of an ion, or the species itself
        symbol = str(getattr(element, "name", element))  # `symbol` says H for deuterium
        if symbol not in NUMBERS:
            raise CrystalError(f"{id}: unknown element or isotope {symbol!r}")
        numbers.append(NUMBERS[symbol])
    return Crystal(id, structure.lattice.matrix, structure.frac_coords, np.array(numbers, dtype=np.int64))


def match_rms(predicted: Crystal, true: Crystal) -> float | None:
    """RMS displacement of matched atoms over (volume per atom)^(1/3), or None where the crystals don't match.

    pymatgen's StructureMatcher with the tolerances of the field (CDVAE, Xie et al. 2022): stol 0.5, angle_tol 10,
    ltol 0.3; free of origin, orientation, choice of cell and volume.
    """
    if predicted.formula != true.formula:
        return None  # a match is one to one between like atoms; saves the reduction of the cells
    pair = to_pymatgen(predicted), to_pymatgen(true)
    with _pymatgen(predicted.id):
        from pymatgen.analysis.structure_matcher import StructureMatcher

        matcher: Any = StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3)
        result = matcher.get_rms_dist(*pair)
    return None if result is None else float(result[0])


def parquet_length(path: Path) -> int:
    """Rows of a table of crystals; DataError where it can't be read or lacks a column."""
    with _open_parquet(path) as table:
        return int(table.metadata.num_rows)


def read_parquet_rows(
    path: Path, start: int, stop: int, max_atoms: int | None = None
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


def _rows(path: Path, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
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
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: rows from {first} on can't be read: {error}") from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: no readable Parquet table: {error}") from error
    missing = [name for name in PARQUET_COLUMNS if name not in table.schema_arrow.names]
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
        return id, CrystalError(f"{id}: a value of another type than needed: {error}")
