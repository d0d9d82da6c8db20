"""Atoms fitted to a periodic density of Gaussians: Gauss-Newton on all positions together.

The residual is exact, so the fit is too; the normal equations are those of a fine grid, where the overlap of the gradients
of two Gaussians depends only on the vector between them. One factor of all heights and one width are fitted with the
positions, so that a blurred or faint density isn't taken for noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dist_train.crystal import kernels
from dist_train.crystal.lattice import FloatArray, neighbour_pairs
from dist_train.crystal.spectrum import NoiseSpectrum, PairWaves
from dist_train.crystal.voxelize import fill_density

LARGEST_STEP_A = 0.1
FIT_SIGMAS = 2.8
"""The residual is looked at up to here from each atom."""
OVERLAP_SIGMAS = 8.0
"""Atoms farther apart don't disturb each other: their gradients overlap by less than 1e-4."""
LOCAL = 0.7
"""Width, over that of an atom, of the Gaussian that meets a weighed residual."""
CONVERGED_A, CONVERGED_NOISY_A = 2e-5, 1e-3
CLEAN = 1e-3
"""Residual, in heights of an atom, below which there is no noise to weigh."""
HEIGHTS, WIDTHS = (0.3, 1.5), (0.9, 1.6)
"""Limits of the fitted height, and of the fitted sigma over the given one."""
_ITERATIONS, _SWEEPS, _ROUNDS = 15, 10, 2


@dataclass(frozen=True)
class Fit:
    """cart_N3: fitted positions in angstrom; residual_DHW: what they leave of the density, scaled to the given heights."""

    cart_N3: FloatArray
    residual_DHW: NDArray[np.float32]


def refine(
    cart_N3: FloatArray,
    errors_N: FloatArray,
    density_DHW: NDArray[np.float32],
    lattice_A: FloatArray,
    sigma_A: float,
    heights_N: NDArray[np.float32],
) -> Fit:
    """Fit Gaussians, each with its images, to a density; where that is noisy the atoms stay near their start.

    cart_N3: where the atoms start, in angstrom; errors_N: the standard error of that along each axis; heights_N: what the
    Gaussians' heights should be. A first fit takes the noise of the density as white. From what it leaves the noise's
    spectrum is estimated, and every frequency is weighed by it in a second one: networks err smoothly, and their high
    frequencies still tell where an atom is.
    """
    scale = heights_N.mean()
    problem = _Problem(cart_N3, errors_N, density_DHW / scale, lattice_A, sigma_A, heights_N / scale)
    problem.fit_white()
    if problem.residual.std() > CLEAN * problem.height:
        waves = PairWaves.of(problem.width, problem.distances)
        for _ in range(_ROUNDS):
            problem.fit_weighed(NoiseSpectrum.of(problem.residual, lattice_A), waves)
    return Fit(problem.cart, problem.residual * np.float32(scale / problem.height))


class _Problem:
    """The state of a fit: positions, height and width, and the residual that they leave."""

    def __init__(
        self, cart_N3: FloatArray, errors_N: FloatArray, density_DHW: NDArray[np.float32], lattice_A: FloatArray,
        sigma_A: float, weights_N: NDArray[np.float32],
    ) -> None:  # fmt: skip
        self.weights = weights_N
        self.start, self.variance = cart_N3, errors_N**2
        self.density, self.lattice, self.sigma = density_DHW, lattice_A, sigma_A
        self.shape = np.array(density_DHW.shape)
        self.geometry = kernels.geometry(lattice_A, self.shape)
        self.inverse = np.linalg.inv(lattice_A)
        self.cart, self.height, self.width = cart_N3.copy(), 1.0, sigma_A
        self.field, self.wider = np.empty((2, 1, *density_DHW.shape), np.float32)
        self.residual = density_DHW
        first, self.second, self.shift = neighbour_pairs(lattice_A, cart_N3, OVERLAP_SIGMAS * sigma_A)
        self.first = np.searchsorted(first, np.arange(len(cart_N3) + 1))
        self.distances = np.linspace(0.0, OVERLAP_SIGMAS * sigma_A + 4 * LARGEST_STEP_A * _ITERATIONS, 128)
        self.square = np.ones(len(cart_N3))

    def fit_white(self) -> None:
        """Positions, height and width for noise that is independent from voxel to voxel."""
        for _ in range(_ITERATIONS):
            self._fit_profile()
            slope, self.square = self._slopes(self.residual, self.width)
            if self._step(slope, self._white_coupling(), np.maximum(self.square, 1e-10)) < CONVERGED_A:
                break

    def fit_weighed(self, noise: NoiseSpectrum, waves: PairWaves) -> None:
        """Positions for noise of a known spectrum, which is stronger around some atoms than around others."""
        coupling = noise.coupling(waves)
        local = np.clip(self.square / self.square.mean(), 0.1, 10.0)
        for _ in range(_ITERATIONS):
            self._fill(self.width, self.field)
            self.residual = self.density - np.float32(self.height) * self.field[0]
            slope, _ = self._slopes(noise.weigh(self.residual, self.width, LOCAL * self.width), LOCAL * self.width)
            if self._step(slope, coupling, local) < CONVERGED_NOISY_A:
                break

    def _white_coupling(self) -> tuple[FloatArray, FloatArray]:
        """`NoiseSpectrum.coupling` of white noise of unit variance, in closed form."""
        square = (self.distances / self.width) ** 2
        voxels_per_A3 = self.shape.prod() / abs(np.linalg.det(self.lattice))
        across = voxels_per_A3 * (np.pi * self.width**2) ** 1.5 * np.exp(-0.25 * square) / (2 * self.width**2)
        return across, across * (1 - 0.5 * square)

    def _step(self, slope: FloatArray, coupling: tuple[FloatArray, FloatArray], noise: FloatArray) -> float:
        """Move the atoms; the longest step in angstrom."""
        across, along = (self.height**2 * part for part in coupling)
        pull = slope * self.height * (self.weights / noise)[:, None] - (self.cart - self.start) / self.variance[:, None]
        step = _solve(
            self.cart, pull, self.variance, self.weights, noise, across, along, self.distances[1],
            self.first, self.second, self.shift,
        )  # fmt: skip
        self.cart += step
        return float(np.abs(step).max())

    def _fit_profile(self) -> None:
        """One Gauss-Newton step of height and width on the whole density; the residual afterwards."""
        self._fill(self.width, self.field)
        self._fill(1.02 * self.width, self.wider)
        unit, slope = self.field.ravel(), (self.wider - self.field).ravel() * np.float32(self.height / 0.02)
        rest = self.density.ravel() - np.float32(self.height) * unit
        normal = np.array([[unit @ unit, unit @ slope], [unit @ slope, slope @ slope]], np.float64)
        change = np.linalg.solve(normal + 1e-6 * np.trace(normal) * np.eye(2), [unit @ rest, slope @ rest])
        self.height = float(np.clip(self.height + change[0], *HEIGHTS))
        self.width = float(
            np.clip(self.width * np.exp(np.clip(change[1], -0.2, 0.2)), WIDTHS[0] * self.sigma, WIDTHS[1] * self.sigma)
        )
        self._fill(self.width, self.field)
        self.residual = self.density - np.float32(self.height) * self.field[0]

    def _fill(self, width: float, field: NDArray[np.float32]) -> None:
        fill_density(self.cart @ self.inverse, self.weights[:, None], self.lattice, width, field, geometry=self.geometry)

    def _slopes(self, field: NDArray[np.float32], sigma_A: float) -> tuple[FloatArray, FloatArray]:
        centres = self.cart @ self.inverse * self.shape
        found = kernels.residual_slopes(
            centres, self.geometry.basis, self.geometry.spacings, sigma_A, FIT_SIGMAS * sigma_A, field
        )
        return found[0], found[1]


@njit(cache=True, nogil=True)
def _solve(cart, pull, variance, weight, noise, across, along, spacing, first, second, shift):  # type: ignore[no-untyped-def]
    """[N, 3] steps in angstrom: Gauss-Seidel on the normal equations of all positions, their priors included.

    across, along: couplings of two atoms at distances of 0, `spacing`, 2 `spacing`... angstrom; the neighbours of atom n are
    second[first[n] : first[n + 1]].
    """
    step = np.zeros_like(cart)
    # What doesn't change from sweep to sweep.
    away, square = np.empty_like(shift), np.empty(len(second))
    at_right_angles, towards = np.empty(len(second)), np.empty(len(second))
    for n in range(len(cart)):
        for p in range(first[n], first[n + 1]):
            total = 0.0
            for axis in range(3):
                away[p, axis] = cart[n, axis] - cart[second[p], axis] - shift[p, axis]
                total += away[p, axis] * away[p, axis]
            length = np.sqrt(total)
            square[p] = max(length * length, 1e-12)
            entry = min(int(length / spacing), len(across) - 2)
            rest = length / spacing - entry
            at_right_angles[p] = across[entry] + rest * (across[entry + 1] - across[entry])
            towards[p] = along[entry] + rest * (along[entry + 1] - along[entry])
    for _ in range(_SWEEPS):
        for n in range(len(cart)):
            right = pull[n].copy()
            for p in range(first[n], first[n + 1]):
                m, a, b = second[p], at_right_angles[p], towards[p]
                dot = (away[p, 0] * step[m, 0] + away[p, 1] * step[m, 1] + away[p, 2] * step[m, 2]) / square[p]
                for axis in range(3):
                    part = away[p, axis] * dot
                    right[axis] -= weight[n] * weight[m] * (a * (step[m, axis] - part) + b * part) / noise[n]
            step[n] = right / (weight[n] ** 2 * across[0] / noise[n] + 1.0 / variance[n])
            length = np.sqrt((step[n] ** 2).sum())
            if length > LARGEST_STEP_A:
                step[n] *= LARGEST_STEP_A / length
    return step
