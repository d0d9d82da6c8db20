"""Crystals back from Cartesian cubes: the atoms of a `unit`, or atoms, lattice and cell of a `window` of a crystal.

A window is decoded in four steps. Labels find its atoms (`box_atoms`); these repeat by a lattice (`find_lattice`); lattice
and sites are refined on the density, with all their images inside and around the cube; and where the density wants single
atoms elsewhere than their lattice, a larger cell is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.box_atoms import (
    BoxAtoms,
    correlation_volume,
    density_shape,
    find_atoms,
    fit_atoms,
    model_density,
    no_atoms,
    normal_blocks,
    profiles,
    project_slopes,
)  # fmt: skip
from dist_train.crystal.cell_choice import Repeats
from dist_train.crystal.decode import Channel, Decoded, Fields, decode
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.find_lattice import MARGIN_A, Points, box_images, enlarged, find_repeats
from dist_train.crystal.frames import spacing_A
from dist_train.crystal.lattice import compact_lattice
from dist_train.crystal.structure import Crystal, wrap

FloatArray = NDArray[np.float64]

REACH_SIGMAS = 3.5
"""Atoms farther outside a window leave 0.0002 of the mean density at its faces, together."""
SITE_ERROR_A, LATTICE_ERROR_A = 0.1, 0.05
"""Standard deviations of sites and of lattice vectors before the density is asked."""
SMALL_RESIDUAL = 0.01
"""Share of the density's root mean square below which the lattice leaves nothing to explain."""
CLEAR_RESIDUAL, UNUSUAL, PARTS = 0.06, 3.0, 4
"""Where a cell explains all but this share of the density in most parts of the cube (cut in PARTS along each axis), a
part with more, and so many times the usual, speaks against it: in noise it would not."""
LEAST_DISTORTION_A = 0.04
"""Root mean square displacement from equal places that the density can show to need a larger cell."""
NO_LATTICE = "a unit shows the atoms of a cell, but not how the cell lies around them: no crystal can be made of it"
_ITERATIONS = 8


@dataclass(frozen=True)
class DecodedBox(Decoded):
    """What `Decoded` holds, and the atoms found in the cube, outermost ones included.

    For a window, `crystal` has the axes of the cube and its origin in the first voxel, and `confidence_N` is the mean
    share of votes of a site's copies times the share of copies found. A unit has no lattice: its `crystal` is None.
    """

    atoms: BoxAtoms = field(default_factory=lambda: no_atoms(""))


def decode_frame(fields: Fields | str, spec: GridSpec, channel: Channel) -> Decoded:
    """The crystal in fields of any frame (their lattice counts in `cell` alone), or in none: a text says why.

    For `parallel_map`: fields go to other processes in one piece.
    """
    if isinstance(fields, str):
        return Decoded(None, np.zeros(0), fields)
    if spec.frame == "cell":
        return decode(*fields[:5], spec, channel, fields[5])
    found = decode_box(*fields[:4], spec, channel)
    return replace(found, reason=NO_LATTICE) if spec.frame == "unit" and not found.reason else found


def decode_box(
    id: str,
    density_DHW: NDArray[np.floating],
    species_DHW: NDArray[np.integer],
    atom_probability_DHW: NDArray[np.floating],
    spec: GridSpec,
    channel: Literal["occupancy", "z_density"] = "occupancy",
) -> DecodedBox:
    """The crystal in a window, or the atoms in a unit, of `spec`.

    density_DHW: the density of one `channel`; species_DHW: the most probable element of each voxel, were there an atom
    (0: none); atom_probability_DHW: probability of any atom, 0-1. Fields that hold no atoms or, for a window, do not
    determine a lattice give an empty result with the reason.
    """
    if not (np.isfinite(density_DHW).all() and np.isfinite(atom_probability_DHW).all()):
        return _nothing(no_atoms("the fields are not finite"))
    heights_Z = np.arange(MAX_Z + 1.0) if channel == "z_density" else np.ones(MAX_Z + 1)
    unit = (2 * np.pi) ** -1.5 * spec.sigma_A**-3 if channel == "z_density" else 1.0
    density = np.asarray(density_DHW, np.float64) / unit
    atoms = find_atoms(density, species_DHW, atom_probability_DHW, heights_Z, spec)
    if not len(atoms):
        return _nothing(atoms)
    if spec.frame == "unit":
        cart, error = fit_atoms(atoms.cart_N3, atoms.error_N, heights_Z[atoms.numbers_N], density, spec)
        return DecodedBox(None, atoms.confidence_N, atoms=replace(atoms, cart_N3=cart, error_N=error))
    cell = find_repeats(atoms.cart_N3, atoms.numbers_N, atoms.confidence_N, spec.box_A)
    if not isinstance(cell, str):
        cell = refine(cell, density, heights_Z, spec)
    if isinstance(cell, str):
        return _nothing(atoms, f"lattice not determined: {cell}")
    lattice = compact_lattice(cell.lattice_A)
    crystal = Crystal(id, lattice, wrap(cell.cart_N3 @ np.linalg.inv(lattice)), cell.numbers_N)
    return DecodedBox(crystal, cell.votes_N * cell.support_N, atoms=atoms)


def _nothing(atoms: BoxAtoms, reason: str = "") -> DecodedBox:
    return DecodedBox(None, np.zeros(0), reason or atoms.reason, atoms=atoms)


def refine(cell: Repeats, density: FloatArray, heights_Z: FloatArray, spec: GridSpec) -> Repeats | str:
    """The cell fitted to the density, or a larger one that single atoms ask for, or why neither is possible."""
    cell, residual = fit_cell(cell, density, heights_Z, spec)
    if fault := _unexplained(residual, density):
        return fault
    if residual.std() < SMALL_RESIDUAL * density.std():
        return cell
    fitted, site, error = _free_atoms(cell, density, heights_Z, spec)
    points = Points(fitted, cell.numbers_N[site], cell.votes_N[site], spec.box_A)
    larger = enlarged(cell, points, 1.0 / (error**2 + LEAST_DISTORTION_A**2), LEAST_DISTORTION_A)
    if larger is cell or isinstance(larger, str):
        return larger
    larger, residual = fit_cell(larger, density, heights_Z, spec)
    return _unexplained(residual, density) or larger


def _unexplained(residual: FloatArray, density: FloatArray) -> str:
    """Whether a part of the cube holds density that a cell doesn't explain, where it explains the rest of it, or ''."""
    parts = np.array_split(np.arange(len(residual)), PARTS)
    squares = [(residual[np.ix_(x, y, z)] ** 2).mean() for x in parts for y in parts for z in parts]
    worst, usual = np.sqrt([max(squares), np.median(squares)]) / np.sqrt((density**2).mean())
    if usual < CLEAR_RESIDUAL and worst > max(CLEAR_RESIDUAL, UNUSUAL * usual):
        return f"the best one leaves density unexplained: {worst:.2f} of its root mean square in a part of the cube"
    return ""


def fit_cell(cell: Repeats, density: FloatArray, heights_Z: FloatArray, spec: GridSpec) -> tuple[Repeats, FloatArray]:
    """The cell with lattice and sites by Gauss-Newton on the density, and the density that is left.

    All images count that reach into the cube.
    """
    images, site = _images(cell, spec)
    heights = heights_Z[cell.numbers_N[site]]
    steps = np.round((images - cell.cart_N3[site]) @ np.linalg.inv(cell.lattice_A))
    design = np.concatenate([np.eye(len(cell.cart_N3))[site], steps], axis=1)
    start = np.concatenate([cell.cart_N3, cell.lattice_A])
    copies = max(spec.box_A**3 / abs(np.linalg.det(cell.lattice_A)), 1.0)
    error = np.repeat([SITE_ERROR_A / np.sqrt(copies)] * len(cell.cart_N3) + [LATTICE_ERROR_A / np.sqrt(copies)] * 3, 3)
    now, sigma, best, least, left = start.copy(), spec.sigma_A, start, np.inf, density
    normal = np.zeros((start.size, start.size))
    for iteration in range(_ITERATIONS):
        gauss, slope = profiles(design @ now, len(density), spacing_A(spec), sigma)
        model = model_density(gauss, heights)
        scale, width = density_shape(model, density, sigma, spec)
        residual = density - scale * model
        square = float((residual**2).mean())
        if square > least:  # too far: nearly even densities fit many places
            now = (now + best) / 2
            continue
        best, least, left, sigma = now, square, residual, width
        hold = max(square, 1e-10) * correlation_volume(residual) / error**2
        if iteration < 2:  # it changes little from then on
            blocks = design.T @ normal_blocks(gauss, slope, heights) @ design
            normal = blocks.transpose(2, 0, 3, 1).reshape(start.size, start.size)
        target = scale * (design.T @ (heights[:, None] * project_slopes(residual, gauss, slope))).ravel()
        step = np.linalg.solve(scale**2 * normal + np.diag(hold), target - hold * (now - start).ravel())
        now = now + step.reshape(now.shape)
        if np.abs(step).max() < 5e-4:
            break
    return replace(cell, cart_N3=best[:-3], lattice_A=best[-3:]), left


def _images(cell: Repeats, spec: GridSpec) -> tuple[FloatArray, NDArray[np.int64]]:
    """All atoms [M, 3] of a cell that reach into a window, and their sites [M]."""
    reach = REACH_SIGMAS * spec.sigma_A
    return box_images(cell.lattice_A, cell.cart_N3, -reach, spec.box_A + reach)


def _free_atoms(
    cell: Repeats, density: FloatArray, heights_Z: FloatArray, spec: GridSpec
) -> tuple[FloatArray, NDArray[np.int64], FloatArray]:
    """Where the density wants each atom of a cell in the window, its site, and the error of that place."""
    images, site = _images(cell, spec)
    heights, sigma = heights_Z[cell.numbers_N[site]], spec.sigma_A
    inside = ((images >= MARGIN_A) & (images <= spec.box_A - MARGIN_A)).all(1)
    for _ in range(3):
        gauss, _ = profiles(images, len(density), spacing_A(spec), sigma)
        scale, sigma = density_shape(model_density(gauss, heights), density, sigma, spec)
    rest = density - scale * model_density(gauss[:, ~inside], heights[~inside])
    start = images[inside]
    fitted, error = fit_atoms(start, np.full(len(start), 2 * SITE_ERROR_A), heights[inside], rest, spec)
    return fitted, site[inside], error
