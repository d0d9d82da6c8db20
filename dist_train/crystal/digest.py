"""Digests by which a crystal is known again: whatever its id, origin, cell, orientation and order of atoms.

A digest is of the reduced formula and of lengths in angstrom that none of these changes: the edge of an atom's share of the
volume, and mean distances from all atoms to the nearest atoms of each element, once as they are and once weighed by atomic
number, so that exchanged elements are told apart (after the average minimum distances of Widdowson et al., MATCH 87, 2022,
which don't look at elements). The phases of an element differ in such distances alone, so that more of them are taken, and
finer: of 217 held-out carbons 131 then have the digest of a training crystal, 134 have one that StructureMatcher finds the
same within 0.02, and 118 have both. Mirror images have one digest, and so have a cell and its supercells.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from dist_train.crystal.lattice import FloatArray, compact_lattice, image_offsets
from dist_train.crystal.structure import Crystal, wrap

DIGEST_VERSION = 2
"""To be raised with every change of what a digest is."""
NEIGHBOURS, OF_AN_ELEMENT = (4, 24), (4, 8, 12, 16, 24)
"""Distances are averaged over so many nearest atoms of an element; beyond a dozen, close packings begin to differ."""
BIN_A, BIN_OF_AN_ELEMENT_A, TOLERANCE_A = 0.01, 0.002, 0.001
"""Crystals whose lengths fall into the same bins have one digest; lengths this near are taken for equal ones, as a file with
four decimals of each coordinate changes them by less."""


def digest(crystal: Crystal) -> int:
    """64 bits (see the module) of a crystal that `Crystal.checked` accepts."""
    return _hash(crystal, np.floor(invariants(crystal) / _bin(crystal)))


def digests_near(crystal: Crystal) -> tuple[int, ...]:
    """The digests that an equal crystal may have: a length within `TOLERANCE_A` of a bin's edge may fall on either side."""
    lengths, width = invariants(crystal), _bin(crystal)
    sides = zip(np.floor((lengths - TOLERANCE_A) / width), np.floor((lengths + TOLERANCE_A) / width), strict=True)
    return tuple(_hash(crystal, np.array(bins)) for bins in product(*(dict.fromkeys(side) for side in sides)))


def invariants(crystal: Crystal) -> FloatArray:
    """[9], of an element [6], lengths in angstrom that don't depend on origin, cell, orientation and order of the atoms."""
    lattice = compact_lattice(crystal.lattice_A)
    cart = wrap(crystal.cart_N3 @ np.linalg.inv(lattice)) @ lattice
    elements, numbers = np.array(list(crystal.composition)), crystal.numbers_N
    nearest_NEK = np.stack([_nearest(lattice, cart, cart[numbers == z], NEIGHBOURS[-1]) for z in elements], axis=1)
    edge = np.cbrt(crystal.volume_A3 / len(crystal))
    if len(elements) == 1:
        return np.array([edge, *(nearest_NEK[..., :count].mean() for count in OF_AN_ELEMENT)])
    means = [nearest_NEK[..., :count].mean(2) for count in NEIGHBOURS]
    atoms = np.stack([np.full(len(numbers), 1 / len(numbers)), numbers / numbers.sum()])
    kinds = np.stack([np.full(len(elements), 1 / len(elements)), elements / elements.sum()])
    return np.concatenate([[edge], *((atoms @ mean @ kinds.T).ravel() for mean in means)])


def _bin(crystal: Crystal) -> float:
    """Width in angstrom of the bins of its lengths."""
    return BIN_A if len(crystal.composition) > 1 else BIN_OF_AN_ELEMENT_A


def _nearest(lattice: FloatArray, cart_N3: FloatArray, others_M3: FloatArray, count: int) -> FloatArray:
    """[N, count] distances in angstrom from atoms to the nearest of others and all their images, rising; all wrapped."""
    volume = abs(np.linalg.det(lattice)) / len(others_M3)
    reach = 1.2 * float(np.cbrt(volume * count * 3 / (4 * np.pi)))
    while True:
        images = (others_M3 + (image_offsets(lattice, reach) @ lattice)[:, None]).reshape(-1, 3)
        distances = np.asarray(cKDTree(images).query(cart_N3, count)[0])
        if distances.max() <= reach:  # what lies farther may have a nearer one among images that were left out
            return distances
        reach *= 1.5


def _hash(crystal: Crystal, bins: NDArray[np.float64]) -> int:
    text = f"{crystal.formula} {bins.astype(int).tolist()}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
