"""Validity of a composition by SMACT's rules: could its elements carry charges that make a plausible neutral compound?

The only file that imports smact (Davies et al., JOSS 2019), inside a function: it is an optional package, and its import
loads pandas. The rules are those that CDVAE's evaluation applied (Xie et al., ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from math import inf
from typing import NamedTuple

from dist_train.crystal.elements import NUMBERS
from dist_train.errors import ConfigError


class Chemistry(NamedTuple):
    """What SMACT knows of an element: oxidation states, Pauling electronegativity if there is one, whether a metal."""

    states: tuple[int, ...]
    electronegativity: float | None
    metal: bool


def smact_installed() -> bool:
    """Whether `composition_valid` can judge at all."""
    return find_spec("smact") is not None


def composition_valid(composition: Mapping[int, int]) -> bool:
    """One element, metals only, or some choice of one oxidation state per element is neutral and in Pauling's order.

    composition: atomic number -> atoms; a common divisor of the counts changes nothing. In Pauling's order means that
    every positive element is less electronegative than every negative one; SMACT has no value for He, Ne, Ar, Pm, Rn and
    Lr, and a pair with an unknown value passes. An element without oxidation states (He, Ne, Ar) is valid only alone.
    The states are SMACT's list of 2014 (CDVAE's), not the ICSD list that newer versions of smact take by default.
    Raises ConfigError where smact isn't installed, KeyError for an unknown atomic number.
    """
    elements = [(count, chemistry()[number]) for number, count in composition.items()]
    if len(elements) == 1 or all(element.metal for _, element in elements):
        return bool(elements)
    known = {element.electronegativity for _, element in elements if element.electronegativity is not None}
    return any(_can_be_neutral(elements, limit) for limit in (*known, inf))


@cache
def chemistry() -> dict[int, Chemistry]:
    """Atomic number -> what SMACT knows of the element. Raises ConfigError where smact isn't installed."""
    try:
        from smact import element_dictionary, metals
    except ImportError as error:
        raise ConfigError(
            f"validity of compositions needs the package smact ({error}): pip install 'dist-train[eval]'"
        ) from error
    return {
        NUMBERS[symbol]: Chemistry(tuple(known.oxidation_states_smact14 or ()), known.pauling_eneg, symbol in metals)
        for symbol, known in element_dictionary(NUMBERS).items()
    }


def _can_be_neutral(elements: list[tuple[int, Chemistry]], limit: float) -> bool:
    """Whether states add up to no charge if positive elements must lie below `limit` and negative ones not below it.

    Charges that can be reached element by element: their number grows with the atoms, that of choices of states
    exponentially with the elements. A choice is in Pauling's order if and only if its least electronegative negative
    element is such a limit, so trying every element's value (and none, where no value of a negative one is known) misses
    nothing.
    """
    charges = {0}
    for count, (states, value, _) in elements:
        allowed = [state for state in states if not state or value is None or (value < limit) == (state > 0)]
        charges = {charge + count * state for charge in charges for state in allowed}
    return 0 in charges
