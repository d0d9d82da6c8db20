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
    neighbour_pairs,
    niggli,
    periodic_distances,
    plane_spacings,
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


def brute_pairs(compact: FloatArray, cart_N3: FloatArray, cutoff: float) -> set[tuple[int, ...]]:
    """(first, second, cells of the second one's shift in the compact basis) of all pairs within the cutoff."""
    inverse, pairs = np.linalg.inv(compact), set()
    for i, j in np.ndindex(len(cart_N3), len(cart_N3)):
        delta = cart_N3[i] - cart_N3[j]
        cells = np.floor(delta @ inverse) + images(9)
        for cell in cells[np.linalg.norm(delta - cells @ compact, axis=1) <= cutoff].astype(int).tolist():
            if i != j or any(cell):
                pairs.add((i, j, *cell))
    return pairs


@given(seed=SEEDS, atoms=st.integers(1, 5), cutoff=st.floats(0.5, 8.0), far=st.sampled_from([0, 2, 60]))
@settings(max_examples=60)
def test_neighbour_pairs_equal_brute_force_in_skewed_cells(seed: int, atoms: int, cutoff: float, far: int) -> None:
    rng = np.random.default_rng(seed)
    compact = compact_cell(rng)
    skewed = shear(rng) @ compact
    cart = (rng.random((atoms, 3)) + rng.integers(-far, far + 1, (atoms, 3))) @ skewed
    first, second, shift = neighbour_pairs(skewed, cart, cutoff)
    cells = shift @ np.linalg.inv(compact)
    np.testing.assert_allclose(cells, np.round(cells), atol=1e-8)
    found = list(zip(first.tolist(), second.tolist(), *np.round(cells).astype(int).T.tolist()))
    assert (np.diff(first) >= 0).all()
    assert len(found) == len(set(found))
    assert set(found) == brute_pairs(compact, cart, cutoff)
    assert {(j, i, -x, -y, -z) for i, j, x, y, z in found} == set(found)


def test_an_atom_is_a_neighbour_of_its_images_and_not_of_itself() -> None:
    skewed = np.array([[3.0, 0, 0], [0, 4.0, 0], [5.9, 0, 0.5]])  # c - 2 a is the shortest vector
    first, second, shift = neighbour_pairs(skewed, np.array([[7.0, -9.0, 0.1]]), 0.6)
    assert (first.tolist(), second.tolist()) == ([0, 0], [0, 0])
    np.testing.assert_allclose(sorted(shift.tolist()), [[-0.1, 0, 0.5], [0.1, 0, -0.5]], atol=1e-12)


def test_atoms_at_one_place_are_neighbours_in_whatever_cells_they_lie() -> None:
    cart = np.array([[0.1, 0.2, 0.3], [1.1, -0.8, 0.3]]) * 4
    first, second, shift = neighbour_pairs(np.eye(3) * 4, cart, 1e-6)
    assert (first.tolist(), second.tolist()) == ([0, 1], [1, 0])
    np.testing.assert_allclose(cart[first] - cart[second] - shift, 0, atol=1e-12)


@pytest.mark.parametrize("atoms", [0, 1, 2])
def test_nothing_near_gives_empty_arrays_of_the_right_kind(atoms: int) -> None:
    first, second, shift = neighbour_pairs(np.eye(3) * 9, np.arange(3 * atoms).reshape(-1, 3) * 1.0, 0.5)
    assert (first.shape, second.shape, shift.shape) == ((0,), (0,), (0, 3))
    assert (first.dtype, second.dtype) == (np.int64, np.int64)


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
