"""`Crystal`: an immutable periodic structure, the one value that every other module speaks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import MAX_Z, SYMBOLS
from dist_train.crystal.lattice import MIN_VOLUME_A3, lengths_angles, niggli
from dist_train.errors import CrystalError

FloatArray = NDArray[np.float64]

MAX_EDGE_A = 1000.0


@dataclass(frozen=True, eq=False)
class Crystal:
    """A crystal with periodic boundary conditions in all three directions.

    id: the source's identifier.
    lattice_A: [3, 3], rows are the lattice vectors in angstrom.
    frac_N3: [N, 3] fractional coordinates, any real number (periodic images are equivalent).
    numbers_N: [N] atomic numbers.
    """

    id: str
    lattice_A: FloatArray
    frac_N3: FloatArray
    numbers_N: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, dtype, shape in (
            ("lattice_A", np.float64, (3, 3)),
            ("frac_N3", np.float64, (-1, 3)),
            ("numbers_N", np.int64, (-1,)),
        ):
            value = np.array(getattr(self, name), dtype=dtype).reshape(shape)
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.numbers_N)

    @cached_property
    def volume_A3(self) -> float:
        return float(abs(np.linalg.det(self.lattice_A)))

    @property
    def cart_N3(self) -> FloatArray:
        """[N, 3] Cartesian coordinates in angstrom."""
        return self.frac_N3 @ self.lattice_A

    @property
    def lengths_angles(self) -> FloatArray:
        """[6]: a, b, c in angstrom; alpha, beta, gamma in degrees."""
        return lengths_angles(self.lattice_A)

    @cached_property
    def composition(self) -> dict[int, int]:
        """Atomic number -> atoms in the cell, by rising atomic number."""
        return dict(sorted(Counter(self.numbers_N.tolist()).items()))

    @property
    def formula(self) -> str:
        """Reduced formula, elements in alphabetical order with counts: 'Ga1 Te1'."""
        divisor = gcd(*self.composition.values()) if self.composition else 1
        return " ".join(sorted(f"{SYMBOLS[z]}{n // divisor}" for z, n in self.composition.items()))

    def reduced(self) -> Crystal:
        """The same crystal in its Niggli cell, with coordinates wrapped into [0, 1).

        Raises CrystalError where the reduction doesn't converge.
        """
        lattice = niggli(self.lattice_A)
        if lattice is None:
            raise CrystalError(f"{self.id}: Niggli reduction of the cell failed; edges {self.lengths_angles[:3]} A")
        frac = self.cart_N3 @ np.linalg.inv(lattice)
        return replace(self, lattice_A=lattice, frac_N3=wrap(frac))

    def checked(self, max_atoms: int) -> Crystal:
        """Self, or CrystalError naming what no model can represent (not finite, no volume, unknown element...)."""
        if not len(self):
            raise CrystalError(f"{self.id}: no atoms")
        if len(self) > max_atoms:
            raise CrystalError(f"{self.id}: {len(self)} atoms, at most {max_atoms} are taken")
        if len(self.frac_N3) != len(self):
            raise CrystalError(f"{self.id}: {len(self.frac_N3)} positions for {len(self)} atomic numbers")
        if not (np.isfinite(self.lattice_A).all() and np.isfinite(self.frac_N3).all()):
            raise CrystalError(f"{self.id}: lattice or coordinates are not finite")
        edges = np.linalg.norm(self.lattice_A, axis=1)
        if edges.max() > MAX_EDGE_A:
            raise CrystalError(f"{self.id}: cell edge of {edges.max():.4g} A, at most {MAX_EDGE_A:.0f} A are taken")
        if self.volume_A3 < MIN_VOLUME_A3:
            raise CrystalError(f"{self.id}: cell volume of {self.volume_A3:.3g} A^3, at least {MIN_VOLUME_A3} is needed")
        unknown = sorted({z for z in self.composition if not 1 <= z <= MAX_Z})
        if unknown:
            raise CrystalError(f"{self.id}: unknown atomic numbers {unknown}, known are 1 to {MAX_Z}")
        return self

    def to_json(self) -> str:
        """One line of JSON from which `from_json` rebuilds the same float64 values."""
        return json.dumps(
            {
                "id": self.id,
                "lattice_A": self.lattice_A.tolist(),
                "frac": self.frac_N3.tolist(),
                "numbers": self.numbers_N.tolist(),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Crystal:
        """Inverse of `to_json`; unknown keys are ignored."""
        row: dict[str, Any] = json.loads(text)
        return cls(row["id"], row["lattice_A"], row["frac"], row["numbers"])


def wrap(frac: FloatArray) -> FloatArray:
    """Fractional coordinates moved into [0, 1); -1e-17 becomes 0, not 1."""
    wrapped = frac % 1.0
    return np.where(wrapped >= 1.0, 0.0, wrapped)
