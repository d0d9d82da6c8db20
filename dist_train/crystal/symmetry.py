"""Crystal systems, by spglib (Togo et al., Sci. Technol. Adv. Mater. Meth. 4, 2384822, 2024)."""

from __future__ import annotations

import os
import warnings

import spglib

from dist_train.crystal.structure import Crystal

SYSTEMS = (
    (2, "triclinic"), (15, "monoclinic"), (74, "orthorhombic"), (142, "tetragonal"), (167, "trigonal"), (194, "hexagonal"),
    (230, "cubic"),
)  # fmt: skip
"""Number of the last space group of each system."""
UNKNOWN = "unknown"


def crystal_system(crystal: Crystal, tolerance_A: float = 0.1) -> str:
    """The crystal system of the space group, atoms within `tolerance_A` of symmetry; 'unknown' where spglib finds none."""
    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # its C code would write to stderr, between the progress bars
    with warnings.catch_warnings():
        # spglib warns at every call that a later version will raise instead of returning None.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            found = spglib.get_symmetry_dataset((crystal.lattice_A, crystal.frac_N3, crystal.numbers_N), symprec=tolerance_A)
        except spglib.error.SpglibError:
            found = None
    return UNKNOWN if found is None else next(name for last, name in SYSTEMS if found.number <= last)
