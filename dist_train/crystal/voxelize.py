"""Crystals to periodic voxel grids.

Voxel (i, j, k) of an (n1, n2, n3) grid lies at the fractional coordinates (i / n1, j / n2, k / n3). A density channel is
a sum over atoms and all their periodic images within 5 sigma of code * exp(-d^2 / 2 sigma^2), d in angstrom; the channel
`z_density` is Hoffmann et al.'s (2019), Z (2 pi)^-1.5 sigma^-3 exp(-d^2 / 2 sigma^2), all others have unit height.
Species is the atomic number of the nearest atom within the radius, else 0; a tie goes to the atom of lower index.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class VoxelGrid:
    """density_CDHW: float32 channels on the grid; species_DHW: uint8 atomic numbers; axes D, H, W follow a, b, c."""

    density_CDHW: NDArray[np.float32]
    species_DHW: NDArray[np.uint8]


def code_table(spec: GridSpec) -> NDArray[np.float32]:
    """[MAX_Z + 1, C] height of an atom's Gaussian in each density channel, by atomic number."""
    blocks = [element_code(kind) for kind in spec.channels]
    norm = (2 * np.pi) ** -1.5 * spec.sigma_A**-3
    scaled = [block * norm if kind == "z_density" else block for kind, block in zip(spec.channels, blocks, strict=True)]
    return np.concatenate(scaled, axis=1).astype(np.float32)


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
    n_atoms, n_channel = codes_NC.shape
    _, n0, n1, n2 = density_CDHW.shape
    nearest = np.full((n0, n1, n2), np.inf, np.float64)
    channels = np.empty(n_channel, np.int64)
    for atom in range(n_atoms):
        used = 0
        for c in range(n_channel):
            if codes_NC[atom, c] != 0:
                channels[used] = c
                used += 1
        u0, u1, u2 = frac_N3[atom, 0] * n0, frac_N3[atom, 1] * n1, frac_N3[atom, 2] * n2
        r0, r1, r2 = cutoff / spacings[0] * n0, cutoff / spacings[1] * n1, cutoff / spacings[2] * n2
        for i in range(int(np.ceil(u0 - r0)), int(np.floor(u0 + r0)) + 1):
            for j in range(int(np.ceil(u1 - r1)), int(np.floor(u1 + r1)) + 1):
                f0, f1 = (i - u0) / n0, (j - u1) / n1
                x = f0 * lattice[0, 0] + f1 * lattice[1, 0]
                y = f0 * lattice[0, 1] + f1 * lattice[1, 1]
                z = f0 * lattice[0, 2] + f1 * lattice[1, 2]
                for k in range(int(np.ceil(u2 - r2)), int(np.floor(u2 + r2)) + 1):
                    f2 = (k - u2) / n2
                    d2 = (x + f2 * lattice[2, 0]) ** 2 + (y + f2 * lattice[2, 1]) ** 2 + (z + f2 * lattice[2, 2]) ** 2
                    if d2 > cutoff * cutoff:
                        continue
                    a, b, c = i % n0, j % n1, k % n2
                    height = np.exp(-0.5 * d2 / (sigma * sigma))
                    for m in range(used):
                        density_CDHW[channels[m], a, b, c] += codes_NC[atom, channels[m]] * height
                    if d2 <= radius * radius and d2 < nearest[a, b, c]:
                        nearest[a, b, c] = d2
                        species_DHW[a, b, c] = numbers_N[atom]
