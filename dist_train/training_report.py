"""A training run as a page, while it goes on or when it is over: curves, figures, files, settings, crystals."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import RunConfig, flattened, load_config
from dist_train.crystal.decode import Decoded
from dist_train.crystal.structure import Crystal
from dist_train.densities import reconstructed_densities
from dist_train.generate import decode, encode
from dist_train.generate_report import Output, output_pairs
from dist_train.models.objectives import PARTS
from dist_train.models.reconstruct import Codec
from dist_train.report import Chart, Density, Line, Link, Pair, Table, write_report
from dist_train.training.checkpoint import Checkpoints, read_state
from dist_train.training.tracker import read_series, read_spool

REPORT, SHOWN = "report.html", 4
"""File of a run folder; validation crystals that are shown in it."""
Series = dict[str, tuple[list[int], list[float]]]

CHARTS = (
    ("Loss", "", {"train/loss": "training", "val/loss": "validation"}),
    *((f"Loss part: {part}", "", {f"train/{part}": "training", f"val/{part}": "validation"}) for part in PARTS),
    ("Decoded right", "share of validation", {"val/composition_exact": "all species", "val/count_exact": "number of atoms"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Gradient norm", "", {"gradient_norm": "gradient norm"}),
    ("Speed", "crystals a second", {"samples_per_second": "all ranks", "samples_per_second_rank": "a rank"}),
    ("Time of a step", "s", {"step_seconds": "a step, the wait for its batch included"}),
    ("Waiting for data", "% of the time", {"data_wait_percent": "waiting"}),
    ("Time of use", "% since the first start", {"goodput_percent": "goodput"}),
    ("Memory", "GiB, most so far", {"memory_GiB": "rank 0"}),
    ("Arithmetic", "TFLOP/s a rank", {"tflops_rank": "a rank"}),
    ("Utilisation", "% of the device's peak", {"mfu_percent": "a rank"}),
    ("Passed over", "", {"skipped": "steps without a finite gradient", "damaged": "damaged samples"}),
    ("Waiting for checkpoints", "s since the start", {"checkpoint_seconds": "rank 0"}),
)  # fmt: skip
"""Title, unit, and the name of each line by its metric."""


def write_training_report(run_dir: Path, path: Path, codec: Codec | None, crystals: Sequence[Crystal]) -> None:
    """Write the page of the run in a folder.

    codec: its model, if it is finished, with validation crystals to show. Raises ConfigError for a run.yaml that can't be
    read.
    """
    config = load_config(run_dir / "run.yaml")
    series = read_series(run_dir / "metrics.jsonl")
    pairs, densities = _crystals(config, codec, crystals) if codec and crystals else ([], [])
    tables = (
        Table("Figures", ("figure", "value", "at step"), tuple(_figures(run_dir, series))),
        Table("Checkpoints", ("step", "validation loss", "kept as", "MB", "folder"), _checkpoints(run_dir, path, config)),
        Table("Model bundle", ("file", "MB"), _bundle(run_dir, path)),
        Table("Settings", ("setting", "value", "default, if another"), tuple(_settings(config))),
    )
    write_report(
        path,
        title=f"Training run {run_dir}",
        summary=_summary(run_dir, config, series),
        charts=list(_charts(series)),
        tables=[table for table in tables if table.rows],
        pairs=pairs,
        pairs_title="Validation crystals",
        densities=densities,
    )


def _charts(series: Series) -> Iterator[Chart]:
    """Those of CHARTS that show anything, then one of each other metric that changes."""
    known: set[str] = set()
    for title, unit, names in CHARTS:
        known |= names.keys()
        found = [(label, series[name]) for name, label in names.items() if name in series]
        # On one rank some lines are equal; a part that isn't trained is 0.
        lines = [
            Line(label, *both) for i, (label, both) in enumerate(found) if both not in [other for _, other in found[:i]]
        ]
        if any(any(line.values) for line in lines):
            yield Chart(title, tuple(lines), unit)
    for name, (steps, values) in series.items():
        if name not in known and len(set(values)) > 1:
            yield Chart(name, (Line(name, steps, values),))


def _summary(run_dir: Path, config: RunConfig, series: Series) -> str:
    step, times = _last_step(series), [record["time"] for record in read_spool(run_dir / "metrics.jsonl")]
    if not times:
        return "No step has been recorded yet."
    state = "Finished" if _about(run_dir).get("step") == step else "Not finished"
    heard = datetime.fromtimestamp(times[-1] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    told = [f"{state}: {step} steps of {config.train.global_batch_size} crystals; last recorded at {heard}"]
    if "val/loss" in series:
        steps, losses = series["val/loss"]
        told.append(f"validation loss {losses[-1]:.4g} at step {steps[-1]}")
    if "val/composition_exact" in series:
        told.append(
            f"{series['val/composition_exact'][1][-1]:.1%} of the validation crystals decoded with all species right"
        )
    return "; ".join(told) + "."


def _last_step(series: Series) -> int:
    return max((steps[-1] for steps, _ in series.values()), default=0)


def _about(run_dir: Path) -> dict[str, Any]:
    kept = run_dir / "bundle" / "config.json"
    found: dict[str, Any] = json.loads(kept.read_text())["about"] if kept.is_file() else {}
    return found


def _figures(run_dir: Path, series: Series) -> Iterator[tuple[object, ...]]:
    """Name, value and step of what is asked of a run first."""
    yield "steps", _last_step(series), None
    if data := _about(run_dir).get("data_counts"):
        yield from ((f"data: {what}", count, None) for what, count in data.items())
    if "val/loss" in series:
        steps, losses = series["val/loss"]
        best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        yield "lowest validation loss", losses[best], steps[best]
    for name, (steps, values) in series.items():
        if name.startswith(("val/", "train/loss")):
            yield f"last {name}", values[-1], steps[-1]
    if "samples_per_second" in series:
        yield "crystals a second, median", float(np.median(series["samples_per_second"][1])), None
    for name in ("goodput_percent", "memory_GiB", "skipped", "damaged", "checkpoint_seconds"):
        if name in series:
            yield name, series[name][1][-1], series[name][0][-1]
    for what, which in _about(run_dir).get("environment", {}).items():
        yield what, which, None


def _checkpoints(run_dir: Path, path: Path, config: RunConfig) -> tuple[tuple[object, ...], ...]:
    checkpoints = Checkpoints(run_dir / "checkpoints", config)
    folders = checkpoints.committed()
    kinds = {"newest": folders[-1] if folders else None, "best": checkpoints.best(folders)}

    rows = []
    for folder in folders:
        kept = " and ".join(kind for kind, which in kinds.items() if which == folder)
        with suppress(FileNotFoundError):  # a run that goes on removes old ones
            state, size = read_state(folder), _megabytes(*folder.iterdir())
            rows.append((state.step, state.validation_loss, kept, size, _link(folder, path)))
    return tuple(rows)


def _bundle(run_dir: Path, path: Path) -> tuple[tuple[object, ...], ...]:
    return tuple((_link(file, path), _megabytes(file)) for file in sorted((run_dir / "bundle").glob("*")))


def _megabytes(*files: Path) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def _link(file: Path, page: Path) -> Link:
    return Link(file.name, os.path.relpath(file, page.parent))


def _settings(config: RunConfig) -> Iterator[tuple[object, ...]]:
    default = dict(flattened(load_config().model_dump(mode="json")))
    for name, value in flattened(config.model_dump(mode="json")):
        changed = name not in default or default[name] != value
        yield name, _text(value), _text(default.get(name, "")) if changed else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _crystals(config: RunConfig, codec: Codec, crystals: Sequence[Crystal]) -> tuple[list[Pair], list[Density]]:
    """Validation crystals as they lie in the shards, beside what the model makes of them.

    Where no U-Net was trained, nothing is decoded to atoms: only densities are shown.
    """
    ids = [crystal.id for crystal in crystals]
    titles = [f"{crystal.formula} ({crystal.id})" for crystal in crystals]
    if config.train.objective == "vae":
        none = [Decoded(None, np.zeros(0), "no U-Net was trained")] * len(crystals)
        return [], reconstructed_densities(codec, titles, crystals, none)
    decoded = list(decode(codec, encode(codec, crystals), ids))
    outputs = [Output(*row) for row in zip(ids, decoded, crystals, strict=True)]
    return output_pairs(outputs), reconstructed_densities(codec, titles, crystals, decoded)
