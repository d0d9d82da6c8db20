"""What several tests share: one reproducible hypothesis profile, random and real crystals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.parquet import parquet_length, read_parquet_rows
from dist_train.crystal.structure import Crystal

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("reproducible")

SAMPLE = Path(__file__).parents[1] / "data" / "sample"


@pytest.fixture(scope="session")
def sample_table() -> Callable[[str], list[Crystal]]:
    """sample_table("perov_5"): all crystals of a Parquet table in data/sample, read once."""

    @cache
    def load(name: str) -> list[Crystal]:
        path = SAMPLE / f"{name}.parquet"
        return [row for row in read_parquet_rows(path, 0, parquet_length(path)) if isinstance(row, Crystal)]

    return load


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of two ranks; beside it the shards, and in `whole` what `dist-train launch` made of it undisturbed."""
    from launching import finished, launch_command, write_run

    config = write_run(tmp_path_factory.mktemp("undisturbed"))
    done = finished(launch_command(config, "--ranks", "2"))
    assert done.returncode == 0, done.stderr
    assert "12 steps done" in done.stdout
    assert not (config.parent / "whole" / ".launch").exists()
    return config


@pytest.fixture(scope="session")
def random_crystal() -> Callable[..., Crystal]:
    """random_crystal(seed, atoms): a rotated triclinic cell, of either hand, with edges of 3.7 to 4.7 angstrom.

    Coordinates are multiples of 2^-20, so that whole-voxel and whole-cell shifts are exact in floating point.
    """

    def make(seed: int, atoms: int = 4) -> Crystal:
        rng = np.random.default_rng(seed)
        rows = np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3))
        lattice = rows / np.linalg.norm(rows, axis=1, keepdims=True) * rng.uniform(3.7, 4.7, (3, 1))
        frac = rng.integers(0, 2**20, (atoms, 3)) / 2**20
        return Crystal(f"random {seed}", lattice * rng.choice([-1, 1]), frac, rng.integers(1, MAX_Z + 1, atoms))

    return make
