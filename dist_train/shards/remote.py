"""Shards at an fsspec URL, fetched whole into a bounded folder that the processes of a machine share.

A shard is there whole or not at all: it is written to a temporary file, its SHA-256 is compared, then it is renamed. One
process fetches it, the others wait; `flock` ends with the process that holds it, so that a killed one blocks nobody.
The shards used least recently make room for new ones. One that a process still reads may be among them: its bytes stay on
the disk until that process closes it, so the folder may for a while take up more by the shards that are open.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dist_train.errors import ShardError
from dist_train.files import fsync

if TYPE_CHECKING:
    from dist_train.shards.index import ShardRecord

T = TypeVar("T")
CACHE_NAME = "dist_train_shards"
"""Folder below `data.cache_dir`: whatever lies in it may be removed."""
CHUNK_BYTES = 2**25
LOCKS = 256
PAUSES_S = (0.5, 2.0, 8.0)
"""Before the second, third and fourth attempt at a request; the file system's library may make attempts of its own."""
POLL_S = 0.1


@dataclass(frozen=True)
class Remote:
    """A folder on a remote file system. path: the folder as that file system writes it."""

    url: str
    fs: Any
    path: str

    def __str__(self) -> str:
        return self.url

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file.

        Raises FileNotFoundError, or ShardError for whatever else keeps it from being read.
        """
        return self._attempt(name, lambda: bytes(self.fs.cat_file(f"{self.path}/{name}", start=start, end=stop)))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the folder, by name."""
        found = self._attempt("", lambda: self.fs.ls(self.path, detail=True, refresh=True))
        return {info["name"].rpartition("/")[2]: int(info["size"]) for info in found if info["type"] == "file"}

    def _attempt(self, name: str, request: Callable[[], T]) -> T:
        for pause in (*PAUSES_S, None):
            try:
                return request()
            except FileNotFoundError:
                raise
            except Exception as error:  # every remote file system has errors of its own
                if pause is None or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                    told = " ".join(str(error).split())[:300]
                    raise ShardError(
                        f"{self.url}/{name} can't be read: {type(error).__name__}: {told}; check data.shards, the network "
                        "and this account's credentials"
                    ) from None
                time.sleep(pause)
        raise AssertionError


def remote_folder(url: str) -> Remote | Path:
    """The folder of a URL; a path where the URL is of this machine's files. Raises ShardError for an unknown kind of URL."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(f"shards {url} can't be read: {error}") from None
    return Path(path) if isinstance(fs, LocalFileSystem) else Remote(url.rstrip("/"), fs, path.rstrip("/"))


class ShardCache:
    """The shards of a remote folder as files of `cache_dir`, where all sets together take up at most `cache_MB`.

    digest: of the set of shards, which names its folder. Raises ShardError where the folder can't be made.
    """

    def __init__(self, remote: Remote, digest: str, cache_dir: Path | None, cache_MB: int) -> None:
        self.remote, self.limit = remote, cache_MB * 10**6
        self.root = (cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")) / CACHE_NAME
        self.folder = self.root / digest[:16]
        try:
            for folder in (self.folder, self.root / "locks"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ShardError(f"cache {self.root} can't be made: {error.strerror}; set data.cache_dir") from None

    def open(self, shard: ShardRecord) -> int:
        """A file descriptor of a shard. Raises ShardError where it can't be fetched, OSError where it can't be opened."""
        while True:
            self.fetch(shard)
            with suppress(FileNotFoundError):  # somebody needed the room just now
                return os.open(self.folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)

    def fetch(self, shard: ShardRecord, wait: bool = True) -> None:
        """Fetch a shard unless it is there. Where another process is about it, wait for that, or leave it to that.

        Raises ShardError naming a shard that can't be fetched, whose bytes are not those of the index, or that the cache
        can't hold.
        """
        path = self.folder / shard.name
        if _is_there(path, shard.bytes):
            return
        with _locked(self._lock(path), wait) as held:
            if held and not _is_there(path, shard.bytes):
                try:
                    self._download(shard, path)
                except OSError as error:
                    raise ShardError(
                        f"shard {self.remote}/{shard.name} can't be kept in {self.folder}: {error.strerror}; free space, "
                        "lower data.cache_MB or set data.cache_dir"
                    ) from None

    def _lock(self, path: Path) -> Path:
        return self.root / "locks" / f"{crc32(f'{path.parent.name}/{path.name}'.encode()) % LOCKS:03d}"

    def _download(self, shard: ShardRecord, path: Path) -> None:
        temporary = path.with_name(f".{shard.name}.tmp")
        self._make_room(shard, temporary)
        try:
            for _ in range(2):
                found = self._copy(shard, temporary)
                if found == shard.sha256:
                    fsync(temporary)
                    # Who counted between two looks would find it under both names, and remove a shard for nothing.
                    with _locked(self.root / "locks" / "room"):
                        temporary.replace(path)
                    return
        finally:
            temporary.unlink(missing_ok=True)
        raise ShardError(
            f"shard {self.remote}/{shard.name} was fetched twice, with the SHA-256 {found[:16]}..., {shard.sha256[:16]}... "
            "is expected; run dist-train verify where it comes from, and upload it again"
        )

    def _copy(self, shard: ShardRecord, temporary: Path) -> str:
        """Write the shard's bytes; returns their SHA-256."""
        digest = hashlib.sha256()
        with temporary.open("r+b") as stream:  # keeps its length, which is what it takes of the cache
            for start in range(0, shard.bytes, CHUNK_BYTES):
                try:
                    data = self.remote.read(shard.name, start, min(start + CHUNK_BYTES, shard.bytes))
                except FileNotFoundError:
                    raise ShardError(f"shard {self.remote}/{shard.name} is missing; upload it again") from None
                digest.update(data)
                stream.write(data)
        return digest.hexdigest()

    def _make_room(self, shard: ShardRecord, temporary: Path) -> None:
        """Remove the shards used least recently, and what killed processes left, until `temporary` can be made."""
        if shard.bytes > self.limit:
            raise ShardError(
                f"data.cache_MB {self.limit // 10**6} can't hold shard {shard.name} of {shard.bytes} bytes; set at least "
                f"{-(-shard.bytes // 10**6)}"
            )
        while True:
            with _locked(self.root / "locks" / "room"):
                for leaving in self.root.glob("*/.*.tmp"):
                    with _locked(self._lock(leaving.with_name(leaving.name[1:-4])), wait=False) as nobodys:
                        if nobodys:
                            leaving.unlink(missing_ok=True)
                used = sum(size for _, size, _ in _files(self.root.glob("*/.*.tmp")))
                shards = sorted(_files(self.root.glob("*/*.tar")))
                used += sum(size for _, size, _ in shards)
                for _, size, path in shards:
                    if used + shard.bytes <= self.limit:
                        break
                    path.unlink(missing_ok=True)
                    used -= size
                if used + shard.bytes <= self.limit:
                    with temporary.open("wb") as stream:
                        stream.truncate(shard.bytes)
                    return
            time.sleep(POLL_S)  # others are about shards that fill the cache


def _is_there(path: Path, size: int) -> bool:
    """Whether a shard is there, which then counts as just used."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return path.stat().st_size == size
    return False


def _files(paths: Iterator[Path]) -> Iterator[tuple[int, int, Path]]:
    """(time of last use, bytes, path) of files, without those that are just being removed."""
    for path in paths:
        with suppress(FileNotFoundError):
            found = path.stat()
            yield found.st_mtime_ns, found.st_size, path


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, against threads as well; yields whether it is held. The file stays."""
    with path.open("wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
