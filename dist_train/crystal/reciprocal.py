"""Periodic sums of Gaussians by their Fourier series: exact at any voxel of any cell, at a cost flat in the number of atoms.

With structure factors S(h) = sum_a code_a exp(-2 pi i h.u_a) the density at fractional coordinates u is
(2 pi sigma^2)^1.5 / V * sum_h exp(-sigma^2 |k_h|^2 / 2) S(h) exp(2 pi i h.u), k_h the reciprocal vector of h.

Three products with waves along one axis each evaluate the series. A fast Fourier transform would fold the modes that a grid
can't tell apart, and gain nothing where it matters: in the small cells that come here the modes are fewer than the voxels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.lattice import FloatArray

CUTOFF = 5.8
"""Modes of |k| sigma beyond this are left out: together less than 1e-7 of an atom's height."""


def mode_counts(lattice_A: FloatArray, sigma_A: float) -> NDArray[np.int64]:
    """[3] modes along each axis of the series, of both signs."""
    edges = np.linalg.norm(lattice_A, axis=1)
    return np.asarray(2 * np.floor(CUTOFF / sigma_A * edges / (2 * np.pi)) + 1, np.int64)


def sum_modes(
    frac_N3: FloatArray,
    codes_NC: NDArray[np.float32],
    lattice_A: FloatArray,
    sigma_A: float,
    density_CDHW: NDArray[np.float32],
) -> None:
    """Write the density of unit-height Gaussians times codes into `density_CDHW`, in place."""
    modes = [np.arange(-(count // 2), count // 2 + 1) for count in mode_counts(lattice_A, sigma_A)]
    modes[2] = modes[2][modes[2] >= 0]  # the density is real: modes of opposite sign are conjugates
    weights = _weights(modes, lattice_A, sigma_A)
    phases = [np.exp(-2j * np.pi * np.outer(u, h)).astype(np.complex64) for u, h in zip(frac_N3.T, modes)]
    waves = [
        np.exp(2j * np.pi * np.outer(np.arange(n) / n, h)).astype(np.complex64)
        for n, h in zip(density_CDHW.shape[1:], modes)
    ]
    last = np.concatenate([waves[2].real, -waves[2].imag], axis=1).T
    plane = (phases[1][:, :, None] * phases[2][:, None, :]).reshape(len(frac_N3), -1)
    for density, code in zip(density_CDHW, codes_NC.T):
        factors = ((phases[0] * code[:, None]).T @ plane).reshape(weights.shape) * weights
        rows = waves[1] @ (waves[0] @ factors.reshape(len(modes[0]), -1)).reshape(-1, *weights.shape[1:])
        np.matmul(np.concatenate([rows.real, rows.imag], axis=2), last, out=density)


def _weights(modes: list[NDArray[np.int64]], lattice_A: FloatArray, sigma_A: float) -> NDArray[np.float32]:
    """[H0, H1, H2] the Fourier series of one Gaussian at the origin; modes beyond zero of the last axis count twice."""
    reciprocal = 2 * np.pi * np.linalg.inv(lattice_A)
    form = -0.5 * sigma_A**2 * reciprocal.T @ reciprocal
    h, k, m = modes[0][:, None, None], modes[1][:, None], modes[2]
    exponent = (form[0, 0] * h * h + 2 * form[0, 1] * h * k + form[1, 1] * k * k) + (2 * form[0, 2] * h * m)
    exponent += 2 * form[1, 2] * k * m + form[2, 2] * m * m
    height = (2 * np.pi * sigma_A**2) ** 1.5 / abs(np.linalg.det(lattice_A))
    return np.asarray((np.exp(exponent) * height * np.where(m > 0, 2.0, 1.0)).astype(np.float32))
