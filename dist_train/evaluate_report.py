"""The evaluation as a page: figures beside baseline and ceiling, true and reconstructed crystals in 3-D."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.evaluate import Evaluation
from dist_train.report import Pair, Table, write_report
from dist_train.tables import exposure

SHOWN_PAIRS = 60
METRICS = (
    ("match rate (StructureMatcher, valid structure)", "match_rate"),
    ("match rate as in CDVAE (valid composition, too)", "match_rate_cdvae"),
    ("RMSE of matches, / (V/N)^(1/3)", "rmse"),
    ("valid compositions (SMACT)", "composition_valid_rate"),
    ("right number of atoms", "atom_count_accuracy"),
    ("atoms with the right species", "species_accuracy"),
    ("position error, A", "position_error_A"),
    ("cell edge error, A", "length_error_A"),
    ("cell angle error, degrees", "angle_error_deg"),
    ("failed decodes", "n_failed"),
)
SYSTEMS = (("model", "model"), ("nearest training crystal", "nearest_training"), ("ceiling (true grids)", "ceiling"))


def write_evaluation_report(
    path: Path, title: str, result: Evaluation, look: dict[str, list[Decoded]], metrics: dict[str, Any]
) -> None:
    """Write the page; misses come first among the crystals shown."""
    systems = {"model": metrics, **{name: metrics[name] for _, name in SYSTEMS[1:]}}
    overview = Table(
        "Reconstruction",
        ("metric", *(label for label, _ in SYSTEMS)),
        tuple((label, *(systems[name][key] for _, name in SYSTEMS)) for label, key in METRICS),
        "Rates are shares of all test crystals; a failed decode is a miss. CDVAE's match rate also asks for a composition "
        "that SMACT finds valid: where it doesn't, even a perfect copy is a miss, as the ceiling shows. "
        "A dash there: not judged, smact is not installed (pip install 'dist-train[eval]').",
    )
    sizes = Table(
        "Match rate by number of atoms",
        ("atoms in the cell", "crystals", *(label for label, _ in SYSTEMS)),
        tuple((r["atoms"], r["crystals"], *(r[name] for _, name in SYSTEMS)) for r in metrics["by_number_of_atoms"]),
    )
    worst = Table(
        "Crystal by crystal",
        ("id", "formula", "atoms", "atoms decoded", "match", "RMSE", "position error, A", "reason"),
        tuple(_rows(result)),
    )
    write_report(
        path,
        title=title,
        summary=(
            f"{metrics['n_test']} crystals: {metrics['match_rate']:.1%} match, "
            f"against {metrics['match_rate_nearest_training'] or 0:.1%} for the nearest training crystal and "
            f"{metrics['match_rate_ceiling']:.1%} for the decoder fed the true grids; {exposure(metrics)}."
        ),
        tables=(overview, sizes, worst),
        pairs=tuple(_pairs(result)),
        samples=tuple(_titled(look["samples"])),
        path_frames=tuple(_titled(look["interpolation"])),
    )


def _rows(result: Evaluation) -> Iterable[tuple[object, ...]]:
    for crystal, decoded, pair in zip(result.crystals, result.reconstructed, result.systems["model"], strict=True):
        yield (
            crystal.id, crystal.formula, pair.n_true, pair.n_predicted, "yes" if pair.match and pair.valid else "no",
            pair.rms, pair.position_error_A, decoded.reason,
        )  # fmt: skip


def _pairs(result: Evaluation) -> Iterable[Pair]:
    rows = zip(result.crystals, result.reconstructed, result.systems["model"], strict=True)
    ordered = sorted(rows, key=lambda row: (row[2].match and row[2].valid, -(row[2].rms or 0.0)))
    for crystal, decoded, pair in ordered[:SHOWN_PAIRS]:
        fit = f"match, RMSE {pair.rms:.4f}" if pair.match and pair.valid else "no match"
        found = f"; decoded as {decoded.crystal.formula}" if decoded.crystal else ""
        yield Pair(
            title=f"{crystal.formula} ({crystal.id}): {fit}",
            left=write_cif(crystal),
            right=write_cif(decoded.crystal) if decoded.crystal else None,
            note=decoded.reason or f"{fit}{found}",
        )


def _titled(items: Iterable[Decoded]) -> Iterable[tuple[str, str]]:
    for item in items:
        if item.crystal is not None:
            yield f"{item.crystal.id}: {item.crystal.formula}", write_cif(item.crystal)
