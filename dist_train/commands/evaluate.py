"""The verb evaluate: a model against test crystals, as metrics.json, crystals.csv, a report and CIF files."""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train import __version__
from dist_train.commands.models import bundle_folder, read_many, read_split, seen, write_cifs
from dist_train.crystal.case import in_grid, make_case
from dist_train.crystal.decode import Decoded
from dist_train.crystal.metrics import structure_valid
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, DataError, kind_of
from dist_train.evaluate import Evaluation
from dist_train.evaluate import evaluate as evaluate_model
from dist_train.evaluate_report import rows, write_evaluation_report
from dist_train.files import atomic_path, check_writable, sha256, write_text
from dist_train.generate import CORRECTIONS, FAR, decode, encode, interpolate_latents, samples
from dist_train.generated import processes
from dist_train.latent_quality import latent_quality
from dist_train.models.export import SUMS_NAME, read_bundle, training_digests
from dist_train.models.reconstruct import Codec
from dist_train.progress import Stages
from dist_train.shards.index import Index

READ_ATOMS = 2000
"""Crystals with more are refused as they are read (or with more than the model's grid takes, if that is more)."""
LISTED_REFUSALS = 1000
FILES = ("metrics.json", "report.html", "crystals.csv")
"""What an evaluation writes beside the folder cifs/."""
PACKAGES = ("numpy", "torch", "scipy", "spglib", "pymatgen")

Refused = list[tuple[str, str]]


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks for.

    Either shards, a folder or a URL that is kept below cache_dir, and split; or data: files, folders, archives, tables.
    training: candidates of the baseline; of shards it is their training split by default. limit: so many crystals at most,
    the first ones. move: seed, or None to leave them. corrections: see `generate.decode`.
    """

    model: str
    tracking_uri: str | None
    out: Path
    shards: str | None = None
    cache_dir: Path | None = None
    split: str | None = None
    data: Sequence[str] = ()
    training: Sequence[str] = ()
    limit: int | None = None
    move: int | None = None
    corrections: int = CORRECTIONS
    workers: int = 1
    samples: int = 16
    steps: int = 9


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate a model on test crystals and write all results to `options.out`; returns the metrics.

    Raises the error of the first fault found; crystals that can't be read or held are counted, never fatal.
    """
    out, stages = options.out, Stages()
    check_writable(out)
    if out.exists() and not (out / "metrics.json").exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no evaluation; set --out to another folder")
    if options.data and options.split:
        raise ConfigError(f"--split {options.split} is of shards, and --data has none; leave it out")
    with bundle_folder(options.model, options.tracking_uri) as folder:
        network, config = read_bundle(folder)
        known, bundle_digest = training_digests(folder), sha256(folder / SUMS_NAME)
    codec = Codec(network)
    crystals, training, refused = _read(options, max(READ_ATOMS, network.grid.max_atoms), stages)
    if not crystals:
        told = f"; the first of {len(refused)}: {refused[0][0]}: {refused[0][1]}" if refused else ""
        raise DataError(f"there is no crystal to evaluate in {_source(options)}{told}")
    with stages.stage("prepare", len(crystals) + len(training)) as bar:
        prepare = partial(make_case, spec=network.grid, elements=network.elements, move=options.move)
        cases = list(bar.over(parallel_map(prepare, crystals, options.workers)))
        reduce = partial(in_grid, spec=network.grid)
        training = list(bar.over(parallel_map(reduce, training, options.workers, 64)))
    result = evaluate_model(codec, cases, training, options.workers, stages, options.corrections)
    with stages.stage("samples", options.samples + options.steps) as bar:
        ids = [f"sample-{place:03d}" for place in range(options.samples)]
        drawn = samples(codec, ids, 0, processes(options.workers, len(ids)), bar.update)
        look = {"samples": [sample.decoded for sample in drawn], "interpolation": _way(codec, result, options)}
        bar.update(options.steps)
    with stages.stage("latents", len(result.held) + options.samples) as bar:
        held = [result.reconstructed[place] for place in result.held]
        drawn_NL = torch.stack([sample.latent_L for sample in drawn]) if drawn else result.latent.mean[:0]
        # What samples' latents alone decode to: the samples themselves are what these latents are encoded from.
        alone = list(decode(codec, drawn_NL, ids, processes(options.workers, len(ids))))
        quality = latent_quality(codec, result.latent, held, drawn_NL, alone, options.workers)
        bar.update(len(held) + options.samples)
    about = config["about"]
    metrics = {
        "model": {
            "name": options.model,
            "bundle_sha256": bundle_digest,
            "code_version": config["code_version"],
            "step": about.get("step"),
            "training_data_digest": about.get("data_digest"),
        },
        "data": {
            "source": _source(options),
            "digest": _digest(crystals),
            "n_crystals": len(crystals),
            "n_refused": len(refused),
            "n_training": len(training),
            "limit": options.limit,
            "moved_by_seed": options.move,
        },
        "corrections": options.corrections,
        "latent_error": _latent_errors(result),
        "versions": {"dist_train": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        **_metrics(result, refused),
        **_trained_on(result, known, about.get("training_digests", {})),
        **_sampled(look["samples"]),
        "latent": quality,
    }
    with stages.stage("write", len(cases)) as bar:
        _write(out, options, codec, result, look, metrics)
        bar.update(len(cases))
    metrics["seconds"] = {name: round(seconds, 2) for name, seconds in stages.seconds.items()}
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


def _source(options: EvaluateOptions) -> str:
    return " ".join(options.data) if options.data else f"{options.shards}, split {options.split or 'test'}"


def _read(options: EvaluateOptions, max_atoms: int, stages: Stages) -> tuple[list[Crystal], list[Crystal], Refused]:
    """Test crystals, training crystals, and what is refused of the test inputs."""
    index = Index.read(options.shards, options.cache_dir) if options.shards else None
    refused: Refused = []
    if index:
        crystals = read_split(index, options.split or "test", options.limit, stages)
    else:
        crystals, refused = read_many(options.data, max_atoms, options.limit, options.workers, stages)
    if options.training:
        return crystals, read_many(options.training, max_atoms, None, options.workers, stages)[0], refused
    return crystals, read_split(index, "train", None, stages) if index else [], refused


def _digest(crystals: Iterable[Crystal]) -> str:
    """SHA-256 of the test crystals as they were read, in order."""
    found = hashlib.sha256()
    for crystal in crystals:
        found.update(crystal.to_json().encode(errors="replace"))
    return found.hexdigest()


def _metrics(result: Evaluation, refused: Refused) -> dict[str, Any]:
    systems = result.summary()
    not_held = [case.refusal for case in result.cases if case.refusal]
    failed = [
        decoded.reason
        for case, decoded in zip(result.cases, result.reconstructed, strict=True)
        if decoded.crystal is None and not case.refusal
    ]
    others = ("nearest_training", "codec_ceiling", "perfect_copy")
    return {
        **systems["model"],
        **{f"match_rate_{name}": systems[name]["match_rate"] if name in systems else None for name in others},
        **{name: systems.get(name) for name in others},
        "breakdown": result.breakdown(),
        "n_not_held": len(not_held),
        "reasons": {
            "not_held": _counted(not_held),
            "failed_decode": _counted(failed),
            "refused": _counted(reason for _, reason in refused),
        },
        "refused": [{"file": file, "reason": reason} for file, reason in refused[:LISTED_REFUSALS]],
    }


def _latent_errors(result: Evaluation) -> dict[str, float | int] | None:
    """Of crystals that were corrected: by `Decoded.latent_error` alone, and how it tells misses; None where none was."""
    rows = zip(result.reconstructed, result.systems["model"], strict=True)
    found = [(item.latent_error, not (pair.match and pair.valid)) for item, pair in rows if item.latent_error is not None]
    if not found:
        return None
    return {
        "median": float(np.median([error for error, _ in found])),
        "far": FAR,
        "n_far": sum(error > FAR for error, _ in found),
        "n_far_missed": sum(error > FAR and missed for error, missed in found),
        "n_missed": sum(missed for _, missed in found),
    }


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    return dict(Counter(map(kind_of, reasons)).most_common())


def _trained_on(result: Evaluation, known: NDArray[np.uint64] | None, about: dict[str, Any]) -> dict[str, Any]:
    """Test crystals whose digest is one of the model's training crystals; None where its bundle doesn't tell.

    training_digests_of: training samples that the bundle lists, and how many there were. not_trained_on: the metrics of
    the other crystals, where there are of both.
    """
    seen_N = seen([case.digests for case in result.cases], known, about)
    if seen_N is None:
        return {"n_trained_on": None, "training_digests_of": None, "not_trained_on": None}
    new = np.flatnonzero(~seen_N).tolist()
    return {
        "n_trained_on": len(result.cases) - len(new),
        "training_digests_of": [about["samples"], about["of"]],
        "not_trained_on": result.summary(new) if 0 < len(new) < len(result.cases) else None,
    }


def _way(codec: Codec, result: Evaluation, options: EvaluateOptions) -> list[Decoded]:
    """Crystals on the way between the first two test crystals that were reconstructed; none where there are no two."""
    pairs = zip(result.cases, result.reconstructed, strict=True)
    ends = list(islice((case.crystal for case, decoded in pairs if decoded.crystal is not None), 2))
    if not options.steps or len(ends) < 2:
        return []
    start, stop = encode(codec, ends)
    latents = interpolate_latents(start, stop, options.steps)
    ids = [f"step-{place:02d}" for place in range(options.steps)]
    return list(decode(codec, latents, ids, corrections=options.corrections))


def _sampled(samples: Sequence[Decoded]) -> dict[str, int]:
    found = [decoded.crystal for decoded in samples if decoded.crystal is not None]
    return {
        "n_samples": len(samples),
        "samples_decoded": len(found),
        "samples_structurally_valid": sum(map(structure_valid, found)),
        "samples_distinct_compositions": len({crystal.formula for crystal in found}),
    }


def _write(
    out: Path,
    options: EvaluateOptions,
    codec: Codec,
    result: Evaluation,
    look: dict[str, list[Decoded]],
    metrics: dict[str, Any],
) -> None:
    shutil.rmtree(out / "cifs", ignore_errors=True)
    for group, decoded in {"reconstructed": result.reconstructed, **look}.items():
        write_cifs(out / "cifs" / group, decoded)
    with atomic_path(out / "crystals.csv") as path, path.open("w", newline="", errors="replace") as stream:
        csv.writer(stream).writerows(rows(result))
    title = f"{options.model} on {_source(options)}"
    write_evaluation_report(out / "report.html", title, codec, result, look, metrics)
