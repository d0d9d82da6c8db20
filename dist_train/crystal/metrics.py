"""How well predicted crystals reproduce true ones: match rate, RMS, atom counts, species, positions and cells.

Definitions follow the evaluation of CDVAE (Xie et al., ICLR 2022) and the per-atom metrics of Neural Structure Fields
(Chiba et al., 2023). A decode that failed counts as a miss in every rate, so no number improves by giving up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from dist_train.crystal.interop import covalent_radii_A, match_rms
from dist_train.crystal.lattice import (
    FloatArray,
    compact_lattice,
    neighbour_pairs,
    periodic_distances,
    shortest_distances,
    too_thin,
)
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.crystal.validity import composition_valid, smact_installed
from dist_train.errors import CrystalError

VALID_DISTANCE_A = 0.5
CROWDED = 0.6
"""Of 6,000 crystals of the Materials Project and 3,000 perovskites none has two atoms so near to each other; the least is
0.64."""
_PACKING = 1.13
"""Shortest distance times cube root of the number density: 1.123 in the densest packing of spheres, less elsewhere."""
MAX_CHUNK = 64

Pair = tuple[Crystal, Crystal | None]


@dataclass(frozen=True)
class PairMetrics:
    """A predicted crystal against the true one.

    id, n_true, n_predicted: of the true crystal; atoms in each cell, 0 predicted for a failed decode.
    count_ok: the numbers of atoms are equal.
    species_correct: true atoms whose partner in the best one-to-one assignment by distance is of the right element.
    position_error_A: mean distance in angstrom from each true atom to the nearest predicted one, and back, averaged;
        fractional coordinates of both in the true cell, periodic, in the given origin. None for a failed decode.
    length_error_A, angle_error_deg: mean absolute error of the three cell edges and angles, in the order given.
    match, rms: StructureMatcher finds them equal, and its normalised displacement (see `match_rms`).
    valid: the predicted crystal is structurally valid (see `structure_valid`).
    composition_valid: its composition is valid (see `composition_valid`), whatever its structure; False for a failed
        decode, None where smact isn't installed, so that nobody can say.
    """

    id: str
    n_true: int
    n_predicted: int
    count_ok: bool = False
    species_correct: int = 0
    position_error_A: float | None = None
    length_error_A: float | None = None
    angle_error_deg: float | None = None
    match: bool = False
    rms: float | None = None
    valid: bool = False
    composition_valid: bool | None = False

    @property
    def match_cdvae(self) -> bool | None:
        """A match as CDVAE counts it: of a prediction valid in structure and composition. None where that isn't known."""
        return self.composition_valid if self.match and self.valid else False

    @property
    def failed(self) -> bool:
        """No crystal was predicted, or none that can be looked at."""
        return self.n_predicted == 0


def structure_valid(crystal: Crystal) -> bool:
    """No two atoms closer than 0.5 angstrom and a volume of at least 0.1 cubic angstrom (CDVAE's validity).

    Distances are periodic, between different atoms: an atom and its own image are not counted.
    """
    if not possible(crystal):
        return False
    lattice = compact_lattice(crystal.lattice_A)
    frac = crystal.cart_N3 @ np.linalg.inv(lattice)
    distances = periodic_distances(lattice, frac, frac)
    np.fill_diagonal(distances, np.inf)
    return bool(distances.min() >= VALID_DISTANCE_A)


def compare(true: Crystal, predicted: Crystal | None) -> PairMetrics:
    """All metrics of one pair; `predicted` is None, or no possible crystal, where the decode failed."""
    if predicted is None or not possible(predicted):
        return PairMetrics(true.id, len(true), 0)
    distances = _distances_in_true_cell(true, predicted)
    rows, columns = linear_sum_assignment(distances)
    cell_error = np.abs(predicted.lengths_angles - true.lengths_angles)
    rms = _match_rms(predicted, true)
    return PairMetrics(
        id=true.id,
        n_true=len(true),
        n_predicted=len(predicted),
        count_ok=len(true) == len(predicted),
        species_correct=int((true.numbers_N[rows] == predicted.numbers_N[columns]).sum()),
        position_error_A=float(distances.min(axis=1).mean() + distances.min(axis=0).mean()) / 2.0,
        length_error_A=float(cell_error[:3].mean()),
        angle_error_deg=float(cell_error[3:].mean()),
        match=rms is not None,
        rms=rms,
        valid=structure_valid(predicted),
        composition_valid=composition_valid(predicted.composition) if smact_installed() else None,
    )


def compare_all(pairs: Iterable[Pair], workers: int, progress: Callable[[int], None] | None = None) -> list[PairMetrics]:
    """`compare` of every (true, predicted) pair, in order, over processes; `progress` gets the number done so far.

    At most one worker means this process.
    """
    pairs = list(pairs)
    chunk = max(1, min(MAX_CHUNK, len(pairs) // (4 * max(workers, 1))))
    results = []
    for result in parallel_map(_compare_pair, pairs, workers, chunk):
        results.append(result)
        if progress:
            progress(len(results))
    return results


def compare_with_themselves(
    crystals: Sequence[Crystal], workers: int, progress: Callable[[int], None] | None = None
) -> list[PairMetrics]:
    """What a perfect model would score: every true crystal against itself, by `compare_all`.

    Not always 1: a true crystal that isn't valid is a miss even as a perfect copy.
    """
    return compare_all([(crystal, crystal) for crystal in crystals], workers, progress)


def summarise(metrics: Sequence[PairMetrics]) -> dict[str, float | None]:
    """Rates (0 to 1) over all pairs and mean errors over those decoded, ready for JSON; None where nothing counts.

    match_rate: matched and structurally valid, over all; match_rate_unconditioned: matched, over all.
    match_rate_cdvae: matched and valid in structure and composition, over all, the published figure. CDVAE also takes a
        crystal as invalid where no CrystalNN fingerprint can be made of it; that is not looked at here.
    rmse, rmse_cdvae: mean RMS of those that make the match rate and CDVAE's. species_accuracy: over all true atoms.
    valid_rate, composition_valid_rate: predictions that are valid in structure and in composition, over all.
    position_error_A, length_error_A, angle_error_deg: means over pairs that were decoded (n_test - n_failed).
    Whatever hangs on the composition is None where it wasn't judged (no smact): not 0, and not the rate of the others.
    """
    hits = [pair for pair in metrics if pair.match and pair.valid]
    judged = all(pair.composition_valid is not None for pair in metrics)
    atoms = sum(pair.n_true for pair in metrics)
    return {
        "match_rate": _mean([pair.match and pair.valid for pair in metrics]),
        "match_rate_unconditioned": _mean([pair.match for pair in metrics]),
        "match_rate_cdvae": _mean([pair.match_cdvae for pair in metrics]) if judged else None,
        "rmse": _mean([pair.rms for pair in hits]),
        "rmse_cdvae": _mean([pair.rms for pair in hits if pair.composition_valid]) if judged else None,
        "valid_rate": _mean([pair.valid for pair in metrics]),
        "composition_valid_rate": _mean([pair.composition_valid for pair in metrics]) if judged else None,
        "atom_count_accuracy": _mean([pair.count_ok for pair in metrics]),
        "species_accuracy": sum(pair.species_correct for pair in metrics) / atoms if atoms else None,
        "position_error_A": _mean([pair.position_error_A for pair in metrics]),
        "length_error_A": _mean([pair.length_error_A for pair in metrics]),
        "angle_error_deg": _mean([pair.angle_error_deg for pair in metrics]),
        "n_test": len(metrics),
        "n_failed": sum(pair.failed for pair in metrics),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _compare_pair(pair: Pair) -> PairMetrics:
    return compare(*pair)


def _match_rms(predicted: Crystal, true: Crystal) -> float | None:
    """`match_rms`, where a crystal that pymatgen can't take is a miss."""
    try:
        return match_rms(predicted, true)
    except CrystalError:
        return None


def possible(crystal: Crystal) -> bool:
    """Finite, with atoms of known elements in a cell of at least 0.1 cubic angstrom that isn't absurdly thin."""
    try:
        return not too_thin(compact_lattice(crystal.checked(max_atoms=len(crystal)).lattice_A))
    except CrystalError:
        return False


def _distances_in_true_cell(true: Crystal, predicted: Crystal) -> FloatArray:
    """[N_true, N_predicted] periodic distances in angstrom, both sets of fractional coordinates in the true cell."""
    lattice = compact_lattice(true.lattice_A)
    change = true.lattice_A @ np.linalg.inv(lattice)
    return periodic_distances(lattice, true.frac_N3 @ change, predicted.frac_N3 @ change)


def shortest_distance(crystal: Crystal) -> float:
    """Shortest distance in angstrom between two atoms of a possible crystal, periodic images included, an atom's own too."""
    # No packing of spheres fills more than 74 % of space, which bounds the distance.
    bound = _PACKING * (crystal.volume_A3 / len(crystal)) ** (1 / 3)
    return min(shortest_distances(compact_lattice(crystal.lattice_A), crystal.cart_N3, crystal.numbers_N, bound))


def crowded(crystal: Crystal) -> bool:
    """Whether two atoms of a possible crystal, or images, are nearer than CROWDED of the sum of their covalent radii."""
    radii_N = covalent_radii_A(crystal.numbers_N)
    first, second, shift = neighbour_pairs(crystal.lattice_A, crystal.cart_N3, 2 * CROWDED * float(radii_N.max()))
    distance = np.linalg.norm(crystal.cart_N3[second] + shift - crystal.cart_N3[first], axis=1)
    return bool((distance < CROWDED * (radii_N[first] + radii_N[second])).any())
