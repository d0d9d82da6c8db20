"""Parses and checks a chunk of inputs in a process of its own, so that no file can hang a worker or exhaust its memory.

The child reads a chunk and writes a line of JSON for every unit it begins and every crystal it takes or refuses. The
kernel ends it when a file takes too long, by timers that it sets itself: there is no one to wait for, and nothing is
left behind when the worker is killed. The parent then refuses that file and starts another child behind it.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dist_train.config import DataConfig, GridSpec
from dist_train.crystal import formats
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.files import atomic_path, write_text
from dist_train.shards.sources import Chunk, units

WALL_FACTOR = 10
"""A file may take this many times its seconds of computing when it has to wait for disks or other processes."""
MAX_DEATHS = 8
"""Children that may end in a row before the rest of a chunk is given up."""
MAX_TEXT = 4096
"""Characters of an id or reason; a longer id is refused."""
_OUT_OF_MEMORY = 77
"""Exit code of a child without memory: it is no longer to be trusted, since an import may have failed halfway."""


@dataclass(frozen=True, slots=True)
class Row:
    """An accepted crystal: its input and file, what is told of it, and where it lies in a part file (bytes)."""

    id: str
    input: str
    file: str
    formula: str
    atoms: int
    volume_A3: float
    shape: tuple[int, ...]
    split: str | None
    part: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """An input that was not taken, and why; stage is 'parse', 'grid' or 'plan'."""

    id: str
    input: str
    file: str
    stage: str
    reason: str


@dataclass(frozen=True)
class ScanResult:
    """What a scan task found; the crystals themselves are in the part file."""

    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...]


def part_path(work: Path, part: int) -> Path:
    """The JSON-lines file of the crystals of a scan task, as the grid will hold them."""
    return work / f"part-{part:06d}.jsonl"


def read_scan(work: Path, part: int) -> ScanResult | None:
    """The result of a scan task that is done, or None."""
    path, crystals = part_path(work, part).with_suffix(".result"), part_path(work, part)
    if not (path.is_file() and crystals.is_file()):
        return None
    document = json.loads(path.read_text())
    if document["bytes"] != crystals.stat().st_size:
        return None
    rows = tuple(Row(*map(_frozen, row)) for row in document["rows"])
    return ScanResult(rows, tuple(Rejected(*row) for row in document["rejected"]))


def scan_chunk(part: int, chunk: Chunk, work: Path, data: DataConfig, grid: GridSpec) -> tuple[int, int]:
    """Write the crystals of a chunk and then its result to `work`; returns the numbers of accepted and rejected ones."""
    rows: list[tuple[Any, ...]] = []
    rejected: list[tuple[str, ...]] = []
    with atomic_path(part_path(work, part), scratch=work) as temporary, temporary.open("wb") as stream:
        for kind, *values in messages(chunk, data, grid):
            if kind == "rejected":
                id, file, stage, reason = values
                rejected.append((id, chunk.input, file, stage, reason))
            else:
                id, file, *told, line = values
                rows.append((id, chunk.input, file, *told, part, stream.tell(), len(line)))
                stream.write(line)
        size = stream.tell()
    result = {"bytes": size, "rows": rows, "rejected": rejected}
    write_text(part_path(work, part).with_suffix(".result"), json.dumps(result))
    return len(rows), len(rejected)


def read_part(work: Path, row: Row) -> Crystal:
    """The crystal of a row, from its part file."""
    with part_path(work, row.part).open("rb") as stream:
        stream.seek(row.offset)
        return Crystal.from_json(stream.read(row.length))


# The parent's side


def messages(chunk: Chunk, data: DataConfig, grid: GridSpec) -> Iterator[list[Any]]:
    """Of every crystal, in order, whatever happens to the children.

    ['taken', id, file, formula, atoms, volume, shape, split, line of JSON (bytes) as the grid will hold it], or
    ['rejected', id, file, stage, reason]. A table's row gives one message, a file one for each crystal in it.
    """
    first, deaths = 0, 0
    while first < len(chunk):
        number, id, file = first - 1, chunk.name(first), chunk.place
        child: subprocess.Popen[bytes] | None = _child(data, grid)
        assert child
        try:
            _send(child, chunk, first)
            for line in child.stdout:  # type: ignore[union-attr]
                if not line.endswith(b"\n"):
                    break  # the child ended in the middle of it
                kind, *values = json.loads(line)
                if kind == "done":
                    child = None
                    return
                if kind == "begin":
                    number, id, file = values
                elif kind == "rejected":
                    yield [kind, *values]
                elif (crystal := child.stdout.readline()).endswith(b"\n"):  # type: ignore[union-attr]
                    yield [kind, *values, crystal]
            reason = _ending(child.wait(), data)
        finally:
            if child:
                stop_reader()  # it has ended, or nobody will read what it still has to tell
        yield ["rejected", id, file, "parse", f"{id}: {reason}"]
        deaths = deaths + 1 if number <= first else 1
        first = max(number, first) + 1
        if deaths >= MAX_DEATHS:
            for name in map(chunk.name, range(first, len(chunk))):
                yield ["rejected", name, chunk.place, "parse", f"{name}: the {deaths} before it ended their readers"]
            return


READER_SETTINGS = {"split_column", "seconds_per_file", "memory_per_file_MB"}

_children: dict[str, subprocess.Popen[bytes]] = {}
"""The reader of this process, kept from one chunk to the next: it takes seconds to start."""


def _child(data: DataConfig, grid: GridSpec) -> subprocess.Popen[bytes]:
    settings = json.dumps([data.model_dump(mode="json", include=READER_SETTINGS), grid.model_dump(mode="json")])
    child = _children.get(settings)
    if child is None or child.poll() is not None:
        stop_reader()
        # One thread: the timers count the time of all. Arrow's own allocator would reserve a GB of addresses.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "dist_train.shards.scan"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        _children[settings] = child
        assert child.stdin
        child.stdin.write(settings.encode() + b"\n")
    return child


@atexit.register
def stop_reader() -> None:
    """End the reader of this process, if it has one."""
    while _children:
        _, child = _children.popitem()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def _send(child: subprocess.Popen[bytes], chunk: Chunk, first: int) -> None:
    assert child.stdin
    try:
        child.stdin.write(json.dumps([asdict(chunk), first]).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended: its output tells how


def _ending(code: int, data: DataConfig) -> str:
    """How a child that closed its output has ended, by its exit code."""
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        limit = data.seconds_per_file * (1 if code == -signal.SIGPROF else WALL_FACTOR)
        return f"not read within {limit:g} seconds; data.seconds_per_file is {data.seconds_per_file:g}"
    if code == _OUT_OF_MEMORY:
        return f"more memory is needed to read it than data.memory_per_file_MB {data.memory_per_file_MB}"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the process that read it ended with {how}; data.memory_per_file_MB is {data.memory_per_file_MB}"


# The child's side


def main() -> None:
    """Read settings and chunks from stdin until it ends."""
    output = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)  # what a library prints doesn't mix with the messages
    settings = json.loads(sys.stdin.buffer.readline())
    data, grid = DataConfig.model_validate(settings[0]), GridSpec.model_validate(settings[1])
    _limit(data.memory_per_file_MB)
    for line in sys.stdin.buffer:
        fields, first = json.loads(line)
        chunk = Chunk(**fields | {name: tuple(map(_frozen, fields[name])) for name in ("names", "spans")})
        try:
            _read(chunk, first, data, grid, output)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _limit(megabytes: int) -> None:
    """Let the process grow by this much from now on, and end by its timers, without a core file."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    for kind, limit in ((resource.RLIMIT_AS, now + megabytes * 10**6), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    for timer in (signal.SIGPROF, signal.SIGALRM):  # where a parent ignores or blocks them, so do its children
        signal.signal(timer, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [timer])


def _set_timers(seconds: float) -> None:
    """End this process after so much computing or ten times as much waiting from now on; 0 for never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * seconds)


def _read(chunk: Chunk, first: int, data: DataConfig, grid: GridSpec, output: IO[bytes]) -> None:
    """Write the messages of a chunk from unit `first` on; between two of them the timers run."""

    def tell(kind: str, *values: Any, then: str = "") -> None:
        _set_timers(0)
        if kind == "rejected":
            values = tuple(value[:MAX_TEXT] for value in values)
        output.write(f"{json.dumps([kind, *values])}\n{then}".encode())
        output.flush()
        _set_timers(data.seconds_per_file)

    formats.prepare(chunk.names[first:])
    number = first
    try:
        for unit in units(chunk, grid.max_atoms, first, data.split_column):
            tell("begin", number, unit.id, unit.file)
            try:
                for id, item in unit.items():
                    message, crystal = _judged(id, unit.file, unit.split, item, grid)
                    tell(*message, then=crystal)
            except DataError as error:
                tell("rejected", unit.id, unit.file, "parse", str(error))
            except MemoryError:
                raise
            except Exception as error:  # every remote file system has errors of its own
                tell("rejected", unit.id, unit.file, "parse", f"{unit.id}: {type(error).__name__}: {error}")
            number += 1
    except (DataError, OSError) as error:
        for name in map(chunk.name, range(number, len(chunk))):
            tell("rejected", name, chunk.place, "parse", f"{name}: {error}")
    tell("done")
    _set_timers(0)


def _judged(
    id: str, file: str, split: str | None, item: Crystal | CrystalError, grid: GridSpec
) -> tuple[tuple[Any, ...], str]:
    """The message of a crystal: taken, and the line of JSON that follows; or rejected, and why."""
    if len(id) > MAX_TEXT:
        return ("rejected", id, file, "parse", f"an id of {len(id)} characters, at most {MAX_TEXT} are taken"), ""
    if isinstance(item, CrystalError):
        return ("rejected", id, file, "parse", str(item)), ""
    try:
        crystal = representable(item, grid)
    except CrystalError as error:
        return ("rejected", id, file, "grid", str(error)), ""
    shape = grid_shape(crystal.lattice_A, grid)
    told = (crystal.formula, len(crystal), crystal.volume_A3, shape, split)
    return ("taken", id, file, *told), f"{crystal.to_json()}\n"


if __name__ == "__main__":
    main()
