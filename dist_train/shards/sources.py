"""Chunks of inputs and how their files, members and rows are opened and read, one unit after another.

Archives are read in place: nothing is extracted, and no path in them is used as one.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import fsspec

from dist_train.crystal import formats, inputs, parquet
from dist_train.crystal.inputs import Source
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError

_TARS: dict[str, Callable[[Any], Any] | None] = {
    ".tar": None, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": lzma.open,
}  # fmt: skip
TAR_ENDINGS = tuple(_TARS)

Item = Crystal | CrystalError


@dataclass(frozen=True)
class Chunk:
    """Inputs of one scan task.

    input: as given in `data.inputs`. kind: files below a folder, members of an archive, or rows of a table.
    place: path or URL of the folder, archive or table. prefix: of the ids, where several archives share an input.
    names: files or members. spans: offset and bytes of each member in a (decompressed) tar, its number in a zip.
    start, stop: rows of a table.
    """

    input: str
    kind: Literal["files", "tar", "zip", "table"]
    place: str
    names: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    start: int = 0
    stop: int = 0
    prefix: str = ""

    def __len__(self) -> int:
        return self.stop - self.start or len(self.names)

    def cut(self, start: int, stop: int) -> Chunk:
        """Its files, members or rows start <= number < stop, or as many of them as there are."""
        if self.kind == "table":
            return replace(self, start=self.start + start, stop=min(self.start + stop, self.stop))
        return replace(self, names=self.names[start:stop], spans=self.spans[start:stop])

    def name(self, number: int) -> str:
        """What to call a file or row that can't be read."""
        return f"{self.prefix}{self.names[number]}" if self.names else f"row {self.start + number}"


@dataclass(frozen=True)
class Unit:
    """One file, member or table row: its id by name, its file for reports, and its crystals when they are asked for."""

    id: str
    file: str
    items: Callable[[], Iterator[tuple[str, Item]]]
    split: str | None = None


def units(chunk: Chunk, max_atoms: int, first: int = 0, split_column: str | None = None) -> Iterator[Unit]:
    """The units of a chunk from number `first` on, in order.

    The id of a file keeps the folders below its input, so that equal names in two of them stay apart.
    Raises DataError for a table or archive that can't be read at all.
    """
    if chunk.kind == "table":
        return _table_units(chunk, max_atoms, first, split_column)
    return _file_units(chunk, max_atoms, first)


def read_chunk(chunk: Chunk, max_atoms: int) -> list[tuple[str, Item]]:
    """(file or row, crystal or why it can't be read) of everything in a chunk; for `parallel_map`."""
    found: list[tuple[str, Item]] = []
    try:
        for unit in units(chunk, max_atoms):
            found += [(unit.file if chunk.names else f"{unit.file}, {unit.id}", item) for _, item in unit.items()]
    except DataError as error:  # of a whole table or archive
        found.append((chunk.place, CrystalError(str(error).removeprefix(f"{chunk.place}: "))))
    return found


def _file_units(chunk: Chunk, max_atoms: int, first: int) -> Iterator[Unit]:
    with ExitStack() as stack:
        open_member = _opener(stack, chunk, first)
        for number in range(first, len(chunk.names)):
            name = chunk.names[number]
            path = PurePosixPath(name)
            id = f"{chunk.prefix}{path.parent / formats.format_of(path)[1]}"
            yield Unit(id, f"{chunk.prefix}{name}", partial(_items, open_member(number), id, max_atoms))


def _opener(stack: ExitStack, chunk: Chunk, first: int) -> Callable[[int], Path | Source]:
    """Where the file of a number is, from `first` on."""
    if chunk.kind == "files":
        if "://" in chunk.place:
            fsspec.core.url_to_fs(chunk.place)  # imports its library here, out of the first file's time
        return lambda number: source_of(f"{chunk.place}/{chunk.names[number]}")
    if chunk.kind == "zip":
        archive = open_zip(stack, chunk.place)
        members = archive.infolist()
        return lambda number: Source(
            chunk.names[number], lambda: cast(BinaryIO, archive.open(members[chunk.spans[number][0]]))
        )
    stream = open_tar_bytes(stack, chunk.place)
    stream.seek(chunk.spans[first][0])  # what comes before is decompressed here, out of the first member's time

    def member(number: int) -> Source:
        def read() -> BinaryIO:
            offset, size = chunk.spans[number]
            stream.seek(offset)
            data = stream.read(min(size, inputs.MAX_FILE_BYTES + 1))
            if len(data) < min(size, inputs.MAX_FILE_BYTES + 1):
                raise EOFError(f"truncated, {len(data)} of {size} bytes are there")
            return BytesIO(data)

        return Source(chunk.names[number], read)

    return member


def _items(source: Path | Source, id: str, max_atoms: int) -> Iterator[tuple[str, Item]]:
    for item in formats.read_crystals(source, max_atoms, id):
        yield (item.id, item) if isinstance(item, Crystal) else item


def _table_units(chunk: Chunk, max_atoms: int, first: int, split_column: str | None) -> Iterator[Unit]:
    source, file = source_of(chunk.place), PurePosixPath(chunk.place).name
    start = chunk.start + first
    rows = parquet.read_parquet_rows(source, start, chunk.stop, max_atoms)
    splits = parquet.read_column(source, split_column, start, chunk.stop) if split_column else [None] * (chunk.stop - start)
    for row, split in enumerate(splits, start):
        yield Unit(f"row {row}", file, partial(_row_items, rows, row), None if split is None else str(split))


def _row_items(rows: Iterator[Any], row: int) -> Iterator[tuple[str, Item]]:
    item = next(rows, None)
    if item is None:
        raise DataError(f"row {row} follows one that can't be read")
    yield (item.id, item) if isinstance(item, Crystal) else item


# Opening


def source_of(place: str) -> Path | Source:
    """The file at a path or URL."""
    return Source(place, partial(_open, place)) if "://" in place else Path(place)


def _open(place: str) -> BinaryIO:
    if "://" not in place:
        if not os.path.isfile(place):  # opening a pipe would wait for its writer
            raise OSError("isn't a file")
        return Path(place).open("rb")
    fs, path = fsspec.core.url_to_fs(place)
    return BufferedReader(fs.open(path, "rb"))  # its own lines may be of any length


def archive_bytes(stack: ExitStack, place: str) -> int:
    """Size of the file at a path or URL."""
    return stack.enter_context(_open(place)).seek(0, os.SEEK_END)


def open_tar_bytes(stack: ExitStack, place: str) -> BinaryIO:
    """The archive's decompressed bytes; seeking forward decompresses what lies between."""
    stream = stack.enter_context(_open(place))
    decompress = next(opener for ending, opener in _TARS.items() if place.lower().endswith(ending))
    return cast(BinaryIO, stack.enter_context(decompress(stream))) if decompress else stream


def open_zip(stack: ExitStack, place: str) -> zipfile.ZipFile:
    """The archive, of which a file on a disk must be a regular one."""
    return stack.enter_context(zipfile.ZipFile(stack.enter_context(_open(place))))
