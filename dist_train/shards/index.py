"""`index.json`, the data set: what was asked for, what was rejected, and where every byte of every sample lies.

Plain JSON with one line a sample; 145,665 structures take 20 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.config import GridSpec
from dist_train.errors import ShardError
from dist_train.files import write_text
from dist_train.shards.remote import Remote, ShardCache, remote_folder

SCHEMA_VERSION = 2
INDEX_NAME, REJECTED_NAME = "index.json", "rejected.csv"


@dataclass(frozen=True)
class Sample:
    """One copy of a crystal in a shard: where it lies, and how large it is when read.

    shape: [D, H, W] of the grid; for a structure alone, of the grid that it is voxelised to.
    crc32: of its members, one after another. members: (offset, bytes) of each in the tar, in the order of the tar.
    """

    key: str
    id: str
    copy: int
    shape: tuple[int, ...]
    crc32: int
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ShardRecord:
    """One tar file with at least one sample; `elements` are the atomic numbers in it."""

    name: str
    split: str
    bytes: int
    sha256: str
    elements: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def first_key(self) -> str:
        return self.samples[0].key

    @property
    def last_key(self) -> str:
        return self.samples[-1].key

    def to_json(self) -> str:
        """JSON with one line a sample, which `record_from_json` reads."""
        head = {**vars(self), "keys": [self.first_key, self.last_key]}
        del head["samples"]
        lines = ",\n".join(_encode(vars(sample)) for sample in self.samples)
        return f'{_encode(head)[:-1]},"samples":[\n{lines}\n]}}'


@dataclass(frozen=True)
class Index:
    """A complete set of shards. counts: inputs = accepted + rejected, always.

    root: its folder; of shards at a URL, the folder of the cache that they are fetched into.
    """

    root: Path
    config: dict[str, Any]
    config_hash: str
    code_version: str
    counts: dict[str, int]
    shards: tuple[ShardRecord, ...]
    cache: ShardCache | None = field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' own, in order: the identity of the data."""
        return _digest(self.shards)

    @property
    def place(self) -> str:
        """Folder or URL, for messages."""
        return self.cache.remote.url if self.cache else str(self.root)

    @property
    def remedy(self) -> str:
        """What to do about a damaged shard, for messages."""
        if self.cache is None:
            return f"run dist-train verify {self.root}"
        return f"remove {self.root}, then they are fetched again; or run dist-train verify where they come from"

    def where(self, shard: ShardRecord) -> str:
        """Path or URL of a shard, for messages."""
        return f"{self.place}/{shard.name}"

    def open(self, shard: ShardRecord) -> int:
        """A file descriptor of a shard, which is fetched first where it must be. Raises OSError, or ShardError if remote."""
        return self.cache.open(shard) if self.cache else os.open(self.root / shard.name, os.O_RDONLY | os.O_CLOEXEC)

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of the shards that are there, by name, without reading them."""
        if self.cache:
            return self.cache.remote.sizes()
        with os.scandir(self.root) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar") and entry.is_file()}

    @property
    def store(self) -> str:
        """'grids' or 'structures'."""
        return str(self.config.get("data", {}).get("store", "grids"))

    @property
    def encoding(self) -> str:
        """'raw' or 'compact', for grids."""
        return str(self.config.get("data", {}).get("encoding", "raw"))

    @property
    def grid(self) -> GridSpec:
        """The grid of the samples. Raises ShardError where the index names none."""
        try:
            return GridSpec.model_validate(self.config["grid"])
        except (LookupError, ValueError) as error:
            raise ShardError(
                f"{self.root / INDEX_NAME} has no usable grid ({error!r}); run dist-train voxelize again"
            ) from None

    def split(self, name: str) -> tuple[ShardRecord, ...]:
        """The shards of a split, in order. Raises ShardError for a split that is not there."""
        found = tuple(shard for shard in self.shards if shard.split == name)
        if not found:
            known = sorted({shard.split for shard in self.shards})
            raise ShardError(f"{self.root} has no shard of split {name!r}; it has {known}")
        return found

    def samples(self, split: str) -> list[tuple[ShardRecord, Sample]]:
        """Every sample of a split with its shard, in order."""
        return [(shard, sample) for shard in self.split(split) for sample in shard.samples]

    def elements(self, split: str) -> tuple[int, ...]:
        """The atomic numbers in a split, rising."""
        return tuple(sorted({z for shard in self.split(split) for z in shard.elements}))

    def write(self) -> None:
        """Write `index.json` atomically: from then on the set is complete."""
        head = {**vars(self), "schema_version": SCHEMA_VERSION, "digest": self.digest}
        del head["root"], head["shards"], head["cache"]
        text = json.dumps(head, indent=1).removesuffix("\n}")
        shards = ",\n".join(shard.to_json() for shard in self.shards)
        write_text(self.root / INDEX_NAME, f'{text},\n "shards": [\n{shards}\n]}}\n')

    @classmethod
    def read(cls, root: Path | str, cache_dir: Path | None = None, cache_MB: int = 50_000) -> Index:
        """The index of a folder, or of an fsspec URL whose shards are then kept in at most `cache_MB` below `cache_dir`.

        Raises ShardError where there is none, or one that this version can't read.
        """
        folder = remote_folder(str(root)) if "://" in str(root) else Path(root)
        place = f"{folder}/{INDEX_NAME}"
        try:
            document = json.loads(folder.read(INDEX_NAME) if isinstance(folder, Remote) else Path(place).read_bytes())
        except FileNotFoundError:
            raise ShardError(f"{place} does not exist: {folder} holds no finished shards; run dist-train voxelize") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ShardError(f"{place} can't be read ({error}); run dist-train voxelize again") from None
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ShardError(f"{place} has schema version {version}, this program reads {SCHEMA_VERSION}: voxelise again")
        try:
            shards = tuple(_record(shard) for shard in document["shards"])
            counts, digest, code = document["counts"], document["config_hash"], document["code_version"]
            config = dict(document["config"])
            if isinstance(folder, Path):
                return cls(folder, config, digest, code, dict(counts), shards)
            cache = ShardCache(folder, _digest(shards), cache_dir, cache_MB)
            return cls(cache.folder, config, digest, code, dict(counts), shards, cache)
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise ShardError(f"{place} is damaged ({error!r}); run dist-train voxelize again") from None


def _digest(shards: tuple[ShardRecord, ...]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def record_from_json(text: str) -> ShardRecord:
    """Inverse of `ShardRecord.to_json`, and of `json.dumps(asdict(record))`."""
    return _record(json.loads(text))


def _record(row: dict[str, Any]) -> ShardRecord:
    name = str(row["name"])
    # Shards are read and moved by their names: none may lead out of the folder.
    if not re.fullmatch(r"[\w-]+\.tar", name) or not row["samples"]:
        raise ValueError(f"shard {name!r} is no plain NAME.tar, or has no samples")
    samples = tuple(map(_sample, row["samples"]))
    return ShardRecord(name, str(row["split"]), int(row["bytes"]), str(row["sha256"]), tuple(row["elements"]), samples)


def _sample(row: dict[str, Any]) -> Sample:
    members = {name: (int(at), int(size)) for name, (at, size) in row["members"].items()}
    if min(map(min, members.values())) < 0:
        raise ValueError(f"negative offset or size in {members}")
    return Sample(str(row["key"]), str(row["id"]), int(row["copy"]), tuple(row["shape"]), int(row["crc32"]), members)


def config_hash(config: dict[str, Any]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the config as JSON; the order of splits counts."""
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]


_encode = json.JSONEncoder(separators=(",", ":")).encode
