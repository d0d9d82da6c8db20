"""The power spectrum of noise on a periodic grid, estimated from a sample of it and taken as equal in all directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from dist_train.crystal.lattice import FloatArray

BINS = 48
FLOOR = 1e-5
"""Least power of a frequency, over that of the strongest: no frequency is trusted without limit."""
WAVES = 100
"""Frequencies of an integral over |k|."""


@dataclass(frozen=True)
class NoiseSpectrum:
    """waves, powers: |k| in 1 / angstrom, rising, and the noise's power per voxel there; for grids of one cell and shape.

    squares: |k|^2 of each mode of a real Fourier transform.
    """

    waves: FloatArray
    powers: FloatArray
    squares: FloatArray
    shape: tuple[int, ...]
    volume_A3: float

    @classmethod
    def of(cls, noise_DHW: NDArray[np.float32], lattice_A: FloatArray) -> NoiseSpectrum:
        """The spectrum of a sample on the grid of a cell: averages over shells of |k|."""
        squares = wave_squares(noise_DHW.shape, lattice_A)
        wave = np.sqrt(squares).ravel()
        width = wave.max() / BINS
        shell = np.minimum((wave / width).astype(np.int64), BINS - 1)
        power = np.abs(fft.rfftn(noise_DHW)) ** 2 / noise_DHW.size
        count = np.bincount(shell, minlength=BINS)
        filled = count > 0
        mean = np.bincount(shell, power.ravel(), minlength=BINS)[filled] / count[filled]
        # What is left of a fit lacks power at the fit's own low frequencies: noise has there at least what it has above.
        mean = np.maximum.accumulate(mean[::-1])[::-1]
        powers = np.maximum(mean, FLOOR * mean.max())
        waves = (np.flatnonzero(filled) + 0.5) * width
        return cls(waves, powers, squares, noise_DHW.shape, abs(np.linalg.det(lattice_A)))

    def power(self, wave: FloatArray) -> FloatArray:
        """The power at any |k|, interpolated."""
        return np.asarray(np.exp(np.interp(wave, self.waves, np.log(self.powers))))

    def weigh(self, field_DHW: NDArray[np.float32], sigma_A: float, local_A: float) -> NDArray[np.float32]:
        """A field divided by the noise's covariance and smoothed, for sums of it with Gaussians.

        Summed with a unit Gaussian of `local_A` it gives what the field over the covariance does with one of `sigma_A`: the
        narrower one needs fewer voxels, and where it is cut off no high frequency leaks in.
        """
        smoothing = (sigma_A / local_A) ** 3 * np.exp(-0.5 * self.squares * (sigma_A**2 - local_A**2))
        return np.asarray(
            fft.irfftn(fft.rfftn(field_DHW) * (smoothing / self.power(np.sqrt(self.squares))), s=self.shape), np.float32
        )

    def coupling(self, waves: PairWaves) -> tuple[FloatArray, FloatArray]:
        """Normal equations of unit Gaussians under this noise, 1 / angstrom^2: (across, along) of two atoms, by distance.

        A coordinate of one atom couples to the same one of another by `along` in the direction between them, by `across`
        at right angles to it; at distance zero both are the information on one atom's coordinate.
        """
        # The sum over modes as an integral over |k|: the field of an atom alone, which images then add up.
        sigma_A, wave = waves.sigma_A, waves.wave
        voxels_per_A3 = np.prod(self.shape) / self.volume_A3
        amplitude = (2 * np.pi * sigma_A**2) ** 1.5 * np.exp(-0.5 * (wave * sigma_A) ** 2)
        terms = voxels_per_A3 * wave[0] * wave**4 / (2 * np.pi**2) * amplitude**2 / self.power(wave)
        return waves.across @ terms, waves.along @ terms


class PairWaves(NamedTuple):
    """What is the same for any noise in the coupling of two Gaussians of `sigma_A`.

    wave: |k| in 1 / angstrom that count; across, along: [distances, waves] what each of them adds.
    """

    sigma_A: float
    wave: FloatArray
    across: FloatArray
    along: FloatArray

    @classmethod
    def of(cls, sigma_A: float, distances_A: FloatArray) -> PairWaves:
        """For two Gaussians at each of some distances."""
        wave = np.linspace(0.0, 6.0 / sigma_A, WAVES + 1)[1:]
        phase = np.maximum(np.outer(distances_A, wave), 1e-3)
        sine = np.sin(phase) / phase
        across = (sine - np.cos(phase)) / phase**2
        return cls(sigma_A, wave, across, sine - 2 * across)


def wave_squares(shape: tuple[int, ...], lattice_A: FloatArray) -> FloatArray:
    """[D, H, W // 2 + 1] |k|^2 of the modes of a real Fourier transform."""
    reciprocal = 2 * np.pi * np.linalg.inv(lattice_A)
    form = reciprocal.T @ reciprocal
    h, k = np.fft.fftfreq(shape[0], 1 / shape[0])[:, None, None], np.fft.fftfreq(shape[1], 1 / shape[1])[:, None]
    m = np.arange(shape[2] // 2 + 1.0)
    plane = form[0, 0] * h * h + form[1, 1] * k * k + 2 * form[0, 1] * h * k
    return np.asarray(plane + form[2, 2] * m * m + 2 * (form[0, 2] * h + form[1, 2] * k) * m)
