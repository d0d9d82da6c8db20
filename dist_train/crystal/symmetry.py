"""Space groups and crystal systems, by spglib (Togo et al., Sci. Technol. Adv. Mater. Meth. 4, 2384822, 2024)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import spglib
from numpy.typing import NDArray

from dist_train.crystal.metrics import shortest_distance
from dist_train.crystal.structure import Crystal, wrap

SYSTEMS = (
    (2, "triclinic"), (15, "monoclinic"), (74, "orthorhombic"), (142, "tetragonal"), (167, "trigonal"), (194, "hexagonal"),
    (230, "cubic"),
)  # fmt: skip
"""Number of the last space group of each system."""
UNKNOWN = "unknown"
TOLERANCE_A = 0.1
"""How far atoms may be from symmetry. Networks place them to some 0.03 A."""
EXACT_A = 1e-3
"""The same for a crystal that was snapped to its symmetry."""
ROUGHLY_A = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""How far atoms may be from the symmetries that a sample is tried in."""


class SpaceGroup(NamedTuple):
    """Number in the International Tables, 1 to 230, and Hermann-Mauguin symbol: 221, 'Pm-3m'."""

    number: int
    symbol: str

    def __str__(self) -> str:
        return f"{self.symbol} ({self.number})"

    @property
    def system(self) -> str:
        """The crystal system."""
        return next(name for last, name in SYSTEMS if self.number <= last)


def space_group(crystal: Crystal, tolerance_A: float = TOLERANCE_A) -> SpaceGroup | None:
    """The space group of a crystal whose atoms are within `tolerance_A` of symmetry; None where spglib finds none."""
    found = _asked(spglib.get_symmetry_dataset, crystal, tolerance_A)
    return None if found is None else SpaceGroup(found.number, found.international)


def crystal_system(crystal: Crystal, tolerance_A: float = TOLERANCE_A) -> str:
    """The crystal system of the space group, atoms within `tolerance_A` of symmetry; 'unknown' where spglib finds none."""
    group = space_group(crystal, tolerance_A)
    return UNKNOWN if group is None else group.system


def snapped(crystal: Crystal, tolerance_A: float) -> Crystal | None:
    """The crystal exactly in the symmetry that it has within `tolerance_A`: spglib's standardised primitive cell.

    None where spglib makes none, or one of another space group or formula.
    """
    group, made = space_group(crystal, tolerance_A), _standardised(crystal, tolerance_A, primitive=True)
    return made if made and group is not None and space_group(made, EXACT_A) == group else None


class Symmetrized(NamedTuple):
    """order: operations of the space group in the crystal's cell."""

    order: int
    crystal: Crystal


def symmetrized(crystal: Crystal, tolerances_A: Sequence[float] = ROUGHLY_A) -> list[Symmetrized]:
    """The crystal exactly in symmetries that it has within these tolerances, in its own cell, at its own origin.

    Atoms and cell are means over what the operations make of them. In rising order, from 2 on, each once.
    """
    found: list[Symmetrized] = []
    for tolerance_A in tolerances_A:
        group = _asked(spglib.get_symmetry_dataset, crystal, tolerance_A)
        if group is None or len(group.rotations) <= (found[-1].order if found else 1):
            continue
        if (made := _averaged(crystal, group.rotations, group.translations)) is not None:
            found.append(Symmetrized(len(group.rotations), made))
    return found


def _averaged(crystal: Crystal, rotations: NDArray[np.integer], translations: NDArray[np.floating]) -> Crystal | None:
    """None where an operation has two atoms in one place: it is no symmetry of this crystal."""
    frac_N3, lattice = crystal.frac_N3, crystal.lattice_A
    metric = lattice @ lattice.T
    other_NN = crystal.numbers_N[:, None] != crystal.numbers_N
    shift_N3 = np.zeros_like(frac_N3)
    for rotation, translation in zip(rotations, translations, strict=True):
        away_NN3 = (frac_N3 @ rotation.T + translation)[:, None] - frac_N3
        away_NN3 -= away_NN3.round()
        square_NN = np.einsum("ijk,kl,ijl->ij", away_NN3, metric, away_NN3)
        onto_N = np.where(other_NN, np.inf, square_NN).argmin(1)
        if len(np.unique(onto_N)) < len(onto_N):
            return None
        shift_N3[onto_N] += away_NN3[np.arange(len(onto_N)), onto_N]
    mean_metric = np.mean([rotation.T @ metric @ rotation for rotation in rotations], axis=0)
    rows = np.linalg.cholesky(mean_metric)
    left, _, right = np.linalg.svd(rows.T @ lattice)  # the turn that brings these rows nearest to the old ones
    return replace(crystal, lattice_A=rows @ left @ right, frac_N3=wrap(frac_N3 + shift_N3 / len(rotations)))


class Setting(NamedTuple):
    """A crystal in its conventional cell, exactly in its symmetry.

    operations: of the space group in that cell, centrings included, as CIF writes them: '-x, y+1/2, z', the identity first;
    sites: of the atoms, one of each set that the operations make of one another.
    """

    crystal: Crystal
    group: SpaceGroup
    operations: tuple[str, ...]
    sites: NDArray[np.int64]


def conventional(crystal: Crystal, tolerance_A: float = TOLERANCE_A, group: SpaceGroup | None = None) -> Setting | None:
    """The crystal in spglib's standardised conventional cell, in the very symmetry that it has within `tolerance_A`.

    group: its space group within that, where it is known. None where spglib makes no such cell, or one of another group.
    """
    group, made = group or space_group(crystal, tolerance_A), _standardised(crystal, tolerance_A, primitive=False)
    if group is None or made is None:
        return None
    exact = _asked(spglib.get_symmetry_dataset, made, EXACT_A)
    if exact is None or exact.number != group.number:
        return None
    operations = tuple(map(_operation, exact.rotations.tolist(), exact.translations.tolist()))
    return Setting(made, group, operations, np.unique(exact.equivalent_atoms))


def _standardised(crystal: Crystal, tolerance_A: float, primitive: bool) -> Crystal | None:
    """spglib's primitive or conventional cell, idealised; None where it finds none, or loses atoms."""
    found = _asked(spglib.standardize_cell, crystal, tolerance_A, to_primitive=primitive, no_idealize=False)
    if found is None:
        return None
    made = replace(crystal, lattice_A=found[0], frac_N3=found[1], numbers_N=found[2])
    return made if made.formula == crystal.formula else None


def _operation(rotation: list[list[int]], translation: list[float]) -> str:
    """A symmetry operation as CIF writes it."""
    parts = []
    for row, shift in zip(rotation, translation, strict=True):
        text = "".join(f"{'-' if factor < 0 else '+'}{axis}" for factor, axis in zip(row, "xyz", strict=True) if factor)
        fraction = Fraction(shift).limit_denominator(24) % 1
        parts.append(text.removeprefix("+") + (f"+{fraction}" if fraction else ""))
    return ", ".join(parts)


def _asked(function: Callable[..., Any], crystal: Crystal, tolerance_A: float, **options: Any) -> Any:
    """What a function of spglib finds in a crystal, None where it finds nothing.

    Within half the distance of the nearest atoms at most: beyond, one atom could be either of two, and spglib 2.8 crashes.
    """
    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # its C code would write to stderr, between the progress bars
    with warnings.catch_warnings():
        # spglib warns at every call that a later version will raise instead of returning None.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            symprec = min(tolerance_A, shortest_distance(crystal) / 2)
            return function((crystal.lattice_A, crystal.frac_N3, crystal.numbers_N), symprec=symprec, **options)
        except spglib.error.SpglibError:
            return None
