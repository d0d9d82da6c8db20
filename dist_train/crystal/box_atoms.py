"""Atoms in a Cartesian cube of voxels: species voting, non-maximum suppression, a joint fit of Gaussians to the density.

Voxel (i, j, k) lies at (i, j, k) * spacing from the cube's corner; nothing is periodic, and balls and Gaussians are cut by
the faces. A Gaussian on such a grid is a product of three profiles, so that the density of N atoms, its derivatives and
the overlaps between atoms are matrix products over [N, n] tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import laplace

from dist_train.config import GridSpec
from dist_train.crystal import labels
from dist_train.crystal.decode import MAX_ATOMS_PER_A3, MIN_SCORE
from dist_train.crystal.frames import spacing_A

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LIKE_DISTANCE_A, UNLIKE_DISTANCE_A = 0.8, 0.6
"""Votes of the same element / of different elements nearer to an atom than this are for no other."""
CENTRE_ERROR_A = 0.1
"""Standard deviation of an atom's place as its labels give it: 0.05 on clean ones, 0.1 where a tenth are wrong."""
CUT_ERROR_A = 0.3
"""What is added to it where the cube's faces leave nothing of the atom's ball."""
MIN_DENSITY = 0.4
"""Least density at an atom, beyond the noise, as a share of its Gaussian: labels without any are no atom."""
SCALES = 0.3, 3.0
"""Least and greatest overall scale of a density: a blurred one is lower."""
WIDTHS = 0.8, 2.0
"""Least and greatest width of the Gaussians, as a share of the spec's."""
MAX_STEP_A = 0.15
"""Longest move of an atom in one iteration of the fit."""
_SHIFTS, _ITERATIONS = 6, 8


@dataclass(frozen=True)
class BoxAtoms:
    """Atoms in a cube, clearest first; none where `reason` says why.

    cart_N3: [N, 3] angstrom from the first voxel; numbers_N: atomic numbers; confidence_N: share of the votes of the
    ball around the atom, 0-1; error_N: rough standard deviation of the place in angstrom.
    """

    cart_N3: FloatArray
    numbers_N: IntArray
    confidence_N: FloatArray
    error_N: FloatArray
    reason: str = ""

    def __len__(self) -> int:
        return len(self.numbers_N)


def no_atoms(reason: str) -> BoxAtoms:
    """Nothing, and why."""
    return BoxAtoms(np.zeros((0, 3)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0), reason)


def find_atoms(
    density_DHW: FloatArray,
    species_DHW: NDArray[np.integer],
    atom_probability_DHW: NDArray[np.floating],
    heights_Z: FloatArray,
    spec: GridSpec,
) -> BoxAtoms:
    """The atoms in finite fields of a cube, placed by their labels alone, which no atom outside the cube disturbs.

    heights_Z: [MAX_Z + 1] height of the Gaussian of an atom of each atomic number in `density_DHW`.
    """
    spacing = spacing_A(spec)
    species = np.ascontiguousarray(species_DHW, np.uint8)
    probability = np.ascontiguousarray(atom_probability_DHW, np.float32)
    radius = spec.radius_A / spacing
    voxels, votes = labels.candidates(species, probability, _ball(radius), MIN_SCORE, False)
    voxels = voxels[np.argsort(-votes, kind="stable")]
    most = int(MAX_ATOMS_PER_A3 * spec.box_A**3)
    limits = LIKE_DISTANCE_A / spacing, UNLIKE_DISTANCE_A / spacing
    centres, numbers, scores, inside = _pick(voxels, species.copy(), probability, radius, *limits, MIN_SCORE, most + 1)
    if len(centres) > most:
        return no_atoms(f"over {most} atoms found, more than the cube can hold")
    nearest = np.clip(np.round(centres), 0, len(species) - 1).astype(int)
    heights = heights_Z[numbers]
    model = model_density(profiles(centres * spacing, len(species), spacing, spec.sigma_A)[0], heights)
    scale, _ = density_shape(model, density_DHW, spec.sigma_A, spec)
    noise = float((density_DHW - scale * model).std())
    kept = np.flatnonzero(density_DHW[tuple(nearest.T)] > scale * MIN_DENSITY * heights - 2.0 * noise)
    if not len(kept):
        return no_atoms(f"no atom found: no voxel scores {MIN_SCORE} or more where there is density")
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    error = CENTRE_ERROR_A + CUT_ERROR_A * (1.0 - inside[kept])
    return BoxAtoms(centres[kept] * spacing, numbers[kept], scores[kept], error)


def _ball(radius_voxels: float) -> IntArray:
    """[M, 3] voxel offsets within a radius."""
    reach = int(radius_voxels)
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(offsets[np.linalg.norm(offsets, axis=1) <= radius_voxels])


@njit(cache=True, nogil=True)
def _pick(voxels, species, probability, radius, like, unlike, min_score, most):  # type: ignore[no-untyped-def]
    """Atoms from voxels in falling order of votes: centres [N, 3] in voxels, numbers, scores and shares of their balls.

    A voxel nearer than `like` / `unlike` voxels to an atom taken before it is no new one; nor is one without enough votes
    when those around the atoms taken before it are left out: these are struck from `species`.
    """
    size = min(len(voxels), most)
    centres, numbers = np.empty((size, 3)), np.empty(size, np.int64)
    scores, shares = np.empty(size), np.empty(size)
    taken = 0
    for m in range(len(voxels)):
        i, j, k = voxels[m]
        free = species[i, j, k] > 0
        for n in range(taken):
            limit = like if numbers[n] == species[i, j, k] else unlike
            d2 = (i - centres[n, 0]) ** 2 + (j - centres[n, 1]) ** 2 + (k - centres[n, 2]) ** 2
            if not free or d2 < limit * limit:
                free = False
                break
        if not free:
            continue
        centre, score, share = _centre(voxels[m], species, probability, radius)
        if score < min_score:
            continue
        centres[taken], numbers[taken], scores[taken], shares[taken] = centre, species[i, j, k], score, share
        _strike(centre, species[i, j, k], species, radius)
        taken += 1
        if taken == most:
            break
    return centres[:taken], numbers[:taken], scores[:taken], shares[:taken]


@njit(cache=True, nogil=True)
def _strike(centre, number, species, radius):  # type: ignore[no-untyped-def]
    """Take the labels of an element away from a ball."""
    x, y, z = centre
    n0, n1, n2 = species.shape
    for i in range(max(int(np.ceil(x - radius)), 0), min(int(np.floor(x + radius)) + 1, n0)):
        for j in range(max(int(np.ceil(y - radius)), 0), min(int(np.floor(y + radius)) + 1, n1)):
            for k in range(max(int(np.ceil(z - radius)), 0), min(int(np.floor(z + radius)) + 1, n2)):
                if species[i, j, k] == number and (i - x) ** 2 + (j - y) ** 2 + (k - z) ** 2 <= radius * radius:
                    species[i, j, k] = 0


@njit(cache=True, nogil=True)
def _centre(voxel, species, probability, radius):  # type: ignore[no-untyped-def]
    """Where a ball around a voxel must go to be full of its votes, the votes' share of it, and its share in the cube.

    The ball moves by the distance from the mean of its own voxels to the mean of the votes in it: nought where all its
    voxels vote, whatever the grid and the cube's faces leave of it.
    """
    n0, n1, n2 = species.shape
    number = species[voxel[0], voxel[1], voxel[2]]
    x, y, z = float(voxel[0]), float(voxel[1]), float(voxel[2])
    total, count, whole = 0.0, 0, 0
    for _ in range(_SHIFTS):
        total, count, whole = 0.0, 0, 0
        v0, v1, v2, b0, b1, b2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(int(np.ceil(x - radius)), int(np.floor(x + radius)) + 1):
            for j in range(int(np.ceil(y - radius)), int(np.floor(y + radius)) + 1):
                for k in range(int(np.ceil(z - radius)), int(np.floor(z + radius)) + 1):
                    if (i - x) ** 2 + (j - y) ** 2 + (k - z) ** 2 > radius * radius:
                        continue
                    whole += 1
                    if i < 0 or j < 0 or k < 0 or i >= n0 or j >= n1 or k >= n2:
                        continue
                    count += 1
                    b0, b1, b2 = b0 + i, b1 + j, b2 + k
                    if species[i, j, k] == number:
                        vote = probability[i, j, k]
                        total += vote
                        v0, v1, v2 = v0 + vote * i, v1 + vote * j, v2 + vote * k
        if total == 0.0:
            break
        # Where two balls lie `d` apart, the middle of what they share is d / 2 away: hence nearly twice the distance.
        x += 1.6 * (v0 / total - b0 / count)
        y += 1.6 * (v1 / total - b1 / count)
        z += 1.6 * (v2 / total - b2 / count)
    return np.array([x, y, z]), total / max(count, 1), count / max(whole, 1)


def profiles(cart_N3: FloatArray, points: int, spacing: float, sigma: float) -> tuple[FloatArray, FloatArray]:
    """[3, N, points] Gaussians of the atoms along the axes, and their derivatives by the atom's coordinate."""
    offset = np.arange(points) * spacing - cart_N3.T[:, :, None]
    gauss = np.exp(-0.5 * (offset / sigma) ** 2)
    return gauss, gauss * offset / sigma**2


def model_density(gauss: FloatArray, heights_N: FloatArray) -> FloatArray:
    """[n, n, n] sum of the atoms' Gaussians."""
    n = gauss.shape[2]
    planes = (heights_N[:, None] * gauss[0])[:, :, None] * gauss[1][:, None]
    return np.asarray((planes.reshape(-1, n * n).T @ gauss[2]).reshape(n, n, n))


def density_shape(model_DHW: FloatArray, density_DHW: FloatArray, sigma: float, spec: GridSpec) -> tuple[float, float]:
    """Overall factor and width of the Gaussians that fit a density better than a model of width `sigma` does.

    A blurred density is lower and wider. Gaussians obey the heat equation: d model / d (sigma^2 / 2) is its Laplacian.
    """
    laplacian = laplace(model_DHW)[1:-1, 1:-1, 1:-1].ravel() / spacing_A(spec) ** 2
    model, density = model_DHW[1:-1, 1:-1, 1:-1].ravel(), density_DHW[1:-1, 1:-1, 1:-1].ravel()
    square, cross, other = model @ model, model @ laplacian, laplacian @ laplacian
    determinant = square * other - cross**2
    if determinant <= 1e-9 * square * other:
        return 1.0, sigma
    first, second = model @ density, laplacian @ density
    scale = float(np.clip((first * other - second * cross) / determinant, *SCALES))
    change = 2.0 * float((second * square - first * cross) / determinant) / scale
    low, high = WIDTHS[0] * spec.sigma_A, WIDTHS[1] * spec.sigma_A
    return scale, float(np.sqrt(np.clip(sigma**2 + change, low**2, high**2)))


def project_slopes(field_DHW: FloatArray, gauss: FloatArray, slope: FloatArray) -> FloatArray:
    """[N, 3] sums of the field times the derivatives of each atom's unit Gaussian by its coordinates."""
    along, across = field_DHW @ gauss[2].T, field_DHW @ slope[2].T
    parts = (
        np.einsum("ijN,Nj->iN", along, gauss[1]) * slope[0].T,
        np.einsum("ijN,Nj->iN", along, slope[1]) * gauss[0].T,
        np.einsum("ijN,Nj->iN", across, gauss[1]) * gauss[0].T,
    )
    return np.stack([part.sum(0) for part in parts], axis=1)


def normal_blocks(gauss: FloatArray, slope: FloatArray, heights_N: FloatArray) -> FloatArray:
    """[3, 3, N, N] sums over the cube of products of the density's derivatives by atoms' coordinates: by axes p, q."""
    same, mixed, both = (a @ b.transpose(0, 2, 1) for a, b in ((gauss, gauss), (slope, gauss), (slope, slope)))
    blocks = np.empty((3, 3, *same.shape[1:]))
    for p, q, r in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        blocks[p, p] = both[p] * same[q] * same[r]
        blocks[p, q] = mixed[p] * mixed[q].T * same[r]
        blocks[q, p] = blocks[p, q].T
    blocks *= heights_N[:, None] * heights_N
    return blocks


def fit_atoms(
    start_N3: FloatArray,
    error_N: FloatArray,
    heights_N: FloatArray,
    density_DHW: FloatArray,
    spec: GridSpec,
) -> tuple[FloatArray, FloatArray]:
    """[N, 3] coordinates that fit Gaussians to the density, all atoms at once by Gauss-Newton, and their errors [N].

    `error_N` are standard deviations of `start_N3`, weighed against the residual near each atom, so that a density which
    the atoms can't explain pulls none of them away. All in angstrom.
    """
    cart, spacing, sigma = start_N3.copy(), spacing_A(spec), spec.sigma_A
    for _ in range(_ITERATIONS):
        gauss, slope = profiles(cart, len(density_DHW), spacing, sigma)
        model = model_density(gauss, heights_N)
        scale, sigma = density_shape(model, density_DHW, sigma, spec)
        residual = density_DHW - scale * model
        square = np.einsum("ijN,Nj,Ni->N", residual**2 @ gauss[2].T, gauss[1], gauss[0], optimize=True)
        noise = np.maximum(square / np.maximum(gauss.sum(2).prod(0), 1e-12), 1e-10)
        hold = np.repeat(noise / error_N**2, 3)
        target = scale * (heights_N[:, None] * project_slopes(residual, gauss, slope)).ravel()
        target -= hold * (cart - start_N3).ravel()
        blocks = scale**2 * normal_blocks(gauss, slope, heights_N)
        normal = blocks.transpose(2, 0, 3, 1).reshape(len(target), len(target)) + np.diag(hold)
        step = np.linalg.solve(normal, target).reshape(-1, 3)
        length = np.linalg.norm(step, axis=1)
        cart += step * np.minimum(1.0, MAX_STEP_A / np.maximum(length, 1e-12))[:, None]
        if length.max() < 1e-3:
            break
    variance = np.diag(np.linalg.inv(normal)).reshape(-1, 3).sum(1) * noise * correlation_volume(residual)
    return cart, np.sqrt(variance)


def correlation_volume(residual_DHW: FloatArray) -> float:
    """Voxels that one independent value of a residual fills, from its correlation between neighbours along the axes."""
    square = max(float((residual_DHW**2).sum()), 1e-30)
    along = [np.vdot(np.moveaxis(residual_DHW, axis, 0)[1:], np.moveaxis(residual_DHW, axis, 0)[:-1]) for axis in range(3)]
    correlation = np.clip(np.array(along) / square, 0.0, 0.9)
    return float(np.prod((1 + correlation) / (1 - correlation)))
