"""How good a set of generated crystals is: valid, like the data, covering the data, distinct and new.

Definitions follow the evaluation of CDVAE (Xie et al., ICLR 2022) and, for METRe and cRMSE, Martirossyan et al.
(arXiv 2509.12178). What failed to be generated stays in every rate: it is not valid, not distinct, not new and covers
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from dist_train.crystal.fingerprints import COMPOSITION, STRUCTURE, fingerprints, matminer_installed
from dist_train.crystal.interop import density_g_cm3, match_rms, primitive_niggli, same_structure
from dist_train.crystal.metrics import possible, structure_valid
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.crystal.validity import composition_valid, smact_installed
from dist_train.errors import ConfigError, CrystalError

FloatArray = NDArray[np.float64]
Metrics = dict[str, Any]
Progress = Callable[[str, int], None]

PROPERTY_SAMPLES = 1000
"""Valid crystals whose density and number of elements are compared with the reference's, as in the published figures."""

MISS_RMS = 0.5
"""What a reference crystal that nothing matches counts in cRMSE: the matcher's stol."""

COVERAGE_KEYS = ("cov_recall", "cov_precision", "n_without_fingerprint", "n_reference_without_fingerprint")

INSTALLED = {"matminer": matminer_installed, "smact": smact_installed}

CHUNK = 16
ROWS = 1024  # of a block of distances, so that memory doesn't grow with both sets


class Cutoffs(NamedTuple):
    """Largest distance of fingerprints at which one crystal covers another: of structures, and of compositions."""

    structure: float
    composition: float


class Benchmark(NamedTuple):
    """A data set of the field: its cutoffs, and what was published for its test split, by system.

    Published, in this order: structural validity, compositional validity, COV-R, COV-P (all in percent), Wasserstein
    distance of density (g/cm^3) and of the number of elements.
    """

    cutoffs: Cutoffs
    published: dict[str, tuple[float, ...]]


PUBLISHED_KEYS = (
    "structure_valid_rate", "composition_valid_rate", "cov_recall", "cov_precision", "wdist_density", "wdist_elements",
)  # fmt: skip

BENCHMARKS = {
    "perov-5": Benchmark(
        Cutoffs(0.2, 4.0),
        {
            "ICSG3D": (73.60, 82.95, 73.92, 10.13, 2.268, 0.837),
            "CDVAE": (100.0, 98.59, 99.45, 98.46, 0.126, 0.063),
            "DiffCSP": (100.0, 98.85, 99.74, 98.27, 0.111, 0.013),
        },
    ),
    "carbon-24": Benchmark(Cutoffs(0.2, 4.0), {}),
    "mp-20": Benchmark(
        Cutoffs(0.4, 10.0),
        {
            "CDVAE": (100.0, 86.70, 99.15, 99.49, 0.688, 1.432),
            "DiffCSP": (100.0, 83.25, 99.71, 99.76, 0.350, 0.340),
            "FlowMM": (96.85, 83.19, 99.49, 99.58, 0.239, 0.083),
            "UniMat": (97.20, 89.40, 99.80, 99.70, 0.088, 0.056),
        },
    ),
}
"""By name. The figures are those that the papers of the systems state; ICSG3D's as measured by the authors of CDVAE."""


def generation_metrics(
    generated: Sequence[Crystal | None],
    reference: Sequence[Crystal],
    training: Sequence[Crystal] | None = None,
    cutoffs: Cutoffs | None = None,
    workers: int = 1,
    seed: int = 0,
    progress: Progress = lambda stage, n: None,
    cache: Path | None = None,
) -> Metrics:
    """Metrics of generated crystals, ready for JSON: rates from 0 to 1, and None for what can't be known.

    generated: None stands for a crystal that failed; so does one that isn't possible (see `metrics.possible`).
    reference: crystals that the samples should be like and cover, the test split of a benchmark, all of them possible.
    training: what the model was trained on; without it nothing is said of novelty.
    cutoffs: of COV; without them there is none, and no fingerprints are made. seed: of the crystals drawn for densities.
    progress(stage, n): n more crystals are done in a stage. cache: file of fingerprints, see `fingerprints`.

    structure_valid_rate, composition_valid_rate, valid_rate: see `structure_valid`, `composition_valid`; both of them.
    cov_recall: share of the reference whose nearest generated structure and nearest generated composition lie within the
        cutoffs; cov_precision: share of the generated that is as near to the reference. A crystal without a fingerprint is
        near to nothing; one that isn't valid in structure gets none (CDVAE makes one: between overlapping atoms it means
        little and may take minutes).
    wdist_density, wdist_elements: Wasserstein distance of the density (g/cm^3) and the number of elements between at most
        1,000 valid crystals, drawn without replacement (n_property_samples), and the whole reference.
    unique_rate: share of generated crystals that match none of those kept before it, a mode that is made again counts once;
        novel_rate: share that matches no training crystal; unique_novel_rate, valid_unique_novel_rate: all at once. A match
        is StructureMatcher's with default tolerances between crystals of one reduced formula.
    metre: share of the reference that some generated crystal matches (see `match_rms`: wider tolerances); crmse: mean over
        the reference of the smallest RMS displacement among those, 0.5 (stol) where there is none.
    missing: packages of the extra [eval] that aren't there, because of which metrics are None. seconds: by stage.
    Raises ConfigError for an empty set.
    """
    for name, crystals in (("generated", generated), ("reference", reference)):
        if not crystals:
            raise ConfigError(f"no {name} crystals, at least 1 is needed")
    clock = _Clock()
    made = [crystal if crystal is not None and possible(crystal) else None for crystal in generated]
    structures = [crystal is not None and structure_valid(crystal) for crystal in made]
    valid, rates = _validity(made, structures)
    clock.stop("validity")
    distances = _property_distances([c for c, ok in zip(made, valid) if c is not None and ok], reference, workers, seed)
    clock.stop("properties")
    covered: Metrics = dict.fromkeys(COVERAGE_KEYS)
    if cutoffs and matminer_installed():
        sound = [crystal for crystal, ok in zip(made, structures) if crystal is not None and ok]
        prints = fingerprints([*sound, *reference], workers, _steps(progress, "fingerprints"), cache)
        covered = coverage(prints[: len(sound)], prints[len(sound) :], len(generated), cutoffs)
    clock.stop("fingerprints")
    matches = _matches(made, reference, training, valid, workers, _steps(progress, "matches"))
    clock.stop("matches")
    return {
        **rates,
        **covered,
        **distances,
        **matches,
        "n_generated": len(generated),
        "n_failed": made.count(None),
        "n_reference": len(reference),
        "n_training": None if training is None else len(training),
        "cutoffs": None if cutoffs is None else cutoffs._asdict(),
        "composition_scale": "means and deviations of CDVAE's evaluation",
        "seed": seed,
        "missing": [name for name, there in INSTALLED.items() if not there()],
        "seconds": clock.seconds,
    }


def total_steps(n_generated: int, n_reference: int) -> int:
    """How many steps `generation_metrics` tells its `progress` of, at most: fingerprints, then matches."""
    return (n_generated + n_reference) + (2 * n_generated + n_reference)


class _Clock:
    """Seconds of one stage after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def stop(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._began = round(now - self._began, 3), now


def _steps(progress: Progress, stage: str) -> Callable[[int], None]:
    """`progress` of a stage for a callee that tells how many are done so far."""
    before = 0

    def report(done: int) -> None:
        nonlocal before
        progress(stage, done - before)
        before = done

    return report


def _validity(made: Sequence[Crystal | None], structures: Sequence[bool]) -> tuple[list[bool | None], Metrics]:
    """Whether each crystal is valid, None where that can't be judged, and the rates over all."""
    rates: Metrics = {"structure_valid_rate": _mean(structures), "composition_valid_rate": None, "valid_rate": None}
    if not smact_installed():
        return [None if ok else False for ok in structures], rates
    compositions = [crystal is not None and composition_valid(crystal.composition) for crystal in made]
    valid: list[bool | None] = [a and b for a, b in zip(structures, compositions, strict=True)]
    return valid, {**rates, "composition_valid_rate": _mean(compositions), "valid_rate": _mean(valid)}


def _mean(values: Sequence[bool | None] | NDArray[Any]) -> float:
    return float(np.asarray(values, dtype=float).mean())


def _property_distances(valid: Sequence[Crystal], reference: Sequence[Crystal], workers: int, seed: int) -> Metrics:
    """Wasserstein distances of density and number of elements; None without a valid crystal."""
    chosen = np.random.default_rng(seed).permutation(len(valid))[:PROPERTY_SAMPLES]
    crystals, n = [*(valid[i] for i in chosen), *reference], len(chosen)
    if not n:
        return {"wdist_density": None, "wdist_elements": None, "n_property_samples": 0}
    densities = list(parallel_map(density_g_cm3, crystals, workers, 8 * CHUNK))
    elements = [len(crystal.composition) for crystal in crystals]
    return {
        "wdist_density": float(wasserstein_distance(densities[:n], densities[n:])),
        "wdist_elements": float(wasserstein_distance(elements[:n], elements[n:])),
        "n_property_samples": n,
    }


# Coverage


def coverage(made: FloatArray, reference: FloatArray, n_generated: int, cutoffs: Cutoffs) -> Metrics:
    """COV of fingerprints [M, 193] of generated and [K, 193] of reference crystals, both as rates.

    A row with a NaN is no fingerprint. n_generated: those that COV-P is a share of, M and the failed.
    """
    made = made[np.isfinite(made).all(1)]
    target = reference[np.isfinite(reference).all(1)]
    recalled, precise = np.ones(len(target), bool), np.ones(len(made), bool)
    for part, cutoff in ((STRUCTURE, cutoffs.structure), (COMPOSITION, cutoffs.composition)):
        recalled &= _nearest(target[:, part], made[:, part]) <= cutoff
        precise &= _nearest(made[:, part], target[:, part]) <= cutoff
    return {
        "cov_recall": float(recalled.sum() / len(reference)),
        "cov_precision": float(precise.sum() / n_generated),
        "n_without_fingerprint": n_generated - len(made),
        "n_reference_without_fingerprint": len(reference) - len(target),
    }


def _nearest(points: FloatArray, others: FloatArray) -> FloatArray:
    """[M] Euclidean distance of each point to the nearest of the others; infinite where there are none."""
    blocks = [points[start : start + ROWS] for start in range(0, len(points), ROWS)]
    return np.concatenate([np.zeros(0), *(cdist(block, others).min(axis=1, initial=np.inf) for block in blocks)])


# Matches

Task = Callable[[], list[Any]]
Placed = list[tuple[int, Crystal]]


def _matches(
    made: Sequence[Crystal | None],
    reference: Sequence[Crystal],
    training: Sequence[Crystal] | None,
    valid: Sequence[bool | None],
    workers: int,
    progress: Callable[[int], None],
) -> Metrics:
    """Uniqueness, novelty, METRe and cRMSE; `progress` gets the answers so far, two a generated and one a reference crystal.

    Only crystals of one reduced formula and one size of primitive cell are compared: others can't match.
    """
    found = {"unique": np.zeros(len(made), bool), "novel": np.zeros(len(made), bool), "rms": np.full(len(reference), np.nan)}
    tasks = list(_tasks(_by_cell({"made": made, "reference": reference, "training": training or ()}, workers)))
    done = 2 * len(made) + len(reference) - sum(len(places) for _, places, _ in tasks)
    for (kind, places, _), values in zip(tasks, parallel_map(_run, [task for *_, task in tasks], workers, CHUNK)):
        found[kind][places] = values
        progress(done := done + len(places))
    unique, novel, rms = found.values()
    both = unique & novel
    return {
        "unique_rate": _mean(unique),
        "novel_rate": None if training is None else _mean(novel),
        "unique_novel_rate": None if training is None else _mean(both),
        "valid_unique_novel_rate": None if training is None or None in valid else _mean(both & np.array(valid, bool)),
        "metre": _mean(np.isfinite(rms)),
        "crmse": _mean(np.nan_to_num(rms, nan=MISS_RMS)),
    }


def _by_cell(sets: dict[str, Sequence[Crystal | None]], workers: int) -> list[dict[str, Placed]]:
    """Groups of crystals that might match, each by set: (place in the set, primitive cell). Without what can't match any."""
    formulas = {crystal.formula for crystal in sets["made"] if crystal is not None}
    chosen = [
        (name, place, crystal)
        for name, crystals in sets.items()
        for place, crystal in enumerate(crystals)
        if crystal is not None and crystal.formula in formulas
    ]
    groups: dict[tuple[str, int], dict[str, Placed]] = {}
    for (name, place, _), cell in zip(chosen, parallel_map(_cell, [crystal for *_, crystal in chosen], workers, CHUNK)):
        groups.setdefault((cell.formula, len(cell)), {name: [] for name in sets})[name].append((place, cell))
    return list(groups.values())


def _cell(crystal: Crystal) -> Crystal:
    """The primitive cell, or the given one where pymatgen can't find it."""
    try:
        return primitive_niggli(crystal)
    except CrystalError:
        return crystal


def _tasks(groups: Iterable[dict[str, Placed]]) -> Iterator[tuple[str, list[int], Task]]:
    """(what is asked, of the crystals at which places, the function that answers for each)."""
    for group in groups:
        made, known = ([cell for _, cell in group[name]] for name in ("made", "training"))
        if made:
            yield "unique", [place for place, _ in group["made"]], partial(_distinct, made)
        for place, cell in group["made"]:
            yield "novel", [place], partial(_novel, cell, known)
        for place, cell in group["reference"]:
            yield "rms", [place], partial(_best_rms, cell, made)


def _run(task: Task) -> list[Any]:
    return task()


def _distinct(group: Sequence[Crystal]) -> list[bool]:
    """For each crystal whether it is unlike all that were kept before it."""
    kept: list[Crystal] = []
    flags = []
    for crystal in group:
        flags.extend(_novel(crystal, kept))
        if flags[-1]:
            kept.append(crystal)
    return flags


def _novel(crystal: Crystal, known: Sequence[Crystal]) -> list[bool]:
    """Whether the crystal matches none of the known; two that pymatgen can't compare don't match."""
    for other in known:
        with suppress(CrystalError):
            if same_structure(crystal, other):
                return [False]
    return [True]


def _best_rms(target: Crystal, candidates: Sequence[Crystal]) -> list[float]:
    """The smallest RMS displacement of a candidate that matches, NaN where none does."""
    found = []
    for candidate in candidates:
        with suppress(CrystalError):
            found.append(match_rms(candidate, target))
    return [min((rms for rms in found if rms is not None), default=np.nan)]
