"""The benchmarks measure what they say: the reference is the same grid, and the output is one JSON object of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.bench import naive_grid, random_crystal
from dist_train.cli import main
from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import CUTOFF_SIGMAS, voxelize

KEYS = {"case", "value", "unit", "reference", "ratio", "target", "holds"}


def test_the_naive_reference_is_the_same_grid_away_from_the_faces() -> None:
    spec = GridSpec(shape=32, max_spacing_A=0.32)
    loose = random_crystal(20)
    inside = Crystal(loose.id, loose.lattice_A, 0.25 + 0.5 * loose.frac_N3, loose.numbers_N)
    density, species = naive_grid(inside, spec)
    ours = voxelize(inside, spec)
    # The reference has no cutoff: beyond ours, an atom still has exp(-5^2 / 2) of its height.
    assert np.abs(ours.density_CDHW[0] - density).max() < len(inside) * np.exp(-0.5 * CUTOFF_SIGMAS**2)
    assert np.array_equal(ours.species_DHW, species)


@pytest.mark.timeout(120)
def test_bench_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    sample = Path(__file__).parents[1] / "data" / "sample"
    assert main(["bench", "decode", "--json", "--sample", str(sample)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row.keys() == KEYS for row in rows)
    exact = [row for row in rows if row["unit"] == "share"]
    assert exact
    assert all(row["holds"] for row in exact)
