"""Cubes back to crystals: lattice and atoms of windows exact or not at all, atoms of units, calm on fields of nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import spglib
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from dist_train.config import GridSpec
from dist_train.crystal.cell_choice import Repeats
from dist_train.crystal.decode_box import DecodedBox, decode_box
from dist_train.crystal.find_lattice import find_repeats
from dist_train.crystal.frames import placed
from dist_train.crystal.lattice import periodic_distances
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize

SampleTable = Callable[[str], list[Crystal]]
Fields = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]

WINDOW = GridSpec(frame="window", random_rotation=True, random_origin=True)
PAPER = GridSpec.model_validate({"preset": "paper-window"})
UNIT = GridSpec(frame="unit", random_rotation=True)
STEPS = np.array([[i, j, k] for i in range(-9, 10) for j in range(-9, 10) for k in range(-9, 10)])


def fields_of(crystal: Crystal, spec: GridSpec) -> Fields:
    grid = voxelize(crystal, spec)
    return grid.density_CDHW[0], grid.species_DHW, (grid.species_DHW > 0).astype(np.float32)


def decoded(crystal: Crystal, spec: GridSpec, fields: Fields | None = None) -> DecodedBox:
    channel = spec.channels[0]
    assert channel in ("occupancy", "z_density")
    return decode_box(crystal.id, *(fields or fields_of(crystal, spec)), spec, channel)


def damaged(crystal: Crystal, spec: GridSpec, rng: np.random.Generator) -> Fields:
    """Density blurred by 0.3 A with noise of 5 % of its maximum; a tenth of the labels another of those present."""
    blurred = spec.model_copy(update={"sigma_A": float(np.hypot(spec.sigma_A, 0.3))})
    density, species, _ = fields_of(crystal, blurred)
    if spec.channels == ("occupancy",):  # the other channel keeps the integral by itself
        density = density * np.float32((spec.sigma_A / blurred.sigma_A) ** 3)
    labels = np.unique(species)
    others = (np.searchsorted(labels, species) + rng.integers(1, len(labels), species.shape)) % len(labels)
    flipped = np.where(rng.random(species.shape) < 0.1, labels[others], species)
    noise = rng.normal(0, 0.05 * density.max(), density.shape).astype(np.float32)
    return density + noise, flipped, (flipped > 0).astype(np.float32)


def errors_A(found: Crystal | None, truth: Crystal) -> NDArray[np.float64]:
    """[N] distances between atoms of both crystals where they lie; asserts the same lattice and composition."""
    assert found is not None, truth.id
    change = found.lattice_A @ np.linalg.inv(truth.lattice_A)
    assert np.abs(change - np.round(change)).max() < 0.03, f"{truth.id}: {change}"
    assert abs(abs(np.linalg.det(np.round(change))) - 1) < 1e-6, f"{truth.id}: not the primitive cell"
    assert found.composition == truth.composition, truth.id
    frac = found.cart_N3 @ np.linalg.inv(truth.lattice_A)
    distances = periodic_distances(truth.lattice_A, frac, truth.frac_N3)
    distances[found.numbers_N[:, None] != truth.numbers_N] = 1e3
    return np.asarray(distances[linear_sum_assignment(distances**2)])


def small_crystals(sample_table: SampleTable, spec: GridSpec, count: int) -> list[Crystal]:
    """Primitive crystals with at least 5/3 repeats in the cube along every edge, in random places."""
    perovskites, others = sample_table("perov_5")[::150], sample_table("materials_project")[::3]
    fitting: list[Crystal] = []
    for crystal in [*perovskites[: count // 3], *others]:
        crystal = crystal.reduced()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            cell = spglib.find_primitive((crystal.lattice_A, crystal.frac_N3, crystal.numbers_N), symprec=0.1)
        if crystal.lengths_angles[:3].max() < 0.6 * spec.box_A and cell is not None and len(cell[2]) == len(crystal):
            fitting.append(placed(crystal, spec))
    return fitting[:count]


def window_of(lattice_A: NDArray[np.float64], frac: list[list[float]], numbers: list[int], copy: int = 0) -> Crystal:
    return placed(Crystal("made", lattice_A, np.array(frac), np.array(numbers)), WINDOW, copy)


# Windows of real crystals


@pytest.mark.parametrize(("spec", "count", "limit_A"), [(WINDOW, 24, 0.001), (PAPER, 12, 0.03)], ids=["default", "paper"])
def test_windows_of_real_crystals_are_recovered(
    sample_table: SampleTable, spec: GridSpec, count: int, limit_A: float
) -> None:
    crystals = small_crystals(sample_table, spec, count)
    assert len(crystals) == count
    for crystal in crystals:
        found = decoded(crystal, spec)
        assert errors_A(found.crystal, crystal).max() < limit_A, crystal.id
        assert found.crystal is not None and found.crystal.id == crystal.id
        assert found.confidence_N.shape == (len(crystal),)
        assert ((found.confidence_N > 0.8) & (found.confidence_N <= 1)).all()


@pytest.mark.parametrize(("spec", "limit_A"), [(WINDOW, 0.02), (PAPER, 0.15)], ids=["default", "paper"])
def test_damaged_windows_are_recovered(sample_table: SampleTable, spec: GridSpec, limit_A: float) -> None:
    rng = np.random.default_rng(0)
    for crystal in small_crystals(sample_table, spec, 12):
        found = decoded(crystal, spec, damaged(crystal, spec, rng))
        assert errors_A(found.crystal, crystal).max() < limit_A, crystal.id
        assert found.confidence_N.mean() < decoded(crystal, spec).confidence_N.mean() - 0.05


def test_large_cells_are_recovered_or_not_determined(sample_table: SampleTable) -> None:
    crystals = [crystal.reduced() for crystal in sample_table("materials_project")[::40]]
    large = [crystal for crystal in crystals if crystal.lengths_angles[:3].max() > 0.8 * WINDOW.box_A][:12]
    assert len(large) == 12
    for crystal in large:
        found = decoded(placed(crystal, WINDOW), WINDOW)
        assert found.crystal is None, crystal.id
        assert found.reason.startswith("lattice not determined: "), found.reason
        assert found.confidence_N.shape == (0,)
        assert len(found.atoms) > 5  # what was seen is still told


def test_close_atoms_that_merge_in_the_density(sample_table: SampleTable) -> None:
    """Carbon 1.54 A apart in Gaussians of 1 A: labels find the atoms."""
    diamond = Crystal("diamond", (1 - np.eye(3)) * 1.783, np.array([[0, 0, 0], [0.25] * 3]), np.array([6, 6]))
    for copy in range(3):
        crystal = placed(diamond, PAPER, copy)
        assert errors_A(decoded(crystal, PAPER).crystal, crystal).max() < 0.02


# The right cell


def test_a_supercell_becomes_primitive() -> None:
    lattice = np.array([[3.0, 0, 0], [0.2, 3.4, 0], [0.4, -0.3, 3.9]])
    frac, numbers = [[0.1, 0.2, 0.3], [0.6, 0.75, 0.5]], [22, 8]
    double = [[f[0] / 2 + half, f[1], f[2]] for half in (0.0, 0.5) for f in frac]
    crystal = window_of(np.diag([2, 1, 1]) @ lattice, double, numbers * 2)
    small = replace(crystal, lattice_A=np.diag([0.5, 1, 1]) @ crystal.lattice_A)
    small = replace(small, frac_N3=(crystal.cart_N3 @ np.linalg.inv(small.lattice_A))[:2], numbers_N=crystal.numbers_N[:2])
    assert errors_A(decoded(crystal, WINDOW).crystal, small).max() < 0.001


@pytest.mark.parametrize("copy", range(3))
def test_order_of_elements_is_not_averaged_away(copy: int) -> None:
    """CsCl is body-centred but for its species; of four Cl in a row, one Br makes the cell four times as long."""
    chloride = window_of(np.eye(3) * 4.1, [[0, 0, 0], [0.5, 0.5, 0.5]], [55, 17], copy)
    assert errors_A(decoded(chloride, WINDOW).crystal, chloride).max() < 0.001
    frac = [[x / 2, y / 2, z / 2] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    ordered = window_of(np.eye(3) * 5.5, frac, [35] + [17] * 7, copy)
    assert errors_A(decoded(ordered, WINDOW).crystal, ordered).max() < 0.001


@pytest.mark.parametrize("shift", [0.0, 0.12])
def test_a_distortion_within_the_tolerance_of_labels_doubles_the_cell(shift: float) -> None:
    """Simple cubic atoms, all or none in pairs nearer by 0.24 A, as in bismuth: the density tells the one from the other."""
    frac = [[0.25 + shift / 6.4, 0, 0], [0.75 - shift / 6.4, 0, 0]]
    crystal = window_of(np.diag([6.4, 3.1, 3.3]), frac, [83, 83])
    single = replace(crystal, lattice_A=np.diag([0.5, 1, 1]) @ crystal.lattice_A)
    single = replace(single, frac_N3=(crystal.cart_N3 @ np.linalg.inv(single.lattice_A))[:1], numbers_N=np.array([83]))
    assert errors_A(decoded(crystal, WINDOW).crystal, crystal if shift else single).max() < 0.002


def test_a_different_atom_in_clear_fields_is_not_outvoted() -> None:
    """The window can't tell whether it is a defect, but a cell without it doesn't explain what is clearly there."""
    crystal = window_of(np.eye(3) * 4.0, [[0, 0, 0], [0.5, 0.5, 0.5]], [55, 17])
    density, species, probability = fields_of(crystal, WINDOW)
    middle = slice(10, 22)
    species[middle, middle, middle][species[middle, middle, middle] == 17] = 53
    assert (species == 53).any()
    found = decoded(crystal, WINDOW, (density, species, probability)).crystal
    assert found is None or 53 in found.composition


# Lattices of points


def cloud(rng: np.random.Generator, missing: float, false: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Atoms of a perovskite in a cube of 9.3 A, placed with 0.08 A of error, some missing and some anywhere."""
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    crystal = window_of(np.eye(3) * 3.95, frac.tolist(), [56, 22, 8, 8, 8], int(rng.integers(1000)))
    cart = ((crystal.frac_N3 + STEPS[:, None]) @ crystal.lattice_A).reshape(-1, 3)
    numbers = np.tile(crystal.numbers_N, len(STEPS))
    kept = ((cart > 0) & (cart < 9.3)).all(1) & (rng.random(len(cart)) >= missing)
    extra = rng.uniform(0, 9.3, (int(false * kept.sum()), 3))
    cart = np.concatenate([cart[kept] + rng.normal(0, 0.08 / np.sqrt(3), (kept.sum(), 3)), extra])
    return cart, np.concatenate([numbers[kept], rng.choice([56, 22, 8], len(extra))])


def test_missing_and_false_atoms_are_survived() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        cart, numbers = cloud(rng, 0.05, 0.05)
        repeats = find_repeats(cart, numbers, np.full(len(cart), 0.75), 9.3)
        if isinstance(repeats, Repeats):
            found.append(repeats)
            np.testing.assert_allclose(np.linalg.norm(repeats.lattice_A, axis=1), 3.95, atol=0.04)
            assert sorted(repeats.numbers_N.tolist()) == [8, 8, 8, 22, 56]
    assert len(found) >= 16
    assert 0.9 < np.mean([repeats.support_N for repeats in found]) < 0.99


def test_points_without_order_repeat_by_nothing() -> None:
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 10, 60, 200):
        repeats = find_repeats(rng.uniform(0, 9.3, (count, 3)), np.full(count, 14), np.ones(count), 9.3)
        assert isinstance(repeats, str)
        assert "too few repeats" in repeats


# Units


def test_atoms_of_units_are_recovered(sample_table: SampleTable) -> None:
    crystals = [*sample_table("perov_5")[::500], *sample_table("materials_project")[:300:12]]
    fitting = [placed(c, UNIT) for c in crystals if len(c) <= 40 and np.linalg.norm(c.lattice_A, axis=1).max() < 5.3]
    fitting = [c for c in fitting if ((c.cart_N3 > 0) & (c.cart_N3 < UNIT.box_A)).all()]
    assert len(fitting) >= 8
    for crystal in fitting:
        found = decoded(crystal, UNIT)
        assert found.crystal is None and not found.reason
        assert len(found.atoms) == len(crystal), crystal.id
        distances = cdist(found.atoms.cart_N3, crystal.cart_N3)
        nearest = distances.argmin(1)
        np.testing.assert_array_equal(found.atoms.numbers_N, crystal.numbers_N[nearest])
        assert distances.min(1).max() < 0.002, crystal.id
        assert ((found.confidence_N > 0.8) & (found.confidence_N <= 1)).all()


def test_an_atom_on_a_face_is_not_pulled_inside() -> None:
    lattice = np.eye(3) * UNIT.box_A
    cart = np.array([[0.0, 4.0, 4.1], [9.3, 5.1, 0.2], [4.6, 4.7, 9.0], [0.1, 0.1, 0.1]])
    crystal = Crystal("faces", lattice, cart @ np.linalg.inv(lattice), np.array([8, 8, 26, 1]))
    found = decoded(crystal, UNIT)
    assert len(found.atoms) == 4
    assert cdist(found.atoms.cart_N3, cart).min(1).max() < 0.002


def test_labels_without_density_are_no_atoms_of_a_unit() -> None:
    lattice = np.eye(3) * UNIT.box_A
    crystal = Crystal("pair", lattice, np.array([[0.4, 0.5, 0.5], [0.6, 0.5, 0.5]]), np.array([14, 14]))
    density, species, probability = fields_of(crystal, UNIT)
    species[2:6, 2:6, 2:6], probability[2:6, 2:6, 2:6] = 14, 1
    assert len(decoded(crystal, UNIT, (density, species, probability)).atoms) == 2


# Fields that hold no crystal


def constant(density: float, label: int, probability: float) -> Fields:
    shape = (32,) * 3
    return (
        np.full(shape, density, np.float32), np.full(shape, label, np.uint8), np.full(shape, probability, np.float32)
    )  # fmt: skip


@pytest.mark.parametrize("spec", [WINDOW, UNIT], ids=["window", "unit"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (constant(0, 0, 0), "no atom found"),
        (constant(1, 0, 1), "no atom found"),
        (constant(0, 14, 0), "no atom found"),
        (constant(0, 14, 1), ""),
        (constant(1, 14, 0.3), "no atom found"),
        (constant(1, 14, 1), "atoms found"),
        (constant(1e30, 14, 1), "atoms found"),
        (constant(-1, 14, 1), ""),
        (constant(np.nan, 14, 1), "not finite"),
        (constant(0, 14, np.nan), "not finite"),
        (constant(np.inf, 0, 0), "not finite"),
    ],
)
def test_nothing_to_decode_is_a_result_with_a_reason(fields: Fields, reason: str, spec: GridSpec) -> None:
    found = decode_box("c", *fields, spec)
    assert found.crystal is None
    assert found.reason and reason in found.reason
    assert found.confidence_N.shape == (0,)


@pytest.mark.parametrize("spec", [WINDOW, UNIT, PAPER], ids=["window", "unit", "paper"])
def test_random_fields_hold_no_crystal(spec: GridSpec) -> None:
    rng = np.random.default_rng(0)
    assert spec.shape != "adaptive"
    shape = (spec.shape,) * 3
    for share in (0.02, 0.3, 1.0):
        for elements in (1, 3, 100):
            species = np.where(rng.random(shape) < share, rng.integers(1, elements + 1, shape), 0).astype(np.uint8)
            density = rng.normal(size=shape).astype(np.float32)
            found = decode_box("c", density, species, rng.random(shape, dtype=np.float32), spec, "z_density")
            assert found.crystal is None
            assert np.isfinite(found.atoms.cart_N3).all()


def test_a_density_of_nothing_real_leaves_the_labels_lattice() -> None:
    rng = np.random.default_rng(0)
    crystal = window_of(np.eye(3) * 3.9, [[0, 0, 0], [0.5, 0.5, 0.5]], [55, 17])
    density, species, probability = fields_of(crystal, WINDOW)
    noise = np.abs(rng.normal(0.3, 0.3, density.shape)).astype(np.float32)
    assert errors_A(decoded(crystal, WINDOW, (0.3 * density + noise, species, probability)).crystal, crystal).max() < 0.2
