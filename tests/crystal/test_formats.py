"""Files of every format: round trips of real crystals, equality with pymatgen and ASE, refusal of all that is wrong."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.crystal import inputs, interop, parquet
from dist_train.crystal.cif import read_cif
from dist_train.crystal.extxyz import to_extxyz
from dist_train.crystal.formats import ENDINGS, format_of, read_crystals, write_crystal
from dist_train.crystal.parquet import parquet_length, read_parquet_rows, write_parquet
from dist_train.crystal.poscar import parse_poscar, to_poscar
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
FAMILIES = sorted(path.name for path in (SAMPLE / "cifs").iterdir() if path.name != "broken")

NAMES = [f"x{ending}{packed}" for ending in ENDINGS for packed in ("", ".gz")] + ["POSCAR", "CONTCAR_x.gz"]
NAMES.remove("x.parquet.gz")

SALT = Crystal(
    "salt",
    np.array([[4, 0, 0], [0, 5, 0], [0.5, 0, 6]]),
    np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]),
    np.array([11, 11, 17]),
)


@cache
def real(family: str) -> tuple[Crystal, ...]:
    """The first four readable crystals of a family of the sample."""
    found = []
    for path in sorted((SAMPLE / "cifs" / family).rglob("*.cif")):
        try:
            found.append(read_cif(path, 1000))
        except CrystalError:
            continue
        if len(found) == 4:
            break
    return tuple(found)


def read_one(path: Path) -> Crystal:
    (item,) = read_crystals(path)
    assert isinstance(item, Crystal), item
    return item


def refused(path: Path, content: bytes, max_atoms: int | None = None) -> tuple[str, str]:
    """(id, message) of a file with nothing in it that can be taken."""
    path.write_bytes(content)
    (item,) = read_crystals(path, max_atoms)
    assert isinstance(item, tuple), item
    return item[0], str(item[1])


def assert_same(crystal: Crystal, expected: Crystal, tolerance: float, wrapped: bool = False) -> None:
    """Same elements in the same order; cell parameters and fractional coordinates within the tolerance."""
    assert crystal.numbers_N.tolist() == expected.numbers_N.tolist()
    np.testing.assert_allclose(crystal.lengths_angles, expected.lengths_angles, rtol=0, atol=10 * tolerance)
    difference = crystal.frac_N3 - expected.frac_N3
    np.testing.assert_allclose(difference, np.round(difference) if wrapped else 0.0, atol=tolerance)


def signed_volume(crystal: Crystal) -> float:
    """Of the first four atoms in A^3: its sign tells a crystal from its mirror image."""
    return float(np.linalg.det(crystal.cart_N3[1:4] - crystal.cart_N3[0]))


# Round trips


DIGITS = {"cif": 1.1e-8, "poscar": 1e-13, "extxyz": 1e-8, "parquet": 1e-12}
"""What a format keeps of a fractional coordinate: 8 decimals, 16 decimals, 8 decimals of an angstrom, all bits."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ending", [".cif.gz", ".vasp", ".extxyz", ".parquet"])
def test_round_trip_of_real_crystals(tmp_path: Path, ending: str, family: str) -> None:
    """Cell, atoms, order and id to the digits of the format; POSCAR and extxyz keep the orientation too."""
    for crystal in real(family):
        path = tmp_path / f"{crystal.id}{ending}"
        write_crystal(path, crystal)
        kind, _ = format_of(path)
        again = read_one(path)
        assert again.id == crystal.id
        assert_same(again, crystal, DIGITS[kind], wrapped=kind == "cif")
        if kind in ("poscar", "extxyz"):
            np.testing.assert_allclose(again.lattice_A, crystal.lattice_A, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_written_and_read(tmp_path: Path, name: str) -> None:
    """Gzipped where the name says so, without a time of writing; equal crystals give equal bytes."""
    write_crystal(tmp_path / name, SALT)
    content = (tmp_path / name).read_bytes()
    assert (content[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert not name.endswith(".gz") or content[4:8] == bytes(4)
    again = read_one(tmp_path / name)
    assert again.id == ("salt" if format_of(Path(name))[0] in ("extxyz", "parquet") else name.split(".")[0])
    assert_same(again, SALT, 2e-8)
    for zero in (0.0, -0.0):
        frac, lattice = (np.where(array == 0, zero, array) for array in (SALT.frac_N3, SALT.lattice_A))
        write_crystal(tmp_path / name, replace(SALT, frac_N3=frac, lattice_A=lattice))
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("name", ["x.cif", "x.vasp", "x.xyz", "x.parquet"])
def test_the_hand_of_a_crystal_is_kept(tmp_path: Path, random_crystal: Callable[..., Crystal], name: str) -> None:
    """From right-handed and left-handed cells; distances alone would not tell a crystal from its mirror image."""
    hands = set()
    for seed in range(4):
        crystal = random_crystal(seed)
        hands.add(bool(np.linalg.det(crystal.lattice_A) > 0))
        write_crystal(tmp_path / name, crystal)
        again = read_one(tmp_path / name)
        images = replace(again, frac_N3=again.frac_N3 + np.round(interop.right_handed(crystal).frac_N3 - again.frac_N3))
        again = images if name == "x.cif" else again
        assert signed_volume(again) == pytest.approx(signed_volume(crystal), abs=1e-5)
    assert hands == {True, False}


def test_written_poscar() -> None:
    assert to_poscar(replace(SALT, id="a salt\n" + "x" * 60)).splitlines() == [
        "a_salt_" + "x" * 33,
        "1.0",
        "   4.0000000000000000    0.0000000000000000    0.0000000000000000",
        "   0.0000000000000000    5.0000000000000000    0.0000000000000000",
        "   0.5000000000000000    0.0000000000000000    6.0000000000000000",
        "Na Cl",
        "2 1",
        "direct",
        "   0.0000000000000000    0.0000000000000000    0.0000000000000000 Na",
        "   0.5000000000000000    0.5000000000000000    0.0000000000000000 Na",
        "   0.0000000000000000    0.5000000000000000    0.5000000000000000 Cl",
    ]


def test_written_extxyz() -> None:
    assert to_extxyz(replace(SALT, id='my "salt"\n')).splitlines() == [
        "3",
        'Lattice="4.0 0.0 0.0 0.0 5.0 0.0 0.5 0.0 6.0" Properties=species:S:1:pos:R:3 id="my _salt__" pbc="T T T"',
        "Na       0.00000000       0.00000000       0.00000000",
        "Na       2.00000000       2.50000000       0.00000000",
        "Cl       0.25000000       2.50000000       3.00000000",
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, poscar = tmp_path / "new" / "x.parquet", tmp_path / "new" / "x.vasp"
    for path in (table, poscar):
        write_crystal(path, SALT)

    def crystals() -> Iterator[Crystal]:
        yield SALT
        raise KeyboardInterrupt

    def write_half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    with pytest.raises(KeyboardInterrupt):
        write_parquet(table, crystals())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match="disk full"):
            write_crystal(poscar, SALT)
    assert sorted(table.parent.iterdir()) == [table, poscar]
    assert read_one(table).id == "salt"
    assert_same(read_one(poscar), SALT, 1e-12)


# Names


@pytest.mark.parametrize(
    ("name", "kind", "id"),
    [
        ("mp-1.2.cif", "cif", "mp-1.2"),
        ("fic.CIF.GZ", "cif", "fic"),
        ("POSCAR", "poscar", "POSCAR"),
        ("POSCAR.gz", "poscar", "POSCAR"),
        ("CONTCAR_3.relaxed", "poscar", "CONTCAR_3.relaxed"),
        ("POSCAR.xyz", "extxyz", "POSCAR"),
        ("a.POSCAR", "poscar", "a"),
        ("2.contcar", "poscar", "2"),
        ("a.vasp.gz", "poscar", "a"),
        ("traj.extxyz.gz", "extxyz", "traj"),
        ("perov.parquet", "parquet", "perov"),
        (".cif", "cif", ".cif"),
    ],
)
def test_format_and_id_by_name(name: str, kind: str, id: str) -> None:
    assert format_of(Path("folder.cif") / name) == (kind, id)


@pytest.mark.parametrize("name", ["x.txt", "cif", "x.cif.zip", "x.parquet.gz", "xPOSCAR", "gz"])
def test_unknown_names_are_refused_at_once(tmp_path: Path, name: str) -> None:
    for use in (lambda: read_crystals(tmp_path / name), lambda: write_crystal(tmp_path / name, SALT)):
        with pytest.raises(CrystalError, match=r"no known format; .*\.extxyz.*POSCAR"):
            use()
    assert not list(tmp_path.iterdir())


# pymatgen and ASE


@pytest.mark.parametrize("family", FAMILIES)
def test_pymatgen_and_ase_read_what_is_written(tmp_path: Path, family: str) -> None:
    """Every file is read by another program as the same crystal."""
    from ase.io import read
    from pymatgen.core.structure import Structure

    for crystal in real(family)[:2]:
        for name, digits in (("x.cif", 1.1e-8), ("x.vasp", 1e-12), ("x.extxyz", 1e-8)):
            write_crystal(tmp_path / name, crystal)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert_same(interop.from_ase(read(tmp_path / name), "x"), crystal, digits, wrapped=name == "x.cif")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(interop.from_pymatgen(Structure.from_file(tmp_path / "x.vasp"), "x"), crystal, 1e-12)


@pytest.mark.parametrize("direct", [True, False])
def test_reads_what_ase_writes(tmp_path: Path, direct: bool) -> None:
    """POSCAR in both coordinates, with fixed atoms; extxyz with results, forces, constraints and a frame's own keys."""
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms
    from ase.io import read, write

    for family in FAMILIES[:4]:
        crystal = real(family)[0]
        atoms = interop.to_ase(crystal)
        atoms.set_constraint(FixAtoms([0]))
        write(tmp_path / "POSCAR", atoms, direct=direct)
        assert "Selective" in (tmp_path / "POSCAR").read_text()
        assert_same(read_one(tmp_path / "POSCAR"), interop.from_ase(read(tmp_path / "POSCAR"), "x"), 1e-12)
        results = {"energy": -1.5, "forces": np.ones((len(atoms), 3)), "stress": np.arange(6.0)}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info |= {"material_id": "mp-7", "tags": {"a": [1, "b"]}, "note": "Lattice=no id=none"}
        write(tmp_path / "x.extxyz", atoms)
        again = read_one(tmp_path / "x.extxyz")
        assert again.id == "mp-7"
        assert_same(again, interop.from_ase(read(tmp_path / "x.extxyz"), "x"), 1e-12)


def test_reads_what_pymatgen_writes(tmp_path: Path) -> None:
    from pymatgen.io.vasp.inputs import Poscar

    for family in FAMILIES:
        crystal = real(family)[0]
        poscar = Poscar(interop.to_pymatgen(crystal), velocities=np.ones((len(crystal), 3)).tolist())
        for text in (poscar.get_str(), poscar.get_str(direct=False), poscar.get_str(vasp4_compatible=True)):
            (tmp_path / "CONTCAR").write_text(text)
            assert_same(read_one(tmp_path / "CONTCAR"), crystal, 1e-12)


def test_ase_round_trip(random_crystal: Callable[..., Crystal]) -> None:
    """The lattice to the bit, coordinates to those of the way through Cartesian ones."""
    crystal = random_crystal(1)
    atoms = interop.to_ase(crystal)
    np.testing.assert_allclose(atoms.positions, crystal.cart_N3, atol=1e-12)
    again = interop.from_ase(atoms, crystal.id)
    assert again.id == crystal.id
    np.testing.assert_array_equal(again.lattice_A, crystal.lattice_A)
    assert_same(again, crystal, 1e-13)


def test_from_ase_keeps_atoms_outside_the_cell() -> None:
    moved = replace(SALT, frac_N3=SALT.frac_N3 + np.array([[2, 0, 0], [0, -1, 0], [0, 0, 0]]))
    np.testing.assert_allclose(interop.from_ase(interop.to_ase(moved), "x").frac_N3, moved.frac_N3, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pbc": (True, True, False)}, "periodic in 2 of 3"),
        ({"pbc": False}, "periodic in 0 of 3"),
        ({"cell": None}, "no cell"),
        ({"cell": [[1, 0, 0], [2, 0, 0], [0, 0, 3]]}, "no cell"),
        ({"cell": [[np.nan, 0, 0], [0, 2, 0], [0, 0, 3]]}, "no cell"),
        ({"info": {"occupancy": {"0": {"Na": 0.5}}}}, "disordered"),
        ({"info": {"occupancy": {"0": {"Na": 1.0}, "1": {"Cl": 0.5, "Br": 0.5}}}}, "disordered"),
    ],
)
def test_from_ase_refuses(changes: dict[str, Any], reason: str) -> None:
    from ase import Atoms

    given = {"symbols": "NaCl", "positions": [[0, 0, 0], [2, 2, 2]], "cell": [4, 4, 4], "pbc": True}
    assert len(interop.from_ase(Atoms(**given, info={"occupancy": {"0": {"Na": 1.0}}}), "x")) == 2
    with pytest.raises(CrystalError, match=f"^x: {reason}"):
        interop.from_ase(Atoms(**{**given, **changes}), "x")


def test_from_ase_refuses_what_ase_reads_of_a_disordered_cif(tmp_path: Path) -> None:
    """ASE keeps the larger part of a shared site as if it were all of it."""
    from ase.io import read

    write_crystal(tmp_path / "x.cif", SALT)
    text = (tmp_path / "x.cif").read_text()
    assert len(interop.from_ase(read(tmp_path / "x.cif"), "x")) == 3
    (tmp_path / "x.cif").write_text(text.removesuffix(" 1\n") + " 0.5\n")
    with pytest.raises(CrystalError, match=r"disordered.*'Cl': 0.5"):
        interop.from_ase(read(tmp_path / "x.cif"), "x")


# POSCAR

CELL = ("4 0 0", "0 5 0", "0.5 0 6")
HALF = ("2 0 0", "0 2.5 0", "0.25 0 3")
SPREAD = ("2 0 0", "0 5 0", "0.25 0 12")
FRAC = ("0 0 0", "0.5 0.5 0", "0 0.5 0.5")
CART = ("0 0 0", "2 2.5 0", "0.25 2.5 3")


def poscar(
    scale: str = "1.0",
    cell: tuple[str, ...] = CELL,
    names: str = "Na Cl",
    counts: str = "2 1",
    mode: str = "Direct",
    rows: tuple[str, ...] = FRAC,
    comment: str = "salt",
    end: str = "",
) -> str:
    head = [comment, scale, *cell, *([names] if names else []), counts, mode]
    return "\n".join([*head, *rows, end])


def named(rows: tuple[str, ...], end: str = "") -> tuple[str, ...]:
    """Rows with the elements of SALT behind the coordinates."""
    return tuple(f"{row} {end}{symbol}" for row, symbol in zip(rows, ("Na", "Na", "Cl"), strict=True))


SPELLINGS = {
    "plain": poscar(),
    "names behind too": poscar(rows=named(FRAC)),
    "VASP 4": poscar(names="", rows=named(FRAC)),
    "VASP 4, selective": poscar(names="", mode="Selective\nDirect", rows=named(FRAC, "T T F ")),
    "VASP 6": poscar(names="Na_pv/474ac0d  Cl/79d9987ad87"),
    "two lines": poscar(names="Na\nCl", counts="2\n1"),
    "three runs": poscar(names="Na Na Cl", counts="1 1 1"),
    "comments": poscar(scale="1.0 ! scale", names="Na Cl # elements", counts="2 1 ! atoms", rows=(*FRAC[:2], FRAC[2] + "#")),
    "no comment line": poscar(comment=""),
    "selective": poscar(mode="selective dynamics\nfractional", rows=tuple(f"{row} T F T" for row in FRAC)),
    "Cartesian": poscar(mode="cart", rows=CART),
    "Cartesian, selective": poscar(mode="S\nKartesian", rows=tuple(f"{row} F F F" for row in CART)),
    "factor": poscar(scale="2.0", cell=HALF),
    "factor, Cartesian": poscar(scale="2", cell=HALF, mode="C", rows=("0 0 0", "1 1.25 0", "0.125 1.25 1.5")),
    "volume": poscar(scale="-120", cell=HALF),
    "volume, Cartesian": poscar(scale="-120.0", cell=HALF, mode="C", rows=("0 0 0", "1 1.25 0", "0.125 1.25 1.5")),
    "three factors": poscar(scale="2 1 0.5", cell=SPREAD),
    "three factors, Cartesian": poscar(scale="2 1 .5", cell=SPREAD, mode="C", rows=("0 0 0", "1 2.5 0", "0.125 2.5 6")),
    "velocities": poscar(end="\n" + "0.1 0.2 0.3\n" * 3),
    "lattice velocities": poscar(end="Lattice velocities and vectors\n 1\n" + "0 0 0\n" * 6),
    "line ends": poscar().replace("\n", "\r\n"),
    "byte order mark": "\ufeff" + poscar(),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_one_poscar(tmp_path: Path, case: str) -> None:
    """Also as ASE reads it, where ASE knows the spelling."""
    from ase.io.vasp import read_vasp

    (tmp_path / "x.vasp").write_bytes(SPELLINGS[case].encode())
    crystal = read_one(tmp_path / "x.vasp")
    assert_same(crystal, SALT, 1e-12)
    np.testing.assert_allclose(crystal.lattice_A, SALT.lattice_A, atol=1e-12)
    if case not in ("VASP 4", "VASP 4, selective", "two lines", "comments"):
        assert_same(interop.from_ase(read_vasp(StringIO(SPELLINGS[case])), "x"), SALT, 1e-12)


def test_volume_of_a_left_handed_cell_mirrors_nothing() -> None:
    left = ("0 2.5 0", "2 0 0", "0.25 0 3")
    crystal = parse_poscar(poscar(scale="-120", cell=left), "x", 9)
    np.testing.assert_allclose(crystal.lattice_A, SALT.lattice_A[[1, 0, 2]], atol=1e-12)


BAD_POSCARS = {
    "empty": ("", "no numbers of atoms"),
    "blank": ("\n" * 30, "no numbers of atoms"),
    "letter": ("Dear reader,\nno crystal here.\n" * 9, "no numbers of atoms"),
    "head only": ("\n".join(poscar().split("\n")[:7]), "truncated"),
    "one atom short": (poscar(rows=FRAC[:2]) + "\n \n", "truncated, 2 lines for 3 atoms"),
    "one atom short, selective": (poscar(mode="S\nD", rows=FRAC[:2]), "truncated, 2 lines for 3 atoms"),
    "blank line for an atom": (poscar(rows=(*FRAC[:2], "", FRAC[2])), "pymatgen can't take it"),
    "VASP 4": (poscar(names=""), "VASP 4 file without elements; write"),
    "VASP 4, elements in the comment": (poscar(names="", comment="Na Cl"), "VASP 4 file without elements"),
    "VASP 4, another word behind": (poscar(names="", rows=tuple(f"{row} here" for row in FRAC)), "VASP 4 file"),
    "unknown element": (poscar(names="Na Xx"), "unknown element or isotope 'Xx'"),
    "deuterium": (poscar(names="Na D"), "unknown element or isotope 'D'"),
    "deuterium behind": (poscar(names="", counts="1", rows=("0 0 0 D",)), "unknown element or isotope 'D'"),
    "a number for an element": (poscar(names="Na 1."), "unknown element or isotope '1.'"),
    "element 104": (poscar(names="Na Rf"), "unknown element or isotope 'Rf'"),
    "a formula": (poscar(names="Na2 Cl"), "unknown element or isotope 'Na2'"),
    "elements without a number": (poscar(names="Na Cl Br"), "3 elements 'Na Cl Br' with 2 numbers of atoms"),
    "numbers without an element": (poscar(names="Na", counts="2 1"), "1 elements 'Na' with 2 numbers"),
    "negative number": (poscar(counts="4 -1"), "no numbers of atoms"),
    "bomb": (poscar(counts="2 1000000000000"), "at most 1000 are taken"),
    "no atoms": (poscar(counts="0 0"), "no atoms"),
    "no mode": (poscar(mode="0.0 0.0 0.0"), "'0.0 0.0 0.0' where Direct or Cartesian is needed"),
    "zero scale": (poscar(scale="0"), "scale '0'; one factor, three positive ones or a negative volume"),
    "two scales": (poscar(scale="1 1"), "scale '1 1'"),
    "three scales, one negative": (poscar(scale="1 -1 1"), "scale '1 -1 1'"),
    "word for a scale": (poscar(scale="one"), "scale 'one'"),
    "nan scale": (poscar(scale="nan"), "scale 'nan'"),
    "infinite volume": (poscar(scale="-inf"), "scale '-inf'"),
    "volume of a flat cell": (poscar(scale="-120", cell=("1 0 0", "2 0 0", "0 0 1")), "can't be scaled to 120 A^3"),
    "flat cell": (poscar(cell=("4 0 0", "8 0 0", "0 0 4")), "volume"),
    "thin cell": (poscar(cell=("900 0 0", "0 900 0", "0 0 0.3")), "thin"),
    "huge cell": (poscar(scale="1e9"), "at most 1000 A"),
    "ragged cell": (poscar(cell=("4 0", "0 5 0", "0 0 6")), "pymatgen can't take it"),
    "nan cell": (poscar(cell=("nan 0 0", "0 5 0", "0 0 6")), "x: "),
    "word for a coordinate": (poscar(rows=(*FRAC[:2], "0 here 0.5")), "pymatgen can't take it: ValueError"),
    "nan coordinate": (poscar(rows=(*FRAC[:2], "0 nan 0.5")), "not finite"),
    "infinite coordinate": (poscar(rows=(*FRAC[:2], "0 1e999 0.5")), "not finite"),
    "far coordinate": (poscar(rows=(*FRAC[:2], "0 1e12 0.5")), "at most 1000 is taken"),
    "overlap": (poscar(rows=(*FRAC[:2], "0.99 0 0")), "overlapping atoms"),
    "NUL": (poscar(names="Na Cl\0"), "unknown element"),
}


@pytest.mark.parametrize("case", BAD_POSCARS)
def test_poscar_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    text, reason = BAD_POSCARS[case]
    id, message = refused(tmp_path / "x.vasp", text.encode(), 1000)
    assert id == "x"
    assert message.startswith("x: ")
    assert reason in message
    assert "\n" not in message and len(message) < 400


# extxyz

LATTICE = 'Lattice="4 0 0 0 5 0 0.5 0 6"'
ROWS = ("Na 0 0 0", "Na 2 2.5 0", "Cl 0.25 2.5 3")


def frame(comment: str = LATTICE, rows: tuple[str, ...] = ROWS, count: str | None = None) -> str:
    return "\n".join([str(len(rows)) if count is None else count, comment, *rows, ""])


PROPERTIES = "Properties=species:S:1:pos:R:3"
FRAMES = {
    "plain": frame(),
    "properties": frame(f"{LATTICE} {PROPERTIES}"),
    "atomic numbers": frame(f"{LATTICE} Properties=Z:I:1:pos:R:3", ("11 0 0 0", "11 2 2.5 0", "17 .25 2.5 3")),
    "both": frame(f"{LATTICE} {PROPERTIES}:Z:I:1", tuple(f"{row} {z}" for row, z in zip(ROWS, (11, 11, 17)))),
    "other columns": frame(
        f'{LATTICE} Properties="forces:R:3:pos:R:3:fixed:L:1:species:S:1"',
        ("0 0 0 0 0 0 T Na", "0 0 0 2 2.5 0 F Na", "0 0 0 .25 2.5 3 T Cl"),
    ),
    "more columns than named": frame(rows=tuple(f"{row} 0.1 0.2" for row in ROWS)),
    "pbc": frame(f'pbc="T T T" {LATTICE}'),
    "pbc in one word": frame(f"{LATTICE} pbc=TTT"),
    "pbc once": frame(f"{LATTICE} pbc=true"),
    "pbc numbers": frame(f"{LATTICE} pbc=[1, 1, 1]"),
    "braces": frame("Lattice = {4 0 0 0 5 0 0.5 0 6}"),
    "keys that ASE refuses": frame(f'stress="1 2 3" virial=none {LATTICE} {PROPERTIES} _JSON="_JSON {{"'),
    "keys in quotes": frame(f'note="Lattice=no pbc=F" {LATTICE} other="pbc=\\"F F F\\""'),
    "capitals": frame(rows=tuple(row.upper() for row in ROWS)),
    "blank lines": "\n \n" + frame() + "\n\n",
    "line ends": frame().replace("\n", "\r\n"),
    "byte order mark": "\ufeff" + frame(),
    "no last line end": frame().rstrip(),
}


@pytest.mark.parametrize("case", FRAMES)
def test_spellings_of_one_frame(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.xyz").write_bytes(FRAMES[case].encode())
    crystal = read_one(tmp_path / "x.xyz")
    assert crystal.id == "x"
    assert_same(crystal, SALT, 1e-12)
    np.testing.assert_array_equal(crystal.lattice_A, SALT.lattice_A)


def test_a_comment_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.xyz").write_bytes(frame(f"{LATTICE} by=J\xf6rg").encode("latin-1"))
    assert_same(read_one(tmp_path / "x.xyz"), SALT, 1e-12)


@pytest.mark.parametrize(
    ("item", "id"),
    [
        ("id=mp-1", "mp-1"),
        ('id="a b"', "a b"),
        ("material_id=007", "007"),
        ("id=1e5", "1e5"),
        ("material_id=second id=first", "first"),
        ("id=T", "T"),
        ("oid=none", "x"),
        ("1id=none", "x"),
        ("other-id=none", "x"),
        ('id=""', "x"),
        ('note="id=none"', "x"),
        ('id="open', "open"),
    ],
)
def test_id_of_a_frame_is_the_text_of_the_file(tmp_path: Path, item: str, id: str) -> None:
    """As written: ASE would make 100000.0 of 1e5, and True of T."""
    (tmp_path / "x.xyz").write_text(frame(f"{LATTICE} {item}"))
    assert read_one(tmp_path / "x.xyz").id == id


BAD_FRAMES = {
    "empty": ("", "empty file"),
    "blank": (" \n\t\n", "empty file"),
    "letter": ("Dear reader,\nno crystal here.\n", "a number of atoms is needed where the file has 'Dear reader,'"),
    "binary": (bytes(range(1, 256)).decode("latin-1"), "a number of atoms is needed"),
    "count alone": ("3", "truncated, 0 of 3 atoms"),
    "one atom short": (frame(count="4"), "truncated, 3 of 4 atoms"),
    "bomb": (frame(count="999999999999999"), "at most 1000 are taken"),
    "count of many digits": (frame(count="9" * 5000), "a number of atoms is needed where the file has '9999"),
    "negative count": (frame(count="-3"), "a number of atoms is needed where the file has '-3'"),
    "no atoms": (frame(rows=()), "no atoms"),
    "no atoms, columns": (frame(f"{LATTICE} {PROPERTIES}", rows=()), "no atoms"),
    "molecule": (frame("water"), "no Lattice"),
    "pbc without a lattice": (frame('pbc="T T T"'), "no Lattice"),
    "slab": (frame(f'{LATTICE} pbc="T T F"'), 'pbc="T T F"; only what is periodic in all three directions'),
    "not periodic": (frame(f"{LATTICE} pbc=F"), "pbc=F; only"),
    "periodic in two words": (frame(f"{LATTICE} pbc=[T, T]"), "pbc=[T, T]; only"),
    "periodic, who knows": (frame(f"{LATTICE} pbc=maybe"), "pbc=maybe; only"),
    "short lattice": (frame('Lattice="4 0 0 0 5 0"'), "ASE can't take it: ValueError"),
    "words in the lattice": (frame('Lattice="a b c d e f g h i"'), "ASE can't take it: ValueError"),
    "nan lattice": (frame('Lattice="nan 0 0 0 5 0 0 0 6"'), "no cell"),
    "flat lattice": (frame('Lattice="4 0 0 8 0 0 0 0 6"'), "no cell"),
    "thin lattice": (frame('Lattice="900 0 0 0 900 0 0 0 0.3"', ROWS[:1]), "thin"),
    "huge lattice": (frame('Lattice="4 0 0 0 5 0 0 0 1e9"'), "at most 1000 A"),
    "unknown element": (frame(rows=("Xx 0 0 0",)), "unknown element or isotope 'Xx'"),
    "deuterium": (frame(rows=("D 0 0 0",)), "unknown element or isotope 'D'"),
    "dummy": (frame(rows=("X 0 0 0",)), "unknown atomic numbers [0]"),
    "element 104": (frame(rows=("Rf 0 0 0",)), "unknown atomic numbers [104]"),
    "negative number": (frame(f"{LATTICE} Properties=Z:I:1:pos:R:3", ("-1 0 0 0",)), "unknown atomic numbers [-1]"),
    "fraction of a number": (frame(f"{LATTICE} Properties=Z:R:1:pos:R:3", ("11.5 0 0 0",)), "needed, as species:S:1"),
    "no positions": (frame(f"{LATTICE} Properties=species:S:1:force:R:3"), "pos and species or Z are needed"),
    "no elements": (frame(f"{LATTICE} Properties=pos:R:3", ("0 0 0",)), "pos and species or Z are needed"),
    "flat positions": (frame(f"{LATTICE} Properties=species:S:1:pos:R:2"), "pos and species or Z are needed"),
    "columns missing": (frame(f"{LATTICE} {PROPERTIES}:forces:R:3"), "don't fit the 4 columns"),
    "column bomb": (frame(f"{LATTICE} {PROPERTIES}:x:R:999999999"), "don't fit the 4 columns"),
    "columns of no number": (frame(f"{LATTICE} {PROPERTIES}:x:R:many"), "don't fit"),
    "columns cut": (frame(f"{LATTICE} {PROPERTIES}:x:R"), "don't fit"),
    "column of no type": (frame(f"{LATTICE} species:S:1:pos:R:3:x:Q:1").replace(" spec", " Properties=spec"), "don't fit"),
    "short row": (frame(rows=("Na 0 0 0", "Na 2 2.5")), "ASE can't take it"),
    "word for a coordinate": (frame(rows=("Na 0 here 0",)), "ASE can't take it: ValueError"),
    "nan coordinate": (frame(rows=("Na 0 nan 0",)), "not finite"),
    "infinite coordinate": (frame(rows=("Na 0 1e999 0",)), "not finite"),
    "far coordinate": (frame(rows=("Na 0 1e12 0",)), "at most 1000 is taken"),
    "overlap": (frame(rows=("Na 0 0 0", "Na 3.99 0 0")), "overlapping atoms"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_frame_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    text, reason = BAD_FRAMES[case]
    id, message = refused(tmp_path / "x.extxyz", text.encode(), 1000)
    assert id == "x"
    assert message.startswith("x: ")
    assert reason in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("comment", ["a={", 'a="', "a= ", "a=", "a", "a ", 'a="\\', "'"])
@pytest.mark.timeout(20)
def test_time_is_linear_in_hostile_comments(tmp_path: Path, comment: str) -> None:
    _, message = refused(tmp_path / "x.xyz", frame(comment * 300_000).encode())
    assert "no Lattice" in message


WITH_BORDERS = ["one atom short", "count alone", "molecule", "deuterium", "short row", "no atoms", "overlap"]


@given(st.lists(st.sampled_from(["good", *WITH_BORDERS]), min_size=2, max_size=6))
def test_bad_frames_leave_the_others(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    """Each frame is one item with its number and its own reason, a truncated one too."""
    path = tmp_path_factory.mktemp("frames") / "t.xyz"
    path.write_text("".join(frame() if kind == "good" else BAD_FRAMES[kind][0].strip() + "\n" for kind in kinds))
    for number, (kind, item) in enumerate(zip(kinds, read_crystals(path), strict=True), 1):
        if kind == "good":
            assert isinstance(item, Crystal)
            assert item.id == f"t-{number:05d}"
        else:
            assert isinstance(item, tuple)
            assert item[0] == f"t-{number:05d}"
            assert BAD_FRAMES[kind][1] in str(item[1])


@pytest.mark.parametrize("lost", ["-3\n" + frame().partition("\n")[2], "words\n\nmore words\n", "VEC1 4 0 0\n", "4.0\n"])
def test_lines_that_begin_no_frame_are_one_item(tmp_path: Path, lost: str) -> None:
    """Up to the next line that is a lone number."""
    (tmp_path / "t.xyz").write_text(frame() + lost + frame())
    first, bad, last = read_crystals(tmp_path / "t.xyz")
    assert isinstance(first, Crystal) and isinstance(last, Crystal)
    assert [first.id, last.id] == ["t-00001", "t-00003"]
    assert isinstance(bad, tuple)
    assert str(bad[1]) == f"t-00002: a number of atoms is needed where the file has {lost.splitlines()[0]!r}"


def test_frames_of_a_file_keep_order_and_ids(tmp_path: Path) -> None:
    """A joined file of real crystals, gzipped; a damaged one in the middle is named by its id."""
    crystals = [crystal for family in FAMILIES for crystal in real(family)]
    texts = [to_extxyz(crystal) for crystal in crystals]
    texts[1] = texts[1].replace("Lattice", "Gitter")
    texts[2] = texts[2].rsplit("\n", 2)[0] + "\n"
    (tmp_path / "all.extxyz.gz").write_bytes(gzip.compress("".join(texts).encode()))
    items = list(read_crystals(tmp_path / "all.extxyz.gz", max_atoms=1000))
    assert [item.id if isinstance(item, Crystal) else item[0] for item in items] == [crystal.id for crystal in crystals]
    assert [at for at, item in enumerate(items) if isinstance(item, tuple)] == [1, 2]
    for item, crystal in zip(items, crystals):
        if isinstance(item, Crystal):
            assert_same(item, crystal, 1e-8)


def test_frames_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """A file of any length takes the memory of two frames: what follows is still on the disk."""
    (tmp_path / "x.xyz").write_text(frame() * 20_000)
    items = read_crystals(tmp_path / "x.xyz")
    assert isinstance(next(items), Crystal)
    with (tmp_path / "x.xyz").open("r+b") as file:
        file.truncate(0)
    assert len(list(items)) < 2000


# Parquet


def test_written_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real crystals in their order over several row groups, with units; the same rows as pyarrow reads them."""
    monkeypatch.setattr(parquet, "BATCH_ROWS", 3)
    crystals = [crystal for family in FAMILIES for crystal in real(family)]
    path = tmp_path / "t.parquet"
    write_parquet(path, iter(crystals))
    for item, crystal in zip(read_crystals(path), crystals, strict=True):
        assert isinstance(item, Crystal)
        assert item.id == crystal.id
        assert_same(item, crystal, 1e-12)
        np.testing.assert_array_equal(item.frac_N3, crystal.frac_N3)
    table = pq.read_table(path)
    assert tuple(table.column_names) == parquet.PARQUET_COLUMNS
    units = {field.name: field.metadata[b"unit"].decode() for field in table.schema if field.metadata}
    assert [units.get(name) for name in ("a", "c", "alpha", "gamma")] == ["angstrom", "angstrom", "degree", "degree"]
    assert table["z"][0].as_py() == crystals[0].numbers_N.tolist()
    assert table["beta"].to_pylist() == [crystal.lengths_angles[4] for crystal in crystals]
    assert pq.ParquetFile(path).num_row_groups == -(-len(crystals) // 3)
    first = path.read_bytes()
    write_parquet(path, crystals)
    assert path.read_bytes() == first


def test_an_empty_table(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [])
    assert parquet_length(tmp_path / "t.parquet") == 0
    assert list(read_crystals(tmp_path / "t.parquet")) == []


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    """By the name of the file; a bad row by its own id, and the others are read."""
    write_parquet(tmp_path / "good.parquet", [SALT, replace(SALT, id="big", frac_N3=SALT.frac_N3 * 1e9), SALT])
    first, bad, last = read_crystals(tmp_path / "good.parquet")
    assert isinstance(first, Crystal) and isinstance(last, Crystal)
    assert isinstance(bad, tuple)
    assert bad[0] == "big" and "at most 1000 is taken" in str(bad[1])
    content = (tmp_path / "good.parquet").read_bytes()
    pq.write_table(pa.table({"id": ["x"], "a": [1.0]}), tmp_path / "few.parquet")
    cases = {
        "empty": (b"", "no readable Parquet table"),
        "text": (b"id,a,b,c\n" * 9, "no readable Parquet table"),
        "cut": (content[: len(content) // 2], "no readable Parquet table"),
        "holed": (content[:40] + bytes(200) + content[240:], "can't be read"),
        "few": ((tmp_path / "few.parquet").read_bytes(), "are missing, needed are"),
        "letters": (content.replace(b"alpha", b"\xff" * 5), "no readable Parquet table"),
    }
    for name, (raw, reason) in cases.items():
        id, message = refused(tmp_path / f"{name}.parquet", raw)
        assert id == name
        assert message.startswith(f"{name}: ") and reason in message and "\n" not in message


# What holds for all formats


@pytest.mark.parametrize("name", NAMES)
def test_too_many_atoms_are_refused_with_the_limit(tmp_path: Path, name: str) -> None:
    write_crystal(tmp_path / name, SALT)
    assert len(list(read_crystals(tmp_path / name, max_atoms=3))) == 1
    assert read_one(tmp_path / name)
    (item,) = read_crystals(tmp_path / name, max_atoms=2)
    assert isinstance(item, tuple)
    assert "3 atoms, at most 2 are taken" in str(item[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.timeout(20)
def test_unreadable_files_are_refused(tmp_path: Path, name: str) -> None:
    """Missing, a folder, a pipe that nobody writes, binary, and for packed files not packed, cut, or damaged."""
    for folder in ("folder", "pipe"):
        (tmp_path / folder).mkdir()
    (tmp_path / "folder" / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    for path in (tmp_path / name, tmp_path / "folder" / name, tmp_path / "pipe" / name):
        (item,) = read_crystals(path)
        assert isinstance(item, tuple)
        assert name in str(item[1])
    contents = [bytes(range(256)) * 20, b"\0" * 500]
    if name.endswith(".gz"):
        packed = gzip.compress(np.random.default_rng(0).bytes(4000))
        contents += [b"3\n", packed[:-20], packed[:30] + b"\xff" * 30 + packed[60:]]
    for content in contents:
        id, message = refused(tmp_path / name, content)
        assert message.startswith(f"{id}: ")


def test_frames_before_the_end_of_a_cut_file_are_read(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(frame(f"{LATTICE} n={n * 7919 % 1000}").encode() for n in range(1000)))
    (tmp_path / "x.xyz.gz").write_bytes(packed[: len(packed) // 2])
    *good, last = read_crystals(tmp_path / "x.xyz.gz")
    assert len(good) > 100
    assert all(isinstance(item, Crystal) for item in good[:-1])
    assert isinstance(last, tuple)
    assert "can't read" in str(last[1])


@pytest.mark.parametrize("content", [b" ", b"\n", b"\0", b"0 0 0\n", b"H 0 0 0\n"])
def test_gzip_bombs_are_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """A file that unpacks to over the cap is read no further, wherever in it the bomb lies."""
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 10_000)
    unpacked = 0
    read = gzip.GzipFile.readline

    def counted(file: gzip.GzipFile, size: int = -1) -> bytes:
        nonlocal unpacked
        line = read(file, size)
        unpacked += len(line)
        return line

    monkeypatch.setattr(gzip.GzipFile, "readline", counted)
    bomb = content * (3_000_000 // len(content))
    for name, raw in [("x.xyz.gz", bomb), ("y.xyz.gz", frame().encode() + b"9999999\n\n" + bomb), ("x.vasp.gz", bomb)]:
        (tmp_path / name).write_bytes(gzip.compress(raw))
        assert (tmp_path / name).stat().st_size < 10_100
        *before, last = read_crystals(tmp_path / name)
        assert isinstance(last, tuple)
        assert "over 10000 bytes" in str(last[1])
        assert [isinstance(item, Crystal) for item in before] == [True] * (name == "y.xyz.gz")
    assert unpacked < 30_000


def test_a_large_file_of_small_frames_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cap is one for a crystal, not for a file of many."""
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 250)
    (tmp_path / "x.xyz").write_text((frame() + "words between frames " * 7 + "\n") * 20)
    assert sum(isinstance(item, Crystal) for item in read_crystals(tmp_path / "x.xyz")) == 20


DAMAGED = ["x.cif", "x.vasp", "x.extxyz", "x.parquet"]


@pytest.mark.parametrize("name", DAMAGED)
@given(
    cut=st.integers(0, 4000),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.sampled_from(list(b"\n '\";#_0.-eX?=:{}TF9\0\xff!"))), max_size=5),
)
def test_damaged_files_never_raise(
    tmp_path_factory: pytest.TempPathFactory, name: str, cut: int, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / name
    write_crystal(path, SALT)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(bytes(content[: cut if cut < len(content) else None]))
    for item in read_crystals(path, max_atoms=1000):
        if isinstance(item, Crystal):
            assert np.isfinite(item.cart_N3).all()
        else:
            assert isinstance(item[1], CrystalError)
            assert "\n" not in str(item[1])


def test_no_format_loads_what_another_needs() -> None:
    """Importing them, and reading CIF files in P1 and tables, takes neither pymatgen nor ASE."""
    code = (
        "import sys, pathlib; from dist_train.crystal.formats import read_crystals;"
        f"next(read_crystals(pathlib.Path({str(SAMPLE / 'perov_5.parquet')!r})));"
        f"list(read_crystals(pathlib.Path({str(next((SAMPLE / 'cifs' / 'perov_5').glob('*.cif')))!r})));"
        "sys.exit(bool({'pymatgen', 'ase'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_tables_of_the_sample_are_read_as_by_rows() -> None:
    items = read_crystals(SAMPLE / "perov_5.parquet")
    for item, row in zip(items, read_parquet_rows(SAMPLE / "perov_5.parquet", 0, 5)):
        assert isinstance(item, Crystal) and isinstance(row, Crystal)
        assert item.to_json() == row.to_json()
