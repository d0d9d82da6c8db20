"""Reading and writing crystals: known answers, equality with pymatgen on real files, refusal of all that is wrong."""

from __future__ import annotations

import gzip
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_train.crystal import cif as cif_io
from dist_train.crystal import inputs, interop, parquet
from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.lattice import compact_lattice, periodic_distances
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
CIFS = sorted((SAMPLE / "cifs").rglob("*.cif"))
BROKEN = [path for path in CIFS if path.parent.name == "broken"]
GENUINE = [path for path in CIFS if path.parent.name != "broken"]
FAMILIES = sorted({path.parent.name for path in GENUINE})
MAX_ATOMS = 1000

TYPED = "_atom_site_type_symbol _atom_site_label _atom_site_fract_x _atom_site_fract_y _atom_site_fract_z"
LABELLED = TYPED.removeprefix("_atom_site_type_symbol ")
CSCL = ("Cs Cs1 0 0 0", "Cl Cl1 0.5 0.5 0.5")


def cif(
    *rows: str, cell: str = "4 4 4 90 90 90", columns: str = TYPED, before: str = "", after: str = "", name: str = "x"
) -> str:
    """CIF text of one block: a cell, what comes `before`, the sites, what comes `after`."""
    names = [f"_cell_length_{x}" for x in "abc"] + [f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")]
    items = [f"{key} {value}" for key, value in zip(names, cell.split(), strict=True)]
    return "\n".join([f"data_{name}", *items, before, "loop_", *columns.split(), *rows, after, ""])


def operations(*listed: str) -> str:
    return "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *(f"'{operation}'" for operation in listed)])


def parse(text: str) -> Crystal:
    return cif_io.parse_cif(text, "x", MAX_ATOMS)


def crystal_of(edge_A: float, frac: list[list[float]], numbers: list[int]) -> Crystal:
    """A cubic cell with these atoms."""
    return Crystal("a cube", np.eye(3) * edge_A, np.array(frac), np.array(numbers))


def random_crystal(seed: int, atoms: int = 6) -> Crystal:
    """A skewed cell with atoms at any coordinates, beyond the cell too."""
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(3, 9, 3)) + rng.uniform(-1, 1, (3, 3))
    return Crystal(f"random-{seed}", lattice, rng.uniform(-2, 2, (atoms, 3)), rng.integers(1, 104, atoms))


def readable(family: str) -> list[Path]:
    """Files of a family that are ordinary ordered crystals: all but a few experimental ones."""
    return [path for path in GENUINE if path.parent.name == family and is_read(path)]


def is_read(path: Path) -> bool:
    try:
        return bool(cif_io.read_cif(path, MAX_ATOMS))
    except CrystalError:
        return False


def assert_same_atoms(crystal: Crystal, other: Crystal, tolerance_A: float) -> None:
    """Each atom of one lies on an atom of the same element of the other; one to one, periodic, in any order."""
    assert crystal.composition == other.composition
    np.testing.assert_allclose(crystal.lengths_angles, other.lengths_angles, atol=1e-6)
    lattice = compact_lattice(crystal.lattice_A)
    change = crystal.lattice_A @ np.linalg.inv(lattice)
    distances = periodic_distances(lattice, crystal.frac_N3 @ change, other.frac_N3 @ change)
    partner = distances.argmin(axis=1)
    assert sorted(partner) == list(range(len(crystal)))
    assert distances.min(axis=1).max() < tolerance_A
    assert (crystal.numbers_N == other.numbers_N[partner]).all()


# Known answers


def test_p1_atoms_and_cell_are_those_of_the_file() -> None:
    crystal = parse(cif("Cs Cs1 0.333333 0 0", "Cl Cl1 -0.5 0.5 1.25", cell="4.12 5 6 90 90 120.00000123"))
    assert crystal.numbers_N.tolist() == [55, 17]
    np.testing.assert_array_equal(crystal.frac_N3, [[0.333333, 0, 0], [-0.5, 0.5, 1.25]])
    np.testing.assert_allclose(crystal.lengths_angles, [4.12, 5, 6, 90, 90, 120.00000123], rtol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        cif("Cs Cs1 0(0) 0.0(12) 0", "Cl Cl1 0.5(1 .5 5e-1", cell="4.0(12) 4 4 90.0(2) 90 90"),
        cif(*CSCL).upper().replace("\n", "\r\n"),
        cif(*CSCL).replace("_fract_", ".fract_").replace("_cell_", "_cell."),
        cif(*CSCL, before="_note\n;\ndata_y\nloop_\n_atom_site_fract_x 1 2 3\n;"),
        "data_global\n_publ 'it''s'\n" + cif(*CSCL) + "data_powder\n_pd_x 1\n",
        cif(*(row + " 1.000" for row in CSCL), columns=TYPED + " _atom_site_occupancy"),
        cif(*(row + " ." for row in CSCL), columns=TYPED + " _atom_site_occupancy"),
        cif("Cs+ A 0 0 0", "Cl1- B .5 .5 .5", after="_chemical_formula_sum 'Cs Cl'"),
        cif("Cs1 0 0 0", "Cl2 .5 .5 .5", columns=LABELLED, before="_chemical_formula_sum 'Cl1.00 Cs1'"),
        cif(*CSCL, before="_author Ångström  # Å\n_affiliation 'Å'"),
        cif(*CSCL, before="_symmetry_space_group_name_H-M 'P 1'"),
        cif(*CSCL, before=operations("+x, +y, +z") + "\n_space_group_IT_number 221"),
        cif(*CSCL, before="_space_group_IT_number ?"),
        cif(*CSCL, after="loop_\n_geom_bond_atom_site_label_1\n_geom_bond_distance"),
    ],
)
def test_spellings_of_one_crystal(text: str) -> None:
    """Uncertainties, case, line ends, dots, text fields, letters, other blocks, charges, labels, an empty bond loop."""
    crystal = parse(text)
    assert crystal.numbers_N.tolist() == [55, 17]
    np.testing.assert_array_equal(crystal.frac_N3, [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_single_site_without_a_loop() -> None:
    items = zip(TYPED.split(), ("Po", "Po1", "0", "0", "0"), strict=True)
    text = cif("X X1 0 0 0").split("loop_")[0] + "\n".join(f"{name} {value}" for name, value in items)
    assert parse(text).numbers_N.tolist() == [84]


@pytest.mark.parametrize(
    "symmetry",
    [
        "_symmetry_space_group_name_H-M 'F m -3 m'",
        "_space_group_name_H-M_alt Fm-3m",
        "_space_group_IT_number 225",
        "_space_group_name_Hall '-F 4 2 3'\n_symmetry_space_group_name_H-M 'P 1'",
        "_symmetry_equiv_pos_as_xyz ?\n_space_group_IT_number 225",
    ],
)
def test_space_group_by_name(symmetry: str) -> None:
    crystal = parse(cif("Na Na1 0 0 0", "Cl Cl1 .5 .5 .5", cell="5.64 5.64 5.64 90 90 90", before=symmetry))
    assert crystal.numbers_N.tolist() == [11] * 4 + [17] * 4
    expected = crystal_of(5.64, FCC + [[x + 0.5, y, z] for x, y, z in FCC], [11] * 4 + [17] * 4)
    assert_same_atoms(crystal, expected, 1e-9)


FCC = [[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]


def test_rhombohedral_axes_are_told_by_the_angles() -> None:
    """FeCl3, R -3 with three equal angles: two formula units; its operations on hexagonal axes would make nine."""
    sites = ("Fe Fe1 .33 .33 .33", "Cl Cl1 .077 .412 .74")
    group = "_symmetry_space_group_name_H-M 'R -3'"
    assert len(parse(cif(*sites, cell="6.69 6.69 6.69 52.3 52.3 52.3", before=group))) == 8
    assert len(parse(cif(*sites, cell="5.9 5.9 17.3 90 90 120", before=group))) == 36


@pytest.mark.parametrize(
    "operation",
    ["x,y,z", "-Y, x-y , Z+1/3", "1/2+x,-y+0.25,.5-z", "-x+281/988,-y,z-274/333", "+x-y,x-0.3333,2-z", "z,x+5/6,y+1.5"],
)
def test_operations_are_those_of_pymatgen(operation: str) -> None:
    """pymatgen writes translations of any denominator where the origin of a cell lies anywhere."""
    from pymatgen.core.operations import SymmOp

    theirs = SymmOp.from_xyz_str(operation)
    matrix = cif_io._affine(operation.replace(" ", "").lower())
    np.testing.assert_allclose(matrix, theirs.affine_matrix[:3], atol=1e-12)


@pytest.mark.parametrize("number", [1, 14, 48, 68, 70, 88, 141, 146, 167, 194, 203, 225, 227, 230])
def test_space_groups_are_those_of_pymatgen(number: int) -> None:
    """Setting and origin of what only a number states, where several are in use."""
    from pymatgen.symmetry.groups import SpaceGroup

    cell = np.array([5.0, 5.0, 5.0, 90.0, 90.0, 90.0])
    ours = cif_io._symmetry({"_space_group_it_number": [str(number)]}, cell, "x")
    theirs = [operation.affine_matrix[:3] for operation in SpaceGroup.from_int_number(number).symmetry_ops]
    assert rounded(np.concatenate([ours[0], ours[1][:, :, None]], axis=2)) == rounded(np.array(theirs))


def rounded(operations: np.ndarray) -> set[tuple[int, ...]]:
    """Operations in parts of 24, translations in [0, 24)."""
    parts = np.round(24 * operations).astype(int)
    parts[..., 3] %= 24
    return {tuple(operation.ravel().tolist()) for operation in parts}


def test_low_precision_coordinates_give_no_doubled_sites() -> None:
    """0.333 and 0.667 stand for 1/3 and 2/3: magnesium has two atoms, not six."""
    crystal = parse(cif("Mg Mg1 .333 .667 .25", cell="3.2 3.2 5.2 90 90 120", before="_space_group_IT_number 194"))
    assert len(crystal) == 2


@pytest.mark.parametrize(
    ("label", "formula", "element"),
    [("HO1", "'H2 O'", "H"), ("OW", "'H2 O'", "O"), ("CO1", "'C O2'", "C"), ("CO1", "Co", "Co"), ("AlT", "?", "Al")],
)
def test_label_is_read_with_the_formula(label: str, formula: str, element: str) -> None:
    text = cif(f"{label} 0 0 0", columns=LABELLED, before=f"_chemical_formula_sum {formula}")
    assert cif_io._symbols(cif_io._structure_block(text, "x"), 1, "x") == [element]


# Refusals


PBAR_CENTRED = ["x,y,z", "-x,-y,-z", "x+1/2,y+1/2,z", "-x+1/2,-y+1/2,-z"]
OCCUPIED = TYPED + " _atom_site_occupancy"
HOSTILE = {
    "empty": ("", "empty file"),
    "blank": (" \n\t\n", "empty file"),
    "letter": ("Dear reader,\nno crystal here.\n", "expected block header"),
    "only a header": ("data_x\n", "no atoms"),
    "no atoms": (cif(), "no atoms"),
    "NUL": (cif(*CSCL) + "\0", "NUL"),
    "nan cell": (cif(*CSCL, cell="nan 4 4 90 90 90"), "finite"),
    "infinite cell": (cif(*CSCL, cell="4 inf 4 90 90 90"), "finite"),
    "overflowing cell": (cif(*CSCL, cell="4 1e999 4 90 90 90"), "finite"),
    "nan angle": (cif(*CSCL, cell="4 4 4 90 nan 90"), "finite"),
    "negative cell": (cif(*CSCL, cell="4 -4 4 90 90 90"), "no cell"),
    "zero cell": (cif(*CSCL, cell="4 0 4 90 90 90"), "no cell"),
    "huge cell": (cif(*CSCL, cell="4 4 1e300 90 90 90"), "at most 1000"),
    "flat cell": (cif(*CSCL, cell="4 4 4 120 120 120"), "volume"),
    "thin cell": (cif("Cs Cs1 0 0 0", cell="900 900 0.3 90 90 90"), "thin"),
    "straight angle": (cif(*CSCL, cell="4 4 4 90 90 180"), "no cell"),
    "impossible angles": (cif(*CSCL, cell="4 4 4 20 20 170"), "no cell"),
    "no cell": ("data_x" + cif(*CSCL).split("90 90")[-1].split("gamma 90")[-1], "_cell_length_a"),
    "cell twice": (cif(*CSCL) + "_cell_length_a 4\n", "duplicate tag"),
    "text coordinate": (cif("Cs Cs1 n/a 0 0"), "finite"),
    "unknown coordinate": (cif("Cs Cs1 ? 0 0"), "finite"),
    "nan coordinate": (cif("Cs Cs1 nan 0 0"), "finite"),
    "infinite coordinate": (cif("Cs Cs1 0 -inf 0"), "finite"),
    "huge coordinate": (cif("Cs Cs1 0 1e12 0"), "at most 1000"),
    "huge coordinate, many images": (cif("Cs Cs1 0 1e12 0", before="_space_group_IT_number 225"), "at most 1000"),
    "Cartesian": (cif("Cs Cs1 0 0 0").replace("fract", "Cartn"), "no atoms"),
    "missing column": (cif("Cs Cs1 0 0", columns=TYPED.removesuffix(" _atom_site_fract_z")), "_fract_z"),
    "ragged loop": (cif(*CSCL, "O O1 0.5"), "number of values"),
    "unknown element": (cif("Xx Xx1 0 0 0"), "unknown element 'Xx'"),
    "dummy": (cif("X X1 0 0 0"), "unknown element"),
    "element 104": (cif("Rf Rf1 0 0 0"), "unknown element"),
    "water": (cif("Wat1 0 0 0", columns=LABELLED), "unknown element"),
    "vacancy": (cif("Va1 0 0 0", columns=LABELLED, before="_chemical_formula_sum Fe"), "unknown element"),
    "neither label nor symbol": (cif("0 0 0", columns=LABELLED.removeprefix("_atom_site_label ")), "unknown element"),
    "deuterium": (cif("D D1 0 0 0"), "isotope"),
    "deuterium by label": (cif("D1 0 0 0", columns=LABELLED), "isotope"),
    "partial occupancy": (cif("Cs Cs1 0 0 0 0.5", columns=OCCUPIED), "disordered"),
    "occupancy over one": (cif("Cs Cs1 0 0 0 1.5", columns=OCCUPIED), "disordered"),
    "mixed site": (cif("Cs Cs1 0 0 0 0.3", "K K1 0 0 0 0.7", columns=OCCUPIED), "disordered"),
    "text occupancy": (cif("Cs Cs1 0 0 0 full", columns=OCCUPIED), "finite"),
    "shared site": (cif("Cs Cs1 0 0 0", "K K1 1 0 0"), "overlapping"),
    "overlap over the boundary": (cif("Cs Cs1 0.01 0 0", "K K1 0.99 0 0"), "overlapping"),
    "hydrogens not located": (cif("O O1 0 0 0", before="_chemical_formula_sum 'H2 O'"), "the file states"),
    "many blocks": ("\n".join(f"data_x{n}" for n in range(1001)), "1001 data blocks"),
    "two structures": (cif(*CSCL) + cif(*CSCL, name="y"), "2 structures"),
    "magnetic": (cif(*CSCL, before="_space_group_magn.number_BNS 1.1"), "magnetic"),
    "unknown group": (cif(*CSCL, before="_symmetry_space_group_name_H-M 'Q 9'"), "symmetry"),
    "no such group": (cif(*CSCL, before="_space_group_IT_number 999"), "symmetry"),
    "infinite group": (cif(*CSCL, before="_space_group_IT_number 1e400"), "no such space group"),
    "nonsense operation": (cif(*CSCL, before=operations("x,y,z", "hello")), "symmetry"),
    "singular operation": (cif(*CSCL, before=operations("x,y,z", "x,x,x")), "symmetry"),
    "no identity": (cif(*CSCL, before=operations("-x,y,z")), "symmetry"),
    "operations of no group": (cif(*CSCL, before=operations("x,y,z", "-y,x,z")), "no group"),
    "centring without one operation": (cif(*CSCL, before=operations(*PBAR_CENTRED[:-1])), "no group"),
    "no coordinates": (cif(*CSCL, before=operations("x,y,z", "h,k,l")), "no operation"),
    "code as operation": (cif(*CSCL, before=operations("x,y,z", "x,y,__import__")), "no operation"),
    "division by zero": (cif(*CSCL, before=operations("x,y,z", "x+1/0,y,z")), "no operation"),
    "overflowing operation": (cif(*CSCL, before=operations("x,y,z", "x+99999999999,y,z")), "no operation"),
    "endless operation": (cif(*CSCL, before=operations("x,y,z", "x,y,z" + "+1" * 99_999)), "no operation"),
    "no Hall symbol": (cif(*CSCL, before="_space_group_name_Hall 'Q 9'"), "symmetry"),
    "item twice": (cif(*CSCL) + "_note 1\n_note 2\n", "duplicate tag _note"),
    "item without a value": (cif(*CSCL) + "_note\n", "no value"),
    "cut in a quote": (cif(*CSCL) + "_note 'the", "unterminated"),
    "cut in a text field": (cif(*CSCL) + "_note\n;the", "unterminated"),
    "cut in another loop": (cif(*CSCL) + "loop_\n_bond_1\n_bond_2\nCs1", "number of values"),
    "cut between sites": (cif("C C1 0 0 0", "C C2 .5 .5 0", before="_chemical_formula_sum C3"), "the file states"),
    "two spellings of an item": (cif(*CSCL) + "_cell.length_a 4\n", "2 values"),
    "many operations": (cif(*CSCL, before=operations(*["x,y,z"] * 200)), "192"),
    "many rows": (cif(*["Cs Cs1 0 0 0"] * 1001), "at most 1000"),
    "many images": (
        cif(*[f"Cs Cs1 .1 .2 .{n}" for n in range(10, 40)], before="_space_group_IT_number 225"),
        "at most",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_with_the_reason(case: str) -> None:
    text, reason = HOSTILE[case]
    with pytest.raises(CrystalError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith("x: ")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_files_are_refused(path: Path) -> None:
    with pytest.raises(CrystalError, match=path.stem):
        cif_io.read_cif(path, MAX_ATOMS)


def test_damaged_text_never_raises_anything_else() -> None:
    """Real files cut at every place, with bytes replaced and lines lost, are read or refused."""
    rng = np.random.default_rng(0)
    for path in [GENUINE[0], *readable("cod_experimental")[:2]]:
        raw = path.read_bytes()
        damaged = [raw[:end] for end in range(0, len(raw), max(1, len(raw) // 60))]
        for _ in range(120):
            copy = bytearray(raw)
            for place in rng.integers(0, len(raw), 3):
                copy[place] = rng.choice(list(b"\n '\";#_0.-eX?"))
            damaged.append(bytes(copy))
        for content in damaged:
            try:
                crystal = parse(content.decode())
            except CrystalError:
                continue
            assert np.isfinite(crystal.cart_N3).all()


@pytest.mark.parametrize(
    "text",
    [
        *("'a " * 200_000, "\n" * 200_000, ";\n" * 200_001, "data_x\n" + "_a 'b\n" * 200_000),
        *("data_x loop_ " + "_a " * 200_000, "data_x loop_ " + " ".join(f"_a{n}" for n in range(200_000))),
        "data_x\n" + "\n".join(f"_a{n} 1" for n in range(200_000)),
        "\n".join(f"data_x{n}" for n in range(200_000)),
        cif(*CSCL, before=operations("x+1" * 100_000, *["x" * 100_000 + ",y,z"] * 100)),
        cif("Cs Cs1 0 0 " + "1" * 1_000_000 + "x"),
    ],
    ids=range(10),
)
@pytest.mark.timeout(20)
def test_time_is_linear_in_hostile_text(text: str) -> None:
    with pytest.raises(CrystalError):
        parse(text)


# Files


def test_id_is_the_name_without_its_ending(tmp_path: Path) -> None:
    """Only the ending goes: no `strip`, which would eat the letters of 'fic.cif' too."""
    for name, id in [("fic.cif", "fic"), ("cif.cif", "cif"), ("mp-1.2.cif", "mp-1.2")]:
        (tmp_path / name).write_text(cif(*CSCL))
        assert cif_io.read_cif(tmp_path / name, MAX_ATOMS).id == id
    assert cif_io.read_cif(tmp_path / "fic.cif", MAX_ATOMS, id="a/fic").id == "a/fic"
    (tmp_path / "fic.cif.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + cif(*CSCL).encode()))
    assert cif_io.read_cif(tmp_path / "fic.cif.gz", MAX_ATOMS).id == "fic"


def test_gzip_bomb_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 10_000)
    bomb = tmp_path / "bomb.cif.gz"
    bomb.write_bytes(gzip.compress(b" " * 5_000_000))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(CrystalError, match="over 10000 bytes"):
        cif_io.read_cif(bomb, MAX_ATOMS)
    plain = tmp_path / "large.cif"
    plain.write_bytes(b" " * 10_001)
    with pytest.raises(CrystalError, match="10000"):
        cif_io.read_cif(plain, MAX_ATOMS)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    packed = gzip.compress(cif(*CSCL).encode() * 50)
    contents = {
        "binary.cif": bytes(range(256)),
        "utf16.cif": cif(*CSCL).encode("utf-16"),
        "latin.cif": cif(*CSCL, name="\xe9").encode("latin-1"),
        "cut.cif.gz": packed[:-20],
        "damaged.cif.gz": packed[:30] + b"\xff" * 30 + packed[60:],
        "plain.cif.gz": cif(*CSCL).encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.cif").mkdir()
    for name in [*contents, "folder.cif", "missing.cif"]:
        with pytest.raises(CrystalError, match=name.split(".")[0]):
            cif_io.read_cif(tmp_path / name, MAX_ATOMS)


# Real crystals

PYMATGEN_FAILS = "mp-1184519.cif"  # ZeroDivisionError: its loop of bonds is empty
OTHER_ATOMS = {"halides__FeCl3-Molysite.cif": ((6, 2), (18, 18))}
"""File -> atoms of each element, ours and pymatgen's, which takes rhombohedral axes for hexagonal ones."""


@pytest.mark.parametrize("family", FAMILIES)
def test_most_of_a_family_is_read(family: str) -> None:
    """All files of computed families; of experimental ones those that are ordered and of the stated composition."""
    share = len(readable(family)) / sum(path.parent.name == family for path in GENUINE)
    assert share > 0.85 if family in {"cod_experimental", "obelix_randomized"} else share == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_pymatgen_reads(family: str) -> None:
    """Every file that is read: the same cell, the same atoms at the same places, modulo the lattice."""
    for path in readable(family):
        crystal = cif_io.read_cif(path, MAX_ATOMS)
        if path.name == PYMATGEN_FAILS:
            continue
        theirs = interop.from_pymatgen(interop.structure_from_cif(path.read_text(), path.stem), path.stem)
        np.testing.assert_allclose(crystal.lengths_angles, theirs.lengths_angles, rtol=1e-6)
        if path.name in OTHER_ATOMS:
            counts = tuple(tuple(found.composition.values()) for found in (crystal, theirs))
            assert counts == OTHER_ATOMS[path.name], path.name
            continue
        difference = theirs.frac_N3[None] - crystal.frac_N3[:, None]
        far = np.abs(difference - np.round(difference)).max(axis=-1)
        far[crystal.numbers_N[:, None] != theirs.numbers_N] = 1.0
        assert sorted(far.argmin(axis=1)) == list(range(len(theirs))), path.name
        assert far.min(axis=1).max() < 1e-4, path.name  # pymatgen moves 0.33333 to 1/3


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_file_is_not_half_read(family: str) -> None:
    """A file that states its formula, cut after any line, is read as a whole or refused."""
    for path in readable(family)[:4]:
        whole = cif_io.read_cif(path, MAX_ATOMS)
        lines = path.read_text().splitlines(keepends=True)
        if not any(line.startswith("_chemical_formula_sum") for line in lines):
            continue
        for end in range(len(lines)):
            try:
                crystal = parse("".join(lines[:end]))
            except CrystalError:
                continue
            assert crystal.composition == whole.composition, f"{path.name} up to line {end}"


@pytest.mark.parametrize("family", FAMILIES)
def test_written_cif_is_read_back(family: str) -> None:
    """Same atoms in the same order, to the 8 decimals written; writing again gives the same bytes."""
    for path in readable(family)[:12]:
        crystal = cif_io.read_cif(path, MAX_ATOMS)
        text = cif_io.write_cif(crystal)
        again = cif_io.parse_cif(text, crystal.id, MAX_ATOMS)
        assert again.numbers_N.tolist() == crystal.numbers_N.tolist()
        np.testing.assert_allclose(again.lengths_angles, crystal.lengths_angles, atol=1e-8)
        difference = again.frac_N3 - crystal.frac_N3
        np.testing.assert_allclose(difference, np.round(difference), atol=1.1e-8)
        assert cif_io.write_cif(again) == text


@pytest.mark.parametrize("seed", range(5))
def test_written_cif_is_read_by_pymatgen_and_gemmi(seed: int) -> None:
    crystal = replace(random_crystal(seed), id="a b/c'ä" * 20)
    text = cif_io.write_cif(crystal)
    from pymatgen.core.structure import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure = Structure.from_str(text, fmt="cif")
    assert_same_atoms(interop.from_pymatgen(structure, "x"), crystal, 1e-3)
    small = gemmi.make_small_structure_from_block(gemmi.cif.read_string(text).sole_block())
    assert [site.element.atomic_number for site in small.sites] == crystal.numbers_N.tolist()
    assert small.cell.a == pytest.approx(crystal.lengths_angles[0], abs=1e-8)


def test_written_cif_keeps_the_hand() -> None:
    """The same Cartesian crystal from a left-handed cell; distances alone would not tell it from its mirror image."""
    right = random_crystal(0)
    right = right if np.linalg.det(right.lattice_A) > 0 else replace(right, lattice_A=-right.lattice_A)
    swap = [1, 0, 2]
    left = Crystal(right.id, right.lattice_A[swap], right.frac_N3[:, swap], right.numbers_N)
    again = cif_io.parse_cif(cif_io.write_cif(left), "x", MAX_ATOMS)
    volumes = [np.linalg.det(c.cart_N3[1:4] - c.cart_N3[0]) for c in (left, images_of(again, left))]
    assert volumes[0] == pytest.approx(volumes[1], rel=1e-5)


def images_of(crystal: Crystal, like: Crystal) -> Crystal:
    """The crystal with each atom moved to the image whose coordinates are those of the inverted left-handed cell."""
    shift = np.round(-like.frac_N3 - crystal.frac_N3)
    return replace(crystal, frac_N3=crystal.frac_N3 + shift)


def test_written_bytes() -> None:
    crystal = crystal_of(4.0, [[0, 0, -1e-12], [0.5, 0.5, 0.999999999], [0.25, 0, 0]], [56, 8, 8])
    assert cif_io.write_cif(crystal).splitlines() == [
        "data_a_cube",
        "_symmetry_space_group_name_H-M 'P 1'",
        "_symmetry_Int_Tables_number 1",
        *(f"_cell_length_{x} 4.00000000" for x in "abc"),
        *(f"_cell_angle_{x} 90.00000000" for x in ("alpha", "beta", "gamma")),
        "_chemical_formula_sum 'O2 Ba1'",
        *("loop_", "_symmetry_equiv_pos_as_xyz", "'x, y, z'"),
        *("loop_", *TYPED.split(), "_atom_site_occupancy"),
        "Ba Ba1 0.00000000 0.00000000 0.00000000 1",
        "O O1 0.50000000 0.50000000 0.00000000 1",
        "O O2 0.25000000 0.00000000 0.00000000 1",
    ]


# pymatgen


def test_pymatgen_round_trip_is_exact() -> None:
    crystal = random_crystal(3)
    again = interop.from_pymatgen(interop.to_pymatgen(crystal), crystal.id)
    for name in ("lattice_A", "frac_N3", "numbers_N"):
        np.testing.assert_array_equal(getattr(again, name), getattr(crystal, name))


@pytest.mark.parametrize("species", [{"Fe": 0.5}, {"Fe": 0.5, "Co": 0.5}, "D", "X"])
def test_from_pymatgen_refuses(species: Any) -> None:
    from pymatgen.core.lattice import Lattice
    from pymatgen.core.structure import Structure

    with pytest.raises(CrystalError, match="x: "):
        interop.from_pymatgen(Structure(Lattice.cubic(3), [species], [[0, 0, 0]]), "x")


def test_from_pymatgen_drops_charges() -> None:
    from pymatgen.core.lattice import Lattice
    from pymatgen.core.structure import Structure

    structure = Structure(Lattice.cubic(4), ["Cs+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert interop.from_pymatgen(structure, "x").numbers_N.tolist() == [55, 17]


def test_match_of_equal_crystals_is_free_of_origin_cell_and_order() -> None:
    true = parse(cif("Ba A 0 0 0", "Ti B .5 .5 .52", "O C .5 .5 0", "O D .5 0 .5", "O E 0 .5 .5"))
    order = [4, 2, 0, 1, 3]
    moved = replace(true, frac_N3=true.frac_N3[order] + [0.1, 0.7, 0.3], numbers_N=true.numbers_N[order])
    doubled = Crystal(
        "x",
        true.lattice_A * [[2], [1], [1]],
        np.concatenate([true.frac_N3, true.frac_N3 + np.eye(3)[0]]) * [0.5, 1, 1],
        np.tile(true.numbers_N, 2),
    )
    larger = replace(true, lattice_A=true.lattice_A * 1.1)
    for predicted in (true, moved, doubled, larger):
        assert interop.match_rms(predicted, true) == pytest.approx(0.0, abs=1e-6)


def test_match_rms_is_the_displacement_over_the_length_of_an_atom() -> None:
    """One of two atoms moved by 0.4 A along x: each is 0.2 A off the best fit; a volume of 32 A^3 an atom."""
    true = parse(cif(*CSCL))
    moved = replace(true, frac_N3=true.frac_N3 + np.array([[0, 0, 0], [0.1, 0, 0]]))
    assert interop.match_rms(moved, true) == pytest.approx(0.2 / 32 ** (1 / 3), rel=1e-3)


def test_no_match() -> None:
    true = parse(cif(*CSCL))
    wrong_element = replace(true, numbers_N=np.array([55, 35]))
    wrong_cell = replace(true, lattice_A=true.lattice_A * [[3], [1], [1]])
    for predicted in (wrong_element, wrong_cell):
        assert interop.match_rms(predicted, true) is None


# Parquet


def table(path: Path, rows: list[dict[str, Any]], row_group_size: int = 1000) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def row(id: str, **changes: Any) -> dict[str, Any]:
    cell = dict(zip(("a", "b", "c", "alpha", "beta", "gamma"), (4.0, 5.0, 6.0, 90.0, 80.0, 120.0), strict=True))
    return {"id": id, **cell, "z": [55, 17], "frac": [0.0, 0.0, 0.0, 0.5, 0.5, 0.25]} | changes


@pytest.mark.parametrize("group", [1, 3, 1000])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (3, 3), (6, 7), (7, 7)])
def test_parquet_slices(tmp_path: Path, group: int, start: int, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rows, whatever the row groups and batches."""
    monkeypatch.setattr(parquet, "BATCH_ROWS", 2)
    path = table(tmp_path / "t.parquet", [row(str(n), a=4.0 + n) for n in range(7)], group)
    assert parquet.parquet_length(path) == 7
    crystals = [item for item in parquet.read_parquet_rows(path, start, stop) if isinstance(item, Crystal)]
    assert [crystal.id for crystal in crystals] == [str(n) for n in range(start, stop)]
    for crystal in crystals:
        assert crystal.lengths_angles == pytest.approx([4.0 + int(crystal.id), 5, 6, 90, 80, 120])
        np.testing.assert_array_equal(crystal.frac_N3, [[0, 0, 0], [0.5, 0.5, 0.25]])


BAD_ROWS: dict[str, dict[str, Any]] = {
    "nan": {"a": float("nan")},
    "infinite": {"b": float("inf")},
    "negative": {"c": -4.0},
    "null": {"alpha": None},
    "huge": {"a": 1e300},
    "angle": {"alpha": 20.0, "beta": 20.0, "gamma": 170.0},
    "gamma": {"gamma": 180.0},
    "no atoms": {"z": [], "frac": []},
    "null atoms": {"z": None},
    "null coordinate": {"frac": [0.0, None, 0.0, 0.5, 0.5, 0.25]},
    "infinite coordinate": {"frac": [0.0, float("inf"), 0.0, 0.5, 0.5, 0.25]},
    "short": {"frac": [0.0, 0.0, 0.0]},
    "unknown": {"z": [55, 119]},
    "negative z": {"z": [55, -17]},
    "overlap": {"frac": [0.0, 0.0, 0.0, 0.99, 0.0, 0.0]},
    "many": {"z": [1] * 30, "frac": np.linspace(0, 0.99, 90).tolist()},
}


def test_parquet_bad_rows_stand_alone(tmp_path: Path) -> None:
    bad = [row(name, **changes) for name, changes in BAD_ROWS.items()]
    path = table(tmp_path / "t.parquet", [row("first"), *bad, row("last")])
    items = list(parquet.read_parquet_rows(path, 0, len(bad) + 2, max_atoms=20))
    assert isinstance(items[0], Crystal)
    assert isinstance(items[-1], Crystal)
    for name, item in zip(BAD_ROWS, items[1:-1], strict=True):
        assert isinstance(item, tuple), name
        assert item[0] == name
        assert str(item[1]).startswith(f"{name}: ")
        assert "\n" not in str(item[1])


@pytest.mark.parametrize("changes", [{"z": ["Cs", "Cl"]}, {"z": [55.5, 17.0]}, {"a": "four"}, {"frac": "0 0 0"}])
def test_parquet_columns_of_another_type(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = table(tmp_path / "t.parquet", [row("r", **changes)])
    (item,) = parquet.read_parquet_rows(path, 0, 1)
    assert isinstance(item, tuple)
    assert item[0] == "r"


def test_parquet_unusable_tables(tmp_path: Path) -> None:
    lacking = table(tmp_path / "lacking.parquet", [{"id": "r", "a": 1.0}])
    with pytest.raises(DataError, match=r"lacking\.parquet.*'b'.*'frac'.*missing.*needed"):
        parquet.parquet_length(lacking)
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("text.parquet", "missing.parquet"):
        with pytest.raises(DataError, match=name):
            parquet.parquet_length(tmp_path / name)
    short = table(tmp_path / "short.parquet", [row("r")])
    for start, stop in [(0, 2), (-1, 1), (1, 0)]:
        with pytest.raises(DataError, match="the table has 1"):
            parquet.read_parquet_rows(short, start, stop)


def test_parquet_row_without_id_is_named_by_its_number(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", [row("r"), row("s") | {"id": None}])
    assert [crystal.id for crystal in parquet.read_parquet_rows(path, 0, 2) if isinstance(crystal, Crystal)][1] == "row 1"


def test_perovskites_of_the_sample() -> None:
    """Five atoms each, three of them anions of the family."""
    path = SAMPLE / "perov_5.parquet"
    stop = min(300, parquet.parquet_length(path))
    crystals = [item for item in parquet.read_parquet_rows(path, 0, stop) if isinstance(item, Crystal)]
    anions = {NUMBERS[symbol] for symbol in ("O", "N", "F", "S")}
    assert len(crystals) == stop
    assert all(len(crystal) == 5 and sum(z in anions for z in crystal.numbers_N.tolist()) >= 3 for crystal in crystals)


def test_tables_and_p1_files_are_read_without_pymatgen() -> None:
    """Its import takes seconds, which no worker that reads such inputs should pay."""
    code = (
        "import sys, pathlib; from dist_train.crystal import parquet; from dist_train.crystal import cif as cif_io;"
        f"list(parquet.read_parquet_rows(pathlib.Path({str(SAMPLE / 'perov_5.parquet')!r}), 0, 3));"
        f"cif_io.read_cif(pathlib.Path({str(readable('perov_5')[0])!r}), 1000);"
        "sys.exit('pymatgen' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)
