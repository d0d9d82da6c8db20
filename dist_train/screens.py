"""Which of generated crystals to keep: each screen takes out crystals for a reason that can be counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from dist_train.crystal.digest import digests_near
from dist_train.crystal.interop import MIN_DISTANCE_A, primitive_niggli, same_structure
from dist_train.crystal.metrics import shortest_distance, structure_valid
from dist_train.crystal.structure import Crystal
from dist_train.crystal.validity import chemistry, composition_valid
from dist_train.errors import ConfigError, CrystalError

SCREENS = {
    "valid": f"no two atoms closer than {MIN_DISTANCE_A} A, a cell with a volume",
    "distance": "distance=1.0: no two atoms closer than that many angstrom, a cell's own images included",
    "composition": "charges that balance by SMACT's rules; wants pip install 'dist-train[eval]'",
    "novel": "none of the crystals that the model was trained on: nearly exact copies are known by the digests that its "
    "bundle lists, all others that StructureMatcher finds alike by --training",
    "unique": "unlike all that are kept before it, by StructureMatcher with its default tolerances",
}
"""In the order in which they are asked: a crystal is taken out by the first that it fails, and is no one's double then."""

Verdict = tuple[str, str]
"""The screen that takes a crystal out, and why; two empty texts for one that is kept."""
KEPT: Verdict = "", ""


@dataclass(frozen=True)
class Screens:
    """Screens by name; distance_A: of 'distance'; known, training: of 'novel', digests and crystals."""

    names: tuple[str, ...]
    distance_A: float = 0.0
    known: frozenset[int] = field(default=frozenset(), repr=False)
    training: Sequence[Crystal] = field(default=(), repr=False)

    def verdicts(self, crystals: Iterable[Crystal]) -> Iterator[Verdict]:
        """For each crystal in turn; all of them have to be possible (see `metrics.possible`)."""
        kept, training = Lookup(), Lookup(self.training)

        def trained_on(crystal: Crystal) -> str:
            if not self.known.isdisjoint(digests_near(crystal)):
                return "the model was trained on it"
            return f"like {known.id}, which the model was trained on" if (known := training.like(crystal)) else ""

        def doubled(crystal: Crystal) -> str:
            return f"like {other.id}" if (other := kept.like(crystal, keep=True)) else ""

        checks: dict[str, Callable[[Crystal], str]] = {
            "valid": _invalid, "distance": self._too_near, "composition": _unbalanced, "novel": trained_on,
            "unique": doubled,
        }  # fmt: skip
        asked = [(name, checks[name]) for name in SCREENS if name in self.names]
        for crystal in crystals:
            yield next(((name, reason) for name, check in asked if (reason := check(crystal))), KEPT)

    def _too_near(self, crystal: Crystal) -> str:
        nearest = shortest_distance(crystal)
        return f"two atoms {nearest:.3f} A apart, {self.distance_A:g} A are asked for" if nearest < self.distance_A else ""


def parse_screens(texts: Sequence[str]) -> tuple[tuple[str, ...], float]:
    """Names, and angstrom of 'distance=...'. Raises ConfigError in one line, also where a package isn't installed."""
    names, distance = [], 0.0
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in SCREENS or bool(equals) != (name == "distance"):
            known = ", ".join(f"{known}=1.0" if known == "distance" else known for known in SCREENS)
            raise ConfigError(f"--screen {text!r} is none of {known}")
        if equals:
            try:
                distance = float(value)
            except ValueError:
                distance = np.nan
            if not 0 < distance < np.inf:
                raise ConfigError(f"--screen {text}: {value!r} is no distance: give angstrom, such as distance=1.0")
        names.append(name)
    if "composition" in names:
        chemistry()  # tells what to install
    return tuple(dict.fromkeys(names)), distance


def _invalid(crystal: Crystal) -> str:
    return (
        ""
        if structure_valid(crystal)
        else f"two atoms {shortest_distance(crystal):.3f} A apart, less than {MIN_DISTANCE_A} A"
    )


def _unbalanced(crystal: Crystal) -> str:
    return "" if composition_valid(crystal.composition) else f"{crystal.formula}: no charges that balance"


class Lookup:
    """Crystals among which those like a given one are found, by StructureMatcher with its default tolerances.

    Only crystals of one reduced formula and one size of primitive cell can match; primitive cells are made when the first
    crystal of their formula is looked for.
    """

    def __init__(self, crystals: Iterable[Crystal] = ()) -> None:
        self._given: dict[str, list[Crystal]] = {}
        self._cells: dict[str, list[Crystal]] = {}
        for crystal in crystals:
            self._given.setdefault(crystal.formula, []).append(crystal)

    def like(self, crystal: Crystal, keep: bool = False) -> Crystal | None:
        """The first that matches, in their order; keep: the crystal is one of them from now on, if none does."""
        formula = crystal.formula
        if formula not in self._given and formula not in self._cells:
            if keep:
                self._given[formula] = [crystal]
            return None
        cells = self._cells.setdefault(formula, [])
        cells += map(_primitive, self._given.pop(formula, ()))
        cell = _primitive(crystal)
        for other in cells:
            with suppress(CrystalError):
                if len(other) == len(cell) and same_structure(cell, other):
                    return other
        if keep:
            cells.append(cell)
        return None


def _primitive(crystal: Crystal) -> Crystal:
    with suppress(CrystalError):  # pymatgen finds no primitive cell: the given one is compared
        return primitive_niggli(crystal)
    return crystal
