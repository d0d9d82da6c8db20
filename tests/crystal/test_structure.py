"""Crystals as values: what they say about themselves, round trips, reduction, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.crystal.lattice import periodic_distances
from dist_train.crystal.structure import Crystal, wrap
from dist_train.errors import CrystalError

SEEDS = st.integers(0, 2**32 - 1)
SHEAR = np.array([[1, 2, 0], [0, 1, -1], [3, 6, 1]])  # determinant 1
MakeCrystal = Callable[..., Crystal]


def crystal_of(numbers: list[int], edge_A: float = 4.0) -> Crystal:
    """Atoms along the diagonal of a cube."""
    return Crystal("a cube", np.eye(3) * edge_A, np.linspace(0, 1, len(numbers), endpoint=False)[:, None] * [1, 1, 1],
                   np.array(numbers, dtype=np.int64))  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "formula"),
    [
        ([31, 52], "Ga1 Te1"),
        ([8, 22, 8, 56, 8], "Ba1 O3 Ti1"),
        ([1, 8, 1, 1, 8, 1], "H2 O1"),
        ([6] * 6, "C1"),
        ([6, 5, 4, 6], "B1 Be1 C2"),
        ([20, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6], "C12 Ca1"),
        ([103], "Lr1"),
    ],
)
def test_formula_is_reduced_and_alphabetical(numbers: list[int], formula: str) -> None:
    assert crystal_of(numbers).formula == formula


def test_composition_counts_atoms_by_rising_number() -> None:
    composition = crystal_of([8, 22, 8, 56, 8]).composition
    assert composition == {8: 3, 22: 1, 56: 1}
    assert list(composition) == [8, 22, 56]


@given(seed=SEEDS)
def test_formula_ignores_order_and_multiples(random_crystal: MakeCrystal, seed: int) -> None:
    crystal = random_crystal(seed, 5)
    shuffled = np.random.default_rng(seed).permutation(np.tile(crystal.numbers_N, 3))
    assert replace(crystal, numbers_N=shuffled, frac_N3=np.zeros((15, 3))).formula == crystal.formula


@given(seed=SEEDS, scale=st.sampled_from([1e-12, 1.0, 1e5]))
def test_json_round_trip_is_exact(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    crystal = Crystal('an "id"\n\\ ü', rng.normal(size=(3, 3)) * scale, rng.normal(size=(7, 3)), rng.integers(1, 99, 7))
    text = crystal.to_json()
    again = Crystal.from_json(text)
    assert "\n" not in text
    assert again.id == crystal.id
    for name in ("lattice_A", "frac_N3", "numbers_N"):
        np.testing.assert_array_equal(getattr(again, name), getattr(crystal, name))
    assert Crystal.from_json(text.encode()).to_json() == text


def test_json_ignores_keys_of_later_versions() -> None:
    row = json.loads(crystal_of([3, 9]).to_json())
    assert Crystal.from_json(json.dumps(row | {"charge": 0})).formula == "F1 Li1"


def test_a_crystal_cannot_be_changed() -> None:
    lattice, frac, numbers = np.eye(3) * 4, np.zeros((1, 3)), np.array([26])
    crystal = Crystal("iron", lattice, frac, numbers)
    lattice[0, 0], frac[0, 0], numbers[0] = 9.0, 0.5, 1
    np.testing.assert_array_equal(crystal.lattice_A, np.eye(3) * 4)
    assert (crystal.frac_N3[0, 0], crystal.numbers_N[0]) == (0.0, 26)
    for name in ("lattice_A", "frac_N3", "numbers_N"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(crystal, name)[0] = 1
    with pytest.raises(FrozenInstanceError):
        crystal.id = "other"  # type: ignore[misc]


@given(seed=SEEDS)
def test_reduction_preserves_the_crystal(random_crystal: MakeCrystal, seed: int) -> None:
    compact = random_crystal(seed, 5)
    skewed = replace(compact, lattice_A=SHEAR @ compact.lattice_A, frac_N3=compact.frac_N3 @ np.linalg.inv(SHEAR))
    reduced = skewed.reduced()
    assert reduced.id == skewed.id
    assert reduced.volume_A3 == pytest.approx(skewed.volume_A3, rel=1e-9)
    np.testing.assert_array_equal(reduced.numbers_N, skewed.numbers_N)
    assert ((reduced.frac_N3 >= 0) & (reduced.frac_N3 < 1)).all()
    moved = (reduced.cart_N3 - skewed.cart_N3) @ np.linalg.inv(compact.lattice_A)
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-7)
    before, after = (periodic_distances(c.lattice_A, c.frac_N3, c.frac_N3) for c in (compact, reduced))
    np.testing.assert_allclose(after, before, atol=1e-7)
    assert reduced.lengths_angles[:3].sum() <= compact.lengths_angles[:3].sum() + 1e-6


def test_reduction_of_real_crystals(sample_table: Callable[[str], list[Crystal]]) -> None:
    for crystal in sample_table("materials_project")[::25]:
        skewed = replace(crystal, lattice_A=SHEAR @ crystal.lattice_A, frac_N3=crystal.frac_N3 @ np.linalg.inv(SHEAR))
        reduced = skewed.reduced()
        assert reduced.volume_A3 == pytest.approx(crystal.volume_A3, rel=1e-9)
        few = slice(0, 20)
        before, after = (periodic_distances(c.lattice_A, c.frac_N3[few], c.frac_N3[few]) for c in (crystal, reduced))
        np.testing.assert_allclose(after, before, atol=1e-6, err_msg=crystal.id)


def test_reduction_that_fails_names_the_crystal() -> None:
    thin = Crystal("thin", np.array([[0.02, 0, 0], [100, 100, 700], [1, 3, 0]]), np.zeros((1, 3)), np.array([6]))
    with pytest.raises(CrystalError, match=r"thin: Niggli reduction of the cell failed; edges .* A"):
        thin.checked(max_atoms=1).reduced()


def test_a_sound_crystal_passes_the_check() -> None:
    crystal = crystal_of([6, 8])
    assert crystal.checked(max_atoms=2) is crystal


GOOD = crystal_of([6, 8])


@pytest.mark.parametrize(
    ("crystal", "message"),
    [
        (crystal_of([]), "no atoms"),
        (crystal_of([6] * 5), "5 atoms, at most 4 are taken"),
        (replace(GOOD, frac_N3=np.zeros((3, 3))), "3 positions for 2 atomic numbers"),
        (replace(GOOD, frac_N3=np.array([[0, 0, 0], [0, np.nan, 0]])), "not finite"),
        (replace(GOOD, lattice_A=np.diag([4, 4, np.inf])), "not finite"),
        (replace(GOOD, lattice_A=np.diag([4, 4, 1001.0])), "cell edge of 1001 A, at most 1000 A"),
        (replace(GOOD, lattice_A=np.diag([4, 4, 1e-3])), r"cell volume of 0.016 A\^3, at least 0.1"),
        (replace(GOOD, lattice_A=np.ones((3, 3))), r"cell volume of 0 A\^3"),
        (crystal_of([6, 104, 0]), r"unknown atomic numbers \[0, 104\], known are 1 to 103"),
        (crystal_of([-1, 6]), r"unknown atomic numbers \[-1\]"),
    ],
)
def test_what_no_model_can_represent_is_refused(crystal: Crystal, message: str) -> None:
    with pytest.raises(CrystalError, match=f"a cube: .*{message}"):
        crystal.checked(max_atoms=4)


@given(st.floats(-1e6, 1e6))
def test_wrapped_coordinates_lie_in_the_cell(x: float) -> None:
    wrapped = float(wrap(np.array([x]))[0])
    assert 0 <= wrapped < 1
    assert abs((x - wrapped) - round(x - wrapped)) < 1e-9


def test_wrapping_just_below_zero_gives_zero() -> None:
    np.testing.assert_array_equal(wrap(np.array([-1e-17, -0.0, 1.0, -0.25])), [0, 0, 0, 0.75])


def test_geometry() -> None:
    crystal = Crystal("c", np.array([[0, 2.0, 0], [3, 0, 0], [0, 0, 5]]), np.array([[0.5, 0, -1]]), np.array([1]))
    assert crystal.volume_A3 == pytest.approx(30)
    assert len(crystal) == 1
    np.testing.assert_allclose(crystal.cart_N3, [[0, 1, -5]])
    np.testing.assert_allclose(crystal.lengths_angles, [2, 3, 5, 90, 90, 90])
