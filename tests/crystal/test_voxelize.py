"""Voxelising against the formula written out, and by the symmetries that any periodic density has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_train.config import Channel, GridSpec
from dist_train.crystal.elements import MAX_Z, NUMBERS, PLACES
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import code_table, n_channels, voxelize
from dist_train.errors import CrystalError

FloatArray = NDArray[np.float64]
MakeCrystal = Callable[..., Crystal]

SEEDS = st.integers(0, 2**32 - 1)
SHIFTS = st.tuples(*[st.integers(-40, 40)] * 3)
ALL: tuple[Channel, ...] = ("occupancy", "z_density", "period", "group", "f_block")
SPEC = GridSpec(shape=16, max_spacing_A=0.5, channels=ALL, niggli=False)
TWO_CHANNELS = SPEC.model_copy(update={"channels": ("occupancy", "z_density")})


def heights(spec: GridSpec, z: int) -> FloatArray:
    """[C] heights of an atom's Gaussian, channel by channel."""
    values: list[float] = []
    for kind in spec.channels:
        if kind == "occupancy":
            values.append(1.0)
        elif kind == "z_density":
            values.append(z / np.sqrt((2 * np.pi * spec.sigma_A**2) ** 3))
        else:
            column, places = {"period": (0, 7), "group": (1, 18), "f_block": (2, 14)}[kind]
            values += [float(PLACES[z, column] == place) for place in range(1, places + 1)]
    return np.array(values)


def reference(crystal: Crystal, spec: GridSpec, shape: tuple[int, int, int]) -> tuple[FloatArray, FloatArray]:
    """density [C, D, H, W] and distances [N, D, H, W] to the nearest image: all voxels x atoms x images, in float64."""
    voxels = np.stack(np.meshgrid(*[np.arange(n) / n for n in shape], indexing="ij"), -1)
    reach = np.ceil(5 * spec.sigma_A * np.linalg.norm(np.linalg.inv(crystal.lattice_A), axis=0)).astype(int) + 1
    density, nearest = 0.0, []
    for frac, z in zip(crystal.frac_N3, crystal.numbers_N.tolist(), strict=True):
        amount, closest = np.zeros(shape), np.full(shape, np.inf)
        for image in itertools.product(*[range(-n, n + 1) for n in reach]):
            distance = np.linalg.norm((voxels - frac % 1.0 - image) @ crystal.lattice_A, axis=-1)
            amount += np.where(distance <= 5 * spec.sigma_A, np.exp(-(distance**2) / (2 * spec.sigma_A**2)), 0.0)
            closest = np.minimum(closest, distance)
        density = density + heights(spec, z)[:, None, None, None] * amount
        nearest.append(closest)
    return np.asarray(density), np.stack(nearest)


def crystal_of(lattice: list[list[float]], symbols: str, seed: int = 0) -> Crystal:
    """Atoms at random places, some outside the cell."""
    numbers = np.array([NUMBERS[symbol] for symbol in symbols.split()])
    return Crystal("c", np.array(lattice), np.random.default_rng(seed).uniform(-1.5, 1.5, (len(numbers), 3)), numbers)


CUBE = crystal_of([[4.1, 0, 0], [0, 4.1, 0], [0, 0, 4.1]], "Cs Cl U")
TRICLINIC = crystal_of([[3.9, 0.3, -0.2], [1.1, 4.2, 0.4], [-1.3, 0.8, 4.6]], "La O Yb H", 1)
LONG = crystal_of([[3.1, 0, 0.5], [-0.9, 5.6, 0], [0.6, 1.4, 3.3]], "Fe Xe", 2)
TINY = crystal_of([[2.2, 0, 0], [0.7, 2.1, 0], [0.4, 0.6, 2.3]], "Ac", 3)
ACUTE = crystal_of([[4.4, 0, 0], [2.9, 3.4, 0], [2.8, 1.5, 3.1]], "O Lr", 4)
LEFT_HANDED = crystal_of([[0, 4.0, 0], [3.8, 0.4, 0], [0, 0.5, 4.3]], "Pb I", 5)


@pytest.mark.parametrize(
    ("crystal", "options", "shape"),
    [
        (CUBE, {"shape": 16}, (16, 16, 16)),
        (TRICLINIC, {"shape": 16, "sigma_A": 0.4, "radius_A": 0.7}, (16, 16, 16)),
        (LONG, {"shape": "adaptive"}, (16, 24, 16)),
        (TINY, {"shape": 12}, (12, 12, 12)),
        (ACUTE, {"shape": 20, "sigma_A": 0.6, "radius_A": 0.6}, (20, 20, 20)),
        (LEFT_HANDED, {"shape": "adaptive", "max_spacing_A": 0.4}, (16, 16, 16)),
    ],
)
def test_equals_the_formula(crystal: Crystal, options: dict[str, object], shape: tuple[int, int, int]) -> None:
    spec = SPEC.model_validate(SPEC.model_dump() | {"max_spacing_A": 0.31} | options)
    grid = voxelize(crystal, spec)
    density, distances = reference(crystal, spec, shape)
    assert grid.density_CDHW.shape == density.shape
    assert (grid.density_CDHW.dtype, grid.species_DHW.dtype) == (np.float32, np.uint8)
    largest = density.max(axis=(1, 2, 3), keepdims=True)
    assert (largest[:2] > 0).all()
    assert (abs(grid.density_CDHW - density) <= 5e-6 * largest).all()

    expected = np.where(distances.min(0) <= spec.radius_A, crystal.numbers_N[distances.argmin(0)], 0)
    ranked = np.sort(np.concatenate([distances, np.full((1, *shape), np.inf)]), axis=0)
    decided = (ranked[1] - ranked[0] > 1e-6) & (abs(ranked[0] - spec.radius_A) > 1e-9)
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(grid.species_DHW[decided], expected[decided])
    assert set(crystal.numbers_N) == set(np.unique(grid.species_DHW)) - {0}


@pytest.mark.parametrize("order", [(20, 30), (30, 20)])
def test_a_tie_goes_to_the_atom_of_lower_index(order: tuple[int, int]) -> None:
    for edge in np.linspace(4, 5.6, 9):
        pair = Crystal("pair", np.eye(3) * edge, np.array([[0.4375, 0.5, 0.5], [0.5625, 0.5, 0.5]]), np.array(order))
        assert voxelize(pair, SPEC).species_DHW[8, 8, 8] == order[0]


def test_codes_are_stacked_in_the_order_of_the_channels() -> None:
    assert (n_channels(SPEC), n_channels(GridSpec())) == (1 + 1 + 7 + 18 + 14, 1)
    swapped = GridSpec(channels=("group", "occupancy"))
    np.testing.assert_array_equal(code_table(swapped)[:, 18], np.arange(MAX_Z + 1) > 0)
    np.testing.assert_allclose(code_table(SPEC)[1:], [heights(SPEC, z) for z in range(1, MAX_Z + 1)], rtol=1e-6)


# Symmetries


@given(seed=SEEDS, steps=SHIFTS)
def test_translation_by_whole_voxels_rolls_the_grid(
    random_crystal: MakeCrystal, seed: int, steps: tuple[int, int, int]
) -> None:
    crystal = random_crystal(seed)
    grid = voxelize(crystal, SPEC)
    moved = voxelize(replace(crystal, frac_N3=crystal.frac_N3 + np.array(steps) / 16), SPEC)
    np.testing.assert_array_equal(moved.density_CDHW, np.roll(grid.density_CDHW, steps, axis=(1, 2, 3)))
    np.testing.assert_array_equal(moved.species_DHW, np.roll(grid.species_DHW, steps, axis=(0, 1, 2)))


@given(seed=SEEDS)
def test_atoms_in_other_images_of_the_cell_change_nothing(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed)
    cells = np.random.default_rng(seed).integers(-50, 50, (4, 3))
    grid, moved = voxelize(crystal, SPEC), voxelize(replace(crystal, frac_N3=crystal.frac_N3 + cells), SPEC)
    np.testing.assert_array_equal(moved.density_CDHW, grid.density_CDHW)
    np.testing.assert_array_equal(moved.species_DHW, grid.species_DHW)


@given(seed=SEEDS)
def test_densities_of_atoms_add_up(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed, 5)
    parts = [replace(crystal, frac_N3=crystal.frac_N3[part], numbers_N=crystal.numbers_N[part])
             for part in (slice(0, 2), slice(2, 5))]  # fmt: skip
    total = sum(voxelize(part, SPEC).density_CDHW.astype(np.float64) for part in parts)
    scale = np.max(total, axis=(1, 2, 3), keepdims=True)
    assert (abs(voxelize(crystal, SPEC).density_CDHW - total) <= 2e-6 * scale).all()


@given(seed=SEEDS)
def test_order_of_atoms_does_not_matter(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed, 5)
    order = np.random.default_rng(seed).permutation(5)
    shuffled = voxelize(replace(crystal, frac_N3=crystal.frac_N3[order], numbers_N=crystal.numbers_N[order]), SPEC)
    grid = voxelize(crystal, SPEC)
    np.testing.assert_allclose(shuffled.density_CDHW, grid.density_CDHW, rtol=2e-6)
    np.testing.assert_array_equal(shuffled.species_DHW, grid.species_DHW)


@given(seed=SEEDS, sigma=st.floats(0.35, 0.6))
def test_z_density_holds_the_electrons_of_the_cell(random_crystal: MakeCrystal, seed: int, sigma: float) -> None:
    crystal = random_crystal(seed)
    spec = TWO_CHANNELS.model_copy(update={"sigma_A": sigma})
    electrons = voxelize(crystal, spec).density_CDHW[1].mean(dtype=np.float64) * crystal.volume_A3
    assert electrons == pytest.approx(crystal.numbers_N.sum(), rel=5e-5)  # a Gaussian has 1.5e-5 beyond 5 sigma


@given(seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_relabelled_axes_permute_the_grid(random_crystal: MakeCrystal, seed: int, order: list[int]) -> None:
    crystal = random_crystal(seed)
    grid = voxelize(crystal, SPEC)
    other = voxelize(replace(crystal, lattice_A=crystal.lattice_A[order], frac_N3=crystal.frac_N3[:, order]), SPEC)
    expected = np.transpose(grid.density_CDHW, (0, *(axis + 1 for axis in order)))
    np.testing.assert_allclose(other.density_CDHW, expected, atol=1e-5, rtol=2e-6)
    np.testing.assert_array_equal(other.species_DHW, np.transpose(grid.species_DHW, order))


@given(seed=SEEDS, axis=st.integers(0, 2))
def test_supercell_on_a_doubled_grid_is_tiled(random_crystal: MakeCrystal, seed: int, axis: int) -> None:
    crystal, unit = random_crystal(seed), np.eye(3)[axis]
    spec = TWO_CHANNELS.model_copy(update={"shape": "adaptive", "max_spacing_A": 0.3})
    double = Crystal(
        "2x1x1",
        crystal.lattice_A * (1 + unit)[:, None],
        np.concatenate([crystal.frac_N3, crystal.frac_N3 + unit]) / (1 + unit),
        np.tile(crystal.numbers_N, 2),
    )
    grid, large = voxelize(crystal, spec), voxelize(double, spec)
    assert large.species_DHW.shape == tuple(np.array(grid.species_DHW.shape) * (1 + unit).astype(int))
    tiled = np.concatenate([grid.density_CDHW] * 2, axis=axis + 1)
    np.testing.assert_allclose(large.density_CDHW, tiled, atol=1e-5, rtol=2e-6)
    np.testing.assert_array_equal(large.species_DHW, np.concatenate([grid.species_DHW] * 2, axis=axis))


@given(seed=SEEDS)
@settings(max_examples=10)
def test_rotation_in_space_changes_nothing(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    grid, turned = voxelize(crystal, SPEC), voxelize(replace(crystal, lattice_A=crystal.lattice_A @ rotation), SPEC)
    np.testing.assert_allclose(turned.density_CDHW, grid.density_CDHW, atol=1e-5, rtol=2e-6)


# What a grid can't hold


@given(edges=st.tuples(*[st.floats(0.7, 40)] * 3), spacing=st.floats(0.1, 1.0))
def test_adaptive_shape_is_the_smallest_that_keeps_the_spacing(edges: tuple[float, ...], spacing: float) -> None:
    spec = GridSpec(shape="adaptive", max_spacing_A=spacing, max_voxels=2**40)
    shape = grid_shape(np.diag(edges), spec)
    for edge, voxels in zip(edges, shape, strict=True):
        assert voxels % 8 == 0
        assert edge / voxels <= spacing * (1 + 1e-12)
        assert voxels == 16 or edge / (voxels - 8) > spacing * (1 - 1e-12)


def test_adaptive_shape_follows_edges_not_the_box() -> None:
    skewed = np.array([[4.0, 0, 0], [9.0, 1.0, 0], [0, 0, 5.0]])
    assert grid_shape(skewed, GridSpec(shape="adaptive", max_voxels=2**20)) == (16, 32, 24)


def test_spacing_at_the_limit_is_taken_and_beyond_it_refused() -> None:
    spec = GridSpec(shape=32, max_spacing_A=0.25)
    assert grid_shape(np.diag([3.0, 8.0, 5.0]), spec) == (32, 32, 32)
    with pytest.raises(CrystalError, match=r"spacing of 0\.253 A .* 8\.10 A on 32 voxels, at most 0\.25 A is allowed"):
        grid_shape(np.diag([3.0, 8.1, 5.0]), spec)


def test_voxel_budget_at_the_limit_is_taken_and_beyond_it_refused() -> None:
    lattice = np.diag([4.0, 6.0, 9.0])
    assert grid_shape(lattice, GridSpec(shape="adaptive", max_voxels=16 * 24 * 32)) == (16, 24, 32)
    with pytest.raises(CrystalError, match=r"16 x 24 x 32 = 12288 voxels are needed, at most 12287 are allowed"):
        grid_shape(lattice, GridSpec(shape="adaptive", max_voxels=12287))


def cube_of(edge: float, frac: list[list[float]], z: int = 6) -> Crystal:
    return Crystal("cube", np.eye(3) * edge, np.array(frac), np.full(len(frac), z))


@pytest.mark.parametrize(
    ("crystal", "message"),
    [
        (cube_of(5, [[0, 0, 0], [0.1, 0, 0.9]]), r"two atoms 0\.707 A apart, at least 0\.8 A is needed"),
        (cube_of(5, [[0.95, 0, 0], [0.05, 0, 0]]), r"two atoms 0\.500 A apart"),
        (cube_of(0.79, [[0, 0, 0]]), r"two atoms 0\.790 A apart"),  # an atom and its own image
        (cube_of(20, [[0, 0, 0]]), r"spacing of 0\.625 A for the longest edge of 20\.00 A on 32 voxels"),
        (cube_of(5, np.random.default_rng(0).random((4, 3)).tolist()), "4 atoms, at most 3 are taken"),
        (cube_of(5, [[0, 0, 0]], z=104), r"unknown atomic numbers \[104\]"),
        (cube_of(np.nan, [[0, 0, 0]]), "lattice or coordinates are not finite"),
        (cube_of(5, []), "no atoms"),
    ],
)
@pytest.mark.parametrize("niggli", [True, False])
def test_refusals_name_the_crystal_the_value_and_the_limit(crystal: Crystal, message: str, niggli: bool) -> None:
    spec = GridSpec(shape=32, min_distance_A=0.8, max_atoms=3, niggli=niggli)
    with pytest.raises(CrystalError, match=f"^cube: {message}"):
        representable(crystal, spec)


def test_representable_reduces_the_cell_where_asked() -> None:
    skewed = Crystal("s", np.array([[4.0, 0, 0], [12.0, 4.0, 0], [0, 0, 4.0]]), np.array([[0.2, 0.3, 2.4]]), np.ones(1))
    held = representable(skewed, GridSpec(shape=16))
    np.testing.assert_allclose(held.lengths_angles, [4, 4, 4, 90, 90, 90], atol=1e-9)
    with pytest.raises(CrystalError, match=r"s: spacing of 0\.791 A"):
        representable(skewed, GridSpec(shape=16, niggli=False))
    kept = representable(skewed, GridSpec(shape=16, niggli=False, max_spacing_A=0.8))
    assert kept is skewed
