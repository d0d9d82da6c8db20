"""The lattice and the cell of a crystal of which a cube shows some repeats, from the atoms in the cube.

A translation of the lattice takes every atom to a like one, wherever the cube still shows the place. Differences of like
atoms are tried as translations; the three shortest that no plane holds span the lattice; atoms are folded into its cell,
where copies vote. A lattice is believed if its cell, repeated, explains what the cube shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from dist_train.crystal.cell_choice import (
    SHORTEST_A,
    TOLERANCE_A,
    Repeats,
    coarser_basis,
    finer_basis,
    folded_distances,
    shortest_basis,
)
from dist_train.crystal.lattice import compact_lattice

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MARGIN_A = 0.25
"""Atoms nearer to a face than this may be missed or false: none is expected there, and none counts."""
LONGEST_SHARE = 0.75
"""Longest edge of the reduced cell as a share of the cube's: beyond, too little of the cube repeats."""
MISS_SHARES = (0.0, 0.05, 0.1, 0.18, 0.25)
"""Shares of atoms without a partner that a translation may have, tried in order: clean fields need none."""
MIN_TESTS = 3
"""Fewest atoms whose partner must lie in the cube for a translation to be tried."""
REFERENCES = 30
"""Atoms of the rarest elements from which differences are taken; a translation must take these to like ones too."""
MIN_VOTES_SHARE = 0.6
"""Atoms with a smaller share of the median votes are not believed: chance labels reach 0.45, true atoms 0.9."""
UNCLEAR_SHARE, EXPLAINED_RANGE = 0.6, (0.87, 0.985)
"""A lattice may leave unexplained this share of the votes that the median atom lacks, and must explain a share of the
atoms, and find a share of its own, within the range: clear labels leave nothing to chance."""
SITE_MISSES, MAX_SITE_MISSES, MISSES = 3.5, 0.25, 5.0
"""Copies that a single site may lack: a share of its own (in units of the share that all together may, and the greatest)
and a number (in the same units)."""
FINER_SHARES = 1.0, 0.8, 0.6
"""Shares of a cell's sites that a translation within it must take to like ones for a smaller cell to be tried."""
LEAST_DISTORTION_A, MAX_ENLARGEMENTS = 0.08, 3
"""Root mean square displacement from equal places that labels can show to need a larger cell; how often to look."""
DROP_SUPPORT = 0.35
"""Sites that show a smaller share of their copies are none."""


@dataclass(frozen=True)
class Points:
    """Atoms in a cube as the search sees them: by element, then x. cart_N3 in angstrom; votes_N: confidence."""

    cart_N3: FloatArray
    numbers_N: IntArray
    votes_N: FloatArray
    box_A: float

    def inner(self) -> Points:
        """The atoms that lie well inside."""
        which = ((self.cart_N3 >= MARGIN_A) & (self.cart_N3 <= self.box_A - MARGIN_A)).all(1)
        return replace(self, cart_N3=self.cart_N3[which], numbers_N=self.numbers_N[which], votes_N=self.votes_N[which])


def find_repeats(cart_N3: FloatArray, numbers_N: IntArray, votes_N: FloatArray, box_A: float) -> Repeats | str:
    """The primitive cell of the atoms in a cube, or why none is determined."""
    clear = np.flatnonzero(votes_N >= MIN_VOTES_SHARE * np.median(votes_N)) if len(votes_N) else np.zeros(0, int)
    order = clear[np.lexsort((cart_N3[clear, 0], numbers_N[clear]))]
    points = Points(cart_N3[order], numbers_N[order], votes_N[order], box_A)
    kinds = np.append(np.unique(points.numbers_N, return_index=True)[1], len(order))
    shifts, tests, hits = _translations(
        points.cart_N3, kinds, _references(points), MARGIN_A, box_A - MARGIN_A,
        SHORTEST_A, box_A, TOLERANCE_A, MISS_SHARES[-1], MIN_TESTS,
    )  # fmt: skip
    reason = f"too few repeats in the cube: no three independent translations among {len(order)} atoms"
    tried: list[FloatArray] = []
    for share in MISS_SHARES:
        basis = shortest_basis(shifts[tests - hits <= share * tests])
        if basis is None or any(np.allclose(basis, other) for other in tried):
            continue
        tried.append(basis)
        found = _explain(basis, points)
        if not isinstance(found, str):
            return enlarged(found, points, np.ones(len(order)), LEAST_DISTORTION_A)
        reason = found
    return reason


def enlarged(cell: Repeats, points: Points, weights_N: FloatArray, least_A: float) -> Repeats | str:
    """The cell, or a larger one where its atoms don't lie quite alike (see `coarser_basis`), if that fits the atoms."""
    for _ in range(MAX_ENLARGEMENTS):
        basis = coarser_basis(cell, points.cart_N3, points.numbers_N, weights_N, least_A)
        if basis is None:
            return cell
        larger = _fold(basis, points)
        if isinstance(larger, str):
            return f"the atoms of the best lattice do not lie alike, and of a larger one: {larger}"
        cell = larger
    return cell


def _references(points: Points) -> IntArray:
    """Indices of atoms from which to take differences: the rarest elements', at least REFERENCES if there are as many."""
    _, kind, counts = np.unique(points.numbers_N, return_inverse=True, return_counts=True)
    chosen: list[int] = []
    for rare in np.argsort(counts, kind="stable"):
        members = np.flatnonzero(kind == rare)
        need = REFERENCES - len(chosen)
        if need > 0:
            chosen += members[:: max(1, len(members) // need)].tolist()
    return np.array(chosen, np.int64)


def _explain(basis: FloatArray, points: Points) -> Repeats | str:
    """The atoms folded into the primitive cell of a basis, if they fit it and it fits them."""
    folded = _fold(basis, points)
    if isinstance(folded, str):
        return folded
    for share in FINER_SHARES:
        finer = finer_basis(folded, share)
        better = "" if finer is None else _explain(finer, points)
        if not isinstance(better, str):
            return better
    return folded


@njit(cache=True, nogil=True)
def _partner(x, y, z, first, last, cart, tolerance):  # type: ignore[no-untyped-def]
    """Index from `first` to before `last`, atoms sorted by x, of one within the tolerance of a place, or -1."""
    first += np.searchsorted(cart[first:last, 0], x - tolerance)
    for n in range(first, last):
        if cart[n, 0] > x + tolerance:
            break
        if (cart[n, 0] - x) ** 2 + (cart[n, 1] - y) ** 2 + (cart[n, 2] - z) ** 2 <= tolerance * tolerance:
            return n
    return -1


@njit(cache=True, nogil=True)
def _inside(x, y, z, low, high):  # type: ignore[no-untyped-def]
    return low <= x <= high and low <= y <= high and low <= z <= high


@njit(cache=True, nogil=True)
def _try(shift, cart, kinds, low, high, tolerance, misses):  # type: ignore[no-untyped-def]
    """Atoms whose image under +shift or -shift the cube shows, those found there, and the mean shift between partners.

    kinds: [K + 1] where each element's atoms begin. Gives up, with no tests, after more misses than the share `misses`,
    or sooner where most of the first tests miss.
    """
    s0, s1, s2 = shift
    tests = 0
    for x, y, z in cart:
        if _inside(x, y, z, low, high):
            tests += _inside(x + s0, y + s1, z + s2, low, high)
            tests += _inside(x - s0, y - s1, z - s2, low, high)
    allowed, hits, missed, total = int(misses * tests), 0, 0, np.zeros(3)
    for kind in range(len(kinds) - 1):
        for n in range(kinds[kind], kinds[kind + 1]):
            x, y, z = cart[n]
            if not _inside(x, y, z, low, high):
                continue
            for sign in (1.0, -1.0):
                at = x + sign * s0, y + sign * s1, z + sign * s2
                if not _inside(*at, low, high):
                    continue
                partner = _partner(*at, kinds[kind], kinds[kind + 1], cart, tolerance)
                if partner >= 0:
                    hits += 1
                    for axis in range(3):
                        total[axis] += sign * (cart[partner, axis] - cart[n, axis])
                else:
                    missed += 1
                    if missed > allowed or (missed >= 4 and missed > hits):
                        return 0, 0, shift
    return tests, hits, total / max(hits, 1)


@njit(cache=True, nogil=True)
def _is_known(shift, shifts, tolerance):  # type: ignore[no-untyped-def]
    """Whether a shift or its opposite is among others."""
    s0, s1, s2 = shift
    for k0, k1, k2 in shifts:
        for sign in (1.0, -1.0):
            if (s0 - sign * k0) ** 2 + (s1 - sign * k1) ** 2 + (s2 - sign * k2) ** 2 < tolerance * tolerance:
                return True
    return False


@njit(cache=True, nogil=True)
def _translations(cart, kinds, references, low, high, shortest, longest, tolerance, misses, min_tests):  # type: ignore[no-untyped-def]
    """Translations [M, 3] between like atoms (one of each pair of opposites), their tests and their hits."""
    found = np.empty((len(references) * len(cart), 3))
    tests, hits = np.empty(len(found), np.int64), np.empty(len(found), np.int64)
    count = 0
    for i in references:
        kind = np.searchsorted(kinds, i, side="right")
        for j in range(kinds[kind - 1], kinds[kind]):
            shift = cart[j] - cart[i]
            length = np.sqrt((shift**2).sum())
            if not shortest <= length <= longest or _is_known(shift, found[:count], tolerance):
                continue
            tested, hit, mean = _try(shift, cart, kinds, low, high, tolerance, misses)
            if tested >= min_tests:  # once more, with the mean shift between the partners
                tested, hit, mean = _try(mean, cart, kinds, low, high, tolerance, misses)
            if tested >= min_tests:
                found[count], tests[count], hits[count] = mean, tested, hit
                count += 1
    return found[:count], tests[:count], hits[:count]


def _fit_cell(lattice: FloatArray, cart: FloatArray, site_N: IntArray) -> tuple[FloatArray, FloatArray]:
    """The lattice and sites [K, 3] of the least squares fit of atoms cart = site + integers @ lattice."""
    first = np.unique(site_N, return_index=True)[1]
    steps = np.round((cart - cart[first[site_N]]) @ np.linalg.inv(lattice))
    sums = np.eye(len(first))[site_N]
    counts = sums.sum(0)[:, None]
    mean_cart, mean_steps = sums.T @ cart / counts, sums.T @ steps / counts
    fitted, _, rank, _ = np.linalg.lstsq(steps - mean_steps[site_N], cart - mean_cart[site_N], rcond=1e-3)
    lattice = fitted if rank == 3 else lattice
    return lattice, mean_cart - mean_steps @ lattice


def _fold(basis: FloatArray, points: Points) -> Repeats | str:
    """The sites of the reduced cell of a lattice with their elements, or why the atoms don't fit it."""
    inner, lattice = points.inner(), compact_lattice(basis)
    for _ in range(2):
        frac = inner.cart_N3 @ np.linalg.inv(lattice)
        _, site = connected_components(folded_distances(lattice, frac, frac) < TOLERANCE_A, directed=False)
        lattice, sites = _fit_cell(lattice, inner.cart_N3, site)
        if abs(np.linalg.det(lattice)) < 1.0:
            return "the translations span no cell"
    longest = np.linalg.norm(lattice, axis=1).max()
    if longest > LONGEST_SHARE * points.box_A:
        return (
            f"the longest primitive vector is {longest:.2f} A, "
            f"over {LONGEST_SHARE * points.box_A:.2f} A of the cube's {points.box_A:.2f} A"
        )
    if _hides(lattice, points.box_A):
        return "too few repeats in the cube: it doesn't show the whole cell"
    ballots = np.zeros((len(sites), int(inner.numbers_N.max()) + 1))
    np.add.at(ballots, (site, inner.numbers_N), inner.votes_N)
    numbers = ballots.argmax(1)
    agree = np.bincount(site, numbers[site] == inner.numbers_N, len(sites))
    cell = Repeats(lattice, sites, numbers, np.zeros(len(sites)), ballots.max(1) / np.maximum(agree, 1))
    return _supported(cell, points)


def _supported(cell: Repeats, points: Points) -> Repeats | str:
    """The cell with the support of its sites, without those that show too few copies; or what it doesn't explain."""
    inner, tolerance = points.inner(), TOLERANCE_A
    low, high = MARGIN_A + 0.1, points.box_A - MARGIN_A - 0.1
    images, owner = box_images(cell.lattice_A, cell.cart_N3, low - tolerance - 0.1, high + tolerance + 0.1)
    numbers = cell.numbers_N[owner][:, None]
    due = ((images >= low) & (images <= high)).all(1)
    found = ((np.linalg.norm(images[:, None] - points.cart_N3, axis=-1) < tolerance) & (numbers == points.numbers_N)).any(1)
    expected = np.bincount(owner[due], minlength=len(cell.numbers_N))
    support = np.bincount(owner[due & found], minlength=len(cell.numbers_N)) / np.maximum(expected, 1)
    kept = support >= DROP_SUPPORT
    if not kept.any():
        return "no site repeats"
    close = (np.linalg.norm(images[:, None] - inner.cart_N3, axis=-1) < tolerance) & (numbers == inner.numbers_N)
    explained = min(close[kept[owner]].any(0).mean(), found[due & kept[owner]].mean())
    least = float(np.clip(1.0 - UNCLEAR_SHARE * (1.0 - np.median(points.votes_N)), *EXPLAINED_RANGE))
    if explained < least:
        return f"the best lattice explains {explained:.2f} of the atoms in the cube, below {least:.2f}"
    allowed = min(SITE_MISSES * (1.0 - least), MAX_SITE_MISSES) * expected + MISSES * (1.0 - least)
    lacking = kept & ((1.0 - support) * expected > allowed)
    if lacking.any():
        return f"a site of the best lattice shows {support[lacking].min():.2f} of its copies"
    return Repeats(cell.lattice_A, cell.cart_N3[kept], cell.numbers_N[kept], support[kept], cell.votes_N[kept])


def box_images(lattice: FloatArray, sites_K3: FloatArray, low: float, high: float) -> tuple[FloatArray, IntArray]:
    """Every image [M, 3] of sites with all coordinates from `low` to `high` angstrom, and the site [M] of each."""
    inverse = np.linalg.inv(lattice)
    corners = np.stack(np.meshgrid(*[(low, high)] * 3, indexing="ij"), -1).reshape(-1, 3) @ inverse
    base = sites_K3 - np.floor(sites_K3 @ inverse) @ lattice
    ranges = [np.arange(a, b) for a, b in zip(np.floor(corners.min(0)) - 1, np.ceil(corners.max(0)) + 1)]
    steps = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    images = base[:, None] + steps @ lattice
    site, step = np.nonzero(((images >= low) & (images <= high)).all(2))
    return images[site, step], site


def _hides(lattice: FloatArray, box_A: float) -> bool:
    """Whether some part of the cell has no image inside the cube."""
    if np.sqrt((lattice**2).sum()) / 2 < box_A / 2 - MARGIN_A:
        return False  # the ball in the cube is larger than the one around the cell
    grid = (np.arange(6) + 0.5) / 6
    places = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), -1).reshape(-1, 3) @ lattice
    _, seen = box_images(lattice, places, MARGIN_A, box_A - MARGIN_A)
    return len(np.unique(seen)) < len(places)
