"""Smaller and larger cells than a given one: which of its own translations leave it as it is, which do only nearly.

Every step from one cell to another is a factor of its volume: smaller ones by the translations between like sites, larger
ones by sublattices of index 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

STEPS = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
"""[125, 3] integer steps: the shortest vectors of a sublattice of index 2 or 3 of a reduced lattice are among them."""
SUBLATTICES = tuple(
    (index, np.array(h))
    for index in (2, 3)
    for h in np.ndindex(index, index, index)
    if any(h) and next(x for x in h if x) == 1
)
"""The sublattices of index 2 (7) and 3 (13): integers n with h . n divisible by the index."""
TOLERANCE_A = 0.3
"""Two atoms this near are the same one: labels place an atom within 0.1 A or so, and like atoms are 0.8 A apart."""
SHORTEST_A = 1.5
"""No translation is shorter; the densest crystals repeat after 2.2 A."""
SIGNIFICANT = 5.0
"""Standard deviations by which the scatter of atoms must fall for a larger cell to be preferred."""


@dataclass(frozen=True)
class Repeats:
    """A lattice with the sites of its cell, as a cube shows them.

    lattice_A: [3, 3] rows, reduced; cart_N3: [N, 3] a copy of each site in angstrom from the cube's corner; numbers_N;
    support_N: share of the copies which the cube should show that it does show; votes_N: mean confidence of these.
    """

    lattice_A: FloatArray
    cart_N3: FloatArray
    numbers_N: IntArray
    support_N: FloatArray
    votes_N: FloatArray


def shortest_basis(shifts_M3: FloatArray) -> FloatArray | None:
    """[3, 3] the three shortest vectors that no plane holds: a reduced basis of what all span, if they make a lattice."""
    basis: list[FloatArray] = []
    for shift in shifts_M3[np.argsort(np.linalg.norm(shifts_M3, axis=1), kind="stable")]:
        rest = shift
        if basis:
            axes = np.linalg.qr(np.array(basis).T)[0]
            rest = shift - axes @ (axes.T @ shift)
        # The third edge of a reduced cell rises from the plane of the first two by 0.7 of its length or more.
        if np.linalg.norm(rest) > 0.5 * np.linalg.norm(shift):
            basis.append(shift)
        if len(basis) == 3:
            return np.array(basis)
    return None


def folded_distances(lattice: FloatArray, frac_N3: FloatArray, frac_M3: FloatArray) -> FloatArray:
    """[N, M] distances in angstrom modulo the lattice; right where they are far below half of its shortest vector."""
    delta = frac_N3[:, None] - frac_M3
    return np.asarray(np.linalg.norm((delta - np.round(delta)) @ lattice, axis=-1))


def finer_basis(cell: Repeats, share: float) -> FloatArray | None:
    """A basis of a finer lattice that takes at least `share` of a cell's sites to like ones, or None if there is none."""
    lattice, numbers_K = cell.lattice_A, cell.numbers_N
    frac = cell.cart_N3 @ np.linalg.inv(lattice)
    kinds, counts = np.unique(numbers_K, return_counts=True)
    if counts.max() < 2:
        return None
    rare = np.flatnonzero(numbers_K == kinds[np.where(counts > 1, counts, len(numbers_K) + 1).argmin()])
    like = numbers_K[:, None] == numbers_K
    shifts = [np.zeros(3)]
    for other in rare[1:]:
        shift = frac[other] - frac[rare[0]]
        for _ in range(2):  # the second time with the mean shift between all partners
            delta = frac[:, None] - frac - shift
            delta -= np.round(delta)
            distance = np.where(like, np.linalg.norm(delta @ lattice, axis=-1), np.inf)
            partner = distance.argmin(0)
            found = distance.min(0) < TOLERANCE_A
            if found.any():
                shift = shift + delta[partner, np.arange(len(frac))][found].mean(0)
        if found.mean() >= share:
            shifts.append(shift - np.round(shift))
    if len(shifts) == 1:
        return None
    vectors = (np.array(shifts)[:, None] + STEPS).reshape(-1, 3) @ lattice
    return shortest_basis(vectors[np.linalg.norm(vectors, axis=1) > SHORTEST_A / 2])


def coarser_basis(
    cell: Repeats, cart_N3: FloatArray, numbers_N: IntArray, weights_N: FloatArray, least_A: float
) -> FloatArray | None:
    """A basis of the sublattice whose larger cell places the atoms clearly better than a cell does, or None.

    The atoms' weighted scatter about their sites is compared with that about the sites of each larger cell, both for
    their degrees of freedom, so that the noise itself is the measure; a displacement below `least_A` isn't looked at.
    """
    lattice = cell.lattice_A
    delta = (cart_N3[:, None] - cell.cart_N3) @ np.linalg.inv(lattice)
    steps = np.round(delta)
    offset = (delta - steps) @ lattice
    distance = np.where(numbers_N[:, None] == cell.numbers_N, np.linalg.norm(offset, axis=-1), np.inf)
    site, near = distance.argmin(1), distance.min(1) < TOLERANCE_A
    atoms = np.flatnonzero(near)
    site, offset, steps = site[atoms], offset[atoms, site[atoms]], steps[atoms, site[atoms]].astype(np.int64)
    weights = weights_N[atoms] / max(float(weights_N[atoms].mean()), 1e-30) if len(atoms) else weights_N[atoms]
    scatter, freedom = _scatter(offset, weights, site)
    best, chosen = scatter, None
    for index, h in SUBLATTICES:
        larger, less = _scatter(offset, weights, site * index + steps @ h % index)
        error = np.sqrt(2 / max(less, 1) + 2 / max(freedom, 1))
        if less > 12 and larger < best and scatter > (1 + SIGNIFICANT * error) * larger and scatter - larger > least_A**2:
            best, chosen = larger, (index, h)
    if chosen is None:
        return None
    vectors = STEPS[(STEPS @ chosen[1] % chosen[0] == 0) & STEPS.any(1)]
    return shortest_basis(vectors @ lattice)


def _scatter(offset_N3: FloatArray, weights_N: FloatArray, group_N: IntArray) -> tuple[float, int]:
    """Mean square distance of points from the means of their groups, without the bias, and its degrees of freedom."""
    _, group = np.unique(group_N, return_inverse=True)
    total = np.bincount(group, weights_N)
    mean = np.stack([np.bincount(group, weights_N * offset_N3[:, axis]) / total for axis in range(3)], axis=1)
    freedom = 3 * (len(group) - len(total))
    square = (weights_N * ((offset_N3 - mean[group]) ** 2).sum(1)).sum()
    return 3 * float(square) / max(freedom, 1), freedom
