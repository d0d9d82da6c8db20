"""Workers, nodes and drivers killed, disks filled, files damaged: afterwards the same bytes, and nothing done twice."""

from __future__ import annotations

import csv
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from processes import (
    LIMIT_S,
    commands,
    contents,
    dist_train,
    holders,
    kill_session,
    session,
    small_disk,
    started,
    wait_until,
)

from dist_train.backends.ray_voxelize import WORK_NAME
from dist_train.files import sha256
from dist_train.shards.index import INDEX_NAME, REJECTED_NAME, Index, record_from_json
from dist_train.shards.verify import QUARANTINE

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
TABLES, TABLE_ROWS, EMPTY_FILES = 4, 300, 200
CRYSTALS = TABLES * TABLE_ROWS
PARTS = TABLES + -(-EMPTY_FILES // 64)
SETTINGS = (
    "data.splits={train: 0.8, val: 0.1, test: 0.1}", "data.samples_per_shard=96", "data.max_rejected_fraction=0.2",
    "grid.shape=adaptive", "grid.max_spacing_A=0.2", "grid.channels=[occupancy, z_density, period, group]",
    "data.encoding=compact",
)  # fmt: skip
"""Grids that take a while to make and little space."""
TOKEN = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
NOWHERE = "data.ray_address=nowhere"
"""For jobs that must end before they look for a cluster."""


@dataclass(frozen=True)
class Nodes:
    """The cluster of two nodes, and what finds it."""

    process: subprocess.Popen[str]
    address: str
    dashboard: str
    environment: dict[str, str]

    def tell(self, command: str) -> None:
        """'remove' or 'add' the second node."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == command

    def workers(self, root: Path, kind: str) -> list[psutil.Process]:
        """Those in the middle of a file of a kind."""
        return holders(self.process.pid, rf"{root / WORK_NAME}/\.[\w-]+\.{kind}\..*\.tmp")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Its temporary folder is its own: 'auto' must not find another cluster of this machine, nor others this one."""
    script = str(Path(__file__).with_name("two_nodes.py"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Names of Unix sockets are short, so pytest's folder is too deep.
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temporary,
        started([sys.executable, script], PATH=path, **(found := {"RAY_TMPDIR": temporary} | TOKEN)) as process,
    ):
        assert process.stdin and process.stdout
        address, dashboard = process.stdout.readline().split()
        yield Nodes(process, address, dashboard, found)
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four tables of perovskites and an archive of empty files, more than a tenth of all inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    table = pq.read_table(SAMPLE / "perov_5.parquet")
    for part in range(TABLES):
        pq.write_table(table.slice(part * TABLE_ROWS, TABLE_ROWS), folder / f"{part}.parquet")
    with zipfile.ZipFile(folder / "empty.zip", "w") as archive:
        for number in range(EMPTY_FILES):
            archive.writestr(f"{number:03d}.cif", "")
    return str(folder)


@pytest.fixture(scope="module")
def settings(inputs: str) -> tuple[str, ...]:
    return (f"data.inputs=[{inputs}]", f"data.licences={{{inputs}: CC-BY-4.0}}", *SETTINGS)


@pytest.fixture(scope="module")
def job(nodes: Nodes, settings: tuple[str, ...]) -> Job:
    return Job(nodes, settings)


@dataclass(frozen=True)
class Job:
    """The job of every test, started in a process of its own."""

    nodes: Nodes
    settings: tuple[str, ...]

    def __call__(self, root: Path, *options: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
        options = options or ("--address", self.nodes.address)
        command = dist_train("voxelize", (*self.settings, f"data.shards={root}"), *options)
        return started(command, **self.nodes.environment | environment)


@pytest.fixture(scope="module")
def whole(nodes: Nodes, job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on the cluster of RAY_ADDRESS."""
    root = tmp_path_factory.mktemp("whole") / "shards"
    with job(root, "--set", "data.workers=7", RAY_ADDRESS=nodes.address) as process:
        wait_until((root / REJECTED_NAME).exists, process)
        assert not any("raylet" in command for _, command in commands(process.pid)), "a cluster of its own"
        finish(process)
    index = Index.read(root)
    assert index.counts["inputs"] == CRYSTALS + EMPTY_FILES
    assert sorted(s.id for shard in index.shards for s in shard.samples) == ids(inputs_of(index))
    with (root / REJECTED_NAME).open(newline="") as stream:
        assert {row["file"] for row in csv.DictReader(stream)} == {f"empty.zip/{n:03d}.cif" for n in range(EMPTY_FILES)}
    return root


def inputs_of(index: Index) -> list[Path]:
    return sorted(Path(index.config["data"]["inputs"][0]).glob("*.parquet"))


def ids(tables: list[Path]) -> list[str]:
    return sorted(id for table in tables for id in pq.read_table(table, columns=["id"])["id"].to_pylist())


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it says on stderr."""
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return errors


def crystals(errors: str, label: str) -> int:
    """The number of crystals that a progress bar of this label stands for; 0 without one."""
    found = re.findall(rf"{label}:.* \d+/(\d+) ", errors)
    return int(found[-1]) if found else 0


def results(root: Path) -> list[Path]:
    """What the finished scan tasks wrote."""
    return sorted((root / WORK_NAME).glob("part-*.result"))


def recorded(root: Path) -> list[Path]:
    """The finished shards of an unfinished job."""
    return [root / record.name.removesuffix(".json") for record in sorted((root / WORK_NAME).glob("*.tar.json"))]


def stamps(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def flip(path: Path, at: int) -> None:
    """Invert a byte."""
    with path.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 255]))


# Workers and nodes


def test_workers_killed_in_the_middle_of_a_scan_and_of_a_shard(nodes: Nodes, job: Job, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    with job(root) as process:
        worker, *_ = wait_until(lambda: [w for w in nodes.workers(root, "jsonl") if w.children()], process)
        (reader,) = worker.children()
        worker.kill()
        assert len(results(root)) < PARTS, "too late to mean anything"
        reader.wait(30)
        worker, *_ = wait_until(lambda: nodes.workers(root, "tar"), process)
        worker.kill()
        assert len(recorded(root)) < len(Index.read(whole).shards)
        finish(process)
    assert contents(root) == contents(whole)
    wait_until(lambda: not any("dist_train.shards.scan" in command for _, command in commands(nodes.process.pid)))


def test_a_node_removed_in_the_middle(nodes: Nodes, job: Job, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    with job(root) as process:
        # Each is held at its shard: one node alone can be through with all shards before the other has started its worker.
        first, *_ = wait_until(lambda: nodes.workers(root, "tar"), process)
        first.suspend()
        second, *_ = wait_until(lambda: [w for w in nodes.workers(root, "tar") if w != first], process)
        second.suspend()
        assert len(recorded(root)) < len(Index.read(whole).shards)
        nodes.tell("remove")
        try:
            first.resume()
            second.resume()
            wait_until(lambda: len({first.pid, second.pid} & {*session(nodes.process.pid)}) < 2, process)
            finish(process)
        finally:
            nodes.tell("add")
    assert contents(root) == contents(whole)


# Drivers


def test_drivers_killed_one_after_another(nodes: Nodes, job: Job, whole: Path, tmp_path: Path) -> None:
    """In the scan, between scan and build, in the build with one worker, and just after index.json was written."""
    root = tmp_path / "shards"
    with job(root) as process:
        wait_until(lambda: results(root), process)
        kill_session(process)
    parts = stamps([*results(root), *(path.with_suffix(".jsonl") for path in results(root))])
    assert 0 < len(parts) < 2 * PARTS, "too late to mean anything"

    with job(root, "--address", "auto") as process:
        wait_until(lambda: len(results(root)) == PARTS, process)
        kill_session(process)
    assert not list(root.glob("*.tar"))
    assert stamps(list(parts)) == parts
    parts = stamps(sorted((root / WORK_NAME).glob("part-*")))

    nodes.tell("remove")
    try:
        with job(root) as process:
            wait_until(lambda: len(recorded(root)) >= 3, process)
            kill_session(process)
    finally:
        nodes.tell("add")
    assert stamps(list(parts)) == parts
    shards = stamps(recorded(root))
    assert 3 <= len(shards) < len(Index.read(whole).shards)
    assert all(sha256(path) == sha256(whole / path.name) for path in root.glob("*.tar")), "under its name a shard is whole"
    damaged = next(iter(shards))
    flip(damaged, damaged.stat().st_size // 2)
    del shards[damaged]

    for number in range(5000):  # so that removing the folder takes a while
        (root / WORK_NAME / f"z{number}").touch()
    (root / f".{INDEX_NAME}.x.tmp").touch()  # as a kill in the middle of writing it leaves it
    with job(root) as process:
        wait_until((root / INDEX_NAME).exists, process)
        kill_session(process)
    assert (root / WORK_NAME).exists(), "too late to mean anything"
    assert stamps(list(shards)) == shards
    shards = stamps(sorted(root.glob("*.tar")))

    with job(root, "--set", NOWHERE) as process:
        finish(process)
    assert contents(root) == contents(whole)
    assert stamps(list(shards)) == shards


def test_a_task_that_no_node_has_room_for(job: Job, tmp_path: Path) -> None:
    """Ray itself would wait forever."""
    with job(tmp_path / "shards", "--set", "data.cpus_per_task=2", RAY_ADDRESS=job.nodes.address) as process:
        assert "no node of the Ray cluster (1 CPUs and 524 MB, 1 CPUs and 524 MB" in finish(process, 2)


def test_control_c_and_on_with_another_cluster(job: Job, whole: Path, tmp_path: Path) -> None:
    """To all processes of the terminal, as a terminal does, in a job with a cluster of its own."""
    root = tmp_path / "shards"
    with job(root, "--set", "data.workers=3") as process:
        wait_until(lambda: results(root), process)
        os.killpg(process.pid, signal.SIGINT)
        errors = finish(process, 130)
        assert errors.splitlines()[-1] == "dist-train: error: interrupted; the same command takes the work up again"
        assert "Traceback" not in errors and len(errors.splitlines()) <= 3
        wait_until(lambda: not session(process.pid))
    assert 0 < len(results(root)) < PARTS
    assert not list(root.rglob("*.tmp"))
    with job(root) as process:
        assert 0 < crystals(finish(process), "scan") < CRYSTALS + EMPTY_FILES
    assert contents(root) == contents(whole)


def test_a_submitted_job(nodes: Nodes, job: Job, whole: Path, tmp_path: Path) -> None:
    """`ray job submit -- dist-train voxelize ...`: the job finds the cluster that runs it."""
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed")
    root = tmp_path / "shards"
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", f"http://{nodes.dashboard}", "--"]
    verb = dist_train("voxelize", (*job.settings, f"data.shards={root}"))
    with started([*submit, "dist-train", *verb[verb.index("voxelize") :]], **nodes.environment) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output + errors
    assert f"{CRYSTALS} accepted + {EMPTY_FILES} rejected" in output + errors
    assert contents(root) == contents(whole)


# Disks and damage


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, timeout=30)


def test_a_disk_filled_again_and_again(job: Job, whole: Path, tmp_path: Path) -> None:
    """Before the scan, in it, in the build, and by somebody else just before the card and the index are written."""
    shards = len(Index.read(whole).shards)
    size = sum(path.stat().st_size for path in whole.glob("*.tar"))
    with small_disk(tmp_path, "4k") as disk:
        root, other = disk / "shards", disk / "other"
        kept: dict[Path, tuple[int, int]] = {}

        def told(process: subprocess.Popen[str]) -> None:
            """One line; and what was finished before still is."""
            nonlocal kept
            (line,) = [line for line in finish(process, 2).splitlines() if "dist-train: error" in line]
            assert f"the disk of {root} is full; free space and run the same command again" in line
            assert not (root / INDEX_NAME).exists()
            assert not list(root.rglob("*.tmp"))
            assert stamps(list(kept)) == kept
            for path in recorded(root):
                assert record_from_json((root / WORK_NAME / f"{path.name}.json").read_text()).sha256 == sha256(path)
            kept = stamps([*results(root), *recorded(root)])

        other.write_bytes(bytes(4096))
        with job(root) as process:
            told(process)
        assert not kept
        other.unlink()
        resize(disk, 400_000)
        with job(root) as process:
            told(process)
        assert not recorded(root)
        resize(disk, size // 2)
        with job(root) as process:
            told(process)
        assert 0 < len(recorded(root)) < shards
        resize(disk, 2 * size)
        with job(root) as process:
            wait_until(lambda: len(recorded(root)) == shards, process)
            with other.open("wb", buffering=0) as stream, suppress(OSError):
                while True:
                    stream.write(bytes(4096))
            told(process)
        other.unlink()
        with job(root) as process:
            finish(process)
        assert contents(root) == contents(whole)
        tars = stamps(sorted(root.glob("*.tar")))
        assert tars == {path: kept[path] for path in tars}


def test_damaged_shards_are_named_moved_and_built_again(nodes: Nodes, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    shutil.copytree(whole, root)
    shards = Index.read(root).shards
    flipped, cut, gone, later, *rest = shards
    sample = flipped.samples[1]
    flip(root / flipped.name, sum(sample.members["density.npy.zst"]) - 1)
    os.truncate(root / cut.name, cut.samples[-2].members["structure.json"][0])
    (root / gone.name).unlink()

    def verify(code: int, *options: str) -> str:
        with started(
            dist_train("verify", (), str(root), *options), RAY_ADDRESS=nodes.address, **nodes.environment
        ) as process:
            output, errors = process.communicate(timeout=LIMIT_S)
            assert process.returncode == code, errors
            assert "Traceback" not in errors
            return output + errors

    told = verify(2)
    assert f"3 of {len(shards)} shards" in told
    assert re.search(rf"{flipped.name} {sample.key}: crc32", told)
    assert re.search(rf"{cut.name} {cut.samples[-1].key}: cut", told)
    assert f"{gone.name}: missing" in told
    assert flipped.samples[0].key not in told
    verify(2, "--quarantine")
    assert {path.name for path in (root / QUARANTINE).iterdir()} == {flipped.name, cut.name}
    assert not (root / flipped.name).exists()
    flip(root / later.name, 0)
    kept = stamps([root / shard.name for shard in rest])
    verify(0, "--repair")
    assert {path.name for path in (root / QUARANTINE).iterdir()} == {flipped.name, cut.name, later.name}
    shutil.rmtree(root / QUARANTINE)
    assert contents(root) == contents(whole)
    assert stamps(list(kept)) == kept
