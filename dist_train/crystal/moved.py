"""The same crystal written otherwise: what a model that knows crystals, and not one way to write them, must not mind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from dist_train.crystal.structure import Crystal, wrap

SHEARS = 3
"""Lattice vectors added to others: enough for any choice of axes to be left, few enough for cells that aren't needles."""


def moved(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """An equal crystal with another origin, cell, orientation and order of atoms, all of them random.

    The origin is uniform in the cell; the new axes are the old ones times a random integer matrix of determinant 1; the
    rotation is uniform on SO(3). Distances, volume and hand stay as they are; coordinates are wrapped into [0, 1).
    """
    change = np.roll(np.eye(3), rng.integers(3), axis=0)
    for _ in range(SHEARS):
        to, of = rng.choice(3, 2, replace=False)
        change[to] += rng.choice([-1, 1]) * change[of]
    order = rng.permutation(len(crystal))
    frac = crystal.frac_N3[order] @ np.linalg.inv(change) + rng.random(3)
    rotation = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    lattice = change @ crystal.lattice_A @ rotation
    return replace(crystal, lattice_A=lattice, frac_N3=wrap(frac), numbers_N=crystal.numbers_N[order])
