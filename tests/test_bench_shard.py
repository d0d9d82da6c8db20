"""The benchmarks of the reading side count the files that both read, and show a missed target as missed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dist_train import bench_shard
from dist_train.errors import DataError

CIFS = Path(__file__).parents[1] / "data" / "sample" / "cifs"


def test_cif_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("perov_5", "mp_20"):
        (tmp_path / "cifs" / family).mkdir(parents=True)
        for path in sorted((CIFS / family).glob("*.cif"))[:4]:
            shutil.copy(path, tmp_path / "cifs" / family)
    (tmp_path / "cifs" / "perov_5" / "broken.cif").write_text("no crystal")
    monkeypatch.setattr(bench_shard, "ROUNDS", 3)
    for target, holds in ((0.01, True), (1e9, False)):
        monkeypatch.setattr(bench_shard, "CIF_SPEEDUP", target)
        rows = list(bench_shard.cif_rows(tmp_path))
        assert [row.case.split(": ")[1] for row in rows] == [
            f"{label} files; reference" for label in ("mp_20, 4", "perov_5, 4", "all, 8")
        ]
        assert [row.holds for row in rows] == [holds] * 3
        for row in rows:
            assert row.reference and row.ratio == pytest.approx(row.value / row.reference, rel=0.5)


def test_cif_rows_without_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CIF"):
        list(bench_shard.cif_rows(tmp_path))
