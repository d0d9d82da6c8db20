"""What a model generated, as a page: reconstructions and alterations side by side, samples, interpolations; as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.structure import Crystal
from dist_train.report import Density, Pair, Table, View, write_report

MAX_SHOWN = 200
"""Crystals in 3-D in a page, and so many times ten rows in its table; the CIF files are all."""


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
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    is_path: bool = False,
    heading: str = "Reconstructions",
    labels: tuple[str, str] = ("true", "reconstructed"),
    densities: Sequence[Density] = (),
    tables: Sequence[Table] = (),
) -> None:
    """Write the page of a generation. Failed outputs stay in it, with their reasons.

    Outputs with a crystal `before` are shown beside it, under `heading` and `labels`; others in a gallery or, where they are
    the steps of a path, as an animation. rows: of the table of crystals, under `columns`; tables: others, below it.
    """
    table = tuple(map(tuple, rows[: 10 * MAX_SHOWN]))
    crystals = Table("Crystals", tuple(columns), table, _told(len(table), len(outputs)))
    figures = Table("Figures", ("figure", "value"), tuple((metrics or {}).items()))
    shown = outputs[:MAX_SHOWN]
    alone = [view(output.id, output.decoded) for output in shown if output.before is None]
    alone = alone if is_path or any(each.cif for each in alone) else []  # else they are in the table of crystals
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


def _told(listed: int, n: int) -> str:
    """The caption of the table of n crystals."""
    told = [f"The first {listed} of {n} are listed."] if listed < n else []
    return " ".join([*told, *([f"The first {MAX_SHOWN} are shown in 3-D."] if n > MAX_SHOWN else [])])
