"""What a served model answers: a table of crystals in, a table of crystals out. Needs no engine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from dist_train.config import Count, NonNegative, Section
from dist_train.crystal.alter import Edit, make_edit
from dist_train.crystal.cif import parse_cif, write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError, ModelError
from dist_train.generate import CORRECTIONS, altered_latents, decode, encode, interpolate_latents, samples
from dist_train.models.reconstruct import Codec

TASKS = {
    "reconstruct": ("cif",),
    "encode": ("cif",),
    "decode": ("latent",),
    "sample": (),
    "interpolate": ("latent", "cif"),
    "alter": ("latent", "cif"),
}
"""Each task with the columns that it takes a row's crystal from; of two, the first one that isn't empty."""
COLUMNS = ("cif", "latent", "confidence", "error")
MAX_ROWS, MAX_CORRECTIONS = 10_000, 100
"""Crystals of one answer, and how often each is corrected."""


class Params(Section):
    """The `params` of a request."""

    task: str = "reconstruct"
    n: Count = 1
    """Crystals to sample; of 'alter', for each row."""
    steps: Annotated[int, Field(ge=2)] = 9
    """Of 'interpolate': crystals from each row to the next, both ends included."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of 'sample' and 'alter'."""
    radius: NonNegative = 1.0
    """Of 'alter': how far from the row's crystal, in standard deviations of the training crystals' latents."""
    replace: str = ""
    """Of 'alter' and rows of `cif`: elements to replace first, such as 'Ti=Zr', several with spaces between them."""
    scale: NonNegative = 0.0
    """As `replace`: factor of the density, see `crystal.alter.scaled`; 0 for none."""
    within: NonNegative = 0.0
    """Radius in angstrom of the region that `replace` and `scale` are of; 0 for the whole crystal."""
    of: str = ""
    """Middle of that region, three fractional coordinates in the cell as given, with spaces between them."""
    path: Literal["linear", "spherical"] = "linear"
    """Of 'interpolate': straight, or on an arc around the mean of the training crystals' latents."""
    corrections: Annotated[int, Field(ge=0, le=MAX_CORRECTIONS)] = CORRECTIONS
    """How often what was decoded is encoded again, and its latent corrected by what it lacks; 0 is the fastest."""


def answer(codec: Codec, table: Mapping[str, Sequence[object]], params: dict[str, Any]) -> dict[str, list[object]]:
    """The columns `COLUMNS` of the crystals asked for; table: columns `cif` (text) and `latent` (a JSON list), or one.

    A crystal that can't be had has the reason in `error` and nothing else. Raises ModelError for params that make no sense.
    """
    asked = checked(params)
    sources = TASKS[asked.task]
    if sources and not set(sources) & table.keys():
        raise ModelError(f"{asked.task} takes a table with the column {' or '.join(sources)}, this one has {[*table]}")
    edit = _edit(asked, codec) if asked.task == "alter" else None
    rows = [] if asked.task == "sample" else _latents(codec, table, sources, edit)
    wanted = {"sample": asked.n, "interpolate": (len(rows) - 1) * asked.steps, "alter": len(rows) * asked.n}
    if (number := wanted.get(asked.task, len(rows))) > MAX_ROWS:
        raise ModelError(f"{asked.task} would give {number} crystals, at most {MAX_ROWS} can be had: send several requests")
    if asked.task == "sample":
        drawn = samples(codec, [f"row-{place}" for place in range(asked.n)], asked.seed)
        return _columns([sample.latent_L for sample in drawn], [sample.decoded for sample in drawn])
    if asked.task == "interpolate":
        if len(rows) < 2:
            raise ModelError(f"interpolate takes two rows or more, {len(rows)} were given")
        rows = [point for ends in pairwise(rows) for point in _between(*ends, asked, codec)]
    elif asked.task == "alter":
        rows = [near for row in rows for near in _near(codec, row, asked)]
    return _columns(rows, None if asked.task == "encode" else _decoded(codec, rows, asked.corrections))


def checked(params: dict[str, Any]) -> Params:
    """The params of a request. Raises ModelError in one line."""
    try:
        asked = Params.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ModelError(f"param {name!r} is unknown, known are {', '.join(Params.model_fields)}") from None
        raise ModelError(f"param {name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    if asked.task not in TASKS:
        raise ModelError(f"task {asked.task!r} is unknown, known are {', '.join(TASKS)}")
    for name in ("radius", "scale", "within"):
        if not math.isfinite(value := getattr(asked, name)):
            raise ModelError(f"param {name} = {value}: not a number that can be used")
    return asked


def _edit(asked: Params, codec: Codec) -> Edit | None:
    """What 'alter' does to crystals before they are encoded. Raises ModelError for what makes no sense."""
    if not (asked.replace or asked.scale or asked.within or asked.of):
        return None
    try:
        centre = [float(x) for x in asked.of.split()] or None
        return make_edit(asked.replace.split(), asked.scale or None, asked.within or None, centre, codec.model.elements)
    except (ValueError, DataError) as error:
        raise ModelError(f"params of alter: {error}") from None


def _latents(
    codec: Codec, table: Mapping[str, Sequence[object]], sources: tuple[str, ...], edit: Edit | None
) -> list[Tensor | str]:
    """The latent of each row, or why it has none."""
    rows: list[Tensor | str] = []
    crystals: dict[int, Crystal] = {}
    length = max(map(len, table.values()))
    for row, cells in enumerate(zip(*(table.get(name, [None] * length) for name in sources), strict=True)):
        text, source = next(
            ((cell, name) for cell, name in zip(cells, sources, strict=True) if isinstance(cell, str) and cell.strip()),
            ("", ""),
        )
        rows.append(f"row {row}: no {' or '.join(sources)} is given")
        try:
            if source == "latent":
                if edit:
                    raise CrystalError(f"row {row}: a latent has no atoms to replace, give a cif")
                rows[row] = _vector(text, row, codec.model.model.latent_size)
            elif source == "cif":
                spec = codec.model.grid
                crystal = parse_cif(text, f"row {row}", spec.max_atoms)
                crystals[row] = representable(edit(crystal) if edit else crystal, spec)
        except DataError as error:
            rows[row] = str(error)
    for row, latent in zip(crystals, _encoded(codec, list(crystals.values())), strict=True):
        rows[row] = latent
    return rows


def _vector(text: str, row: int, size: int) -> Tensor:
    """A latent from JSON."""
    try:
        latent = torch.tensor(json.loads(text), dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise CrystalError(f"row {row}: latent is no JSON list of numbers") from None
    if latent.shape != (size,) or not latent.isfinite().all():
        raise CrystalError(f"row {row}: latent has the shape {list(latent.shape)}, the model takes {size} finite numbers")
    return latent


def _encoded(codec: Codec, crystals: Sequence[Crystal]) -> list[Tensor | str]:
    """Encoded together; one by one where that fails, so that the one it fails for is known."""
    try:
        return list(encode(codec, crystals))
    except CrystalError as error:
        if len(crystals) == 1:
            return [str(error)]
        return [found for crystal in crystals for found in _encoded(codec, [crystal])]


def _between(start: Tensor | str, stop: Tensor | str, asked: Params, codec: Codec) -> list[Tensor | str]:
    for end in (start, stop):
        if isinstance(end, str):
            return [end] * asked.steps
    assert isinstance(start, Tensor) and isinstance(stop, Tensor)
    around = codec.model.prior_mean.cpu().float() if asked.path == "spherical" else None
    return list(interpolate_latents(start.cpu(), stop.cpu(), asked.steps, around))


def _near(codec: Codec, row: Tensor | str, asked: Params) -> list[Tensor | str]:
    if isinstance(row, str):
        return [row] * asked.n
    return list(altered_latents(codec, row, asked.n, asked.radius, asked.seed))


def _decoded(codec: Codec, rows: Sequence[Tensor | str], corrections: int) -> list[Decoded]:
    """What the latents among the rows decode to."""
    there = [row.cpu() for row in rows if isinstance(row, Tensor)]
    ids = [f"row-{place}" for place, row in enumerate(rows) if isinstance(row, Tensor)]
    return list(decode(codec, torch.stack(there), ids, corrections=corrections)) if there else []


def _columns(rows: Sequence[Tensor | str], decoded: Iterable[Decoded] | None) -> dict[str, list[object]]:
    """decoded: what each latent decodes to, or None where only the latents are wanted."""
    found = None if decoded is None else iter(decoded)
    columns: dict[str, list[object]] = {name: [] for name in COLUMNS}
    for row in rows:
        cif, latent, confidence, error = "", "", 0.0, ""
        if isinstance(row, str):
            error = row
        else:
            latent = json.dumps(row.tolist())
            if found is not None:
                made = next(found)
                error = made.reason
                if made.crystal is not None:
                    cif, confidence = write_cif(made.crystal), float(made.confidence_N.mean())
        for name, cell in zip(COLUMNS, (cif, latent, confidence, error), strict=True):
            columns[name].append(cell)
    return columns
