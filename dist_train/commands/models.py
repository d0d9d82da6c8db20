"""The verb generate, and what it shares with others that use models."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train.config import GridSpec
from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.crystal.parallel import in_order
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError, DataError
from dist_train.files import write_text
from dist_train.generate import decode, encode, interpolate_latents, reconstruct, sample_latents
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.shards.discover import discover
from dist_train.shards.sources import read_chunk

WRITERS = 8
"""Threads that write files."""


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
    found, crystals = discover(inputs), []
    for _, file, reason in found.refused:
        raise CrystalError(f"{file}: {reason}")
    for file, item in (row for chunk in found.chunks for row in read_chunk(chunk, grid.max_atoms)):
        if isinstance(item, CrystalError):
            raise CrystalError(f"{file}: {item}")
        crystals.append(item)
    return crystals


def write_cifs(folder: Path, decoded: Iterable[Decoded]) -> None:
    """A CIF file for each crystal, named by its id; ids that give the same name are numbered, so that none is lost."""
    names: Counter[str] = Counter()

    def named(crystal: Crystal) -> Path:
        name = re.sub(r"[^\w.-]", "_", crystal.id)
        names[name] += 1
        count = names[name]
        return folder / (f"{name}-{count}.cif" if count > 1 else f"{name}.cif")

    files = ((named(item.crystal), item.crystal) for item in decoded if item.crystal is not None)
    # Most of the time goes in waiting for the disk.
    for _ in in_order(ThreadPoolExecutor(WRITERS), lambda file: write_text(file[0], write_cif(file[1])), files, 8 * WRITERS):
        pass


def generate(
    task: str, inputs: Sequence[str], model: str, tracking_uri: str | None, out: Path, n: int, steps: int, seed: int,
    workers: int = 1,
) -> str:  # fmt: skip
    """Reconstruct, sample or interpolate, over `workers` threads and processes; writes CIF files, returns a summary."""
    if (task == "sample") == bool(inputs):
        raise DataError(f"generate {task} takes {'no' if task == 'sample' else 'some'} crystals, {len(inputs)} were given")
    codec, _ = load_codec(model, tracking_uri)
    crystals = read_crystals(inputs, codec.model.grid) if inputs else []
    ids = [crystal.id for crystal in crystals]
    if task == "sample":
        ids = [f"sample-{seed}-{i:05d}" for i in range(n)]
        decoded: Iterable[Decoded] = decode(codec, sample_latents(codec, n, seed, workers), ids, workers)
    elif task == "interpolate":
        if len(crystals) != 2:
            raise DataError(f"generate interpolate takes two crystals, {len(crystals)} were given")
        start, stop = encode(codec, [representable(crystal, codec.model.grid) for crystal in crystals])
        ids = [f"step-{i:02d}" for i in range(steps)]
        decoded = decode(codec, interpolate_latents(start, stop, steps), ids, workers)
    else:
        decoded = reconstruct(codec, crystals, workers)
    failed: list[str] = []

    def told() -> Iterator[Decoded]:
        for id, item in zip(ids, decoded, strict=True):
            if item.crystal is None:
                failed.append(f"\n  {id}: {item.reason}")
            yield item

    write_cifs(out, told())
    return f"{len(ids) - len(failed)} of {len(ids)} crystals written to {out}" + "".join(failed)
