"""Crystals with other elements: the same sites, in the frame that the grid takes, and nothing hangs on what came before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dist_train.config import GridSpec
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.structure import Crystal
from dist_train.crystal.substitute import substituted

CUBE = GridSpec(canonical=True, shape=12, max_spacing_A=0.5)
ADAPTIVE = GridSpec(canonical=True, shape="adaptive", multiple=4, max_spacing_A=0.5)
Table = Callable[[str], list[Crystal]]


def known(crystals: list[Crystal]) -> list[int]:
    return sorted({z for crystal in crystals for z in crystal.composition})


@pytest.mark.parametrize(("table", "spec"), [("perov_5", CUBE), ("materials_project", ADAPTIVE)])
def test_the_sites_stay_and_the_elements_change(sample_table: Table, table: str, spec: GridSpec) -> None:
    crystals = [representable(crystal, spec) for crystal in sample_table(table)[:60]]
    elements = known(crystals)
    changed = 0
    for seed, crystal in enumerate(crystals):
        other = substituted(crystal, spec, elements, 0.5, seed)
        assert sorted(other.composition.values()) == sorted(crystal.composition.values())
        assert set(other.composition) <= set(elements)
        assert other.volume_A3 == pytest.approx(crystal.volume_A3)
        assert grid_shape(other.lattice_A, spec) == grid_shape(crystal.lattice_A, spec)
        again = representable(other, spec)
        np.testing.assert_allclose(again.lengths_angles, other.lengths_angles, atol=1e-5)
        changed += other.formula != crystal.formula
    assert changed > 30


def test_it_is_a_pure_function_of_seed_and_crystal(sample_table: Table) -> None:
    crystals = [representable(crystal, CUBE) for crystal in sample_table("perov_5")[:20]]
    elements = known(crystals)
    first = [substituted(crystal, CUBE, elements, 0.5, 7).to_json() for crystal in crystals]
    np.random.default_rng().random(3)
    assert first == [substituted(crystal, CUBE, elements, 0.5, 7).to_json() for crystal in crystals]
    assert first != [substituted(crystal, CUBE, elements, 0.5, 8).to_json() for crystal in crystals]


def test_without_a_chance_or_without_other_elements_nothing_changes(sample_table: Table) -> None:
    crystal = representable(sample_table("perov_5")[0], CUBE)
    assert substituted(crystal, CUBE, range(1, 90), 0.0, 1) is crystal
    assert substituted(crystal, CUBE, list(crystal.composition), 1.0, 1) is crystal


def test_each_element_is_exchanged_with_the_chance_that_is_asked_for(sample_table: Table) -> None:
    crystal = representable(sample_table("perov_5")[0], CUBE)
    kinds = set(crystal.composition)
    left = [len(kinds & set(substituted(crystal, CUBE, range(1, 90), 0.3, seed).composition)) for seed in range(400)]
    assert np.mean(left) == pytest.approx(0.7 * len(kinds), abs=0.15)
