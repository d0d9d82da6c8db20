"""Training on data that are damaged, incomplete, structures alone, or at a URL."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
from sharding import few_rows, write_shards
from small_run import ROOT, small_config, write_small_shards

from dist_train.commands import training as commands
from dist_train.config import RunConfig
from dist_train.errors import CheckpointError, ShardError
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.training.loop import batch_plan
from dist_train.training.tracker import read_spool


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_small_shards(folder)
    return folder


def settings(shards: Path, run: Path, *overrides: str) -> RunConfig:
    return small_config(shards, f"run_dir={run}", "train.stop_after_step=1", *overrides)


def loss(run: Path) -> float:
    (record,) = (r for r in read_spool(run / "metrics.jsonl") if "train/loss" in r["metrics"])
    return float(record["metrics"]["train/loss"])


def test_a_damaged_sample_is_named_and_passed_over(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(shards / "shards", tmp_path / "shards")
    config = settings(tmp_path, tmp_path / "run")
    index = Index.read(tmp_path / "shards")
    reader = ShardReader(index, "train")
    shard, sample = reader.entries[int(batch_plan(config, reader, 0, 1).places(0)[3])]
    with (index.root / shard.name).open("r+b") as stream:
        stream.seek(sample.members["species.npy"][0] + 500)
        stream.write(b"\xff")
    commands.train(config)
    assert f"passed over at step 0: sample {sample.key} ({sample.id})" in caplog.text
    assert loss(tmp_path / "run") < float("inf")
    with pytest.raises(ShardError, match=rf"data.max_damaged 0 are passed over; the last: sample {sample.key}"):
        commands.train(settings(tmp_path, tmp_path / "other", "data.max_damaged=0"))


def test_a_missing_shard_is_found_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "shards", tmp_path / "shards")
    (name,) = (shard.name for shard in Index.read(tmp_path / "shards").split("val"))
    (tmp_path / "shards" / name).unlink()
    with pytest.raises(ShardError, match=rf"1 shards of .*{name} is missing; run dist-train verify"):
        commands.train(settings(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_structures_are_trained_on_and_validated(shards: Path, tmp_path: Path) -> None:
    """Their first loss is that of the stored grids, to float16."""
    config = settings(tmp_path, tmp_path / "run", "train.validate_every=1")
    inputs = (few_rows(ROOT / "data" / "sample" / "perov_5.parquet", 72, tmp_path),)
    write_shards(config.data.model_copy(update={"inputs": inputs, "store": "structures"}), config.grid)
    commands.train(config)
    assert any("val/loss" in record["metrics"] for record in read_spool(tmp_path / "run" / "metrics.jsonl"))
    commands.train(settings(shards, tmp_path / "grids"))
    assert loss(tmp_path / "run") == pytest.approx(loss(tmp_path / "grids"), rel=1e-3)


def test_training_from_a_url_gives_the_loss_of_training_from_the_folder(shards: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for path in (shards / "shards").iterdir():
        system.pipe_file(f"/training/{path.name}", path.read_bytes())
    remote = settings(shards, tmp_path / "url", "data.shards=memory://training", f"data.cache_dir={tmp_path}")
    for config in (remote, settings(shards, tmp_path / "folder")):
        commands.train(config)
    assert loss(tmp_path / "url") == loss(tmp_path / "folder")
    (cached,) = (tmp_path / "dist_train_shards").glob("*/train-000000.tar")
    assert cached.read_bytes() == (shards / "shards" / cached.name).read_bytes()


def test_a_run_goes_on_with_the_windows_that_it_began_with(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path))
    with pytest.raises(CheckpointError, match=r"its data\.shuffle_window was 65536, now 10"):
        commands.train(settings(shards, tmp_path, "data.shuffle_window=10"))
