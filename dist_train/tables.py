"""Measurements as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch isn't wanted where a table of other things is written
    from dist_train.models.properties import Property

_ROWS = (
    ("match rate", "match_rate", "{:.1%}"),
    ("same, valid or not", "match_rate_unconditioned", "{:.1%}"),
    ("same, as CDVAE counts", "match_rate_cdvae", "{:.1%}"),
    ("RMSE of matches", "rmse", "{:.4f}"),
    ("right number of atoms", "atom_count_accuracy", "{:.1%}"),
    ("right species (atoms)", "species_accuracy", "{:.1%}"),
    ("position error, A", "position_error_A", "{:.4f}"),
    ("cell edge error, A", "length_error_A", "{:.4f}"),
    ("cell angle error, deg", "angle_error_deg", "{:.4f}"),
)
SYSTEMS = (
    ("model", None), ("nearest training", "nearest_training"), ("codec ceiling", "codec_ceiling"),
    ("perfect copy", "perfect_copy"),
)  # fmt: skip
"""Columns, and where the metrics of each are among those of an evaluation: the model's are not nested."""


def metrics_table(metrics: dict[str, Any]) -> str:
    """The model beside the nearest training crystal and the two ceilings, one metric a line; then what was missed."""
    lines = [f"{metrics['n_test']} crystals".ljust(26) + "".join(f"{name:>18}" for name, _ in SYSTEMS)]
    for label, key, form in _ROWS:
        values = [(metrics[system] or {}).get(key) if system else metrics[key] for _, system in SYSTEMS]
        cells = ["-" if value is None else form.format(value) for value in values]
        lines.append(f"  {label:<24}" + "".join(f"{cell:>18}" for cell in cells))
    told = [misses(metrics), doubtful(metrics), latent_space(metrics), exposure(metrics)]
    return "\n".join([*lines, *(f"  {line}" for line in told if line)])


def latent_space(metrics: dict[str, Any]) -> str:
    """How much of it is in use, and how far from its latent a decoded crystal lies when it is encoded again."""
    latent = metrics["latent"]
    told = f"Latent: {latent['size']} numbers"
    if latent["kl_nats"] is not None:
        told += f", {latent['active_units']} in use, KL {latent['kl_nats']:.0f} nats"
    names = (("round_trip", "reconstructed"), ("round_trip_of_samples", "samples"))
    trips = [f"{trip['median']:.3f} ({whose})" for name, whose in names if (trip := latent[name])]
    return told + (f"; decoded and encoded again: off by {', '.join(trips)} of its spread" if trips else "")


def doubtful(metrics: dict[str, Any]) -> str:
    """How many crystals may be others than those meant, by their own latents, and how many of the misses are among these."""
    if not (found := metrics["latent_error"]):
        return ""
    return (
        f"Latent error: median {found['median']:.2f}, beyond {found['far']:g} in {found['n_far']} crystals, among them "
        f"{found['n_far_missed']} of the {found['n_missed']} misses with a crystal"
    )


def misses(metrics: dict[str, Any]) -> str:
    """How many crystals gave nothing to compare, in a sentence."""
    failed = metrics["n_failed"] - metrics["n_not_held"]
    told = f"misses without a crystal: {metrics['n_not_held']} that the model can't hold, {failed} failed decodes"
    refused = metrics["data"]["n_refused"]
    return told + (f"; {refused} inputs could not be read and are not among the {metrics['n_test']}" if refused else "")


POOR_R2 = 0.5
"""Below it, what a head says of a single crystal is worth little."""


def properties_table(properties: Sequence[Property]) -> str:
    """What was fitted, with the errors on crystals that were held out, a property a line; then what to beware of."""
    titles = ("fitted", "held out", "unseen", "MAE", "linear", "mean", "median", "R2", "range")
    lines = ["mean absolute error on crystals held out: of the heads, of a linear fit, of the labels' mean and median", ""]
    lines[1] = "property".ljust(30) + "".join(f"{title:>9}" for title in titles)
    for known in properties:
        unseen = "?" if known.n_unseen is None else known.n_unseen
        errors = [f"{value:.4g}" for value in (known.mae, known.mae_linear, known.mae_mean, known.mae_median)]
        cells = [known.n_fitted, known.n_held_out, unseen, *errors, f"{known.r2:.3f}"]
        name = f"{known.name}, {known.unit}" if known.unit else known.name
        lines.append(name.ljust(30) + "".join(f"{cell:>9}" for cell in cells) + f"  {known.low:.4g} to {known.high:.4g}")
    lines.append("unseen: of those held out, the ones that the model was not trained on")
    return "\n".join([*lines, *(line for known in properties for line in beware(known))])


def beware(known: Property) -> list[str]:
    """A warning of a property that the latents hardly tell."""
    if known.r2 >= POOR_R2:
        return []
    return [
        f"WARNING: {known.name} is hardly read off these latents: held-out R2 {known.r2:.3f}, MAE {known.mae:.4g}, "
        f"and {known.mae_median:.4g} for the same number everywhere"
    ]


def bench_line(row: dict[str, Any]) -> str:
    """A measurement beside its target."""
    ratio = f"{row['ratio']:8.{0 if row['ratio'] >= 100 else 2}f} x" if row["ratio"] is not None else " " * 10
    target = f"target {row['target']:g}" if row["target"] is not None else ""
    verdict = {True: "holds", False: "MISSED", None: ""}[row["holds"]]
    return f"{row['value']:12.4g} {row['unit']:<6}{ratio}  {target:<14}{verdict:<8}{row['case']}"


def exposure(metrics: dict[str, Any]) -> str:
    """Whether the model was trained on crystals that it was evaluated on, in a sentence."""
    seen, total = metrics["n_trained_on"], metrics["n_test"]
    if seen is None:
        return "UNKNOWN whether the model was trained on these crystals: its bundle doesn't list what it was trained on"
    listed, of = metrics["training_digests_of"]
    among = (
        f"the model's {of} training samples" if listed == of else f"the first {listed} of the model's {of} training samples"
    )
    if not seen:
        return f"None of the {total} crystals is among {among}"
    told = f"WARNING: {seen} of the {total} crystals are among {among}: this is no held-out test"
    if not (others := metrics["not_trained_on"]):
        return told
    rates = [
        f"{others[name]['match_rate']:.1%} {label}"
        for label, name in (("of the model", "model"), ("of the nearest training crystal", "nearest_training"))
        if name in others
    ]
    return f"{told}; match rate of the other {total - seen}: {', '.join(rates)}"
