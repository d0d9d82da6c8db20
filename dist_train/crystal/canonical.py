"""One cell, one set of axes and one origin for every way in which a crystal can be written down.

The origin lies on an atom, and the axes are short vectors of the lattice. Of all such frames that one is taken in which a
smooth score is highest: it likes short edges in rising order and obtuse angles and, weaker, that the smoothed crystal is
dense at a fixed point near the origin. A score without steps keeps the choice where atoms move a little; only a crystal with
two different frames that are about as good as each other may change between them. Frames that a symmetry of the crystal maps
onto each other give the same picture, so it does not matter which of them is found.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import MAX_Z, PLACES
from dist_train.crystal.structure import Crystal, FloatArray, wrap

DENSITY = 0.1
EDGES, COSINES = np.array([35.0, 30.0, 25.0]), np.array([1.2, 1.0, 0.8])
"""What the score gains by the density, and loses by each edge over the cube root of the volume and by the cosines of alpha,
beta and gamma. These differ, so that a lattice has one best cell even where the density is the same in several."""
POINT = np.array([0.06, 0.1, 0.15])
"""Fractional coordinates, seen from the origin, where the density counts: in a general position."""
WIDTH = 0.14
"""Standard deviation, in fractions of the edges, of the Gaussian that the atoms are smoothed with."""
MAX_INDEX, MAX_SQUARE = 2, 6
"""Waves of the smoothed density: their largest index, and the largest sum of squares. The settings of space groups such as
Pa-3 differ by waves like (2, 1, 0) and (1, 2, 0), not by longer ones."""
CHEMISTRY = 0.3
"""How much the heights of these Gaussians hang on the elements: the geometry chooses first, so that crystals of one
structure type get the same frame, and the elements where it leaves a choice."""


def canonical(crystal: Crystal) -> Crystal:
    """The crystal in its canonical frame: right-handed, one atom at the origin, coordinates wrapped into [0, 1).

    The cell may be any of the lattice; the number of atoms stays. Raises CrystalError where its reduction fails.
    """
    crystal = crystal.reduced()
    lattice = crystal.lattice_A * np.sign(np.linalg.det(crystal.lattice_A))
    frac = crystal.cart_N3 @ np.linalg.inv(lattice)
    score_M = _cell_scores(lattice)
    waves, heights = _waves()
    good = np.flatnonzero(score_M >= score_M.max() - 2 * np.abs(heights).sum())
    changes, inverses = _unimodular()
    # h . (x M^-1) = (M^-1 h) . x: the waves of all cells are waves of the given one.
    indices = (inverses[good] @ waves.T).transpose(0, 2, 1)
    distinct, place = np.unique(indices.reshape(-1, 3), axis=0, return_inverse=True)
    phase = np.exp(2j * np.pi * distinct @ frac.T)
    seen = (phase @ _weights(crystal.numbers_N) / len(crystal))[:, None] * phase.conj()
    density = (heights[:, None] * seen[place.reshape(len(good), -1)]).sum(1).real
    cell, origin = np.unravel_index((score_M[good, None] + density).argmax(), density.shape)
    change = good[cell]
    return replace(crystal, lattice_A=changes[change] @ lattice, frac_N3=wrap((frac - frac[origin]) @ inverses[change]))


def _cell_scores(lattice_A: FloatArray) -> FloatArray:
    """[M] of every change of basis: short edges in rising order, obtuse angles."""
    bases = _unimodular()[0] @ lattice_A
    lengths = np.linalg.norm(bases, axis=2)
    cosines = [(bases[:, i] * bases[:, j]).sum(1) / (lengths[:, i] * lengths[:, j]) for i, j in ((1, 2), (0, 2), (0, 1))]
    return np.asarray(-lengths @ EDGES / abs(np.linalg.det(lattice_A)) ** (1 / 3) - COSINES @ cosines)


def _weights(numbers_N: NDArray[np.int64]) -> FloatArray:
    """[N] heights of the atoms' Gaussians; near for elements that are near in the periodic table."""
    period, group, f_place = PLACES[np.clip(numbers_N, 1, MAX_Z)].T
    return np.asarray(1 + CHEMISTRY * ((group - 9.5) / 8.5 + 0.1 * (period - 4) + 0.01 * f_place))


@cache
def _unimodular() -> tuple[FloatArray, FloatArray]:
    """[M, 3, 3] changes of basis with entries -1, 0, 1 and determinant 1, all reduced ones among them; their inverses."""
    all_ = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 9, indexing="ij"), -1).reshape(-1, 3, 3)
    changes = all_[np.linalg.det(all_).round() == 1]
    return changes, np.linalg.inv(changes).round()


@cache
def _waves() -> tuple[FloatArray, NDArray[np.complex128]]:
    """[H, 3] indices of waves, one of each pair h and -h, and [H] their parts in the smoothed density at POINT."""
    axis = np.arange(-MAX_INDEX, MAX_INDEX + 1.0)
    h = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    h = h[len(h) // 2 + 1 :]
    h = h[(h**2).sum(1) <= MAX_SQUARE]
    return h, 2 * DENSITY * np.exp(-2 * (np.pi * WIDTH) ** 2 * (h**2).sum(1)) * np.exp(-2j * np.pi * h @ POINT)
