"""`dist-train demo` as a newcomer types it, with two epochs instead of its own number: every stage, for real."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.crystal.cif import read_cif
from dist_train.crystal.interop import to_pymatgen
from dist_train.models.export import read_bundle
from dist_train.shards.index import Index
from dist_train.shards.verify import verify

ROOT = Path(__file__).parents[1]
LIMIT_S = 480


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "dist_train", "demo", "--out", str(out), "--epochs", "2"]
    with (out.parent / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)
    assert code == 0, (out.parent / "log").read_text()[-4000:]
    return out


pytestmark = pytest.mark.timeout(LIMIT_S + 60)


def test_all_inputs_are_accounted_for_and_broken_files_have_a_reason(demo: Path) -> None:
    for name in ("families", "perov_5"):
        index = Index.read(demo / "shards" / name)
        assert index.counts["inputs"] == index.counts["accepted"] + index.counts["rejected"]
        assert index.counts["accepted"] == sum(len(shard.samples) for shard in index.shards)
        assert not verify(index, workers=1)
        assert {shard.split for shard in index.shards} == {"train", "val", "test"}
        card = (demo / "shards" / name / "dataset_card.md").read_text()
        assert f"{index.counts['inputs']:,} inputs = {index.counts['accepted']:,} accepted" in card
        assert "not stated" not in card
    with (demo / "shards" / "families" / "rejected.csv").open() as stream:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(stream)}
    broken = {f"broken/{path.name}" for path in (ROOT / "data" / "sample" / "cifs" / "broken").iterdir()}
    assert broken
    assert all(reasons.get(file) for file in broken)


def test_metrics_are_whole_and_beside_baseline_and_ceiling(demo: Path) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    for name in ("match_rate", "atom_count_accuracy", "species_accuracy", "match_rate_nearest_training"):
        assert 0 <= metrics[name] <= 1
    assert metrics["match_rate_codec_ceiling"] == 1.0
    assert metrics["n_test"] == len(Index.read(demo / "shards" / "perov_5").samples("test"))
    assert {"rmse", "position_error_A"} <= metrics.keys()
    assert len(metrics["stages"]) == 7
    assert all(stage["seconds"] > 0 and stage["peak_MiB"] > 0 for stage in metrics["stages"])


def test_training_went_on_from_the_checkpoint_and_validated(demo: Path) -> None:
    log = (demo.parent / "log").read_text()
    assert "stopped after step" in log
    records = [json.loads(line) for line in (demo / "train" / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if "train/loss" in r["metrics"]]
    assert steps == sorted(set(steps))
    assert any("val/loss" in r["metrics"] for r in records)
    losses = [r["metrics"]["train/loss"] for r in records if "train/loss" in r["metrics"]]
    assert losses[-1] < losses[0]


def test_written_crystals_are_read_back_by_pymatgen(demo: Path) -> None:
    groups = {folder.name: sorted(folder.glob("*.cif")) for folder in (demo / "results" / "cifs").iterdir()}
    assert set(groups) == {"reconstructed", "samples", "interpolation"}
    assert all(groups.values())
    for files in groups.values():
        structure = to_pymatgen(read_cif(files[0], 1000))
        assert len(structure) > 0


def test_bundle_report_and_pictures_are_there(demo: Path) -> None:
    read_bundle(demo / "train" / "bundle")
    page = (demo / "results" / "report.html").read_text()
    assert "3Dmol" in page
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    for name in ("slices.png", "loss_curves.png"):
        assert (demo / "train" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_the_python_example_of_the_readme_runs_on_the_trained_model(demo: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [example for example in examples if "runs/demo" in example]
    script = code.replace("runs/demo", str(demo))
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.startswith("data_") or "found" in result.stdout
