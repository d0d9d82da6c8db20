"""The verb that scores generated crystals: score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dist_train.config import GridSpec
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError, DataError
from dist_train.files import check_writable, write_text
from dist_train.generation_metrics import BENCHMARKS, PUBLISHED_KEYS, generation_metrics, total_steps
from dist_train.progress import Progress
from dist_train.shards.discover import read_inputs

T = TypeVar("T")

MAX_ATOMS = GridSpec().max_atoms

_ROWS = (
    ("structure valid, %", "structure_valid_rate"),
    ("composition valid, %", "composition_valid_rate"),
    ("both valid, %", "valid_rate"),
    ("COV-R, %", "cov_recall"),
    ("COV-P, %", "cov_precision"),
    ("Wasserstein of density", "wdist_density"),
    ("  of elements", "wdist_elements"),
    ("unique, %", "unique_rate"),
    ("novel, %", "novel_rate"),
    ("unique and novel, %", "unique_novel_rate"),
    ("  and valid, %", "valid_unique_novel_rate"),
    ("METRe, %", "metre"),
    ("cRMSE", "crmse"),
)


def score(
    generated: Sequence[str],
    reference: Sequence[str],
    training: Sequence[str],
    data_set: str | None,
    out: Path,
    workers: int,
    limit: int | None,
    seed: int,
    attempts: int | None,
    ceiling: bool,
    cache: Path | None,
) -> str:
    """Score generated crystals against reference ones; writes metrics.json, returns a table.

    attempts: how many crystals were to be generated, where those that failed left no file.
    """
    _check_out(out)
    samples = [None if isinstance(item, CrystalError) else item for item in read_inputs(generated, MAX_ATOMS)]
    if attempts is not None and attempts < len(samples):
        raise ConfigError(f"--attempts {attempts} is less than the {len(samples)} crystals found; give the number asked for")
    samples += [None] * ((attempts or 0) - len(samples))
    samples, target = _drawn(samples, limit, seed), _drawn(_all(reference), limit, seed + 1)
    known = _all(training) if training else None
    cutoffs = BENCHMARKS[data_set].cutoffs if data_set else None
    cache = cache or out / "fingerprints.npz"
    runs: dict[str, Sequence[Crystal | None]] = {"generated": samples}
    if ceiling:
        runs["ceiling"] = _drawn(target, len(samples), seed)
    results = {}
    for name, crystals in runs.items():
        with Progress(name, total_steps(len(crystals), len(target)), "steps") as progress:

            def advance(stage: str, n: int, bar: Progress = progress) -> None:
                bar.update(n, stage=stage)

            results[name] = generation_metrics(crystals, target, known, cutoffs, workers, seed, advance, cache)
    metrics = {**results["generated"], "data_set": data_set, "ceiling": results.get("ceiling")}
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return f"{score_table(metrics)}\nwritten to {out}: metrics.json"


def score_table(metrics: dict[str, Any]) -> str:
    """The metrics beside the ceiling and the published figures, one a line, and what has to be said of them."""
    published = BENCHMARKS[metrics["data_set"]].published if metrics["data_set"] else {}
    columns = [("generated", metrics)]
    if metrics["ceiling"]:
        columns.append(("ceiling", metrics["ceiling"]))
    for system, figures in published.items():
        rates = [
            value if key.startswith("wdist") else value / 100 for key, value in zip(PUBLISHED_KEYS, figures, strict=True)
        ]
        columns.append((system, dict(zip(PUBLISHED_KEYS, rates, strict=True))))
    head = f"{metrics['n_generated']} generated, {metrics['n_failed']} failed"
    lines = [head.ljust(30) + "".join(f"{name:>11}" for name, _ in columns)]
    for label, key in _ROWS:
        lines.append(f"  {label:<28}" + "".join(f"{_cell(label, figures.get(key)):>11}" for _, figures in columns))
    return "\n".join([*lines, *_notes(metrics, bool(published))])


def _cell(label: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if label.endswith("%") else f"{value:.4f}"


def _notes(metrics: dict[str, Any], published: bool) -> Iterator[str]:
    yield (
        f"  against {metrics['n_reference']} reference crystals; densities of {metrics['n_property_samples']} valid ones"
        f"{'; published figures as the papers state them' if published else ''}"
    )
    if metrics["missing"]:
        yield f"  not installed: {', '.join(metrics['missing'])}; for what is missing: pip install 'dist-train[eval]'"
    if metrics["cutoffs"] is None:
        yield "  no COV without cutoffs: name the benchmark with --data-set"
    if metrics["n_training"] is None:
        yield "  nothing is said of novelty without --training"


def _check_out(out: Path) -> None:
    """Raise ConfigError where metrics.json of something else would be lost, OSError where none can be written."""
    check_writable(out)
    path = out / "metrics.json"
    if path.exists() and '"n_property_samples"' not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{path} is of another verb; set --out to another folder")


def _all(inputs: Sequence[str]) -> list[Crystal]:
    """Crystals that all have to be readable."""
    crystals = []
    for item in read_inputs(inputs, MAX_ATOMS):
        if isinstance(item, CrystalError):
            raise DataError(f"{item}; reference and training crystals have to be readable: mend or remove it")
        crystals.append(item)
    return crystals


def _drawn(crystals: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of them, drawn at random, in their order. Tables of one length give other rows for another seed."""
    if limit is None or limit >= len(crystals):
        return list(crystals)
    return [crystals[i] for i in sorted(np.random.default_rng(seed).choice(len(crystals), limit, replace=False))]
