"""Crystals with other elements than their own, for training: compositions that no crystal of the data has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dist_train.config import GridSpec
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError


def substituted(crystal: Crystal, spec: GridSpec, elements: Sequence[int], chance: float, seed: int) -> Crystal:
    """The crystal with each of its elements exchanged, with this chance, for another one of `elements` on all its sites.

    Positions and cell stay, up to the frame in which the spec takes them; elements that differ go on differing. A pure
    function of its arguments. The crystal itself where nothing is exchanged, where the spec can't hold the result, or where
    its grid would have another shape.
    """
    rng = np.random.default_rng(seed)
    old = np.array(list(crystal.composition))  # rising
    change = rng.random(len(old)) < chance
    others = np.setdiff1d(elements, old)
    if not change.any() or len(others) < change.sum():
        return crystal
    new = np.where(change, 0, old)
    new[change] = rng.choice(others, change.sum(), replace=False)
    try:
        other = representable(replace(crystal, numbers_N=new[np.searchsorted(old, crystal.numbers_N)]), spec)
    except CrystalError:
        return crystal
    return other if grid_shape(other.lattice_A, spec) == grid_shape(crystal.lattice_A, spec) else crystal
