"""Decoding: exact on true grids of real crystals, robust on noisy ones, calm on fields that hold no crystal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dist_train.config import GridSpec
from dist_train.crystal.decode import Decoded, Estimate, decode, decode_ideal, votes
from dist_train.crystal.elements import MAX_Z, SYMBOLS
from dist_train.crystal.frames import representable
from dist_train.crystal.lattice import from_lengths_angles, periodic_distances
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError

SampleTable = Callable[[str], list[Crystal]]
Fields = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]

COARSE = GridSpec(shape=16, max_spacing_A=0.36)
ADAPTIVE = GridSpec(shape="adaptive", max_voxels=2**17)
CELL = Crystal("cell", np.eye(3) * 4.8, np.zeros((1, 3)), np.array([14])).lattice_A


def errors_A(decoded: Decoded, truth: Crystal) -> NDArray[np.float64] | None:
    """[N] distances between atoms, matched one to one within each element; None unless count and species are exact."""
    found = decoded.crystal
    if found is None or found.composition != truth.composition:
        return None
    distances = periodic_distances(truth.lattice_A, found.frac_N3, truth.frac_N3)
    distances[found.numbers_N[:, None] != truth.numbers_N] = 1e3
    return np.asarray(distances[linear_sum_assignment(distances**2)])


def rms(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt((errors**2).mean()))


def assert_recovered(crystal: Crystal, spec: GridSpec) -> None:
    decoded = decode_ideal(crystal, spec)
    errors = errors_A(decoded, crystal)
    assert errors is not None, f"{crystal.id}: {crystal.composition} became {decoded}"
    assert rms(errors) <= 0.001, crystal.id
    assert decoded.crystal is not None
    assert decoded.crystal.id == crystal.id
    np.testing.assert_array_equal(decoded.crystal.lattice_A, crystal.lattice_A)
    assert ((decoded.crystal.frac_N3 >= 0) & (decoded.crystal.frac_N3 < 1)).all()
    assert decoded.confidence_N.shape == (len(crystal),)
    assert ((decoded.confidence_N > 0.35) & (decoded.confidence_N <= 1)).all()


def representable_of(crystals: list[Crystal], spec: GridSpec) -> Iterator[Crystal]:
    """Without those that the spec refuses."""
    for crystal in crystals:
        with suppress(CrystalError):
            yield representable(crystal, spec)


def fields_of(crystal: Crystal, spec: GridSpec) -> Fields:
    grid = voxelize(crystal, spec)
    return grid.density_CDHW[0], grid.species_DHW, (grid.species_DHW > 0).astype(np.float32)


def noisy(fields: Fields, rng: np.random.Generator, noise: float = 0.05, wrong: float = 0.1) -> Fields:
    """Density with Gaussian noise, in heights of an atom; a share of the voxels with another of the labels."""
    density, species, _ = fields
    labels = np.unique(species)
    others = (np.searchsorted(labels, species) + rng.integers(1, len(labels), species.shape)) % len(labels)
    flipped = np.where(rng.random(species.shape) < wrong, labels[others], species)
    return density + rng.normal(0, noise, density.shape).astype(np.float32), flipped, (flipped > 0).astype(np.float32)


def test_perovskites_are_recovered_exactly(sample_table: SampleTable) -> None:
    crystals = sample_table("perov_5")[::90]
    assert len(crystals) >= 40
    for crystal in crystals:
        assert_recovered(representable(crystal, COARSE), COARSE)


def test_crystals_of_many_sizes_are_recovered_exactly(sample_table: SampleTable) -> None:
    table = sample_table("materials_project")
    large = [crystal for crystal in table if 50 < len(crystal) <= 120 and crystal.volume_A3 < 1500]
    crystals = [crystal for crystal in table if len(crystal) <= 50][::25] + large[:: len(large) // 6]
    held = list(representable_of(crystals, ADAPTIVE))
    assert len(held) >= max(40, 0.95 * len(crystals))
    for crystal in held:
        assert_recovered(crystal, ADAPTIVE)


# The last two hold the noise of a density in which nothing is seen: positions come from the labels alone.
@pytest.mark.parametrize(
    ("noise", "wrong", "bound_A"), [(0.05, 0.1, 0.012), (0.05, 0.3, 0.015), (3, 0, 0.018), (3, 0.1, 0.029)]
)
def test_noisy_perovskites_are_recovered(sample_table: SampleTable, noise: float, wrong: float, bound_A: float) -> None:
    rng = np.random.default_rng(0)
    crystals = [representable(crystal, COARSE) for crystal in sample_table("perov_5")[:3600:120]]
    assert len(crystals) == 30
    damaged = [noisy(fields_of(crystal, COARSE), rng, noise, wrong) for crystal in crystals]
    results = [
        errors_A(decode(crystal.id, *fields, crystal.lattice_A, COARSE), crystal)
        for crystal, fields in zip(crystals, damaged, strict=True)
    ]
    exact = [errors for errors in results if errors is not None]
    assert len(exact) >= (0.95 if wrong <= 0.1 else 0.85) * len(crystals)
    assert rms(np.concatenate(exact)) <= bound_A


def test_lower_confidence_where_labels_are_noisy(sample_table: SampleTable) -> None:
    crystal = representable(sample_table("perov_5")[7], COARSE)
    fields = fields_of(crystal, COARSE)
    clean = decode("c", *fields, crystal.lattice_A, COARSE).confidence_N
    disturbed = decode("c", *noisy(fields, np.random.default_rng(1)), crystal.lattice_A, COARSE).confidence_N
    assert disturbed.mean() < clean.mean() - 0.05


def test_positions_come_from_the_density_and_not_from_the_votes_alone(sample_table: SampleTable) -> None:
    crystal = representable(sample_table("perov_5")[3], COARSE)
    moved = replace(crystal, frac_N3=crystal.frac_N3 + 0.02 / crystal.lengths_angles[:3])
    _, species, probability = fields_of(crystal, COARSE)
    found = decode("c", fields_of(moved, COARSE)[0], species, probability, crystal.lattice_A, COARSE)
    errors = errors_A(found, moved)
    assert errors is not None
    assert errors.max() < 0.001  # the votes are 0.035 A away


def test_a_density_of_nothing_real_cannot_pull_atoms_away(sample_table: SampleTable) -> None:
    rng = np.random.default_rng(0)
    for crystal in sample_table("perov_5")[:1000:100]:
        crystal = representable(crystal, COARSE)
        density, species, probability = fields_of(crystal, COARSE)
        scrambled = rng.permutation(density.ravel()).reshape(density.shape)
        errors = errors_A(decode("c", scrambled, species, probability, crystal.lattice_A, COARSE), crystal)
        assert errors is not None
        assert errors.max() < 0.2  # 0.5 where the residual doesn't weigh the density


@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_a_noisy_density_under_clean_labels_adds_no_atoms(sample_table: SampleTable, noise: float) -> None:
    rng = np.random.default_rng(3)
    for crystal in sample_table("perov_5")[:1000:100]:
        crystal = representable(crystal, COARSE)
        density, species, probability = fields_of(crystal, COARSE)
        density = density + rng.normal(0, noise, density.shape).astype(np.float32)
        errors = errors_A(decode("c", density, species, probability, crystal.lattice_A, COARSE), crystal)
        assert errors is not None
        assert errors.max() < 0.2


@pytest.mark.parametrize("table", ["perov_5", "materials_project"])
def test_order_of_atoms_does_not_matter(sample_table: SampleTable, table: str) -> None:
    spec = COARSE if table == "perov_5" else ADAPTIVE
    for crystal in [crystal for crystal in sample_table(table) if len(crystal) <= 30][5:500:100]:
        crystal = representable(crystal, spec)
        order = np.random.default_rng(0).permutation(len(crystal))
        shuffled = replace(crystal, frac_N3=crystal.frac_N3[order], numbers_N=crystal.numbers_N[order])
        first, second = decode_ideal(crystal, spec), decode_ideal(shuffled, spec)
        assert first.crystal is not None
        errors = errors_A(second, first.crystal)
        assert errors is not None
        assert errors.max() < 1e-4


@pytest.mark.parametrize("noise", [False, True])
def test_rolled_fields_give_the_shifted_crystal(sample_table: SampleTable, noise: bool) -> None:
    rng = np.random.default_rng(2)
    for crystal in sample_table("perov_5")[11:1000:200]:
        crystal, steps = representable(crystal, COARSE), tuple(rng.integers(0, 16, 3).tolist())
        fields = fields_of(crystal, COARSE)
        fields = noisy(fields, rng) if noise else fields
        density, species, probability = (np.roll(field, steps, axis=(0, 1, 2)) for field in fields)
        first = decode("c", *fields, crystal.lattice_A, COARSE)
        rolled = decode("c", density, species, probability, crystal.lattice_A, COARSE)
        assert first.crystal is not None
        shifted = replace(first.crystal, frac_N3=first.crystal.frac_N3 + np.array(steps) / 16)
        errors = errors_A(rolled, shifted)
        assert errors is not None
        assert errors.max() < (0.01 if noise else 1e-4)
        np.testing.assert_allclose(np.sort(rolled.confidence_N), np.sort(first.confidence_N), atol=1e-6)


def test_atom_on_the_border_of_the_cell_is_one_atom() -> None:
    crystal = Crystal("corner", np.eye(3) * 4.8, np.array([[0.001, 0.999, 0.0], [0.5, 0.5, 0.999]]), np.array([55, 17]))
    assert_recovered(crystal, COARSE)


@pytest.mark.parametrize(("numbers", "bond_A"), [((1, 1), 0.74), ((8, 1), 0.96), ((7, 7), 1.1), ((7, 6), 1.15)])
def test_bonds_of_molecules_stay_two_atoms(numbers: tuple[int, int], bond_A: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        first, bond = rng.random(3), rng.normal(size=3)
        second = first + bond / np.linalg.norm(bond) * bond_A / 4.6
        crystal = Crystal("molecule", np.eye(3) * 4.6, np.stack([first, second]), np.array(numbers))
        assert_recovered(crystal, GridSpec(shape=16))


PAIR_CELL = from_lengths_angles(np.array([6.0, 6.0, 7.1, 80.0, 95.0, 105.0]))
DEFAULT = GridSpec(shape=24)
PAPER = GridSpec.model_validate(
    {"preset": "paper-window", "frame": "cell", "shape": 24, "random_rotation": False, "channels": ["occupancy"]}
)


@pytest.mark.parametrize(
    ("spec", "numbers", "distance_A"),
    [
        (DEFAULT, (6, 6), DEFAULT.min_like_distance_A),
        (DEFAULT, (6, 8), DEFAULT.min_distance_A),
        (PAPER, (6, 6), PAPER.min_like_distance_A),
        (PAPER, (6, 8), PAPER.min_distance_A),
    ],
)
def test_atoms_as_near_as_a_spec_allows_are_told_apart(spec: GridSpec, numbers: tuple[int, int], distance_A: float) -> None:
    rng, recovered = np.random.default_rng(0), 0
    for _ in range(200):
        first, bond = rng.random(3) @ PAIR_CELL, rng.normal(size=3)
        cart = np.stack([first, first + bond / np.linalg.norm(bond) * (distance_A + 1e-6)])
        crystal = Crystal("pair", PAIR_CELL, cart @ np.linalg.inv(PAIR_CELL), np.array(numbers))
        representable(crystal, spec)
        errors = errors_A(decode_ideal(crystal, spec), crystal)
        recovered += errors is not None and errors.max() < 0.001
    assert recovered >= 198


def test_atoms_nearer_than_a_spec_allows_are_one() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        first, bond = rng.random(3) @ PAIR_CELL, rng.normal(size=3)
        cart = np.stack([first, first + bond / np.linalg.norm(bond) * (DEFAULT.min_distance_A - 0.03)])
        found = decode_ideal(Crystal("pair", PAIR_CELL, cart @ np.linalg.inv(PAIR_CELL), np.array([6, 8])), DEFAULT).crystal
        assert found is not None
        assert len(found) == 1


@pytest.mark.parametrize(("probability", "atoms"), [(1.0, 2), (0.5, 1)])
def test_labels_without_density_are_believed_only_where_they_are_clear(probability: float, atoms: int) -> None:
    both = Crystal("two", np.eye(3) * 4.8, np.array([[0.2, 0.3, 0.4], [0.7, 0.8, 0.9]]), np.array([14, 8]))
    _, species, labelled = fields_of(both, COARSE)
    density, *_ = fields_of(replace(both, frac_N3=both.frac_N3[:1], numbers_N=both.numbers_N[:1]), COARSE)
    found = decode("c", density, species, np.where(species == 8, probability, labelled), both.lattice_A, COARSE).crystal
    assert found is not None
    assert len(found) == atoms


# Other ways to the same


def test_positions_come_from_the_electrons_as_well(sample_table: SampleTable) -> None:
    spec = COARSE.model_copy(update={"channels": ("occupancy", "z_density")})
    for crystal in representable_of(sample_table("perov_5")[20:2000:200], spec):
        grid = voxelize(crystal, spec)
        labels = grid.species_DHW, (grid.species_DHW > 0).astype(np.float32), crystal.lattice_A
        errors = errors_A(decode("c", grid.density_CDHW[1], *labels, spec, "z_density"), crystal)
        assert errors is not None
        assert errors.max() < 0.001


def test_votes_are_the_best_element_and_the_chance_of_any() -> None:
    logits = np.zeros((4, 2, 1, 1), np.float32)
    logits[:, 0, 0, 0] = [1000, 1, 3, 2]
    logits[:, 1, 0, 0] = np.log([0.25, 0.15, 0.2, 0.4])
    species, probability = votes(logits, (8, 22, 56))
    assert (species.dtype, probability.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(species.ravel(), [22, 56])
    np.testing.assert_allclose(probability.ravel(), [0, 0.75], atol=1e-6)


# Fields that hold no crystal


def constant(density: float, label: int, probability: float, voxels: int = 16) -> Fields:
    shape = (voxels,) * 3
    return (
        np.full(shape, density, np.float32), np.full(shape, label, np.uint8), np.full(shape, probability, np.float32)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (constant(0, 0, 0), "no atom found"),
        (constant(1, 0, 1), "no atom found"),
        (constant(0, 14, 0), "no atom found"),
        (constant(1, 14, 0.3), "no atom found"),  # too few votes
        (constant(np.nan, 14, 1), "not finite"),
        (constant(0, 14, np.nan), "not finite"),
        (constant(np.inf, 0, 0), "not finite"),
    ],
)
def test_nothing_to_decode_is_a_result_with_a_reason(fields: Fields, reason: str) -> None:
    decoded = decode("c", *fields, CELL, COARSE)
    assert decoded.crystal is None
    assert reason in decoded.reason
    assert decoded.confidence_N.shape == (0,)


def test_lattice_that_is_not_finite() -> None:
    decoded = decode("c", *constant(0, 0, 0), np.full((3, 3), np.nan), COARSE)
    assert decoded.crystal is None
    assert "not finite" in decoded.reason


def test_one_bad_voxel_is_enough() -> None:
    density, species, probability = constant(0, 14, 1)
    density[3, 4, 5] = np.nan
    assert "not finite" in decode("c", density, species, probability, CELL, COARSE).reason


@pytest.mark.parametrize("label", [-1, 104, 300])
def test_labels_that_are_no_elements(label: int) -> None:
    density, species, probability = constant(0, 14, 1)
    labels = species.astype(np.int64)
    labels[1, 2, 3] = label
    decoded = decode("c", density, labels, probability, CELL, COARSE)
    assert decoded.crystal is None
    assert "no atomic numbers from 0 to 103" in decoded.reason


def test_absurdly_many_atoms_are_not_believed() -> None:
    lattice = Crystal("wide", np.eye(3) * 14.0, np.zeros((1, 3)), np.array([14])).lattice_A
    decoded = decode("c", *constant(1, 14, 1, voxels=14), lattice, GridSpec(shape=14, max_spacing_A=1.0))
    assert decoded.crystal is None
    assert "over 1000 atoms found" in decoded.reason


def test_random_labels_hold_no_atoms() -> None:
    rng = np.random.default_rng(0)
    shape = (16, 16, 16)
    species = rng.integers(0, 104, shape, dtype=np.uint8)
    density = rng.random(shape, dtype=np.float32)
    decoded = decode("c", density, species, np.ones(shape, np.float32), CELL, COARSE)
    assert decoded.crystal is None
    assert "no atom found" in decoded.reason


def test_labels_everywhere_give_separate_atoms_or_none() -> None:
    decoded = decode("c", *constant(1, 14, 1), CELL, COARSE)
    if decoded.crystal is None:
        assert decoded.reason
    else:
        assert np.isfinite(decoded.crystal.frac_N3).all()
        assert len(decoded.crystal) <= 4.8**3 / (4 / 3 * np.pi * 0.4**3)  # balls of half the least distance


@pytest.mark.parametrize(
    "lattice",
    [
        from_lengths_angles(np.array([4.0, 4.0, 4.0, 60.0, 60.0, 119.999])),
        np.diag([1.0, 1.0, 1e-6]),
        np.ones((3, 3)),
        np.full((3, 3), np.nan),
        np.diag([40.0, 4.0, 4.0]),
        np.eye(3) * 1e44,
    ],
)
def test_a_lattice_that_is_none_gives_a_reason_at_once(lattice: np.ndarray) -> None:
    everywhere = np.ones((16, 16, 16))
    spec = GridSpec(shape=16)
    found = decode("x", everywhere.astype(np.float32), everywhere.astype(int), everywhere.astype(np.float32), lattice, spec)
    assert found.crystal is None
    assert any(word in found.reason for word in ("lattice", "flat", "too large"))


def test_atoms_everywhere_are_no_crystal() -> None:
    everywhere = np.full((32, 32, 32), 14)
    found = decode(
        "x", np.ones((32, 32, 32), np.float32), everywhere, np.ones((32, 32, 32), np.float32), np.eye(3) * 9.6, GridSpec()
    )
    assert found.crystal is None
    assert "over 442 atoms found" in found.reason  # 0.5 in a cubic angstrom


# An estimate of the atoms beside the votes


PAIR = Crystal("pair", np.eye(3) * 4.8, np.array([[0.0, 0, 0], [0.5, 0.5, 0.5]]), np.array([14, 8]))


def estimate(**atoms: float) -> Estimate:
    composition = np.zeros(MAX_Z + 1)
    for symbol, count in atoms.items():
        composition[SYMBOLS.index(symbol)] = count
    return Estimate(float(composition.sum()), composition)


@pytest.mark.parametrize(("probability", "alone"), [(0.25, 1), (0.6, 2)])
def test_an_unclear_atom_is_one_where_the_count_says_so(probability: float, alone: int) -> None:
    density, species, _ = fields_of(PAIR, COARSE)
    unclear = np.where(species == 8, probability, species > 0).astype(np.float32)
    fields = "c", density, species, unclear, PAIR.lattice_A, COARSE, "occupancy"
    for told, atoms in ((None, alone), (estimate(Si=1.0), 1), (estimate(Si=1.1, O=0.8), 2)):
        found = decode(*fields, told).crystal
        assert found is not None
        assert len(found) == atoms


def test_clear_atoms_stand_against_a_wrong_count() -> None:
    fields = "c", *fields_of(PAIR, COARSE), PAIR.lattice_A, COARSE, "occupancy"
    for told in (estimate(Si=1, O=1.4), estimate(Si=1, O=0.7)):
        found = decode(*fields, told).crystal
        assert found is not None
        assert found.formula == PAIR.formula


@pytest.mark.parametrize(
    ("share", "told", "element"), [(0.55, {"O": 1}, 8), (0.55, {"N": 1}, 7), (0.0, {"N": 0.5, "O": 0.5}, 8)]
)
def test_an_element_is_weighed_against_the_composition(share: float, told: dict[str, float], element: int) -> None:
    """share: of the votes around the oxygen atom, which nitrogen has; the other votes are oxygen's."""
    density, species, labelled = fields_of(PAIR, COARSE)
    oxygen = np.argwhere(species == 8)
    wrong = oxygen[np.random.default_rng(0).permutation(len(oxygen))[: round(share * len(oxygen))]]
    species = species.copy()
    species[tuple(wrong.T)] = 7
    found = decode("c", density, species, labelled, PAIR.lattice_A, COARSE, "occupancy", estimate(Si=1, **told)).crystal
    assert found is not None
    assert sorted(found.numbers_N) == sorted([14, element])


def test_a_poor_estimate_counts_for_little() -> None:
    fields = "c", *fields_of(PAIR, COARSE), PAIR.lattice_A, COARSE, "occupancy"
    told = estimate(Si=3.0, O=0.0)
    for atoms_error, composition_error, composition in ((0.15, 0.3, {14: 2}), (2.0, 3.0, PAIR.composition)):
        found = decode(*fields, told._replace(atoms_error=atoms_error, composition_error=composition_error)).crystal
        assert found is not None
        assert found.composition == composition


def test_what_the_network_does_not_know_is_never_decoded() -> None:
    """Two atoms of silicon where one is told, and one of hydrogen: that would be likelier, if the network knew hydrogen."""
    pair = replace(PAIR, numbers_N=[14, 14])
    fields = "c", *fields_of(pair, COARSE), pair.lattice_A, COARSE, "occupancy"
    told = estimate(Si=1.0, H=1.0)
    known = np.where(np.arange(MAX_Z + 1) == 14, told.composition_Z, -np.inf)
    for atoms, composition, found in ((2.0, told.composition_Z, {1, 14}), (2.0, known, {14})):
        crystal = decode(*fields, Estimate(atoms, composition)).crystal
        assert crystal is not None and len(crystal) == 2
        assert set(crystal.numbers_N) == found


def hesitant(probability: float = 0.55, away_A: float = 0.9) -> tuple[Crystal, Fields]:
    """Crystal and fields of a network that doesn't know on which of two places one of its atoms is: it votes for both, and
    spreads the density of one over them."""
    sites = np.array([[0.1, 0.1, 0.1], [0.6, 0.6, 0.6]])
    crystal = Crystal("c", CELL, sites, np.array([14, 8]))
    away = np.array([[0, 0, 0], [away_A / 2 / 4.8, 0, 0]])
    others = [replace(crystal, frac_N3=sites + side * away) for side in (-1, 1)]
    (density, species, _), (density_b, species_b, _) = (fields_of(other, COARSE) for other in others)
    told = np.where(species == species_b, species > 0, probability).astype(np.float32)
    return crystal, ((density + density_b) / 2, np.maximum(species, species_b), told)


def test_an_atom_at_one_of_two_places_is_one_atom_between_them() -> None:
    crystal, fields = hesitant()
    assert len(decode("c", *fields, CELL, COARSE).crystal or ()) == 3  # by the votes alone
    unsure = estimate(Si=1.2, O=1.4)._replace(atoms_error=1.3, composition_error=1.5)
    found = decode("c", *fields, CELL, COARSE, "occupancy", unsure)
    errors = errors_A(found, crystal)
    assert errors is not None, found
    assert errors.max() < 0.5


def test_two_atoms_as_near_as_that_are_two() -> None:
    pair = Crystal(
        "c", CELL, np.array([[0.1, 0.1, 0.1], [0.6, 0.6, 0.6], [0.6 + 0.9 / 4.8, 0.6, 0.6]]), np.array([14, 8, 8])
    )
    unsure = estimate(Si=1.0, O=1.4)._replace(atoms_error=1.3, composition_error=1.5)
    errors = errors_A(decode("c", *fields_of(pair, COARSE), CELL, COARSE, "occupancy", unsure), pair)
    assert errors is not None
    assert errors.max() < 0.01


def test_an_element_that_the_composition_overlooks_stands_where_the_votes_are_clear() -> None:
    """Eight atoms of silicon: 0.2 are told, by a network that is right to 1.2 of an element."""
    sites = np.array([[x, y, z] for x in (0.0, 0.5) for y in (0.0, 0.5) for z in (0.0, 0.5)])
    crystal = Crystal("c", CELL, sites, np.full(8, 14))
    overlooked = estimate(Si=0.2, Pt=0.8, Li=0.7)._replace(atoms=8.0, composition_error=1.2)
    found = decode("c", *fields_of(crystal, COARSE), CELL, COARSE, "occupancy", overlooked).crystal
    assert found is not None
    assert found.composition == {14: 8}
