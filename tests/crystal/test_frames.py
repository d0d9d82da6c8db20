"""Where crystals are put on a grid, how many voxels it has, and which crystals it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.stats import kstest

from dist_train.config import GridSpec
from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.frames import grid_shape, placed, representable
from dist_train.crystal.lattice import from_lengths_angles, periodic_distances
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError

FloatArray = NDArray[np.float64]
MakeCrystal = Callable[..., Crystal]

SEEDS = st.integers(0, 2**32 - 1)
WINDOW = GridSpec(frame="window", shape=16, box_A=5.0, max_spacing_A=0.5, random_rotation=True, random_origin=True)
UNIT = GridSpec(frame="unit", shape=24, box_A=10.0, max_spacing_A=0.5, random_rotation=True)
MOVED_CELL = GridSpec(random_origin=True)
RANDOM = pytest.mark.parametrize("spec", [WINDOW, UNIT, MOVED_CELL], ids=lambda spec: spec.frame)


def cube_of(edge: float, frac: Any, symbols: str = "") -> Crystal:
    """Atoms in a cube, of carbon unless named."""
    numbers = [NUMBERS[symbol] for symbol in symbols.split()] or [6] * len(frac)
    return Crystal("cube", np.eye(3) * edge, np.array(frac), numbers)


def distances(crystal: Crystal) -> FloatArray:
    return periodic_distances(crystal.lattice_A, crystal.frac_N3, crystal.frac_N3)


# How many voxels


@given(edges=st.tuples(*[st.floats(0.7, 40)] * 3), spacing=st.floats(0.1, 1.0))
def test_adaptive_shape_is_the_smallest_that_keeps_the_spacing(edges: tuple[float, ...], spacing: float) -> None:
    spec = GridSpec(shape="adaptive", max_spacing_A=spacing, max_voxels=2**40)
    shape = grid_shape(np.diag(edges), spec)
    for edge, voxels in zip(edges, shape, strict=True):
        assert voxels % 8 == 0
        assert edge / voxels <= spacing * (1 + 1e-12)
        assert voxels == 8 or edge / (voxels - 8) > spacing * (1 - 1e-12)


def test_adaptive_shape_follows_edges_not_the_box() -> None:
    skewed = np.array([[4.0, 0, 0], [9.0, 1.0, 0], [0, 0, 5.0]])
    assert grid_shape(skewed, GridSpec(shape="adaptive", max_voxels=2**20)) == (16, 32, 24)
    assert grid_shape(skewed, GridSpec(shape="adaptive", multiple=4, max_voxels=2**20)) == (16, 32, 20)


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


@pytest.mark.parametrize("spec", [WINDOW, UNIT], ids=lambda spec: spec.frame)
def test_boxes_have_one_shape_for_every_cell(spec: GridSpec) -> None:
    assert {grid_shape(np.eye(3) * edge, spec) for edge in (1.0, 300.0)} == {(spec.shape,) * 3}


@pytest.mark.parametrize("preset", ["paper-unit", "paper-window"])
@pytest.mark.parametrize("index", [(0, 0, 0), (29, 29, 29), (0, 17, 29), (4, 5, 6)])
def test_the_papers_grids_have_30_points_from_0_to_10(preset: str, index: tuple[int, int, int]) -> None:
    spec = GridSpec.model_validate({"preset": preset})
    atom = Crystal("atom", np.eye(3) * 50, [np.linspace(0, 10, 30)[list(index)] / 50], [33])
    density = voxelize(atom, spec).density_CDHW[0]
    assert density.shape == (30, 30, 30)
    assert np.unravel_index(density.argmax(), density.shape) == index
    assert density.max() == pytest.approx(33 / (2 * np.pi) ** 1.5, rel=1e-6)  # sigma is 1 A


# What a grid can't hold


LIMITS = {"min_distance_A": 0.6, "min_like_distance_A": 0.9, "max_atoms": 3}
NOWHERE = cube_of(np.nan, [[0, 0, 0]])


@pytest.mark.parametrize(
    ("crystal", "message"),
    [
        (cube_of(5, [[0, 0, 0], [0.1, 0, 0.9]]), r"two like atoms 0\.707 A apart, at least 0\.9 A is needed"),
        (cube_of(5, [[0.95, 0, 0], [0.05, 0, 0]]), r"two like atoms 0\.500 A apart, at least 0\.9 A is needed"),
        (cube_of(5, [[0.95, 7, 0], [0.05, 0, 0]], "C O"), r"two atoms 0\.500 A apart, at least 0\.6 A is needed"),
        (cube_of(5, [[0.5, 7, 0], [0.5, 0, -1]], "C O"), r"two atoms 0\.000 A apart, at least 0\.6 A is needed"),
        (cube_of(0.89, [[0, 0, 0]]), r"two like atoms 0\.890 A apart"),  # an atom and its own image
        (cube_of(5, np.random.default_rng(0).random((4, 3))), "4 atoms, at most 3 are taken"),
        (replace(cube_of(5, [[0, 0, 0]]), numbers_N=[104]), r"unknown atomic numbers \[104\], known are 1 to 103"),
        (replace(cube_of(5, [[0, 0, 0]]), numbers_N=[0]), r"unknown atomic numbers \[0\]"),
        (NOWHERE, "lattice or coordinates are not finite"),
        (cube_of(5, [[0, 0, np.inf]]), "lattice or coordinates are not finite"),
        (replace(NOWHERE, lattice_A=np.ones((3, 3))), r"cell volume of 0 A\^3, at least 0\.1 is needed"),
        (replace(NOWHERE, lattice_A=np.diag([3, 3, 2000])), "cell edge of 2000 A, at most 1000 A are taken"),
        (cube_of(5, np.zeros((0, 3))), "no atoms"),
    ],
)
@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
@pytest.mark.parametrize("niggli", [True, False])
def test_every_frame_names_what_it_refuses(crystal: Crystal, message: str, frame: str, niggli: bool) -> None:
    spec = GridSpec.model_validate({"frame": frame, "niggli": niggli} | LIMITS)
    with pytest.raises(CrystalError, match=f"^cube: {message}"):
        representable(crystal, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": 32}, r"spacing of 0\.375 A for the longest edge of 12\.00 A on 32 voxels, at most 0\.3 A is allowed"),
        ({"shape": "adaptive"}, "40 x 40 x 40 = 64000 voxels are needed, at most 32768 are allowed"),
        (
            {"channels": ["table"], "element_table": {"O": [1.0], "H": [0.5]}},
            r"no code in element_table for \['C', 'Ti'\]",
        ),
        ({"frame": "unit"}, r"an atom 5\.40 A from the middle is outside the cube, at most 4\.65 A are allowed"),
    ],
)
def test_what_a_spec_refuses_besides(options: dict[str, Any], message: str) -> None:
    crystal = cube_of(12, [[0.05, 0, 0], [0.95, 0, 0], [0.5, 0, 0]], "Ti O C")
    with pytest.raises(CrystalError, match=f"^cube: {message}"):
        representable(crystal, GridSpec.model_validate(options))


def pair_of(symbols: str, distance: float) -> Crystal:
    return cube_of(5, [[0.1, 0.3, 0.99], [0.1, 0.3, 0.99 + distance / 5]], symbols)


@pytest.mark.parametrize(("symbols", "limit"), [("C C", 0.95), ("C O", 0.5)])
def test_pairs_at_the_limit_are_taken(symbols: str, limit: float) -> None:
    representable(pair_of(symbols, limit + 1e-6), GridSpec())
    with pytest.raises(CrystalError, match="apart"):
        representable(pair_of(symbols, limit - 1e-6), GridSpec())


def test_like_atoms_are_held_to_the_larger_of_both_limits() -> None:
    spec = GridSpec(min_distance_A=1.2, min_like_distance_A=0.1)
    with pytest.raises(CrystalError, match=r"two like atoms 1\.100 A apart, at least 1\.2 A is needed"):
        representable(pair_of("C C", 1.1), spec)


def test_a_unit_that_turns_must_fit_in_every_direction() -> None:
    corners = cube_of(12, [[0.1, 0.1, 0.1], [0.8, 0.8, 0.8]])  # 4.2 A from the middle along each axis, 7.27 A in space
    still = GridSpec(frame="unit")
    assert representable(corners, still).id == "cube"
    with pytest.raises(CrystalError, match=r"an atom 7\.27 A from the middle is outside the cube, at most 4\.65 A"):
        representable(corners, still.model_copy(update={"random_rotation": True}))
    line = cube_of(12, [[0.1, 0.5, 0.5], [0.85, 0.5, 0.5]])
    assert representable(line, still.model_copy(update={"random_rotation": True})).id == "cube"


@given(seed=SEEDS)
def test_units_that_are_taken_lie_in_the_cube_at_every_rotation(random_crystal: MakeCrystal, seed: int) -> None:
    spec = UNIT.model_copy(update={"box_A": 6.0, "min_distance_A": 0.0, "min_like_distance_A": 0.0})
    try:
        crystal = representable(random_crystal(seed), spec)
    except CrystalError:
        reject()
    carts = np.stack([placed(crystal, spec, copy).cart_N3 for copy in range(20)])
    assert (carts.min(), carts.max()) >= (0, 0)
    assert carts.max() <= 6


# The crystal as a spec takes it


@given(seed=SEEDS, niggli=st.booleans())
def test_cells_are_right_handed_with_rising_edges(random_crystal: MakeCrystal, seed: int, niggli: bool) -> None:
    crystal = random_crystal(seed)
    spec = GridSpec(shape="adaptive", niggli=niggli, min_distance_A=0, min_like_distance_A=0)
    held = representable(crystal, spec)
    edges = held.lengths_angles[:3]
    assert np.linalg.det(held.lattice_A) > 0
    assert (np.diff(edges) > -1e-6).all()
    assert ((held.frac_N3 >= 0) & (held.frac_N3 < 1)).all()
    np.testing.assert_array_equal(held.numbers_N, crystal.numbers_N)
    assert niggli or np.allclose(edges, np.sort(crystal.lengths_angles[:3]))
    shape = grid_shape(held.lattice_A, spec)
    assert list(shape) == sorted(shape)
    cells = (held.cart_N3 - crystal.cart_N3) @ np.linalg.inv(crystal.lattice_A)
    np.testing.assert_allclose(cells, np.round(cells), atol=1e-9)  # no mirror image


def test_the_cell_is_reduced_where_asked_and_kept_where_not() -> None:
    skewed = Crystal("s", np.array([[4.0, 0, 0], [12.0, 4.0, 0], [0, 0, 4.0]]), [[0.2, 0.3, 2.4]], [1])
    np.testing.assert_allclose(representable(skewed, GridSpec(shape=16)).lengths_angles, [4, 4, 4, 90, 90, 90], atol=1e-9)
    with pytest.raises(CrystalError, match=r"s: spacing of 0\.791 A"):
        representable(skewed, GridSpec(shape=16, niggli=False))
    kept = representable(skewed, GridSpec(shape=16, niggli=False, max_spacing_A=0.8))
    np.testing.assert_allclose(kept.lengths_angles[:3], [4, 4, np.hypot(12, 4)])
    for frame in ("window", "unit"):
        spec = GridSpec.model_validate({"frame": frame, "box_A": 9.3})
        assert representable(skewed, spec.model_copy(update={"niggli": False})) is skewed
        np.testing.assert_allclose(representable(skewed, spec).lengths_angles, [4, 4, 4, 90, 90, 90], atol=1e-9)


# Random placements


@RANDOM
def test_a_placement_is_made_of_the_id_and_the_copy_alone(random_crystal: MakeCrystal, spec: GridSpec) -> None:
    crystal, other = random_crystal(1), replace(random_crystal(2), id="random 1")
    first, again, copy = placed(crystal, spec), placed(crystal, spec), placed(crystal, spec, 1)
    np.testing.assert_array_equal(first.cart_N3, again.cart_N3)
    np.testing.assert_array_equal(first.lattice_A, again.lattice_A)
    renamed = placed(replace(crystal, id="random 3"), spec)
    for changed in (copy, renamed):
        assert (abs(changed.cart_N3 - first.cart_N3).max(1) > 1e-3).all()
    # Another crystal of this name is moved alike.
    turns = [np.linalg.inv(c.lattice_A) @ placed(c, spec).lattice_A for c in (crystal, other)]
    np.testing.assert_allclose(*turns, atol=1e-12)
    if spec.random_origin:
        moves = [(placed(c, spec).frac_N3 - c.frac_N3) % 1 for c in (crystal, other)]
        np.testing.assert_allclose(*moves, atol=1e-9)


def test_placements_are_the_same_on_every_machine() -> None:
    atom = Crystal("mp-1", np.eye(3) * 5, [[0, 0, 0]], [6])
    np.testing.assert_allclose(placed(atom, MOVED_CELL, 3).frac_N3, [[0.438929, 0.521707, 0.215293]], atol=1e-6)


def test_nothing_moves_that_should_not(random_crystal: MakeCrystal) -> None:
    crystal = random_crystal(0)
    for frame in ("cell", "window"):
        still = placed(crystal, GridSpec(frame=frame), 7)
        np.testing.assert_array_equal(still.lattice_A, crystal.lattice_A)
        np.testing.assert_array_equal(still.frac_N3, crystal.frac_N3)
    np.testing.assert_array_equal(placed(crystal, MOVED_CELL, 7).lattice_A, crystal.lattice_A)


@RANDOM
@given(seed=SEEDS, copy=st.integers(0, 10**6))
def test_placing_keeps_all_distances(random_crystal: MakeCrystal, spec: GridSpec, seed: int, copy: int) -> None:
    crystal = random_crystal(seed)
    moved = placed(crystal, spec, copy)
    assert np.linalg.det(moved.lattice_A) == pytest.approx(np.linalg.det(crystal.lattice_A))  # no mirror image
    np.testing.assert_allclose(distances(moved), distances(crystal), atol=1e-9)
    np.testing.assert_array_equal(moved.numbers_N, crystal.numbers_N)
    assert moved.id == crystal.id


@given(seed=SEEDS, copy=st.integers(0, 10**6))
def test_a_unit_is_the_atoms_of_one_cell_about_the_middle(random_crystal: MakeCrystal, seed: int, copy: int) -> None:
    crystal, cells = random_crystal(seed), np.array([3, -2, 0])
    unit = placed(replace(crystal, frac_N3=crystal.frac_N3 + cells), UNIT, copy)
    np.testing.assert_allclose(unit.cart_N3.mean(0), [5, 5, 5], atol=1e-9)
    np.testing.assert_allclose(pdist(unit.cart_N3), pdist(crystal.cart_N3), atol=1e-9)


IDS = 2000


@cache
def placements(frame: str) -> list[Crystal]:
    """One atom in a unit cell, placed under many names and many copies."""
    spec = {"window": WINDOW, "unit": UNIT}[frame]
    atom = Crystal("atom", np.eye(3), np.array([[0.25, 0.5, 0.75]]), [6])
    return [placed(replace(atom, id=f"mp-{n // 2}"), spec, n % 2) for n in range(IDS)]


@pytest.mark.parametrize("frame", ["window", "unit"])
def test_rotations_are_uniform(frame: str) -> None:
    turns = np.stack([crystal.lattice_A for crystal in placements(frame)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    # Over all rotations an entry has mean 0 and variance 1/3; the trace squared has mean 1 and variance 2.
    assert abs(turns.mean(0)).max() < 4 * np.sqrt(1 / 3 / IDS)
    traces = np.trace(turns, axis1=1, axis2=2)
    assert abs((traces**2).mean() - 1) < 4 * np.sqrt(2 / IDS)
    angles = np.arccos(np.clip((traces - 1) / 2, -1, 1))
    assert kstest(angles, lambda angle: (angle - np.sin(angle)) / np.pi).pvalue > 0.001


def test_origins_are_uniform_in_the_cell_and_independent_of_the_rotation() -> None:
    origins = np.stack([crystal.frac_N3[0] for crystal in placements("window")])
    assert ((origins >= 0) & (origins < 1)).all()
    assert all(kstest(axis, "uniform").pvalue > 0.001 for axis in origins.T)
    turns = np.stack([crystal.lattice_A.ravel() for crystal in placements("window")])
    both = np.corrcoef(np.concatenate([origins, turns], axis=1).T)[:3]
    assert abs(both - np.eye(3, 12)).max() < 4.5 / np.sqrt(IDS)


def test_copies_of_one_crystal_are_independent() -> None:
    turns = np.stack([crystal.lattice_A.ravel() for crystal in placements("window")]).reshape(-1, 2, 9)
    assert abs(np.corrcoef(turns[:, 0].T, turns[:, 1].T)[:9, 9:]).max() < 4.5 / np.sqrt(IDS / 2)


def test_units_of_oblique_cells_are_cut_at_the_cell_of_the_spec() -> None:
    lattice = from_lengths_angles(np.array([3.0, 3.0, 3.0, 60.0, 60.0, 60.0]))
    crystal = Crystal("two", lattice, np.array([[0.9, 0.1, 0.1], [0.1, 0.1, 0.1]]), [6, 8])
    unit = placed(representable(crystal, UNIT.model_copy(update={"niggli": False})), UNIT)
    np.testing.assert_allclose(pdist(unit.cart_N3), 2.4)  # not the 0.6 A to the next image
