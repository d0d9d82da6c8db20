"""Voxelising against the formula written out, by every algorithm, and by the symmetries that crystals have."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_train.config import GRID_PRESETS, GridSpec
from dist_train.crystal import kernels
from dist_train.crystal.elements import MAX_Z, NUMBERS, PLACES, SYMBOLS
from dist_train.crystal.frames import grid_shape, placed, spacing_A
from dist_train.crystal.lattice import from_lengths_angles
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import (
    Algorithm,
    VoxelGrid,
    cell_algorithm,
    code_table,
    n_channels,
    product_algorithm,
    voxelize,
)

FloatArray = NDArray[np.float64]
MakeCrystal = Callable[..., Crystal]

PRODUCTS: tuple[Algorithm, ...] = ("product", "matrix product")
ANY_CELL: tuple[Algorithm, ...] = ("stamping", "reciprocal")
TOLERANCE = {"product": 1.5e-6, "matrix product": 1e-6, "reciprocal": 1e-6, "stamping": 5e-6}
"""Largest error of a voxel, over the channel's largest value; by rows 1e-6 but for 1,000 atoms added up in a window."""

SEEDS = st.integers(0, 2**32 - 1)
TABLE = {symbol: (z / 40, -1.25 if z % 3 else 0.3, 0.0 if z % 2 else 0.7) for z, symbol in enumerate(SYMBOLS) if z}
ALL = ("occupancy", "z_density", "period", "group", "f_block", "table")


def spec_of(frame: str = "cell", **options: Any) -> GridSpec:
    """A spec on 16 voxels, boxes of 5 angstrom, with all channels."""
    given_ = {"shape": 16, "box_A": 5.0, "max_spacing_A": 0.5, "niggli": False}
    channels = {"channels": ALL, "element_table": TABLE}
    return GridSpec.model_validate({"frame": frame} | given_ | channels | options)


SPEC = spec_of()
SPECS = {frame: spec_of(frame, channels=["occupancy", "table", "z_density"]) for frame in ("cell", "window", "unit")}


def heights(spec: GridSpec, z: int) -> FloatArray:
    """[C] heights of an atom's Gaussian, channel by channel."""
    values: list[float] = []
    for kind in spec.channels:
        if kind == "occupancy":
            values.append(1.0)
        elif kind == "z_density":
            values.append(z / np.sqrt((2 * np.pi * spec.sigma_A**2) ** 3))
        elif kind == "table":
            values += TABLE[SYMBOLS[z]]
        else:
            column, places = {"period": (0, 7), "group": (1, 18), "f_block": (2, 14)}[kind]
            values += [float(PLACES[z, column] == place) for place in range(1, places + 1)]
    return np.array(values)


def reference(crystal: Crystal, spec: GridSpec, shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Sums of unit Gaussians and distances to the nearest image, both [N, D, H, W]; all images within 8 sigma, float64."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    cell = spec.frame == "cell"
    points = index / shape @ crystal.lattice_A if cell else index * spec.box_A / (np.array(shape) - 1)
    middle = (points.min((0, 1, 2)) + points.max((0, 1, 2))) / 2
    radius = np.linalg.norm(points - middle, axis=-1).max() + 8 * spec.sigma_A
    inverse = np.linalg.inv(crystal.lattice_A)
    reach = np.ceil(radius * np.linalg.norm(inverse, axis=0)) + 1
    sums, nearest = np.zeros((len(crystal), *shape)), np.full((len(crystal), *shape), np.inf)
    for n, frac in enumerate(crystal.frac_N3):
        first = np.round(middle @ inverse - frac)
        images = np.array(list(itertools.product(*[np.arange(f - r, f + r + 1) for f, r in zip(first, reach)])))
        images = np.zeros((1, 3)) if spec.frame == "unit" else images
        for cart in (frac + images) @ crystal.lattice_A:
            if spec.frame == "unit" or np.linalg.norm(cart - middle) <= radius:
                squares = ((points - cart) ** 2).sum(-1)
                sums[n] += np.exp(-squares / (2 * spec.sigma_A**2))
                np.minimum(nearest[n], squares, out=nearest[n])
    return sums, np.sqrt(nearest)


def crystal_of(lattice: Any, symbols: str, seed: int = 0) -> Crystal:
    """Atoms at random places, some outside the cell."""
    numbers = [NUMBERS[symbol] for symbol in symbols.split()]
    return Crystal("c", np.array(lattice), np.random.default_rng(seed).uniform(-1.5, 1.5, (len(numbers), 3)), numbers)


def cell_of(*parameters: float) -> FloatArray:
    return from_lengths_angles(np.array(parameters, np.float64))


def unit_of(crystal: Crystal, box_A: float) -> Crystal:
    """The atoms of a crystal moved to the middle of the cube."""
    return placed(crystal, GridSpec(frame="unit", box_A=box_A, max_spacing_A=9))


CUBE = crystal_of(np.eye(3) * 4.1, "Cs Cl U")
LONG_BOX = crystal_of(np.diag([4.4, 7.1, 11.9]), "Fe Xe Fe Eu O H", 1)
TRICLINIC = crystal_of([[3.9, 0.3, -0.2], [1.1, 4.2, 0.4], [-1.3, 0.8, 4.6]], "La O Yb H", 2)
LONG = crystal_of([[3.1, 0, 0.5], [-0.9, 5.6, 0], [0.6, 1.4, 9.3]], "Fe Xe Ti", 3)
TINY = crystal_of([[2.2, 0, 0], [0.7, 2.1, 0], [0.4, 0.6, 2.3]], "Ac", 4)
TINY_CUBE = crystal_of(np.eye(3) * 2.2, "Po", 5)
ACUTE = crystal_of(cell_of(4.4, 4.4, 4.4, 60, 60, 60), "O Lr", 6)
OBTUSE = crystal_of(cell_of(4.1, 4.1, 5.2, 90, 90, 120), "Zn S", 7)
LEFT_HANDED = crystal_of([[0, 4.0, 0], [3.8, 0.4, 0], [0, 0.5, 4.3]], "Pb I", 8)
NEARLY_RIGHT = crystal_of(cell_of(4.1, 4.4, 4.7, 90, 89.99, 90), "Si F", 9)
DIAMOND = Crystal("diamond", (1 - np.eye(3)) * 1.7835, np.array([[0.1, 0.2, 0.3], [0.35, 0.45, 0.55]]), [6, 6])
CUBIC_DIAMOND = Crystal(
    "cubic diamond",
    np.eye(3) * 3.567,
    np.array([[i, j, k] for i, j, k in itertools.product(*[np.arange(0, 1, 0.25)] * 3)
              if (i, j, k) in {(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)}
              or (i, j, k) in {(0.25, 0.25, 0.25), (0.25, 0.75, 0.75), (0.75, 0.25, 0.75), (0.75, 0.75, 0.25)}]) + 0.013,
    np.full(8, 6),
)  # fmt: skip
SKEWED = replace(TRICLINIC, lattice_A=np.array([[1, 0, 0], [3, 1, 0], [-2, 4, 1]]) @ TRICLINIC.lattice_A)

PAPER = {key: GRID_PRESETS["paper-unit"][key] for key in ("shape", "box_A", "sigma_A", "radius_A")}
CASES: dict[str, tuple[Crystal, GridSpec, tuple[Algorithm, ...]]] = {
    "cube": (CUBE, spec_of(), (*PRODUCTS, *ANY_CELL)),
    "adaptive box": (LONG_BOX, spec_of(shape="adaptive", max_spacing_A=0.3, sigma_A=0.3, radius_A=0.8), PRODUCTS),
    "odd cube": (CUBE, spec_of(shape=15, sigma_A=0.8), (*PRODUCTS, *ANY_CELL)),
    "triclinic": (TRICLINIC, spec_of(shape=30, sigma_A=0.4, radius_A=0.7), ANY_CELL),
    "adaptive triclinic": (LONG, spec_of(shape="adaptive", max_spacing_A=0.24), ANY_CELL),
    "narrow": (LONG, spec_of(shape="adaptive", max_spacing_A=0.3, sigma_A=0.3), ANY_CELL),
    "tiny": (TINY, spec_of(shape=12), ANY_CELL),
    "tiny and wide": (TINY, spec_of(shape=13, sigma_A=1.0), ANY_CELL),
    "tiny cube": (TINY_CUBE, spec_of(shape=12, sigma_A=1.0), (*PRODUCTS, *ANY_CELL)),
    "60 degrees": (ACUTE, spec_of(shape=20, sigma_A=0.6, radius_A=0.6), ANY_CELL),
    "120 degrees": (OBTUSE, spec_of(shape=15, radius_A=1.2), ANY_CELL),
    "nearly right-angled": (NEARLY_RIGHT, spec_of(shape=15), ANY_CELL),
    "left-handed": (LEFT_HANDED, spec_of(shape="adaptive"), ANY_CELL),
    "diamond": (DIAMOND, spec_of(shape=12, sigma_A=1.0), ANY_CELL),
    "cubic diamond": (CUBIC_DIAMOND, spec_of(shape=15, sigma_A=1.0), (*PRODUCTS, *ANY_CELL)),
    "skewed": (SKEWED, spec_of(shape=15, max_spacing_A=1.5), ("reciprocal",)),
    "window": (TRICLINIC, spec_of("window"), PRODUCTS),
    "odd window": (LONG_BOX, spec_of("window", shape=13, sigma_A=0.3, radius_A=2.0), PRODUCTS),
    "window of a skewed cell": (SKEWED, spec_of("window", shape=12), PRODUCTS),
    "window of a left-handed cell": (LEFT_HANDED, spec_of("window"), PRODUCTS),
    "window of a tiny cell": (TINY, spec_of("window", shape=15, radius_A=0.9), PRODUCTS),
    "window of diamond": (DIAMOND, spec_of("window", sigma_A=1.0), PRODUCTS),
    "paper window": (TRICLINIC, spec_of("window", **PAPER), PRODUCTS),
    "unit": (unit_of(TRICLINIC, 5.0), spec_of("unit"), PRODUCTS),
    "paper unit": (unit_of(LONG, 10.0), spec_of("unit", **PAPER), PRODUCTS),
}


@cache
def expected(case: str) -> tuple[FloatArray, FloatArray, FloatArray]:
    """density [C, D, H, W] and its largest value in each channel [C, 1, 1, 1]; distances [N, D, H, W]."""
    crystal, spec, _ = CASES[case]
    amounts, distances = reference(crystal, spec, grid_shape(crystal.lattice_A, spec))
    codes = np.stack([heights(spec, z) for z in crystal.numbers_N.tolist()], axis=1)
    density = np.tensordot(codes, amounts, 1)
    # A window may hold but the tails of a channel's atoms: the height of an atom is its scale.
    return density, np.maximum(abs(density).max((1, 2, 3)), abs(codes).max(1))[:, None, None, None], distances


@pytest.mark.parametrize(
    ("case", "algorithm"), [(case, algorithm) for case, (*_, algorithms) in CASES.items() for algorithm in algorithms]
)
def test_every_algorithm_equals_the_formula(case: str, algorithm: Algorithm) -> None:
    crystal, spec, _ = CASES[case]
    density, largest, _ = expected(case)
    grid = voxelize(crystal, spec, algorithm=algorithm)
    assert (grid.density_CDHW.shape, grid.density_CDHW.dtype) == (density.shape, np.float32)
    assert (abs(grid.density_CDHW - density) <= TOLERANCE[algorithm] * largest).all()


@pytest.mark.parametrize("case", CASES)
def test_what_runs_by_itself_is_an_algorithm_that_suits_the_grid(case: str) -> None:
    crystal, spec, algorithms = CASES[case]
    density = voxelize(crystal, spec).density_CDHW
    assert any(np.array_equal(density, voxelize(crystal, spec, algorithm=one).density_CDHW) for one in algorithms)


@pytest.mark.parametrize("case", CASES)
def test_species_is_of_the_nearest_atom_within_the_radius(case: str) -> None:
    crystal, spec, _ = CASES[case]
    *_, distances = expected(case)
    species, elements = voxelize(crystal, spec).species_DHW, np.unique(crystal.numbers_N)
    ranked = np.stack([distances[crystal.numbers_N == z].min(0) for z in elements] + [np.full(species.shape, np.inf)])
    nearest = np.where(ranked.min(0) <= spec.radius_A, elements[ranked.argmin(0) % len(elements)], 0)
    ranked = np.sort(ranked, axis=0)
    decided = (ranked[1] - ranked[0] > 1e-6) & (abs(ranked[0] - spec.radius_A) > 1e-9)
    assert (species.dtype, decided.mean() > 0.99) == (np.uint8, True)
    np.testing.assert_array_equal(species[decided], nearest[decided])
    assert set(np.unique(species)) - {0} == set(nearest.ravel()) - {0} != set()


def test_cases_cover_what_grids_may_be() -> None:
    shapes = {grid_shape(crystal.lattice_A, spec) for crystal, spec, _ in CASES.values()}
    assert {(16, 24, 40), (12,) * 3, (15,) * 3, (30,) * 3} <= shapes


@pytest.mark.parametrize("frame", SPECS)
@pytest.mark.parametrize("order", [(20, 30), (30, 20)])
def test_a_tie_goes_to_the_atom_of_lower_index(frame: str, order: tuple[int, int]) -> None:
    for edge in np.linspace(4, 5.6, 9):
        pair = Crystal("pair", np.eye(3) * edge, np.array([[0.4375, 0.5, 0.5], [0.5625, 0.5, 0.5]]), order)
        spec = SPECS[frame].model_copy(update={"box_A": edge / 16 * 15})
        assert voxelize(pair, spec).species_DHW[8, 8, 8] == order[0]


def test_codes_are_stacked_in_the_order_of_the_channels() -> None:
    assert (n_channels(SPEC), n_channels(GridSpec())) == (1 + 1 + 7 + 18 + 14 + 3, 1)
    swapped = GridSpec(channels=("group", "occupancy"))
    np.testing.assert_array_equal(code_table(swapped)[:, 18], np.arange(MAX_Z + 1) > 0)
    np.testing.assert_allclose(code_table(SPEC)[1:], [heights(SPEC, z) for z in range(1, MAX_Z + 1)], rtol=1e-6)
    np.testing.assert_array_equal(code_table(SPEC)[0], 0)


@pytest.mark.parametrize("case", ["cube", "triclinic", "window", "unit"])
def test_memory_used_again_holds_the_same_and_nothing_of_before(case: str) -> None:
    crystal, spec, algorithms = CASES[case]
    for algorithm in algorithms:
        fresh = voxelize(crystal, spec, algorithm=algorithm)
        used = VoxelGrid.empty(*fresh.density_CDHW.shape[:1], fresh.species_DHW.shape)
        used.density_CDHW.fill(np.nan)
        used.species_DHW.fill(255)
        assert voxelize(crystal, spec, used, algorithm) is used
        np.testing.assert_array_equal(used.density_CDHW, fresh.density_CDHW)
        np.testing.assert_array_equal(used.species_DHW, fresh.species_DHW)


# The choice of the algorithm


def choice(lattice: FloatArray, atoms: int, shape: tuple[int, int, int], sigma_A: float = 0.5) -> Algorithm:
    geometry = kernels.geometry(lattice, np.array(shape))
    return cell_algorithm(geometry, np.ones((atoms, 1), np.float32), shape, sigma_A)


def test_right_angled_cells_are_products_whatever_the_axes() -> None:
    assert choice(np.diag([8.0, 9.0, 10.0]), 1, (32, 32, 32)) == "product"
    assert choice(np.eye(3) * 4, 100, (32, 32, 32), sigma_A=1.0) == "matrix product"
    turned = np.diag([5.0, 6.0, 7.0]) @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert choice(turned, 10, (32, 32, 32)) in PRODUCTS


def test_few_atoms_in_a_large_box_are_summed_row_by_row_and_many_as_a_matrix() -> None:
    shape = (32, 32, 32)
    assert product_algorithm(np.ones((10, 1), np.float32), shape, 0.01) == "product"
    assert product_algorithm(np.ones((10, 1), np.float32), shape, 1.0) == "matrix product"
    assert product_algorithm(np.eye(10, 40, dtype=np.float32), shape, 0.5) == "product"  # most channels hold no atom


def test_oblique_cells_are_stamped_unless_small_and_fine() -> None:
    assert choice(LONG.lattice_A, 12, grid_shape(LONG.lattice_A, spec_of(shape="adaptive", max_spacing_A=0.3))) == "stamping"
    assert choice(ACUTE.lattice_A, 40, (64, 64, 64)) == "reciprocal"


def test_very_oblique_cells_are_never_stamped() -> None:
    assert choice(cell_of(9, 9, 9, 90, 90, 55), 1, (16, 16, 16), sigma_A=0.3) == "stamping"
    assert choice(cell_of(9, 9, 9, 90, 90, 50), 1, (16, 16, 16), sigma_A=0.3) == "reciprocal"
    assert choice(cell_of(9, 9, 9, 90, 130, 90), 1, (16, 16, 16), sigma_A=0.3) == "reciprocal"


# Symmetries


def assert_same(found: VoxelGrid, density_CDHW: Any, species_DHW: Any, tolerance: float = 1e-5) -> None:
    """Equal species, and densities within the tolerance of an atom's height or the channel's largest value."""
    scale = np.maximum(abs(density_CDHW).max(axis=(1, 2, 3), keepdims=True), 1.0)
    assert (abs(found.density_CDHW - density_CDHW) <= tolerance * scale).all()
    np.testing.assert_array_equal(found.species_DHW, species_DHW)


FRAMES = st.sampled_from(sorted(SPECS))
ALGORITHMS = st.sampled_from([None, "reciprocal"])
SHIFTS = st.tuples(*[st.integers(-40, 40)] * 3)


@given(seed=SEEDS, steps=SHIFTS, algorithm=ALGORITHMS)
def test_translation_by_whole_voxels_rolls_a_cell(
    random_crystal: MakeCrystal, seed: int, steps: tuple[int, int, int], algorithm: Algorithm | None
) -> None:
    crystal = random_crystal(seed)
    grid = voxelize(crystal, SPEC, algorithm=algorithm)
    moved = voxelize(replace(crystal, frac_N3=crystal.frac_N3 + np.array(steps) / 16), SPEC, algorithm=algorithm)
    density, species = np.roll(grid.density_CDHW, steps, (1, 2, 3)), np.roll(grid.species_DHW, steps, (0, 1, 2))
    assert_same(moved, density, species, 1e-6)


@given(seed=SEEDS, algorithm=ALGORITHMS, order=st.permutations([0, 1, 2]))
def test_relabelled_vectors_permute_the_axes_of_a_cell(
    random_crystal: MakeCrystal, seed: int, algorithm: Algorithm | None, order: list[int]
) -> None:
    crystal = random_crystal(seed)
    grid = voxelize(crystal, SPECS["cell"], algorithm=algorithm)
    other = replace(crystal, lattice_A=crystal.lattice_A[order], frac_N3=crystal.frac_N3[:, order])
    density = np.transpose(grid.density_CDHW, (0, *(axis + 1 for axis in order)))
    assert_same(voxelize(other, SPECS["cell"]), density, np.transpose(grid.species_DHW, order))


@given(seed=SEEDS, axis=st.integers(0, 2))
def test_supercell_on_a_doubled_grid_is_tiled(random_crystal: MakeCrystal, seed: int, axis: int) -> None:
    crystal, double = random_crystal(seed), supercell(random_crystal(seed), axis)
    spec = SPECS["cell"].model_copy(update={"shape": "adaptive", "max_spacing_A": 0.3})
    grid, large = voxelize(crystal, spec), voxelize(double, spec)
    density, species = (np.concatenate([part] * 2, axis - 3) for part in (grid.density_CDHW, grid.species_DHW))
    assert_same(large, density, species)


@given(seed=SEEDS, sigma=st.floats(0.35, 1.0), algorithm=ALGORITHMS)
def test_z_density_holds_the_electrons_of_the_cell(
    random_crystal: MakeCrystal, seed: int, sigma: float, algorithm: Algorithm | None
) -> None:
    crystal = random_crystal(seed)
    grid = voxelize(crystal, spec_of(channels=["z_density"], element_table={}, sigma_A=sigma), algorithm=algorithm)
    electrons = grid.density_CDHW.mean(dtype=np.float64) * crystal.volume_A3
    assert electrons == pytest.approx(crystal.numbers_N.sum(), rel=5e-6)  # a Gaussian has 2e-6 beyond 5.4 sigma


@given(seed=SEEDS)
def test_rotation_in_space_leaves_a_cell_unchanged(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    grid = voxelize(crystal, SPECS["cell"])
    turned = voxelize(replace(crystal, lattice_A=crystal.lattice_A @ rotation), SPECS["cell"])
    assert_same(turned, grid.density_CDHW, grid.species_DHW)


@given(frame=FRAMES, seed=SEEDS)
def test_densities_of_atoms_add_up(random_crystal: MakeCrystal, frame: str, seed: int) -> None:
    crystal = random_crystal(seed, 5)
    parts = [replace(crystal, frac_N3=crystal.frac_N3[part], numbers_N=crystal.numbers_N[part])
             for part in (slice(0, 2), slice(2, 5))]  # fmt: skip
    grid = voxelize(crystal, SPECS[frame])
    total = sum(voxelize(part, SPECS[frame]).density_CDHW.astype(np.float64) for part in parts)
    assert_same(grid, total, grid.species_DHW)


@given(frame=FRAMES, seed=SEEDS)
def test_order_of_atoms_does_not_matter(random_crystal: MakeCrystal, frame: str, seed: int) -> None:
    crystal = random_crystal(seed, 5)
    order = np.random.default_rng(seed).permutation(5)
    grid = voxelize(crystal, SPECS[frame])
    shuffled = replace(crystal, frac_N3=crystal.frac_N3[order], numbers_N=crystal.numbers_N[order])
    assert_same(voxelize(shuffled, SPECS[frame]), grid.density_CDHW, grid.species_DHW, 1e-6)


@given(frame=st.sampled_from(["cell", "window"]), seed=SEEDS)
def test_atoms_in_other_images_of_the_cell_change_nothing(random_crystal: MakeCrystal, frame: str, seed: int) -> None:
    crystal = random_crystal(seed)
    cells = np.random.default_rng(seed).integers(-50, 50, (4, 3))
    grid = voxelize(crystal, SPECS[frame])
    moved = voxelize(replace(crystal, frac_N3=crystal.frac_N3 + cells), SPECS[frame])
    assert_same(moved, grid.density_CDHW, grid.species_DHW, 1e-6)


def supercell(crystal: Crystal, axis: int) -> Crystal:
    unit = np.eye(3)[axis]
    frac = np.concatenate([crystal.frac_N3, crystal.frac_N3 + unit]) / (1 + unit)
    return Crystal("2x1x1", crystal.lattice_A * (1 + unit)[:, None], frac, np.tile(crystal.numbers_N, 2))


@given(seed=SEEDS, axis=st.integers(0, 2), order=st.permutations([0, 1, 2]), sign=st.sampled_from([1, -1]))
def test_a_window_does_not_depend_on_the_choice_of_the_cell(
    random_crystal: MakeCrystal, seed: int, axis: int, order: list[int], sign: int
) -> None:
    crystal, rng = random_crystal(seed), np.random.default_rng(seed)
    other = supercell(crystal, axis) if rng.random() < 0.5 else crystal
    basis = np.eye(3)[order] * sign
    for i, j in itertools.permutations(range(3), 2):
        basis[i] += rng.integers(-2, 3) * basis[j]
    frac = (other.frac_N3 + rng.integers(-3, 4, other.frac_N3.shape)) @ np.linalg.inv(basis)
    other = replace(other, lattice_A=basis @ other.lattice_A, frac_N3=frac)
    grid = voxelize(crystal, SPECS["window"])
    assert_same(voxelize(other, SPECS["window"]), grid.density_CDHW, grid.species_DHW, 1e-6)


@given(seed=SEEDS, cells=SHIFTS)
def test_a_window_is_periodic_in_the_lattice(random_crystal: MakeCrystal, seed: int, cells: tuple[int, int, int]) -> None:
    crystal = random_crystal(seed)
    grid = voxelize(crystal, SPECS["window"])
    moved = replace(crystal, frac_N3=crystal.frac_N3 + cells)
    assert_same(voxelize(moved, SPECS["window"]), grid.density_CDHW, grid.species_DHW, 1e-6)


@given(
    frame=st.sampled_from(["window", "unit"]),
    seed=SEEDS,
    order=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.booleans()] * 3),
)
def test_quarter_turns_about_the_middle_permute_the_axes_of_a_box(
    random_crystal: MakeCrystal, frame: str, seed: int, order: list[int], signs: tuple[bool, bool, bool]
) -> None:
    crystal, spec = random_crystal(seed), SPECS[frame]
    turn = np.eye(3)[:, order] * np.where(signs, 1, -1)
    lattice, middle = crystal.lattice_A @ turn, spec.box_A / 2
    turned = replace(
        crystal, lattice_A=lattice, frac_N3=((crystal.cart_N3 - middle) @ turn + middle) @ np.linalg.inv(lattice)
    )
    grid, mirrored = voxelize(crystal, spec), [axis for axis in range(3) if not signs[axis]]
    density = np.flip(np.transpose(grid.density_CDHW, (0, *(axis + 1 for axis in order))), [axis + 1 for axis in mirrored])
    species = np.flip(np.transpose(grid.species_DHW, order), mirrored)
    assert_same(voxelize(turned, spec), density, species, 1e-6)


@given(seed=SEEDS)
def test_a_unit_holds_no_images(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed)
    wide = replace(crystal, lattice_A=crystal.lattice_A * 3, frac_N3=crystal.frac_N3 / 3)
    grid = voxelize(crystal, SPECS["unit"])
    assert_same(voxelize(wide, SPECS["unit"]), grid.density_CDHW, grid.species_DHW, 1e-6)


def test_voxels_of_a_box_go_from_edge_to_edge() -> None:
    spec = spec_of("window", channels=["occupancy"], element_table={})
    assert spacing_A(spec) == pytest.approx(5 / 15)
    for index in ((0, 0, 0), (15, 15, 15), (3, 0, 12)):
        atom = Crystal("one", np.eye(3) * 20, np.array([index]) * 5 / 15 / 20, [8])
        density = voxelize(atom, spec).density_CDHW[0]
        assert np.unravel_index(density.argmax(), density.shape) == index
        assert density.max() == pytest.approx(1)
