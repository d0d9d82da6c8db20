"""`dist-train bench shard`: how fast crystals become shards, what takes the time, how it scales; how fast CIFs are read."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from dist_train.bench import Row
from dist_train.config import DataConfig, GridSpec
from dist_train.crystal.cif import parse_cif
from dist_train.crystal.inputs import read_text
from dist_train.crystal.interop import structure_from_cif
from dist_train.crystal.parquet import parquet_length, read_parquet_rows, write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import CrystalError, DataError
from dist_train.shards.discover import discover
from dist_train.shards.plan import distinct, plan_shards, split_rows
from dist_train.shards.scan import read_part, read_scan, scan_chunk, stop_reader
from dist_train.shards.writer import build_shard

ROUNDS = 5
MAX_ATOMS = 10_000
RATE = 1000.0
"""Wanted crystals a second and core from Parquet into raw shards."""
SCALING = 1.8
"""Wanted ratio of one worker's time to that of two, on two cores."""
COPIES = 6
TABLES = (
    ("perov_5", "Perov-5, cell 32^3", GridSpec()),
    ("materials_project", "Materials Project up to 20 atoms, adaptive", GridSpec(shape="adaptive", max_atoms=20)),
    ("materials_project", "Materials Project, 1 to 200 atoms, adaptive", GridSpec(shape="adaptive", max_voxels=2**17)),
)
CIF_SPEEDUP = 3.0
"""Wanted ratio of pymatgen's time to ours."""


def shard_rows(sample: Path) -> Iterator[Row]:
    """All rows of `dist-train bench shard`."""
    for table, label, grid in TABLES:
        yield from _one_core(sample / f"{table}.parquet", label, grid)
    yield from _two_workers(sample / "perov_5.parquet")
    yield from cif_rows(sample)


def _one_core(table: Path, label: str, grid: GridSpec) -> Iterator[Row]:
    """Crystals a second through the tasks of a job, worker and reader sharing one core, and the share of each stage."""
    cores = os.sched_getaffinity(0)
    crystals = [c for c in read_parquet_rows(table, 0, parquet_length(table), grid.max_atoms) if isinstance(c, Crystal)]
    os.sched_setaffinity(0, {min(cores)})
    stop_reader()  # the next one is bound to the core, too
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_parquet(table := Path(folder, table.name), crystals)
            rounds = [_stages(table, grid) for _ in range(ROUNDS + 1)][1:]
    finally:
        os.sched_setaffinity(0, cores)
        stop_reader()
    written = rounds[0][0]
    seconds = {stage: median(times[stage] for _, times in rounds) for stage in rounds[0][1]}
    total = seconds.pop("total")
    rate = written / total
    case = f"crystals a second and core from Parquet to raw shards: {label}"
    yield Row(case, rate, "1/s", None, None, RATE, rate >= RATE)
    for stage, spent in seconds.items():
        yield Row(f"  of which {stage}: {label}", 100 * spent / total, "%")


def _stages(table: Path, grid: GridSpec) -> tuple[int, dict[str, float]]:
    """Number of crystals written, and the seconds of each stage of scanning a table and building its shards."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = DataConfig(inputs=(str(table),), shards=work / "shards", splits={"train": 1.0})
        chunks, times = discover(data.inputs).chunks, {}
        times["reading and checking"] = _seconds_of(
            lambda: [scan_chunk(part, chunk, work, data, grid) for part, chunk in enumerate(chunks)]
        )
        rows, _ = distinct(result for part in range(len(chunks)) if (result := read_scan(work, part)))
        tasks = plan_shards(split_rows(rows, data)[0], data)
        build = _seconds_of(lambda: [build_shard(task, data.folder, work, data, grid) for task in tasks])
        crystals = [read_part(work, row) for row in rows]
        times["voxelising"] = _seconds_of(lambda: [voxelize(crystal, grid) for crystal in crystals])
        times["encoding and writing"] = build - times["voxelising"]
        return len(rows), {**times, "total": times["reading and checking"] + build}


def _two_workers(table: Path) -> Iterator[Row]:
    """Seconds of a whole job on a running cluster of one worker and of two, the faster of two rounds."""
    from dist_train.backends.ray_voxelize import Cluster
    from dist_train.backends.ray_voxelize import voxelize as run

    grid = GridSpec(random_origin=True)
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            data = DataConfig(inputs=(str(table),), copies=COPIES, encoding="compact", workers=workers)
            with Cluster(data) as cluster:
                times = []
                for turn in range(3):  # the first one starts the workers and their readers
                    target = data.model_copy(update={"shards": Path(folder, f"{workers}-{turn}")})
                    times.append(_seconds_of(partial(run, target, grid, cluster)))
                seconds[workers] = min(times[1:])
    ratio = seconds[1] / seconds[2]
    case = f"seconds of a job of {COPIES} copies a crystal, compact, on two workers; reference: on one"
    yield Row(case, seconds[2], "s", seconds[1], ratio, SCALING, ratio >= SCALING)


def _seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cif_rows(sample: Path) -> Iterator[Row]:
    """Files a second of each family of the shipped CIFs and of all; reference: pymatgen alone on the same texts.

    Only of files that both read, since a refusal is quick. `ratio` is the median over rounds of pymatgen's time / ours.
    """
    families: dict[str, list[str]] = {}
    for path in sorted((sample / "cifs").rglob("*.cif")):
        try:
            text = read_text(path, path.stem)
            _ours(text), structure_from_cif(text, path.stem)
        except CrystalError:
            continue
        families.setdefault(path.parent.name, []).append(text)
    if not families:
        raise DataError(f"{sample / 'cifs'} holds no CIF: run the benchmark in a clone of the project")
    # Round by round through all families, so that no cache knows a file from the round before.
    rounds = [[(_seconds(_ours, texts), _seconds(_pymatgens, texts)) for texts in families.values()] for _ in range(ROUNDS)]
    columns = {label: [row[n] for row in rounds] for n, label in enumerate(families)}
    columns["all"] = [(sum(own for own, _ in row), sum(theirs for _, theirs in row)) for row in rounds]
    counts = {label: len(texts) for label, texts in families.items()}
    counts["all"] = sum(counts.values())
    for label, pairs in columns.items():
        ours, theirs = (counts[label] / median(seconds) for seconds in zip(*pairs, strict=True))
        ratio = median(pymatgens / own for own, pymatgens in pairs)
        case = f"CIF files a second: {label}, {counts[label]} files; reference: pymatgen"
        yield Row(case, ours, "1/s", theirs, ratio, CIF_SPEEDUP, ratio >= CIF_SPEEDUP)


def _seconds(read: Callable[[str], object], texts: Sequence[str]) -> float:
    return _seconds_of(lambda: [read(text) for text in texts])


def _ours(text: str) -> object:
    return parse_cif(text, "x", MAX_ATOMS)


def _pymatgens(text: str) -> object:
    return structure_from_cif(text, "x")
