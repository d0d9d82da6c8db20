"""Planning of a voxelising job: what is found, which split a crystal gets, and that no row is lost or doubled."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.config import DataConfig, GridSpec
from dist_train.crystal.parquet import read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError
from dist_train.shards.plan import (
    CIFS_PER_CHUNK,
    ROWS_PER_CHUNK,
    Chunk,
    Row,
    ScanResult,
    ShardTask,
    discover,
    part_name,
    plan_shards,
    read_chunk,
    scan_chunk,
    split_of,
    unit_hash,
)

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
TABLE = SAMPLE / "perov_5.parquet"
SPLITS = {"train": 0.9, "val": 0.04, "test": 0.06}
NOBODY = 65534

formulas = st.text("ABCOa123 ", min_size=1, max_size=12)


def found(chunks: list[Chunk]) -> list[str]:
    return [str(chunk.root / file) for chunk in chunks for file in chunk.files]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# discover


def test_folders_are_searched_recursively_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["b/2.cif", "a.cif", "b/1.cif.gz", "b/c/x.cif"]
    touch(*(tmp_path / name for name in [*names, "b/notes.txt", "b/cif", "a.cif.bak"]))
    (chunk,) = discover([str(tmp_path)])
    assert chunk.root == tmp_path
    assert chunk.files == tuple(sorted(names))
    assert len(chunk) == 4


def test_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"{i:02d}.cif" for i in range(20)]
    touch(*(tmp_path / "up" / name for name in names), *(tmp_path / "down" / name for name in reversed(names)))
    (up,), (down,) = discover([str(tmp_path / "up")]), discover([str(tmp_path / "down")])
    assert up.files == down.files == tuple(names)


def test_inputs_keep_their_order_and_large_ones_are_cut(tmp_path: Path) -> None:
    touch(*(tmp_path / "many" / f"{i:04d}.cif" for i in range(CIFS_PER_CHUNK + 3)), tmp_path / "one.cif")
    chunks = discover([str(tmp_path / "one.cif"), str(tmp_path / "many"), str(TABLE)])
    rows = pq.read_metadata(TABLE).num_rows
    tables = -(-rows // ROWS_PER_CHUNK)
    assert [len(chunk) for chunk in chunks[:3]] == [1, CIFS_PER_CHUNK, 3]
    assert found(chunks[:1]) == [str(tmp_path / "one.cif")]
    spans = [(chunk.start, chunk.stop) for chunk in chunks[3:]]
    assert len(spans) == tables
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(rows))
    assert sum(map(len, chunks)) == 1 + CIFS_PER_CHUNK + 3 + rows


def test_signs_of_patterns_in_a_path_mean_themselves(tmp_path: Path) -> None:
    touch(tmp_path / "a[12]*" / "x.cif", tmp_path / "a1" / "y.cif")
    assert found(discover([str(tmp_path / "a[12]*")])) == [str(tmp_path / "a[12]*" / "x.cif")]
    with pytest.raises(DataError, match="neither a folder"):
        discover([str(tmp_path / "a?")])


def test_every_real_family_is_found() -> None:
    chunks = discover([str(SAMPLE / "cifs")])
    assert sorted(found(chunks)) == sorted(str(path) for path in (SAMPLE / "cifs").rglob("*.cif*"))
    assert all(len(chunk) <= CIFS_PER_CHUNK for chunk in chunks)


def test_no_crystals_found(tmp_path: Path) -> None:
    touch(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=rf"no crystals found in {tmp_path}: expected \*\.cif"):
        discover([str(TABLE), str(tmp_path)])


def test_empty_table_has_no_crystals(tmp_path: Path) -> None:
    pq.write_table(pq.read_table(TABLE).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no crystals found"):
        discover([str(tmp_path / "empty.parquet")])


def test_no_inputs() -> None:
    with pytest.raises(DataError, match=r"data\.inputs is empty"):
        discover([])


@pytest.mark.parametrize("name", ["missing", "missing.cif", "missing.parquet"])
def test_path_that_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=str(tmp_path / name)):
        discover([str(tmp_path / name)])


def test_file_of_an_unknown_kind(tmp_path: Path) -> None:
    touch(tmp_path / "crystals.csv")
    with pytest.raises(DataError, match=r"crystals\.csv is neither a folder, a CIF file nor a Parquet table"):
        discover([str(tmp_path / "crystals.csv")])


def test_table_that_is_none_and_table_without_the_columns(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("id,a,b,c\n")
    pq.write_table(pa.table({"id": ["x"], "a": [1.0]}), tmp_path / "few.parquet")
    with pytest.raises(DataError, match="no readable Parquet table"):
        discover([str(tmp_path / "text.parquet")])
    with pytest.raises(DataError, match="are missing"):
        discover([str(tmp_path / "few.parquet")])


AS_NOBODY = f"""
import os, sys
from dist_train.errors import DataError
from dist_train.shards.plan import discover
if os.geteuid() == 0:
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
assert os.geteuid() != 0
try:
    discover(["inputs"])
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("locked", ["inputs", "inputs/below"])
def test_unreadable_folder_is_named(tmp_path: Path, locked: str) -> None:
    """In a child process that gives up root's right to read everything."""
    touch(tmp_path / "inputs" / "a.cif", tmp_path / "inputs" / "below" / "b.cif")
    tmp_path.chmod(0o755)
    (tmp_path / locked).chmod(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
    finally:
        (tmp_path / locked).chmod(0o755)
    assert done.stdout == f"input {locked} can't be read: Permission denied; check its permissions\n"


# scan


def test_a_scan_keeps_accepted_crystals_and_names_the_others(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    shutil.copytree(SAMPLE / "cifs" / "broken", inputs / "broken")
    (inputs / "good").mkdir()
    for path in sorted((SAMPLE / "cifs" / "perov_5").glob("*.cif"))[:3]:
        shutil.copy(path, inputs / "good")
    packed = min((inputs / "good").iterdir())
    (inputs / "good" / f"packed-{packed.name}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    (chunk,) = discover([str(inputs)])
    result = scan_chunk(7, chunk, tmp_path / "parts", GridSpec(shape="adaptive"), SPLITS)
    assert {r.id.split("/")[0] for r in result.rejected} == {"broken"}
    assert len(result.rejected) == len(list((SAMPLE / "cifs" / "broken").iterdir()))
    assert all(r.reason and r.stage in ("parse", "grid") for r in result.rejected)
    assert {r.file for r in result.rejected} == {f for f in chunk.files if f.startswith("broken/")}
    assert len(result.rows) == 4
    raw = (tmp_path / "parts" / part_name(7)).read_bytes()
    for row in result.rows:
        crystal = Crystal.from_json(raw[row.offset : row.offset + row.length])
        assert crystal.id == row.id
        assert row.id.startswith("good/")
        assert (row.part, row.split) == (7, split_of(crystal.formula, SPLITS))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [part_name(7)]


def test_crystals_too_large_for_the_grid_are_rejected_by_it(tmp_path: Path) -> None:
    chunk = Chunk(TABLE.parent, (TABLE.name,), 0, 20)
    result = scan_chunk(0, chunk, tmp_path, GridSpec(shape=16, max_spacing_A=0.1), SPLITS)
    assert not result.rows
    assert {r.stage for r in result.rejected} == {"grid"}
    assert all("at most 0.1 A is allowed" in r.reason for r in result.rejected)


def test_chunks_of_a_table_are_its_rows() -> None:
    chunks = [Chunk(TABLE.parent, (TABLE.name,), start, start + 5) for start in (0, 5, 10)]
    ids = [id for chunk in chunks for id, _, _ in read_chunk(chunk, 1000)]
    assert ids == pq.read_table(TABLE, columns=["id"])["id"].to_pylist()[:15]


# splits


@given(formulas)
def test_the_hash_of_a_formula_is_a_fraction_that_never_changes(formula: str) -> None:
    assert 0 <= unit_hash("split", formula) < 1
    assert unit_hash("split", formula) == unit_hash("split", formula)


def test_the_hash_is_the_one_that_shards_were_written_with() -> None:
    """A changed hash would move crystals between the splits of old and new shards."""
    assert unit_hash("split", "Ga1 Te1") == pytest.approx(0.111828, abs=1e-6)
    assert unit_hash("ab", "c") != unit_hash("a", "bc")


@given(formulas, st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_a_formula_keeps_its_split_when_the_first_share_grows(formula: str, weights: list[int]) -> None:
    splits = {f"s{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    split = split_of(formula, splits)
    assert split in splits
    assert split_of(formula, dict(splits)) == split
    grown = {**splits, "s0": splits["s0"] + splits["s1"], "s1": 0.0}
    assert split_of(formula, grown) == {"s1": "s0"}.get(split, split)


def test_polymorphs_share_a_split(tmp_path: Path) -> None:
    (chunk, *_) = discover([str(SAMPLE / "cifs" / "carbon_24")])
    even = {f"s{i}": 0.1 for i in range(10)}
    result = scan_chunk(0, Chunk(chunk.root, chunk.files[:12]), tmp_path, GridSpec(shape="adaptive"), even)
    assert len({row.split for row in result.rows}) == 1
    assert len(result.rows) == 12


def test_shares_on_the_real_perovskites() -> None:
    rows = read_parquet_rows(TABLE, 0, pq.read_metadata(TABLE).num_rows)
    crystals = [row for row in rows if isinstance(row, Crystal)]
    split_by_id = {crystal.id: split_of(crystal.formula, SPLITS) for crystal in crystals}
    counts = Counter(split_by_id.values())
    assert len(split_by_id) == len(crystals) > 3000
    for split, share in SPLITS.items():
        assert counts[split] / len(crystals) == pytest.approx(share, abs=0.015)


# plan


@st.composite
def scans(draw: st.DrawFn) -> tuple[list[ScanResult], list[Chunk]]:
    """Scan results of a few chunks whose ids may occur twice."""
    numbers = draw(st.lists(st.lists(st.integers(0, 40), max_size=15), min_size=1, max_size=5))
    results, chunks = [], []
    for part, ids in enumerate(numbers):
        rows = [Row(f"id{i}", "x.cif", split_of(f"f{i % 7}", SPLITS_EVEN), part, 10 * at, 10) for at, i in enumerate(ids)]
        results.append(ScanResult(tuple(rows), ()))
        chunks.append(Chunk(Path(f"folder{part}"), tuple(f"{row.id}.cif" for row in rows) or ("none.cif",)))
    return results, chunks


SPLITS_EVEN = {"train": 0.5, "val": 0.3, "test": 0.2}


def config(samples_per_shard: int) -> DataConfig:
    return DataConfig(splits=SPLITS_EVEN, samples_per_shard=samples_per_shard)


def ids_of(tasks: list[ShardTask]) -> list[str]:
    return [row.id for task in tasks for row in task.rows]


@given(scans(), st.integers(1, 6))
def test_every_row_is_planned_once_or_rejected_as_doubled(
    scanned: tuple[list[ScanResult], list[Chunk]], samples_per_shard: int
) -> None:
    results, _ = scanned
    given_ids = [row.id for result in results for row in result.rows]
    tasks, rejected = plan_shards(results, config(samples_per_shard))
    assert sorted(ids_of(tasks)) == sorted(set(given_ids))
    assert Counter(ids_of(tasks)) + Counter(r.id for r in rejected) == Counter(given_ids)
    assert {r.stage for r in rejected} <= {"plan"}
    assert all("already taken" in r.reason for r in rejected)


@given(scans(), st.integers(1, 6))
def test_shards_are_full_and_numbered(scanned: tuple[list[ScanResult], list[Chunk]], samples_per_shard: int) -> None:
    tasks, _ = plan_shards(scanned[0], config(samples_per_shard))
    assert len({task.name for task in tasks}) == len(tasks)
    for split in SPLITS_EVEN:
        mine = [task for task in tasks if task.split == split]
        assert all(row.split == split for task in mine for row in task.rows)
        assert [task.name for task in mine] == [f"{split}-{i:06d}.tar" for i in range(len(mine))]
        assert [task.first for task in mine] == [i * samples_per_shard for i in range(len(mine))]
        assert all(len(task.rows) == samples_per_shard for task in mine[:-1])
        assert all(1 <= len(task.rows) <= samples_per_shard for task in mine[-1:])


@given(scans(), st.permutations(range(5)))
def test_the_plan_does_not_depend_on_the_order_of_chunks(
    scanned: tuple[list[ScanResult], list[Chunk]], order: list[int]
) -> None:
    results, chunks = scanned
    turned = [place for place in order if place < len(chunks)]
    tasks, _ = plan_shards(results, config(4))
    other, _ = plan_shards([results[i] for i in turned], config(4))
    assert [(task.name, ids_of([task])) for task in other] == [(task.name, ids_of([task])) for task in tasks]


def test_families_mix() -> None:
    """The order is that of a hash: a family that is read first doesn't fill the first shards."""
    rows = [[Row(f"{family}/{i}", "x.cif", "train", part, i, 1) for i in range(100)] for part, family in enumerate("ab")]
    tasks, _ = plan_shards([ScanResult(tuple(some), ()) for some in rows], config(50))
    for task in tasks:
        assert 15 <= sum(row.id.startswith("a/") for row in task.rows) <= 35


def test_a_doubled_id_keeps_the_first(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(SAMPLE / "cifs" / "perov_5" / "16137.cif", tmp_path / folder / "same.cif")
    chunks = discover([str(tmp_path / "a"), str(tmp_path / "b")])
    grid = GridSpec(shape="adaptive")
    results = [scan_chunk(i, chunk, tmp_path / "parts", grid, SPLITS_EVEN) for i, chunk in enumerate(chunks)]
    tasks, (rejected,) = plan_shards(results, config(4))
    assert [(row.id, row.part) for task in tasks for row in task.rows] == [("same", 0)]
    assert (rejected.id, rejected.file, rejected.stage) == ("same", "same.cif", "plan")
    whole = discover([str(tmp_path)])
    apart = [scan_chunk(i, c, tmp_path / "whole", grid, SPLITS_EVEN) for i, c in enumerate(whole)]
    assert sorted(ids_of(plan_shards(apart, config(4))[0])) == ["a/same", "b/same"]
