"""Shards at URLs: the same batches as from a folder, in a bounded cache that processes share, whatever goes wrong."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import s3_server
from small_shards import real_crystals, write_shards

from dist_train.config import DataConfig, load_config
from dist_train.errors import ConfigError, ShardError
from dist_train.shards import remote as module
from dist_train.shards.batches import train_batches
from dist_train.shards.index import INDEX_NAME, Index
from dist_train.shards.order import BatchPlan
from dist_train.shards.prefetch import fetched
from dist_train.shards.reader import ShardReader, check_shards
from dist_train.shards.remote import CACHE_NAME, Remote, ShardCache

SAMPLES, PER_SHARD = 18, 3
WAIT_S = 20


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Six shards of a quarter of a megabyte."""
    return write_shards(tmp_path_factory.mktemp("local"), real_crystals(SAMPLES), per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server of the S3 API, moto's, on this machine; the file of its requests."""
    log = tmp_path_factory.mktemp("server") / "log"
    with s3_server(log):
        yield log


@pytest.fixture
def s3(server: Path, local: Index, request: pytest.FixtureRequest) -> str:
    """A fresh bucket with the shards."""
    bucket = f"s3://{request.node.originalname.replace('_', '-')[:50].strip('-')}"
    system = fsspec.filesystem("s3")
    system.mkdir(bucket)
    system.put(f"{local.root}/", f"{bucket}/set/", recursive=True)
    return f"{bucket}/set"


@pytest.fixture
def memory(local: Index, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shards in fsspec's file system of this process, and no pause between attempts."""
    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0, 0.0))
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in local.root.iterdir():
        system.pipe_file(f"/set/{path.name}", path.read_bytes())
    return "memory://set"


def batches_of(index: Index, window: int = 6) -> Iterator[Any]:
    reader = ShardReader(index, "train")
    plan = BatchPlan(reader.shapes, reader.shard_sizes, 2, 2, 3, 0, 1, window)
    return train_batches(reader, plan, 0, plan.steps)


def digest_of(index: Index) -> str:
    found = hashlib.sha256()
    for item in batches_of(index):
        assert not item.damaged
        for tensor in item.batch:
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def held(root: Path) -> dict[str, int]:
    """Bytes of the files of a cache by name, while none is made or removed."""
    locks = root / CACHE_NAME / "locks"
    if not locks.exists():
        return {}
    with module._locked(locks / "room"):
        return {path.name: size for _, size, path in module._files((root / CACHE_NAME).glob("*/*.t*"))}


def gets(log: Path, bucket: str) -> Counter[str]:
    """Requests for the bytes of each object of a bucket."""
    found = re.findall(rf"GET /{bucket}/set/([\w.-]+) HTTP", log.read_text())
    return Counter(found)


# A real S3 API


def test_batches_from_s3_are_those_of_the_folder(s3: str, local: Index, tmp_path: Path, server: Path) -> None:
    index = Index.read(s3, tmp_path)
    assert index == Index(tmp_path / CACHE_NAME / index.digest[:16], *list(vars(local).values())[1:-1])
    check_shards(index, ("train",))
    count = 0
    for one, other in zip(batches_of(local), batches_of(index), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))
        count += 1
    assert count == 18
    assert gets(server, s3.split("/")[2]) == {INDEX_NAME: 1, **{shard.name: 1 for shard in index.shards}}


READER = """
import sys
sys.path[:0] = sys.argv[3].split(":")
from pathlib import Path
from test_remote import digest_of
from dist_train.shards.index import Index
print(digest_of(Index.read(sys.argv[1], Path(sys.argv[2]))))
"""


def test_processes_that_share_a_cache_fetch_each_shard_once(s3: str, local: Index, tmp_path: Path, server: Path) -> None:
    path = ":".join((str(Path(__file__).parent), str(Path(__file__).parents[1])))
    command = [sys.executable, "-c", READER, s3, str(tmp_path), path]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0].strip() for process in readers}
    assert outputs == {digest_of(local)}
    assert gets(server, s3.split("/")[2]) == {INDEX_NAME: 2, **{shard.name: 1 for shard in local.shards}}


def test_an_object_that_is_altered_or_gone_is_named(s3: str, local: Index, tmp_path: Path, server: Path) -> None:
    system, shard = fsspec.filesystem("s3"), local.shards[2]
    data = bytearray((local.root / shard.name).read_bytes())
    data[1000] ^= 1
    system.pipe_file(f"{s3}/{shard.name}", bytes(data))
    index = Index.read(s3, tmp_path)
    with pytest.raises(ShardError, match=rf"shard {s3}/{shard.name} was fetched twice, with the SHA-256 .*upload it again"):
        list(batches_of(index))
    assert shard.name not in held(tmp_path)
    system.rm(f"{s3}/{shard.name}")
    with pytest.raises(ShardError, match=rf"1 shards of {s3} .*{shard.name} is missing"):
        check_shards(index, ("train",))
    with pytest.raises(ShardError, match=rf"shard {s3}/{shard.name} is missing"):
        list(batches_of(index))


def test_what_keeps_a_bucket_from_being_read_is_told_in_one_line(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.0,))
    with pytest.raises(ShardError, match=r"^s3://nobody/set/index.json .*(can't be read|does not exist)[^\n]*$"):
        Index.read("s3://nobody/set", tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ShardError, match=r"^s3://box/set/index.json can't be read: [^\n]*credentials[^\n]*$"):
        Index.read("s3://box/set", tmp_path)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


# The cache


def test_a_small_cache_keeps_its_bound_and_the_batches_their_bytes(memory: str, local: Index, tmp_path: Path) -> None:
    """Four of six shards fit; shards that are evicted while they are read go on being read."""
    index = Index.read(memory, tmp_path, cache_MB=1)
    assert 4 * local.shards[0].bytes < 10**6 < 5 * local.shards[0].bytes
    peak = 0
    for one, other in zip(batches_of(local, 3), batches_of(index, 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))
        peak = max(peak, sum(held(tmp_path).values()))
    assert 4 * local.shards[0].bytes <= peak <= 10**6


def test_an_open_shard_outlives_its_removal_and_the_oldest_goes_first(memory: str, tmp_path: Path) -> None:
    index = Index.read(memory, tmp_path, cache_MB=1)
    assert index.cache
    first, second, *others = index.shards
    handle = index.open(first)
    try:
        index.cache.fetch(second)
        for shard in others[:2]:
            index.cache.fetch(shard)
        index.cache.fetch(first)  # used again: now the second is the oldest
        index.cache.fetch(others[2])
        assert set(held(tmp_path)) == {shard.name for shard in (first, *others[:3])}
        index.cache.fetch(others[3])
        index.cache.fetch(second)
        for shard in others[:3]:
            index.cache.fetch(shard)
        assert first.name not in held(tmp_path)
        assert hashlib.sha256(os.pread(handle, first.bytes + 1, 0)).hexdigest() == first.sha256
    finally:
        os.close(handle)


def test_a_cache_that_holds_no_two_windows_is_refused(memory: str, local: Index, tmp_path: Path) -> None:
    index = Index.read(memory, tmp_path, cache_MB=1)
    with pytest.raises(ShardError, match=r"data\.cache_MB 1 can't hold two windows of data\.shuffle_window 9 samples, 1 MB"):
        list(batches_of(index, 9))
    assert index.cache
    index.cache.limit = 10**5
    with pytest.raises(
        ShardError, match=r"data\.cache_MB 0 can't hold shard train-000000\.tar of \d+ bytes; set at least 1"
    ):
        index.cache.fetch(index.shards[0])


def test_other_files_below_the_cache_dir_are_left_alone(memory: str, tmp_path: Path) -> None:
    for name in ("shards/mine.tar", "mine.tar", f"{CACHE_NAME}/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10**6))
    index = Index.read(memory, tmp_path, cache_MB=1)
    list(batches_of(index, 3))
    assert all((tmp_path / name).exists() for name in ("shards/mine.tar", "mine.tar", f"{CACHE_NAME}/mine.txt"))


@pytest.mark.parametrize(("window", "there"), [(3, 2), (9, 6)])
def test_the_next_window_is_fetched_before_it_is_needed_and_no_third(
    memory: str, tmp_path: Path, window: int, there: int
) -> None:
    """With batches of 2, the one that is read ahead furthest ends with the sixth sample."""
    batches = batches_of(Index.read(memory, tmp_path), window)
    next(batches)
    until = time.monotonic() + WAIT_S
    while len(held(tmp_path)) < there and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len([name for name in held(tmp_path) if not name.startswith(".")]) == there
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "cache_MB", "there"), [(5, 100, 2), (18, 100, 5), (18, 1, 4)])
def test_a_split_read_in_order_is_fetched_a_few_shards_ahead(
    memory: str, tmp_path: Path, count: int, cache_MB: int, there: int
) -> None:
    """No more than four, than are asked for, or than the cache holds."""
    reader = ShardReader(Index.read(memory, tmp_path, cache_MB), "train")
    places = fetched(reader, count)
    found = [next(places)]
    until = time.monotonic() + WAIT_S
    while len(held(tmp_path)) < there and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert set(held(tmp_path)) == {shard.name for shard in reader.shards[:there]}
    assert [*found, *places] == list(range(count))


def test_a_cache_of_one_shard_is_not_fetched_ahead_into(memory: str, local: Index, tmp_path: Path) -> None:
    reader = ShardReader(Index.read(memory, tmp_path), "train")
    assert reader.index.cache
    reader.index.cache.limit = local.shards[0].bytes + 1
    places = fetched(reader, SAMPLES)
    next(places)
    time.sleep(0.3)
    assert not held(tmp_path)
    assert len(list(places)) == SAMPLES - 1


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A file system whose first reads fail, or give other bytes."""

    protocol = "flaky"
    cachable = False
    failures: list[Exception | str]

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, *args, **kwargs)
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        return data[:-1] if failure == "short" else b"x" * len(data) if failure else data


@pytest.mark.parametrize(
    "failures",
    [
        [OSError("reset by peer")],
        [RuntimeError("slow down")] * 3,
        ["short"],
        ["other"],
        [TimeoutError(), "other", OSError()],
    ],
)
def test_passing_errors_are_tried_again(memory: str, local: Index, tmp_path: Path, failures: list[Exception | str]) -> None:
    system = Flaky()
    system.failures = [*failures]
    cache = ShardCache(Remote("flaky://set", system, "/set"), local.digest, tmp_path, 1)
    cache.fetch(local.shards[0])
    assert not system.failures
    assert (cache.folder / local.shards[0].name).read_bytes() == (local.root / local.shards[0].name).read_bytes()


def test_lasting_errors_are_told_and_leave_nothing(memory: str, local: Index, tmp_path: Path) -> None:
    system = Flaky()
    for failures, tries, told in (
        ([OSError("reset")] * 9, 4, "can't be read: OSError: reset; check data.shards, the network"),
        ([PermissionError("Forbidden")] * 9, 1, "PermissionError: Forbidden; .*credentials"),
        (["other"] * 9, 2, "was fetched twice"),
    ):
        system.failures = [*failures]
        cache = ShardCache(Remote("flaky://set", system, "/set"), local.digest, tmp_path, 1)
        with pytest.raises(ShardError, match=rf"flaky://set/train-000000\.tar .*{told}"):
            cache.fetch(local.shards[0])
        assert len(system.failures) == 9 - tries
        assert not held(tmp_path)


HANGING = """
import sys, time
from pathlib import Path
from fsspec.implementations.memory import MemoryFileSystem
from dist_train.shards.index import Index
from dist_train.shards.remote import Remote, ShardCache
class Hanging(MemoryFileSystem):
    def cat_file(self, *args, **kwargs):
        time.sleep(1000)
index = Index.read(Path(sys.argv[1]))
ShardCache(Remote("memory://set", Hanging(), "/set"), index.digest, Path(sys.argv[2]), 1).fetch(index.shards[0])
"""


def test_a_process_that_is_killed_while_it_fetches_blocks_nobody(memory: str, local: Index, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGING, str(local.root), str(tmp_path)])
    try:
        until = time.monotonic() + 3 * WAIT_S
        while not held(tmp_path) and time.monotonic() < until:
            time.sleep(0.05)
        shard, *others = local.shards
        assert held(tmp_path) == {f".{shard.name}.tmp": shard.bytes}
        index = Index.read(memory, tmp_path, cache_MB=1)
        assert index.cache
        index.cache.fetch(shard, wait=False)  # left to the other process
        for other in others:  # which keeps its place
            index.cache.fetch(other)
        assert f".{shard.name}.tmp" in held(tmp_path)
        assert shard.name not in held(tmp_path)
    finally:
        process.kill()
        process.wait()
    index.cache.fetch(others[0])
    index.cache.fetch(others[4])
    index.cache.fetch(others[1])
    assert f".{shard.name}.tmp" not in held(tmp_path)
    index.cache.fetch(shard)
    assert (index.root / shard.name).read_bytes() == (local.root / shard.name).read_bytes()


def test_a_full_disk_is_told(memory: str, local: Index, tmp_path: Path) -> None:
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("only root on Linux can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        index = Index.read(memory, tmp_path)
        with pytest.raises(
            ShardError, match=r"can't be kept in .*No space left.*lower data\.cache_MB or set data\.cache_dir"
        ):
            list(batches_of(index))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True, timeout=30)


# URLs in settings


def test_urls_of_this_machine_s_files_are_read_in_place(local: Index) -> None:
    index = Index.read(f"file://{local.root}")
    assert (index, index.cache) == (local, None)


def test_urls_stay_as_they_are_written(tmp_path: Path) -> None:
    config = load_config(None, ("data.shards=s3://box/folder",))
    assert config.data.shards == "s3://box/folder"
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "run.yaml") == config
    assert (
        DataConfig(shards="runs/x").shards == DataConfig.model_validate({"shards": Path("runs/x")}).shards == Path("runs/x")
    )
    with pytest.raises(ConfigError, match=r"data\.shards s3://box/folder is a URL, which is only read"):
        _ = config.data.folder


def test_an_unknown_kind_of_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="shards nosuch://box can't be read: Protocol not known"):
        Index.read("nosuch://box", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"cache .* can't be made: .*set data\.cache_dir"):
        ShardCache(Remote("memory://x", fsspec.filesystem("memory"), "/x"), "0" * 16, tmp_path / "file", 1)
