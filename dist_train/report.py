"""One HTML file that shows what a model does to crystals: measurements, 3-D views, densities and curves, all of it offline.

Scripts, styles, pictures and CIF texts are inside the file; a content security policy keeps it from loading anything.
The crystals are drawn by 3Dmol.js (BSD-3-Clause, `static/3Dmol-LICENSE.txt`), whose licence is in the page too; a page
without crystals holds neither.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import SYMBOLS
from dist_train.crystal.structure import Crystal
from dist_train.files import write_text

MAX_VOXELS = 1_500_000
"""Values of all densities in a page, a byte each; where there are more, only the first channel is in it."""
MAX_POINTS = 600
"""Of a line in a chart; of a longer one, its ends, and the smallest and the largest value of each stretch."""


@dataclass(frozen=True)
class View:
    """A crystal as the text of a CIF in space group P1 with fractional coordinates; None, and `note` says why."""

    title: str
    cif: str | None
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """Two crystals side by side, as CIF texts in space group P1 with fractional coordinates.

    right: None where decoding failed; `note` then says why.
    note: shown below the pair, or in place of the missing crystal.
    """

    title: str
    left: str
    right: str | None
    left_label: str = "true"
    right_label: str = "reconstructed"
    note: str = ""


@dataclass(frozen=True)
class Volume:
    """A density on the grid of one crystal: density_CDHW.

    extent_33: rows in angstrom that span the grid, voxel i of n at i / n. periodic: the extent is the cell. crystal: whose
    atoms are marked, with fractional coordinates in the extent.
    """

    label: str
    density_CDHW: NDArray[np.floating]
    extent_33: NDArray[np.floating]
    periodic: bool = True
    crystal: Crystal | None = None


@dataclass(frozen=True)
class Density:
    """Volumes side by side, all of the same channels and drawn on one scale; the first channel is the most important."""

    title: str
    channels: tuple[str, ...]
    volumes: tuple[Volume, ...]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A series of a chart: values by step, both [n]; values that are not finite leave a gap."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Lines over training steps, with the unit of the values."""

    title: str
    lines: tuple[Line, ...]
    unit: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture: `png` holds the bytes of a PNG file."""

    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Link:
    """A cell of a table that points to a file, relative to the page."""

    text: str
    href: str


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns, to be sorted, filtered and downloaded.

    None and NaN are shown as a dash and sorted last.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    caption: str = ""


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    tables: Sequence[Table] = (),
    pairs: Sequence[Pair] = (),
    pairs_title: str = "Reconstructions",
    densities: Sequence[Density] = (),
    path_frames: Sequence[View] = (),
    samples: Sequence[View] = (),
    charts: Sequence[Chart] = (),
    figures: Sequence[Figure] = (),
) -> None:
    """Write the page to `path`, whole or not at all; a section without content is left out.

    path_frames: crystals of an interpolation, in order; samples: generated ones.
    """
    has_crystals = bool(pairs or path_frames or samples)
    whole = sum(volume.density_CDHW.size for density in densities for volume in density.volumes) <= MAX_VOXELS
    data = {
        "pairs": [asdict(pair) for pair in pairs],
        "densities": [_density(density, len(density.channels) if whole else 1) for density in densities],
        "path": [asdict(view) for view in path_frames],
        "samples": [asdict(view) for view in samples],
        "charts": [_chart(chart) for chart in charts],
    }
    scripts = [*(["3Dmol-min.js"] if has_crystals else []), *SCRIPTS]
    parts = {
        "title": escape(title),
        "summary": escape(summary),
        "pairs_title": escape(pairs_title),
        "tables": "".join(map(_table, tables)),
        "figures": "".join(map(_figure, figures)),
        "data": _script_json(data),
        "css": _static("report.css"),
        "scripts": "\n".join(f"<script>{_static(name)}</script>" for name in scripts),
        "license": _LICENSE.format(escape(_static("3Dmol-LICENSE.txt"))) if has_crystals else "",
    }
    write_text(path, _fill(_static("report.html"), parts))


SCRIPTS = ("page.js", "crystal.js", "tables.js", "charts.js", "slices.js", "report.js")
_LICENSE = "<details><summary>Licence of 3Dmol.js</summary><pre>{}</pre></details>"


def _static(name: str) -> str:
    return (files("dist_train") / "static" / name).read_text(encoding="utf-8")


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with each {{name}} replaced, in one pass: what a part contains is never read as a placeholder."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _script_json(value: object) -> str:
    """ASCII JSON that can't end the script element, or open a comment in it, as it has no '<'."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _density(density: Density, channels: int) -> dict[str, Any]:
    """The first channels of a density, each in 256 steps from its least to its largest value in any of the volumes."""
    grids = [volume.density_CDHW[:channels].astype(np.float64) for volume in density.volumes]
    low_C = np.min([grid.min((1, 2, 3)) for grid in grids], axis=0)
    high_C = np.max([grid.max((1, 2, 3)) for grid in grids], axis=0)
    step_C111 = (np.where(high_C > low_C, high_C - low_C, 1.0) / 255)[:, None, None, None]
    volumes = [
        {
            "label": volume.label,
            "shape": grid.shape[1:],
            "extent": np.round(volume.extent_33, 6).tolist(),
            "periodic": volume.periodic,
            "atoms": _atoms(volume.crystal),
            "bytes": _base64(np.rint((grid - low_C[:, None, None, None]) / step_C111).astype(np.uint8).tobytes()),
        }
        for volume, grid in zip(density.volumes, grids, strict=True)
    ]
    scale = {"low": low_C.tolist(), "high": high_C.tolist()}
    shown = {"channels": density.channels[:channels], "left_out": len(density.channels) - channels}
    return {"title": density.title, "note": density.note, **shown, **scale, "volumes": volumes}


def _atoms(crystal: Crystal | None) -> list[tuple[str, list[float]]]:
    """Symbol and fractional coordinates of each atom."""
    if crystal is None:
        return []
    return [(SYMBOLS[z], xyz) for z, xyz in zip(crystal.numbers_N.tolist(), crystal.frac_N3.round(4).tolist(), strict=True)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _chart(chart: Chart) -> dict[str, Any]:
    lines = [_thinned(np.asarray(line.steps), np.asarray(line.values, np.float64)) for line in chart.lines]
    return {
        "title": chart.title,
        "unit": chart.unit,
        "lines": [
            {"name": line.name, "steps": steps.tolist(), "values": [_short(value) for value in values.tolist()]}
            for line, (steps, values) in zip(chart.lines, lines, strict=True)
        ],
    }


def _thinned(steps_n: NDArray[np.integer], values_n: NDArray[np.float64]) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """At most MAX_POINTS of a line's points: its ends, and of each stretch the smallest and the largest; a gap stays one."""
    if len(steps_n) <= MAX_POINTS:
        return steps_n, values_n
    # numpy takes NaN for both the smallest and the largest.
    stretches = np.array_split(np.arange(len(steps_n)), MAX_POINTS // 2 - 1)
    extremes = [place[pick(values_n[place])] for place in stretches for pick in (np.argmin, np.argmax)]
    kept = np.unique([0, *extremes, len(steps_n) - 1])
    return steps_n[kept], values_n[kept]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _table(table: Table) -> str:
    numeric = [any(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{" class=num" * is_number}><button type="button">{escape(name)}</button></th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    )
    cells = ("".join(_cell(*pair) for pair in zip(row, numeric, strict=True)) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    return (
        f'<article class="card"><header><h3>{escape(table.title)}</h3></header>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{caption}</article>'
    )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: object, numeric: bool) -> str:
    """A table cell; `data-v` holds the value to sort by where the text is rounded, and is empty where there is none."""
    css = " class=num" * numeric
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return f'<td{css} data-v="">&ndash;</td>'
    if isinstance(value, bool):
        return f"<td{css}>{'yes' if value else 'no'}</td>"
    if isinstance(value, Integral):
        return f"<td{css}>{value}</td>"
    if isinstance(value, Real):
        return f'<td{css} data-v="{repr(float(value)).replace("inf", "Infinity")}">{float(value):.4g}</td>'
    if isinstance(value, Link):
        return f'<td{css}><a href="{escape(quote(value.href))}">{escape(value.text)}</a></td>'
    return f"<td{css}>{escape(str(value))}</td>"


def _figure(figure: Figure) -> str:
    source = f"data:image/png;base64,{_base64(figure.png)}"
    return (
        f'<figure class="card"><img src="{source}" alt="{escape(figure.title)}">'
        f"<figcaption><strong>{escape(figure.title)}</strong>{escape(figure.caption)}</figcaption></figure>"
    )
