"""Crystals to periodic voxel grids.

Voxel (i, j, k) of an (n1, n2, n3) grid lies at the fractional coordinates (i / n1, j / n2, k / n3). A density channel is
a sum over atoms and all their periodic images within 5 sigma of code * exp(-d^2 / 2 sigma^2), d in angstrom; the channel
`z_density` is Hoffmann et al.'s (2019), Z (2 pi)^-1.5 sigma^-3 exp(-d^2 / 2 sigma^2), all others have unit height.
Species is the atomic number of the nearest atom within the radius, else 0; a tie goes to the atom of lower index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.elements import element_code
from dist_train.crystal.lattice import plane_spacings, shortest_distance
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError

CUTOFF_SIGMAS = 5.0
ADAPTIVE_MULTIPLE = 8
NO_CROSS_TERMS = 1e-7
"""Largest cross term of a Gaussian's exponent, within the cutoff, that is neglected: an error of 1e-7 of its height."""


@dataclass(frozen=True)
class VoxelGrid:
    """density_CDHW: float32 channels on the grid; species_DHW: uint8 atomic numbers; axes D, H, W follow a, b, c."""

    density_CDHW: NDArray[np.float32]
    species_DHW: NDArray[np.uint8]


@cache
def code_table(spec: GridSpec) -> NDArray[np.float32]:
    """[MAX_Z + 1, C] height of an atom's Gaussian in each density channel, by atomic number."""
    blocks = [element_code(kind) for kind in spec.channels]
    norm = (2 * np.pi) ** -1.5 * spec.sigma_A**-3
    scaled = [block * norm if kind == "z_density" else block for kind, block in zip(spec.channels, blocks, strict=True)]
    table = np.concatenate(scaled, axis=1).astype(np.float32)
    table.flags.writeable = False
    return table


def n_channels(spec: GridSpec) -> int:
    """Density channels of a spec."""
    return int(code_table(spec).shape[1])


def grid_shape(lattice_A: NDArray[np.float64], spec: GridSpec) -> tuple[int, int, int]:
    """Voxels along a, b, c for a cell. Raises CrystalError where the spec can't hold it."""
    edges = np.linalg.norm(lattice_A, axis=1)
    if spec.shape != "adaptive":
        spacing = edges.max() / spec.shape
        if spacing > spec.max_spacing_A:
            raise CrystalError(
                f"spacing of {spacing:.3f} A for the longest edge of {edges.max():.2f} A on {spec.shape} voxels, "
                f"at most {spec.max_spacing_A} A is allowed"
            )
        return (spec.shape,) * 3
    d, h, w = (ADAPTIVE_MULTIPLE * max(2, ceil(e / spec.max_spacing_A / ADAPTIVE_MULTIPLE)) for e in edges.tolist())
    if d * h * w > spec.max_voxels:
        raise CrystalError(f"{d} x {h} x {w} = {d * h * w} voxels are needed, at most {spec.max_voxels} are allowed")
    return d, h, w


def representable(crystal: Crystal, spec: GridSpec) -> Crystal:
    """The crystal as the grid will hold it (Niggli-reduced where the spec says so).

    Raises CrystalError naming the reason where the spec can't hold it.
    """
    crystal = crystal.checked(spec.max_atoms)
    if spec.niggli:
        crystal = crystal.reduced()
    try:
        grid_shape(crystal.lattice_A, spec)
    except CrystalError as error:
        raise CrystalError(f"{crystal.id}: {error}") from None
    shortest = shortest_distance(crystal.lattice_A, crystal.frac_N3)
    if shortest < spec.min_distance_A:
        raise CrystalError(f"{crystal.id}: two atoms {shortest:.3f} A apart, at least {spec.min_distance_A} A is needed")
    return crystal


def voxelize(crystal: Crystal, spec: GridSpec) -> VoxelGrid:
    """Density channels and species of a crystal on its grid. Raises CrystalError where the spec can't hold the cell."""
    shape = grid_shape(crystal.lattice_A, spec)
    codes = code_table(spec)[crystal.numbers_N]
    density = np.zeros((codes.shape[1], *shape), np.float32)
    species = np.zeros(shape, np.uint8)
    stamp(
        crystal.frac_N3, codes, crystal.numbers_N.astype(np.uint8), crystal.lattice_A, plane_spacings(crystal.lattice_A),
        spec.sigma_A, CUTOFF_SIGMAS * spec.sigma_A, spec.radius_A, density, species,
    )  # fmt: skip
    return VoxelGrid(density, species)


@njit(cache=True, nogil=True)
def stamp(frac_N3, codes_NC, numbers_N, lattice, spacings, sigma, cutoff, radius, density_CDHW, species_DHW):  # type: ignore[no-untyped-def]
    """Add atoms to `density_CDHW` and write `species_DHW` in place; every image within `cutoff` angstrom counts."""
    nearest = np.full(species_DHW.shape, np.inf, np.float64)
    for atom in range(len(frac_N3)):
        add_gaussian(frac_N3[atom], codes_NC[atom], lattice, spacings, sigma, cutoff, density_CDHW)
        _mark_species(frac_N3[atom], numbers_N[atom], lattice, spacings, radius, nearest, species_DHW)


@njit(cache=True, nogil=True)
def add_gaussian(frac, code, lattice, spacings, sigma, cutoff, density_CDHW):  # type: ignore[no-untyped-def]
    """Add code * exp(-d^2 / 2 sigma^2) of one atom and its images within the cutoff.

    In voxels from the atom the exponent is a quadratic form. In a cell of right angles it has no cross terms, and the
    Gaussian is a product of three tables; else it goes along each row by two products a voxel.
    """
    shape = np.array(density_CDHW.shape[1:])
    form = -0.5 / (sigma * sigma) * (lattice @ lattice.T) / shape.reshape(3, 1) / shape
    reach = cutoff / spacings * shape
    cross = abs(form[0, 1]) * reach[0] * reach[1] + abs(form[0, 2]) * reach[0] * reach[2]
    cross += abs(form[1, 2]) * reach[1] * reach[2]
    limit = -0.5 * cutoff * cutoff / (sigma * sigma)
    if cross < NO_CROSS_TERMS:
        _add_separable(frac * shape, code, form, reach, limit, density_CDHW)
    else:
        _add_oblique(frac * shape, code, form, reach, limit, density_CDHW)


@njit(cache=True, nogil=True)
def _add_separable(centre, code, form, reach, limit, density_CDHW):  # type: ignore[no-untyped-def]
    """`add_gaussian` for an exponent form[0,0] x^2 + form[1,1] y^2 + form[2,2] z^2, cut off below `limit`."""
    n_channel, n0, n1, n2 = density_CDHW.shape
    first = np.ceil(centre - reach)
    x = first[0] - centre[0] + np.arange(int(np.floor(centre[0] + reach[0]) - first[0]) + 1)
    y = first[1] - centre[1] + np.arange(int(np.floor(centre[1] + reach[1]) - first[1]) + 1)
    z = first[2] - centre[2] + np.arange(int(np.floor(centre[2] + reach[2]) - first[2]) + 1)
    fx, fy = form[0, 0] * x * x, form[1, 1] * y * y
    ex, ey = np.exp(fx), np.exp(fy)
    ez = np.exp(form[2, 2] * z * z).astype(np.float32)
    for i in range(len(x)):
        a = (int(first[0]) + i) % n0
        for j in range(len(y)):
            inside = limit - fx[i] - fy[j]
            if inside > 0:
                continue
            half = np.sqrt(inside / form[2, 2])
            low, high = int(np.ceil(-half - z[0])), int(np.floor(half - z[0]))
            low, high = max(low, 0), min(high, len(z) - 1)
            b, start = (int(first[1]) + j) % n1, (int(first[2]) + low) % n2
            for channel in range(n_channel):
                if code[channel] != 0:
                    height = np.float32(code[channel] * ex[i] * ey[j])
                    _add_row(density_CDHW[channel, a, b], ez[low : high + 1], start, height)


@njit(cache=True, nogil=True)
def _add_oblique(centre, code, form, reach, limit, density_CDHW):  # type: ignore[no-untyped-def]
    """`add_gaussian` for any form: along a row the exponent is c0 + c1 z + c2 z^2, stepped by its differences."""
    n_channel, n0, n1, n2 = density_CDHW.shape
    c2 = form[2, 2]
    second = np.exp(2.0 * c2)
    row = np.empty(int(2.0 * np.sqrt(limit / c2)) + 2, np.float32)
    for i in range(int(np.ceil(centre[0] - reach[0])), int(np.floor(centre[0] + reach[0])) + 1):
        for j in range(int(np.ceil(centre[1] - reach[1])), int(np.floor(centre[1] + reach[1])) + 1):
            x, y = i - centre[0], j - centre[1]
            c0 = form[0, 0] * x * x + form[1, 1] * y * y + 2.0 * form[0, 1] * x * y
            c1 = 2.0 * (form[0, 2] * x + form[1, 2] * y)
            inside = limit - c0 + c1 * c1 / (4.0 * c2)
            if inside > 0:
                continue
            middle, half = centre[2] - c1 / (2.0 * c2), np.sqrt(inside / c2)
            first, last = int(np.ceil(middle - half)), int(np.floor(middle + half))
            if last < first:
                continue
            z = first - centre[2]
            height, factor = np.exp(c0 + z * (c1 + c2 * z)), np.exp(c1 + c2 * (2.0 * z + 1.0))
            for k in range(last - first + 1):
                row[k] = height
                height *= factor
                factor *= second
            for channel in range(n_channel):
                if code[channel] != 0:
                    target = density_CDHW[channel, i % n0, j % n1]
                    _add_row(target, row[: last - first + 1], first % n2, code[channel])


@njit(cache=True, nogil=True)
def _add_row(target, row, start, height):  # type: ignore[no-untyped-def]
    """target[start:] += height * row, going round the end of `target` as often as needed."""
    done = 0
    while done < len(row):
        size = min(len(target) - start, len(row) - done)
        for k in range(size):
            target[start + k] += height * row[done + k]
        done, start = done + size, 0


@njit(cache=True, nogil=True)
def _mark_species(frac, number, lattice, spacings, radius, nearest, species):  # type: ignore[no-untyped-def]
    """Write an atom's number where it, or an image, is within `radius` and nearer than every atom before it."""
    n0, n1, n2 = species.shape
    u0, u1, u2 = frac[0] * n0, frac[1] * n1, frac[2] * n2
    r0, r1, r2 = radius / spacings[0] * n0, radius / spacings[1] * n1, radius / spacings[2] * n2
    for i in range(int(np.ceil(u0 - r0)), int(np.floor(u0 + r0)) + 1):
        for j in range(int(np.ceil(u1 - r1)), int(np.floor(u1 + r1)) + 1):
            for k in range(int(np.ceil(u2 - r2)), int(np.floor(u2 + r2)) + 1):
                d2 = 0.0
                for axis in range(3):
                    delta = (i - u0) / n0 * lattice[0, axis] + (j - u1) / n1 * lattice[1, axis]
                    delta += (k - u2) / n2 * lattice[2, axis]
                    d2 += delta * delta
                a, b, c = i % n0, j % n1, k % n2
                if d2 <= radius * radius and d2 < nearest[a, b, c]:
                    nearest[a, b, c] = d2
                    species[a, b, c] = number
