"""What there is to read: folders, globs, files, tar and zip archives, tables and other runs' shards; on disks and at URLs.

`discover` lists it all, in a fixed order, as `Chunk`s of a scan task each.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec
import fsspec.implementations.local

from dist_train.crystal import formats, inputs, parquet
from dist_train.crystal.inputs import UNREADABLE
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.shards.index import INDEX_NAME, Index
from dist_train.shards.sources import TAR_ENDINGS, Chunk, archive_bytes, open_tar_bytes, open_zip, read_chunk, source_of
from dist_train.shards.tar_members import list_members

FILES_PER_CHUNK, ROWS_PER_CHUNK = 64, 1024
CHUNKS_PER_ARCHIVE = 256
"""At most; reading a chunk of a compressed archive means decompressing all that comes before it."""
MAX_EXPANSION = 200
"""A compressed tar is read up to this many times its own size (and a file's cap): CIF texts shrink to a fifth or so."""

_BROKEN = (*UNREADABLE, ValueError, ArithmeticError, LookupError, struct.error)
"""What damaged archives raise while they are listed."""
MAX_NAME_BYTES = 4096
GENERATED = "crystals.extxyz", "cifs"
"""In a folder of generated crystals, which holds each of them several times: as an archive, with symmetry, ..."""
_NOT_REGULAR = "a link, device or sparse file, only regular members are read"


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
            if _is_local(fs) and not isinstance(error, OSError):
                raise
            raise DataError(f"input {name} can't be read: {type(error).__name__}: {str(error)[:300]}") from error
        if len(found.chunks) + len(found.refused) == before:
            raise DataError(
                f"no crystals found in {name}: expected CIF, POSCAR or extxyz files (.gz), tar or zip archives of them, "
                "Parquet tables or shards"
            )
    if not found.chunks and not found.refused:
        raise DataError("data.inputs is empty: name at least one folder of CIF files or Parquet table")
    return found


def read_inputs(given: Iterable[str], max_atoms: int) -> Iterator[Crystal | CrystalError]:
    """Every crystal that the inputs hold, or what is wrong with it, its file named. Raises DataError as `discover` does."""
    found = discover(given)
    for _, file, reason in found.refused:
        yield CrystalError(f"{file}: {reason}")
    for file, item in (row for chunk in found.chunks for row in read_chunk(chunk, max_atoms)):
        yield CrystalError(f"{file}: {item}") if isinstance(item, CrystalError) else item


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
        raise DataError(f"input {given} is neither a folder nor a file; check its name")
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
    if lower.endswith(TAR_ENDINGS):
        return "tar"
    if lower.endswith(".zip"):
        return "zip"
    try:
        return "parquet" if formats.format_of(PurePosixPath(name))[0] == "parquet" else "text"
    except CrystalError:
        return None


def _add_folder(found: Found, given: str, fs: Any, root: str) -> None:
    """Add all files below a folder, in the order of their names, or the shards or generated crystals in it."""
    root = root.rstrip("/") or "/"
    if fs.exists(f"{root}/{INDEX_NAME}"):
        _add_shards(found, given, fs, root)
        return
    if fs.exists(f"{root}/{GENERATED[0]}") and fs.isdir(f"{root}/{GENERATED[1]}"):
        root = f"{root}/{GENERATED[1]}"
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
        length = parquet.parquet_length(source_of(place))
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
    limit = MAX_EXPANSION * archive_bytes(stack, place) + inputs.MAX_FILE_BYTES
    for member in list_members(open_tar_bytes(stack, place), limit):
        if member.kind != "folder":
            reason = _NOT_REGULAR if member.kind == "other" else _too_large(member.size)
            yield member.name, (member.offset, member.size), reason


def _zip_members(stack: ExitStack, place: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """As `_tar_members`; the span holds the number of the member in the archive."""
    for number, member in enumerate(open_zip(stack, place).infolist()):
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
