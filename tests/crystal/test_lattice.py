"""Lattice mathematics against round trips and brute force in skewed cells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_train.crystal.lattice import (
    from_lengths_angles,
    image_offsets,
    lengths_angles,
    niggli,
    periodic_distances,
    plane_spacings,
    shortest_distance,
)

FloatArray = NDArray[np.float64]

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.tuples(*[st.floats(0.5, 60)] * 3)
ANGLES = st.tuples(*[st.floats(65, 115)] * 3)  # any three of these span a cell


def compact_cell(rng: np.random.Generator) -> FloatArray:
    """A triclinic cell that is nearly its own reduced one."""
    rows = np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * rng.uniform(2.5, 14.0, (3, 1))


def shear(rng: np.random.Generator, steps: int = 3) -> NDArray[np.int64]:
    """An integer matrix of determinant 1: the same lattice in another, skewed basis."""
    matrix = np.eye(3, dtype=np.int64)
    for _ in range(steps):
        i, j = rng.permutation(3)[:2]
        matrix[i] += rng.integers(-2, 3) * matrix[j]
    return matrix


def images(reach: int) -> FloatArray:
    """[(2 reach + 1)^3, 3] integer translations."""
    axis = np.arange(-reach, reach + 1)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3).astype(np.float64)


def brute_distances(compact: FloatArray, cart_N3: FloatArray, cart_M3: FloatArray) -> FloatArray:
    """[N, M] shortest distances over thousands of images, in a basis where so many are surely enough."""
    difference = (cart_M3[None] - cart_N3[:, None]) @ np.linalg.inv(compact)
    difference -= np.floor(difference)
    vectors = (difference[:, :, None] + images(7)) @ compact
    return np.asarray(np.linalg.norm(vectors, axis=-1).min(-1))


@given(lengths=LENGTHS, angles=ANGLES)
def test_parameters_round_trip(lengths: tuple[float, ...], angles: tuple[float, ...]) -> None:
    lattice = from_lengths_angles(np.array([*lengths, *angles]))
    np.testing.assert_allclose(lengths_angles(lattice), [*lengths, *angles], rtol=1e-9)
    assert np.linalg.det(lattice) > 0
    np.testing.assert_array_equal(lattice[np.triu_indices(3, 1)], 0.0)


@given(seed=SEEDS)
def test_parameters_name_the_cell_up_to_rotation(seed: int) -> None:
    lattice = compact_cell(np.random.default_rng(seed))
    again = from_lengths_angles(lengths_angles(lattice))
    np.testing.assert_allclose(again @ again.T, lattice @ lattice.T, atol=1e-9)


def test_known_hexagonal_cell() -> None:
    lattice = from_lengths_angles(np.array([3.0, 3.0, 5.0, 90.0, 90.0, 120.0]))
    np.testing.assert_allclose(lattice, [[3, 0, 0], [-1.5, 1.5 * np.sqrt(3), 0], [0, 0, 5]], atol=1e-12)


def test_angles_are_between_the_right_vectors() -> None:
    lattice = np.array([[1.0, 0, 0], [0, 2.0, 0], [1.0, 0, 1.0]])
    np.testing.assert_allclose(lengths_angles(lattice), [1, 2, np.sqrt(2), 90, 45, 90], atol=1e-9)


@pytest.mark.parametrize(
    "parameters",
    [
        (3, 3, 3, 60, 60, 120),  # flat
        (3, 3, 3, 60, 50, 120),
        (3, 3, 3, 130, 130, 130),  # adds up to more than 360
        (3, 3, 3, 90, 90, 180),
        (3, 3, 3, 0, 90, 90),
        (-3, 3, 3, 90, 90, 90),
        (3, 0, 3, 90, 90, 90),
        (3, 3, np.nan, 90, 90, 90),
        (np.inf, 3, 3, 90, 90, 90),
        (3, 3, 3, 90, 90, np.nan),
    ],
)
def test_parameters_of_no_cell(parameters: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"no cell has the parameters \["):
        from_lengths_angles(np.array(parameters, dtype=np.float64))


@given(seed=SEEDS)
def test_plane_spacings_are_volume_over_face(seed: int) -> None:
    lattice = compact_cell(np.random.default_rng(seed))
    faces = [np.linalg.norm(np.cross(lattice[i - 2], lattice[i - 1])) for i in range(3)]
    np.testing.assert_allclose(plane_spacings(lattice), abs(np.linalg.det(lattice)) / faces, rtol=1e-10)


@given(seed=SEEDS, cutoff=st.floats(0.1, 8.0))
def test_image_offsets_miss_no_image_within_the_cutoff(seed: int, cutoff: float) -> None:
    rng = np.random.default_rng(seed)
    lattice = shear(rng, 2) @ compact_cell(rng)
    differences = rng.uniform(-0.5, 0.5, (20, 1, 3))
    near = np.linalg.norm((differences + images(12)) @ lattice, axis=-1).min(0) <= cutoff
    offered = {tuple(offset) for offset in image_offsets(lattice, cutoff).tolist()}
    assert {tuple(offset) for offset in images(12)[near].astype(int).tolist()} <= offered


@given(seed=SEEDS)
@settings(max_examples=60)
def test_periodic_distances_equal_brute_force_in_skewed_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compact = compact_cell(rng)
    skewed = shear(rng) @ compact
    first, second = rng.uniform(-2, 2, (3, 3)), rng.uniform(-2, 2, (4, 3))
    distances = periodic_distances(skewed, first, second)
    np.testing.assert_allclose(distances, brute_distances(compact, first @ skewed, second @ skewed), atol=1e-9)


@given(seed=SEEDS)
def test_shortest_distance_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compact = compact_cell(rng)
    skewed = shear(rng) @ compact
    frac = rng.uniform(-2, 2, (rng.integers(1, 5), 3))
    between = brute_distances(compact, frac @ skewed, frac @ skewed)[np.triu_indices(len(frac), 1)]
    vectors = images(7)[np.any(images(7) != 0, axis=1)] @ compact
    expected = min(between.min(initial=np.inf), np.linalg.norm(vectors, axis=1).min())
    assert shortest_distance(skewed, frac) == pytest.approx(expected, abs=1e-9)


def test_shortest_distance_of_one_atom_is_to_its_own_image() -> None:
    skewed = np.array([[3.0, 0, 0], [0, 4.0, 0], [5.9, 0, 0.5]])  # c - 2 a is the shortest vector
    assert shortest_distance(skewed, np.array([[0.2, 0.3, 0.4]])) == pytest.approx(np.hypot(0.1, 0.5))


def test_atoms_at_one_place() -> None:
    assert shortest_distance(np.eye(3) * 4, np.array([[0.1, 0.2, 0.3], [1.1, -0.8, 0.3]])) == pytest.approx(0, abs=1e-9)


@given(seed=SEEDS)
def test_niggli_cell_is_the_same_lattice_and_does_not_depend_on_the_basis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compact = compact_cell(rng)
    reduced, other = niggli(shear(rng) @ compact), niggli(shear(rng) @ compact)
    assert reduced is not None
    assert other is not None
    basis_change = reduced @ np.linalg.inv(compact)
    np.testing.assert_allclose(basis_change, np.round(basis_change), atol=1e-8)
    assert abs(np.linalg.det(basis_change)) == pytest.approx(1)
    np.testing.assert_allclose(lengths_angles(reduced), lengths_angles(other), atol=1e-4)


def test_niggli_gives_none_where_the_reduction_fails() -> None:
    thin = np.array([[0.02, 0, 0], [100, 100, 700], [1, 3, 0]])
    assert niggli(thin) is None


@pytest.mark.parametrize("angles", [(90.0, 90.0, 270.0), (90.0, -90.0, 90.0), (400.0, 90.0, 90.0), (90.0, 90.0, 0.0)])
def test_angles_outside_0_to_180_are_refused(angles: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="no cell"):
        from_lengths_angles(np.array([4.0, 4.0, 4.0, *angles]))
