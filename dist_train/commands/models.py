"""What the verbs that use models share: bundles, crystals to read, names of files to write."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.config import GridSpec
from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.digest import DIGEST_VERSION
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError
from dist_train.files import write_text
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.progress import Stages
from dist_train.shards.discover import discover, read_inputs
from dist_train.shards.index import Index
from dist_train.shards.prefetch import fetched
from dist_train.shards.reader import ShardReader
from dist_train.shards.sources import read_chunk

MAX_NAME_BYTES = 200


@contextmanager
def bundle_folder(model: str, tracking_uri: str | None) -> Iterator[Path]:
    """The bundle of a folder or of a registry entry 'models:/NAME@ALIAS', which is gone after the block."""
    if not model.startswith("models:/"):
        yield Path(model)
        return
    if not tracking_uri:
        raise ConfigError(f"{model} is in a registry: give --tracking-uri or set MLFLOW_TRACKING_URI")
    from dist_train.backends.mlflow_registry import pull

    with tempfile.TemporaryDirectory() as folder:
        yield pull(tracking_uri, model, Path(folder))


def load_codec(model: str, tracking_uri: str | None) -> tuple[Codec, dict[str, Any]]:
    """The model of a bundle folder or registry entry, ready for use, and its config."""
    with bundle_folder(model, tracking_uri) as folder:
        network, config = read_bundle(folder)
        return Codec(network), config


def read_crystals(inputs: Iterable[str], grid: GridSpec) -> list[Crystal]:
    """The crystals of folders, files, archives and tables. Raises CrystalError for the first that can't be read."""
    crystals = []
    for item in read_inputs(inputs, grid.max_atoms):
        if isinstance(item, CrystalError):
            raise item
        crystals.append(item)
    return crystals


def read_many(
    inputs: Sequence[str], max_atoms: int, limit: int | None, workers: int, stages: Stages
) -> tuple[list[Crystal], list[tuple[str, str]]]:
    """The first `limit` crystals of files, folders, archives and tables, and (file, reason) of what can't be read."""
    found = discover(inputs)
    crystals: list[Crystal] = []
    refused = [(file, reason) for _, file, reason in found.refused]
    with stages.stage("read", sum(map(len, found.chunks)), "files and rows") as bar:
        chunks = parallel_map(partial(read_chunk, max_atoms=max_atoms), found.chunks, workers, 1)
        for file, item in bar.over(item for chunk in chunks for item in chunk):
            if isinstance(item, Crystal):
                crystals.append(item)
            else:
                refused.append((file, str(item)))
            if len(crystals) == limit:
                break
    return crystals, refused


def read_split(index: Index, split: str, limit: int | None, stages: Stages) -> list[Crystal]:
    """The first `limit` crystals of a split."""
    reader = ShardReader(index, split)
    count = min(len(reader), limit or len(reader))
    with stages.stage("read", count) as bar:
        return list(bar.over(map(reader.crystal, fetched(reader, count))))


def seen(
    digests: Sequence[Sequence[int]], listed: NDArray[np.uint64] | None, about: dict[str, Any]
) -> NDArray[np.bool_] | None:
    """[N] which crystals, by `digests_near` of each, a model was trained on; None where its bundle doesn't tell.

    listed, about: what the bundle lists, and the entry `training_digests` of what it says of itself.
    """
    if listed is None or about.get("version") != DIGEST_VERSION:
        return None
    known = set(listed.tolist())
    return np.array([not known.isdisjoint(near) for near in digests], bool)


def file_names(ids: Iterable[str]) -> list[str]:
    """A name for each id that any disk takes, no two alike: ids that give the same name are numbered."""
    names: dict[str, None] = {}
    for id in ids:
        name = first = re.sub(r"[^\w.-]", "_", id).encode()[:MAX_NAME_BYTES].decode(errors="ignore")
        count = 1
        while name in names:
            count += 1
            name = f"{first}-{count}"
        names[name] = None
    return list(names)


def write_cifs(folder: Path, decoded: Iterable[Decoded]) -> None:
    """A CIF file for each crystal, named by its id (see `file_names`)."""
    crystals = [item.crystal for item in decoded if item.crystal is not None]
    for name, crystal in zip(file_names(crystal.id for crystal in crystals), crystals, strict=True):
        write_text(folder / f"{name}.cif", write_cif(crystal))
