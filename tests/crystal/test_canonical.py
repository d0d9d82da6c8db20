"""The canonical frame: real crystals come out the same in whatever cell, at whatever origin and order they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.canonical import canonical
from dist_train.crystal.lattice import periodic_distances
from dist_train.crystal.moved import moved
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize

Table = Callable[[str], list[Crystal]]
GRID = GridSpec(shape=12, max_spacing_A=9.0, channels=("occupancy", "period", "group"), niggli=False)
SAME = 0.02
"""Greatest relative difference of two pictures that count as the same."""


def displaced(crystal: Crystal, rng: np.random.Generator, noise_A: float) -> Crystal:
    """The crystal written otherwise, each atom moved at random."""
    away = rng.normal(scale=noise_A, size=(len(crystal), 3)) @ np.linalg.inv(crystal.lattice_A)
    return moved(replace(crystal, frac_N3=crystal.frac_N3 + away), rng)


def picture(crystal: Crystal) -> NDArray[np.float32]:
    return voxelize(crystal, GRID).density_CDHW.copy()


def share_alike(crystals: list[Crystal], noise_A: float = 1e-10, same: float = SAME) -> float:
    """Share of crystals whose canonical picture and cell are the same when they are moved."""
    rng, alike = np.random.default_rng(0), 0
    for crystal in crystals:
        one, other = canonical(crystal), canonical(displaced(crystal, rng, noise_A))
        expected = picture(one)
        difference = np.linalg.norm(picture(other) - expected) / np.linalg.norm(expected)
        alike += difference < same and np.abs(one.lengths_angles - other.lengths_angles).max() < 0.05
    return alike / len(crystals)


@pytest.mark.parametrize(("table", "count"), [("perov_5", 120), ("materials_project", 160)])
def test_one_frame_for_all_ways_of_writing_a_crystal(sample_table: Table, table: str, count: int) -> None:
    assert share_alike(sample_table(table)[:count]) == 1


def test_the_frame_stays_where_atoms_move_a_little(sample_table: Table) -> None:
    """Not for all: some crystals have two different frames that are about as good."""
    assert share_alike(sample_table("materials_project")[:160], noise_A=0.003, same=SAME + 0.04) >= 0.85


def test_it_is_the_same_crystal_of_the_same_hand(sample_table: Table) -> None:
    """Only the cell and the origin change: in space, the atoms are those given, all moved by one vector."""
    for crystal in sample_table("materials_project")[:40]:
        turned = canonical(moved(crystal, np.random.default_rng(1)))
        assert np.linalg.det(turned.lattice_A) > 0
        assert turned.volume_A3 == pytest.approx(crystal.volume_A3)
        given = moved(crystal, np.random.default_rng(1))
        start = int(np.flatnonzero((turned.frac_N3 == 0).all(1))[0])
        shifted = replace(given, frac_N3=given.frac_N3 - given.frac_N3[start])
        place = shifted.cart_N3 @ np.linalg.inv(turned.lattice_A)
        assert np.diag(periodic_distances(turned.lattice_A, place, turned.frac_N3)).max() < 1e-6


def test_a_canonical_crystal_stays_as_it_is(sample_table: Table) -> None:
    for crystal in sample_table("perov_5")[:40]:
        once = canonical(crystal)
        assert np.abs(picture(canonical(once)) - picture(once)).max() < 1e-3


def test_settings_that_only_a_fine_wave_tells_apart() -> None:
    """Pyrite (Pa-3): turned by a quarter it is another picture, whose coarse waves are the same."""
    u = 0.385
    sulphur = np.array([[u, u, u], [0.5 - u, -u, 0.5 + u], [-u, 0.5 + u, 0.5 - u], [0.5 + u, 0.5 - u, -u]])
    frac = np.concatenate([sulphur, -sulphur, 0.5 * (1 - np.eye(4)[:, 1:]) * np.array([[0.0], [1], [1], [1]])])
    crystal = Crystal("pyrite", 5.418 * np.eye(3), frac, np.array([16] * 8 + [26] * 4))
    assert share_alike([crystal] * 10) == 1


def test_a_lattice_of_many_equal_cells_has_one() -> None:
    """A Heusler compound: eight cells of the face-centred lattice have the same edges and, but for order, angles."""
    lattice = 3.0 * np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    crystal = Crystal("heusler", lattice, np.outer([0.0, 0.25, 0.5, 0.75], np.ones(3)), np.array([13, 29, 25, 29]))
    assert share_alike([crystal] * 10) == 1
