"""The page of a training run, at its end, on its way, of a folder that has moved: it says what was recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from small_run import small_config, write_small_shards
from test_report import RECORD_ERRORS, TOOLS, Page, browse, needs_browser

from dist_train.cli import main
from dist_train.commands import training as commands
from dist_train.config import RunConfig, load_config
from dist_train.training.tracker import read_spool


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of twelve steps that stops on its way."""
    folder = tmp_path_factory.mktemp("trained")
    write_small_shards(folder)
    config = small_config(folder)
    commands.train(config.model_copy(update={"train": config.train.model_copy(update={"stop_after_step": 5})}))
    shutil.copy(config.run_dir / "report.html", folder / "stopped.html")
    commands.train(config)
    return config


def data_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Page(path.read_text(encoding="utf-8")).texts["data"][0])
    return found


def lines_of(path: Path) -> dict[str, dict[int, float]]:
    """Values by step of every line, by the titles of chart and line."""
    return {
        f"{chart['title']}, {line['name']}": dict(zip(line["steps"], line["values"], strict=True))
        for chart in data_of(path)["charts"]
        for line in chart["lines"]
    }


def test_curves_hold_what_was_recorded(trained: RunConfig) -> None:
    lines = lines_of(trained.run_dir / "report.html")
    records = list(read_spool(trained.run_dir / "metrics.jsonl"))
    for title, name in (
        ("Loss, training", "train/loss"),
        ("Loss, validation", "val/loss"),
        ("Loss part: species, training", "train/species"),
        ("Learning rate, learning rate", "learning_rate"),
        ("Gradient norm, gradient norm", "gradient_norm"),
        ("Speed, all ranks", "samples_per_second"),
    ):
        recorded = {record["step"]: record["metrics"][name] for record in records if name in record["metrics"]}
        assert lines[title] == pytest.approx(recorded, rel=1e-5), name
    assert len(lines["Loss, training"]) == 12
    assert "Speed, a rank" not in lines, "the same numbers on one rank"


def test_files_settings_and_crystals_are_there(trained: RunConfig) -> None:
    path = trained.run_dir / "report.html"
    page = Page(path.read_text())
    assert "Finished: 12 steps of 12 crystals" in path.read_text()
    links = [
        unquote(attrs["href"] or "") for tag, attrs in page.tags if tag == "a" and not (attrs["href"] or "").startswith("#")
    ]
    assert {"bundle/model.safetensors", "bundle/SHA256SUMS", "checkpoints/step_00000012"} <= set(links)
    assert all((path.parent / link).exists() for link in links)
    cells = page.texts["td"]
    at = cells.index("model.latent")
    assert cells[at + 1 : at + 3] == ["10", str(load_config().model.latent)]
    data = data_of(path)
    assert len(data["pairs"]) == len(data["densities"]) == 4
    assert [volume["label"] for volume in data["densities"][0]["volumes"]] == ["true", "decoded"]


def test_a_run_that_goes_on(trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its stopped half; then a copy without a bundle, its last record half written, at another place."""
    stopped = trained.run_dir.with_name("stopped.html")
    assert "Not finished: 5 steps of 12 crystals" in stopped.read_text()
    assert max(lines_of(stopped)["Loss, training"]) == 5
    run = shutil.copytree(trained.run_dir, tmp_path / "run")
    shutil.rmtree(run / "bundle")
    spool = run / "metrics.jsonl"
    spool.write_bytes(spool.read_bytes()[:-20])
    recorded = {r["step"]: r["metrics"]["train/loss"] for r in read_spool(spool) if "train/loss" in r["metrics"]}
    assert main(["report", str(run), "--out", str(tmp_path / "pages" / "now.html")]) == 0
    page = tmp_path / "pages" / "now.html"
    assert "without crystals: the run is not finished" in capsys.readouterr().out
    assert lines_of(page)["Loss, training"] == pytest.approx(recorded, rel=1e-5)
    assert not data_of(page)["pairs"]
    assert '<a href="../run/checkpoints/step_00000012">' in page.read_text()


def test_a_finished_run_again_and_without_its_shards(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained.run_dir / "report.html").read_bytes()
    assert main(["report", str(trained.run_dir)]) == 0
    assert (trained.run_dir / "report.html").read_bytes() == before
    run = shutil.copytree(trained.run_dir, tmp_path / "run")
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(str(trained.data.shards), str(tmp_path / "nowhere")))
    assert main(["report", str(run)]) == 0
    assert "without crystals: " in (told := capsys.readouterr().out) and "nowhere" in told
    assert "Finished: 12 steps" in (run / "report.html").read_text()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no training run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_browser
def test_a_browser_draws_the_curves(trained: RunConfig, tmp_path: Path) -> None:
    path = shutil.copy(trained.run_dir / "report.html", tmp_path)
    probe = """<script>
      root.dataset.charts = $$("#charts article").map((chart) => chart.querySelectorAll("path[d^=M]").length).join();
    </script>"""
    page = browse(Path(path), RECORD_ERRORS, TOOLS + probe)
    assert page.root["data-errors"] == "" and page.root["data-ready"] == "true"
    drawn = [int(number) for number in page.root["data-charts"].split(",")]
    assert drawn == [len(chart["lines"]) for chart in data_of(trained.run_dir / "report.html")["charts"]]
