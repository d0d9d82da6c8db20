"""The shipped sample: the manifest describes exactly the files that are there, and they stay small and licensed."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
MAX_BYTES = 6_000_000

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """The rows of manifest.csv."""
    with (SAMPLE / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files() -> list[Path]:
    """Every file of the sample, the manifest included."""
    return [path for path in SAMPLE.rglob("*") if path.is_file()]


def test_manifest_lists_every_file_once(rows: list[Row]) -> None:
    """No file is missing, extra or listed twice; only the manifest can't list itself."""
    present = {path.relative_to(SAMPLE).as_posix() for path in files()} - {"manifest.csv"}
    assert sorted(row["path"] for row in rows) == sorted(present)


def test_files_are_those_of_the_manifest(rows: list[Row]) -> None:
    """Size and sha256 of every file."""
    for row in rows:
        content = (SAMPLE / row["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (int(row["bytes"]), row["sha256"]), row["path"]


def test_sample_is_small() -> None:
    """The whole sample stays under 6 MB."""
    assert sum(path.stat().st_size for path in files()) < MAX_BYTES


def test_every_file_has_a_source_and_a_licence(rows: list[Row]) -> None:
    """Nothing of unknown origin, nothing of NOMAD (no licence stated), and a reason beside every broken file."""
    for row in rows:
        assert row["family"] and row["source"] and row["licence"], row["path"]
        assert "nomad" not in f"{row['path']} {row['family']} {row['source']}".lower(), row["path"]
        assert row["note"] or row["family"] != "broken", row["path"]


def test_cifs_lie_in_the_folder_of_their_family(rows: list[Row]) -> None:
    """At least 300 genuine CIFs of one structure each, sorted by family; broken ones count as none."""
    cifs = [row for row in rows if row["path"].endswith(".cif")]
    assert all(row["path"].split("/")[:2] == ["cifs", row["family"]] for row in cifs)
    assert all(row["n_structures"] == ("0" if row["family"] == "broken" else "1") for row in cifs)
    assert sum(row["family"] != "broken" for row in cifs) >= 300


def test_tables_hold_the_structures_of_the_manifest(rows: list[Row]) -> None:
    """At least 5,000 structures in Parquet, with string ids that occur once."""
    tables = {row["path"]: int(row["n_structures"]) for row in rows if row["path"].endswith(".parquet")}
    ids = {path: pq.read_table(SAMPLE / path, columns=["id"])["id"].to_pylist() for path in tables}
    assert {path: len(set(column)) for path, column in ids.items()} == tables
    assert all(isinstance(value, str) for column in ids.values() for value in column)
    assert sum(tables.values()) >= 5_000


def test_benchmark_tables_are_those_of_their_checksums() -> None:
    folder = SAMPLE.parent / "benchmarks"
    named = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sorted(named) == sorted(path.name for path in folder.glob("*.parquet"))
    for name, digest in named.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
