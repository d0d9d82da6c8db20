"""Validity of compositions: known compounds, and equality with the plain product of all oxidation states."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dist_train.crystal import validity
from dist_train.crystal.elements import NUMBERS, SYMBOLS
from dist_train.crystal.validity import Chemistry, chemistry, composition_valid, smact_installed
from dist_train.errors import ConfigError

SAMPLE = Path(__file__).parents[2] / "data" / "sample"

needs_smact = pytest.mark.skipif(not smact_installed(), reason="smact is not installed")


def parsed(formula: str) -> dict[int, int]:
    """'Na Cl2' as atomic number -> atoms."""
    return {NUMBERS[symbol]: int(n or 1) for symbol, n in re.findall(r"([A-Z][a-z]?)(\d*)", formula)}


def valid_by_product(composition: Mapping[int, int], table: Mapping[int, Chemistry]) -> bool:
    """The definition, word by word: every combination of one state per element, every pair of ions."""
    elements = [table[z] for z in composition]
    if len(elements) == 1 or all(element.metal for element in elements):
        return True
    for states in product(*(element.states for element in elements)):
        if sum(state * count for state, count in zip(states, composition.values(), strict=True)):
            continue
        ions = [(state, element.electronegativity) for state, element in zip(states, elements, strict=True)]
        if not any(
            first * second < 0 and a is not None and b is not None and (a >= b if first > 0 else b >= a)
            for (first, a), (second, b) in combinations(ions, 2)
        ):
            return True
    return False


def real_compositions() -> list[dict[int, int]]:
    """Different compositions of the shipped crystals, of up to six elements."""
    found = set()
    for name, step in (("perov_5", 8), ("materials_project", 2)):
        for numbers in pq.read_table(SAMPLE / f"{name}.parquet", columns=["z"])["z"].to_pylist()[::step]:
            found.add(tuple(sorted(Counter(numbers).items())))
    return [dict(composition) for composition in sorted(found)]


@needs_smact
@pytest.mark.parametrize(
    ("formula", "valid", "why"),
    [
        ("Na Cl", True, "+1 -1"),
        ("Na Cl2", False, "no sum of +-1 and two equal odd charges is 0"),
        ("Na4 Cl4", True, "a common divisor"),
        ("Na4 Cl8", False, "a common divisor"),
        ("Ba Ti O3", True, "+2 +4 -2"),
        ("Si", True, "one element"),
        ("Si8", True, "one element, several atoms"),
        ("He", True, "one element, without oxidation states"),
        ("Ar F2", False, "argon has no oxidation states"),
        ("Cu Zn", True, "metals"),
        ("Ba3 Li7", True, "metals, though no charges would do"),
        ("Ge Sb Po", True, "metals to SMACT"),
        ("Fe2 O3", True, "+3 -2"),
        ("Fe3 O4", False, "one state for each element: no mixed valence"),
        ("W B", False, "neutral as B+2 W-2 only, and boron is the more electronegative"),
        ("Pd H", False, "equally electronegative is not less electronegative"),
        ("Pm2 O3", True, "promethium's electronegativity is missing"),
        ("Pm Cl5", False, "missing electronegativity, no charges"),
        ("Pm Pd H4", False, "promethium may pass, palladium and hydrogen may not"),
        ("Mg B2", False, "boron is never negative in the list of 2014; in the one of 2024 it is"),
    ],
)
def test_known_compositions(formula: str, valid: bool, why: str) -> None:
    assert composition_valid(parsed(formula)) == valid, why


@needs_smact
def test_neither_nothing_nor_no_element_is_a_composition() -> None:
    assert not composition_valid({})
    with pytest.raises(KeyError):
        composition_valid({0: 1, 8: 1})


@needs_smact
def test_real_compositions_are_judged_as_by_the_plain_product() -> None:
    compositions = real_compositions()
    found = [composition_valid(composition) for composition in compositions]
    assert found == [valid_by_product(composition, chemistry()) for composition in compositions]
    assert min(found.count(True), found.count(False)) > 50


@needs_smact
def test_real_compositions_are_judged_as_by_smact_itself() -> None:
    """Where its newer versions still do as CDVAE's did: they fail a missing electronegativity."""
    from smact.screening import smact_validity

    unknown = {z for z, element in chemistry().items() if element.electronegativity is None}
    for composition in real_compositions():
        if not unknown & composition.keys():
            formula = "".join(f"{SYMBOLS[z]}{count}" for z, count in composition.items())
            assert composition_valid(composition) == smact_validity(formula, oxidation_states_set="smact14"), formula


def test_any_chemistry_is_judged_as_by_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random elements: without charge, without states, equally or unknown electronegative, never negative, metals."""
    rng = random.Random(0)
    outcomes = Counter[bool]()
    for _ in range(2000):
        table = {
            z: Chemistry(
                tuple(rng.sample(range(-4, 5), rng.choice((0, 1, 2, 3, 3)))),
                rng.choice((None, 1.0, 1.5, 2.0, 2.5, 3.0)),
                rng.random() < 0.5,
            )
            for z in range(1, 6)
        }
        composition = {z: rng.randint(1, 6) for z in rng.sample(range(1, 6), rng.randint(1, 5))}
        monkeypatch.setattr(validity, "chemistry", lambda table=table: table)
        expected = valid_by_product(composition, table)
        assert composition_valid(composition) == expected, (composition, table)
        outcomes[expected] += 1
    assert min(outcomes.values()) > 500


@needs_smact
def test_many_elements_with_many_states_take_no_time() -> None:
    """A choice of 4e11, a product that would run for days; even charges never make up for the odd one of hydrogen."""
    symbols = ("C", "N", "S", "Cl", "Mn", "Fe", "Tc", "Ru", "Re", "Os", "Ir", "Pt")
    assert not composition_valid({NUMBERS[symbol]: 20 for symbol in symbols} | {NUMBERS["H"]: 401})


def test_without_smact_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smact", None)
    chemistry.cache_clear()
    assert not smact_installed()
    with pytest.raises(ConfigError, match=r"smact.*pip install 'dist-train\[eval\]'"):
        composition_valid({11: 1, 17: 1})
