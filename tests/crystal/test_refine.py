"""Refinement against known truths: exact on ideal densities, near the bound under noise, weighed by the noise's spectrum."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import fft

from dist_train.crystal import refine as module
from dist_train.crystal.lattice import from_lengths_angles, periodic_distances
from dist_train.crystal.refine import Fit, refine
from dist_train.crystal.spectrum import NoiseSpectrum, PairWaves
from dist_train.crystal.voxelize import fill_density

FloatArray = NDArray[np.float64]
Field = NDArray[np.float32]

SIGMA_A = 0.5
CELL = from_lengths_angles(np.array([6, 6.5, 7.1, 80, 95, 105]))
SHAPE = (24, 24, 28)
VOXELS_PER_A3 = np.prod(SHAPE) / np.linalg.det(CELL)
WAVES = [2 * np.pi * np.fft.fftfreq(n, 1 / n) for n in SHAPE]
LENGTHS = np.linalg.norm(np.stack(np.meshgrid(*WAVES, indexing="ij"), -1) @ np.linalg.inv(CELL).T, axis=-1)
"""|k| of each mode of the grid, in 1 / angstrom."""


def density_of(cart: FloatArray, heights: FloatArray | None = None, sigma_A: float = SIGMA_A) -> Field:
    heights = np.ones(len(cart)) if heights is None else heights
    field = np.empty((1, *SHAPE), np.float32)
    fill_density(cart @ np.linalg.inv(CELL), heights.astype(np.float32)[:, None], CELL, sigma_A, field)
    return field[0]


def atoms_of(rng: np.random.Generator, many: int, apart_A: float = 1.6) -> FloatArray:
    """[many, 3] random places in the cell at least `apart_A` from each other."""
    places = rng.random((1, 3))
    while len(places) < many:
        place = rng.random((1, 3))
        if periodic_distances(CELL, places, place).min() > apart_A:
            places = np.concatenate([places, place])
    return np.asarray(places @ CELL)


def off(rng: np.random.Generator, cart: FloatArray, by_A: float) -> FloatArray:
    """Each atom moved by `by_A` in a random direction."""
    step = rng.normal(size=cart.shape)
    return np.asarray(cart + by_A * step / np.linalg.norm(step, axis=1, keepdims=True))


def fit(start: FloatArray, density: Field, errors: float = 0.05, heights: FloatArray | None = None) -> Fit:
    heights = np.ones(len(start)) if heights is None else heights
    return refine(start, np.full(len(start), errors), density, CELL, SIGMA_A, heights.astype(np.float32))


def noise_of(rng: np.random.Generator, powers: FloatArray) -> Field:
    """Noise of a given power per voxel at each mode of the grid."""
    return np.asarray(fft.ifftn(fft.fftn(rng.normal(size=SHAPE)) * np.sqrt(powers)).real, np.float32)


def rms(vectors: FloatArray) -> float:
    """Along each axis."""
    return float(np.sqrt((vectors**2).mean()))


# Ideal densities


@pytest.mark.parametrize("profile", [(1.0, 1.0), (0.5, 1.3), (1.4, 1.0), (0.9, 0.92)])
def test_an_ideal_density_is_fitted_exactly_also_where_all_of_it_is_blurred_or_faint(profile: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    height, width = profile
    for _ in range(3):
        cart = atoms_of(rng, 12)
        found = fit(off(rng, cart, 0.05), density_of(cart, np.full(12, height), width * SIGMA_A))
        assert abs(found.cart_N3 - cart).max() < 1e-5
        assert abs(found.residual_DHW).max() < 1e-4


@pytest.mark.parametrize("profile", [(1.0, 1.0), (0.7, 1.15)])
def test_overlapping_atoms_are_fitted_together(profile: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    height, width = profile
    for _ in range(20):
        first = rng.random((1, 3)) @ CELL
        cart = np.concatenate([first, off(rng, first, 1.0)])
        found = fit(off(rng, cart, 0.05), density_of(cart, np.full(2, height), width * SIGMA_A))
        assert abs(found.cart_N3 - cart).max() < 1e-4


def test_atoms_of_different_heights_are_fitted_with_their_own() -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        cart, heights = atoms_of(rng, 10, 1.2), rng.uniform(1, 60, 10)
        found = fit(off(rng, cart, 0.05), density_of(cart, heights), heights=heights)
        assert abs(found.cart_N3 - cart).max() < 1e-4
        assert abs(found.residual_DHW).max() < 1e-3


def test_atoms_stay_in_the_cell_where_they_start() -> None:
    rng = np.random.default_rng(3)
    cart = atoms_of(rng, 6) + rng.integers(-3, 4, (6, 3)) @ CELL
    assert abs(fit(off(rng, cart, 0.05), density_of(cart)).cart_N3 - cart).max() < 1e-4


def test_the_residual_is_in_the_heights_that_were_given() -> None:
    cart = atoms_of(np.random.default_rng(4), 4, 2.8)
    cart[3] = np.round(cart[3] @ np.linalg.inv(CELL) * SHAPE) / SHAPE @ CELL
    heights = np.array([8.0, 30.0, 14.0, 20.0])
    residual = fit(cart[:3], density_of(cart, 0.6 * heights), heights=heights[:3]).residual_DHW
    assert residual.max() == pytest.approx(20, rel=0.02)  # the atom that was not fitted


# Noise


def information(noise: float, errors: float) -> float:
    """On one coordinate of an atom, from white noise of a standard deviation and from where it started."""
    return float(VOXELS_PER_A3 * (np.pi * SIGMA_A**2) ** 1.5 / (2 * SIGMA_A**2) / noise**2 + errors**-2)


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.4])
def test_under_white_noise_the_error_is_near_the_cramer_rao_bound(noise: float) -> None:
    rng = np.random.default_rng(5)
    found, started = [], []
    for _ in range(15):
        cart = atoms_of(rng, 8)
        start = cart + rng.normal(0, 0.05, cart.shape)
        density = density_of(cart) + noise_of(rng, np.full(SHAPE, noise**2))
        found.append(fit(start, density).cart_N3 - cart)
        started.append(start - cart)
    bound = information(noise, 0.05) ** -0.5
    assert 0.85 * bound < rms(np.stack(found)) < 1.15 * bound
    assert rms(np.stack(found)) < rms(np.stack(started))


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_a_density_of_noise_alone_moves_no_atom_far(noise: float) -> None:
    rng = np.random.default_rng(6)
    for _ in range(10):
        cart = atoms_of(rng, 8)
        moved = fit(cart, noise_of(rng, np.full(SHAPE, noise**2))).cart_N3 - cart
        assert np.linalg.norm(moved, axis=1).max() < 2.2 * 0.05
        assert rms(moved) < 0.05


def test_the_surer_the_start_the_less_noise_moves_an_atom() -> None:
    rng = np.random.default_rng(7)
    cart = atoms_of(rng, 8)
    density = density_of(cart) + noise_of(rng, np.full(SHAPE, 0.3**2))
    moves = [rms(fit(cart, density, errors).cart_N3 - cart) for errors in (0.001, 0.01, 0.2)]
    assert moves[0] < 0.001 < moves[1] < 0.01 < moves[2]


def smooth_powers(level: float, length_A: float) -> FloatArray:
    """Noise of a standard deviation, smooth over a length, and a little that is not."""
    powers = np.exp(-((LENGTHS * length_A) ** 2))
    return np.asarray(powers * level**2 / powers.mean() + 0.005**2)


# The second one's noise falls by more than is believed of any: what it could tell at most is out of reach.
@pytest.mark.parametrize(("level", "length_A", "over_bound"), [(0.1, 0.5, 1.2), (0.1, 0.8, 4.2), (0.05, 0.6, 1.2)])
def test_smooth_noise_is_weighed_by_its_spectrum(
    monkeypatch: pytest.MonkeyPatch, level: float, length_A: float, over_bound: float
) -> None:
    rng, powers = np.random.default_rng(8), smooth_powers(level, length_A)
    weighed, white = [], []
    for _ in range(10):
        cart = atoms_of(rng, 8)
        start, density = cart + rng.normal(0, 0.05, cart.shape), density_of(cart) + noise_of(rng, powers)
        weighed.append(fit(start, density).cart_N3 - cart)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_ROUNDS", 0)
            white.append(fit(start, density).cart_N3 - cart)
    gaussian = (2 * np.pi * SIGMA_A**2) ** 1.5 * np.exp(-0.5 * (LENGTHS * SIGMA_A) ** 2)
    told = VOXELS_PER_A3 / np.linalg.det(CELL) * (gaussian**2 * LENGTHS**2 / 3 / powers).sum()
    assert rms(np.stack(weighed)) < over_bound * (told + 0.05**-2) ** -0.5
    assert rms(np.stack(weighed)) < 0.3 * rms(np.stack(white))


def test_noise_in_one_half_of_the_cell_costs_the_other_half_little() -> None:
    rng, quiet = np.random.default_rng(13), []
    louder = np.where(np.arange(SHAPE[2]) < SHAPE[2] // 2, 6, 1).astype(np.float32)
    for _ in range(15):
        cart = atoms_of(rng, 8)
        density = density_of(cart) + noise_of(rng, smooth_powers(0.03, 0.4)) * louder
        moved = fit(cart + rng.normal(0, 0.05, cart.shape), density).cart_N3 - cart
        height = (cart @ np.linalg.inv(CELL))[:, 2]
        quiet.append(moved[(height > 0.6) & (height < 0.9)])
    assert rms(np.concatenate(quiet)) < 0.022  # 0.03 where all atoms are taken for equally disturbed


# The spectrum of noise


def spectrum_of(powers: FloatArray) -> tuple[FloatArray, FloatArray]:
    """|k| and the mean of the spectra estimated of ten samples of noise, where shells hold many modes."""
    rng = np.random.default_rng(9)
    spectra = [NoiseSpectrum.of(noise_of(rng, powers), CELL) for _ in range(10)]
    waves = spectra[0].waves
    inside = (waves > 2) & (waves < 0.7 * LENGTHS.max())
    return waves[inside], np.stack([spectrum.powers for spectrum in spectra]).mean(0)[inside]


def test_a_flat_spectrum_is_recovered() -> None:
    waves, powers = spectrum_of(np.full(SHAPE, 0.09))
    assert len(waves) > 20
    # Never under the truth, and above it by the luck of the few modes at the corners of k space.
    assert ((powers > 0.95 * 0.09) & (powers < 2.2 * 0.09)).all()


def test_a_falling_spectrum_is_recovered() -> None:
    def truth(wave: FloatArray) -> FloatArray:
        return np.asarray(0.04 * np.exp(-0.5 * (0.3 * wave) ** 2))

    waves, powers = spectrum_of(truth(LENGTHS))
    trusted = truth(waves) > 1e-4 * 0.04  # below that is the floor of what is believed
    assert trusted.sum() > 15
    np.testing.assert_allclose(powers[trusted], truth(waves)[trusted], rtol=0.25)


def test_no_frequency_is_trusted_without_limit() -> None:
    spectrum = NoiseSpectrum.of(noise_of(np.random.default_rng(10), (LENGTHS < 3) * 1.0), CELL)
    assert spectrum.powers.min() == pytest.approx(1e-5 * spectrum.powers.max())
    assert NoiseSpectrum.of(density_of(np.zeros((1, 3))), CELL).powers.min() > 0


def test_power_at_low_frequencies_is_at_least_that_above() -> None:
    spectrum = NoiseSpectrum.of(noise_of(np.random.default_rng(11), (LENGTHS > 6) * 1.0), CELL)
    assert (np.diff(spectrum.powers) <= 0).all()
    assert spectrum.power(np.array([0.0, 1.0])).min() > 0.7


def flat(power: float) -> NoiseSpectrum:
    known = NoiseSpectrum.of(np.ones(SHAPE, np.float32), CELL)
    return NoiseSpectrum(np.array([1.0, 9.0]), np.full(2, power), known.squares, SHAPE, known.volume_A3)


def test_coupling_under_white_noise_has_a_closed_form() -> None:
    distances = np.linspace(0, 4, 50)
    across, along = flat(0.25).coupling(PairWaves.of(SIGMA_A, distances))
    alone = information(0.5, np.inf)
    falling = np.exp(-(distances**2) / (4 * SIGMA_A**2))
    np.testing.assert_allclose(across, alone * falling, atol=1e-5 * alone)
    np.testing.assert_allclose(along, alone * falling * (1 - distances**2 / (2 * SIGMA_A**2)), atol=1e-5 * alone)


def test_coupling_is_the_sum_over_modes_of_a_large_cell() -> None:
    edge, size = 12.0, 48
    modes = 2 * np.pi / edge * np.fft.fftfreq(size, 1 / size)
    x, y, z = np.meshgrid(modes, modes, modes, indexing="ij")
    squares = x * x + y * y + z * z
    waves = np.linspace(0, 40, 400)
    noise = NoiseSpectrum(waves, np.exp(-0.3 * waves) + 0.01, squares[..., : size // 2 + 1], (size,) * 3, edge**3)
    gaussian = (2 * np.pi * SIGMA_A**2) ** 1.5 * np.exp(-0.5 * squares * SIGMA_A**2)
    terms = (size / edge) ** 3 * gaussian**2 / edge**3 / noise.power(np.sqrt(squares))
    distances = np.array([0.0, 0.7, 1.5, 2.2])
    across, along = noise.coupling(PairWaves.of(SIGMA_A, distances))
    expected = [[(terms * axis**2 * np.cos(z * d)).sum() for d in distances] for axis in (x, z)]
    np.testing.assert_allclose([across, along], expected, atol=2e-3 * across[0])


def test_sums_with_a_narrower_gaussian_are_those_of_the_direct_one() -> None:
    rng = np.random.default_rng(12)
    field, noise = rng.normal(size=SHAPE).astype(np.float32), NoiseSpectrum.of(noise_of(rng, np.exp(-0.3 * LENGTHS)), CELL)
    divided = fft.ifftn(fft.fftn(field) / noise.power(LENGTHS)).real
    narrow = noise.weigh(field, SIGMA_A, 0.7 * SIGMA_A)
    carts = atoms_of(rng, 5)
    direct = [(divided * density_of(cart[None])).sum() for cart in carts]
    found = [(narrow * density_of(cart[None], None, 0.7 * SIGMA_A)).sum() for cart in carts]
    np.testing.assert_allclose(found, direct, rtol=1e-4, atol=1e-4 * np.abs(direct).max())
