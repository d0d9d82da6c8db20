"""Metrics of predicted crystals: hand-made pairs with known answers, real crystals against themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dist_train.crystal.interop import match_rms
from dist_train.crystal.metrics import (
    PairMetrics,
    compare,
    compare_all,
    compare_with_themselves,
    crowded,
    structure_valid,
    summarise,
)
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.validity import composition_valid, smact_installed

SAMPLE = Path(__file__).parents[2] / "data" / "sample"

needs_smact = pytest.mark.skipif(not smact_installed(), reason="smact is not installed")


def crystal(
    frac: list[list[float]], numbers: list[int], edges: tuple[float, float, float] = (4.0, 4.0, 4.0), id: str = "c"
) -> Crystal:
    """Atoms in a rectangular cell."""
    return Crystal(id, np.diag(edges), np.array(frac), np.array(numbers))


PEROVSKITE = crystal(
    [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], [56, 22, 8, 8, 8], id="BaTiO3"
)
PAIR = crystal([[0, 0, 0], [0.5, 0.5, 0.5]], [55, 17])


def samples(count: int) -> list[Crystal]:
    """Perovskites of the sample."""
    rows = read_parquet_rows(SAMPLE / "perov_5.parquet", 0, count)
    return [row for row in rows if isinstance(row, Crystal)]


# One pair


def test_perfect_copy() -> None:
    result = compare(PEROVSKITE, PEROVSKITE)
    assert result.rms == pytest.approx(0.0, abs=1e-9)
    assert replace(result, rms=0.0) == PairMetrics(
        id="BaTiO3",
        n_true=5,
        n_predicted=5,
        count_ok=True,
        species_correct=5,
        position_error_A=0.0,
        length_error_A=0.0,
        angle_error_deg=0.0,
        match=True,
        rms=0.0,
        valid=True,
        composition_valid=True if smact_installed() else None,
    )


def test_order_and_periodic_images_do_not_count() -> None:
    """Atoms in another order, each in another cell."""
    order = [4, 1, 3, 0, 2]
    images = np.array([[1, 0, 0], [0, -3, 0], [0, 0, 2], [1, 1, 1], [0, 0, 0]])
    other = replace(PEROVSKITE, frac_N3=PEROVSKITE.frac_N3[order] + images, numbers_N=PEROVSKITE.numbers_N[order])
    result = compare(PEROVSKITE, other)
    assert (result.species_correct, result.match) == (5, True)
    assert result.position_error_A == pytest.approx(0.0, abs=1e-12)


def test_shifted_origin_matches_but_not_in_position() -> None:
    """The matcher is free of the origin; positions are compared as given: 0.1 x 4 A."""
    result = compare(PAIR, replace(PAIR, frac_N3=PAIR.frac_N3 + np.array([0.1, 0, 0])))
    assert result.match
    assert result.rms == pytest.approx(0.0, abs=1e-6)
    assert result.position_error_A == pytest.approx(0.4)
    assert result.species_correct == 2


def test_positions_wrap_across_the_boundary() -> None:
    """0.99 and 0.01 of an edge of 4 A are 0.08 A apart."""
    result = compare(crystal([[0.99, 0, 0]], [8]), crystal([[0.01, 0, 0]], [8]))
    assert result.position_error_A == pytest.approx(0.08)


def test_wrong_species() -> None:
    result = compare(PEROVSKITE, replace(PEROVSKITE, numbers_N=np.array([38, 22, 8, 8, 8])))
    assert (result.species_correct, result.count_ok, result.match, result.rms) == (4, True, False, None)
    assert result.position_error_A == 0.0
    assert result.valid


def test_swapped_species_are_both_wrong() -> None:
    assert compare(PAIR, replace(PAIR, numbers_N=PAIR.numbers_N[::-1])).species_correct == 0


def test_species_partners_are_one_to_one() -> None:
    """Two predicted atoms near one true atom: only one is its partner, the other must serve the far one."""
    true = crystal([[0.1, 0, 0], [0.6, 0, 0]], [11, 17], edges=(10, 4, 4))
    predicted = crystal([[0.1, 0, 0], [0.2, 0, 0]], [11, 11], edges=(10, 4, 4))
    assert compare(true, predicted).species_correct == 1


def test_missing_atom() -> None:
    """Four atoms of five: the lost oxygen is wrong, and its nearest neighbour is 2 A away."""
    result = compare(PEROVSKITE, replace(PEROVSKITE, frac_N3=PEROVSKITE.frac_N3[:4], numbers_N=PEROVSKITE.numbers_N[:4]))
    assert (result.n_predicted, result.count_ok, result.species_correct, result.match) == (4, False, 4, False)
    assert result.position_error_A == pytest.approx((2.0 / 5 + 0.0) / 2)


def test_additional_atom() -> None:
    """All five true atoms are there; the sixth predicted one is 1 A from its nearest."""
    frac = np.vstack([PEROVSKITE.frac_N3, [0.25, 0, 0]])
    result = compare(PEROVSKITE, replace(PEROVSKITE, frac_N3=frac, numbers_N=np.append(PEROVSKITE.numbers_N, 8)))
    assert (result.count_ok, result.species_correct, result.match) == (False, 5, False)
    assert result.position_error_A == pytest.approx((0.0 + 1.0 / 6) / 2)


def test_cell_errors_are_in_the_order_given() -> None:
    true = crystal([[0, 0, 0]], [29], edges=(3, 4, 5))
    predicted = crystal([[0, 0, 0]], [29], edges=(4, 3, 5.5))
    result = compare(true, predicted)
    assert result.length_error_A == pytest.approx(2.5 / 3)
    assert result.angle_error_deg == pytest.approx(0.0)
    sheared = replace(
        true, lattice_A=np.array([[3, 0, 0], [4 * np.cos(np.radians(84)), 4 * np.sin(np.radians(84)), 0], [0, 0, 5.0]])
    )
    assert compare(true, sheared).angle_error_deg == pytest.approx(2.0)


def test_positions_are_compared_in_the_true_cell() -> None:
    """Equal fractions in a cell twice as large are no position error."""
    assert compare(PAIR, replace(PAIR, lattice_A=PAIR.lattice_A * 2.0)).position_error_A == 0.0


IMPOSSIBLE = {
    "nan": replace(PAIR, frac_N3=PAIR.frac_N3 * np.nan),
    "infinite cell": replace(PAIR, lattice_A=np.full((3, 3), np.inf)),
    "no volume": replace(PAIR, lattice_A=np.ones((3, 3))),
    "no atoms": crystal([], []),
    "no element": replace(PAIR, numbers_N=np.array([0, 17])),
    "huge": replace(PAIR, lattice_A=PAIR.lattice_A * 1e6),
    "needle": crystal([[0, 0, 0], [0.5, 0.5, 0.5]], [55, 17], edges=(0.3, 0.4, 900)),
}


@pytest.mark.parametrize("predicted", [None, *IMPOSSIBLE.values()], ids=["none", *IMPOSSIBLE])
def test_failed_decode_is_a_miss_everywhere(predicted: Crystal | None) -> None:
    result = compare(PAIR, predicted)
    assert result == PairMetrics(id="c", n_true=2, n_predicted=0)
    assert result.failed
    assert not any((result.match, result.valid, result.count_ok, result.species_correct))
    assert (result.composition_valid, result.match_cdvae) == (False, False)


def test_oblique_cells_are_compared_quickly_and_exactly() -> None:
    """The same crystal in a very skewed cell: distances are those of the compact one."""
    shear = np.array([[1, 0, 0], [9, 1, 0], [-7, 8, 1]])
    skewed = replace(PEROVSKITE, lattice_A=shear @ PEROVSKITE.lattice_A, frac_N3=PEROVSKITE.frac_N3 @ np.linalg.inv(shear))
    moved = replace(skewed, frac_N3=(skewed.cart_N3 + np.array([0.3, 0, 0])) @ np.linalg.inv(skewed.lattice_A))
    assert structure_valid(skewed)
    result = compare(skewed, moved)
    assert result.position_error_A == pytest.approx(0.3)
    assert result.match


# Validity


@pytest.mark.parametrize(("distance", "valid"), [(0.49, False), (0.51, True)])
def test_validity_by_distance(distance: float, valid: bool) -> None:
    """Within the cell, and over its boundary."""
    assert structure_valid(crystal([[0, 0, 0], [distance / 4, 0, 0]], [1, 1])) == valid
    assert structure_valid(crystal([[0, 0, 0], [1 - distance / 4, 0, 0]], [1, 1])) == valid


def test_validity_does_not_count_own_images() -> None:
    assert structure_valid(crystal([[0, 0, 0]], [1], edges=(0.45, 3, 3)))


def test_validity_by_volume() -> None:
    assert structure_valid(crystal([[0, 0, 0]], [1], edges=(0.5, 0.5, 0.41)))
    assert not structure_valid(crystal([[0, 0, 0]], [1], edges=(0.5, 0.5, 0.39)))


INVALID = crystal([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0]], [11, 17, 17], id="NaCl2")


@needs_smact
def test_perfect_copy_of_an_invalid_composition_is_a_miss_to_cdvae() -> None:
    result = compare(INVALID, INVALID)
    assert (result.match, result.valid, result.composition_valid, result.match_cdvae) == (True, True, False, False)
    assert compare(PAIR, PAIR).match_cdvae


@needs_smact
def test_the_composition_judged_is_the_predicted_one() -> None:
    """Whatever the true one is, and whether the structure is possible or not."""
    assert not compare(PAIR, INVALID).composition_valid
    assert compare(INVALID, PAIR).composition_valid
    close = compare(PAIR, replace(PAIR, frac_N3=PAIR.frac_N3 * 0.1))
    assert (close.valid, close.composition_valid, close.match_cdvae) == (False, True, False)


def test_without_smact_no_composition_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, neither 0 nor 1, also where some predictions are misses anyhow; all else as ever."""
    monkeypatch.setitem(sys.modules, "smact", None)
    results = [compare(PAIR, PAIR), compare(PAIR, INVALID), compare(PAIR, None)]
    assert [result.composition_valid for result in results] == [None, None, False]
    assert [result.match_cdvae for result in results] == [None, False, False]
    summary = summarise(results)
    assert summary["match_rate_cdvae"] is summary["rmse_cdvae"] is summary["composition_valid_rate"] is None
    assert (summary["match_rate"], summary["valid_rate"]) == pytest.approx((1 / 3, 2 / 3))


# Many pairs


def test_summary_of_known_pairs() -> None:
    """A match, one that isn't valid in structure, one that isn't in composition, two misses and a failed decode."""
    pairs = [
        PairMetrics("a", 5, 5, True, 5, 0.1, 0.2, 1.0, True, 0.02, True, True),
        PairMetrics("b", 2, 2, True, 2, 0.3, 0.4, 2.0, True, 0.10, False, True),
        PairMetrics("e", 3, 3, True, 3, 0.3, 0.4, 2.0, True, 0.06, True, False),
        PairMetrics("c", 10, 9, False, 4, 0.5, 0.6, 3.0, False, None, True, True),
        PairMetrics("f", 2, 1, False, 1, 0.3, 0.4, 2.0, False, None, False, False),
        PairMetrics("d", 3, 0),
    ]
    expected = {
        "match_rate": 2 / 6,
        "match_rate_unconditioned": 3 / 6,
        "match_rate_cdvae": 1 / 6,
        "rmse": 0.04,
        "rmse_cdvae": 0.02,
        "valid_rate": 3 / 6,
        "composition_valid_rate": 3 / 6,
        "atom_count_accuracy": 3 / 6,
        "species_accuracy": 15 / 25,
        "position_error_A": 0.3,
        "length_error_A": 0.4,
        "angle_error_deg": 2.0,
        "n_test": 6,
        "n_failed": 1,
    }
    assert summarise(pairs) == pytest.approx(expected)


def test_summary_without_numbers_is_json() -> None:
    """None, never nan, where nothing was decoded or nothing is there."""
    for pairs in ([], [PairMetrics("d", 3, 0)]):
        summary = summarise(pairs)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert summary["rmse"] is summary["position_error_A"] is None
        assert summary["n_failed"] == summary["n_test"] == len(pairs)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_processes_change_nothing(workers: int) -> None:
    """Results in the order of the pairs, progress up to the last one."""
    crystals = [*samples(20), INVALID]
    pairs: list[tuple[Crystal, Crystal | None]] = [(true, None if n % 5 == 0 else true) for n, true in enumerate(crystals)]
    seen: list[int] = []
    results = compare_all(iter(pairs), workers, seen.append)
    expected = [compare(*pair) for pair in pairs]
    # A crystal's RMS against itself is rounding noise of 1e-17, which pymatgen may order otherwise in another process.
    assert [result.rms for result in results] == pytest.approx([result.rms for result in expected], abs=1e-12)
    assert [replace(result, rms=None) for result in results] == [replace(result, rms=None) for result in expected]
    assert {result.composition_valid for result in results} == ({True, False} if smact_installed() else {None, False})
    assert [result.id for result in results] == [true.id for true in crystals]
    assert seen == sorted(seen)
    assert seen[-1] == len(pairs)


def test_no_pairs() -> None:
    assert compare_all([], 1) == compare_all([], 2) == []


def test_real_crystals_match_themselves_and_not_each_other() -> None:
    """The ceiling of every benchmark: true crystals against themselves."""
    crystals = samples(40)
    summary = summarise(compare_with_themselves(crystals, workers=1))
    assert summary["match_rate"] == summary["species_accuracy"] == summary["atom_count_accuracy"] == 1.0
    assert summary["rmse"] == pytest.approx(0.0, abs=1e-6)
    assert summary["valid_rate"] == 1.0
    differ = [pair for pair in pairwise(crystals) if pair[0].formula != pair[1].formula]
    assert not any(result.match for result in compare_all(differ, workers=1))


@needs_smact
def test_a_perfect_model_scores_as_many_as_are_valid_with_cdvae() -> None:
    """A crystal that SMACT finds invalid is a miss even as a perfect copy, and no other is."""
    crystals = [*samples(40), INVALID]
    results = compare_with_themselves(crystals, workers=0)
    share = sum(composition_valid(crystal.composition) for crystal in crystals) / len(crystals)
    summary = summarise(results)
    assert 0.5 < share < 1
    assert summary["match_rate"] == 1.0
    assert summary["match_rate_cdvae"] == summary["composition_valid_rate"] == pytest.approx(share)
    assert summary["rmse_cdvae"] == pytest.approx(0.0, abs=1e-6)


def test_noise_is_measured() -> None:
    """Atoms of real crystals moved by a known distance: position error at most that, RMS below it in cell units."""
    rng = np.random.default_rng(0)
    for true in samples(10):
        step = rng.normal(size=(len(true), 3))
        step *= 0.05 / np.linalg.norm(step, axis=1, keepdims=True)
        noisy = replace(true, frac_N3=true.frac_N3 + step @ np.linalg.inv(true.lattice_A))
        result = compare(true, noisy)
        assert result.position_error_A == pytest.approx(0.05)
        assert result.rms == match_rms(noisy, true)
        assert result.rms is not None
        assert result.rms <= 0.05 / (true.volume_A3 / len(true)) ** (1 / 3)


def test_real_crystals_have_room_for_their_atoms(sample_table: Callable[[str], list[Crystal]]) -> None:
    assert not any(crowded(crystal) for crystal in sample_table("perov_5")[:300])


@pytest.mark.parametrize(
    ("symbols", "distance", "near"),
    [("OO", 0.78, True), ("OO", 0.81, False), ("HH", 0.74, False), ("BaO", 1.6, True), ("BaO", 1.75, False)],
)
def test_atoms_are_crowded_by_their_radii(symbols: str, distance: float, near: bool) -> None:
    """Covalent radii, angstrom: H 0.31, O 0.66, Ba 2.15. One of the two in the next cell."""
    numbers = {"OO": (8, 8), "HH": (1, 1), "BaO": (56, 8)}[symbols]
    along = np.array([[3.01, 0.5, 0.5], [0.01 - distance / 9, -1.5, 1.5]])
    assert crowded(Crystal("pair", 9.0 * np.eye(3), along, np.array(numbers))) == near


def test_an_atom_is_crowded_by_its_own_image() -> None:
    short, long = (np.diag([edge, 4.0, 4.0]) for edge in (2.5, 2.6))  # barium: 0.6 of 4.3 angstrom are 2.58
    site, barium = np.zeros((1, 3)), np.array([56])
    assert crowded(Crystal("short", short, site, barium))
    assert not crowded(Crystal("long", long, site, barium))
