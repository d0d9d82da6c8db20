"""What the actions of generate that go by properties or atoms share: the search, and what is read off the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import isfinite, nan
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.crystal.frames import representable
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError
from dist_train.generate import encode
from dist_train.models.properties import PropertyHeads
from dist_train.models.reconstruct import Codec
from dist_train.steer import Atoms, atoms_cost, atoms_of, property_cost, search
from dist_train.tables import beware

PROPERTY_COLUMNS = (
    "id", "formula", "property", "unit", "target", "moved_std", "before", "at_latent", "spread", "decoded",
)  # fmt: skip
"""Of properties.csv. moved_std: standard deviations of the labels, along the linear fit, that a known crystal was moved by;
before: of that crystal; at_latent, spread: mean and standard deviation of the heads at the latent that was decoded; decoded:
their mean for the crystal it gave."""


class PropertyRow(NamedTuple):
    """See `PROPERTY_COLUMNS`."""

    id: str
    formula: str
    name: str
    unit: str
    target: float | None
    moved_std: float | None
    before: float | None
    at_latent: float
    spread: float
    decoded: float | None


def named_numbers(option: str, texts: Sequence[str]) -> dict[str, float]:
    """Of 'NAME=NUMBER' each. Raises ConfigError."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = nan
        if not (name and isfinite(value)):
            raise ConfigError(f"{option} {text!r} can't be read: write NAME=NUMBER, such as band_gap=1.5")
        if name in found:
            raise ConfigError(f"{option} {name} is given twice: give it once")
        found[name] = value
    return found


def wanted_atoms(composition: str | None, elements: str | None) -> list[Atoms]:
    """Of a formula or of a list of elements, where one is given. Raises ConfigError."""
    if composition is not None and elements is not None:
        raise ConfigError(f"--composition {composition} says which elements: leave out --elements {elements}")
    return [atoms_of(text, formula) for text, formula in ((composition, True), (elements, False)) if text is not None]


def searched(
    codec: Codec, heads: PropertyHeads | None, targets: dict[str, float], atoms: Sequence[Atoms], n: int, seed: int,
    extrapolate: bool, progress: Callable[[], None],
) -> list[Tensor]:  # fmt: skip
    """At most n latents of crystals with properties and made of atoms as wanted, the nearest first; see `steer.search`.

    Raises ModelError for a property or element that the model lacks, and for a target beyond all labels.
    """
    costs = [atoms_cost(codec, part) for part in atoms]
    if targets:
        assert heads is not None
        costs.append(property_cost(heads, targets, extrapolate))
    found = search(
        codec, lambda latent_NL: torch.stack([cost(latent_NL) for cost in costs]).sum(0), n, seed, progress,
        wanted=lambda crystal: all(part.hold(crystal) for part in atoms),
    )  # fmt: skip
    return [row.latent_L.cpu() for row in found]


def property_rows(
    codec: Codec, heads: PropertyHeads, aims: dict[str, float],
    rows: Sequence[tuple[str, Tensor, Tensor | None, Crystal | None]],
) -> list[PropertyRow]:  # fmt: skip
    """What the heads say of (id, latent, latent of the known crystal, decoded crystal), for each property aimed at."""
    held: dict[int, Crystal] = {}
    for place, (*_, crystal) in enumerate(rows):
        if crystal is not None:
            with suppress(CrystalError):  # the grid can't hold it: nothing can be said
                held[place] = representable(crystal, codec.model.grid)
    after = dict(zip(held, heads.predict(encode(codec, list(held.values()))).value_NP, strict=True))
    found = []
    for place, (id, latent_L, before_L, crystal) in enumerate(rows):
        at = heads.predict(latent_L[None])
        before = None if before_L is None else heads.predict(before_L[None]).value_NP[0]
        for name, aim in aims.items():
            p = heads.place(name)
            value, spread = float(at.value_NP[0, p]), float(at.spread_NP[0, p])
            known, made = (None if values is None else float(values[p]) for values in (before, after.get(place)))
            formula, unit = crystal.formula if crystal else "", heads.properties[p].unit
            target, moved = (aim, None) if before is None else (None, aim)
            found.append(PropertyRow(id, formula, name, unit, target, moved, known, value, spread, made))
    return found


def property_lines(heads: PropertyHeads, rows: Sequence[PropertyRow], targets: bool, listed: int) -> list[str]:
    """For the terminal: how far the heads can be believed, and what they say of each crystal."""
    lines: list[str] = []
    for name in dict.fromkeys(row.name for row in rows):
        known = heads.properties[heads.place(name)]
        own = [row for row in rows if row.name == name]
        lines.append(
            f"{name}, {known.unit or 'no unit'}: read off latents with a mean absolute error of {known.mae:.4g} on "
            f"{known.n_held_out} crystals held out ({known.mae_median:.4g} for the same number everywhere)"
        )
        lines += beware(known)
        aim = (
            f"target {own[0].target:g}"
            if targets
            else f"moved by {own[0].moved_std:+g} standard deviations of {known.std:.4g}"
        )
        titles = (*(() if targets else ("before",)), "at latent", "spread", "decoded")
        lines.append(f"{name}, {aim}".ljust(44) + "".join(f"{title:>11}" for title in titles))
        for row in own[:listed]:
            numbers = (*(() if targets else (row.before,)), row.at_latent, row.spread, row.decoded)
            cells = ["-" if number is None else f"{number:.4g}" for number in numbers]
            lines.append(f"  {row.id}  {row.formula or 'no crystal'}".ljust(44) + "".join(f"{cell:>11}" for cell in cells))
        lines += [f"  and {len(own) - listed} more, see properties.csv"] * (len(own) > listed)
        at = [abs(row.at_latent - row.target) for row in own if row.target is not None]
        made = [abs(row.decoded - row.target) for row in own if row.target is not None and row.decoded is not None]
        if targets and made:
            off = sum(at) / len(at)
            lines.append(
                f"  mean distance from the target, by the heads: {off:.4g} at latents, {sum(made) / len(made):.4g} of "
                f"the {len(made)} crystals decoded"
            )
    return lines
