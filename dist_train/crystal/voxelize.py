"""Crystals to voxel grids (see `frames` for where the voxels lie).

A density channel is a sum over atoms, and over all their periodic images where the frame has them, of
code * exp(-d^2 / 2 sigma^2), d in angstrom. The channel `z_density` is Hoffmann et al.'s (2019),
Z (2 pi)^-1.5 sigma^-3 exp(-d^2 / 2 sigma^2); all others have unit height. Species is the atomic number of the nearest atom
within the radius, else 0; a tie goes to the atom of lower index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import pi, prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal import kernels
from dist_train.crystal.elements import MAX_Z, NUMBERS, element_code
from dist_train.crystal.frames import grid_shape, spacing_A
from dist_train.crystal.lattice import FloatArray
from dist_train.crystal.reciprocal import mode_counts, sum_modes
from dist_train.crystal.structure import Crystal

RIGHT_ANGLE = 1e-9
"""Largest cosine of a right angle."""
STAMPED_ANGLE = 0.6
"""Largest cosine of an angle that `kernels.stamp` takes; Niggli cells have at most 0.5."""

Algorithm = Literal["product", "matrix product", "stamping", "reciprocal"]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class VoxelGrid:
    """density_CDHW: float32 channels; species_DHW: uint8 atomic numbers; axes D, H, W follow a, b, c or x, y, z."""

    density_CDHW: NDArray[np.float32]
    species_DHW: NDArray[np.uint8]

    @classmethod
    def empty(cls, n_channels: int, shape: Shape) -> VoxelGrid:
        """Memory for a grid. Use it again where many are made: fresh memory costs more than what is written to it."""
        return cls(np.empty((n_channels, *shape), np.float32), np.empty(shape, np.uint8))


@cache
def code_table(spec: GridSpec) -> NDArray[np.float32]:
    """[MAX_Z + 1, C] height of an atom's Gaussian in each density channel, by atomic number."""
    blocks = []
    for kind in spec.channels:
        if kind == "table":
            blocks.append(np.zeros((MAX_Z + 1, len(spec.element_table[0][1])), np.float32))
            for symbol, heights in spec.element_table:
                blocks[-1][NUMBERS[symbol]] = heights
        else:
            scale = (2 * np.pi) ** -1.5 * spec.sigma_A**-3 if kind == "z_density" else 1.0
            blocks.append(element_code(kind) * np.float32(scale))
    table = np.concatenate(blocks, axis=1)
    table.flags.writeable = False
    return table


def n_channels(spec: GridSpec) -> int:
    """Density channels of a spec."""
    return int(code_table(spec).shape[1])


def voxelize(
    crystal: Crystal, spec: GridSpec, out: VoxelGrid | None = None, algorithm: Algorithm | None = None
) -> VoxelGrid:
    """Density channels and species of a crystal where it lies (`frames.placed` moves it there).

    out: memory of the right shape to write to; algorithm: one to use instead of the fastest.
    Raises CrystalError where the spec can't hold the cell.
    """
    codes = code_table(spec)[crystal.numbers_N]
    grid = out or VoxelGrid.empty(codes.shape[1], grid_shape(crystal.lattice_A, spec))
    if spec.frame != "cell":
        _fill_box(crystal, codes, spec, algorithm, grid)
        return grid
    shape = np.array(grid.species_DHW.shape)
    geometry = kernels.geometry(crystal.lattice_A, shape)
    fill_density(crystal.frac_N3, codes, crystal.lattice_A, spec.sigma_A, grid.density_CDHW, algorithm, geometry)
    kernels.mark_species(
        crystal.frac_N3 * shape, crystal.numbers_N, geometry.basis, geometry.spacings, spec.radius_A, True, grid.species_DHW
    )
    return grid


def fill_density(
    frac_N3: FloatArray, codes_NC: NDArray[np.float32], lattice_A: FloatArray, sigma_A: float,
    density_CDHW: NDArray[np.float32], algorithm: Algorithm | None = None, geometry: kernels.Geometry | None = None,
) -> None:  # fmt: skip
    """Overwrite `density_CDHW` with the periodic sum of code * Gaussian over atoms and all their images in a cell."""
    shape = np.array(density_CDHW.shape[1:])
    geometry = geometry or kernels.geometry(lattice_A, shape)
    algorithm = algorithm or cell_algorithm(geometry, codes_NC, density_CDHW.shape[1:], sigma_A)
    if algorithm == "reciprocal":
        sum_modes(frac_N3, codes_NC, lattice_A, sigma_A, density_CDHW)
    elif algorithm == "stamping":
        kernels.stamp(frac_N3 * shape, codes_NC, geometry.basis, sigma_A, density_CDHW)
    elif algorithm == "product":
        kernels.add_products(frac_N3 * shape, codes_NC, geometry.steps, sigma_A, True, density_CDHW)
    else:
        _multiply(frac_N3 * shape, codes_NC, geometry.steps, sigma_A, True, density_CDHW)


def _fill_box(
    crystal: Crystal, codes_NC: NDArray[np.float32], spec: GridSpec, algorithm: Algorithm | None, grid: VoxelGrid
) -> None:
    numbers, positions, step = crystal.numbers_N, crystal.cart_N3, spacing_A(spec)
    if spec.frame == "window":
        margin = max(kernels.REACH_SIGMAS * spec.sigma_A, spec.radius_A)
        inverse = np.linalg.inv(crystal.lattice_A)
        atoms, positions = kernels.images_near_box(crystal.frac_N3, crystal.lattice_A, inverse, spec.box_A, margin)
        codes_NC, numbers = codes_NC[atoms], numbers[atoms]
    covered = pi * (kernels.REACH_SIGMAS * spec.sigma_A / spec.box_A) ** 2
    algorithm = algorithm or product_algorithm(codes_NC, grid.species_DHW.shape, covered)
    steps = np.full(3, step)
    fill = kernels.add_products if algorithm == "product" else _multiply
    fill(positions / step, codes_NC, steps, spec.sigma_A, False, grid.density_CDHW)
    kernels.mark_species(positions / step, numbers, np.diag(steps), steps, spec.radius_A, False, grid.species_DHW)


def _multiply(
    centres_N3: FloatArray, codes_NC: NDArray[np.float32], steps: FloatArray, sigma_A: float, periodic: bool,
    density_CDHW: NDArray[np.float32],
) -> None:  # fmt: skip
    """`kernels.add_products` as one matrix product for each channel."""
    x, y, z = (
        kernels.axis_tables(centres_N3, axis, size, steps[axis], sigma_A, periodic)
        for axis, size in enumerate(density_CDHW.shape[1:])
    )
    plane = (y[:, :, None] * z[:, None, :]).reshape(len(y), -1)
    for density, code in zip(density_CDHW, codes_NC.T):
        np.matmul((x * code[:, None]).T, plane, out=density.reshape(x.shape[1], -1))


# Which algorithm: costs in nanoseconds, as `dist-train bench voxelize` measures them on one core.


def cell_algorithm(geometry: kernels.Geometry, codes_NC: NDArray[np.float32], shape: Shape, sigma_A: float) -> Algorithm:
    """The fastest way to sum Gaussians on the grid of a cell.

    Right-angled axes make every Gaussian a product, the cheapest by far. Stamping costs by the voxels under the Gaussians;
    the reciprocal sum by the modes of the series, so it wins where the voxels are much finer than the Gaussians.
    """
    if geometry.cosine < RIGHT_ANGLE:
        face = geometry.steps[0] * shape[0] * geometry.steps[1] * shape[1]
        return product_algorithm(codes_NC, shape, pi * (kernels.REACH_SIGMAS * sigma_A) ** 2 / face)
    n, m = shape, mode_counts(geometry.basis * np.array(shape)[:, None], sigma_A).tolist()
    ball = 4 / 3 * pi * (kernels.CUTOFF_SIGMAS * sigma_A) ** 3 / abs(np.linalg.det(geometry.basis))
    stamping = len(codes_NC) * 4000.0 + np.count_nonzero(codes_NC) * ball
    terms = (len(codes_NC) + n[0]) * m[0] * m[1] * m[2] + n[0] * n[1] * m[1] * m[2] + prod(n) * m[2]
    reciprocal = 90_000.0 + codes_NC.shape[1] * terms * 0.1
    return "stamping" if stamping < reciprocal and geometry.cosine < STAMPED_ANGLE else "reciprocal"


def product_algorithm(codes_NC: NDArray[np.float32], shape: Shape, covered: float) -> Algorithm:
    """The faster way to sum products: row by row where they reach, or everywhere as a matrix product.

    covered: share of the rows along the last axis that a Gaussian reaches.
    """
    by_row = np.count_nonzero(codes_NC) * min(covered, 1.0) * shape[0] * shape[1] * (1.0 + 0.035 * shape[2])
    return "product" if by_row < codes_NC.size * prod(shape) * 0.032 else "matrix product"
