"""The evaluation as a page: figures beside baseline and ceilings, the worst crystals in 3-D; and as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.crystal.case import Case
from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.metrics import PairMetrics
from dist_train.densities import reconstructed_densities
from dist_train.evaluate import Evaluation
from dist_train.generate_report import view
from dist_train.report import Pair, Table, write_report
from dist_train.tables import SYSTEMS, doubtful, exposure, latent_space, misses

if TYPE_CHECKING:
    from dist_train.models.reconstruct import Codec

WORST, WORST_DENSITIES = 20, 4
MAX_ROWS = 500
"""Crystals in the page's table, the worst first; crystals.csv has all."""
METRICS = (
    ("match rate (StructureMatcher, valid structure)", "match_rate"),
    ("match rate, valid or not", "match_rate_unconditioned"),
    ("match rate as in CDVAE (valid composition, too)", "match_rate_cdvae"),
    ("RMSE of matches, / (V/N)^(1/3)", "rmse"),
    ("valid structures", "valid_rate"),
    ("valid compositions (SMACT)", "composition_valid_rate"),
    ("right number of atoms", "atom_count_accuracy"),
    ("atoms with the right species", "species_accuracy"),
    ("position error, A", "position_error_A"),
    ("cell edge error, A", "length_error_A"),
    ("cell angle error, degrees", "angle_error_deg"),
    ("without a crystal to compare", "n_failed"),
)
COLUMNS = (
    "id", "formula", "atoms", "crystal system", "atoms decoded", "match", "valid", "RMSE", "position error, A",
    "latent error", "reason",
)  # fmt: skip

Row = tuple[Case, Decoded, PairMetrics]


def write_evaluation_report(
    path: Path, title: str, codec: Codec, result: Evaluation, look: dict[str, list[Decoded]], metrics: dict[str, Any]
) -> None:
    """Write the page: the worst of each kind in 3-D, the worst first in the table of crystals.

    codec: the model that was evaluated, for the densities of the worst.
    """
    overview = Table(
        "Reconstruction",
        ("metric", *(label for label, _ in SYSTEMS)),
        tuple((label, *(_of(metrics, name).get(key) for _, name in SYSTEMS)) for label, key in METRICS),
        "Rates are shares of all test crystals; a failed decode is a miss, and so is a crystal that the model's grid can't "
        "hold. Codec ceiling: the decoder fed the true grids. Perfect copy: the true crystals against themselves; one that "
        "isn't valid is a miss even so. CDVAE's match rate also asks for a composition that SMACT finds valid; a dash "
        "there: not judged, smact is not installed (pip install 'dist-train[eval]').",
    )
    reasons = Table(
        "Crystals without a result",
        ("what happened", "reason", "number"),
        tuple(
            (label, reason, count)
            for label, key in (
                ("the model can't hold it: a miss", "not_held"),
                ("failed decode: a miss", "failed_decode"),
                ("input can't be read: not counted", "refused"),
            )
            for reason, count in metrics["reasons"][key].items()
        ),
    )
    crystals = Table(
        "Crystal by crystal, the worst first",
        COLUMNS,
        tuple(islice((_row(*row) for row in chain.from_iterable(_kinds(result))), MAX_ROWS)),
        f"At most {MAX_ROWS} are listed here; crystals.csv has all.",
    )
    worst = list(islice(_interleaved(_kinds(result)), WORST))
    held = [row for row in worst if not row[0].refusal][:WORST_DENSITIES]
    nearest = metrics["match_rate_nearest_training"]
    write_report(
        path,
        title=title,
        summary=(
            f"{exposure(metrics)}. {metrics['n_test']} crystals: {metrics['match_rate']:.1%} match, "
            + (f"{nearest:.1%} would with the nearest training crystal, " if nearest is not None else "")
            + f"{metrics['match_rate_codec_ceiling']:.1%} with the decoder fed the true grids; {misses(metrics)}. "
            + " ".join(f"{line}." for line in (latent_space(metrics), doubtful(metrics)) if line)
        ),
        tables=(overview, *_breakdown(metrics), *([reasons] if reasons.rows else []), crystals),
        pairs=tuple(map(_pair, worst)),
        densities=reconstructed_densities(
            codec, [_title(row) for row in held], [case.crystal for case, _, _ in held], [decoded for _, decoded, _ in held]
        ),
        samples=tuple(view(f"sample-{i:03d}", decoded) for i, decoded in enumerate(look["samples"])),
        path_frames=tuple(view(f"step-{i:02d}", decoded) for i, decoded in enumerate(look["interpolation"])),
    )


def rows(result: Evaluation) -> Iterator[tuple[object, ...]]:
    """A header and a row for each test crystal, in order."""
    yield COLUMNS
    for row in zip(result.cases, result.reconstructed, result.systems["model"], strict=True):
        yield _row(*row)


def _of(metrics: dict[str, Any], system: str | None) -> dict[str, Any]:
    return (metrics[system] or {}) if system else metrics


def _breakdown(metrics: dict[str, Any]) -> Iterator[Table]:
    for by, found in metrics["breakdown"].items():
        yield Table(
            f"Match rate by {by.replace('_', ' ')}",
            (by.replace("_", " "), "crystals", *(label for label, _ in SYSTEMS), "RMSE of the model", "its right species"),
            tuple(
                (
                    row["class"],
                    row["n_test"],
                    *(row.get(name or "model", {}).get("match_rate") for _, name in SYSTEMS),
                    row["model"]["rmse"],
                    row["model"]["species_accuracy"],
                )
                for row in found
            ),
        )


def _kinds(result: Evaluation) -> tuple[list[Row], list[Row], list[Row]]:
    """Crystals without a result; those that don't match, the farthest first; and matches, from the largest RMS down."""
    found = list(zip(result.cases, result.reconstructed, result.systems["model"], strict=True))
    hit = [row for row in found if row[2].match and row[2].valid]
    missed = [row for row in found if not (row[2].failed or (row[2].match and row[2].valid))]
    return (
        [row for row in found if row[2].failed],
        sorted(missed, key=lambda row: row[2].position_error_A or 0.0, reverse=True),
        sorted(hit, key=lambda row: row[2].rms or 0.0, reverse=True),
    )


def _interleaved(kinds: Iterable[list[Row]]) -> Iterator[Row]:
    """One of each kind, then the next of each: a thousand failures of one kind must not hide the others."""
    return (row for together in zip_longest(*kinds) for row in together if row is not None)


def _row(case: Case, decoded: Decoded, pair: PairMetrics) -> tuple[object, ...]:
    return (
        case.crystal.id, case.crystal.formula, pair.n_true, case.system, pair.n_predicted, "yes" if pair.match else "no",
        "yes" if pair.valid else "no", pair.rms, pair.position_error_A, decoded.latent_error,
        case.refusal or decoded.reason,
    )  # fmt: skip


def _pair(row: Row) -> Pair:
    case, decoded, pair = row
    return Pair(
        title=_title(row),
        left=write_cif(case.crystal),
        right=write_cif(decoded.crystal) if decoded.crystal else None,
        note=f"The model can't hold it: {case.refusal}" if case.refusal else decoded.reason or _verdict(pair),
    )


def _title(row: Row) -> str:
    case, _, pair = row
    return f"{case.crystal.formula} ({case.crystal.id}): {_verdict(pair)}"


def _verdict(pair: PairMetrics) -> str:
    """Why a crystal is shown."""
    if pair.failed:
        return "no result"
    if pair.match:
        return f"match, RMS {pair.rms:.4f}" + ("" if pair.valid else ", but atoms overlap: not valid")
    right = f"{pair.species_correct} of {pair.n_true} atoms have the right species"
    return f"no match: {pair.n_predicted} atoms decoded of {pair.n_true}, {right}, {pair.position_error_A:.2f} A off"
