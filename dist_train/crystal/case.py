"""Test crystals as a model's grid takes them, with what an evaluation asks of each: torch-free, for other processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_train.config import GridSpec
from dist_train.crystal.decode import Channel, Decoded
from dist_train.crystal.decode_box import decode_frame
from dist_train.crystal.digest import digests_near
from dist_train.crystal.elements import SYMBOLS
from dist_train.crystal.frames import placement_seed, representable
from dist_train.crystal.moved import moved
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import UNKNOWN, crystal_system
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError

SYMMETRY_ATOMS = 1000
"""Larger cells take spglib minutes."""


@dataclass(frozen=True)
class Case:
    """A test crystal.

    crystal: as `representable` gives it, the same in another cell; as it was read where the grid can't hold it.
    refusal: why the model can't take it, '' where it can. system: see `crystal_system`. digests: see `digests_near`.
    """

    crystal: Crystal
    refusal: str
    system: str
    digests: tuple[int, ...]


def make_case(crystal: Crystal, spec: GridSpec, elements: tuple[int, ...], move: int | None) -> Case:
    """The case of a crystal for a model of these elements; first `moved` by a seed of its id and `move`, if one is given."""
    if move is not None:
        crystal = moved(crystal, np.random.default_rng(placement_seed(crystal.id, move)))
    refusal = ""
    try:
        crystal = representable(crystal, spec)
        refusal = unknown_elements(crystal, elements)
    except CrystalError as error:
        refusal = str(error).removeprefix(f"{crystal.id}: ")
    system = crystal_system(crystal) if len(crystal) <= SYMMETRY_ATOMS else UNKNOWN
    return Case(crystal, refusal, system, digests_near(crystal))


def unknown_elements(crystal: Crystal, elements: tuple[int, ...]) -> str:
    """Why a model of these elements can't take the crystal, or ''."""
    unknown = [SYMBOLS[z] for z in sorted(set(crystal.composition) - set(elements))]
    return f"elements {unknown} in none of the crystals that the model was trained on" if unknown else ""


def in_grid(crystal: Crystal, spec: GridSpec) -> Crystal:
    """The crystal in the cell that the grid takes, or as it is where the grid can't hold it."""
    try:
        return representable(crystal, spec)
    except CrystalError:
        return crystal


def ceiling(case: Case, spec: GridSpec, channel: Channel) -> Decoded:
    """The decoder fed the true grid of a case: what no network in front of it can beat; nothing where there is no grid."""
    if case.refusal:
        return decode_frame(case.refusal, spec, channel)
    grid = voxelize(case.crystal, spec.model_copy(update={"channels": (channel,)}))
    labelled = (grid.species_DHW > 0).astype(np.float32)
    fields = (case.crystal.id, grid.density_CDHW[0], grid.species_DHW, labelled, case.crystal.lattice_A, None)
    return decode_frame(fields, spec, channel)
