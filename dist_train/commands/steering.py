"""The tasks of generate that look for crystals with wanted properties or atoms, or move crystals along a property."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.commands.models import bundle_folder, read_crystals, write_cifs
from dist_train.crystal.frames import representable
from dist_train.errors import ConfigError, DataError, ModelError
from dist_train.generate import encode
from dist_train.models.export import read_bundle, read_properties
from dist_train.models.properties import PropertyHeads
from dist_train.models.reconstruct import Codec
from dist_train.progress import Progress
from dist_train.steer import ROUNDS, Found, atoms_cost, atoms_of, move_along, property_cost, returned, search
from dist_train.tables import beware


def check_options(task: str, inputs: Sequence[str], targets: Sequence[str], atoms: str | None, along: Sequence[str]) -> None:
    """Raise ConfigError where options don't go with the task of generate, or are missing."""
    if task == "target" and (inputs or not targets):
        given = f"{len(inputs)} crystals and {len(targets)} targets"
        raise ConfigError(f"generate target takes --target NAME=VALUE and no crystals, {given} were given")
    if atoms and inputs:
        raise ConfigError(f"generate {task} takes no crystals, {len(inputs)} were given")
    if targets and task != "target":
        raise ConfigError(f"--target {targets[0]} is for generate target, not {task}; leave it out")
    if atoms and task not in ("sample", "target"):
        raise ConfigError(f"--composition and --elements ({atoms}) are for generate sample and target, not {task}")
    if along and task != "alter":
        raise ConfigError(f"--along {along[0]} is for generate alter, not {task}; leave it out")


def load(model: str, tracking_uri: str | None) -> tuple[Codec, PropertyHeads | None]:
    """The model of a bundle folder or registry entry, and what reads properties off its latents."""
    with bundle_folder(model, tracking_uri) as folder:
        codec, heads = Codec(read_bundle(folder)[0]), read_properties(folder)
    return codec, heads and heads.to(codec.device)


def search_crystals(
    model: str, tracking_uri: str | None, targets: Sequence[str], composition: str | None, elements: str | None, out: Path,
    n: int, seed: int, extrapolate: bool,
) -> str:  # fmt: skip
    """Crystals with target properties ('NAME=VALUE'), of a formula or of elements; writes CIF files, returns a table.

    Raises ModelError for a property or element that the model lacks, and for a target beyond all labels.
    """
    wanted = named_numbers("--target", targets)
    codec, heads = load(model, tracking_uri)
    costs = []
    if wanted:
        if heads is None:
            raise _lacking(model, next(iter(wanted)))
        costs.append(property_cost(heads, wanted, extrapolate))
    atoms = [atoms_of(text, formula) for text, formula in ((composition, True), (elements, False)) if text is not None]
    costs += [atoms_cost(codec, part) for part in atoms]
    with Progress("search", ROUNDS, "rounds") as bar:
        found = search(
            codec, lambda latent_NL: torch.stack([cost(latent_NL) for cost in costs]).sum(0), n, seed, bar.update,
            wanted=lambda crystal: all(part.hold(crystal) for part in atoms),
        )  # fmt: skip
    found = [_renamed(row, f"target-{seed}-{place:05d}") for place, row in enumerate(found)]
    write_cifs(out, [row.decoded for row in found])
    lines = []
    if heads is not None and wanted and found:
        lines += _about(heads, wanted) + _rows(heads, wanted, found)
    crystals = [row.decoded.crystal for row in found if row.decoded.crystal is not None]
    lines += [f"{sum(map(part.hold, crystals))} of {len(crystals)} crystals are made of {part}" for part in atoms]
    formulas = len({crystal.formula for crystal in crystals})
    return "\n".join([*lines, f"{len(crystals)} of {n} crystals, of {formulas} formulas, written to {out}"])


def alter(model: str, tracking_uri: str | None, inputs: Sequence[str], along: Sequence[str], out: Path) -> str:
    """Crystals moved along properties ('NAME=STANDARD DEVIATIONS of its labels'); writes CIF files, returns a table."""
    moves = named_numbers("--along", along)
    if not (inputs and moves):
        raise DataError(f"generate alter takes crystals and --along NAME=AMOUNT, {len(inputs)} and {len(moves)} were given")
    codec, heads = load(model, tracking_uri)
    if heads is None:
        raise _lacking(model, next(iter(moves)))
    crystals = [representable(crystal, codec.model.grid) for crystal in read_crystals(inputs, codec.model.grid)]
    start_NL = latent_NL = encode(codec, crystals)
    for name, amount in moves.items():
        latent_NL = move_along(latent_NL, heads, name, amount)
    found = returned(codec, latent_NL, [crystal.id for crystal in crystals])
    write_cifs(out, [row.decoded for row in found])
    results = [(crystal.id, row.decoded) for crystal, row in zip(crystals, found, strict=True)]
    failed = [f"{id}: {decoded.reason}" for id, decoded in results if decoded.crystal is None]
    formulas = [crystal.formula for crystal in crystals]
    lines = [*_about(heads, moves), *_rows(heads, moves, found, start_NL, formulas), *failed]
    return "\n".join([*lines, f"{len(crystals) - len(failed)} of {len(crystals)} crystals written to {out}"])


def named_numbers(option: str, texts: Sequence[str]) -> dict[str, float]:
    """Of 'NAME=NUMBER' each. Raises ConfigError."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = np.nan
        if not (name and isfinite(value)):
            raise ConfigError(f"{option} {text!r} can't be read: write NAME=NUMBER, such as band_gap=1.5")
        if name in found:
            raise ConfigError(f"{option} {name} is given twice: give it once")
        found[name] = value
    return found


def _lacking(model: str, name: str) -> ModelError:
    return ModelError(f"the model {model} has no properties, {name!r} was asked for: add it with dist-train fit-properties")


def _renamed(row: Found, id: str) -> Found:
    crystal = row.decoded.crystal
    return row._replace(decoded=replace(row.decoded, crystal=crystal and replace(crystal, id=id)))


def _about(heads: PropertyHeads, names: dict[str, float]) -> list[str]:
    """How far the heads can be believed."""
    lines = []
    for known in (heads.properties[heads.place(name)] for name in names):
        lines.append(
            f"{known.name}, {known.unit or 'no unit'}: read off latents with a mean absolute error of {known.mae:.4g} on "
            f"{known.n_held_out} crystals held out ({known.mae_median:.4g} for the same number everywhere)"
        )
        lines += beware(known)
    return lines


def _rows(
    heads: PropertyHeads, wanted: dict[str, float], found: Sequence[Found], start_NL: Tensor | None = None,
    before: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """For each property a table: read off the latent found, and off that of the crystal which it decodes to."""
    at = heads.predict(torch.stack([row.latent_L for row in found]))
    again = heads.predict(torch.stack([row.again_L for row in found]))
    start = None if start_NL is None else heads.predict(start_NL)
    lines = []
    for name, value in wanted.items():
        p = heads.place(name)
        known = heads.properties[p]
        aim = f"target {value:g}" if start is None else f"moved by {value:+g} standard deviations of {known.std:.4g}"
        titles = (*(("before",) if start is not None else ()), "at latent", "spread", "decoded")
        lines.append(f"{name}, {aim}".ljust(44) + "".join(f"{title:>11}" for title in titles))
        for place, row in enumerate(found):
            crystal = row.decoded.crystal
            numbers = [] if start is None else [float(start.value_NP[place, p])]
            numbers += [float(at.value_NP[place, p]), float(at.spread_NP[place, p])]
            cells = [f"{number:.4g}" for number in numbers] + [f"{again.value_NP[place, p]:.4g}" if crystal else "-"]
            path = " -> ".join([*before[place : place + 1], crystal.formula if crystal else "no crystal"])
            label = f"  {crystal.id if crystal else row.decoded.reason[:20]}  {path}"
            lines.append(label.ljust(44) + "".join(f"{cell:>11}" for cell in cells))
        if start is None:
            off_at, off = ((told.value_NP[:, p] - value).abs().mean() for told in (at, again))
            lines.append(
                f"  mean distance from the target, by the heads: {off_at:.4g} at latents, {off:.4g} of crystals decoded"
            )
    return lines
