"""CIF text to crystals and back.

The columns are read here and not by pymatgen, which accepts cells of nan or negative length, unknown elements and
overlapping atoms without a word, moves coordinates near 1/3 and 2/3, and takes time quadratic in the number of atoms;
pymatgen knows the space groups (see `interop`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import NUMBERS, SYMBOLS
from dist_train.crystal.inputs import read_text
from dist_train.crystal.interop import accept, checked_fractions, checked_lattice, right_handed, symmetry_operations
from dist_train.crystal.lattice import FloatArray
from dist_train.crystal.structure import Crystal, wrap
from dist_train.errors import CrystalError

MAX_OPERATIONS = 192  # of the largest space groups
SITE_TOLERANCE_A = 0.05  # images of one site closer than this are one atom: 0.333 is meant as 1/3
OCCUPANCY_TOLERANCE = 1e-3
FORMULA_TOLERANCE = 0.01  # of the share of an element in all atoms

Block = dict[str, list[str]]

_TOKEN = re.compile(
    r"""'(?P<single>(?:[^']|'(?=\S))*+)'?|"(?P<double>(?:[^"]|"(?=\S))*+)"?|(?P<comment>\#.*)|(?P<bare>\S+)"""
)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?:\([\d.]*\)?)?")
_CELL = tuple(f"_cell_length_{x}" for x in "abc") + tuple(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma"))
_FRACTIONS = tuple(f"_atom_site_fract_{x}" for x in "xyz")
_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
_SPACE_GROUPS = {
    "_symmetry_space_group_name_hall": "_symmetry_space_group_name_hall",
    "_space_group_name_hall": "_space_group_name_Hall",
    "_symmetry_space_group_name_h-m": "_symmetry_space_group_name_H-M",
    "_space_group_name_h-m_alt": "_space_group_name_H-M_alt",
    "_symmetry_int_tables_number": "_symmetry_Int_Tables_number",
    "_space_group_it_number": "_space_group_IT_number",
}
"""Lower case name in a file -> the spelling that pymatgen looks for."""
_UNKNOWN = [".", "?"]
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
    lattice = checked_lattice(np.array([_number(_one(block, name, id), name, id) for name in _CELL]), id)
    numbers, frac = _sites(block, id, max_atoms)
    crystal = Crystal(id, lattice, frac, numbers)
    rotations, translations = _symmetry(block, id)
    if len(rotations) > 1:
        crystal = _expand(crystal, rotations, translations, max_atoms)
    _check_formula(block, crystal)
    return accept(crystal, max_atoms)


def _tokens(text: str) -> Iterator[tuple[bool, str]]:
    """(is a bare word, value) of each CIF token; time linear in the text, whatever it holds."""
    field: list[str] | None = None
    for line in text.splitlines():
        if line.startswith(";"):
            if field is None:
                field = [line[1:]]
                continue
            yield False, "\n".join(field)
            field, line = None, line[1:]
        if field is not None:
            field.append(line)
            continue
        for match in _TOKEN.finditer(line):
            kind = match.lastgroup
            if kind and kind != "comment":
                yield kind == "bare", match[kind]


def _blocks(text: str) -> list[Block]:
    """Values by name of each data block, names in lower case; a single item is a column of one value."""
    blocks: list[Block] = []
    names: list[str] = []
    in_loop, count = False, 0
    for bare, token in _tokens(text):
        word = token.lower() if bare else ""
        if word.startswith("data_"):
            blocks.append({})
            names, in_loop = [], False
        elif word == "loop_":
            names, in_loop, count = [], True, 0
        elif word.startswith("_") and blocks:
            if count or not in_loop:
                names, in_loop, count = [], False, 0
            names.append(word.replace(".", "_"))
            blocks[-1].setdefault(names[-1], [])
        elif names:
            blocks[-1][names[count % len(names)]].append(token)
            count += 1
    return blocks


def _structure_block(text: str, id: str) -> Block:
    """The only data block with atoms."""
    blocks = _blocks(text)
    if not blocks:
        raise CrystalError(f"{id}: {'no data block, not a CIF' if text.strip() else 'empty file'}")
    with_atoms = [block for block in blocks if block.get(_FRACTIONS[0])]
    if not with_atoms:
        raise CrystalError(f"{id}: no atoms with fractional coordinates")
    if len(with_atoms) > 1:
        raise CrystalError(f"{id}: {len(with_atoms)} structures in one file, only files of one are read")
    if any(name.startswith(_NOT_NUCLEAR) for name in with_atoms[0]):
        raise CrystalError(f"{id}: magnetic or modulated structure, only ordinary ones are read")
    return with_atoms[0]


def _one(block: Block, name: str, id: str) -> str:
    values = block.get(name, [])
    if len(values) != 1:
        raise CrystalError(f"{id}: {name} has {len(values)} values, one is needed")
    return values[0]


def _number(text: str, name: str, id: str) -> float:
    """A finite number, its standard uncertainty in brackets dropped."""
    if not _NUMBER.fullmatch(text) or not np.isfinite(value := float(text.split("(")[0])):
        raise CrystalError(f"{id}: {name} is {text[:40]!r}, not a finite number")
    return value


def _sites(block: Block, id: str, max_atoms: int) -> tuple[NDArray[np.int64], FloatArray]:
    """[R] atomic numbers and [R, 3] fractional coordinates of the sites as listed, all of them fully occupied."""
    rows = len(block[_FRACTIONS[0]])
    if rows > max_atoms:
        raise CrystalError(f"{id}: at least {rows} atoms, at most {max_atoms} are taken")
    columns = {name: values for name, values in block.items() if name.startswith("_atom_site_")}
    for name in (*_FRACTIONS, "_atom_site_label", "_atom_site_type_symbol", "_atom_site_occupancy"):
        if (name in _FRACTIONS or name in columns) and len(columns.get(name, ())) != rows:
            raise CrystalError(f"{id}: {name} has {len(columns.get(name, ()))} values for {rows} sites")
    for value in columns.get("_atom_site_occupancy", ()):
        if value not in _UNKNOWN and abs(_number(value, "occupancy", id) - 1.0) > OCCUPANCY_TOLERANCE:
            raise CrystalError(f"{id}: disordered, a site has the occupancy {value[:40]}")
    frac = np.array([[_number(value, name, id) for value in columns[name]] for name in _FRACTIONS]).T
    return np.array([NUMBERS[symbol] for symbol in _symbols(block, rows, id)]), checked_fractions(frac, id)


def _symbols(block: Block, rows: int, id: str) -> list[str]:
    """Element of each site, by its type symbol ('Fe3+') or, without one, by its label ('Fe1')."""
    formula = set(re.findall(r"[A-Z][a-z]?", " ".join(block.get("_chemical_formula_sum", []))))
    kinds = block.get("_atom_site_type_symbol", ["?"] * rows)
    labels = block.get("_atom_site_label", ["?"] * rows)
    symbols = []
    for kind, label in zip(kinds, labels, strict=True):
        text = label if kind in _UNKNOWN else kind
        word = re.match(r"[A-Za-z]*", text)[0]  # type: ignore[index]  # matches the empty word too
        readings = [word.title()]
        if kind in _UNKNOWN:
            # A label may go on in letters ('AlT', 'OW'): of its two readings, the one in the formula is meant.
            readings = [] if word.lower().startswith("wat") else [word[:2].title(), word[:1].upper()]
            readings = [symbol for symbol in readings if symbol in formula or not formula]
        symbol = next((symbol for symbol in readings if symbol in NUMBERS or symbol in _ISOTOPES), None)
        if symbol in _ISOTOPES:
            raise CrystalError(f"{id}: site {text[:40]!r} is an isotope of hydrogen, only elements are taken")
        if symbol is None:
            raise CrystalError(f"{id}: unknown element {text[:40]!r}")
        symbols.append(symbol)
    return symbols


def _symmetry(block: Block, id: str) -> tuple[FloatArray, FloatArray]:
    """[O, 3, 3] rotations and [O, 3] translations of fractional coordinates; the identity alone for P1."""
    listed = next((block[name] for name in _OPERATIONS if {*block.get(name, [])} - {*_UNKNOWN}), [])
    stated = {ours: block.get(name, _UNKNOWN) for name, ours in _SPACE_GROUPS.items()}
    named = {name: values[0] for name, values in stated.items() if values and values[0] not in _UNKNOWN}
    if len(listed) > MAX_OPERATIONS:
        raise CrystalError(f"{id}: {len(listed)} symmetry operations, no space group has over {MAX_OPERATIONS}")
    if [re.sub(r"[\s+]", "", operation).lower() for operation in listed] == ["x,y,z"] or not (listed or named):
        return np.eye(3)[None], np.zeros((1, 3))
    return symmetry_operations({_OPERATIONS[0]: listed} if listed else named, id)


def _expand(crystal: Crystal, rotations: FloatArray, translations: FloatArray, max_atoms: int) -> Crystal:
    """All atoms of the cell, site by site, from a crystal of one atom a site."""
    kept: list[FloatArray] = []
    total = 0
    for site in crystal.frac_N3:
        images = wrap(rotations @ site + translations)
        difference = images[:, None] - images[None]
        distances = np.linalg.norm((difference - np.round(difference)) @ crystal.lattice_A, axis=-1)
        kept.append(images[~np.tril(distances < SITE_TOLERANCE_A, -1).any(1)])
        total += len(kept[-1])
        if total > max_atoms:
            raise CrystalError(f"{crystal.id}: at least {total} atoms with symmetry, at most {max_atoms} are taken")
    numbers = np.repeat(crystal.numbers_N, [len(images) for images in kept])
    return replace(crystal, frac_N3=np.concatenate(kept), numbers_N=numbers)


def _check_formula(block: Block, crystal: Crystal) -> None:
    """Refuse a crystal without the composition its file states: hydrogens not located, doubled or mixed sites."""
    words = " ".join(block.get("_chemical_formula_sum", [])).split()
    parts = [re.fullmatch(r"([A-Z][a-z]?)(\d*(?:\.\d*)?)", word) for word in words]
    stated: dict[str, float] = {}
    for part in parts:
        if part is None or part[2] == ".":
            return  # brackets, charges, unknowns: no plain formula to compare with
        stated[part[1]] = stated.get(part[1], 0.0) + float(part[2] or 1.0)
    found = {SYMBOLS[z]: count for z, count in crystal.composition.items()}
    total = sum(stated.values())
    if total and any(
        abs(found.get(symbol, 0) / len(crystal) - stated.get(symbol, 0.0) / total) > FORMULA_TOLERANCE
        for symbol in {*found, *stated}
    ):
        raise CrystalError(f"{crystal.id}: atoms make {crystal.formula}, the file states {' '.join(words)[:60]}")


def write_cif(crystal: Crystal) -> str:
    """CIF text of the full cell in P1, 8 decimals, coordinates in [0, 1); equal crystals give equal bytes.

    Atoms keep their order and are labelled by element: 'Ba1', 'O1', 'O2'. Takes crystals that pass `Crystal.checked`.
    """
    crystal = right_handed(crystal)
    parameters = [f"{name} {value:.8f}" for name, value in zip(_CELL, crystal.lengths_angles, strict=True)]
    counts: dict[int, int] = {}
    rows = []
    for z, (x, y, w) in zip(crystal.numbers_N.tolist(), wrap(np.round(crystal.frac_N3, 8)), strict=True):
        counts[z] = counts.get(z, 0) + 1
        rows.append(f"{SYMBOLS[z]} {SYMBOLS[z]}{counts[z]} {x:.8f} {y:.8f} {w:.8f} 1")
    formula = " ".join(f"{SYMBOLS[z]}{count}" for z, count in crystal.composition.items())
    columns = ["_atom_site_type_symbol", "_atom_site_label", *_FRACTIONS, "_atom_site_occupancy"]
    lines = [
        f"data_{re.sub(r'[^A-Za-z0-9._+-]', '_', crystal.id)[:70] or 'crystal'}",
        *("_symmetry_space_group_name_H-M 'P 1'", "_symmetry_Int_Tables_number 1", *parameters),
        f"_chemical_formula_sum '{formula}'",
        *("loop_", "_symmetry_equiv_pos_as_xyz", "'x, y, z'"),
        *("loop_", *columns, *rows),
    ]
    return "\n".join(lines) + "\n"
