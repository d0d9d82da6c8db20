"""POSCAR and CONTCAR files of VASP to crystals and back.

pymatgen reads the atoms. What it takes on trust or gets wrong is done here before: it makes up elements for files
without them, takes '1.' for hydrogen, repeats elements by whatever numbers of atoms are stated, ignores those without a
number, knows one scale factor only and takes a negative one, a volume, for a factor of Cartesian coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dist_train.crystal import interop
from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.lattice import FloatArray
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError

MAX_COMMENT = 40  # VASP cuts the rest


def parse_poscar(text: str, id: str, max_atoms: int) -> Crystal:
    """The crystal of a POSCAR text, atoms in the order of the file.

    Takes VASP 5 and 6 files (symbols and numbers of atoms in one line or several), VASP 4 files whose atoms have their
    symbols behind the coordinates; Direct or Cartesian, with or without selective dynamics; one scale factor, three,
    or a volume as a negative one. Velocities are ignored.
    Raises CrystalError with the reason for everything else.
    """
    lines = [line.partition("#")[0].partition("!")[0].strip() for line in text.rstrip().splitlines()]
    _check_head(lines, id, max_atoms)
    # Fractional coordinates don't depend on the scale: pymatgen reads the file without it.
    crystal, named = interop.from_poscar("\n".join(["crystal", "1.0", *lines[2:]]), id)
    if not named:
        raise CrystalError(f"{id}: VASP 4 file without elements; write their symbols in a line before their numbers")
    return interop.accept(replace(crystal, lattice_A=crystal.lattice_A * _scale(lines[1], crystal, id)), max_atoms)


def _check_head(lines: Sequence[str], id: str, max_atoms: int) -> None:
    """Refuse a file whose elements and numbers of atoms, from the sixth line on, don't fit each other or its length."""
    symbols: list[str] = []
    counts: list[int] = []
    mode, rest = "", iter(lines[5:])
    for mode in rest:
        try:
            counts += [int(word) for word in mode.split()]
        except ValueError:
            if counts:
                break
            symbols += mode.split()
    if not counts or min(counts) < 0:
        raise CrystalError(f"{id}: no numbers of atoms from the sixth line on; empty, truncated or no POSCAR")
    if symbols and len(symbols) != len(counts):
        raise CrystalError(f"{id}: {len(symbols)} elements {' '.join(symbols)[:40]!r} with {len(counts)} numbers of atoms")
    for symbol in symbols:
        if re.split("[/_]", symbol)[0] not in NUMBERS:  # of a POTCAR: 'Na_pv/474ac0d'
            raise CrystalError(f"{id}: unknown element or isotope {symbol[:40]!r}")
    if (total := sum(counts)) > max_atoms:
        raise CrystalError(f"{id}: {total} atoms, at most {max_atoms} are taken")
    if not total:
        raise CrystalError(f"{id}: no atoms")
    rows = len(list(rest)) - mode.lower().startswith("s")
    if total > rows:
        raise CrystalError(f"{id}: truncated, {max(rows, 0)} lines for {total} atoms")
    if not mode[:1].isalpha():
        raise CrystalError(f"{id}: {mode[:40]!r} where Direct or Cartesian is needed")


def _scale(line: str, unscaled: Crystal, id: str) -> FloatArray:
    """[1] or [3] factors of the Cartesian components of all lattice vectors."""
    try:
        factors = np.array([float(word) for word in line.split()])
    except ValueError:
        factors = np.empty(0)
    volume = len(factors) == 1 and factors[0] < 0
    if not np.isfinite(factors).all() or len(factors) not in (1, 3) or not (volume or (factors > 0).all()):
        raise CrystalError(f"{id}: scale {line[:40]!r}; one factor, three positive ones or a negative volume is needed")
    if not volume:
        return factors
    if not unscaled.volume_A3 > 0:
        raise CrystalError(f"{id}: lattice vectors without a volume can't be scaled to {-factors[0]:.4g} A^3")
    return np.asarray(np.cbrt(-factors / unscaled.volume_A3))


def to_poscar(crystal: Crystal) -> str:
    """POSCAR text for VASP 5 and later, 16 decimals, atoms in their order; equal crystals give equal bytes.

    An element is named once for each run of its atoms: VASP needs its POTCAR as often. A left-handed cell, which VASP
    refuses, is inverted with its coordinates. Takes crystals that pass `Crystal.checked`.
    """
    comment = re.sub(r"[^A-Za-z0-9._+/-]", "_", crystal.id)[:MAX_COMMENT] or "crystal"
    return interop.to_poscar(interop.right_handed(crystal), comment)
