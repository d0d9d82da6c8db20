"""Voxelising on real Ray clusters: nothing lost, the same bytes whoever computes them, and every interruption mended."""

from __future__ import annotations

import csv
import gc
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import webdataset

from dist_train.backends.ray_voxelize import WORK_NAME, voxelize
from dist_train.config import RunConfig, load_config
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError, DistTrainError, ShardError
from dist_train.files import sha256
from dist_train.shards.codec import MEMBERS
from dist_train.shards.index import INDEX_NAME, REJECTED_NAME, Index, record_from_json, verify
from dist_train.shards.reader import ShardReader

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
FAMILIES = ("carbon_24", "cod_experimental", "mp2025_n001_020", "mp_20", "perov_5")
CIFS_PER_FAMILY = 5
BROKEN = ("broken_empty", "broken_truncated", "broken_unknown_element")
TABLE_ROWS = 120
INPUTS = len(FAMILIES) * CIFS_PER_FAMILY + len(BROKEN) + TABLE_ROWS
LIMIT_S = 120
SMALL_DISK = "1200k"
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


# Processes: each in a session of its own, which is ended as a whole.


def _session(leader: int) -> list[int]:
    """The living processes of a session; Ray gives its workers process groups of their own within it."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def kill_session(leader: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of a session, its leader's group at once, until none is left."""
    if leader.poll() is None:
        os.killpg(leader.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while members := _session(leader.pid):
        assert time.monotonic() < deadline, f"processes {members} can't be ended"
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        leader.poll()
        time.sleep(0.05)
    leader.wait(10)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, start_new_session=True, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        kill_session(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream
            stream.close()


def command(settings: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "dist_train", "voxelize", *(part for item in settings for part in ("--set", item))]


# Runs: made once for the module, as a cluster takes seconds to start.


@pytest.fixture(scope="module", autouse=True)
def no_foreign_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield


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


def config(inputs: Path, shards: Path, *more: str) -> RunConfig:
    return load_config(None, settings(inputs, shards, *more))


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
    return voxelize(config(inputs, tmp_path_factory.mktemp("alone") / "shards", "data.workers=1"))


@pytest.fixture(scope="module")
def refused(inputs: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder whose job has failed as too much was rejected, and the message."""
    root = tmp_path_factory.mktemp("joined") / "shards"
    with pytest.raises(DataError) as caught:
        voxelize(config(inputs, root, cluster, "data.max_rejected_fraction=0.01"))
    assert not (root / INDEX_NAME).exists()
    assert not list(root.glob("*.tar"))
    assert read_rejected(root)
    return root, str(caught.value)


@pytest.fixture(scope="module")
def joined(inputs: Path, cluster: str, refused: tuple[Path, str]) -> Index:
    """The same job on two workers of a running cluster, in the folder where it has failed before."""
    return voxelize(config(inputs, refused[0], cluster, "data.workers=2"))


def read_rejected(root: Path) -> list[dict[str, str]]:
    with (root / REJECTED_NAME).open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones included."""
    return {str(path.relative_to(root)): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


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
    assert set(contents(alone.root)) == {*(shard.name for shard in alone.shards), INDEX_NAME, REJECTED_NAME}
    assert not list(verify(alone))
    assert Index.read(alone.root).shards == alone.shards


def test_bytes_do_not_depend_on_workers_or_cluster(alone: Index, joined: Index) -> None:
    """Shards, index and report of one worker and of two, in folders of different names."""
    assert contents(joined.root) == contents(alone.root)
    assert len(alone.shards) > 10


def test_too_much_rejected(refused: tuple[Path, str]) -> None:
    root, message = refused
    rejected = len(read_rejected(root))
    assert f"{rejected} of {INPUTS} inputs were rejected, more than data.max_rejected_fraction 0.01" in message
    assert str(root / REJECTED_NAME) in message


def test_running_again_does_nothing(inputs: Path, alone: Index) -> None:
    before = {path: path.stat().st_mtime_ns for path in alone.root.iterdir()}
    again = voxelize(config(inputs, alone.root, NO_CLUSTER))
    assert again == Index.read(alone.root)
    assert again.digest == alone.digest
    assert {path: path.stat().st_mtime_ns for path in alone.root.iterdir()} == before


@pytest.mark.parametrize("change", ["grid.sigma_A=0.4", "data.samples_per_shard=9", "grid.channels=[period]"])
def test_another_config_in_a_finished_folder_is_refused(inputs: Path, alone: Index, change: str) -> None:
    before = contents(alone.root)
    with pytest.raises(ShardError, match="holds another run"):
        voxelize(config(inputs, alone.root, change, NO_CLUSTER))
    assert contents(alone.root) == before


def test_other_inputs_under_the_same_path_are_noticed(inputs: Path, alone: Index) -> None:
    extra = inputs / "cifs" / "extra.cif"
    shutil.copy(inputs / "cifs" / "broken" / f"{BROKEN[0]}.cif", extra)
    try:
        with pytest.raises(ShardError, match="holds another run"):
            voxelize(config(inputs, alone.root, NO_CLUSTER))
    finally:
        extra.unlink()


def test_another_config_in_an_unfinished_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "shards" / WORK_NAME).mkdir(parents=True)
    (tmp_path / "shards" / WORK_NAME / "config_hash").write_text("0123456789abcdef")
    with pytest.raises(ShardError, match="unfinished job of another config"):
        voxelize(config(inputs, tmp_path / "shards", NO_CLUSTER))


def test_a_folder_of_other_things_is_refused_and_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ShardError, match=r"is not empty \(1 entries, such as thesis\.txt\) and holds no shards"):
        voxelize(config(inputs, tmp_path, NO_CLUSTER))
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
        assert {name for name in sample if not name.startswith("__")} == set(MEMBERS)
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
        voxelize(config(inputs, tmp_path / "shards", NO_CLUSTER))


# Interruptions


def test_a_killed_job_is_completed_by_the_next(inputs: Path, cluster: str, alone: Index, tmp_path: Path) -> None:
    """SIGKILL to the job and all of its cluster once the first shard is there; another cluster does the rest."""
    root = tmp_path / "shards"
    with started(command(settings(inputs, root, "data.workers=2"))) as process:
        deadline = time.monotonic() + LIMIT_S
        while not list(root.glob("*.tar")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kill_session(process)
    recorded = [path for path in root.glob("*.tar") if (root / WORK_NAME / f"{path.name}.json").exists()]
    kept = {path: path.stat().st_mtime_ns for path in recorded}
    assert not (root / INDEX_NAME).exists(), "the job was killed too late for this test to mean anything"
    assert 0 < len(list(root.glob("*.tar"))) < len(alone.shards)
    for path in root.glob("*.tar"):
        assert sha256(path) == sha256(alone.root / path.name), "a shard under its final name is whole"
    voxelize(config(inputs, root, cluster))
    assert contents(root) == contents(alone.root), "the same bytes, and nothing left behind"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished shards are not built again"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A small file system. Skips the test where none can be mounted."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("only root on Linux can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, timeout=30
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


@pytest.mark.parametrize("size", ["40k", SMALL_DISK], ids=["scan", "build"])
def test_a_full_disk_is_told_in_one_line(inputs: Path, cluster: str, tmp_path: Path, size: str) -> None:
    with small_disk(tmp_path, size) as disk, started(command(settings(inputs, disk / "shards", cluster))) as process:
        _, errors = process.communicate(timeout=LIMIT_S)
        root = disk / "shards"
        assert process.returncode == 2
        (line,) = [line for line in errors.splitlines() if "dist-train: error" in line]
        assert f"the disk of {root} is full; free space and run the same command again" in line, errors
        assert "Traceback" not in errors
        assert not (root / INDEX_NAME).exists()
        assert not list(root.rglob("*.tmp"))
        for path in root.glob("*.tar"):
            record = root / WORK_NAME / f"{path.name}.json"
            with tarfile.open(path) as tar:
                assert len(tar.getnames()) % 3 == 0
            if record.exists():
                assert record_from_json(record.read_text()).sha256 == sha256(path)


# Workers


def test_a_lost_shard_is_built_again(inputs: Path, cluster: str, tmp_path: Path, alone: Index) -> None:
    root = tmp_path / "shards"
    shutil.copytree(alone.root, root)
    (root / alone.shards[0].name).unlink()
    voxelize(config(inputs, root, cluster))
    assert contents(root) == contents(alone.root)


def test_a_link_to_nothing_is_a_rejected_row(cluster: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(SAMPLE / "cifs" / "perov_5" / "16137.cif", folder / "good.cif")
    (folder / "gone.cif").symlink_to(tmp_path / "nothing")
    more = (cluster, "data.max_rejected_fraction=0.5", f"data.inputs=[{folder}]")
    index = voxelize(config(folder, tmp_path / "shards", *more))
    assert index.counts["accepted"] == index.counts["rejected"] == 1
    (row,) = read_rejected(index.root)
    assert row["id"] == "gone"


def test_an_address_without_a_cluster_is_told_at_once(inputs: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DistTrainError, match=r"no Ray cluster answers at data\.ray_address 127\.0\.0\.1:1"):
        voxelize(config(inputs, tmp_path / "shards", "data.ray_address='127.0.0.1:1'"))
    assert time.monotonic() - began < 10


def test_workers_need_no_torch() -> None:
    """What a Ray worker imports: it would cost each of them seconds and hundreds of megabytes."""
    script = (
        "import sys, dist_train.shards.writer, dist_train.shards.plan, dist_train.backends.ray_voxelize\n"
        "assert not {'torch', 'deepspeed', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
