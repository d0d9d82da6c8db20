"""`dist-train bench`: how fast the crystal core is, against the plain formula and against what the machine allows.

All ratios of a run are measured side by side in it, so they hold where absolute times don't. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy import fft
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from dist_train.config import GridSpec
from dist_train.crystal.decode import Fields
from dist_train.crystal.decode_box import decode_frame
from dist_train.crystal.frames import grid_shape, placed, representable
from dist_train.crystal.lattice import from_lengths_angles, periodic_distances
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.spectrum import wave_squares
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import Algorithm, VoxelGrid, n_channels, voxelize
from dist_train.errors import CrystalError, DataError

ROUNDS = 5
BOX_A = 10.0
SPEEDUPS = {5: 220.0, 20: 450.0, 100: 500.0, 500: 650.0}
"""Wanted ratio of the plain formula's time to ours, by number of atoms."""
BOUND_RATIO = 3.0
"""Wanted from 100 atoms up: at most this many times what the machine's arithmetic and memory would take."""
CRYSTALS = 200
BENCH_NOISE, BENCH_FLIPPED = 0.05, 0.1
FAR_A, ASTRAY_A = 100.0, 0.5
COARSE = {"shape": 16, "max_spacing_A": 0.36}
REAL: tuple[tuple[str, str, dict[str, Any], float | None], ...] = (
    ("perov_5", "Perov-5, cell 16^3", COARSE, 2500.0),
    ("perov_5", "Perov-5, cell 32^3", {}, 2500.0),
    ("materials_project", "Materials Project, cell adaptive to 2^17", {"shape": "adaptive", "max_voxels": 2**17}, None),
    ("perov_5", "Perov-5, window 32^3", {"frame": "window", "random_rotation": True, "random_origin": True}, 4500.0),
    ("materials_project", "Materials Project, window 32^3", {"frame": "window", "random_rotation": True}, None),
    ("perov_5", "Perov-5, paper-window", {"preset": "paper-window"}, None),
    ("perov_5", "Perov-5, paper-unit", {"preset": "paper-unit"}, None),
)
"""Table of the sample, label, grid, and wanted grids a second with one channel."""


@dataclass(frozen=True)
class Row:
    """A measurement: `value` in `unit`; `ratio` tells how many times better than `reference`; `holds`, whether it reaches
    the target."""

    case: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    target: float | None = None
    holds: bool | None = None


def core_rows(name: str, sample: Path) -> Iterator[Row]:
    """The rows of the benchmark 'voxelize' or 'decode'. sample: the folder of the shipped crystals."""
    with threadpool_limits(1):
        yield from {"voxelize": _voxelize, "decode": _decode}[name](sample)


def naive_grid(crystal: Crystal, spec: GridSpec) -> tuple[np.ndarray, np.ndarray]:
    """Occupancy and species by the formula as it reads: all voxels x all atoms in numpy, no periodic images."""
    n = spec.shape
    assert isinstance(n, int)
    points = np.stack(np.meshgrid(*[np.arange(n) / n] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ crystal.lattice_A
    density = np.zeros(n**3)
    nearest, species = np.full(n**3, np.inf), np.zeros(n**3, np.uint8)
    for number, position in zip(crystal.numbers_N, crystal.cart_N3, strict=True):
        distance = np.linalg.norm(points - position, axis=1)
        density += np.exp(-(distance**2) / (2 * spec.sigma_A**2))
        closer = (distance < nearest) & (distance <= spec.radius_A)
        nearest[closer], species[closer] = distance[closer], number
    return density.reshape(n, n, n), species.reshape(n, n, n)


def random_crystal(atoms: int) -> Crystal:
    """Atoms at random places of a cube of 10 A; the same for the same number."""
    rng = np.random.default_rng(atoms)
    return Crystal(f"random-{atoms}", np.eye(3) * BOX_A, rng.random((atoms, 3)), rng.integers(1, 90, atoms))


def _seconds(work: Callable[[], object], rounds: int | None = None) -> float:
    """Median seconds of a call over some rounds, after one to warm up."""
    work()
    times = []
    for _ in range(rounds or ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def _voxelize(sample: Path) -> Iterator[Row]:
    yield from _against_the_formula()
    yield from _algorithms()
    for table, label, settings, target in REAL:
        for channels in (("occupancy",), ("occupancy", "period", "group")):
            spec = GridSpec.model_validate({**settings, "channels": channels})
            crystals = [placed(crystal, spec) for crystal in _sample_crystals(sample, table, spec)]
            rate = len(crystals) / _seconds(partial(_voxelize_all, crystals, spec, _buffers(crystals, spec)))
            wanted = target if len(channels) == 1 else None
            case = f"grids a second: {label}, {n_channels(spec)} channels and species"
            yield Row(case, rate, "1/s", None, None, wanted, None if wanted is None else rate >= wanted)
            if len(channels) == 3:
                yield _batched(crystals, spec, label, rate)


def _against_the_formula() -> Iterator[Row]:
    """Our time for random atoms beside the plain formula's, and beside the least that the machine would take."""
    spec = GridSpec(max_spacing_A=0.32)
    grid = VoxelGrid.empty(1, (32, 32, 32))
    matrix = np.ones((1024, 1024), np.float32)
    flops_per_s = 2 * 1024**3 / _seconds(partial(np.matmul, matrix, matrix))
    bytes_per_s = grid.density_CDHW.nbytes / _seconds(partial(grid.density_CDHW.fill, 0), 200)
    for atoms, target in SPEEDUPS.items():
        crystal = random_crystal(atoms)
        ours = _seconds(partial(voxelize, crystal, spec, grid), 50)
        naive = _seconds(partial(naive_grid, crystal, spec), 1 if atoms == 500 else 3)
        case = f"{atoms} atoms in 10 A, 32^3, density and species; reference: the plain numpy formula"
        yield Row(case, ours * 1e6, "us", naive * 1e6, naive / ours, target, naive / ours >= target)
        bound = (grid.density_CDHW.nbytes + grid.species_DHW.nbytes) / bytes_per_s + 2 * atoms * 32**3 / flops_per_s
        wanted = BOUND_RATIO if atoms >= 100 else None
        case = f"{atoms} atoms, times the bound of memory and of one matrix product"
        yield Row(case, ours / bound, "x", None, None, wanted, None if wanted is None else ours / bound <= wanted)


def _algorithms() -> Iterator[Row]:
    """What each way to sum Gaussians takes: where `cell_algorithm` and `product_algorithm` have their costs from."""
    right, oblique = (np.array([9.5, 9.5, 9.5, *angles]) for angles in ((90.0, 90.0, 90.0), (80.0, 95.0, 70.0)))
    choices: tuple[tuple[Algorithm, np.ndarray], ...] = (
        ("product", right), ("matrix product", right), ("stamping", oblique), ("reciprocal", oblique)
    )  # fmt: skip
    frac = np.random.default_rng(0).random((20, 3))
    for scale, shape in ((1.0, 32), (0.4, 32), (0.4, 16)):
        for channels in (("occupancy",), ("occupancy", "period", "group")):
            spec = GridSpec(shape=shape, max_spacing_A=1.0, channels=channels)
            grid = VoxelGrid.empty(n_channels(spec), (shape,) * 3)
            for algorithm, cell in choices:
                lattice = from_lengths_angles(cell * np.array([scale] * 3 + [1.0] * 3))
                crystal = Crystal("random", lattice, frac, np.full(20, 26))
                seconds = _seconds(partial(voxelize, crystal, spec, grid, algorithm))
                case = f"{algorithm}, 20 atoms, cell of {9.5 * scale:.1f} A, {shape}^3, {n_channels(spec)} channels"
                yield Row(case, seconds * 1e6, "us")


def _batched(crystals: Sequence[Crystal], spec: GridSpec, label: str, reference: float) -> Row:
    """Grids a second of the torch path on the CPU, over the crystals of the most common shape."""
    import torch

    from dist_train.models.crystal_tensors import CrystalTensors
    from dist_train.models.voxelize_batch import voxelize_batch

    shapes = [grid_shape(crystal.lattice_A, spec) for crystal in crystals]
    shape = max(set(shapes), key=shapes.count)
    batch = CrystalTensors.of([crystal for crystal, own in zip(crystals, shapes) if own == shape][:64])
    torch.set_num_threads(1)
    rate = len(batch) / _seconds(partial(voxelize_batch, batch, spec, shape), 3)
    return Row(
        f"grids a second: {label}, the same in torch, batch of {len(batch)}", rate, "1/s", reference, reference / rate
    )


def _sample_crystals(sample: Path, table: str, spec: GridSpec) -> list[Crystal]:
    found = []
    path = sample / f"{table}.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing: benchmarks read the shipped crystals; run them in a clone of the project")
    for item in read_parquet_rows(path, 0, CRYSTALS):
        try:
            found.append(representable(item, spec) if isinstance(item, Crystal) else None)
        except CrystalError:
            continue
    return [crystal for crystal in found if crystal is not None]


def _buffers(crystals: Sequence[Crystal], spec: GridSpec) -> list[VoxelGrid]:
    """Memory for each crystal's grid, shared between those of one shape."""
    shapes = [grid_shape(crystal.lattice_A, spec) for crystal in crystals]
    buffers = {shape: VoxelGrid.empty(n_channels(spec), shape) for shape in set(shapes)}
    return [buffers[shape] for shape in shapes]


def _voxelize_all(crystals: Sequence[Crystal], spec: GridSpec, buffers: Sequence[VoxelGrid]) -> None:
    for crystal, buffer in zip(crystals, buffers):
        voxelize(crystal, spec, buffer)


def _decode(sample: Path) -> Iterator[Row]:
    for table, label, settings in (
        ("perov_5", "Perov-5, 16^3", COARSE),
        ("perov_5", "Perov-5, 32^3", {}),
        ("materials_project", "Materials Project, adaptive to 2^17", {"shape": "adaptive", "max_voxels": 2**17}),
    ):
        spec = GridSpec.model_validate(settings)
        crystals = _sample_crystals(sample, table, spec)
        fields = [ideal_fields(crystal, spec) for crystal in crystals]
        times, errors = _decode_each(crystals, fields, spec)
        target = 10.0 if spec.shape == 32 else None
        value = median(times) * 1e3
        yield Row(f"decode: {label}", value, "ms", None, None, target, value <= target if target else None)
        yield from _exactness(f"ideal fields: {label}", errors, 1.0, 0.001)
        for correlation_A in (0.0, 0.5, 1.0):
            rng = np.random.default_rng(0)
            damaged = [damaged_fields(crystal, ideal, correlation_A, rng) for crystal, ideal in zip(crystals, fields)]
            case = f"noise correlated over {correlation_A} A" if correlation_A else "white noise"
            yield from _exactness(f"{case}, blur, flips: {label}", _decode_each(crystals, damaged, spec)[1], 0.99, 0.02)


def ideal_fields(crystal: Crystal, spec: GridSpec) -> Fields:
    """The true occupancy and species of a crystal."""
    grid = voxelize(crystal, spec)
    labelled = (grid.species_DHW > 0).astype(np.float32)
    return crystal.id, grid.density_CDHW[0], grid.species_DHW, labelled, crystal.lattice_A, None


def damaged_fields(crystal: Crystal, ideal: Fields, correlation_A: float, rng: np.random.Generator) -> Fields:
    """Fields as a poor network might give them: blurred by 0.3 A, noise of 5 % of the maximum, 10 % of the labels flipped.

    correlation_A: width in angstrom of the Gaussian that the noise is smoothed with. A flipped label becomes another element
    of the crystal, or none.
    """
    id, density, species, _, lattice, _ = ideal
    density = smoothed(density, lattice, 0.3)
    noise = smoothed(rng.standard_normal(density.shape), lattice, correlation_A)
    density = density + BENCH_NOISE * density.max() * noise / noise.std()
    present = np.concatenate([[0], np.unique(crystal.numbers_N)])
    turn = rng.integers(1, len(present), species.shape)
    other = present[(np.searchsorted(present, species) + turn) % len(present)]
    species = np.where(rng.random(species.shape) < BENCH_FLIPPED, other, species)
    return id, density.astype(np.float32), species, (species > 0).astype(np.float32), lattice, None


def smoothed(field_DHW: np.ndarray, lattice_A: np.ndarray, width_A: float) -> np.ndarray:
    """A periodic field folded with a Gaussian of unit integral and standard deviation `width_A`, in float64."""
    waves = fft.rfftn(field_DHW.astype(np.float64))
    return np.asarray(
        fft.irfftn(waves * np.exp(-0.5 * wave_squares(field_DHW.shape, lattice_A) * width_A**2), field_DHW.shape)
    )


def _decode_each(
    crystals: Sequence[Crystal], fields: Sequence[Fields], spec: GridSpec
) -> tuple[list[float], list[float | None]]:
    """Seconds of each decode, and its RMS position error in angstrom, None where atoms or species are not exact."""
    decode_frame(fields[0], spec, "occupancy")
    times, errors = [], []
    for crystal, field in zip(crystals, fields):
        began = time.perf_counter()
        found = decode_frame(field, spec, "occupancy").crystal
        times.append(time.perf_counter() - began)
        errors.append(_position_error(found, crystal))
    return times, errors


def _position_error(found: Crystal | None, true: Crystal) -> float | None:
    if found is None or found.composition != true.composition:
        return None
    distances = periodic_distances(true.lattice_A, true.frac_N3, found.frac_N3)
    distances[true.numbers_N[:, None] != found.numbers_N] = FAR_A
    error = float(np.sqrt((distances[linear_sum_assignment(distances)] ** 2).mean()))
    return error if error < ASTRAY_A else None


def _exactness(case: str, errors: Sequence[float | None], share: float, limit_A: float) -> Iterator[Row]:
    exact = [error for error in errors if error is not None]
    rate = len(exact) / len(errors)
    yield Row(f"exact atoms and species, {case}", rate, "share", None, None, share, rate >= share)
    mean = float(np.mean(exact)) if exact else float("nan")
    yield Row(f"mean RMS position error of these, {case}", mean, "A", None, None, limit_A, mean <= limit_A)
