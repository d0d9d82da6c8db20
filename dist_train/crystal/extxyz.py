"""Extended XYZ files, of any number of frames, to crystals and back.

ASE reads the frames. They are told apart here, so that a bad one leaves the others, and of their comment lines ASE gets
what concerns the crystal only: it fails on results that it doesn't like, and takes absurd columns on trust.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from dist_train.crystal import inputs, interop
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError

ID_KEYS = ("id", "material_id")
MAX_ID = 200
MAX_BAD_FRAMES = 1000
"""In a row, then the file is given up: one of no size may hold millions."""

_PERIODIC = {"T", "TRUE", "1", "TTT"}
_COLUMNS = {"species": ["S", "1"], "Z": ["I", "1"], "pos": ["R", "3"]}
_COUNT = re.compile(r"\s*\d{1,18}\s*")
_ITEM = re.compile(
    r"""(?<![\w-])(?P<key>[A-Za-z_][\w-]*+)\s*+=\s*+
    (?P<value>"(?:[^"\\]|\\.)*+"? | '(?:[^'\\]|\\.)*+'? | \{[^}]*+\}? | \[[^]]*+\]? | \S+)""",
    re.VERBOSE,
)


def read_extxyz(path: Path | inputs.Source, id: str, max_atoms: int) -> Iterator[Crystal | tuple[str, CrystalError]]:
    """The crystals of a `.xyz`, `.extxyz` or gzipped file, frame by frame; for a bad one its id and what is wrong.

    A frame's id is its `id` or `material_id`; without one, `id` itself or, in a file of several frames,
    `id-00001` and so on. Of a file that can't be read to its end, the frames before are.
    """
    frames = _frames(path, id)
    first = list(islice(frames, 2))
    bad = 0
    for number, frame in enumerate(chain(first, frames), 1):
        name = f"{id}-{number:05d}" if len(first) > 1 else id
        try:
            if isinstance(frame, str):
                raise CrystalError(f"{name}: {frame}")
            items = {match["key"]: match[0] for match in _ITEM.finditer("".join(frame[1:2]).strip())}
            name = next((given for key in ID_KEYS if (given := _value(items.get(key, ""))[:MAX_ID])), name)
            yield _parse_frame(frame, items, name, max_atoms)
            bad = 0
        except CrystalError as error:
            yield name, error
            bad += 1
        if bad == MAX_BAD_FRAMES:
            yield id, CrystalError(f"{id}: {bad} bad frames in a row, no more are read")
            return
    if not first:
        yield id, CrystalError(f"{id}: empty file")


def _frames(path: Path | inputs.Source, id: str) -> Iterator[list[str] | str]:
    """The lines of each frame, or in its place a word on what is no frame; none is over a cap."""
    try:
        with inputs.open_input(path, id) as file:
            yield from _split(file)
    except CrystalError as error:
        yield str(error).removeprefix(f"{id}: ")


def _split(file: BinaryIO) -> Iterator[list[str] | str]:
    """As `_frames`: one ends with its last atom or, where atoms are missing, before the next line that is a number."""
    held = 0

    def read() -> str:
        nonlocal held
        raw = file.readline(inputs.MAX_FILE_BYTES + 1 - held)
        held += len(raw)
        if held > inputs.MAX_FILE_BYTES:
            raise CrystalError(f"over {inputs.MAX_FILE_BYTES} bytes without the end of a frame, no more are read")
        return raw.decode(errors="replace")  # what isn't UTF-8 may be a comment

    line = read().removeprefix("\ufeff")
    while line:
        if not line.strip():
            line = read()
        elif _COUNT.fullmatch(line):
            atoms, frame = int(line), [line]
            line = read()
            while line and len(frame) < atoms + 2 and not _COUNT.fullmatch(line):
                frame.append(line)
                line = read()
            yield frame
            held = len(line)
        else:
            reason = f"a number of atoms is needed where the file has {line.strip()[:40]!r}"
            while line and not _COUNT.fullmatch(line):
                line = read()
            yield reason
            held = len(line)


def _value(item: str) -> str:
    """The value of a 'key=value' without its quotes or brackets."""
    return item.partition("=")[2].strip(" \t\"'{}[]")


def _parse_frame(frame: Sequence[str], items: dict[str, str], id: str, max_atoms: int) -> Crystal:
    """The crystal of a frame's lines; CrystalError where there is none."""
    atoms, rows = int(frame[0]), frame[2:]
    if not atoms:
        raise CrystalError(f"{id}: no atoms")
    if atoms > max_atoms:
        raise CrystalError(f"{id}: {atoms} atoms, at most {max_atoms} are taken")
    if len(rows) < atoms:
        raise CrystalError(f"{id}: truncated, {len(rows)} of {atoms} atoms are there")
    if "Lattice" not in items:
        raise CrystalError(f'{id}: no Lattice="..." in the comment line; only periodic crystals are taken')
    pbc = _value(items.get("pbc", "pbc=T")).upper().replace(",", " ").split()
    if len(pbc) not in (1, 3) or {*pbc} - _PERIODIC:
        raise CrystalError(f"{id}: {items['pbc'][:40]}; only what is periodic in all three directions is taken")
    if "Properties" in items:
        _check_columns(_value(items["Properties"]), len(rows[0].split()), id)
    comment = " ".join(items[key] for key in ("Lattice", "Properties") if key in items)
    return interop.accept(interop.from_extxyz(f"{atoms}\n{comment}\n{''.join(rows)}", id), max_atoms)


def _check_columns(properties: str, values: int, id: str) -> None:
    """Refuse 'name:type:columns' triples that name no elements, no positions or more columns than an atom has."""
    fields = properties.split(":")
    columns = {name: fields[at + 1 : at + 3] for at, name in enumerate(fields) if at % 3 == 0}
    wrong = [name for name, kind in columns.items() if _COLUMNS.get(name, kind) != kind]
    if wrong or "pos" not in columns or not {"species", "Z"} & {*columns}:
        needed = ", ".join(":".join([name, *kind]) for name, kind in _COLUMNS.items())
        raise CrystalError(f"{id}: Properties {properties[:60]!r}; pos and species or Z are needed, as {needed}")
    widths = [kind[-1] if len(kind) == 2 and kind[-1].isdecimal() else "" for kind in columns.values()]
    if not all(0 < len(width) < 9 for width in widths) or sum(map(int, widths)) > values:
        raise CrystalError(f"{id}: Properties {properties[:60]!r} don't fit the {values} columns of the first atom")


def to_extxyz(crystal: Crystal) -> str:
    """One frame, its id in the comment line; positions with 8 decimals of an angstrom, atoms in their order.

    Frames may be joined to a file of several. Equal crystals give equal bytes. Takes crystals that pass
    `Crystal.checked`.
    """
    id = re.sub(r"[^A-Za-z0-9._+/: -]", "_", crystal.id).strip() or "crystal"
    # A negative zero, equal to the positive one, is written alike.
    crystal = replace(crystal, lattice_A=crystal.lattice_A + 0.0, frac_N3=crystal.frac_N3 + 0.0)
    return interop.to_extxyz(crystal, {"id": id})
