"""Measurements as text for the terminal."""

from __future__ import annotations

from typing import Any

_ROWS = (
    ("match rate", "match_rate", "{:.1%}"),
    ("RMSE of matches", "rmse", "{:.4f}"),
    ("right number of atoms", "atom_count_accuracy", "{:.1%}"),
    ("right species (atoms)", "species_accuracy", "{:.1%}"),
    ("position error, A", "position_error_A", "{:.4f}"),
    ("cell edge error, A", "length_error_A", "{:.4f}"),
)
_COLUMNS = (("model", None), ("nearest training", "nearest_training"), ("ceiling", "ceiling"))


def metrics_table(metrics: dict[str, Any]) -> str:
    """The model beside the nearest training crystal and the ceiling, one metric a line."""
    lines = [f"{metrics['n_test']} crystals".ljust(26) + "".join(f"{name:>18}" for name, _ in _COLUMNS)]
    for label, key, form in _ROWS:
        values = [(metrics[system] if system else metrics)[key] for _, system in _COLUMNS]
        cells = ["-" if value is None else form.format(value) for value in values]
        lines.append(f"  {label:<24}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append(f"  {exposure(metrics)}")
    return "\n".join(lines)


def bench_line(row: dict[str, Any]) -> str:
    """A measurement beside its target."""
    ratio = f"{row['ratio']:8.{0 if row['ratio'] >= 100 else 2}f} x" if row["ratio"] is not None else " " * 10
    target = f"target {row['target']:g}" if row["target"] is not None else ""
    verdict = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
    return f"{row['value']:12.4g} {row['unit']:<6}{ratio}  {target:<14}{verdict:<8}{row['case']}"


def exposure(metrics: dict[str, Any]) -> str:
    """Whether the model may have been trained on crystals that it was evaluated on, in a sentence."""
    seen, total = metrics["n_maybe_trained_on"], metrics["n_test"]
    if not seen:
        return f"none of the {total} crystals has a formula of the model's training split"
    return f"CAUTION: {seen} of the {total} crystals have a formula of the model's training split: this is no held-out test"
