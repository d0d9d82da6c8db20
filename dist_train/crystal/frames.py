"""Where the voxels of a grid lie, how a crystal is put there, and which crystals a spec can't hold.

cell: voxel (i, j, k) of an (n1, n2, n3) grid lies at the fractional coordinates (i / n1, j / n2, k / n3); periodic.
window: voxel (i, j, k) lies at (i, j, k) * spacing in the Cartesian axes of the crystal, from 0 to `box_A`; the crystal is
infinite. unit: the same cube around the atoms of one cell alone, their centroid in its middle.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from dist_train.config import GridSpec
from dist_train.crystal.canonical import canonical
from dist_train.crystal.elements import SYMBOLS
from dist_train.crystal.lattice import compact_lattice, shortest_distances
from dist_train.crystal.structure import Crystal, wrap
from dist_train.errors import CrystalError


def grid_shape(lattice_A: NDArray[np.float64], spec: GridSpec) -> tuple[int, int, int]:
    """Voxels along the three axes. Raises CrystalError where the spec can't hold a cell of this lattice."""
    if spec.frame != "cell":
        assert spec.shape != "adaptive"
        return (spec.shape,) * 3
    edges = np.linalg.norm(lattice_A, axis=1)
    if spec.shape != "adaptive":
        spacing = edges.max() / spec.shape
        if spacing > spec.max_spacing_A:
            raise CrystalError(
                f"spacing of {spacing:.3f} A for the longest edge of {edges.max():.2f} A on {spec.shape} voxels, "
                f"at most {spec.max_spacing_A} A is allowed"
            )
        return (spec.shape,) * 3
    d, h, w = (spec.multiple * ceil(edge / spec.max_spacing_A / spec.multiple) for edge in edges.tolist())
    if d * h * w > spec.max_voxels:
        raise CrystalError(f"{d} x {h} x {w} = {d * h * w} voxels are needed, at most {spec.max_voxels} are allowed")
    return d, h, w


def spacing_A(spec: GridSpec) -> float:
    """Distance of neighbouring voxels of a window or unit."""
    assert spec.shape != "adaptive"
    return spec.box_A / (spec.shape - 1)


def representable(crystal: Crystal, spec: GridSpec) -> Crystal:
    """The crystal as the spec takes it: checked, canonical, or Niggli-reduced where asked with edges in rising order.

    Raises CrystalError naming the reason and the limit where the spec can't hold it.
    """
    crystal = crystal.checked(spec.max_atoms)
    if "table" in spec.channels:
        unknown = set(crystal.composition) - {z for z, symbol in enumerate(SYMBOLS) if symbol in dict(spec.element_table)}
        if unknown:
            raise CrystalError(f"{crystal.id}: no code in element_table for {[SYMBOLS[z] for z in sorted(unknown)]}")
    if spec.canonical:
        crystal = canonical(crystal)
    elif spec.niggli:
        crystal = crystal.reduced()
    if spec.frame == "cell" and not spec.canonical:
        crystal = _ordered(crystal)
    try:
        grid_shape(crystal.lattice_A, spec)
    except CrystalError as error:
        raise CrystalError(f"{crystal.id}: {error}") from None
    if spec.frame == "unit":
        _check_fits(crystal, spec)
    _check_pairs(crystal, spec)
    return crystal


def _ordered(crystal: Crystal) -> Crystal:
    """The same crystal with a right-handed cell, whose six parameters hold it, and edges in rising order."""
    order = np.argsort(np.linalg.norm(crystal.lattice_A, axis=1).round(6), kind="stable")
    lattice, frac = crystal.lattice_A[order], crystal.frac_N3[:, order]
    # Turning all three axes round changes the hand and no length or angle.
    sign = 1.0 if np.linalg.det(lattice) > 0 else -1.0
    return replace(crystal, lattice_A=sign * lattice, frac_N3=wrap(sign * frac))


def _check_fits(crystal: Crystal, spec: GridSpec) -> None:
    """Raise CrystalError where an atom of a unit lies outside the cube: at any rotation, if it is to be rotated."""
    cart = placed(crystal, spec.model_copy(update={"random_rotation": False})).cart_N3 - spec.box_A / 2
    reach = np.linalg.norm(cart, axis=1).max() if spec.random_rotation else np.abs(cart).max()
    if reach > spec.box_A / 2:
        raise CrystalError(
            f"{crystal.id}: an atom {reach:.2f} A from the middle is outside the cube, "
            f"at most {spec.box_A / 2:.2f} A are allowed"
        )


def _check_pairs(crystal: Crystal, spec: GridSpec) -> None:
    """Raise CrystalError where two atoms are nearer than the decoder tells apart on an ideal field."""
    lattice = crystal.lattice_A if spec.niggli else compact_lattice(crystal.lattice_A)
    limit = max(spec.min_distance_A, spec.min_like_distance_A)
    unlike, like = shortest_distances(lattice, crystal.cart_N3, crystal.numbers_N, limit)
    for kind, shortest, least in (("two", unlike, spec.min_distance_A), ("two like", like, limit)):
        if shortest < least:
            raise CrystalError(f"{crystal.id}: {kind} atoms {shortest:.3f} A apart, at least {least} A is needed")


def placement_seed(id: str, copy: int) -> int:
    """Seed of the random rotation and origin of a copy of a crystal."""
    return int.from_bytes(hashlib.sha256(f"{id}\0{copy}".encode()).digest()[:8], "big")


def placed(crystal: Crystal, spec: GridSpec, copy: int = 0) -> Crystal:
    """The crystal where the grid takes it from: turned, moved and centred as the spec says.

    The random rotation (uniform on SO(3)) and origin (uniform in the cell) depend on the id and the copy index alone, so
    any sample can be made again by itself.
    """
    if not (spec.random_rotation or spec.random_origin or spec.frame == "unit"):
        return crystal
    rng = np.random.default_rng(placement_seed(crystal.id, copy))
    rotation = Rotation.from_quat(rng.normal(size=4)).as_matrix() if spec.random_rotation else np.eye(3)
    lattice = crystal.lattice_A @ rotation
    if spec.frame == "unit":
        cart = wrap(crystal.frac_N3) @ lattice
        return replace(crystal, lattice_A=lattice, frac_N3=(cart - cart.mean(0) + spec.box_A / 2) @ np.linalg.inv(lattice))
    frac = wrap(crystal.frac_N3 + rng.random(3)) if spec.random_origin else crystal.frac_N3
    return replace(crystal, lattice_A=lattice, frac_N3=frac)
