"""Energies and relaxed crystals by any calculator of ASE (Larsen et al., J. Phys.: Condens. Matter 29, 273002, 2017).

The package needs no calculator: the user names one that is installed, an empirical or a machine-learnt potential.
"""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

from dist_train.crystal.interop import from_ase, one_line, to_ase
from dist_train.crystal.metrics import possible
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError

Calculator: TypeAlias = Any
"""What ASE takes for one."""

MAX_FORCE = 0.05
"""eV per angstrom below which a crystal is relaxed; the stress, times the volume over the number of atoms, too."""


@dataclass(frozen=True)
class Relaxed:
    """A crystal after at most so many steps, its energy in eV of the whole cell, and whether forces were small by then."""

    crystal: Crystal
    energy_eV: float
    steps: int
    converged: bool


def make_calculator(name: str) -> Calculator:
    """What 'MODULE:FACTORY' makes without arguments, such as 'ase.calculators.emt:EMT'. Raises ConfigError in one line."""
    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise ConfigError(f"--relax {name!r} names no calculator: give MODULE:FACTORY, such as ase.calculators.emt:EMT")
    try:
        return getattr(importlib.import_module(module), factory)()
    except ModuleNotFoundError as error:
        raise ConfigError(f"--relax {name}: there is no module {error.name}; install the package that has it") from None
    except Exception as error:  # whatever a module that is not ours does while it is imported and called
        raise ConfigError(f"--relax {name} can't be made: {type(error).__name__}: {one_line(error)}") from error


def relax(crystal: Crystal, calculator: Calculator, steps: int, max_force: float = MAX_FORCE) -> Relaxed:
    """Atoms and cell moved downhill for at most `steps` steps of FIRE; the cell stays where the calculator knows no stress.

    No step gives the energy alone. Raises CrystalError where the calculator fails, or leaves no possible crystal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            atoms, done, converged = _run(crystal, calculator, steps, max_force)
            energy = float(atoms.get_potential_energy())
        except (MemoryError, CrystalError):
            raise
        except Exception as error:  # calculators raise whatever went wrong first inside
            raise CrystalError(f"{crystal.id}: {type(error).__name__}: {one_line(error)}") from error
    if not math.isfinite(energy):
        raise CrystalError(f"{crystal.id}: the energy is {energy} eV")
    moved = from_ase(atoms, crystal.id) if done else crystal
    if not possible(moved):
        raise CrystalError(f"{crystal.id}: relaxed to no possible crystal, edges {moved.lengths_angles[:3].round(2)} A")
    return Relaxed(moved, energy, done, converged)


def _run(crystal: Crystal, calculator: Calculator, steps: int, max_force: float) -> tuple[Any, int, bool]:
    """(the atoms, steps done, whether it ended well)."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE

    atoms = to_ase(crystal)
    atoms.calc = calculator
    moving = FrechetCellFilter(atoms) if "stress" in calculator.implemented_properties else atoms
    with FIRE(moving, logfile=None) as optimiser:
        converged = bool(optimiser.run(fmax=max_force, steps=steps))
        return atoms, int(optimiser.nsteps), converged
