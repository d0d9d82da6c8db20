"""How well a model reproduces crystals it was not trained on, beside what could be had without it and at best.

Three systems see the same crystals: the model; the nearest training crystal (closest composition, then closest cell), which
a model must beat to have learnt anything; and the decoder fed the true grids, which no model can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.decode import Decoded, decode_all_ideal
from dist_train.crystal.metrics import PairMetrics, compare_all, summarise
from dist_train.crystal.structure import Crystal
from dist_train.generate import reconstruct
from dist_train.models.autoencoder import cell_numbers, composition_vector
from dist_train.models.reconstruct import Codec

SIZE_CLASSES = ((1, 5), (6, 20), (21, 52), (53, 100), (101, 10**9))


@dataclass(frozen=True)
class Evaluation:
    """Reconstructions of the test crystals and the metrics of the three systems, by name, crystal by crystal."""

    crystals: tuple[Crystal, ...]
    reconstructed: tuple[Decoded, ...]
    systems: dict[str, list[PairMetrics]]

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Metrics of each system over all test crystals; a failed decode is a miss."""
        return {name: summarise(pairs) for name, pairs in self.systems.items()}

    def by_size(self) -> list[tuple[str, int, dict[str, float | None]]]:
        """(size class, crystals, summary of each system's match rate) for classes that are not empty."""
        rows = []
        for low, high in SIZE_CLASSES:
            chosen = [i for i, crystal in enumerate(self.crystals) if low <= len(crystal) <= high]
            if chosen:
                rates = {name: summarise([pairs[i] for i in chosen])["match_rate"] for name, pairs in self.systems.items()}
                rows.append((f"{low}-{high}" if high < 10**9 else f"{low} and more", len(chosen), rates))
        return rows


def evaluate(
    codec: Codec,
    crystals: Sequence[Crystal],
    training: Sequence[Crystal],
    spec: GridSpec,
    workers: int,
    progress: Callable[[str, int], None] = lambda stage, n: None,
) -> Evaluation:
    """Reconstruct `crystals` (as their shards hold them) and compare all three systems with the truth.

    spec: the grid of the shards, for the ceiling; training: the candidates of the nearest-crystal baseline.
    progress(stage, n): n more crystals are done in a stage.
    """
    reconstructed = tuple(reconstruct(codec, crystals))
    progress("reconstruct", len(crystals))
    ideal = []
    for decoded in decode_all_ideal(crystals, spec, workers):
        ideal.append(decoded)
        progress("ceiling", 1)
    predictions: dict[str, list[Crystal | None]] = {
        "model": [decoded.crystal for decoded in reconstructed],
        "nearest_training": nearest_training(crystals, training),
        "ceiling": [decoded.crystal for decoded in ideal],
    }
    pairs = [pair for found in predictions.values() for pair in zip(crystals, found, strict=True)]
    done = 0

    def report(total: int) -> None:
        nonlocal done
        progress("compare", total - done)
        done = total

    compared = compare_all(pairs, workers, report)
    n = len(crystals)
    systems = {name: compared[i * n : (i + 1) * n] for i, name in enumerate(predictions)}
    return Evaluation(tuple(crystals), reconstructed, systems)


def nearest_training(crystals: Sequence[Crystal], training: Sequence[Crystal]) -> list[Crystal | None]:
    """For each crystal the training crystal of the closest composition; among equally close ones, of the closest cell.

    Composition distance: sum of absolute differences of the atoms of each element in the cell; cell distance: sum of
    absolute differences of log edges and cosines of angles.
    """
    if not training:
        return [None] * len(crystals)
    compositions = np.stack([composition_vector(crystal) for crystal in training])
    cells = _cells(training)
    nearest: list[Crystal | None] = []
    for crystal, cell in zip(crystals, _cells(crystals), strict=True):
        distance = np.abs(compositions - composition_vector(crystal)).sum(1)
        candidates = np.flatnonzero(distance == distance.min())
        nearest.append(training[candidates[np.abs(cells[candidates] - cell).sum(1).argmin()]])
    return nearest


def _cells(crystals: Sequence[Crystal]) -> NDArray[np.float32]:
    return cell_numbers(np.stack([crystal.lengths_angles for crystal in crystals]))
