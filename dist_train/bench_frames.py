"""`dist-train bench frames`: what the grids of Hoffmann et al. (2019) hide of crystals, and what those of this project show.

On true grids of real crystals: what is lost here, no network in front can bring back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from dist_train.bench import Row
from dist_train.config import GridSpec
from dist_train.crystal.case import ceiling, make_case
from dist_train.crystal.decode import Channel, decode_ideal
from dist_train.crystal.elements import SYMBOLS
from dist_train.crystal.frames import placed, representable
from dist_train.crystal.lattice import periodic_distances
from dist_train.crystal.metrics import compare
from dist_train.crystal.moved import moved
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import VoxelGrid, code_table, voxelize
from dist_train.errors import CrystalError, DataError

CRYSTALS, FEW = 200, 40
"""Of each table; of what takes seconds each."""
TABLES = (("perov_5", "Perov-5"), ("materials_project", "Materials Project"))
PAPER_SPACING_A, PAPER_SIGMA_A, PAPER_RADIUS_A = 0.345, 1.0, 0.65
LEAST_PEAK, PEAK_AWAY_A = 0.1, 0.5
"""Of the highest, below which a peak is none; how far from an atom a peak may be."""
FINE = {"shape": "adaptive", "max_voxels": 2**17}
CELL = FINE | {"canonical": True}
WINDOW = {"preset": "paper-window"}
UNIT = {"preset": "paper-unit"}


def frame_rows(sample: Path) -> Iterator[Row]:
    """The rows of the benchmark 'frames'; sample: the folder of the shipped crystals."""
    with threadpool_limits(1):
        for table, name in TABLES:
            crystals = _crystals(sample / f"{table}.parquet")
            yield from _held(crystals, name)
            yield from _peaks(crystals, name)
            yield from _weights(crystals, name)
            yield from _spheres(crystals, name)
            yield from _images(crystals[:FEW], name)
            yield from _moved(crystals, name)
            yield from _returned(crystals[:FEW], name)


def _crystals(table: Path) -> list[Crystal]:
    if not table.is_file():
        raise DataError(f"{table} is missing: benchmarks read the shipped crystals; run them in a clone of the project")
    return [item for item in read_parquet_rows(table, 0, CRYSTALS) if isinstance(item, Crystal)]


def _percent(case: str, found: Sequence[bool] | Sequence[float]) -> Row:
    return Row(f"{case} ({len(found)} crystals)", 100.0 * float(np.mean(found)), "%")


def _as_held(crystals: Sequence[Crystal], spec: GridSpec) -> list[Crystal]:
    held = []
    for crystal in crystals:
        with suppress(CrystalError):
            held.append(representable(crystal, spec))
    return held


def _held(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    for label, settings in (("paper's unit", UNIT), ("paper's window", WINDOW), ("cell, adaptive", CELL)):
        held = len(_as_held(crystals, GridSpec.model_validate(settings)))
        yield Row(
            f"{name}, crystals that the grid takes: {label} ({len(crystals)} crystals)", 100 * held / len(crystals), "%"
        )


def _peaks(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    """Crystals whose density has one peak at each atom and no other."""
    for channel, sigma_A, label in (
        ("z_density", PAPER_SIGMA_A, "Z-weighted, sigma 1 A, as the paper's"),
        ("z_density", 0.5, "Z-weighted, sigma 0.5 A"),
        ("occupancy", PAPER_SIGMA_A, "all atoms alike, sigma 1 A"),
        ("occupancy", 0.5, "all atoms alike, sigma 0.5 A, as in cell"),
    ):
        # At a random origin no atom lies just between two voxels, which would both be highest.
        spec = GridSpec.model_validate(FINE | {"channels": [channel], "sigma_A": sigma_A, "random_origin": True})
        there = [placed(crystal, spec) for crystal in _as_held(crystals, spec)]
        found = [_peaks_are_atoms(crystal, voxelize(crystal, spec)) for crystal in there]
        yield _percent(f"{name}, atoms are the density's peaks: {label}", found)


def _peaks_are_atoms(crystal: Crystal, grid: VoxelGrid) -> bool:
    density = grid.density_CDHW[0]
    highest = ndimage.maximum_filter(density, size=3, mode="wrap")
    places = np.argwhere((density == highest) & (density > LEAST_PEAK * density.max())) / density.shape
    if len(places) != len(crystal):
        return False
    near = periodic_distances(crystal.lattice_A, crystal.frac_N3, places) < PEAK_AWAY_A
    return bool((near.sum(0) == 1).all() and (near.sum(1) == 1).all())


def _weights(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    """Mean squared error of a density without the atoms of the lightest element, of one without any atom."""
    for channel, sigma_A, label in (("z_density", 1.0, "Z-weighted, as the paper's"), ("occupancy", 0.5, "as in cell")):
        spec = GridSpec.model_validate(FINE | {"channels": [channel], "sigma_A": sigma_A})
        shares = []
        for crystal in _as_held(crystals, spec):
            light = crystal.numbers_N == crystal.numbers_N.min()
            if light.all():
                continue
            rest = Crystal(crystal.id, crystal.lattice_A, crystal.frac_N3[~light], crystal.numbers_N[~light])
            whole, left = (voxelize(part, spec).density_CDHW[0] for part in (crystal, rest))
            shares.append(float(np.square(whole - left).sum() / np.square(whole).sum()))
        yield _percent(f"{name}, error of losing all atoms of the lightest element: {label}", shares)


def _spheres(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    """Crystals that come back from labels: as connected spheres of one element, or by votes and suppression."""
    paper: dict[str, object] = {"max_spacing_A": PAPER_SPACING_A, "radius_A": PAPER_RADIUS_A, "min_like_distance_A": 1.0}
    ways: tuple[tuple[str, dict[str, object], Callable[[Crystal, GridSpec], bool]], ...] = (
        ("connected spheres of 0.65 A at 0.345 A, as the paper's", paper, _spheres_are_atoms),
        ("decoded, 0.5 A at 0.3 A, as in cell", {}, _decoded_right),
    )
    for label, settings, right in ways:
        spec = GridSpec.model_validate(FINE | settings)
        found = [right(crystal, spec) for crystal in _as_held(crystals, spec)]
        yield _percent(f"{name}, right number of atoms of each element: {label}", found)


def _spheres_are_atoms(crystal: Crystal, spec: GridSpec) -> bool:
    species = voxelize(crystal, spec).species_DHW
    return all(_n_regions(species == number) == count for number, count in crystal.composition.items())


def _n_regions(marked_DHW: NDArray[np.bool_]) -> int:
    """Connected regions of a periodic grid; voxels with a common face are connected."""
    labels, count = ndimage.label(marked_DHW)
    ends = [np.stack([labels.take(end, axis).ravel() for end in (0, -1)]) for axis in range(3)]
    pairs = np.concatenate(ends, axis=1)
    pairs = pairs[:, (pairs > 0).all(axis=0)] - 1
    graph = coo_array((np.ones(pairs.shape[1]), pairs), shape=(count, count))
    return int(connected_components(graph, directed=False, return_labels=False))


def _decoded_right(crystal: Crystal, spec: GridSpec) -> bool:
    decoded = decode_ideal(crystal, spec).crystal
    return decoded is not None and decoded.composition == crystal.composition


def _images(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    """Largest error of a window whose atoms have their nearest image alone, of the density's maximum."""
    spec = GridSpec.model_validate(WINDOW)
    axis = np.arange(spec.shape) * (spec.box_A / (int(spec.shape) - 1))
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    errors = []
    for crystal in (placed(crystal, spec) for crystal in _as_held(crystals, spec)):
        true = voxelize(crystal, spec).density_CDHW[0].ravel()
        distances = periodic_distances(crystal.lattice_A, points @ np.linalg.inv(crystal.lattice_A), crystal.frac_N3)
        nearest = np.exp(-0.5 * np.square(distances / spec.sigma_A)) @ code_table(spec)[crystal.numbers_N, 0]
        errors.append(float(np.abs(true - nearest).max() / true.max()))
    yield _percent(f"{name}, largest error of the nearest images alone, as the paper's", errors)


def _moved(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    """Crystals whose grid stays the same when they are written otherwise: another origin, cell, orientation, order."""
    for label, settings in (
        ("paper's window", WINDOW),
        ("cell, Niggli-reduced", FINE),
        ("cell, canonical", CELL),
    ):
        spec = GridSpec.model_validate(settings)
        rng = np.random.default_rng(0)
        same = []
        for crystal in crystals:
            with suppress(CrystalError):
                one, other = (placed(representable(form, spec), spec) for form in (crystal, moved(crystal, rng)))
                first, second = (voxelize(form, spec).density_CDHW for form in (one, other))
                same.append(first.shape == second.shape and bool(np.abs(first - second).max() < 0.01 * np.abs(first).max()))
        yield _percent(f"{name}, the same grid for the same crystal written otherwise: {label}", same)


def _returned(crystals: Sequence[Crystal], name: str) -> Iterator[Row]:
    """Crystals that StructureMatcher finds again in what is decoded from their true grid; misses and refusals count."""
    elements = tuple(range(1, len(SYMBOLS)))
    for label, settings in (("paper's unit", UNIT), ("paper's window", WINDOW), ("cell, canonical, adaptive", CELL)):
        spec = GridSpec.model_validate(settings)
        channel: Channel = "z_density" if "z_density" in spec.channels else "occupancy"
        found = []
        for crystal in crystals:
            case = make_case(crystal, spec, elements, None)
            found.append(compare(crystal, ceiling(case, spec, channel).crystal).rms is not None)
        yield _percent(f"{name}, crystals back from their true grid: {label}", found)
