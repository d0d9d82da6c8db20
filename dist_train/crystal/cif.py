"""CIF text to crystals and back.

gemmi, a parser in C++, reads the syntax and knows the space groups; what the values mean is decided here. pymatgen would
accept cells of nan or negative length, unknown elements and overlapping atoms without a word, move coordinates near 1/3
and 2/3, and take time quadratic in the number of atoms.

The only file that imports gemmi.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from gemmi import cif
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from dist_train.crystal.elements import NUMBERS, SYMBOLS
from dist_train.crystal.inputs import read_text
from dist_train.crystal.interop import accept, checked_fractions, checked_lattice, one_line, right_handed
from dist_train.crystal.lattice import FloatArray
from dist_train.crystal.structure import Crystal, wrap
from dist_train.crystal.symmetry import Setting, SpaceGroup
from dist_train.errors import CrystalError

MAX_BLOCKS = 1000  # gemmi compares the name of each with those of all others
MAX_OPERATIONS = 192  # of the largest space groups
SITE_TOLERANCE_A = 0.05  # images of one site closer than this are one atom: 0.333 is meant as 1/3
OCCUPANCY_TOLERANCE = 1e-3
FORMULA_TOLERANCE = 0.01  # of the share of an element in all atoms

Block = dict[str, list[str]]

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?:\([\d.]*\)?)?")
_CELL = tuple(f"_cell_length_{x}" for x in "abc") + tuple(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma"))
_FRACTIONS = tuple(f"_atom_site_fract_{x}" for x in "xyz")
_SITE_COLUMNS = ("_atom_site_label", "_atom_site_type_symbol", "_atom_site_occupancy")
_FORMULA = "_chemical_formula_sum"
_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_HALL = ("_symmetry_space_group_name_hall", "_space_group_name_hall")
_GROUPS = (
    *("_symmetry_space_group_name_h-m", "_space_group_name_h-m_alt"),
    *("_symmetry_int_tables_number", "_space_group_it_number"),
)
_READ = {*_CELL, *_FRACTIONS, *_SITE_COLUMNS, _FORMULA, *_OPERATIONS, *_HALL, *_GROUPS}
_TERM = r"(?:[xyz]|(?:\d{1,4}(?:\.\d{0,20})?|\.\d{1,20})(?:/[1-9]\d{0,3})?)"
_SUM = f"[+-]?{_TERM}(?:[+-]{_TERM}){{0,5}}"
_OPERATION = re.compile(f"{_SUM},{_SUM},{_SUM}")
_ISOTOPES = ("D", "T")
_NOT_NUCLEAR = ("_space_group_magn", "_space_group_symop_magn", "_cell_modulation_dimension", "_cell_wave_vector")


def read_cif(path: Path, max_atoms: int, id: str | None = None) -> Crystal:
    """The one crystal of a `.cif` or `.cif.gz` file; its id is the file's name without these endings if none is given.

    Raises CrystalError with the reason for a file that can't be read, is too large or isn't what `parse_cif` takes.
    """
    id = id or path.name.removesuffix(".gz").removesuffix(".cif")
    return parse_cif(read_text(path, id), id, max_atoms)


def parse_cif(text: str, id: str, max_atoms: int) -> Crystal:
    """The one crystal of a CIF text: the full cell in the setting of the file, symmetry applied.

    Atoms are in the order of the file, those of one site together. In P1 coordinates are the file's own, to the last
    digit. Raises CrystalError with the reason for everything else: no, several, magnetic or modulated structures,
    disorder, unknown elements, deuterium, a cell or coordinates that aren't finite, overlapping atoms, too many atoms.
    """
    if "\0" in text:
        raise CrystalError(f"{id}: not text, it holds NUL bytes")
    block = _structure_block(text, id)
    parameters = np.array([_one(block, name, id) for name in _CELL])
    lattice = checked_lattice(parameters, id)
    numbers, frac = _sites(block, id, max_atoms)
    crystal = Crystal(id, lattice, frac, numbers)
    rotations, translations = _symmetry(block, parameters, id)
    if len(rotations) > 1:
        crystal = _expand(crystal, rotations, translations, max_atoms)
    _check_formula(block, crystal)
    return accept(crystal, max_atoms)


def _structure_block(text: str, id: str) -> Block:
    """The only data block with atoms. Raises CrystalError for what breaks the syntax of CIF anywhere in the text."""
    if (count := text.lower().count("data_")) > MAX_BLOCKS:
        raise CrystalError(f"{id}: {count} data blocks, at most {MAX_BLOCKS} are read")
    try:
        # Nothing that is read here has other characters, and gemmi refuses them outside of quotes and comments.
        blocks = [_read_items(block) for block in cif.read_string(text.encode("ascii", "replace"))]
    except (ValueError, RuntimeError) as error:
        raise CrystalError(f"{id}: not a CIF, {one_line(error)}") from error
    if not blocks:
        raise CrystalError(f"{id}: empty file")
    with_atoms = [block for block in blocks if block.get(_FRACTIONS[0])]
    if not with_atoms:
        raise CrystalError(f"{id}: no atoms with fractional coordinates")
    if len(with_atoms) > 1:
        raise CrystalError(f"{id}: {len(with_atoms)} structures in one file, only files of one are read")
    if any(name.startswith(_NOT_NUCLEAR) for name in with_atoms[0]):
        raise CrystalError(f"{id}: magnetic or modulated structure, only ordinary ones are read")
    return with_atoms[0]


def _read_items(block: cif.Block) -> Block:
    """Values by name of the items that matter here, names in lower case with '_' for '.', unknown values as ''.

    A single item is a column of one value. Names of magnetic and modulated structures come without values.
    """
    found: Block = {}
    for item in block:
        pair: Any = item.pair
        loop = item.loop
        tags = pair[:1] if pair else loop.tags if loop else []
        names = [tag.lower().replace(".", "_") for tag in tags]
        values: list[str] = []
        if not _READ.isdisjoint(names):  # the long loops of bonds stay in C++
            values = pair[1:] if pair else loop.values
        for column, name in enumerate(names):
            if name in _READ:
                found.setdefault(name, []).extend(map(cif.as_string, values[column :: len(names)]))
            elif name.startswith(_NOT_NUCLEAR):
                found[name] = []
    return found


def _one(block: Block, name: str, id: str) -> float:
    values = block.get(name, [])
    if len(values) != 1:
        raise CrystalError(f"{id}: {name} has {len(values)} values, one is needed")
    return _number(values[0], name, id)


def _number(text: str, name: str, id: str) -> float:
    """A finite number, its standard uncertainty in brackets dropped."""
    if math.isfinite(value := cif.as_number(text)):
        return value
    # gemmi takes 0.5(1), but neither 0.5(1 nor 0.5(0.1) as some files have it.
    if _NUMBER.fullmatch(text) and math.isfinite(value := float(text.split("(")[0])):
        return value
    raise CrystalError(f"{id}: {name} is {text[:40]!r}, not a finite number")


def _sites(block: Block, id: str, max_atoms: int) -> tuple[NDArray[np.int64], FloatArray]:
    """[R] atomic numbers and [R, 3] fractional coordinates of the sites as listed, all of them fully occupied."""
    rows = len(block[_FRACTIONS[0]])
    if rows > max_atoms:
        raise CrystalError(f"{id}: at least {rows} atoms, at most {max_atoms} are taken")
    for name in (*_FRACTIONS, *_SITE_COLUMNS):
        if (name in _FRACTIONS or name in block) and len(block.get(name, ())) != rows:
            raise CrystalError(f"{id}: {name} has {len(block.get(name, ()))} values for {rows} sites")
    for value in dict.fromkeys(block.get("_atom_site_occupancy", ())):
        if value and abs(_number(value, "occupancy", id) - 1.0) > OCCUPANCY_TOLERANCE:
            raise CrystalError(f"{id}: disordered, a site has the occupancy {value[:40]}")
    frac = np.array([[_number(value, name, id) for value in block[name]] for name in _FRACTIONS]).T
    return np.array([NUMBERS[symbol] for symbol in _symbols(block, rows, id)]), checked_fractions(frac, id)


def _symbols(block: Block, rows: int, id: str) -> list[str]:
    """Element of each site, by its type symbol ('Fe3+') or, without one, by its label ('Fe1')."""
    stated = re.findall("[A-Z][a-z]?", " ".join(block.get(_FORMULA, [])))
    kinds = block.get("_atom_site_type_symbol", [""] * rows)
    labels = block.get("_atom_site_label", [""] * rows)
    of_kind = {kind: _letters(kind).title() for kind in set(kinds)}
    symbols = []
    for kind, label in zip(kinds, labels, strict=True):
        symbol = of_kind[kind] if kind else _symbol_of_label(label, stated)
        if symbol in _ISOTOPES:
            raise CrystalError(f"{id}: site {(kind or label)[:40]!r} is an isotope of hydrogen, only elements are taken")
        if symbol not in NUMBERS:
            raise CrystalError(f"{id}: unknown element {(kind or label)[:40]!r}")
        symbols.append(symbol)
    return symbols


def _symbol_of_label(label: str, stated: list[str]) -> str:
    """The element that a label names, or ''. It may go on in letters ('AlT', 'OW'): the reading in the formula is meant."""
    word = _letters(label)
    readings = [] if word.lower().startswith("wat") else [word[:2].title(), word[:1].upper()]
    known = [symbol for symbol in readings if symbol in NUMBERS or symbol in _ISOTOPES]
    return next((symbol for symbol in known if symbol in stated or not stated), "")


def _letters(text: str) -> str:
    return re.match("[A-Za-z]*", text)[0]  # type: ignore[index]  # matches the empty word too


def _symmetry(block: Block, cell: FloatArray, id: str) -> tuple[FloatArray, FloatArray]:
    """[O, 3, 3] rotations and [O, 3] translations of fractional coordinates; the identity alone for P1.

    What tells more goes first: listed operations, then the Hall symbol of the space group, its name, its number.
    """
    listed = _first(block, _OPERATIONS)
    if len(listed) > MAX_OPERATIONS:
        raise CrystalError(f"{id}: {len(listed)} symmetry operations, no space group has over {MAX_OPERATIONS}")
    named = _first(block, _HALL) or _first(block, _GROUPS)
    try:
        listed = listed or (_named(named[0], bool(_first(block, _HALL)), cell) if named else ["x,y,z"])
        return _operations(tuple("".join(operation.split()).lower() for operation in listed))
    except (ValueError, RuntimeError) as error:
        raise CrystalError(f"{id}: symmetry not understood: {(listed or named)[0][:60]!r}, {one_line(error)}") from error


def _named(name: str, hall: bool, cell: FloatArray) -> list[str]:
    """Operations of the space group of this Hall symbol, or of this Hermann-Mauguin symbol or number."""
    if hall:
        return [operation.triplet() for operation in gemmi.symops_from_hall(name)]
    # The angles tell hexagonal from rhombohedral axes.
    group = gemmi.find_spacegroup_by_name(name.replace("_", ""), cell[3], cell[5])
    if group is None:
        raise ValueError("no such space group")
    return [operation.triplet() for operation in group.operations()]


def _first(block: Block, names: tuple[str, ...]) -> list[str]:
    """Values of the first of these items that states any."""
    return next((block[name] for name in names if any(block.get(name, ()))), [])


@lru_cache(maxsize=256)
def _operations(listed: tuple[str, ...]) -> tuple[FloatArray, FloatArray]:
    """Matrices of operations without spaces in lower case. A database has few different lists: most are in the cache.

    Raises ValueError where an operation can't be read, or doesn't form a group with the others: one is wrong or missing.
    """
    rows = np.array([_affine(operation) for operation in listed])
    rows.flags.writeable = False  # the cache hands it out again
    rotations, counts = np.unique(rows[..., :3], axis=0, return_counts=True)
    products = (rotations[:, None] @ rotations).reshape(-1, 3, 3)
    closed = len(np.unique(np.concatenate([rotations, products]) + 0.0, axis=0)) == len(rotations)
    if not closed or len(set(counts.tolist())) > 1 or not np.allclose(np.abs(np.linalg.det(rotations)), 1.0):
        raise ValueError("these operations are no group")
    return rows[..., :3], rows[..., 3]


def _affine(operation: str) -> FloatArray:
    """[3, 4] rotation and translation of 'x-y,x,z+1/3'. ValueError for anything else, such as spaces or capitals.

    Not by gemmi.Op, which knows no translations but multiples of 1/24: pymatgen writes '-x+281/988' for an origin anywhere.
    """
    if not _OPERATION.fullmatch(operation):
        raise ValueError(f"{operation[:60]!r} is no operation of a space group")
    matrix = np.zeros((3, 4))
    for row, part in zip(matrix, operation.split(","), strict=True):
        for sign, term in re.findall(r"([+-]?)([xyz]|[\d./]+)", part):
            number, _, divisor = term.partition("/")
            axis = "xyz".find(term)  # -1, the last column, of a number
            row[axis] += float(f"{sign}{number if axis < 0 else 1}") / float(divisor or 1)
    return matrix


def _expand(crystal: Crystal, rotations: FloatArray, translations: FloatArray, max_atoms: int) -> Crystal:
    """All atoms of the cell, site by site, from a crystal of one atom a site."""
    kept: list[FloatArray] = []
    total = 0
    reach = SITE_TOLERANCE_A * float(np.linalg.norm(np.linalg.inv(crystal.lattice_A), 2))  # in fractional coordinates
    for site in crystal.frac_N3:
        images = wrap(rotations @ site + translations)
        first, second = cKDTree(images, boxsize=1.0).query_pairs(reach, output_type="ndarray").T
        difference = images[first] - images[second]
        distances = np.linalg.norm((difference - np.round(difference)) @ crystal.lattice_A, axis=-1)
        kept.append(np.delete(images, second[distances < SITE_TOLERANCE_A], axis=0))
        total += len(kept[-1])
        if total > max_atoms:
            raise CrystalError(f"{crystal.id}: at least {total} atoms with symmetry, at most {max_atoms} are taken")
    numbers = np.repeat(crystal.numbers_N, [len(images) for images in kept])
    return replace(crystal, frac_N3=np.concatenate(kept), numbers_N=numbers)


def _check_formula(block: Block, crystal: Crystal) -> None:
    """Refuse a crystal without the composition its file states: hydrogens not located, doubled or mixed sites."""
    words = " ".join(block.get(_FORMULA, [])).split()
    parts = [re.fullmatch(r"([A-Z][a-z]?)(\d*(?:\.\d*)?)", word) for word in words]
    stated: dict[str, float] = {}
    for part in parts:
        if part is None or part[2] == ".":
            return  # brackets, charges, unknowns: no plain formula to compare with
        stated[part[1]] = stated.get(part[1], 0.0) + float(part[2] or 1.0)
    found = {SYMBOLS[z]: count for z, count in crystal.composition.items()}
    total = sum(stated.values())
    shares_differ = total and any(
        abs(found.get(symbol, 0) / len(crystal) - stated.get(symbol, 0.0) / total) > FORMULA_TOLERANCE
        for symbol in {*found, *stated}
    )
    # A list of atoms cut short may keep the shares, as it does with one element alone, but hardly the number.
    if shares_differ or (total and total.is_integer() and len(crystal) % total):
        raise CrystalError(f"{crystal.id}: atoms make {crystal.formula}, the file states {' '.join(words)[:60]}")


def write_cif(crystal: Crystal) -> str:
    """CIF text of the full cell in P1, 8 decimals, coordinates in [0, 1); equal crystals give equal bytes.

    Atoms keep their order and are labelled by element: 'Ba1', 'O1', 'O2'. Takes crystals that pass `Crystal.checked`.
    """
    everything = np.arange(len(crystal))
    return _cif(right_handed(crystal), SpaceGroup(1, "P 1"), ("x, y, z",), everything)


def write_symmetric_cif(setting: Setting) -> str:
    """CIF text of a conventional cell: the operations of its space group, and one atom of each set of equivalent ones."""
    return _cif(setting.crystal, setting.group, setting.operations, setting.sites)


def _cif(crystal: Crystal, group: SpaceGroup, operations: Sequence[str], sites: NDArray[np.int64]) -> str:
    parameters = [f"{name} {value:.8f}" for name, value in zip(_CELL, crystal.lengths_angles, strict=True)]
    counts: dict[int, int] = {}
    rows = []
    for z, (x, y, w) in zip(crystal.numbers_N[sites].tolist(), wrap(np.round(crystal.frac_N3[sites], 8)), strict=True):
        counts[z] = counts.get(z, 0) + 1
        rows.append(f"{SYMBOLS[z]} {SYMBOLS[z]}{counts[z]} {x:.8f} {y:.8f} {w:.8f} 1")
    formula = " ".join(f"{SYMBOLS[z]}{count}" for z, count in crystal.composition.items())
    columns = ["_atom_site_type_symbol", "_atom_site_label", *_FRACTIONS, "_atom_site_occupancy"]
    lines = [
        f"data_{re.sub(r'[^A-Za-z0-9._+-]', '_', crystal.id)[:70] or 'crystal'}",
        *(f"_symmetry_space_group_name_H-M '{group.symbol}'", f"_symmetry_Int_Tables_number {group.number}", *parameters),
        f"_chemical_formula_sum '{formula}'",
        *("loop_", "_symmetry_equiv_pos_as_xyz", *(f"'{operation}'" for operation in operations)),
        *("loop_", *columns, *rows),
    ]
    return "\n".join(lines) + "\n"
