"""Density grids as files that programs for crystals read: Gaussian cube (ASE, VESTA, pymatgen) and VASP's CHGCAR.

Voxel (i, j, k) of an [n1, n2, n3] grid lies at the fractional coordinates (i / n1, j / n2, k / n3) of a right-handed cell,
so the voxel's edges are the cell vectors over n, oblique or not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.elements import element_code
from dist_train.crystal.frames import spacing_A
from dist_train.crystal.poscar import to_poscar
from dist_train.crystal.structure import Crystal

BOHR_A = 0.529177210903
"""CODATA 2018."""
LOOPS = "OUTER LOOP: X, MIDDLE LOOP: Y, INNER LOOP: Z"
"""ASE takes the order of a cube's axes from its second line, where that has the first two words."""
CUBE_COLUMNS, CHGCAR_COLUMNS = 6, 5

Density = NDArray[np.floating]


def channel_names(spec: GridSpec) -> list[str]:
    """A name for each density channel: 'occupancy', 'period-1' to 'period-7'..."""
    names: list[str] = []
    for kind in spec.channels:
        size = len(spec.element_table[0][1]) if kind == "table" else element_code(kind).shape[1]
        names += [kind] if size == 1 else [f"{kind}-{place:0{len(str(size))}d}" for place in range(1, size + 1)]
    return names


def in_box(crystal: Crystal, spec: GridSpec) -> Crystal:
    """The crystal in the cell that a grid fills: its own, or for a window or unit the cube of the voxels."""
    if spec.frame == "cell":
        return crystal
    assert spec.shape != "adaptive"
    lattice = np.eye(3) * spacing_A(spec) * spec.shape
    return Crystal(crystal.id, lattice, crystal.cart_N3 @ np.linalg.inv(lattice), crystal.numbers_N)


def to_cube(crystal: Crystal, density_DHW: Density, comment: str) -> str:
    """Cube text of a grid that fills the crystal's cell; lengths in bohr, the values as they are, six digits."""
    lines = [" ".join(comment.split()), LOOPS]
    lines.append(f"{len(crystal):5d}" + _row(np.zeros(3)))
    for count, vector in zip(density_DHW.shape, crystal.lattice_A):
        lines.append(f"{count:5d}" + _row(vector / count / BOHR_A))
    for z, position in zip(crystal.numbers_N.tolist(), crystal.cart_N3 / BOHR_A):
        lines.append(f"{z:5d}" + _row(np.array([z, *position])))
    for run in density_DHW.reshape(-1, density_DHW.shape[2]):
        lines += _columns(run, CUBE_COLUMNS, "%13.5e")
    return "\n".join(lines) + "\n"


def to_chgcar(crystal: Crystal, density_DHW: Density) -> str:
    """CHGCAR text of a grid that fills the crystal's cell: a POSCAR, then density times the cell's volume, a fastest."""
    values = density_DHW.astype(np.float64).ravel(order="F") * crystal.volume_A3
    shape = "".join(f"{count:5d}" for count in density_DHW.shape)
    return "\n".join([to_poscar(crystal).rstrip("\n"), "", shape, *_columns(values, CHGCAR_COLUMNS, "%18.11e")]) + "\n"


def _row(values: NDArray[np.float64]) -> str:
    return "".join(f"{value + 0.0:13.7f}" for value in values)


def _columns(values: Density, columns: int, form: str) -> Iterator[str]:
    texts = [form % value for value in values.tolist()]
    return (" ".join(texts[start : start + columns]) for start in range(0, len(texts), columns))
