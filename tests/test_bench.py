"""The benchmarks measure what they say: the reference is the same grid, and the output is one JSON object of rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_train import bench, bench_frames, bench_generate
from dist_train.bench import naive_grid, random_crystal
from dist_train.bench_frames import _n_regions
from dist_train.bench_train import _children
from dist_train.cli import main
from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize

DATA = Path(__file__).parents[1] / "data"
KEYS = {"case", "value", "unit", "reference", "ratio", "target", "holds"}


def test_the_naive_reference_is_the_same_grid_away_from_the_faces() -> None:
    spec = GridSpec(shape=32, max_spacing_A=0.32)
    loose = random_crystal(20)
    inside = Crystal(loose.id, loose.lattice_A, 0.25 + 0.5 * loose.frac_N3, loose.numbers_N)
    density, species = naive_grid(inside, spec)
    ours = voxelize(inside, spec)
    # The reference has no images: those of atoms this far inside add nothing.
    assert np.abs(ours.density_CDHW[0] - density).max() < 1e-6 * density.max() + len(inside) * np.exp(-0.5 * 5.0**2)
    assert np.array_equal(ours.species_DHW, species)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["voxelize", "decode"])
def test_bench_prints_one_json_object(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "CRYSTALS", 6)
    monkeypatch.setattr(bench, "SPEEDUPS", {5: 1e9, 100: 1.0})
    assert main(["bench", name, "--json", "--sample", str(DATA / "sample")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row.keys() == KEYS for row in rows)
    assert all((row["target"] is None) == (row["holds"] is None) for row in rows)
    for row in rows:
        if row["unit"] == "us" and row["target"]:  # a missed target is shown as missed
            assert row["holds"] == (row["ratio"] >= row["target"]) == (row["target"] == 1.0)
    assert all(row["holds"] for row in rows if row["unit"] == "share")


def test_bench_generate_tells_the_time_of_each_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_generate, "ROUNDS", 1)
    given = ["--sample", str(DATA / "sample"), "--model", str(DATA / "models" / "perov_5"), "-n", "5", "--workers", "1"]
    assert main(["bench", "generate", "--json", *given]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row.keys() == KEYS for row in rows)
    whole = [place for place, row in enumerate(rows) if row["unit"] == "1/s"]
    assert [rows[place]["case"].split(":")[0] for place in whole] == ["sample", "reconstruct"]
    for place, end in zip(whole, [*whole[1:], len(rows)]):
        row, stages = rows[place], rows[place + 1 : end]
        assert row["holds"] == (row["value"] >= row["target"] == 50.0)
        assert row["ratio"] == pytest.approx(row["value"] / row["reference"])
        assert sum(stage["value"] for stage in stages) == pytest.approx(1e3 / row["reference"])
        names = " ".join(stage["case"] for stage in stages)
        own = "drawing, decoding, encoding, decoding" if row["case"].startswith("sample") else "decoding, correcting"
        assert all(name in names for name in (own, "CIF texts", "files"))
        assert min(stage["value"] for stage in stages) >= 0.0


def test_bench_generate_without_a_model_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", "--model", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} is no model bundle: give --model" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_bench_frames_tells_what_the_papers_grids_hide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_frames, "CRYSTALS", 8)
    monkeypatch.setattr(bench_frames, "FEW", 2)
    assert main(["bench", "frames", "--json", "--sample", str(DATA / "sample")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row.keys() == KEYS for row in rows)
    found = {row["case"].split(" (")[0]: row["value"] for row in rows}
    for name in ("Perov-5", "Materials Project"):
        peaks = f"{name}, atoms are the density's peaks"
        assert (
            found[f"{peaks}: Z-weighted, sigma 1 A, as the paper's"]
            < found[f"{peaks}: all atoms alike, sigma 0.5 A, as in cell"]
        )
        lost = f"{name}, error of losing all atoms of the lightest element"
        assert 0 < found[f"{lost}: Z-weighted, as the paper's"] < found[f"{lost}: as in cell"] < 100
        same = f"{name}, the same grid for the same crystal written otherwise"
        assert found[f"{same}: paper's window"] == 0
        assert found[f"{same}: cell, canonical"] == 100
        back = f"{name}, crystals back from their true grid"
        assert found[f"{back}: paper's unit"] == 0
        assert found[f"{back}: cell, canonical, adaptive"] == 100
        assert 1 < found[f"{name}, largest error of the nearest images alone, as the paper's"] < 100


def test_regions_are_connected_across_the_faces_of_a_cell() -> None:
    marked = np.zeros((6, 6, 6), bool)
    marked[0, 2, 2] = marked[-1, 2, 2] = marked[3, 0, 3] = marked[3, -1, 3] = True
    assert _n_regions(marked) == 2
    marked[2, 4, 4] = marked[3, 5, 5] = True  # a common edge alone joins nothing
    assert _n_regions(marked) == 4


def test_processes_at_once_are_added_up(tmp_path: Path) -> None:
    # Each ends once the other has begun: they could not one after the other.
    code = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / str(os.getpid())).touch()
while len(list(folder.iterdir())) < 2:
    time.sleep(0.01)
print('{"samples_per_second": 1.5}')
"""
    assert _children([sys.executable, "-c", code, str(tmp_path)], 2) == {"samples_per_second": 3.0}
