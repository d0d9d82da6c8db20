"""`index.json`, the data set: what was asked for, what was rejected, and where every byte of every sample lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import ShardError
from dist_train.files import sha256, write_text

SCHEMA_VERSION = 1
INDEX_NAME, REJECTED_NAME = "index.json", "rejected.csv"


@dataclass(frozen=True)
class Sample:
    """One crystal of a shard: key, id, grid shape, crc32 of its members, and (offset, bytes) of each in the tar."""

    key: str
    id: str
    shape: tuple[int, ...]
    crc32: int
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ShardRecord:
    """One tar file; `elements` are the atomic numbers in it."""

    name: str
    split: str
    bytes: int
    sha256: str
    elements: tuple[int, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Index:
    """A complete set of shards. counts: inputs = accepted + rejected, always."""

    root: Path
    config: dict[str, Any]
    config_hash: str
    code_version: str
    counts: dict[str, int]
    shards: tuple[ShardRecord, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' own, in order: the identity of the data."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

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
        document = {"schema_version": SCHEMA_VERSION, **asdict(self), "digest": self.digest}
        del document["root"]
        write_text(self.root / INDEX_NAME, json.dumps(document, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, root: Path) -> Index:
        """The index of a folder. Raises ShardError where there is none, or one that this version can't read."""
        path = root / INDEX_NAME
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            raise ShardError(f"{path} does not exist: {root} holds no finished shards; run dist-train voxelize") from None
        except (OSError, ValueError) as error:
            raise ShardError(f"{path} can't be read ({error}); run dist-train voxelize again") from None
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ShardError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: voxelise again")
        try:
            shards = tuple(_record(shard) for shard in document["shards"])
            counts, digest, code = document["counts"], document["config_hash"], document["code_version"]
            return cls(root, document["config"], digest, code, counts, shards)
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path} is damaged ({error!r}); run dist-train voxelize again") from None


def record_from_json(text: str) -> ShardRecord:
    """Inverse of `json.dumps(asdict(record))`."""
    return _record(json.loads(text))


def _record(row: dict[str, Any]) -> ShardRecord:
    samples = tuple(
        Sample(s["key"], s["id"], tuple(s["shape"]), s["crc32"], {k: (v[0], v[1]) for k, v in s["members"].items()})
        for s in row["samples"]
    )
    return ShardRecord(row["name"], row["split"], row["bytes"], row["sha256"], tuple(row["elements"]), samples)


def config_hash(config: dict[str, Any]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the config as sorted JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def verify(index: Index) -> Iterator[tuple[str, str]]:
    """(shard, what is wrong) for every shard that is missing, cut or altered."""
    for shard in index.shards:
        path = index.root / shard.name
        if not path.is_file():
            yield shard.name, "missing"
        elif path.stat().st_size != shard.bytes:
            yield shard.name, f"{path.stat().st_size} bytes, {shard.bytes} expected"
        elif sha256(path) != shard.sha256:
            yield shard.name, "sha256 differs"
