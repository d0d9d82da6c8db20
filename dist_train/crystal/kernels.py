"""Compiled loops that write atoms into voxel grids.

A grid is described by its voxel basis [3, 3] (rows: the steps along its axes in angstrom) and whether it is periodic; an
atom's centre is given in voxels. Voxels beyond the grid are wrapped round where it is periodic, and left out where not.
All Gaussians have unit height, exp(-d^2 / 2 sigma^2), and are multiplied by an atom's code for each channel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

CUTOFF_SIGMAS = 5.4
"""Where a stamped Gaussian ends; 2e-6 of a dense crystal's density lies beyond it."""
FAINT = np.float32(3e-7)
"""Part of a Gaussian's height below which whole rows of a product are left out: 3e-7 of a dense crystal's density."""
REACH_SIGMAS = float(np.sqrt(-2.0 * np.log(FAINT)))
"""Where FAINT is reached."""


@njit(cache=True, nogil=True)
def images_near_box(frac_N3, lattice, inverse, box, margin):  # type: ignore[no-untyped-def]
    """Atom index [M] and Cartesian position [M, 3] of every image within `margin` of the cube from 0 to `box`."""
    half = 0.5 * box + margin
    middle = 0.5 * box * (inverse[0] + inverse[1] + inverse[2])
    reach = half * (np.abs(inverse[0]) + np.abs(inverse[1]) + np.abs(inverse[2]))
    most = len(frac_N3)
    for axis in range(3):
        most *= int(2.0 * reach[axis]) + 2
    atoms, positions = np.empty(most, np.int64), np.empty((most, 3), np.float64)
    found = 0
    for n in range(len(frac_N3)):
        low = np.ceil(middle - reach - frac_N3[n]).astype(np.int64)
        high = np.floor(middle + reach - frac_N3[n]).astype(np.int64)
        for i in range(low[0], high[0] + 1):
            for j in range(low[1], high[1] + 1):
                for k in range(low[2], high[2] + 1):
                    a, b, c = frac_N3[n, 0] + i, frac_N3[n, 1] + j, frac_N3[n, 2] + k
                    x = a * lattice[0, 0] + b * lattice[1, 0] + c * lattice[2, 0]
                    y = a * lattice[0, 1] + b * lattice[1, 1] + c * lattice[2, 1]
                    z = a * lattice[0, 2] + b * lattice[1, 2] + c * lattice[2, 2]
                    if max(abs(x - 0.5 * box), abs(y - 0.5 * box), abs(z - 0.5 * box)) <= half:
                        atoms[found] = n
                        positions[found, 0], positions[found, 1], positions[found, 2] = x, y, z
                        found += 1
    return atoms[:found], positions[:found]


class Geometry(NamedTuple):
    """Of a grid: voxel basis [3, 3], its lengths [3], distances [3] between planes of voxels, largest cosine of an angle."""

    basis: NDArray[np.float64]
    steps: NDArray[np.float64]
    spacings: NDArray[np.float64]
    cosine: float


@njit(cache=True, nogil=True)
def geometry(lattice, shape):  # type: ignore[no-untyped-def]
    """The `Geometry` of a grid of `shape` voxels [3] in a cell."""
    basis = lattice / shape.reshape(3, 1)
    steps = np.sqrt((basis * basis).sum(1))
    inverse = np.linalg.inv(basis)
    spacings = 1.0 / np.sqrt((inverse * inverse).sum(0))
    gram = np.abs(basis @ basis.T)
    cosine = max(gram[0, 1] / steps[0] / steps[1], gram[0, 2] / steps[0] / steps[2], gram[1, 2] / steps[1] / steps[2])
    return Geometry(basis, steps, spacings, cosine)


@njit(cache=True, nogil=True)
def axis_tables(centres_N3, axis, size, step, sigma, periodic):  # type: ignore[no-untyped-def]
    """[N, size] one-dimensional Gaussians along an axis of voxels `step` angstrom apart, images summed if periodic."""
    tables = np.empty((len(centres_N3), size), np.float32)
    for n in range(len(centres_N3)):
        _fill_axis(centres_N3[n, axis], step, sigma, periodic, tables[n])
    return tables


@njit(cache=True, nogil=True)
def _fill_axis(centre, step, sigma, periodic, table):  # type: ignore[no-untyped-def]
    size = len(table)
    table[:] = 0
    alpha = 0.5 * (step / sigma) ** 2
    steps = int(REACH_SIGMAS * sigma / step) + 1
    middle = int(np.round(centre))
    d = centre - middle
    # The exponent is quadratic: going out both ways, each value is the last times a factor in geometric steps.
    second = np.exp(-2.0 * alpha)
    up = down = np.exp(-alpha * d * d)
    up_factor = np.exp(alpha * (2.0 * d - 1.0))
    down_factor = second / up_factor
    above = below = middle % size if periodic else middle
    if 0 <= middle < size or periodic:
        table[above] += up
    for _ in range(steps):
        up, down = up * up_factor, down * down_factor
        up_factor, down_factor = up_factor * second, down_factor * second
        above, below = above + 1, below - 1
        if periodic:
            above, below = above if above < size else 0, below if below >= 0 else size - 1
        if 0 <= above < size:
            table[above] += up
        if 0 <= below < size:
            table[below] += down


@njit(cache=True, nogil=True, fastmath={"contract"})
def add_products(centres_N3, codes_NC, steps, sigma, periodic, density_CDHW):  # type: ignore[no-untyped-def]
    """Overwrite the density on right-angled axes: each Gaussian a product of three tables, rows below FAINT left out.

    steps: [3] distances in angstrom between voxels along the axes.
    """
    n_channel, n0, n1, n2 = density_CDHW.shape
    density_CDHW[:] = 0
    x, y, z = np.empty(n0, np.float32), np.empty(n1, np.float32), np.empty(n2, np.float32)
    place, reached = np.empty(n1, np.uintp), np.empty(n1, np.float32)
    for n in range(len(centres_N3)):
        _fill_axis(centres_N3[n, 0], steps[0], sigma, periodic, x)
        _fill_axis(centres_N3[n, 1], steps[1], sigma, periodic, y)
        _fill_axis(centres_N3[n, 2], steps[2], sigma, periodic, z)
        many = 0
        for j in range(n1):
            if y[j] >= FAINT:
                place[many], reached[many] = j, y[j]
                many += 1
        for channel in range(n_channel):
            if codes_NC[n, channel] == 0:
                continue
            for i in range(n0):
                if x[i] < FAINT:
                    continue
                for index in range(many):
                    j, height = place[index], x[i] * reached[index]
                    if height >= FAINT:
                        height *= codes_NC[n, channel]
                        for k in range(n2):
                            density_CDHW[channel, i, j, k] += height * z[k]


@njit(cache=True, nogil=True)
def stamp(centres_N3, codes_NC, basis, sigma, density_CDHW):  # type: ignore[no-untyped-def]
    """Overwrite the density of a periodic grid of angles from 50 to 130 degrees.

    In voxels from the atom the exponent is a quadratic form. Its cross terms couple two axes each, so the Gaussian is a
    product of three two-dimensional tables: a voxel costs two products, as in a right-angled grid.
    """
    density_CDHW[:] = 0
    form = -0.5 / (sigma * sigma) * (basis @ basis.T)
    reach = np.sqrt(-0.5 * CUTOFF_SIGMAS**2 * np.diag(np.linalg.inv(form)))
    widest = int(2.0 * reach.max()) + 2
    tables = np.empty((3, widest, widest), np.float32)
    for n in range(len(centres_N3)):
        first = np.ceil(centres_N3[n] - reach)
        size = np.floor(centres_N3[n] + reach) - first + 1.0
        nx, ny, nz = int(size[0]), int(size[1]), int(size[2])
        x, y, z = first - centres_N3[n]
        _fill_table(form[0, 0], form[0, 2], 0.5 * form[2, 2], x, z, nx, nz, tables[0])
        _fill_table(form[1, 1], form[1, 2], 0.5 * form[2, 2], y, z, ny, nz, tables[1])
        _fill_table(0.0, form[0, 1], 0.0, x, y, nx, ny, tables[2])
        _add_rows(first, nx, ny, nz, x, y, z, form, codes_NC[n], tables, density_CDHW)


@njit(cache=True, nogil=True)
def _fill_table(pp, pq, qq, p, q, n_p, n_q, table):  # type: ignore[no-untyped-def]
    """table[i, j] = exp(pp s^2 + 2 pq s t + qq t^2) at s = p + i and t = q + j."""
    second = np.exp(2.0 * qq)
    for i in range(n_p):
        s = p + i
        # The exponent is quadratic in t: each value is the one before times a factor, itself in geometric steps.
        height = np.exp(pp * s * s + 2.0 * pq * s * q + qq * q * q)
        factor = np.exp(2.0 * pq * s + qq * (2.0 * q + 1.0))
        for j in range(n_q):
            table[i, j] = height
            height *= factor
            factor *= second


@njit(cache=True, nogil=True)
def _add_rows(first, nx, ny, nz, x0, y0, z0, form, code, tables, density_CDHW):  # type: ignore[no-untyped-def]
    """Add one atom from its tables: every row of the grid that passes within the cutoff, from where to where it does."""
    n_channel, n0, n1, n2 = density_CDHW.shape
    a, b0, c0 = int(first[0]) % n0, int(first[1]) % n1, int(first[2]) % n2
    inverse = 1.0 / form[2, 2]
    for i in range(nx):
        b, x = b0, x0 + i
        for j in range(ny):
            y = y0 + j
            slope = (form[0, 2] * x + form[1, 2] * y) * inverse
            flat = form[0, 0] * x * x + form[1, 1] * y * y + 2.0 * form[0, 1] * x * y
            inside = (-0.5 * CUTOFF_SIGMAS**2 - flat) * inverse + slope * slope
            if inside >= 0.0:
                half = np.sqrt(inside)
                low, high = max(int(np.ceil(-slope - half - z0)), 0), min(int(np.floor(-slope + half - z0)) + 1, nz)
                for channel in range(n_channel):
                    if code[channel] != 0:
                        height = code[channel] * tables[2, i, j]
                        _add_row(density_CDHW, channel, a, b, (c0 + low) % n2, height, tables, i, j, low, high)
            b = b + 1 if b + 1 < n1 else 0
        a = a + 1 if a + 1 < n0 else 0


@njit(cache=True, nogil=True)
def _add_row(density_CDHW, channel, a, b, start, height, tables, i, j, low, high):  # type: ignore[no-untyped-def]
    """density[channel, a, b, start:] += height * tables[0, i] * tables[1, j] from low to high, round the axis's end."""
    # Unsigned, so that no index can count from an array's end: checking for it keeps the loop from being vectorised.
    d, a, b, i, j = np.uintp(channel), np.uintp(a), np.uintp(b), np.uintp(i), np.uintp(j)
    while low < high:
        many = min(density_CDHW.shape[3] - start, high - low)
        to, source = np.uintp(start), np.uintp(low)
        for k in range(np.uintp(many)):
            density_CDHW[d, a, b, to + k] += height * tables[np.uintp(0), i, source + k] * tables[np.uintp(1), j, source + k]
        low += many
        start = 0


@njit(cache=True, nogil=True)
def mark_species(centres_N3, numbers_N, basis, spacings, radius, periodic, species_DHW):  # type: ignore[no-untyped-def]
    """Fill `species_DHW` with the number of the atom nearest to each voxel within `radius` angstrom.

    Of atoms equally near, to 1e-7 of the squared distance, it is the first.
    spacings: [3] distances in angstrom between neighbouring planes of voxels.
    """
    n0, n1, n2 = species_DHW.shape
    species_DHW[:] = 0
    nearest = np.full(species_DHW.shape, np.inf, np.float32)
    form = basis @ basis.T
    r0, r1, r2 = radius / spacings[0], radius / spacings[1], radius / spacings[2]
    for n in range(len(centres_N3)):
        u, v, w = centres_N3[n, 0], centres_N3[n, 1], centres_N3[n, 2]
        i0, i1 = int(np.ceil(u - r0)), int(np.floor(u + r0))
        j0, j1 = int(np.ceil(v - r1)), int(np.floor(v + r1))
        k0, k1 = int(np.ceil(w - r2)), int(np.floor(w + r2))
        if not periodic:
            i0, j0, k0 = max(i0, 0), max(j0, 0), max(k0, 0)
            i1, j1, k1 = min(i1, n0 - 1), min(j1, n1 - 1), min(k1, n2 - 1)
        a, b0, c0 = i0 % n0, j0 % n1, k0 % n2
        for i in range(i0, i1 + 1):
            b, x = b0, i - u
            for j in range(j0, j1 + 1):
                c, y = c0, j - v
                flat = form[0, 0] * x * x + form[1, 1] * y * y + 2.0 * form[0, 1] * x * y
                slope = 2.0 * (form[0, 2] * x + form[1, 2] * y)
                for k in range(k0, k1 + 1):
                    d2 = np.float32(flat + (k - w) * (slope + (k - w) * form[2, 2]))
                    if d2 <= radius * radius and d2 < nearest[a, b, c]:
                        nearest[a, b, c] = d2
                        species_DHW[a, b, c] = numbers_N[n]
                    c = c + 1 if c + 1 < n2 else 0
                b = b + 1 if b + 1 < n1 else 0
            a = a + 1 if a + 1 < n0 else 0


@njit(cache=True, nogil=True)
def residual_slopes(centres_N3, basis, spacings, sigma, reach, field_DHW):  # type: ignore[no-untyped-def]
    """Of a unit Gaussian at each centre with a field on a periodic grid, over the voxels within `reach` angstrom.

    Sum of field * gradient of the Gaussian by its centre [N, 3] in 1 / angstrom, and mean square of the field [N].
    """
    n0, n1, n2 = field_DHW.shape
    slopes, squares = np.zeros((len(centres_N3), 3)), np.zeros(len(centres_N3))
    r0, r1, r2 = reach / spacings[0], reach / spacings[1], reach / spacings[2]
    for n in range(len(centres_N3)):
        u, v, w = centres_N3[n, 0], centres_N3[n, 1], centres_N3[n, 2]
        k0, k1 = int(np.ceil(w - r2)), int(np.floor(w + r2))
        count, gx, gy, gz = 0, 0.0, 0.0, 0.0
        for i in range(int(np.ceil(u - r0)), int(np.floor(u + r0)) + 1):
            for j in range(int(np.ceil(v - r1)), int(np.floor(v + r1)) + 1):
                a, b, c = i % n0, j % n1, k0 % n2
                for k in range(k0, k1 + 1):
                    x = (i - u) * basis[0, 0] + (j - v) * basis[1, 0] + (k - w) * basis[2, 0]
                    y = (i - u) * basis[0, 1] + (j - v) * basis[1, 1] + (k - w) * basis[2, 1]
                    z = (i - u) * basis[0, 2] + (j - v) * basis[1, 2] + (k - w) * basis[2, 2]
                    d2 = x * x + y * y + z * z
                    if d2 <= reach * reach:
                        value = field_DHW[a, b, c]
                        weight = value * np.exp(-0.5 * d2 / (sigma * sigma))
                        gx, gy, gz = gx + weight * x, gy + weight * y, gz + weight * z
                        squares[n] += value * value
                        count += 1
                    c = c + 1 if c + 1 < n2 else 0
        slopes[n, 0], slopes[n, 1], slopes[n, 2] = gx / sigma**2, gy / sigma**2, gz / sigma**2
        squares[n] /= max(count, 1)
    return slopes, squares


@njit(cache=True, nogil=True)
def shortest_distances(frac_N3, numbers_N, lattice, spacings, cutoff):  # type: ignore[no-untyped-def]
    """Shortest distances below `cutoff` between different atoms of unlike and of like number, else infinity.

    frac_N3: in [0, 1). spacings: [3] between opposite faces of the cell, which tell what images can be near at all.
    """
    reach = cutoff / spacings
    best = np.full(2, cutoff * cutoff)
    for i in range(len(frac_N3)):
        for j in range(i):
            a, b, c = frac_N3[j, 0] - frac_N3[i, 0], frac_N3[j, 1] - frac_N3[i, 1], frac_N3[j, 2] - frac_N3[i, 2]
            like = 1 if numbers_N[i] == numbers_N[j] else 0
            for u in range(int(np.ceil(-reach[0] - a)), int(np.floor(reach[0] - a)) + 1):
                for v in range(int(np.ceil(-reach[1] - b)), int(np.floor(reach[1] - b)) + 1):
                    for w in range(int(np.ceil(-reach[2] - c)), int(np.floor(reach[2] - c)) + 1):
                        x = (a + u) * lattice[0, 0] + (b + v) * lattice[1, 0] + (c + w) * lattice[2, 0]
                        y = (a + u) * lattice[0, 1] + (b + v) * lattice[1, 1] + (c + w) * lattice[2, 1]
                        z = (a + u) * lattice[0, 2] + (b + v) * lattice[1, 2] + (c + w) * lattice[2, 2]
                        best[like] = min(best[like], x * x + y * y + z * z)
    return np.where(best < cutoff * cutoff, np.sqrt(best), np.inf)
