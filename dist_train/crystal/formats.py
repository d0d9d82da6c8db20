"""Files of crystals of every format known here, told apart by their names: CIF, POSCAR, extended XYZ, Parquet, and the
`.structure.json` members of shards."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np

from dist_train.crystal.cif import parse_cif, write_cif
from dist_train.crystal.extxyz import read_extxyz, to_extxyz
from dist_train.crystal.inputs import Source, read_text
from dist_train.crystal.interop import accept
from dist_train.crystal.parquet import parquet_length, read_parquet_rows, write_parquet
from dist_train.crystal.poscar import parse_poscar, to_poscar
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.files import atomic_path

Items = Iterator[Crystal | tuple[str, CrystalError]]

ENDINGS = {
    ".cif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".contcar": "poscar",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".parquet": "parquet",
}
"""Format by the end of a file's name; all but Parquet may be gzipped and end in .gz too."""

STRUCTURE = ".structure.json"
"""Members of shards, which are read here and written by `shards.codec` alone."""

BEGINNINGS = ("poscar", "contcar")  # of names such as POSCAR, CONTCAR.gz or POSCAR_relaxed


def format_of(path: Path | PurePosixPath | Source) -> tuple[str, str]:
    """Format of a file and the id of its crystal, both by its name: ('cif', 'mp-1') of 'mp-1.cif.gz'.

    Raises CrystalError for a name of no known format.
    """
    packed = path.name.lower().endswith(".gz")
    name = path.name[:-3] if packed else path.name
    if name.endswith(STRUCTURE):
        return "structure", name.removesuffix(STRUCTURE)
    for ending, kind in ENDINGS.items():
        if name.lower().endswith(ending) and not (packed and kind == "parquet"):
            return kind, name[: -len(ending)] or name
    if name.lower().startswith(BEGINNINGS):
        return "poscar", name
    raise CrystalError(f"{path}: no known format; names end in {' '.join(ENDINGS)} (.gz) or begin with POSCAR or CONTCAR")


def read_crystals(path: Path | Source, max_atoms: int | None = None, id: str | None = None) -> Items:
    """The crystals of a file in its order; for one that can't be taken its id and what is wrong with it.

    The id is the one that the file states (columns of a table, `id` or `material_id` of an extxyz frame), else `id` or
    the name of the file. A crystal of over `max_atoms` atoms is refused; None takes any number.
    Raises CrystalError for a name of no known format, and nothing else.
    """
    kind, name = format_of(path)
    return _READERS[kind](path, id or name, sys.maxsize if max_atoms is None else max_atoms)


def _single(parse: Callable[[str, str, int], Crystal]) -> Callable[[Path | Source, str, int], Items]:
    """Reader of a file of one crystal, given how its text is parsed."""

    def items(path: Path | Source, id: str, max_atoms: int) -> Items:
        try:
            yield parse(read_text(path, id), id, max_atoms)
        except CrystalError as error:
            yield id, error

    return items


def _parse_structure(text: str, id: str, max_atoms: int) -> Crystal:
    """The crystal of a shard's member, under its own id."""
    try:
        crystal = Crystal.from_json(text)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CrystalError(f"{id}: no structure as in shards: {error!r:.100}") from None
    return accept(replace(crystal, id=str(crystal.id)), max_atoms)


def _read_table(path: Path | Source, id: str, max_atoms: int) -> Items:
    try:
        yield from read_parquet_rows(path, 0, parquet_length(path), max_atoms)
    except DataError as error:
        yield id, CrystalError(f"{id}: {error}")


_READERS: dict[str, Callable[[Path | Source, str, int], Items]] = {
    "cif": _single(parse_cif),
    "poscar": _single(parse_poscar),
    "extxyz": read_extxyz,
    "structure": _single(_parse_structure),
    "parquet": _read_table,
}

_WRITERS = {"cif": write_cif, "poscar": to_poscar, "extxyz": to_extxyz}


def prepare(names: Iterable[str]) -> None:
    """Read a small crystal in the formats of these names, so that no file's time goes into imports."""
    crystal = Crystal("small", 3 * np.eye(3), np.zeros((1, 3)), np.array([1]))
    for kind in {format_of(PurePosixPath(name))[0] for name in names} & _WRITERS.keys():
        text = _WRITERS[kind](crystal).encode()
        list(_READERS[kind](Source("small", partial(BytesIO, text)), "small", 1))


def write_crystal(path: Path, crystal: Crystal) -> None:
    """Write one crystal in the format that the name of the file states, atomically; equal crystals give equal bytes.

    For several in a file: `write_parquet`, or the joined texts of `to_extxyz`. Takes crystals that pass
    `Crystal.checked`. Raises CrystalError for a name of no known format.
    """
    kind, _ = format_of(path)
    if kind == "parquet":
        write_parquet(path, [crystal])
        return
    if kind not in _WRITERS:
        raise CrystalError(f"{path}: a member of shards isn't written by itself; names end in {' '.join(ENDINGS)}")
    content = _WRITERS[kind](crystal).encode()
    with atomic_path(path) as temporary:
        # Without the time of writing, which gzip would put in its header.
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.name.lower().endswith(".gz") else content)
