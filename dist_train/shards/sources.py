"""Where crystals come from: folders, globs, files, tar and zip archives, tables and other runs' shards; disks and URLs.

`discover` lists them, in a fixed order, as `Chunk`s of a scan task each; `units` opens a chunk's files or table rows.
Archives are read in place: nothing is extracted, and no path in them is used as one.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import fsspec
import fsspec.implementations.local

from dist_train.crystal import formats, inputs, parquet
from dist_train.crystal.inputs import UNREADABLE, Source
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.shards.index import INDEX_NAME, Index
from dist_train.shards.tar_members import list_members

FILES_PER_CHUNK, ROWS_PER_CHUNK = 64, 1024
CHUNKS_PER_ARCHIVE = 256
"""At most; reading a chunk of a compressed archive means decompressing all that comes before it."""
MAX_EXPANSION = 200
"""A compressed tar is read up to this many times its own size (and a file's cap): CIF texts shrink to a fifth or so."""

_TARS: dict[str, Callable[[Any], Any] | None] = {
    ".tar": None, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": lzma.open,
}  # fmt: skip

Item = Crystal | CrystalError
_BROKEN = (*UNREADABLE, ValueError, ArithmeticError, LookupError, struct.error)
"""What damaged archives raise while they are listed."""
MAX_NAME_BYTES = 4096
_NOT_REGULAR = "a link, device or sparse file, only regular members are read"


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

    def name(self, number: int) -> str:
        """What to call a file or row that can't be read."""
        return f"{self.prefix}{self.names[number]}" if self.names else f"row {self.start + number}"


@dataclass
class Found:
    """What inputs hold: chunks, refused members as (input, file, reason), and size of every file read, by its place."""

    chunks: list[Chunk] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    """Files of no known format in folders and archives."""


def discover(given: Iterable[str]) -> Found:
    """Everything that the inputs name, in a fixed order.

    Raises DataError for an input that is missing or unreadable, of an unknown kind, or without any crystal.
    """
    found = Found()
    for name in given:
        before = len(found.chunks) + len(found.refused)
        fs, path = _file_system(name)
        try:
            _add(found, name, fs, path)
        except PermissionError as error:
            raise DataError(f"input {error.filename or name} can't be read: {error}; check its permissions") from None
        except DataError:
            raise
        except Exception as error:  # every remote file system has errors of its own
            raise DataError(f"input {name} can't be read: {type(error).__name__}: {str(error)[:300]}") from error
        if len(found.chunks) + len(found.refused) == before:
            raise DataError(
                f"no crystals found in {name}: expected CIF, POSCAR or extxyz files (.gz), tar or zip archives of them, "
                "Parquet tables or shards"
            )
    if not found.chunks and not found.refused:
        raise DataError("data.inputs is empty: name at least one folder of CIF files or Parquet table")
    return found


def _file_system(name: str) -> tuple[Any, str]:
    """The file system and the path of an input: absolute on a disk, as the file system writes it elsewhere."""
    if "://" not in name:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(name))
    if "::" in name:
        raise DataError(f"input {name} can't be read: chained URLs aren't known here, archives are read in place")
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(name))
    except (ImportError, ValueError) as error:
        raise DataError(f"input {name} can't be read: {error}") from None


def _is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


def _add(found: Found, given: str, fs: Any, path: str) -> None:
    """Add a file, all of a folder or, where nothing has this name, what it matches as a pattern."""
    there = _exists(fs, path)
    if not there and (magic := re.search(r"[*?[]", path)):
        _add_matches(found, given, fs, path, path[: magic.start()].rpartition("/")[0])
    elif fs.isdir(path):
        _add_folder(found, given, fs, path)
    elif not there:
        raise DataError(f"input {given} is neither a folder nor a file; check data.inputs")
    elif _kind(path) is None:
        raise DataError(f"input {given} is of no known kind: names end in {' '.join(formats.ENDINGS)}, .tar or .zip")
    else:
        _add_files(found, given, fs, path.rpartition("/")[0], {path: _size(fs, path)}, alone=True)


def _exists(fs: Any, path: str) -> bool:
    """Whether there is a file, folder or link of this name; PermissionError where that can't be told."""
    if not _is_local(fs):
        return bool(fs.exists(path))
    try:
        return bool(os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _add_matches(found: Found, given: str, fs: Any, pattern: str, root: str) -> None:
    """Add files and folders that a pattern matches, each file once; ids begin below the pattern's first sign."""
    files: dict[str, int] = {}
    for path, info in fs.glob(pattern, detail=True).items():
        if not (os.path.isdir(path) if _is_local(fs) else info["type"] == "directory"):
            files[path] = info.get("size") or 0
        elif fs.exists(f"{path}/{INDEX_NAME}"):
            _add_shards(found, given, fs, path)
        else:
            files |= _files_below(found, given, fs, path)
    _add_files(found, given, fs, root, files)


def _kind(name: str) -> str | None:
    """'tar', 'zip', 'parquet', 'text' or None by the end of a file's name."""
    lower = name.lower()
    if lower.endswith(tuple(_TARS)):
        return "tar"
    if lower.endswith(".zip"):
        return "zip"
    try:
        return "parquet" if formats.format_of(PurePosixPath(name))[0] == "parquet" else "text"
    except CrystalError:
        return None


def _add_folder(found: Found, given: str, fs: Any, root: str) -> None:
    """Add all files below a folder, in the order of their names, or the shards in it."""
    if fs.exists(f"{root.rstrip('/')}/{INDEX_NAME}"):
        _add_shards(found, given, fs, root)
    else:
        _add_files(found, given, fs, root, _files_below(found, given, fs, root))


def _files_below(found: Found, given: str, fs: Any, root: str) -> dict[str, int]:
    """Size of every file below a folder, by its path."""
    if not _is_local(fs):
        return {path: info.get("size") or 0 for path, info in fs.find(root, detail=True).items()}

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that can't be listed

    files: dict[str, int] = {}
    for at, folders, names in os.walk(root, onerror=fail):
        files |= {path: _size(fs, path) for path in (os.path.join(at, name) for name in names)}
        for path in (os.path.join(at, name) for name in sorted(folders)):
            if os.path.islink(path):
                found.refused.append((given, path, "a link to a folder isn't followed; name it in data.inputs"))
    return files


def _add_files(found: Found, given: str, fs: Any, root: str, sizes: dict[str, int], alone: bool = False) -> None:
    start = len(root.rstrip("/")) + 1
    place = root.rstrip("/") if _is_local(fs) else fs.unstrip_protocol(root)
    kinds = {path[start:]: _kind(path) for path in sorted(sizes)}
    texts = [name for name, kind in kinds.items() if kind == "text"]
    found.ignored += sum(kind is None for kind in kinds.values())
    found.sizes |= {f"{place}/{name}": sizes[f"{root.rstrip('/')}/{name}"] for name, kind in kinds.items() if kind}
    for start in range(0, len(texts), FILES_PER_CHUNK):
        found.chunks.append(Chunk(given, "files", place, tuple(texts[start : start + FILES_PER_CHUNK])))
    for name, kind in kinds.items():
        path, prefix = f"{place}/{name}", "" if alone else f"{name}/"
        if kind == "parquet":
            _add_table(found, given, path, alone)
        elif kind in ("tar", "zip"):
            _add_archive(found, given, Chunk(given, cast(Any, kind), path, prefix=prefix))


def _size(fs: Any, path: str) -> int:
    try:
        return os.stat(path).st_size if _is_local(fs) else int(fs.size(path) or 0)
    except OSError:  # a link to nothing: its turn to be refused comes when it is read
        return 0


def _add_table(found: Found, given: str, place: str, alone: bool) -> None:
    try:
        length = parquet.parquet_length(_source(place))
        if found.sizes[place] and not 0 <= length <= found.sizes[place]:
            raise DataError(f"{place}: no table has {length} rows in {found.sizes[place]} bytes")
    except DataError as error:
        if alone:
            raise
        found.refused.append((given, place, str(error).removeprefix(f"{place}: ")))
        return
    for start in range(0, length, ROWS_PER_CHUNK):
        found.chunks.append(Chunk(given, "table", place, start=start, stop=min(start + ROWS_PER_CHUNK, length)))


def _add_archive(found: Found, given: str, whole: Chunk) -> None:
    """Add the members of an archive that are crystals by their names."""
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    members = _tar_members if whole.kind == "tar" else _zip_members
    with ExitStack() as stack:
        try:
            for name, span, reason in members(stack, whole.place):
                kind = _kind(name)
                if kind is None:
                    found.ignored += 1
                elif reason := reason or _refusal(name, kind):
                    found.refused.append((given, f"{whole.prefix}{name[:MAX_NAME_BYTES]}", reason))
                else:
                    names.append(name)
                    spans.append(span)
        except _BROKEN as error:
            found.refused.append((given, whole.place, f"archive can't be read on: {error}"))
    step = max(FILES_PER_CHUNK, -(-len(names) // CHUNKS_PER_ARCHIVE))
    for start in range(0, len(names), step):
        part = slice(start, start + step)
        found.chunks.append(replace(whole, names=tuple(names[part]), spans=tuple(spans[part])))


def _refusal(name: str, kind: str) -> str:
    """Why a member isn't taken by its name, or ''."""
    path = PurePosixPath(name.replace("\\", "/"))
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        return f"its name has over {MAX_NAME_BYTES} bytes"
    if path.is_absolute() or ".." in path.parts or "\0" in name or re.match("[A-Za-z]:", name):
        return "its path leads out of the archive"
    return "" if kind == "text" else "an archive or table in an archive isn't read; unpack the outer one"


def _too_large(size: int) -> str:
    return f"{size} bytes, at most {inputs.MAX_FILE_BYTES} are read" if size > inputs.MAX_FILE_BYTES else ""


def _tar_members(stack: ExitStack, place: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """(name, offset and bytes, '' or why it isn't taken) of every member that isn't a folder."""
    limit = MAX_EXPANSION * _length(stack, place) + inputs.MAX_FILE_BYTES
    for member in list_members(_open_tar(stack, place), limit):
        if member.kind != "folder":
            reason = _NOT_REGULAR if member.kind == "other" else _too_large(member.size)
            yield member.name, (member.offset, member.size), reason


def _zip_members(stack: ExitStack, place: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """As `_tar_members`; the span holds the number of the member in the archive."""
    for number, member in enumerate(_open_zip(stack, place).infolist()):
        if not member.is_dir():
            special = stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG)
            reason = _NOT_REGULAR if special else "encrypted" if member.flag_bits & 1 else _too_large(member.file_size)
            yield member.orig_filename, (number, 0), reason


def _add_shards(found: Found, given: str, fs: Any, root: str) -> None:
    """Add the structures in the shards of a finished run, the first copy of each crystal."""
    with tempfile.TemporaryDirectory() as copy:
        if not _is_local(fs):
            fs.get_file(f"{root}/{INDEX_NAME}", f"{copy}/{INDEX_NAME}")
        index = Index.read(Path(root if _is_local(fs) else copy))
    place = root if _is_local(fs) else fs.unstrip_protocol(root)
    for shard in index.shards:
        path = f"{place}/{shard.name}"
        found.sizes[path] = shard.bytes
        first = [sample for sample in shard.samples if sample.copy == 0]
        for start in range(0, len(first), ROWS_PER_CHUNK):
            part = first[start : start + ROWS_PER_CHUNK]
            names, spans = zip(*((f"{s.key}{formats.STRUCTURE}", s.members[formats.STRUCTURE[1:]]) for s in part))
            found.chunks.append(Chunk(given, "tar", path, names, spans))


def _source(place: str) -> Path | Source:
    return Source(place, partial(_open, place)) if "://" in place else Path(place)


def _open(place: str) -> BinaryIO:
    if "://" not in place:
        if not os.path.isfile(place):  # opening a pipe would wait for its writer
            raise OSError("isn't a file")
        return Path(place).open("rb")
    fs, path = fsspec.core.url_to_fs(place)
    return BufferedReader(fs.open(path, "rb"))  # its own lines may be of any length


def _length(stack: ExitStack, place: str) -> int:
    return stack.enter_context(_open(place)).seek(0, os.SEEK_END)


def _open_tar(stack: ExitStack, place: str) -> BinaryIO:
    """The archive's decompressed bytes; seeking forward decompresses what lies between."""
    stream = stack.enter_context(_open(place))
    decompress = next(opener for ending, opener in _TARS.items() if place.lower().endswith(ending))
    return cast(BinaryIO, stack.enter_context(decompress(stream))) if decompress else stream


def _open_zip(stack: ExitStack, place: str) -> zipfile.ZipFile:
    return stack.enter_context(zipfile.ZipFile(stack.enter_context(_open(place))))


# Reading


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
        return lambda number: _source(f"{chunk.place}/{chunk.names[number]}")
    if chunk.kind == "zip":
        archive = _open_zip(stack, chunk.place)
        members = archive.infolist()
        return lambda number: Source(
            chunk.names[number], lambda: cast(BinaryIO, archive.open(members[chunk.spans[number][0]]))
        )
    stream = _open_tar(stack, chunk.place)
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
    source, file = _source(chunk.place), PurePosixPath(chunk.place).name
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
