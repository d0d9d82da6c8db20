"""Voxelising on real Ray clusters: nothing lost, the same bytes whoever computes them, and every interruption mended."""

from __future__ import annotations

import csv
import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from processes import contents, started

from dist_train.backends import ray_voxelize
from dist_train.backends.ray_voxelize import WORK_NAME, voxelize
from dist_train.config import load_config
from dist_train.crystal.structure import Crystal
from dist_train.dataset_card import CARD_NAME, PICTURES_NAME
from dist_train.errors import DataError, DistTrainError, ShardError
from dist_train.shards.codec import MEMBERS
from dist_train.shards.index import INDEX_NAME, REJECTED_NAME, Index
from dist_train.shards.reader import ShardReader
from dist_train.shards.verify import verify

pytestmark = pytest.mark.usefixtures("no_foreign_cluster")
SAMPLE = Path(__file__).parents[2] / "data" / "sample"
FAMILIES = ("carbon_24", "cod_experimental", "mp2025_n001_020", "mp_20", "perov_5")
CIFS_PER_FAMILY = 5
BROKEN = ("broken_empty", "broken_truncated", "broken_unknown_element")
TABLE_ROWS = 120
INPUTS = len(FAMILIES) * CIFS_PER_FAMILY + len(BROKEN) + TABLE_ROWS
NO_CLUSTER = "data.ray_address=nowhere"
"""For jobs that must end before they look for a cluster: this is no address."""

CLUSTER = """
import os, sys
import ray
context = ray.init(
    address="local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, logging_level="ERROR"
)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


TABLE_BY_TABLE = """
import re, sys
from pathlib import Path
import psutil
from dist_train.config import DataConfig, GridSpec
from dist_train.shards.plan import ShardTask
from dist_train.shards.scan import read_scan, scan_chunk
from dist_train.shards.discover import discover
from dist_train.shards.writer import build_shard
work, grid = Path(sys.argv[1]), GridSpec(shape="adaptive")
data = DataConfig(inputs=(str(work),), shards=work)
for part, chunk in enumerate(discover(data.inputs).chunks):
    scan_chunk(part, chunk, work, data, grid)
    entries = tuple((row, 0) for row in read_scan(work, part).rows)
    build_shard(ShardTask(f"train-{part:06d}.tar", "train", 0, entries), work, work, data, grid)
    me = psutil.Process()
    status = [Path(f"/proc/{process.pid}/status").read_text() for process in (me, *me.children())]
    print(sum(int(re.search(r"VmRSS:\\s+(\\d+)", text)[1]) for text in status) // 1024)
"""


# Runs: made once for the module, as a cluster takes seconds to start.


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real CIF files, some of them broken, and a table of perovskites."""
    folder = tmp_path_factory.mktemp("inputs")
    for family in FAMILIES:
        (folder / "cifs" / family).mkdir(parents=True)
        for path in sorted((SAMPLE / "cifs" / family).glob("*.cif"))[:CIFS_PER_FAMILY]:
            shutil.copy(path, folder / "cifs" / family)
    (folder / "cifs" / "broken").mkdir()
    for name in BROKEN:
        shutil.copy(SAMPLE / "cifs" / "broken" / f"{name}.cif", folder / "cifs" / "broken")
    pq.write_table(pq.read_table(SAMPLE / "perov_5.parquet").slice(0, TABLE_ROWS), folder / "perov.parquet")
    return folder


def settings(inputs: Path, shards: Path, *more: str) -> tuple[str, ...]:
    return (
        f"data.inputs=[{inputs}/cifs, {inputs}/perov.parquet]",
        f"data.shards={shards}",
        "data.splits={train: 0.8, val: 0.1, test: 0.1}",
        "data.samples_per_shard=8",
        "data.max_rejected_fraction=0.2",
        "grid.shape=adaptive",
        *more,
    )


def run(inputs: Path, shards: Path, *more: str) -> Index:
    config = load_config(None, settings(inputs, shards, *more))
    return voxelize(config.data, config.grid)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two workers that several jobs join."""
    with started([sys.executable, "-c", CLUSTER]) as process:
        assert process.stdin
        assert process.stdout
        yield f"data.ray_address={process.stdout.readline().strip()}"
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The job on a cluster of its own with one worker."""
    return run(inputs, tmp_path_factory.mktemp("alone") / "shards", "data.workers=1")


@pytest.fixture(scope="module")
def refused(inputs: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder whose job has failed as too much was rejected, and the message."""
    root = tmp_path_factory.mktemp("joined") / "shards"
    with pytest.raises(DataError) as caught:
        run(inputs, root, cluster, "data.max_rejected_fraction=0.01")
    assert not (root / INDEX_NAME).exists()
    assert not list(root.glob("*.tar"))
    assert read_rejected(root)
    return root, str(caught.value)


@pytest.fixture(scope="module")
def joined(inputs: Path, cluster: str, refused: tuple[Path, str]) -> Index:
    """The same job on two workers of a running cluster, in the folder where it has failed before: it isn't scanned again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_voxelize, "scan_chunk", None)
        return run(inputs, refused[0], cluster, "data.workers=2")


def read_rejected(root: Path) -> list[dict[str, str]]:
    with (root / REJECTED_NAME).open(newline="") as stream:
        return list(csv.DictReader(stream))


# What comes out


def test_no_input_is_lost(inputs: Path, alone: Index) -> None:
    counts, rejected = alone.counts, read_rejected(alone.root)
    written = sorted(sample.id for shard in alone.shards for sample in shard.samples)
    assert counts["inputs"] == INPUTS == counts["accepted"] + counts["rejected"]
    assert counts["accepted"] == len(written) == len(set(written))
    assert counts["rejected"] == len(rejected)
    assert counts["rejected"] == sum(counts[f"rejected_{stage}"] for stage in ("parse", "grid", "plan"))
    given = {str(path.relative_to(inputs / "cifs").with_suffix("")) for path in (inputs / "cifs").rglob("*.cif")}
    given |= set(pq.read_table(inputs / "perov.parquet", columns=["id"])["id"].to_pylist())
    assert set(written) | {row["id"] for row in rejected} == given


def test_rejected_files_are_listed_with_a_reason(alone: Index) -> None:
    rows = {row["file"]: row for row in read_rejected(alone.root)}
    assert {f"broken/{name}.cif" for name in BROKEN} <= set(rows)
    assert all(row["stage"] in ("parse", "grid") and len(row["reason"]) > 5 for row in rows.values())
    assert {row["stage"] for file, row in rows.items() if file.startswith("broken/")} == {"parse"}
    assert "empty" in rows["broken/broken_empty.cif"]["reason"]
    assert "'Xx'" in rows["broken/broken_unknown_element.cif"]["reason"]


def test_the_folder_holds_shards_index_and_report_and_nothing_else(alone: Index) -> None:
    pictures = {f"{PICTURES_NAME}/{name}.png" for name in ("atoms", "elements", "volumes")}
    shards = {shard.name for shard in alone.shards}
    assert set(contents(alone.root)) == {*shards, INDEX_NAME, REJECTED_NAME, CARD_NAME, *pictures}
    assert not verify(alone, workers=1)
    assert Index.read(alone.root).shards == alone.shards


def test_bytes_do_not_depend_on_workers_or_cluster(inputs: Path, alone: Index, joined: Index, tmp_path: Path) -> None:
    """Every file of one worker, of two that were joined, and of more than there are processors."""
    eight = run(inputs, tmp_path / "eight", "data.workers=8")
    assert contents(joined.root) == contents(alone.root) == contents(eight.root)
    assert len(alone.shards) > 10


def test_too_much_rejected(refused: tuple[Path, str]) -> None:
    root, message = refused
    rejected = len(read_rejected(root))
    assert f"{rejected} of {INPUTS} inputs were rejected, more than data.max_rejected_fraction 0.01" in message
    assert str(root / REJECTED_NAME) in message


def test_running_again_does_nothing(inputs: Path, alone: Index) -> None:
    before = {path: path.stat().st_mtime_ns for path in alone.root.iterdir()}
    again = run(inputs, alone.root, NO_CLUSTER)
    assert again == Index.read(alone.root)
    assert again.digest == alone.digest
    assert {path: path.stat().st_mtime_ns for path in alone.root.iterdir()} == before


@pytest.mark.parametrize("change", ["grid.sigma_A=0.4", "data.samples_per_shard=9", "grid.channels=[period]"])
def test_another_config_in_a_finished_folder_is_refused(inputs: Path, alone: Index, change: str) -> None:
    before = contents(alone.root)
    with pytest.raises(ShardError, match="holds another run"):
        run(inputs, alone.root, change, NO_CLUSTER)
    assert contents(alone.root) == before


def test_other_inputs_under_the_same_path_are_noticed(inputs: Path, alone: Index) -> None:
    extra = inputs / "cifs" / "extra.cif"
    shutil.copy(inputs / "cifs" / "broken" / f"{BROKEN[0]}.cif", extra)
    try:
        with pytest.raises(ShardError, match="holds another run"):
            run(inputs, alone.root, NO_CLUSTER)
    finally:
        extra.unlink()


def test_another_config_in_an_unfinished_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "shards" / WORK_NAME).mkdir(parents=True)
    (tmp_path / "shards" / WORK_NAME / "config_hash").write_text("0123456789abcdef")
    with pytest.raises(ShardError, match="unfinished job of another config"):
        run(inputs, tmp_path / "shards", NO_CLUSTER)


def test_a_folder_of_other_things_is_refused_and_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ShardError, match=r"is not empty \(1 entries, such as thesis\.txt\) and holds no shards"):
        run(inputs, tmp_path, NO_CLUSTER)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the tar files to the garbage collector
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_plain_webdataset_reads_the_same(alone: Index, split: str) -> None:
    reader = ShardReader(alone, split)
    paths = [str(alone.root / shard.name) for shard in alone.split(split)]
    plain = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    gc.collect()
    assert len(plain) == len(reader)
    for place, sample in enumerate(plain):
        record = reader[place]
        assert sample["__key__"] == reader.entries[place][1].key
        assert {name for name in sample if not name.startswith("__")} == set(MEMBERS["raw"])
        np.testing.assert_array_equal(sample["density.npy"], record.density_CDHW)
        np.testing.assert_array_equal(sample["species.npy"], record.species_DHW)
        assert (sample["density.npy"].dtype, sample["species.npy"].dtype) == (np.float16, np.uint8)
        assert sample["structure.json"]["numbers"] == record.crystal.numbers_N.tolist()
        assert sample["structure.json"]["id"] == record.crystal.id
        np.testing.assert_array_equal(sample["structure.json"]["lattice_A"], record.crystal.lattice_A)


def test_crystals_of_a_formula_share_a_split(alone: Index) -> None:
    splits: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        reader = ShardReader(alone, split)
        for place in range(len(reader)):
            crystal: Crystal = reader.crystal(place)
            splits.setdefault(crystal.formula, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) > 100


def test_an_address_that_is_none_is_told(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(DistTrainError, match=r"Ray could not be reached \(nowhere\).*check data\.ray_address"):
        run(inputs, tmp_path / "shards", NO_CLUSTER)


# Workers


def test_a_lost_shard_is_built_again(inputs: Path, cluster: str, tmp_path: Path, alone: Index) -> None:
    root = tmp_path / "shards"
    shutil.copytree(alone.root, root)
    (root / alone.shards[0].name).unlink()
    run(inputs, root, cluster)
    assert contents(root) == contents(alone.root)


def test_a_link_to_nothing_is_a_rejected_row(cluster: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(SAMPLE / "cifs" / "perov_5" / "16137.cif", folder / "good.cif")
    (folder / "gone.cif").symlink_to(tmp_path / "nothing")
    more = (cluster, "data.max_rejected_fraction=0.5", f"data.inputs=[{folder}]")
    index = run(folder, tmp_path / "shards", *more)
    assert index.counts["accepted"] == index.counts["rejected"] == 1
    (row,) = read_rejected(index.root)
    assert row["id"] == "gone"


def test_an_address_without_a_cluster_is_told_at_once(inputs: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DistTrainError, match=r"no Ray cluster answers at data\.ray_address 127\.0\.0\.1:1"):
        run(inputs, tmp_path / "shards", "data.ray_address='127.0.0.1:1'")
    assert time.monotonic() - began < 10


def test_memory_does_not_grow_with_the_crystals(tmp_path: Path) -> None:
    """Of a worker and its reader, after each of six equal tables."""
    table, rows = pq.read_table(SAMPLE / "perov_5.parquet"), 400
    for part in range(6):
        pq.write_table(table.slice(part * rows, rows), tmp_path / f"{part}.parquet")
    command = [sys.executable, "-c", TABLE_BY_TABLE, str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    first, *_, last = map(int, done.stdout.split())
    assert first > 100 and last < first + 20, done.stdout


def test_workers_need_no_torch() -> None:
    """What a Ray worker imports: it would cost each of them seconds and hundreds of megabytes."""
    script = (
        "import sys, dist_train.shards.writer, dist_train.shards.plan, dist_train.backends.ray_voxelize\n"
        "assert not {'torch', 'deepspeed', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
