"""Compiled loops over the labels of a periodic grid: votes for atoms, and where the spheres of labels lie.

species: [D, H, W] atomic numbers, 0 for none; probability: of any atom; basis: [3, 3] steps along the axes in angstrom;
spacings: [3] distances in angstrom between planes of voxels; centres and shifts of voxels aren't wrapped.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MASS_SIGMAS = 3.0
"""How far from an atom its density is looked for."""


@njit(cache=True, nogil=True)
def candidates(species, probability, ball, min_score, periodic):  # type: ignore[no-untyped-def]
    """Voxels [M, 3] with at least the share `min_score` of the possible votes for their own element, and their votes.

    The votes are those of a ball of voxels; where the grid isn't periodic, of its part inside.
    """
    n0, n1, n2 = species.shape
    voxels = np.empty((species.size, 3), np.int64)
    votes = np.empty(species.size, np.float64)
    found = 0
    for i in range(n0):
        for j in range(n1):
            for k in range(n2):
                if species[i, j, k] == 0 or probability[i, j, k] < 0.1:
                    continue
                total, inside = 0.0, 0
                for m in range(len(ball)):
                    a, b, c = i + ball[m, 0], j + ball[m, 1], k + ball[m, 2]
                    if periodic:
                        a, b, c = a % n0, b % n1, c % n2
                    elif a < 0 or b < 0 or c < 0 or a >= n0 or b >= n1 or c >= n2:
                        continue
                    inside += 1
                    if species[a, b, c] == species[i, j, k]:
                        total += probability[a, b, c]
                if total >= min_score * inside:
                    voxels[found, 0], voxels[found, 1], voxels[found, 2] = i, j, k
                    votes[found] = total
                    found += 1
    return voxels[:found], votes[:found]


@njit(cache=True, nogil=True)
def suppress(frac_M3, numbers_M, lattice, images, like, unlike, most):  # type: ignore[no-untyped-def]
    """Indices of the voxels kept, at most `most`, in order: each farther than `like` / `unlike` A from all before it."""
    kept = np.empty(min(len(frac_M3), most), np.int64)
    n_kept = 0
    shifts = images @ lattice
    for m in range(len(frac_M3)):
        free = True
        for n in range(n_kept):
            limit = like if numbers_M[m] == numbers_M[kept[n]] else unlike
            delta = frac_M3[m] - frac_M3[kept[n]]
            delta -= np.round(delta)
            cart = delta @ lattice
            for s in range(len(shifts)):
                d2 = (cart[0] + shifts[s, 0]) ** 2 + (cart[1] + shifts[s, 1]) ** 2 + (cart[2] + shifts[s, 2]) ** 2
                if d2 < limit * limit:
                    free = False
                    break
            if not free:
                break
        if free:
            kept[n_kept] = m
            n_kept += 1
            if n_kept == most:
                break
    return kept[:n_kept].copy()


@njit(cache=True, nogil=True)
def masses(voxels, density, basis, spacings, sigma, rounds):  # type: ignore[no-untyped-def]
    """[N] sums of a density's voxels, shared out among N of them at which atoms may be.

    Expectation maximisation of the weights of a mixture of Gaussians around these voxels: each takes its share of what lies
    within its reach.
    """
    n0, n1, n2 = density.shape
    reach = MASS_SIGMAS * sigma
    r0, r1, r2 = int(reach / spacings[0]), int(reach / spacings[1]), int(reach / spacings[2])
    flat = density.ravel()
    most = (2 * r0 + 1) * (2 * r1 + 1) * (2 * r2 + 1)
    places, weights = np.empty((len(voxels), most), np.int64), np.empty((len(voxels), most), np.float32)
    inside = 0
    for i in range(-r0, r0 + 1):
        for j in range(-r1, r1 + 1):
            for k in range(-r2, r2 + 1):
                d2 = _square_A2(i, j, k, basis)
                if d2 > reach * reach:
                    continue
                for n in range(len(voxels)):
                    a, b, c = (voxels[n, 0] + i) % n0, (voxels[n, 1] + j) % n1, (voxels[n, 2] + k) % n2
                    places[n, inside] = (a * n1 + b) * n2 + c
                    weights[n, inside] = np.exp(-0.5 * d2 / (sigma * sigma))
                inside += 1
    found, total = np.ones(len(voxels)), np.empty(density.size, np.float32)
    for _ in range(rounds):
        total[:] = 0.0
        for n in range(len(voxels)):
            for m in range(inside):
                total[places[n, m]] += found[n] * weights[n, m]
        for n in range(len(voxels)):
            share = 0.0
            for m in range(inside):
                place = places[n, m]
                if flat[place] > 0.0 and total[place] > 0.0:
                    share += weights[n, m] * flat[place] / total[place]
            found[n] *= share
    return found


@njit(cache=True, nogil=True)
def _square_A2(x, y, z, basis):  # type: ignore[no-untyped-def]
    """Squared length of a step in voxels."""
    square = 0.0
    for axis in range(3):
        d = x * basis[0, axis] + y * basis[1, axis] + z * basis[2, axis]
        square += d * d
    return square


@njit(cache=True, nogil=True)
def centroids(voxels, species, probability, basis, spacings, radius, shifts):  # type: ignore[no-untyped-def]
    """[N, 3] centre in voxels (not wrapped) of the votes for each voxel's element in a ball that follows it."""
    n0, n1, n2 = species.shape
    centres = voxels.astype(np.float64)
    r0, r1, r2 = radius / spacings[0], radius / spacings[1], radius / spacings[2]
    for n in range(len(voxels)):
        number = species[voxels[n, 0], voxels[n, 1], voxels[n, 2]]
        for _ in range(shifts):
            u, v, w = centres[n]
            total, du, dv, dw = 0.0, 0.0, 0.0, 0.0
            for i in range(int(np.ceil(u - r0)), int(np.floor(u + r0)) + 1):
                for j in range(int(np.ceil(v - r1)), int(np.floor(v + r1)) + 1):
                    for k in range(int(np.ceil(w - r2)), int(np.floor(w + r2)) + 1):
                        d2 = _square_A2(i - u, j - v, k - w, basis)
                        if d2 <= radius * radius and species[i % n0, j % n1, k % n2] == number:
                            vote = probability[i % n0, j % n1, k % n2]
                            total += vote
                            du, dv, dw = du + vote * (i - u), dv + vote * (j - v), dw + vote * (k - w)
            if total > 0.0:
                centres[n, 0], centres[n, 1], centres[n, 2] = u + du / total, v + dv / total, w + dw / total
    return centres


@njit(cache=True, nogil=True)
def inner_votes(centres, voxels, species, probability, basis, spacings, radius):  # type: ignore[no-untyped-def]
    """Share of the votes for their element in the balls around all centres."""
    n0, n1, n2 = species.shape
    r0, r1, r2 = radius / spacings[0], radius / spacings[1], radius / spacings[2]
    votes, count = 1.0, 2.0
    for n in range(len(centres)):
        u, v, w = centres[n]
        number = species[voxels[n, 0], voxels[n, 1], voxels[n, 2]]
        for i in range(int(np.ceil(u - r0)), int(np.floor(u + r0)) + 1):
            for j in range(int(np.ceil(v - r1)), int(np.floor(v + r1)) + 1):
                for k in range(int(np.ceil(w - r2)), int(np.floor(w + r2)) + 1):
                    d2 = _square_A2(i - u, j - v, k - w, basis)
                    if d2 <= radius * radius:
                        count += 1.0
                        if species[i % n0, j % n1, k % n2] == number:
                            votes += probability[i % n0, j % n1, k % n2]
    return votes / count


@njit(cache=True, nogil=True)
def sphere_shifts(centres, voxels, species, probability, basis, spacings, radius, clarity, step, steps):  # type: ignore[no-untyped-def]
    """Mean shifts [N, 3] in angstrom and their variances [N] of the spheres that left the labels around each centre.

    clarity: log of the odds of a right label to a wrong one. Shifts from -steps to +steps times `step`
    along each axis are tried and averaged by their likelihood. Only voxels that some shift takes across the surface count,
    and none that bears another element's label, for that may be a neighbour's.
    """
    n0, n1, n2 = species.shape
    wide = 2 * steps + 1
    margin = np.sqrt(3.0) * steps * step
    reach = radius + margin
    r0, r1, r2 = reach / spacings[0], reach / spacings[1], reach / spacings[2]
    means, variances = np.zeros((len(centres), 3)), np.empty(len(centres))
    for n in range(len(centres)):
        u, v, w = centres[n]
        number = species[voxels[n, 0], voxels[n, 1], voxels[n, 2]]
        likelihood = np.zeros((wide, wide, wide))
        for i in range(int(np.ceil(u - r0)), int(np.floor(u + r0)) + 1):
            for j in range(int(np.ceil(v - r1)), int(np.floor(v + r1)) + 1):
                for k in range(int(np.ceil(w - r2)), int(np.floor(w + r2)) + 1):
                    x = (i - u) * basis[0, 0] + (j - v) * basis[1, 0] + (k - w) * basis[2, 0]
                    y = (i - u) * basis[0, 1] + (j - v) * basis[1, 1] + (k - w) * basis[2, 1]
                    z = (i - u) * basis[0, 2] + (j - v) * basis[1, 2] + (k - w) * basis[2, 2]
                    label = species[i % n0, j % n1, k % n2]
                    away = np.sqrt(x * x + y * y + z * z)
                    if abs(away - radius) > margin or (label != number and label != 0):
                        continue
                    vote = probability[i % n0, j % n1, k % n2] if label == number else 0.0
                    gain = clarity * (2.0 * vote - 1.0)
                    for a in range(wide):
                        for b in range(wide):
                            inside = radius * radius - (x - (a - steps) * step) ** 2 - (y - (b - steps) * step) ** 2
                            if inside < 0.0:
                                continue
                            for c in range(wide):
                                if (z - (c - steps) * step) ** 2 <= inside:
                                    likelihood[a, b, c] += gain
        likelihood = np.exp(likelihood - likelihood.max())
        total, square = likelihood.sum(), 0.0
        for a in range(wide):
            for b in range(wide):
                for c in range(wide):
                    share = likelihood[a, b, c] / total
                    x, y, z = (a - steps) * step, (b - steps) * step, (c - steps) * step
                    means[n, 0], means[n, 1], means[n, 2] = (
                        means[n, 0] + share * x,
                        means[n, 1] + share * y,
                        means[n, 2] + share * z,
                    )
                    square += share * (x * x + y * y + z * z)
        variances[n] = (square - (means[n] ** 2).sum()) / 3.0 + step * step / 12.0
    return means, variances
