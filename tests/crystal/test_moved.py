"""Moved crystals are the same ones, written otherwise; digests know them again, and tell others apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.io.cif import CifParser

from dist_train.crystal.cif import parse_cif, write_symmetric_cif
from dist_train.crystal.digest import TOLERANCE_A, digest, digests_near, invariants
from dist_train.crystal.interop import match_rms, primitive_niggli
from dist_train.crystal.lattice import periodic_distances
from dist_train.crystal.moved import moved
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import conventional, crystal_system, space_group

SampleTable = Callable[[str], list[Crystal]]
SITES = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
SPECIES = np.array([56, 22, 8, 8, 8])


def perovskite(*edges_A: float) -> Crystal:
    return Crystal("p", np.diag(edges_A), SITES, SPECIES)


@given(seed=st.integers(0, 2**32), atoms=st.integers(1, 6))
def test_a_moved_crystal_is_the_same_in_another_writing(
    random_crystal: Callable[..., Crystal], seed: int, atoms: int
) -> None:
    crystal = random_crystal(seed, atoms)
    other = moved(crystal, np.random.default_rng(seed))
    assert other.volume_A3 == pytest.approx(crystal.volume_A3)
    assert np.sign(np.linalg.det(other.lattice_A)) == np.sign(np.linalg.det(crystal.lattice_A))
    assert other.composition == crystal.composition
    assert ((other.frac_N3 >= 0) & (other.frac_N3 < 1)).all()
    assert not np.allclose(other.lattice_A, crystal.lattice_A, atol=1e-3)
    sets = [np.sort(periodic_distances(c.lattice_A, c.frac_N3, c.frac_N3).ravel()) for c in (crystal, other)]
    np.testing.assert_allclose(*sets, atol=1e-6)
    np.testing.assert_allclose(invariants(other), invariants(crystal), atol=1e-6)


def test_every_freedom_is_used(sample_table: SampleTable) -> None:
    crystal = sample_table("perov_5")[0]
    others = [moved(crystal, np.random.default_rng(seed)) for seed in range(20)]
    assert all(match_rms(other, crystal) == pytest.approx(0.0, abs=1e-6) for other in others)
    assert len({tuple(other.numbers_N) for other in others}) > 5
    assert len({tuple(other.lengths_angles.round(3)) for other in others}) > 10
    assert len({tuple(other.frac_N3[0].round(3)) for other in others}) == 20
    again = moved(crystal, np.random.default_rng(0))
    np.testing.assert_array_equal(again.frac_N3, others[0].frac_N3)


def test_crystals_are_known_again_and_told_apart(sample_table: SampleTable) -> None:
    """Moved, and with four decimals as in a file: found by its own digest, and by no other crystal's."""
    for name in ("perov_5", "materials_project"):
        crystals = sample_table(name)[::25]
        known = {digest(crystal): crystal.id for crystal in crystals}
        assert len(known) == len(crystals)
        for seed, crystal in enumerate(crystals):
            other = moved(replace(crystal, frac_N3=crystal.frac_N3.round(4)), np.random.default_rng(seed))
            near = digests_near(replace(other, id="another id"))
            assert {known[found] for found in near if found in known} == {crystal.id}


def test_phases_of_an_element_are_known_again_and_told_apart() -> None:
    """Carbons of which most have neighbours alike: one in five of these is listed again, nearly the same."""
    table = Path(__file__).parents[2] / "data" / "benchmarks" / "carbon_24_test_half_a.parquet"
    crystals = [row for row in read_parquet_rows(table, 0, 200) if isinstance(row, Crystal)]
    known = {digest(crystal) for crystal in crystals}
    assert len(known) > 150
    for seed, crystal in enumerate(crystals[::10]):
        other = moved(replace(crystal, frac_N3=crystal.frac_N3.round(4)), np.random.default_rng(seed))
        assert digest(crystal) in digests_near(replace(other, id="another id"))
        assert invariants(crystal).shape == (6,)


def test_orderings_of_one_framework_are_told_apart(sample_table: SampleTable) -> None:
    """Two real cells of one formula whose atoms have the same distances: only which atoms are near differs."""
    pair = [crystal for crystal in sample_table("materials_project") if crystal.id in ("mp-1174271", "mp-1174265")]
    assert pair[0].formula == pair[1].formula
    assert not set(digests_near(pair[0])) & set(digests_near(pair[1]))


def test_a_supercell_is_the_same_crystal() -> None:
    small = perovskite(4.0, 4.1, 4.2)
    frac = np.concatenate([SITES, SITES + np.array([0, 0, 1])]) / [1, 1, 2]
    double = Crystal("d", np.diag([4.0, 4.1, 8.4]), frac, np.tile(SPECIES, 2))
    np.testing.assert_allclose(invariants(double), invariants(small), atol=1e-9)
    assert digest(small) in digests_near(double)


@pytest.mark.parametrize(
    "other",
    [
        perovskite(4.0, 4.1, 4.23),
        replace(perovskite(4.0, 4.1, 4.2), numbers_N=SPECIES[[1, 0, 2, 3, 4]]),
        replace(perovskite(4.0, 4.1, 4.2), numbers_N=SPECIES[[0, 2, 1, 3, 4]]),
        replace(perovskite(4.0, 4.1, 4.2), frac_N3=SITES + np.array([0, 0, 0.03]) * (np.arange(5) == 1)[:, None]),
    ],
    ids=["longer", "sites exchanged", "other sites exchanged", "displaced"],
)
def test_a_like_crystal_is_another(other: Crystal) -> None:
    crystal = perovskite(4.0, 4.1, 4.2)
    assert not set(digests_near(crystal)) & set(digests_near(other))


def test_a_length_near_the_edge_of_its_bin_is_found_from_either_side() -> None:
    """Isotropic scaling moves the cell's edge per atom over the edge of a bin in steps below the tolerance."""
    edges = 4.0 + np.arange(0, 0.05, TOLERANCE_A / 2)
    digests = [digest(perovskite(*[edge] * 3)) for edge in edges]
    assert len(set(digests)) > 1
    for own, edge in zip(digests, edges, strict=True):
        assert own in digests_near(perovskite(*[edge + TOLERANCE_A / 4] * 3))


@pytest.mark.parametrize(
    ("edges", "system"),
    [
        ((4.0, 4.0, 4.0), "cubic"),
        ((4.0, 4.0, 4.3), "tetragonal"),
        ((4.0, 4.3, 4.6), "orthorhombic"),
        ((4.0, 4.0, 4.05), "cubic"),
    ],
)
def test_crystal_systems(edges: tuple[float, ...], system: str) -> None:
    """The last one is cubic within the tolerance; none changes when it is moved."""
    crystal = perovskite(*edges)
    assert crystal_system(crystal) == system
    if system != "cubic":
        assert crystal_system(crystal, 1e-3) == system
    assert crystal_system(moved(crystal, np.random.default_rng(0)).reduced()) == system


def test_systems_of_other_lattices() -> None:
    rng = np.random.default_rng(0)
    lattice = np.array([[3.0, 0, 0], [0.4, 4, 0], [0.3, 0.9, 5]])
    assert crystal_system(Crystal("t", lattice, rng.random((4, 3)), np.array([1, 5, 9, 13]))) == "triclinic"
    hexagonal = np.array([[3.2, 0, 0], [-1.6, 1.6 * 3**0.5, 0], [0, 0, 5.2]])
    magnesium = Crystal("Mg", hexagonal, np.array([[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]), np.array([12, 12]))
    assert crystal_system(magnesium) == "hexagonal"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_cif_with_symmetry_holds_the_crystal(sample_table: SampleTable) -> None:
    """Read by pymatgen, too: as many atoms as in the conventional cell, in the space group, and the same crystal."""
    groups = set()
    for crystal in sample_table("materials_project")[::20]:
        setting = conventional(crystal)
        assert setting
        text = write_symmetric_cif(setting)
        back, other = parse_cif(text, crystal.id, 1000), CifParser.from_str(text).parse_structures(primitive=False)[0]
        assert len(back) == len(other) == len(setting.crystal)
        assert space_group(back, 0.01) == setting.group == space_group(crystal)
        assert match_rms(*(primitive_niggli(one) for one in (back, crystal))) == pytest.approx(0.0, abs=0.05)
        groups.add(setting.group)
    assert len(groups) > 15
