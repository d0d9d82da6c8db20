"""The verb report: the page of a training run, made at any time."""

from __future__ import annotations

from pathlib import Path

from dist_train.config import RunConfig, load_config
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, DistTrainError
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.training_report import REPORT, SHOWN, write_training_report


def report(run_dir: Path, out: Path | None = None) -> str:
    """Write the page of a run, to its folder unless `out` says where; returns a summary.

    The model's crystals are in it where the run is finished and its shards can be read. Raises ConfigError for a folder
    that holds no run.
    """
    kept, path = run_dir / "run.yaml", out or run_dir / REPORT
    if not kept.is_file():
        raise ConfigError(f"{run_dir} holds no training run (run.yaml is needed): give the run_dir of dist-train train")
    codec, crystals, told = None, list[Crystal](), "; without crystals: the run is not finished"
    if (run_dir / "bundle").is_dir():
        codec, told = Codec(read_bundle(run_dir / "bundle")[0]), ""
        try:
            crystals = validation_crystals(load_config(kept))
        except (DistTrainError, OSError) as error:
            told = f"; without crystals: {error}"
    write_training_report(run_dir, path, codec, crystals)
    return f"written to {path}{told}"


def validation_crystals(config: RunConfig) -> list[Crystal]:
    """The first few of the validation split."""
    data = config.data
    reader = ShardReader(Index.read(data.shards, data.cache_dir, data.cache_MB), "val")
    return [reader.crystal(place) for place in range(min(SHOWN, len(reader)))]
