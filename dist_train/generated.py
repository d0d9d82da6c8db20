"""What becomes of decoded crystals: snapped to their symmetry, relaxed, described and screened, then written to files.

Every crystal that was asked for stays a row, whether it was made or not.
"""

from __future__ import annotations

import csv
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from dist_train.crystal.cif import parse_cif, write_cif, write_symmetric_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.extxyz import to_extxyz
from dist_train.crystal.interop import density_g_cm3
from dist_train.crystal.metrics import possible, shortest_distance
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.relax import Calculator, Relaxed, relax
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import EXACT_A, TOLERANCE_A, SpaceGroup, conventional, snapped, space_group
from dist_train.errors import CrystalError, kind_of
from dist_train.files import atomic_path, write_text
from dist_train.progress import Stages
from dist_train.screens import Screens

CRYSTALS_PER_PROCESS = 64
"""Fewer are done before another process is there to help."""
RELAX_STEPS = 200
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The first that an archive can state."""
COLUMNS = (
    "id", "status", "screen", "reason", "file", "given_formula", "formula", "atoms",
    "a_A", "b_A", "c_A", "alpha_deg", "beta_deg", "gamma_deg", "volume_A3", "density_g_cm3", "nearest_A",
    "space_group", "space_group_number", "crystal_system", "snapped", "confidence", "latent_error",
    "energy_eV_per_atom", "relax_steps", "relaxed", "relax_failure",
)  # fmt: skip
"""Of crystals.csv. status: written, screened out or failed; nearest_A: shortest distance of two atoms, images included;
latent_error: see `Decoded`, of crystals that were corrected."""


@dataclass(frozen=True)
class Finish:
    """What to do with decoded crystals.

    screens: which to keep; symmetrize_A: snap atoms within so many angstrom of symmetry to it; calculator: of ASE, to relax
    by, at most so many steps; workers: processes for what takes long.
    """

    screens: Screens = field(default_factory=lambda: Screens(()))
    symmetrize_A: float | None = None
    calculator: Calculator | None = None
    relax_steps: int = RELAX_STEPS
    workers: int = 1

    @property
    def tolerance_A(self) -> float:
        """Within which space groups are found."""
        return self.symmetrize_A or TOLERANCE_A


@dataclass(frozen=True)
class Result:
    """One crystal that was asked for.

    crystal: as snapped and relaxed; None where there is none, and then `reason` says why. decoded: as the model gave it.
    original, given: the known crystal of a reconstruction or alteration, and the same with its elements replaced.
    screen: what took the crystal out, '' where nothing did. snapped, relaxed: None where that wasn't asked for, or failed.
    """

    id: str
    decoded: Decoded
    crystal: Crystal | None = None
    original: Crystal | None = None
    given: Crystal | None = None
    reason: str = ""
    screen: str = ""
    snapped: bool | None = None
    relaxed: Relaxed | None = None
    relax_failure: str = ""
    group: SpaceGroup | None = None
    nearest_A: float | None = None
    symmetric: str | None = None

    @property
    def status(self) -> str:
        """What became of it: 'written', 'screened out' or 'failed'."""
        return "failed" if self.crystal is None else "screened out" if self.screen else "written"

    @property
    def title(self) -> str:
        """For people: id, formula and space group, or why there is none."""
        if self.crystal is None:
            return f"{self.id}: {self.reason}"
        return ", ".join([self.id, self.crystal.formula, *([self.group.symbol] if self.group else [])])


def finished(results: Sequence[Result], finish: Finish, stages: Stages) -> list[Result]:
    """Decoded crystals snapped, relaxed, described and screened, in this order; those that failed are left as they are."""
    steps: list[tuple[str, Callable[[Result], Result], int]] = []
    if finish.symmetrize_A is not None:
        steps.append(("snap", partial(_snap, tolerance_A=finish.symmetrize_A), finish.workers))
    if finish.calculator is not None:
        steps.append(("relax", partial(_relax, calculator=finish.calculator, steps=finish.relax_steps), 1))
    steps.append(("symmetry", partial(_describe, tolerance_A=finish.tolerance_A), finish.workers))
    made = [place for place, result in enumerate(results) if result.crystal is not None]
    done = list(results)
    for name, step, workers in steps:
        with stages.stage(name, len(made)) as bar:
            ready = parallel_map(step, [done[place] for place in made], processes(workers, len(made)))
            for result, place in zip(bar.over(ready), made):
                done[place] = result
    if finish.screens.names:
        with stages.stage("screen", len(made)) as bar:
            crystals = [crystal for place in made if (crystal := done[place].crystal) is not None]
            for (screen, reason), place in zip(bar.over(finish.screens.verdicts(crystals)), made):
                done[place] = replace(done[place], screen=screen, reason=reason)
    return done


def processes(workers: int, n: int) -> int:
    """How many of so many processes are worth starting for n crystals."""
    return min(workers, -(-n // CRYSTALS_PER_PROCESS))


def result_of(id: str, decoded: Decoded, original: Crystal | None = None, given: Crystal | None = None) -> Result:
    """What the model gave, without a crystal where that is none that could be."""
    crystal, reason = decoded.crystal, decoded.reason
    if crystal is not None and not possible(crystal):
        crystal, reason = None, "what was decoded is no possible crystal: its cell is too thin, flat or large"
    return Result(id, decoded, crystal, original, given, reason)


def _snap(result: Result, tolerance_A: float) -> Result:
    assert result.crystal is not None
    found = snapped(result.crystal, tolerance_A)
    return replace(result, crystal=found or result.crystal, snapped=found is not None)


def _relax(result: Result, calculator: Calculator, steps: int) -> Result:
    assert result.crystal is not None
    try:
        found = relax(result.crystal, calculator, steps)
    except CrystalError as error:
        return replace(result, relax_failure=str(error).removeprefix(f"{result.crystal.id}: "))
    return replace(result, crystal=found.crystal, relaxed=found)


def _describe(result: Result, tolerance_A: float) -> Result:
    crystal = result.crystal
    assert crystal is not None
    if result.snapped and not result.relaxed:
        tolerance_A = EXACT_A
    group, symmetric = space_group(crystal, tolerance_A), None
    if setting := conventional(crystal, tolerance_A, group):
        text = write_symmetric_cif(setting)
        with suppress(CrystalError):  # the operations, where rounded coordinates make them give another number of atoms
            if len(parse_cif(text, crystal.id, len(setting.crystal))) == len(setting.crystal):
                symmetric = text
    return replace(result, group=group, nearest_A=shortest_distance(crystal), symmetric=symmetric)


# Figures and files


def counts(results: Sequence[Result], finish: Finish) -> dict[str, Any]:
    """What became of the crystals, ready for JSON: asked = written + screened out + failed."""
    states = Counter(result.status for result in results)
    screened = Counter(result.screen for result in results if result.status == "screened out")
    kept = [result for result in results if result.status == "written"]
    given = [result for result in results if result.given is not None]
    groups = Counter(f"{result.group.number} {result.group.symbol}" if result.group else "unknown" for result in kept)
    relaxed = [result.relaxed for result in results if result.relaxed is not None]
    failures = Counter(kind_of(result.relax_failure) for result in results if result.relax_failure)
    return {
        "n_asked": len(results),
        "n_written": states["written"],
        "n_screened_out": states["screened out"],
        "n_failed": states["failed"],
        "screened_out": {name: screened[name] for name in finish.screens.names},
        "failed": dict(Counter(kind_of(result.reason) for result in results if result.status == "failed").most_common()),
        "n_distinct_formulas": len({result.crystal.formula for result in kept if result.crystal is not None}),
        "n_formula_as_given": sum(_as_given(result) for result in given) if given else None,
        "space_groups": dict(groups.most_common()),
        "symmetry_tolerance_A": finish.tolerance_A,
        "n_without_symmetric_cif": sum(result.symmetric is None for result in kept),
        "snapped": _snaps(results) if finish.symmetrize_A is not None else None,
        "relaxation": {
            "n_relaxed": sum(run.converged for run in relaxed),
            "n_stopped": sum(not run.converged for run in relaxed),
            "n_failed": failures.total(),
            "failed": dict(failures.most_common()),
        } if finish.calculator is not None else None,
    }  # fmt: skip


def _snaps(results: Sequence[Result]) -> dict[str, int]:
    tried = [result.snapped for result in results if result.snapped is not None]
    return {"n_snapped": sum(tried), "n_left": len(tried) - sum(tried)}


def _as_given(result: Result) -> bool:
    return result.crystal is not None and result.given is not None and result.crystal.formula == result.given.formula


def table(results: Sequence[Result], names: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """Rows of `COLUMNS`, one for each crystal that was asked for; names: of their files, for those that are written."""
    for result, name in zip(results, names, strict=True):
        crystal, run, group = result.crystal, result.relaxed, result.group
        cell = [None] * 10 if crystal is None else [
            crystal.formula, len(crystal), *crystal.lengths_angles.tolist(), crystal.volume_A3, density_g_cm3(crystal),
        ]  # fmt: skip
        yield (
            result.id, result.status, result.screen, result.reason,
            f"cifs/{name}.cif" if result.status == "written" else None,
            result.given.formula if result.given else None, *cell, result.nearest_A,
            *((group.symbol, group.number, group.system) if group else (None, None, None)), _yes(result.snapped),
            float(result.decoded.confidence_N.mean()) if crystal is not None else None, result.decoded.latent_error,
            *((run.energy_eV / len(run.crystal), run.steps, _yes(run.converged)) if run else (None, None, None)),
            result.relax_failure,
        )  # fmt: skip


def _yes(answer: bool | None) -> str | None:
    return None if answer is None else "yes" if answer else "no"


def write_files(folder: Path, results: Sequence[Result], names: Sequence[str]) -> list[tuple[object, ...]]:
    """CIF files in P1 and with symmetry, one extxyz file, an archive and a table; returns the table's rows.

    names: of the files of each result. Equal crystals give equal bytes.
    """
    written: dict[str, str] = {}
    frames = []
    for part in ("cifs", "cifs_symmetrized"):
        (folder / part).mkdir()
    for result, name in zip(results, names, strict=True):
        if result.status != "written":
            continue
        assert result.crystal is not None
        written[f"cifs/{name}.cif"] = write_cif(result.crystal)
        if result.symmetric is not None:
            written[f"cifs_symmetrized/{name}.cif"] = result.symmetric
        frames.append(to_extxyz(result.crystal))
    for path, text in written.items():
        (folder / path).write_text(text)
    write_text(folder / "crystals.extxyz", "".join(frames))
    rows = list(table(results, names))
    cells = StringIO()
    csv.writer(cells, lineterminator="\n").writerows([COLUMNS, *([_cell(value) for value in row] for row in rows)])
    written["crystals.csv"] = cells.getvalue()
    write_text(folder / "crystals.csv", cells.getvalue())
    _write_zip(folder / "crystals.zip", written)
    return rows


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_zip(path: Path, texts: Mapping[str, str]) -> None:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            member = zipfile.ZipInfo(name, ZIP_TIME)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, text.encode(errors="replace"))
