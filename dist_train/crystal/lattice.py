"""Lattices as [3, 3] arrays of row vectors in angstrom, and periodic distances."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import spglib
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from dist_train.crystal import kernels

FloatArray = NDArray[np.float64]

MIN_VOLUME_A3 = 0.1
NIGGLI_TOLERANCES = (1e-5, 1e-6, 1e-4)

MIN_SPACING_A = 0.2
MAX_ASPECT = 200.0
"""Least distance of opposite faces of a reduced cell, and how often it may go into the longest edge."""


def lengths_angles(lattice_A: FloatArray) -> FloatArray:
    """[6]: a, b, c in angstrom and alpha (b, c), beta (a, c), gamma (a, b) in degrees."""
    lengths = np.linalg.norm(lattice_A, axis=1)
    gram = lattice_A @ lattice_A.T / np.outer(lengths, lengths)
    cosines = np.clip([gram[1, 2], gram[0, 2], gram[0, 1]], -1.0, 1.0)
    return np.concatenate([lengths, np.degrees(np.arccos(cosines))])


def from_lengths_angles(parameters: FloatArray) -> FloatArray:
    """[3, 3] lattice of six cell parameters; a along x, b in the xy plane, right-handed.

    Raises ValueError for parameters that span no cell.
    """
    lengths, angles = parameters[:3], parameters[3:]
    if np.isfinite(parameters).all() and (lengths > 0).all() and (angles > 0).all() and (angles < 180).all():
        cos_alpha, cos_beta, cos_gamma = np.cos(np.radians(angles))
        sin_gamma = np.sin(np.radians(angles[2]))
        c_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
        c_z_squared = 1.0 - cos_beta**2 - c_y**2
        if c_z_squared > 0:
            a, b, c = lengths
            return np.array(
                [[a, 0.0, 0.0], [b * cos_gamma, b * sin_gamma, 0.0], [c * cos_beta, c * c_y, c * np.sqrt(c_z_squared)]]
            )
    raise ValueError(f"no cell has the parameters {np.round(parameters, 4).tolist()}")


def niggli(lattice_A: FloatArray) -> FloatArray | None:
    """The Niggli-reduced lattice (spglib), read-only, or None where the reduction fails.

    The tolerance decides which edges and angles count as equal; a few real cells converge at one of these only.
    """
    return _niggli(np.ascontiguousarray(lattice_A, np.float64).tobytes())


@lru_cache(maxsize=64)  # a crystal's cell is asked for several times on its way
def _niggli(lattice: bytes) -> FloatArray | None:
    lattice_A = np.frombuffer(lattice).reshape(3, 3)
    if abs(np.linalg.det(lattice_A)) < MIN_VOLUME_A3:
        return None
    for tolerance in NIGGLI_TOLERANCES:
        with warnings.catch_warnings():
            # spglib warns at every call that a later version will raise instead of returning None.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                reduced = spglib.niggli_reduce(lattice_A, eps=tolerance)
            except spglib.error.SpglibError:
                continue
        if reduced is not None:
            reduced.flags.writeable = False
            return np.asarray(reduced)
    return None


def plane_spacings(lattice_A: FloatArray) -> FloatArray:
    """[3] distances in angstrom between opposite faces of the cell: 1 / |reciprocal vector|."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.inv(lattice_A), axis=0))


def compact_lattice(lattice_A: FloatArray) -> FloatArray:
    """[3, 3] the Niggli-reduced lattice, or the given one where the reduction fails."""
    reduced = niggli(lattice_A)
    return lattice_A if reduced is None else reduced


def too_thin(compact_A: FloatArray) -> bool:
    """Whether a compact cell is no crystal but a sheet or needle, with too many periodic images nearby to visit."""
    longest = float(np.linalg.norm(compact_A, axis=1).max())
    return float(plane_spacings(compact_A).min()) < max(MIN_SPACING_A, longest / MAX_ASPECT)


def image_offsets(lattice_A: FloatArray, cutoff_A: float) -> NDArray[np.int64]:
    """[M, 3] integer translations that hold every image within `cutoff_A` of a point, for |difference| <= 1/2."""
    reach = np.ceil(cutoff_A / plane_spacings(lattice_A) + 0.5).astype(int)
    axes = [np.arange(-n, n + 1) for n in reach]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def periodic_distances(lattice_A: FloatArray, frac_N3: FloatArray, frac_M3: FloatArray) -> FloatArray:
    """[N, M] shortest distances in angstrom between points and any periodic image of others, exact for any cell."""
    difference = frac_M3[None] - frac_N3[:, None]
    difference -= np.round(difference)
    wrapped_cart = difference @ lattice_A
    # No image farther than the wrapped one can be the nearest: its distance bounds the search.
    bound = float(np.linalg.norm(wrapped_cart, axis=-1).max(initial=0.0))
    best = np.full(difference.shape[:2], np.inf)
    for shift in image_offsets(lattice_A, bound) @ lattice_A:
        np.minimum(best, ((wrapped_cart + shift) ** 2).sum(-1), out=best)
    return np.asarray(np.sqrt(best))


def shortest_distances(
    compact_A: FloatArray, cart_N3: FloatArray, numbers_N: NDArray[np.int64], cutoff_A: float
) -> tuple[float, float]:
    """Shortest distances in angstrom between atoms of unlike and of like number, periodic images included.

    Infinity stands for what isn't below the cutoff. The lattice must be compact, or many images are visited.
    """
    inverse = np.linalg.inv(compact_A)
    frac = cart_N3 @ inverse
    spacings = 1.0 / np.sqrt((inverse * inverse).sum(0))
    unlike, like = kernels.shortest_distances(frac - np.floor(frac), numbers_N, compact_A, spacings, cutoff_A)
    own = float(np.sqrt((compact_A * compact_A).sum(1).min()))  # an atom is like its own images
    return float(unlike), min(float(like), own if own < cutoff_A else np.inf)


def neighbour_pairs(
    lattice_A: FloatArray, cart_N3: FloatArray, cutoff_A: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
    """(first [P], second [P], shift [P, 3]): every pair of atoms closer than the cutoff, both ways round, by rising first.

    The second atom of a pair is the image moved by `shift` angstrom; an atom pairs with its own images, not with itself.
    """
    cells = np.floor(cart_N3 @ np.linalg.inv(lattice_A)) @ lattice_A
    wrapped = cart_N3 - cells
    offsets = image_offsets(lattice_A, cutoff_A) @ lattice_A
    near = cKDTree((wrapped + offsets[:, None]).reshape(-1, 3)).query_ball_point(wrapped, cutoff_A, return_sorted=True)
    first = np.repeat(np.arange(len(cart_N3)), [len(found) for found in near])
    image, second = np.divmod(np.concatenate([*near, []]).astype(np.int64), max(len(cart_N3), 1))
    other = (first != second) | offsets[image].any(axis=1)
    first, second, image = first[other], second[other], image[other]
    return first, second, offsets[image] - cells[second] + cells[first]
