"""How well a model reproduces crystals it was not trained on, beside what could be had without it and at best.

Four systems see the same crystals: the model; the nearest training crystal (closest composition, then closest cell), which
a model must beat to have learnt anything; the decoder fed the true grids, which no model on this grid can beat; and the
true crystals themselves, which nothing can: one that isn't valid by the field's rules is a miss even as a perfect copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.case import Case, ceiling
from dist_train.crystal.decode import Decoded
from dist_train.crystal.metrics import PairMetrics, compare_all, summarise
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import SYSTEMS, UNKNOWN
from dist_train.generate import decode, posterior
from dist_train.models.autoencoder import cell_numbers
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent
from dist_train.progress import Stages

SIZE_CLASSES = ((1, 5), (6, 10), (11, 20), (21, 52), (53, 100), (101, 10**9))
CLASSES: dict[str, tuple[tuple[str, ...], Callable[[Case], str]]] = {
    "number_of_atoms": (
        tuple(f"{low}-{high}" if high < 10**9 else f"{low} and more" for low, high in SIZE_CLASSES),
        lambda case: next(
            name
            for name, (_, high) in zip(CLASSES["number_of_atoms"][0], SIZE_CLASSES, strict=True)
            if len(case.crystal) <= high
        ),
    ),
    "number_of_elements": (
        ("1", "2", "3", "4", "5", "6 and more"),
        lambda case: str(n) if (n := len(case.crystal.composition)) < 6 else "6 and more",
    ),
    "crystal_system": ((*(name for _, name in SYSTEMS), UNKNOWN), lambda case: case.system),
}
"""What results are broken down by: names of the classes in order, and the class of a case."""


@dataclass(frozen=True)
class Evaluation:
    """Test crystals, what the model made of each, and the metrics of each system, crystal by crystal.

    systems: 'model', 'nearest_training' (where there are training crystals), 'codec_ceiling' and 'perfect_copy'. latent: of
    the cases that the grid holds.
    """

    cases: tuple[Case, ...]
    reconstructed: tuple[Decoded, ...]
    systems: dict[str, list[PairMetrics]]
    latent: Latent

    @property
    def held(self) -> list[int]:
        """Places of the cases that the grid holds."""
        return [place for place, case in enumerate(self.cases) if not case.refusal]

    def summary(self, chosen: Sequence[int] | None = None) -> dict[str, dict[str, float | None]]:
        """Metrics of each system over all test crystals, or over those at some places, at least one; a failed decode or a
        crystal not held is a miss."""
        places = range(len(self.cases)) if chosen is None else chosen
        return {name: summarise([pairs[i] for i in places]) for name, pairs in self.systems.items()}

    def breakdown(self) -> dict[str, list[dict[str, Any]]]:
        """By each of `CLASSES` a row {'class', 'n_test', system: its summary...} for classes that are not empty."""
        tables: dict[str, list[dict[str, Any]]] = {}
        for by, (names, class_of) in CLASSES.items():
            of = [class_of(case) for case in self.cases]
            rows = tables[by] = []
            for name in names:
                if chosen := [place for place, other in enumerate(of) if other == name]:
                    rows.append({"class": name, "n_test": len(chosen), **self.summary(chosen)})
        return tables


def evaluate(
    codec: Codec, cases: Sequence[Case], training: Sequence[Crystal], workers: int, stages: Stages, corrections: int
) -> Evaluation:
    """Reconstruct the cases and compare all systems with the truth: networks in this process, the rest over `workers`.

    training: the candidates of the nearest-crystal baseline, in the cells that the grid takes; corrections: see `decode`.
    """
    held, spec = [case.crystal for case in cases if not case.refusal], codec.model.grid
    with stages.stage("encode", len(held)) as bar:
        latent = posterior(codec, held, bar.update, workers)
    with stages.stage("decode", len(held)) as bar:
        ids = [crystal.id for crystal in held]
        of_held = iter(list(decode(codec, latent.mean, ids, workers, corrections=corrections, progress=bar.update)))
    reconstructed = tuple(Decoded(None, np.zeros(0), case.refusal) if case.refusal else next(of_held) for case in cases)
    predictions: dict[str, list[Crystal | None]] = {"model": [item.crystal for item in reconstructed]}
    if training:
        with stages.stage("nearest", len(cases)) as bar:
            found = nearest_training([case.crystal for case in cases], training)
            predictions["nearest_training"] = list(bar.over(found))
    with stages.stage("ceiling", len(cases)) as bar:
        ideal = bar.over(parallel_map(partial(ceiling, spec=spec, channel=codec.channel), cases, workers))
        predictions["codec_ceiling"] = [item.crystal for item in ideal]
    predictions["perfect_copy"] = [case.crystal for case in cases]
    pairs = [(case.crystal, found) for system in predictions.values() for case, found in zip(cases, system, strict=True)]
    with stages.stage("compare", len(pairs), "pairs") as bar:
        compared = compare_all(pairs, workers, lambda done: bar.update())
    n = len(cases)
    systems = {name: compared[i * n : (i + 1) * n] for i, name in enumerate(predictions)}
    return Evaluation(tuple(cases), reconstructed, systems, latent)


def nearest_training(crystals: Sequence[Crystal], training: Sequence[Crystal]) -> Iterator[Crystal]:
    """For each crystal the training crystal of the closest composition; among equally close ones, of the closest cell.

    Composition distance: sum of absolute differences of the atoms of each element in the cell; cell distance: sum of
    absolute differences of log edges and cosines of angles. One row of distances to all training crystals is held.
    """
    places: dict[int, list[int]] = {}
    counts: dict[int, list[int]] = {}
    for place, crystal in enumerate(training):
        for number, count in crystal.composition.items():
            places.setdefault(number, []).append(place)
            counts.setdefault(number, []).append(count)
    holders = {number: (np.array(places[number]), np.array(counts[number])) for number in places}
    atoms, cells = np.array([len(crystal) for crystal in training]), _cells(training)
    for crystal, cell in zip(crystals, _cells(crystals), strict=True):
        distance = atoms + len(crystal)
        for number, count in crystal.composition.items():  # |a - b| = a + b - 2 min(a, b), and most of b is zero
            if number in holders:
                held_by, theirs = holders[number]
                distance[held_by] -= 2 * np.minimum(theirs, count)
        candidates = np.flatnonzero(distance == distance.min())
        yield training[candidates[np.abs(cells[candidates] - cell).sum(1).argmin()]]


def _cells(crystals: Sequence[Crystal]) -> NDArray[np.float32]:
    return cell_numbers(np.stack([crystal.lengths_angles for crystal in crystals]))
