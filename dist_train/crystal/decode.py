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
from dist_train.crystal.refine import refine
from dist_train.crystal.structure import Crystal, wrap
from dist_train.crystal.voxelize import voxelize

FloatArray = NDArray[np.float64]

MIN_SCORE = 0.35
"""Share of the ball's votes below which a voxel is no atom."""
LIKE_DISTANCE_A, UNLIKE_DISTANCE_A = 0.8, 0.6
LIKE_RADII, UNLIKE_RADII = 1.6, 1.2
"""Votes of the same element / of different elements nearer than this many species radii are taken for one atom's."""
CENTROID_RADII = 1.15
"""Ball of a centroid, in species radii: a little wider, so that its edge doesn't cut the sphere of labels."""
NETWORK_ERROR_A = 0.01
MISSING_HEIGHT, MAX_COMPLETIONS, LARGEST_ERROR_A = 0.4, 3, 0.2
"""Density, in heights of an atom, that is left where one is missing; how often to look; the error of where it is seen."""
SHIFTS = 3
"""Times that the ball of votes is moved to their centre."""
MAX_ATOMS_PER_A3 = 0.5
"""Number density above which a field is no crystal; diamond, the densest at normal pressure, has 0.18."""
MIN_SPACING_A = 0.5
"""Distance of opposite faces below which a decoded cell is too flat to be one."""


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
    like, unlike = LIKE_RADII * spec.radius_A, UNLIKE_RADII * spec.radius_A
    images = image_offsets(lattice_A, like).astype(np.float64)
    most = min(spec.max_atoms, int(MAX_ATOMS_PER_A3 * abs(np.linalg.det(lattice_A))))
    kept = _suppress(voxels / shape, numbers, lattice_A, images, like, unlike, most + 1)
    if not len(kept):
        return Decoded(None, nothing, f"no atom found: no voxel scores {MIN_SCORE} or more")
    if len(kept) > most:
        return Decoded(None, nothing, f"over {most} atoms found, more than the cell or the spec can hold")
    density = np.ascontiguousarray(occupancy_DHW, np.float32)
    basis, errors = lattice_A / shape[:, None], _centroid_errors(scores[kept], len(ball), spacings / shape, spec.radius_A)
    reach = CENTROID_RADII * spec.radius_A
    cart = _centroids(voxels[kept], species, probability, basis, spacings / shape, reach, SHIFTS) @ basis
    found, confidence = numbers[kept], scores[kept]
    fit = refine(cart, errors, density, lattice_A, spec.sigma_A)
    for _ in range(MAX_COMPLETIONS):
        missing = _missing(fit.residual_DHW, species, probability, lattice_A, images, like)
        if not len(missing):
            break
        cart = np.concatenate([fit.cart_N3, missing @ basis])
        errors = np.concatenate([errors, np.full(len(missing), LARGEST_ERROR_A)])
        place = tuple(missing.T)
        found = np.concatenate([found, species[place].astype(np.int64)])
        confidence = np.concatenate([confidence, probability[place]])
        fit = refine(cart, errors, density, lattice_A, spec.sigma_A)
    frac = fit.cart_N3 @ np.linalg.inv(lattice_A)
    return Decoded(Crystal(id, lattice_A, wrap(frac), found), confidence)


def _missing(
    residual_DHW: NDArray[np.float32], species_DHW: NDArray[np.uint8], probability_DHW: NDArray[np.float32],
    lattice_A: FloatArray, images: FloatArray, apart_A: float,
) -> NDArray[np.int64]:  # fmt: skip
    """[M, 3] voxels that are labelled as atoms and hold density that no atom explains: one of two like atoms very close."""
    voxels = np.argwhere((residual_DHW > MISSING_HEIGHT) & (species_DHW > 0) & (probability_DHW > 0.5))
    voxels = voxels[np.argsort(-residual_DHW[tuple(voxels.T)], kind="stable")]
    alike = np.zeros(len(voxels), np.int64)
    kept = _suppress(voxels / np.array(residual_DHW.shape), alike, lattice_A, images, apart_A, apart_A, len(voxels) + 1)
    return np.asarray(voxels[kept])


def _centroid_errors(scores_N: FloatArray, ball: int, spacings_A: FloatArray, radius_A: float) -> FloatArray:
    """[N] standard error of a centroid along an axis in angstrom: of the voxels' size, of missing votes, and of networks.

    The numbers are fitted to the centroids of 120 real crystals at spacings of 0.125 to 0.3 angstrom with 0 and 10 % of all
    labels flipped; networks shift whole spheres, which votes don't show.
    """
    voxels = 0.042 * spacings_A.max()
    votes = 0.6 * radius_A * np.sqrt(np.clip(1.0 - scores_N, 0.0, 1.0) / ball)
    return np.asarray(np.sqrt(voxels**2 + votes**2 + NETWORK_ERROR_A**2))


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
def _centroids(voxels, species, probability, basis, spacings, radius, shifts):  # type: ignore[no-untyped-def]
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
                        d2 = 0.0
                        for axis in range(3):
                            d = (i - u) * basis[0, axis] + (j - v) * basis[1, axis] + (k - w) * basis[2, axis]
                            d2 += d * d
                        if d2 <= radius * radius and species[i % n0, j % n1, k % n2] == number:
                            vote = probability[i % n0, j % n1, k % n2]
                            total += vote
                            du, dv, dw = du + vote * (i - u), dv + vote * (j - v), dw + vote * (k - w)
            if total > 0.0:
                centres[n, 0], centres[n, 1], centres[n, 2] = u + du / total, v + dv / total, w + dw / total
    return centres
