"""Shards read by Ray Data: by our source with every encoding, and by Ray's own reader."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sharding import few_rows, write_shards

from dist_train.backends.ray_data import read_shards
from dist_train.config import DataConfig, GridSpec
from dist_train.errors import ShardError
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader

TABLE = Path(__file__).parents[2] / "data" / "sample" / "materials_project.parquet"
ADAPTIVE = GridSpec(shape="adaptive", channels=("occupancy", "period"))
CRYSTALS, PER_SHARD = 24, 5


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of files that it leaves to the garbage collector
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        ray.init(
            address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False,
            logging_level="ERROR", log_to_driver=False,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def shards(folder: Path, **settings: object) -> Index:
    table = few_rows(TABLE, CRYSTALS, folder)
    data = DataConfig(
        inputs=(table,), shards=folder / "shards", splits={"train": 1.0}, samples_per_shard=PER_SHARD, **settings
    )
    return write_shards(data, ADAPTIVE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"encoding": "compact"}, {"store": "structures"}], ids=str)
def test_our_source_gives_what_the_reader_gives(tmp_path: Path, settings: dict[str, object]) -> None:
    index = shards(tmp_path, **settings)
    reader = ShardReader(index, "train")
    rows = {row["key"]: row for row in read_shards(index.root, "train").iter_rows()}
    assert len(rows) == len(reader) > PER_SHARD
    assert len({sample.shape for _, sample in reader.entries}) > 1
    for place, (_, sample) in enumerate(reader.entries):
        row, record = rows[sample.key], reader[place]
        assert (row["id"], row["copy"]) == (sample.id, 0)
        np.testing.assert_array_equal(row["lattice_A"], record.crystal.lattice_A)
        np.testing.assert_array_equal(row["frac"], record.crystal.frac_N3)
        np.testing.assert_array_equal(row["numbers"], record.crystal.numbers_N)
        if index.store == "structures":
            assert not {"density", "species"} & set(row)
            continue
        np.testing.assert_array_equal(row["density"], record.density_CDHW)
        np.testing.assert_array_equal(row["species"], record.species_DHW)
        assert (row["density"].dtype, row["species"].dtype) == (np.float16, np.uint8)


@pytest.mark.filterwarnings("ignore")
def test_rays_own_reader_reads_raw_shards(tmp_path: Path) -> None:
    import ray

    index = shards(tmp_path)
    reader = ShardReader(index, "train")
    rows = ray.data.read_webdataset([str(index.root / shard.name) for shard in index.shards]).take_all()
    by_key = {row["__key__"]: row for row in rows}
    assert len(by_key) == len(reader)
    for place, (_, sample) in enumerate(reader.entries):
        row = by_key[sample.key]
        np.testing.assert_array_equal(row["density.npy"], reader[place].density_CDHW)
        np.testing.assert_array_equal(row["species.npy"], reader[place].species_DHW)
        assert row["structure.json"]["id"] == sample.id


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_sample_is_named_or_left_out(tmp_path: Path) -> None:
    index = shards(tmp_path)
    shard = index.shards[1]
    sample = shard.samples[2]
    offset, _ = sample.members["species.npy"]
    with (index.root / shard.name).open("r+b") as stream:
        stream.seek(offset + 300)
        byte = stream.read(1)
        stream.seek(offset + 300)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(Exception, match=f"sample {sample.key} .*{shard.name} is damaged: crc32"):
        read_shards(index.root, "train").take_all()
    rows = read_shards(index.root, "train", skip_damaged=True).take_all()
    assert {row["key"] for row in rows} == {s.key for _, s in index.samples("train")} - {sample.key}


def test_a_split_that_is_not_there_is_told(tmp_path: Path) -> None:
    index = shards(tmp_path)
    with pytest.raises(ShardError, match="no shard of split 'val'"):
        read_shards(index.root, "val")
