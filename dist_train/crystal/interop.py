"""Crystals from and to other programs, pymatgen and ASE, and what every crystal read from anywhere must fulfil.

The only file that imports the two, inside functions, since that takes a second and most reading doesn't need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.lattice import FloatArray, compact_lattice, from_lengths_angles, shortest_distances, too_thin
from dist_train.crystal.structure import MAX_EDGE_A, Crystal
from dist_train.errors import CrystalError

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core.structure import Structure

MIN_DISTANCE_A = 0.5
"""Atoms closer than this are overlapping, the limit of structural validity in the field (H2 has 0.74 A)."""

MAX_FRACTION = 1000.0  # a larger fractional coordinate is no periodic image that anyone wrote on purpose


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


def checked_fractions(frac_N3: FloatArray, id: str) -> FloatArray:
    """The coordinates as they are, or CrystalError where one lies absurdly far off."""
    if (farthest := np.abs(frac_N3).max()) > MAX_FRACTION:
        raise CrystalError(f"{id}: fractional coordinate {farthest:.4g}, at most {MAX_FRACTION:.0f} is taken")
    return frac_N3


def accept(crystal: Crystal, max_atoms: int) -> Crystal:
    """The crystal as it is, or CrystalError; overlap is looked for in the reduced cell, where few images are near."""
    checked_fractions(crystal.checked(max_atoms).frac_N3, crystal.id)
    lattice = compact_lattice(crystal.lattice_A)
    if too_thin(lattice):
        raise CrystalError(f"{crystal.id}: reduced cell of edges {np.linalg.norm(lattice, axis=1).round(3)} A is too thin")
    shortest = min(shortest_distances(lattice, crystal.cart_N3, crystal.numbers_N, MIN_DISTANCE_A))
    if np.isfinite(shortest):
        raise CrystalError(f"{crystal.id}: overlapping atoms, {shortest:.3f} A apart; {MIN_DISTANCE_A} A are needed")
    return crystal


def right_handed(crystal: Crystal) -> Crystal:
    """The same Cartesian atoms in a right-handed cell: a left-handed one is inverted, lattice and coordinates together.

    For formats that state no orientation of the cell, or whose programs refuse or invert a left-handed one. No zero is
    negative, so that equal crystals are written alike.
    """
    hand = 1.0 if np.linalg.det(crystal.lattice_A) > 0 else -1.0
    return replace(crystal, lattice_A=hand * crystal.lattice_A + 0.0, frac_N3=hand * crystal.frac_N3 + 0.0)


@contextmanager
def _library(name: str, id: str) -> Iterator[None]:
    """Silence for a library's warnings, and CrystalError for its errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (CrystalError, ImportError, MemoryError):
            raise
        # Both raise whatever went wrong first inside: KeyError, ZeroDivisionError, LinAlgError, AssertionError...
        except Exception as error:
            raise CrystalError(f"{id}: {name} can't take it: {type(error).__name__}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An error's message in one line of limited length."""
    return " ".join(str(error).split())[:200]


def to_pymatgen(crystal: Crystal) -> Structure:
    """A pymatgen Structure of the same cell and atoms, in the same order."""
    with _library("pymatgen", crystal.id):
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


def structure_from_cif(text: str, id: str) -> Structure:
    """The one crystal of a CIF text as pymatgen alone reads it, full cell: what `cif.parse_cif` is compared with."""
    with _library("pymatgen", id):
        from pymatgen.io.cif import CifParser

        parser: Any = CifParser.from_str(text)
        (structure,) = parser.parse_structures(primitive=False, on_error="ignore")
    return structure


def from_poscar(text: str, id: str) -> tuple[Crystal, bool]:
    """The crystal of a POSCAR text as pymatgen reads it, and whether its elements are the text's and not made up."""
    with _library("pymatgen", id):
        from pymatgen.io.vasp.inputs import Poscar

        poscar: Any = Poscar.from_str(text, read_velocities=False)
    return from_pymatgen(poscar.structure, id), bool(poscar.true_names)


def to_poscar(crystal: Crystal, comment: str) -> str:
    """POSCAR text of a right-handed crystal as pymatgen writes it; of a left-handed one it would be the mirror image."""
    structure = to_pymatgen(crystal)
    with _library("pymatgen", crystal.id):
        from pymatgen.io.vasp.inputs import Poscar

        return str(Poscar(structure, comment).get_str(significant_figures=16))


def to_ase(crystal: Crystal) -> Atoms:
    """ASE Atoms of the same cell and atoms, in the same order, periodic in all directions."""
    with _library("ASE", crystal.id):
        from ase import Atoms

        return Atoms(crystal.numbers_N, scaled_positions=crystal.frac_N3, cell=crystal.lattice_A, pbc=True)


def covalent_radii_A(numbers_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N] radii in angstrom of atoms in covalent bonds (Cordero et al., Dalton Trans. 2832, 2008)."""
    from ase.data import covalent_radii

    return np.asarray(covalent_radii[numbers_N])


def from_ase(atoms: Atoms, id: str) -> Crystal:
    """A Crystal of the same cell and atoms, in the same order; masses, charges and results are dropped.

    Raises CrystalError without a cell, for atoms that aren't periodic in all directions, and where ASE's CIF reader
    noted a site of several elements or of partial occupancy, of which the atoms hold the largest part only.
    """
    if not atoms.pbc.all():
        raise CrystalError(f"{id}: periodic in {int(atoms.pbc.sum())} of 3 directions, all three are needed")
    shared = atoms.info.get("occupancy")
    for site in shared.values() if isinstance(shared, dict) else ():
        if len(site) != 1 or min(site.values()) < 0.999:
            raise CrystalError(f"{id}: disordered, a site holds {site}")
    with _library("ASE", id):
        if not atoms.cell.volume > 0:
            raise CrystalError(f"{id}: no cell, its vectors {atoms.cell.tolist()} A span no volume")
        return Crystal(id, atoms.cell.array, atoms.get_scaled_positions(wrap=False), atoms.numbers)


def from_extxyz(frame: str, id: str) -> Crystal:
    """The crystal of one extxyz frame as ASE reads it."""
    with _library("ASE", id):
        from ase.io.extxyz import read_xyz

        try:
            atoms = next(read_xyz(StringIO(frame), index=0))
        except KeyError as error:  # of ASE's table of elements
            raise CrystalError(f"{id}: unknown element or isotope {error}") from error
    return from_ase(atoms, id)


def to_extxyz(crystal: Crystal, info: dict[str, str]) -> str:
    """One extxyz frame as ASE writes it, `info` in its comment line."""
    atoms = to_ase(crystal)
    atoms.info.update(info)
    text = StringIO()
    with _library("ASE", crystal.id):
        from ase.io.extxyz import write_xyz

        write_xyz(text, atoms)
    return text.getvalue()


def match_rms(predicted: Crystal, true: Crystal) -> float | None:
    """RMS displacement of matched atoms over (volume per atom)^(1/3), or None where the crystals don't match.

    pymatgen's StructureMatcher with the tolerances of the field (CDVAE, Xie et al. 2022): stol 0.5, angle_tol 10,
    ltol 0.3; free of origin, orientation, choice of cell and volume.
    """
    if predicted.formula != true.formula:
        return None  # a match is one to one between like atoms; saves the reduction of the cells
    pair = to_pymatgen(predicted), to_pymatgen(true)
    with _library("pymatgen", predicted.id):
        from pymatgen.analysis.structure_matcher import StructureMatcher

        matcher: Any = StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3)
        result = matcher.get_rms_dist(*pair)
    return None if result is None else float(result[0])


def density_g_cm3(crystal: Crystal) -> float:
    """Mass of the cell over its volume, in g/cm^3, of the elements' natural isotopes."""
    return float(to_pymatgen(crystal).density)


def primitive_niggli(crystal: Crystal) -> Crystal:
    """The Niggli cell, then the primitive one, as StructureMatcher makes them before it compares (pymatgen's tolerances).

    Two crystals of one reduced formula can only match when these cells hold equally many atoms.
    """
    structure = to_pymatgen(crystal)
    with _library("pymatgen", crystal.id):
        return from_pymatgen(structure.get_reduced_structure("niggli").get_primitive_structure(), crystal.id)


def same_structure(a: Crystal, b: Crystal) -> bool:
    """Whether StructureMatcher with its default tolerances takes two results of `primitive_niggli` for one structure.

    ltol 0.2, stol 0.3, angle_tol 5; volumes are scaled to each other. Used for uniqueness and novelty of samples.
    """
    if a.formula != b.formula:
        return False
    pair = to_pymatgen(a), to_pymatgen(b)
    with _library("pymatgen", a.id):
        from pymatgen.analysis.structure_matcher import StructureMatcher

        return bool(StructureMatcher().fit(*pair, skip_structure_reduction=True))


def same_crystal(a: Crystal, b: Crystal, tolerance_A: float) -> bool:
    """Whether two crystals have the same reduced cell and atoms, whatever their origin and choice of axes.

    Cell edges and the root mean square distance of the atoms may differ by `tolerance_A`. Mirror images are the same. As
    found by pymatgen's StructureMatcher without scaling and without smaller or larger cells.
    """
    if a.composition != b.composition:
        return False
    edge = float(np.cbrt(a.volume_A3))
    spacing = float(np.cbrt(a.volume_A3 / len(a)))
    pair = to_pymatgen(a), to_pymatgen(b)
    with _library("pymatgen", a.id):
        from pymatgen.analysis.structure_matcher import StructureMatcher

        matcher: Any = StructureMatcher(
            ltol=tolerance_A / edge, stol=tolerance_A / spacing, angle_tol=float(np.degrees(tolerance_A / edge)),
            primitive_cell=False, scale=False, attempt_supercell=False,
        )  # fmt: skip
        return bool(matcher.fit(*pair))
