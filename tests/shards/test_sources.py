"""Every kind of input, in every mix, from disks and URLs, gives the same crystals in a fixed order."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from s3_server import s3_server
from small_shards import real_crystals, write_shards

from dist_train.commands.models import read_crystals
from dist_train.config import DataConfig, GridSpec
from dist_train.crystal.extxyz import to_extxyz
from dist_train.crystal.formats import write_crystal
from dist_train.crystal.parquet import write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError, DataError
from dist_train.shards import discover as discovery
from dist_train.shards.discover import FILES_PER_CHUNK, ROWS_PER_CHUNK, discover
from dist_train.shards.scan import read_part, read_scan, scan_chunk, stop_reader
from dist_train.shards.sources import Chunk, read_chunk, units

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
TABLE = SAMPLE / "perov_5.parquet"
NOBODY = 65534

CRYSTALS = [replace(crystal, id=f"c{i}") for i, crystal in enumerate(real_crystals(4))]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found_files(*given: object) -> list[str]:
    return [f"{chunk.place}/{name}" for chunk in discover(map(str, given)).chunks for name in chunk.names]


def crystals_of(*given: object, split_column: str | None = None) -> dict[str, Crystal]:
    """All crystals of the inputs, by id."""
    found = discover(map(str, given))
    assert not found.refused
    read: dict[str, Crystal] = {}
    for chunk in found.chunks:
        for unit in units(chunk, 1000, 0, split_column):
            for id, item in unit.items():
                assert isinstance(item, Crystal), item
                assert id == item.id and id not in read
                read[id] = item
    return read


def assert_same(read: dict[str, Crystal], crystals: list[Crystal], atol: float = 1e-6) -> None:
    assert list(read) == [crystal.id for crystal in crystals]
    for one, other in zip(read.values(), crystals, strict=True):
        np.testing.assert_array_equal(one.numbers_N, other.numbers_N)
        np.testing.assert_allclose(one.lengths_angles, other.lengths_angles, atol=atol)
        difference = one.frac_N3 - other.frac_N3
        np.testing.assert_allclose(difference - np.round(difference), 0, atol=atol)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four crystals in four formats, one in a folder below."""
    root = tmp_path / "four"
    (root / "low").mkdir(parents=True)
    for crystal, name in zip(CRYSTALS, ("c0.cif", "c1.cif.gz", "c2.vasp", "c3.extxyz")):
        write_crystal(root / name, crystal)
    return root


# Files, folders and patterns


def test_every_format_of_files(folder: Path) -> None:
    assert_same(crystals_of(folder), CRYSTALS)
    assert_same(crystals_of(*sorted(folder.glob("c*"))), CRYSTALS)
    assert_same(crystals_of(folder / "*"), CRYSTALS)


def test_folders_are_searched_recursively_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["b/2.cif", "a.cif", "b/1.cif.gz", "b/c/POSCAR", ".hidden/.x.cif"]
    touch(*(tmp_path / name for name in [*names, "b/notes.txt", "b/cif", "a.cif.bak"]))
    found = discover([str(tmp_path)])
    (chunk,) = found.chunks
    assert (chunk.place, chunk.names, len(chunk)) == (str(tmp_path), tuple(sorted(names)), 5)
    assert found.ignored == 3
    assert [unit.id for unit in units(chunk, 10)] == [".hidden/.x", "a", "b/1", "b/2", "b/c/POSCAR"]


def test_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"{i:02d}.cif" for i in range(20)]
    touch(*(tmp_path / "up" / name for name in names), *(tmp_path / "down" / name for name in reversed(names)))
    (up,), (down,) = discover([str(tmp_path / "up")]).chunks, discover([str(tmp_path / "down")]).chunks
    assert up.names == down.names == tuple(names)


def test_inputs_keep_their_order_and_large_ones_are_cut(tmp_path: Path) -> None:
    touch(*(tmp_path / "many" / f"{i:04d}.cif" for i in range(FILES_PER_CHUNK + 3)), tmp_path / "one.cif")
    chunks = discover([str(tmp_path / "one.cif"), str(tmp_path / "many"), str(TABLE)]).chunks
    rows = pq.read_metadata(TABLE).num_rows
    assert [len(chunk) for chunk in chunks[:3]] == [1, FILES_PER_CHUNK, 3]
    assert [chunk.input for chunk in chunks[:3]] == [f"{tmp_path}/one.cif", f"{tmp_path}/many", f"{tmp_path}/many"]
    assert [row for chunk in chunks[3:] for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert all(len(chunk) <= ROWS_PER_CHUNK for chunk in chunks[3:])
    assert sum(map(len, chunks)) == 1 + FILES_PER_CHUNK + 3 + rows


def test_equal_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    for at in ("run1", "run2"):
        (tmp_path / at).mkdir()
        write_crystal(tmp_path / at / "POSCAR", CRYSTALS[0])
        write_crystal(tmp_path / at / "x.cif", CRYSTALS[0])
    ids = ["run1/POSCAR", "run1/x", "run2/POSCAR", "run2/x"]
    assert list(crystals_of(tmp_path)) == ids
    assert list(crystals_of(tmp_path / "run*")) == ids  # folders
    assert list(crystals_of(tmp_path / "run?" / "*")) == ids  # files
    assert list(crystals_of(tmp_path / "**")) == ids  # both: each file once
    assert list(crystals_of(tmp_path / "run1" / "POSCAR")) == ["POSCAR"]


def test_a_pattern_is_one_input_of_full_chunks(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{i:04d}.cif" for i in range(FILES_PER_CHUNK + 3)), tmp_path / "notes.txt")
    found = discover([str(tmp_path / "*")])
    assert [len(chunk) for chunk in found.chunks] == [FILES_PER_CHUNK, 3]
    assert found.ignored == 1
    assert {chunk.input for chunk in found.chunks} == {str(tmp_path / "*")}


def test_signs_of_patterns_in_a_path_mean_themselves(tmp_path: Path) -> None:
    touch(tmp_path / "a[12]*" / "x.cif", tmp_path / "a1" / "y.cif")
    assert found_files(tmp_path / "a[12]*") == [f"{tmp_path}/a[12]*/x.cif"]
    with pytest.raises(DataError, match="no crystals found in"):
        discover([str(tmp_path / "b?")])


def test_links_to_files_are_read_and_links_to_folders_told(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "z.cif").symlink_to(folder / "c0.cif")
    (tmp_path / "links" / "folder").symlink_to(folder)
    (tmp_path / "links" / "loop").symlink_to("..")
    found = discover([str(tmp_path / "links")])
    assert [chunk.names for chunk in found.chunks] == [("z.cif",)]
    assert [(file, reason[:29]) for _, file, reason in found.refused] == [
        (f"{tmp_path}/links/{name}", "a link to a folder isn't foll") for name in ("folder", "loop")
    ]


def test_an_extxyz_file_of_several_frames(tmp_path: Path) -> None:
    nameless = [replace(crystal, id="") for crystal in CRYSTALS]
    frames = [to_extxyz(crystal).replace("id=crystal", "") for crystal in nameless]
    (tmp_path / "frames.xyz").write_text("".join(frames))
    (tmp_path / "named.xyz").write_text("".join(map(to_extxyz, CRYSTALS)))
    read = crystals_of(tmp_path)
    assert list(read) == [*(f"frames-{i:05d}" for i in range(1, 5)), *(crystal.id for crystal in CRYSTALS)]
    assert discover([str(tmp_path)]).chunks[0].names == ("frames.xyz", "named.xyz")


def test_every_real_family_is_found() -> None:
    assert sorted(found_files(SAMPLE / "cifs")) == sorted(map(str, (SAMPLE / "cifs").rglob("*.cif*")))


def test_sizes_of_all_that_is_read_are_recorded(folder: Path, tmp_path: Path) -> None:
    write_parquet(folder / "low" / "t.parquet", CRYSTALS)
    (folder / "notes.txt").touch()
    sizes = discover([str(folder)]).sizes
    assert sizes == {str(path): path.stat().st_size for path in folder.rglob("*") if path.suffix not in ("", ".txt")}


# Tables


def test_rows_of_tables_and_their_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", CRYSTALS)
    assert_same(crystals_of(tmp_path / "t.parquet"), CRYSTALS)
    table = pq.read_table(tmp_path / "t.parquet")
    pq.write_table(table.append_column("fold", [["train", None, "7", "val"]]), tmp_path / "s.parquet")
    (chunk,) = discover([str(tmp_path / "s.parquet")]).chunks
    assert [unit.split for unit in units(chunk, 1000, 0, "fold")] == ["train", None, "7", "val"]
    later = list(units(chunk, 1000, 2, "fold"))
    assert [unit.split for unit in later] == ["7", "val"]
    assert [id for unit in later for id, _ in unit.items()] == ["c2", "c3"]
    (chunk,) = discover([str(tmp_path / "t.parquet")]).chunks
    with pytest.raises(DataError, match="no column 'fold'"):
        list(units(chunk, 1000, 0, "fold"))


def test_tables_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("id,a,b,c\n")
    pq.write_table(pq.read_table(TABLE).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no readable Parquet table"):
        discover([str(tmp_path / "text.parquet")])
    with pytest.raises(DataError, match="no crystals found"):
        discover([str(tmp_path / "empty.parquet")])
    found = discover([str(tmp_path)])  # among others it is one of the rejected
    assert [(file, reason[:25]) for _, file, reason in found.refused] == [
        (f"{tmp_path}/text.parquet", "no readable Parquet table")
    ]


def test_a_table_that_breaks_off_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_parquet(path, CRYSTALS)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    (chunk,) = discover([str(path)]).chunks
    ((place, error),) = read_chunk(chunk, 1000)
    assert place == str(path)
    assert str(error).startswith("rows from 0 on can't be read: ")
    with pytest.raises(CrystalError, match=f"^{path}: rows from 0 on can't be read"):
        read_crystals([str(path)], GridSpec())


# Archives


def pack_tar(mode: str) -> Callable[[Path, Path], None]:
    def pack(folder: Path, path: Path) -> None:
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            archive.add(folder, arcname=".")

    return pack


def pack_zip(method: int) -> Callable[[Path, Path], None]:
    def pack(folder: Path, path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))

    return pack


PACKERS: dict[str, Callable[[Path, Path], None]] = {
    "a.tar": pack_tar("w"), "a.tar.gz": pack_tar("w:gz"), "a.TGZ": pack_tar("w:gz"), "a.tar.bz2": pack_tar("w:bz2"),
    "a.tar.xz": pack_tar("w:xz"), "a.zip": pack_zip(zipfile.ZIP_DEFLATED), "b.zip": pack_zip(zipfile.ZIP_STORED),
    "c.zip": pack_zip(zipfile.ZIP_LZMA),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_gives_the_same_crystals_as_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    PACKERS[name](folder, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    read = crystals_of(tmp_path / name)
    assert sorted(read) == sorted(crystal.id for crystal in CRYSTALS)
    assert_same({crystal.id: read[crystal.id] for crystal in CRYSTALS}, CRYSTALS)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_with_long_names(tmp_path: Path, format: int) -> None:
    write_crystal(tmp_path / "x.cif", CRYSTALS[0])
    names = ["x", f"{'n' * 90}/{'m' * 60}", *([] if format == tarfile.USTAR_FORMAT else ["\u00e9" * 70, "long/" * 60 + "x"])]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
        for name in names:
            archive.add(tmp_path / "x.cif", arcname=f"{name}.cif")
    assert list(crystals_of(tmp_path / "a.tar")) == names


def test_ids_of_several_archives_keep_their_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for name in ("a.tar", "a.zip"):
        PACKERS[name](folder, tmp_path / "all" / name)
    write_crystal(tmp_path / "all" / "c0.cif", CRYSTALS[0])
    chunks = discover([str(tmp_path / "all")]).chunks
    read = [[unit.id for unit in units(chunk, 1000)] for chunk in chunks]
    assert [chunk.kind for chunk in chunks] == ["files", "tar", "zip"]
    assert read[0] == ["c0"] and read[2] == [f"a.zip/c{i}" for i in range(4)]
    assert sorted(read[1]) == [f"a.tar/c{i}" for i in range(4)]


def test_chunks_of_an_archive_are_read_from_their_own_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "FILES_PER_CHUNK", 2)
    (tmp_path / "in").mkdir()
    for i in range(7):
        write_crystal(tmp_path / "in" / f"{i}.cif", CRYSTALS[i % 4])
    for name in ("a.tar.gz", "a.zip"):
        PACKERS[name](tmp_path / "in", tmp_path / name)
        chunks = discover([str(tmp_path / name)]).chunks
        assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
        for chunk in chunks:
            for first in range(len(chunk)):
                read = [id for unit in units(chunk, 1000, first) for id, _ in unit.items()]
                assert read == [Path(name).stem for name in chunk.names[first:]]
        assert len(crystals_of(tmp_path / name)) == 7


# Output of another run


@pytest.mark.parametrize("store", ["grids", "structures"])
def test_output_of_another_run(tmp_path: Path, store: str) -> None:
    grid = GridSpec(shape=16, max_spacing_A=0.5, random_origin=True)
    index = write_shards(tmp_path / "shards", CRYSTALS, grid, store, per_shard=3, val=1, copies=2)
    found = discover([str(tmp_path / "shards")])
    assert found.sizes == {str(tmp_path / "shards" / shard.name): shard.bytes for shard in index.shards}
    read = crystals_of(tmp_path / "shards")
    assert sorted(read) == [crystal.id for crystal in CRYSTALS]  # one copy of each
    for crystal in CRYSTALS:
        assert read[crystal.id].formula == crystal.formula
        np.testing.assert_allclose(read[crystal.id].lattice_A, crystal.lattice_A, atol=1e-9)
    assert list(crystals_of(tmp_path / "sh*")) == list(read)


# URLs


def test_urls_of_a_disk(folder: Path) -> None:
    assert_same(crystals_of(f"file://{folder}"), CRYSTALS)
    assert_same(crystals_of(f"file://{folder}/*.cif*"), CRYSTALS[:2])


@pytest.fixture
def memory(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The folder, archives of it, a table and shards in fsspec's memory."""
    PACKERS["a.tar.gz"](folder, tmp_path / "a.tar.gz")
    PACKERS["a.zip"](folder, tmp_path / "a.zip")
    write_parquet(tmp_path / "t.parquet", CRYSTALS)
    write_shards(tmp_path / "shards", CRYSTALS)
    system = fsspec.filesystem("memory")
    system.put(f"{tmp_path}/", "/box/", recursive=True)
    yield "memory://box"
    system.rm("/box", recursive=True)


def check_urls(base: str, given: Path) -> None:
    """All kinds of inputs below a URL give what they give on the disk."""
    for name in ("four", "four/c0.cif", "four/*.cif*", "a.tar.gz", "a.zip", "t.parquet", "shards"):
        there, here = discover([f"{base}/{name}"]), discover([str(given / name)])
        assert [chunk.names for chunk in there.chunks] == [chunk.names for chunk in here.chunks]
        assert list(there.sizes.values()) == list(here.sizes.values())
        assert all(chunk.place.startswith(base.split("://")[0]) for chunk in there.chunks)
        assert_same(crystals_of(f"{base}/{name}"), list(crystals_of(given / name).values()))


def test_urls(memory: str, tmp_path: Path) -> None:
    check_urls(memory, tmp_path)
    with pytest.raises(DataError, match="neither a folder nor a file"):
        discover([f"{memory}/nothing"])


@pytest.fixture
def s3(folder: Path, tmp_path: Path) -> Iterator[str]:
    """A bucket on a server of the S3 API, moto's, on this machine."""
    with s3_server(tmp_path / "log"):
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("box")
        PACKERS["a.tar.gz"](folder, tmp_path / "a.tar.gz")
        PACKERS["a.zip"](folder, tmp_path / "a.zip")
        write_parquet(tmp_path / "t.parquet", CRYSTALS)
        write_shards(tmp_path / "shards", CRYSTALS)
        system.put(f"{tmp_path}/", "box/", recursive=True)
        yield "s3://box"


def test_s3(s3: str, tmp_path: Path) -> None:
    """Listed here, read here, and read by the process that parses."""
    check_urls(s3, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    (chunk,) = discover([f"{s3}/a.zip"]).chunks
    try:
        assert scan_chunk(0, chunk, work, DataConfig(), GridSpec(shape=16, max_spacing_A=0.5)) == (4, 0)
        result = read_scan(work, 0)
        assert result and [read_part(work, row).formula for row in result.rows] == [c.formula for c in CRYSTALS]
        gone = Chunk("x", "files", f"{s3}/four", ("c0.cif", "gone.cif"))
        assert scan_chunk(1, gone, work, DataConfig(), GridSpec(shape=16, max_spacing_A=0.5)) == (1, 1)
    finally:
        stop_reader()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://box/x.cif", "Protocol not known: nosuch"),
        ("hdfs2://box/x.cif", "Protocol not known"),
        ("gs://box/x.cif", "gcsfs"),
        ("zip://x.cif::file:///a.zip", "chained URLs"),
    ],
)
def test_urls_that_nothing_here_can_open(url: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"input .* can't be read: .*{message}"):
        discover([url])


# What can't be read


@pytest.mark.parametrize("name", ["nothing", "nothing/x.cif", "nothing.parquet"])
def test_missing_inputs(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"input {tmp_path}/{name} is neither a folder nor a file"):
        discover([str(tmp_path / name)])


def test_no_input_and_inputs_without_crystals(tmp_path: Path) -> None:
    touch(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"data\.inputs is empty"):
        discover([])
    with pytest.raises(DataError, match=rf"no crystals found in {tmp_path}: expected CIF"):
        discover([str(TABLE), str(tmp_path)])
    with pytest.raises(DataError, match=r"notes\.txt is of no known kind: names end in \.cif"):
        discover([str(tmp_path / "notes.txt")])


AS_NOBODY = f"""
import os, sys
from dist_train.errors import DataError
from dist_train.shards.discover import discover
if os.geteuid() == 0:
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
assert os.geteuid() != 0
try:
    found = discover(["inputs"])
    print([(chunk.names, chunk.input) for chunk in found.chunks], found.refused)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("locked", ["inputs", "inputs/below", ""])
def test_unreadable_folder_is_named(locked: str) -> None:
    """In a child process that gives up root's right to read everything."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name) / "open"
        touch(folder / "inputs" / "a.cif", folder / "inputs" / "below" / "b.cif")
        for path in (folder.parent, folder):
            path.chmod(0o755)
        (folder / locked).chmod(0)
        try:
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY.replace("inputs", f"{folder}/inputs")],
                cwd="/", capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
        finally:
            (folder / locked).chmod(0o755)
    assert done.stdout.startswith(f"input {folder / (locked or 'inputs')} can't be read: ")
    assert "Permission denied" in done.stdout and done.stdout.endswith("; check its permissions\n")


def test_gzipped_files_have_the_ids_of_plain_ones(tmp_path: Path) -> None:
    write_crystal(tmp_path / "mp-1.5.cif", CRYSTALS[0])
    write_crystal(tmp_path / "p.vasp", CRYSTALS[1])
    (tmp_path / "POSCAR_1.gz").write_bytes(gzip.compress((tmp_path / "p.vasp").read_bytes()))
    assert list(crystals_of(tmp_path)) == ["POSCAR_1", "mp-1.5", "p"]
