"""One HTML file that shows what a model does to crystals: measurements, 3-D views and figures, all of it offline.

Scripts, styles, pictures and CIF texts are inside the file; a content security policy keeps it from loading anything.
The crystals are drawn by 3Dmol.js (BSD-3-Clause, `static/3Dmol-LICENSE.txt`), whose licence is in the page too.
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

from dist_train.files import write_text


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
class Figure:
    """A picture: `png` holds the bytes of a PNG file."""

    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns, sortable by a click. None and NaN are shown as a dash and sorted last."""

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
    samples: Sequence[tuple[str, str]] = (),
    path_frames: Sequence[tuple[str, str]] = (),
    figures: Sequence[Figure] = (),
) -> None:
    """Write the page to `path`, whole or not at all; a section without content is left out.

    samples: (title, CIF) of generated crystals.
    path_frames: (title, CIF) of an interpolation, in order.
    """
    crystals = {"pairs": [asdict(pair) for pair in pairs]}
    for name, titled in (("samples", samples), ("path", path_frames)):
        crystals[name] = [{"title": title, "cif": cif} for title, cif in titled]
    parts = {
        "title": escape(title),
        "summary": escape(summary),
        "tables": "".join(map(_table, tables)),
        "figures": "".join(map(_figure, figures)),
        "data": _script_json(crystals),
        "css": _static("report.css"),
        "js": _static("report.js"),
        "crystal": _static("crystal.js"),
        "viewer": _static("3Dmol-min.js"),
        "license": escape(_static("3Dmol-LICENSE.txt")),
    }
    write_text(path, _fill(_static("report.html"), parts))


def _static(name: str) -> str:
    return (files("dist_train") / "static" / name).read_text(encoding="utf-8")


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with each {{name}} replaced, in one pass: what a part contains is never read as a placeholder."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _script_json(value: object) -> str:
    """ASCII JSON that can't end the script element, or open a comment in it, as it has no '<'."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


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
        f'<article class="card"><h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{caption}</article>"
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
    if isinstance(value, Real):
        text = str(value) if isinstance(value, Integral) else f"{float(value):.4g}"
        return f'<td{css} data-v="{repr(float(value)).replace("inf", "Infinity")}">{text}</td>'
    return f"<td{css}>{escape(str(value))}</td>"


def _figure(figure: Figure) -> str:
    source = f"data:image/png;base64,{base64.b64encode(figure.png).decode('ascii')}"
    return (
        f'<figure class="card"><img src="{source}" alt="{escape(figure.title)}">'
        f"<figcaption><strong>{escape(figure.title)}</strong>{escape(figure.caption)}</figcaption></figure>"
    )
