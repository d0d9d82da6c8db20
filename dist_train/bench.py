"""`dist-train bench`: how fast the crystal core is, against the plain formula and against what the machine allows.

All ratios of a run are measured side by side in it, so they hold where absolute times don't. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from dist_train.config import GridSpec
from dist_train.crystal.decode import decode_ideal
from dist_train.crystal.frames import representable
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError, DataError

ROUNDS = 5
BOX_A = 10.0
SPEEDUPS = {5: 220.0, 20: 450.0, 100: 500.0, 500: 650.0}
"""Wanted ratio of the plain formula's time to ours, by number of atoms."""


@dataclass(frozen=True)
class Row:
    """A measurement: `value` in `unit`; `ratio` is reference / value; `holds` tells whether it reaches the target."""

    case: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None
    target: float | None = None
    holds: bool | None = None


def run(names: Sequence[str], sample: Path) -> list[dict[str, object]]:
    """The rows of the named benchmarks, ready for JSON. sample: the folder of the shipped crystals."""
    benches: dict[str, Callable[[Path], list[Row]]] = {"voxelize": _voxelize, "decode": _decode}
    return [asdict(row) for name in names for row in benches[name](sample)]


def naive_grid(crystal: Crystal, spec: GridSpec) -> tuple[np.ndarray, np.ndarray]:
    """Occupancy and species by the formula as it reads: all voxels x all atoms in numpy, no periodic images."""
    n = spec.shape
    assert isinstance(n, int)
    points = np.stack(np.meshgrid(*[np.arange(n) / n] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ crystal.lattice_A
    density = np.zeros(n**3)
    nearest, species = np.full(n**3, np.inf), np.zeros(n**3, np.uint8)
    for number, position in zip(crystal.numbers_N, crystal.cart_N3, strict=True):
        d2 = ((points - position) ** 2).sum(1)
        density += np.exp(-0.5 * d2 / spec.sigma_A**2)
        closer = (d2 < nearest) & (d2 <= spec.radius_A**2)
        nearest[closer], species[closer] = d2[closer], number
    return density.reshape(n, n, n), species.reshape(n, n, n)


def _seconds(work: Callable[[], object]) -> float:
    """Median seconds of a call over some rounds, after one to warm up."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def random_crystal(atoms: int) -> Crystal:
    """Atoms at random places of a cube of 10 A; the same for the same number."""
    rng = np.random.default_rng(atoms)
    return Crystal(f"random-{atoms}", np.eye(3) * BOX_A, rng.random((atoms, 3)), rng.integers(1, 90, atoms))


def _sample_crystals(sample: Path, table: str, spec: GridSpec, most: int) -> list[Crystal]:
    found = []
    path = sample / f"{table}.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing: benchmarks read the shipped crystals; run them in a clone of the project")
    for item in read_parquet_rows(path, 0, most):
        try:
            found.append(representable(item, spec) if isinstance(item, Crystal) else None)
        except CrystalError:
            continue
    return [crystal for crystal in found if crystal is not None]


def _voxelize_all(crystals: Sequence[Crystal], spec: GridSpec) -> None:
    for crystal in crystals:
        voxelize(crystal, spec)


def _voxelize(sample: Path) -> list[Row]:
    spec = GridSpec(shape=32, max_spacing_A=0.32)
    rows = []
    for atoms, target in SPEEDUPS.items():
        crystal = random_crystal(atoms)
        ours = _seconds(partial(voxelize, crystal, spec))
        began = time.perf_counter()
        naive_grid(crystal, spec)
        naive = time.perf_counter() - began
        ratio = naive / ours
        case = f"voxelize {atoms} atoms, 32^3, 10 A, density and species; reference: the plain numpy formula"
        rows.append(Row(case, ours * 1e6, "us", naive * 1e6, ratio, target, ratio >= target))
    for table, grid, label in (
        ("perov_5", GridSpec(shape=16, max_spacing_A=0.36), "Perov-5, 16^3"),
        ("perov_5", GridSpec(shape=32), "Perov-5, 32^3"),
        ("materials_project", GridSpec(shape="adaptive", max_voxels=2**17), "Materials Project, adaptive"),
    ):
        crystals = _sample_crystals(sample, table, grid, 200)
        seconds = _seconds(partial(_voxelize_all, crystals, grid)) / len(crystals)
        rows.append(Row(f"cell grids a second: {label}", 1 / seconds, "1/s", None, None, 2500.0, 1 / seconds >= 2500))
    return rows


def _decode(sample: Path) -> list[Row]:
    rows = []
    for table, grid, label in (
        ("perov_5", GridSpec(shape=16, max_spacing_A=0.36), "Perov-5, 16^3"),
        ("perov_5", GridSpec(shape=32), "Perov-5, 32^3"),
        ("materials_project", GridSpec(shape="adaptive", max_voxels=2**17), "Materials Project, adaptive"),
    ):
        crystals = _sample_crystals(sample, table, grid, 200)
        decode_ideal(crystals[0], grid)
        times, exact = [], 0
        for crystal in crystals:
            began = time.perf_counter()
            found = decode_ideal(crystal, grid).crystal
            times.append(time.perf_counter() - began)
            exact += found is not None and found.composition == crystal.composition
        target = 10.0 if grid.shape == 32 else None
        value = median(times) * 1e3
        holds = value <= target if target else None
        rows.append(Row(f"decode, voxelising included: {label}", value, "ms", None, None, target, holds))
        share = exact / len(crystals)
        rows.append(Row(f"ideal fields decoded exactly: {label}", share, "share", None, None, 1.0, share == 1.0))
    return rows
