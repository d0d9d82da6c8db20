"""Known crystals with other elements, everywhere or around one place.

A grid is a sum over atoms of each one's Gaussian times the element's code, so putting another element's code on some of
the atoms edits the density around them in every channel. With the Z-weighted density alone this is its rescaling there by
the ratio of the atomic numbers, by which Hoffmann et al. (2019) changed elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import NUMBERS, SYMBOLS
from dist_train.crystal.lattice import compact_lattice, periodic_distances
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError


@dataclass(frozen=True)
class Region:
    """A sphere around fractional coordinates in the cell that a crystal is given in, and around all their images."""

    centre_3: tuple[float, float, float]
    radius_A: float

    def distances(self, crystal: Crystal) -> NDArray[np.float64]:
        """[N] angstrom from the atoms to the centre or its nearest image."""
        lattice = compact_lattice(crystal.lattice_A)
        change = crystal.lattice_A @ np.linalg.inv(lattice)
        return periodic_distances(lattice, crystal.frac_N3 @ change, np.array([self.centre_3]) @ change)[:, 0]

    def __str__(self) -> str:
        return f"within {self.radius_A:g} A of {' '.join(f'{x:g}' for x in self.centre_3)}"


@dataclass(frozen=True)
class Edit:
    """Elements to replace (old -> new), then a factor of the density (see `scaled`), both in a region or everywhere.

    elements: that a model knows.
    """

    others: Mapping[int, int]
    factor: float | None
    region: Region | None
    elements: Sequence[int]

    def __call__(self, crystal: Crystal) -> Crystal:
        """The crystal edited; the same where there is nothing to do. Raises DataError as `replaced` and `scaled` do."""
        if self.others:
            crystal = replaced(crystal, self.others, self.region)
        return crystal if self.factor is None else scaled(crystal, self.factor, self.elements, self.region)


def make_edit(
    pairs: Sequence[str],
    factor: float | None,
    radius_A: float | None,
    centre: Sequence[float] | None,
    elements: Sequence[int],
) -> Edit:
    """The edit of texts such as 'Ti=Zr', a factor, and a region, which needs both its numbers. Raises DataError."""
    others, region = parse_replacements(pairs, elements), None
    if (radius_A is None) != (centre is None):
        raise DataError("within (a radius) and of (fractional coordinates) describe a region together: give both or none")
    if radius_A is not None and centre is not None:
        if len(centre) != 3 or not np.isfinite(centre).all():
            raise DataError(f"of {' '.join(map(str, centre))}: three fractional coordinates are needed, such as 0.5 0.5 0.5")
        if not others and factor is None:
            raise DataError(f"within {radius_A:g} is of replace or scale, and neither is given")
        region = Region((centre[0], centre[1], centre[2]), radius_A)
    return Edit(others, factor, region, elements)


def parse_replacements(pairs: Sequence[str], elements: Sequence[int]) -> dict[int, int]:
    """Atomic numbers, old -> new, of texts such as 'Ti=Zr'; new ones have to be among the elements that a model knows.

    Raises DataError in one line.
    """
    found: dict[int, int] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not equals:
            raise DataError(f"replace {pair!r} is no pair of elements: give OLD=NEW, such as Ti=Zr")
        for symbol in (old, new):
            if symbol not in NUMBERS:
                raise DataError(f"replace {pair}: {symbol!r} is no element: give its symbol, such as Ti")
        if NUMBERS[new] not in elements:
            known = " ".join(SYMBOLS[z] for z in sorted(elements))
            raise DataError(f"replace {pair}: the model was trained without {new}, it knows {known}")
        if NUMBERS[old] in found:
            raise DataError(f"replace {pair}: {old} is replaced twice, give one element for it")
        found[NUMBERS[old]] = NUMBERS[new]
    return found


def replaced(crystal: Crystal, others: Mapping[int, int], region: Region | None = None) -> Crystal:
    """The crystal with other elements (old -> new) in a region, or everywhere.

    Raises DataError where there is no atom of these elements.
    """
    inside = _inside(crystal, region)
    chosen = inside & np.isin(crystal.numbers_N, list(others))
    if not chosen.any():
        told = " or ".join(SYMBOLS[z] for z in others)
        there = _counted(crystal.numbers_N[inside])
        raise DataError(f"{crystal.id}: no {told} to replace {region or 'in the crystal'}, which holds {there}")
    numbers = [others[z] if there else z for z, there in zip(crystal.numbers_N.tolist(), chosen)]
    return replace(crystal, numbers_N=np.array(numbers))


def scaled(crystal: Crystal, factor: float, elements: Sequence[int], region: Region | None = None) -> Crystal:
    """The crystal whose Z-weighted density is `factor` times as high in a region, or everywhere, as far as elements allow.

    Each atom there becomes that of the elements whose atomic number is nearest to `factor` times its own. Raises DataError
    where that changes none.
    """
    inside, known = _inside(crystal, region), np.array(sorted(elements))
    nearest = known[np.abs(known[:, None] - factor * crystal.numbers_N).argmin(0)]
    numbers = np.where(inside, nearest, crystal.numbers_N)
    if (numbers == crystal.numbers_N).all():
        raise DataError(
            f"{crystal.id}: of the elements that the model knows, none is nearer to a density {factor:g} times as high "
            f"{region or 'in the crystal'} than those that are there: give another factor"
        )
    return replace(crystal, numbers_N=numbers)


def _inside(crystal: Crystal, region: Region | None) -> NDArray[np.bool_]:
    """[N] atoms in the region. Raises DataError where there are none."""
    if region is None:
        return np.ones(len(crystal), bool)
    distances = region.distances(crystal)
    if not (distances <= region.radius_A).any():
        nearest = f"the nearest is {distances.min():.3f} A away"
        raise DataError(f"{crystal.id}: no atom lies {region}, {nearest}: widen --within or move --of")
    return np.asarray(distances <= region.radius_A)


def _counted(numbers_N: NDArray[np.int64]) -> str:
    """'Sr 1, Ti 1, O 3' by rising atomic number."""
    found, counts = np.unique(numbers_N, return_counts=True)
    return ", ".join(f"{SYMBOLS[z]} {count}" for z, count in zip(found, counts))
