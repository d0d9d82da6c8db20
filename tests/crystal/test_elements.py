"""The periodic table against a table by columns, written by hand from the other direction."""

from __future__ import annotations

import numpy as np
import pytest

from dist_train.crystal.elements import MAX_Z, NUMBERS, PLACES, SYMBOLS, element_code

COLUMNS = {
    1: "H Li Na K Rb Cs Fr",
    2: "Be Mg Ca Sr Ba Ra",
    3: "Sc Y Lu Lr",
    4: "Ti Zr Hf",
    5: "V Nb Ta",
    6: "Cr Mo W",
    7: "Mn Tc Re",
    8: "Fe Ru Os",
    9: "Co Rh Ir",
    10: "Ni Pd Pt",
    11: "Cu Ag Au",
    12: "Zn Cd Hg",
    13: "B Al Ga In Tl",
    14: "C Si Ge Sn Pb",
    15: "N P As Sb Bi",
    16: "O S Se Te Po",
    17: "F Cl Br I At",
    18: "He Ne Ar Kr Xe Rn",
}
LANTHANIDES = ["La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb"]
ACTINIDES = ["Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No"]


def test_every_element_stands_in_its_column() -> None:
    groups = {symbol: group for group, column in COLUMNS.items() for symbol in column.split()}
    groups |= dict.fromkeys(LANTHANIDES + ACTINIDES, 3)
    assert {symbol: PLACES[z, 1] for symbol, z in NUMBERS.items()} == groups


def test_columns_descend_one_period_at_a_time() -> None:
    for column in COLUMNS.values():
        periods = [int(PLACES[NUMBERS[symbol], 0]) for symbol in column.split()]
        assert periods == list(range(periods[0], periods[0] + len(periods)))
    assert [PLACES[NUMBERS[column.split()[0]], 0] for column in COLUMNS.values()] == [1, 2] + [4] * 10 + [2] * 5 + [1]


def test_f_block_places() -> None:
    places = {symbol: int(PLACES[z, 2]) for symbol, z in NUMBERS.items() if PLACES[z, 2]}
    assert places == {symbol: place for row in (LANTHANIDES, ACTINIDES) for place, symbol in enumerate(row, start=1)}
    assert {int(PLACES[NUMBERS[symbol], 0]) for symbol in LANTHANIDES} == {6}
    assert {int(PLACES[NUMBERS[symbol], 0]) for symbol in ACTINIDES} == {7}


@pytest.mark.parametrize(
    ("symbol", "z"),
    [("H", 1), ("C", 6), ("O", 8), ("Fe", 26), ("Xe", 54), ("La", 57), ("Lu", 71), ("Au", 79), ("U", 92), ("Lr", 103)],
)
def test_atomic_numbers(symbol: str, z: int) -> None:
    assert NUMBERS[symbol] == z
    assert SYMBOLS[z] == symbol


def test_codes_of_period_group_and_f_block_tell_all_elements_apart() -> None:
    codes = np.concatenate([element_code(kind) for kind in ("period", "group", "f_block")], axis=1)
    assert codes.shape == (MAX_Z + 1, 7 + 18 + 14)
    assert MAX_Z == 103
    assert len(np.unique(codes, axis=0)) == MAX_Z + 1


@pytest.mark.parametrize("kind", ["period", "group", "f_block"])
def test_codes_are_one_hot_at_the_place(kind: str) -> None:
    column = PLACES[:, ["period", "group", "f_block"].index(kind)]
    code = element_code(kind)
    np.testing.assert_array_equal(code.sum(1), column > 0)
    np.testing.assert_array_equal(code.argmax(1)[column > 0] + 1, column[column > 0])


def test_codes_of_one_channel() -> None:
    np.testing.assert_array_equal(element_code("occupancy")[:, 0], [0] + [1] * MAX_Z)
    np.testing.assert_array_equal(element_code("z_density")[:, 0], np.arange(MAX_Z + 1))


def test_no_atom_has_no_code() -> None:
    for kind in ("occupancy", "z_density", "period", "group", "f_block"):
        assert not element_code(kind)[0].any()


def test_unknown_kind() -> None:
    with pytest.raises(KeyError, match="colour"):
        element_code("colour")
