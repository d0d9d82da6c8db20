"""Grids back to crystals: species voting, non-maximum suppression with the periodic metric, refinement on the density.

1. Every voxel votes for its most probable element with the probability that an atom is there at all. A voxel's score is
   the share of its element's votes in the ball of the species radius around it.
2. Voxels are taken as atoms from the highest score down; a taken atom suppresses voxels nearer than the shortest bond.
3. Positions are refined by Gauss-Newton on the occupancy density (unit-height Gaussians), each atom against the rest,
   with the vote's centroid as a prior and weights from the residual, so that a noisy density can't pull atoms away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.lattice import MIN_VOLUME_A3, image_offsets, plane_spacings
from dist_train.crystal.structure import Crystal, wrap
from dist_train.crystal.voxelize import CUTOFF_SIGMAS, add_gaussian, voxelize

FloatArray = NDArray[np.float64]

MIN_SCORE = 0.35
"""Share of the ball's votes below which a voxel is no atom."""
LIKE_DISTANCE_A, UNLIKE_DISTANCE_A = 0.8, 0.6
"""No two decoded atoms of the same element / of different elements are nearer than this."""
CENTROID_ERROR_A = 0.05
"""Standard deviation of the vote's centroid, the prior of the refinement."""
MAX_ATOMS_PER_A3 = 0.5
"""Number density above which a field is no crystal; diamond, the densest at normal pressure, has 0.18."""
MIN_SPACING_A = 0.5
"""Distance of opposite faces below which a decoded cell is too flat to be one."""
_ITERATIONS = 8


@dataclass(frozen=True)
class Decoded:
    """crystal: None where nothing could be decoded, and then `reason` says why; confidence_N: [N] votes' share, 0-1."""

    crystal: Crystal | None
    confidence_N: FloatArray
    reason: str = ""


def decode(
    id: str,
    occupancy_DHW: NDArray[np.float32],
    species_DHW: NDArray[np.integer],
    atom_probability_DHW: NDArray[np.float32],
    lattice_A: FloatArray,
    spec: GridSpec,
) -> Decoded:
    """The crystal in a periodic `cell` grid.

    occupancy_DHW: density of unit-height Gaussians; species_DHW: the most probable element of each voxel, were there an
    atom (0: none); atom_probability_DHW: probability of any atom, 0-1; lattice_A: [3, 3] rows in angstrom.
    Fields that hold no crystal (nothing found, not finite, absurdly many atoms) give an empty result with the reason.
    """
    nothing = np.zeros(0)
    if not (np.isfinite(occupancy_DHW).all() and np.isfinite(atom_probability_DHW).all()):
        return Decoded(None, nothing, "the fields are not finite")
    if fault := _lattice_fault(lattice_A):
        return Decoded(None, nothing, fault)
    spacings = plane_spacings(lattice_A)
    shape = np.array(species_DHW.shape)
    ball = _ball(lattice_A, shape, spacings, spec.radius_A)
    species = np.ascontiguousarray(species_DHW, dtype=np.uint8)
    probability = np.ascontiguousarray(atom_probability_DHW, np.float32)
    voxels, scores = _scores(species, probability, ball, MIN_SCORE)
    order = np.argsort(-scores, kind="stable")
    voxels, scores = voxels[order], scores[order]
    numbers = species[voxels[:, 0], voxels[:, 1], voxels[:, 2]].astype(np.int64)
    images = image_offsets(lattice_A, LIKE_DISTANCE_A).astype(np.float64)
    most = min(spec.max_atoms, int(MAX_ATOMS_PER_A3 * abs(np.linalg.det(lattice_A))))
    kept = _suppress(voxels / shape, numbers, lattice_A, images, LIKE_DISTANCE_A, UNLIKE_DISTANCE_A, most + 1)
    if not len(kept):
        return Decoded(None, nothing, f"no atom found: no voxel scores {MIN_SCORE} or more")
    if len(kept) > most:
        return Decoded(None, nothing, f"over {most} atoms found, more than the cell or the spec can hold")
    centres = _centroids(voxels[kept], species, probability, ball)
    density = np.ascontiguousarray(occupancy_DHW, np.float32)
    frac = _refine(centres / shape, density, lattice_A, spacings, spec.sigma_A, CENTROID_ERROR_A, _ITERATIONS)
    return Decoded(Crystal(id, lattice_A, wrap(frac), numbers[kept]), scores[kept])


def _lattice_fault(lattice_A: FloatArray) -> str:
    """Why a lattice is none, or ''."""
    if not np.isfinite(lattice_A).all():
        return "the lattice is not finite"
    if abs(np.linalg.det(lattice_A)) < MIN_VOLUME_A3 or plane_spacings(lattice_A).min() < MIN_SPACING_A:
        return f"the cell is flat: opposite faces less than {MIN_SPACING_A} A apart"
    return ""


def decode_ideal(crystal: Crystal, spec: GridSpec) -> Decoded:
    """A crystal through its own true grid and back: the ceiling of every network in front of `decode`."""
    occupancy = voxelize(crystal, spec.model_copy(update={"channels": ("occupancy",)}))
    labelled = (occupancy.species_DHW > 0).astype(np.float32)
    return decode(crystal.id, occupancy.density_CDHW[0], occupancy.species_DHW, labelled, crystal.lattice_A, spec)


def _ball(lattice_A: FloatArray, shape: NDArray[np.int64], spacings: FloatArray, radius: float) -> NDArray[np.int64]:
    """[M, 3] voxel offsets within `radius` angstrom."""
    reach = np.floor(radius / spacings * shape).astype(int)
    offsets = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(offsets[np.linalg.norm(offsets / shape @ lattice_A, axis=1) <= radius])


@njit(cache=True, nogil=True)
def _scores(species, probability, ball, min_score):  # type: ignore[no-untyped-def]
    """Voxels [M, 3] whose ball holds at least `min_score` of possible votes for their own element, and their scores."""
    n0, n1, n2 = species.shape
    voxels = np.empty((species.size, 3), np.int64)
    scores = np.empty(species.size, np.float64)
    found = 0
    for i in range(n0):
        for j in range(n1):
            for k in range(n2):
                if species[i, j, k] == 0 or probability[i, j, k] < 0.1:
                    continue
                votes = 0.0
                for m in range(len(ball)):
                    a, b, c = (i + ball[m, 0]) % n0, (j + ball[m, 1]) % n1, (k + ball[m, 2]) % n2
                    if species[a, b, c] == species[i, j, k]:
                        votes += probability[a, b, c]
                if votes >= min_score * len(ball):
                    voxels[found, 0], voxels[found, 1], voxels[found, 2] = i, j, k
                    scores[found] = votes / len(ball)
                    found += 1
    return voxels[:found], scores[:found]


@njit(cache=True, nogil=True)
def _suppress(frac_M3, numbers_M, lattice, images, like, unlike, most):  # type: ignore[no-untyped-def]
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
def _centroids(voxels, species, probability, ball):  # type: ignore[no-untyped-def]
    """[N, 3] centre of the votes in the ball around each voxel, in voxels (not wrapped)."""
    n0, n1, n2 = species.shape
    centres = np.empty((len(voxels), 3), np.float64)
    for n in range(len(voxels)):
        i, j, k = voxels[n]
        total, offset = 0.0, np.zeros(3)
        for m in range(len(ball)):
            a, b, c = (i + ball[m, 0]) % n0, (j + ball[m, 1]) % n1, (k + ball[m, 2]) % n2
            if species[a, b, c] == species[i, j, k]:
                total += probability[a, b, c]
                offset += probability[a, b, c] * ball[m]
        centres[n] = voxels[n] + offset / total
    return centres


@njit(cache=True, nogil=True)
def _refine(frac_N3, density, lattice, spacings, sigma, prior, iterations):  # type: ignore[no-untyped-def]
    """[N, 3] fractional coordinates that fit unit Gaussians of `sigma` to `density`, starting at `frac_N3`.

    Each atom in turn takes a Gauss-Newton step on the residual within 2 sigma of it; steps are limited to 0.1 angstrom.
    """
    n0, n1, n2 = density.shape
    start, frac = frac_N3 @ lattice, frac_N3.copy()
    inverse = np.linalg.inv(lattice)
    one = np.ones(1, np.float32)
    model = np.zeros((1, n0, n1, n2), np.float32)
    cutoff = CUTOFF_SIGMAS * sigma
    for n in range(len(frac)):
        add_gaussian(frac[n], one, lattice, spacings, sigma, cutoff, model)
    for _ in range(iterations):
        largest = 0.0
        for n in range(len(frac)):
            normal, slope, square, count = _normal_equations(frac[n], density, model[0], lattice, spacings, sigma)
            noise = max(square / max(count, 1.0), 1e-10)
            here = frac[n] @ lattice
            system = normal / noise + np.eye(3) / prior**2
            step = np.linalg.solve(system, slope / noise - (here - start[n]) / prior**2)
            length = np.sqrt((step**2).sum())
            step *= min(1.0, 0.1 / max(length, 1e-12))
            largest = max(largest, min(length, 0.1))
            add_gaussian(frac[n], -one, lattice, spacings, sigma, cutoff, model)
            frac[n] = (here + step) @ inverse
            add_gaussian(frac[n], one, lattice, spacings, sigma, cutoff, model)
        if largest < 1e-6:
            break
    return frac


@njit(cache=True, nogil=True)
def _normal_equations(frac, density, model, lattice, spacings, sigma):  # type: ignore[no-untyped-def]
    """J^T J [3, 3], J^T r [3], r^T r and the number of voxels within 2 sigma of one atom; J in 1 / angstrom."""
    n0, n1, n2 = density.shape
    normal, slope, square, count = np.zeros((3, 3)), np.zeros(3), 0.0, 0.0
    reach = 2.0 * sigma
    u0, u1, u2 = frac[0] * n0, frac[1] * n1, frac[2] * n2
    r0, r1, r2 = reach / spacings[0] * n0, reach / spacings[1] * n1, reach / spacings[2] * n2
    delta = np.empty(3)
    for i in range(int(np.ceil(u0 - r0)), int(np.floor(u0 + r0)) + 1):
        for j in range(int(np.ceil(u1 - r1)), int(np.floor(u1 + r1)) + 1):
            for k in range(int(np.ceil(u2 - r2)), int(np.floor(u2 + r2)) + 1):
                for axis in range(3):
                    delta[axis] = (
                        (i - u0) / n0 * lattice[0, axis]
                        + (j - u1) / n1 * lattice[1, axis]
                        + (k - u2) / n2 * lattice[2, axis]
                    )
                d2 = delta[0] ** 2 + delta[1] ** 2 + delta[2] ** 2
                if d2 > reach * reach:
                    continue
                height = np.exp(-0.5 * d2 / (sigma * sigma)) / (sigma * sigma)
                residual = density[i % n0, j % n1, k % n2] - model[i % n0, j % n1, k % n2]
                square += residual * residual
                count += 1.0
                for p in range(3):
                    slope[p] += height * delta[p] * residual
                    for q in range(3):
                        normal[p, q] += height * height * delta[p] * delta[q]
    return normal, slope, square, count
