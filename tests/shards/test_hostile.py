"""Nothing that is fed to a scan stops it, hangs it, fills its memory, writes anywhere or goes uncounted."""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest

from dist_train.config import DataConfig, GridSpec
from dist_train.shards import scan
from dist_train.shards.scan import read_scan, scan_chunk
from dist_train.shards.sources import Chunk

GRID = GridSpec()
SCAN_ALL = """
import json, resource, sys
from pathlib import Path
from dist_train.config import DataConfig, GridSpec
from dist_train.shards.scan import read_scan, scan_chunk, stop_reader
from dist_train.shards.discover import discover

work = Path(sys.argv[2])
data = DataConfig(memory_per_file_MB=1000, seconds_per_file=10)
found = discover([sys.argv[1]])
rejected = [[file, file, reason] for _, file, reason in found.refused]
accepted = []
for part, chunk in enumerate(found.chunks):
    scan_chunk(part, chunk, work, data, GridSpec())
    result = read_scan(work, part)
    accepted += [row.id for row in result.rows]
    rejected += [[r.id, r.file, r.reason] for r in result.rejected]
stop_reader()
# Not ru_maxrss of this process, which begins with that of the one that started it.
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
memory = [own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
json.dump({"accepted": accepted, "rejected": rejected, "kB": memory}, open(work / "told", "w"))
"""
WHOLLY_LOST = {
    "tar/noise.tar", "tar/noise.tgz", "tar/truncated.tar.xz", "tar/noise.tar.bz2", "tar/bomb.tar.gz", "tar/headers.tar.gz",
    "zip/overlap.zip", "zip/cut.zip", "zip/noise.zip", "zip/empty.zip",
}  # fmt: skip
"""Archives of which not even the good member at the beginning can be had."""


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """(bytes, time of change) of everything below a folder."""
    paths = (Path(at) / name for at, folders, names in os.walk(folder) for name in (*folders, *names))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def processes_with(mark: str) -> list[int]:
    """Processes in whose environment something stands."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a scan of the whole corpus told, in a process of its own, and what it left."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("in", "work", "here", "temporary"):
        (folder / name).mkdir()
    reasons = hostile.write_corpus(folder / "in")
    before, mark = listing(folder), f"HOSTILE_MARK={folder}"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCAN_ALL, str(folder / "in"), str(folder / "work")],
        cwd=folder / "here",
        env=os.environ | {"HOSTILE_MARK": str(folder), "TMPDIR": str(folder / "temporary")},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0
    written = {path for path, stated in listing(folder).items() if before.get(path) != stated}
    return json.loads((folder / "work" / "told").read_text()) | {
        "reasons": reasons,
        "seconds": time.monotonic() - start,
        "written": {path for path in written if not path.startswith(str(folder / "work"))},
        "left": processes_with(mark),
    }


def reasons_of(told: dict[str, Any], name: str) -> list[str]:
    """All that is said of a file or what is in it, ids left out."""
    table = name.removeprefix("table/")  # rows are told with the name of their table alone
    rows = [
        (id, reason)
        for id, file, reason in told["rejected"]
        if file == table or f"/{file}".endswith(f"/{name}") or f"/{name}/" in f"/{file}"
    ]
    return [reason.removeprefix(f"{id}: ") for id, reason in rows]


def test_the_corpus_is_large() -> None:
    assert sum(len(files()) for files in hostile.KINDS.values()) > 170


def test_each_hostile_file_is_rejected_with_its_own_reason(told: dict[str, Any]) -> None:
    assert len(told["reasons"]) > 180
    wrong = {
        name: (pattern, reasons_of(told, name)[:5])
        for name, pattern in told["reasons"].items()
        if not any(re.search(pattern, reason, re.DOTALL) for reason in reasons_of(told, name))
    }
    assert not list(wrong.items())


def test_no_reason_is_vague(told: dict[str, Any]) -> None:
    """None tells only how a process ended; names and numbers aside there are about as many as there are kinds of faults."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for name, pattern in told["reasons"].items():
        for reason in reasons_of(told, name):
            assert not re.search(r"exit code|ended with|ended their|not read within|more memory", reason), (name, reason)
            if re.search(pattern, reason, re.DOTALL):
                kinds[re.sub(r"\d+|'[^']*'|\S*/\S*", "#", reason)].add(name)
    assert len(kinds) > 85
    assert max(map(len, kinds.values())) <= 9


def test_what_is_good_among_them_is_accepted(told: dict[str, Any]) -> None:
    expected = {"0-good", "cif/m-good", "cif/good-empty-loop", "extxyz/0-good", "special/good", "zz-good"}
    expected |= {f"odd/{name.removesuffix('.cif')}" for name in hostile.ODD_NAMES}
    archives = {name for name in told["reasons"] if name.startswith(("tar/", "zip/"))}
    expected |= {f"{name}/good" for name in archives - WHOLLY_LOST}
    accepted = [id for id in told["accepted"] if not id.startswith("row-")]
    assert len(set(accepted)) == len(accepted)
    assert expected <= set(accepted)
    # Only some versions of Python see that this member of a zip overlaps another.
    others = set(accepted) - expected - {"zip/overlap.zip/x"}
    assert others == {
        *(f"tar/{name}.tar/last" for name in ("sparse", "pax_sparse", "pax_chain")),
        "tar/two_archives.tar/second",
    }
    # Two good rows in each table of three with a bad one in the middle.
    assert told["accepted"].count("row-0") == told["accepted"].count("row-2") == 4
    assert told["accepted"].count("row-1") == 0


def test_it_takes_neither_long_nor_much_memory(told: dict[str, Any]) -> None:
    assert told["seconds"] < 60
    assert max(told["kB"]) < 700_000


def test_nothing_is_written_elsewhere_and_nobody_is_left(told: dict[str, Any]) -> None:
    assert not told["written"]
    assert not told["left"]
    assert not list(Path("/tmp").glob("hostile-*"))


# The guard itself


class Stalling(http.server.BaseHTTPRequestHandler):
    """Serves a good CIF under every name; of 'slow*' only the head, then nothing."""

    asked, closing = threading.Event(), threading.Event()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(hostile.GOOD)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if "/slow" in self.path:
            self.wfile.flush()
            self.asked.set()
            self.closing.wait(60)
        else:
            self.wfile.write(hostile.GOOD)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Stalling.asked.clear()
    Stalling.closing.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Stalling.closing.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_reader_is_left() -> Iterator[None]:
    yield
    scan.stop_reader()


def scanned(
    folder: Path, place: str, names: tuple[str, ...], data: DataConfig, grid: GridSpec = GRID
) -> tuple[list[str], dict[str, str]]:
    """Ids accepted and reasons by id of a chunk of files."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    scan_chunk(0, Chunk(place, "files", place, names), work, data, grid)
    result = read_scan(work, 0)
    assert result
    return [row.id for row in result.rows], {r.id: r.reason for r in result.rejected}


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, GridSpec]:
    """A folder with a crystal of 200,000 atoms between two good ones, and a grid spec that would take it."""
    (tmp_path / "in").mkdir()
    for name in ("a.cif", "c.cif"):
        (tmp_path / "in" / name).write_bytes(hostile.GOOD)
    (tmp_path / "in" / "b.cif").write_text(hostile.cif("900 900 900 90 90 90", hostile.many_sites(2 * hostile.MANY)))
    return tmp_path / "in", GridSpec(max_atoms=10**6)


def test_a_file_that_computes_too_long(large: tuple[Path, GridSpec], tmp_path: Path) -> None:
    """Also where this process has the timers' signals blocked, as its children then have."""
    timers = [signal.SIGPROF, signal.SIGALRM]
    signal.pthread_sigmask(signal.SIG_BLOCK, timers)
    try:
        names = ("a.cif", "b.cif", "c.cif")
        taken, reasons = scanned(tmp_path, str(large[0]), names, DataConfig(seconds_per_file=0.1), large[1])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, timers)
    assert taken == ["a", "c"]
    assert reasons == {"b": "b: not read within 0.1 seconds; data.seconds_per_file is 0.1"}


def test_a_file_that_needs_too_much_memory(large: tuple[Path, GridSpec], tmp_path: Path) -> None:
    data = DataConfig(memory_per_file_MB=150)
    taken, reasons = scanned(tmp_path, str(large[0]), ("a.cif", "b.cif", "c.cif"), data, large[1])
    assert taken == ["a", "c"]
    assert reasons == {"b": "b: more memory is needed to read it than data.memory_per_file_MB 150"}


def test_a_file_that_never_comes(url: str, tmp_path: Path) -> None:
    start = time.monotonic()
    taken, reasons = scanned(tmp_path, url, ("a.cif", "slow.cif", "b.cif"), DataConfig(seconds_per_file=0.2))
    assert taken == ["a", "b"]
    assert reasons == {"slow": "slow: not read within 2 seconds; data.seconds_per_file is 0.2"}
    assert time.monotonic() - start < 20


def test_the_rest_is_given_up_after_several_deaths(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_DEATHS", 2)
    names = ("slow1.cif", "a.cif", "slow2.cif", "slow3.cif", "b.cif", "c.cif")
    taken, reasons = scanned(tmp_path, url, names, DataConfig(seconds_per_file=0.2))
    assert taken == ["a"]
    assert {id for id, reason in reasons.items() if "not read within 2 seconds" in reason} == {"slow1", "slow2", "slow3"}
    assert {id for id, reason in reasons.items() if "the 2 before it ended their readers" in reason} == {"b.cif", "c.cif"}


def test_a_reader_killed_from_outside(url: str, tmp_path: Path) -> None:
    def kill() -> None:
        assert Stalling.asked.wait(60)
        (child,) = scan._children.values()
        os.kill(child.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    taken, reasons = scanned(tmp_path, url, ("a.cif", "slow.cif", "b.cif"), DataConfig())
    killer.join()
    assert taken == ["a", "b"]
    assert reasons == {"slow": "slow: the process that read it ended with SIGKILL; data.memory_per_file_MB is 2000"}


def test_a_killed_scan_leaves_no_reader(url: str, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dist_train.config import DataConfig, GridSpec
from dist_train.shards.scan import scan_chunk
from dist_train.shards.sources import Chunk
chunk, data = Chunk("x", "files", sys.argv[1], ("slow.cif",)), DataConfig(seconds_per_file=0.2)
scan_chunk(0, chunk, Path(sys.argv[2]), data, GridSpec())
"""
    environment = os.environ | {"HOSTILE_MARK": str(tmp_path)}
    scanner = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path)], env=environment)
    assert Stalling.asked.wait(60)
    (reader,) = set(processes_with(f"HOSTILE_MARK={tmp_path}")) - {scanner.pid}
    scanner.kill()
    scanner.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{reader}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with(f"HOSTILE_MARK={tmp_path}")


def test_what_was_left_unread_is_not_taken_for_the_next_chunk(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.cif").write_bytes(hostile.GOOD)
    messages = scan.messages(Chunk("x", "files", str(tmp_path), ("a.cif", "b.cif")), DataConfig(), GRID)
    assert next(messages)[1] == "a"
    messages.close()  # as where the disk is full
    assert scanned(tmp_path, str(tmp_path), ("c.cif", "d.cif"), DataConfig()) == (["c", "d"], {})


def test_a_reader_that_ends_within_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(*_: Any) -> subprocess.Popen[bytes]:
        lines = '["begin", 0, "a", "a.cif"]\n["rejected", "a", "a.c'
        child = subprocess.Popen(["printf", "%s", lines], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        scan._children["these settings"] = child
        return child

    monkeypatch.setattr(scan, "_child", child)
    (message,) = scan.messages(Chunk("x", "files", str(tmp_path), ("a.cif",)), DataConfig(), GRID)
    assert message[:2] == ["rejected", "a"]
