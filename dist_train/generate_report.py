"""What a model generated, as a page: reconstructions and alterations side by side, samples, interpolations; as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.metrics import shortest_distance, structure_valid
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import TOLERANCE_A, space_group
from dist_train.report import Density, Pair, Table, View, write_report

MAX_SHOWN = 200
"""Crystals in 3-D in a page, and so many times ten rows in its table; the CIF files are all."""
COLUMNS = (
    "id", "formula", "atoms", "space group", "volume, A^3", "least distance, A", "valid", "least confidence", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Output:
    """What came of one latent, under its id.

    before: the crystal that it was made of, if it was. verdict: what was judged of it, in a few words.
    """

    id: str
    decoded: Decoded
    before: Crystal | None = None
    verdict: str = ""


def write_generation_report(
    path: Path,
    *,
    title: str,
    summary: str,
    outputs: Sequence[Output],
    metrics: Mapping[str, object] | None = None,
    columns: Sequence[str] = COLUMNS,
    rows: Sequence[Sequence[object]] | None = None,
    is_path: bool = False,
    heading: str = "Reconstructions",
    labels: tuple[str, str] = ("true", "reconstructed"),
    densities: Sequence[Density] = (),
    tables: Sequence[Table] = (),
) -> None:
    """Write the page of a generation. Failed outputs stay in it, with their reasons.

    Outputs with a crystal `before` are shown beside it, under `heading` and `labels`; others in a gallery or, where they are
    the steps of a path, as an animation. rows: of the table, under `columns`; without them, `output_row` of each. tables:
    others, below it.
    """
    table = [output_row(output) for output in outputs[: 10 * MAX_SHOWN]] if rows is None else rows[: 10 * MAX_SHOWN]
    if rows is None and not any(row[-1] for row in table):  # a column of verdicts where none was made
        columns, table = columns[:-1], [row[:-1] for row in table]
    crystals = Table("Crystals", tuple(columns), tuple(map(tuple, table)), _told(len(table), len(outputs), rows is None))
    figures = Table("Figures", ("figure", "value"), tuple((metrics or {}).items()))
    shown = outputs[:MAX_SHOWN]
    alone = [view(output.id, output.decoded) for output in shown if output.before is None]
    write_report(
        path,
        title=title,
        summary=summary,
        tables=[table for table in (figures, crystals, *tables) if table.rows],
        pairs=output_pairs(shown, labels),
        pairs_title=heading,
        densities=densities,
        path_frames=alone if is_path else (),
        samples=() if is_path else alone,
    )


def output_row(output: Output) -> tuple[object, ...]:
    """An output's figures in the order of COLUMNS; only id and verdict (or the reason) where nothing was decoded."""
    crystal = output.decoded.crystal
    if crystal is None:
        return (output.id, *[None] * (len(COLUMNS) - 2), output.verdict or output.decoded.reason)
    confidence = output.decoded.confidence_N
    return (
        output.id, crystal.formula, len(crystal), str(space_group(crystal) or "not found"), crystal.volume_A3,
        shortest_distance(crystal), "yes" if structure_valid(crystal) else "no",
        float(confidence.min()) if len(confidence) else None, output.verdict,
    )  # fmt: skip


def view(name: str, decoded: Decoded) -> View:
    """A decoded crystal under a name, or in its place why there is none."""
    if decoded.crystal is None:
        return View(f"{name}: not decoded", None, decoded.reason)
    return View(f"{name}: {decoded.crystal.formula}", write_cif(decoded.crystal))


def output_pairs(outputs: Sequence[Output], labels: tuple[str, str] = ("true", "reconstructed")) -> list[Pair]:
    """Those outputs that were made of a crystal, beside it."""
    return [_pair(output, output.before, labels) for output in outputs if output.before is not None]


def _pair(output: Output, before: Crystal, labels: tuple[str, str]) -> Pair:
    crystal, reason = output.decoded.crystal, output.decoded.reason
    name = f"{before.formula} ({output.id})" + (f": {output.verdict}" if output.verdict else "")
    after = write_cif(crystal) if crystal else None
    return Pair(name, write_cif(before), after, *labels, note=reason if crystal is None else "")


def _told(listed: int, n: int, own: bool) -> str:
    """The caption of the table of n crystals, of `output_row`s or of others."""
    columns = (
        f"Space groups hold within {TOLERANCE_A} A, least distances for images, too; valid: no two atoms within 0.5 A; "
        "least confidence: share of votes of the least certain atom."
    )
    return " ".join(
        (
            *([columns] if own else []),
            *([f"The first {listed} of {n} are listed."] if listed < n else []),
            *([f"The first {MAX_SHOWN} are shown in 3-D."] if n > MAX_SHOWN else []),
        )
    )
