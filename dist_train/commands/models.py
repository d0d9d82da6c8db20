"""The verbs that use models: evaluate and generate."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dist_train.config import GridSpec
from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.crystal.metrics import structure_valid
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError, DataError
from dist_train.evaluate import Evaluation
from dist_train.evaluate import evaluate as evaluate_model
from dist_train.evaluate_report import write_evaluation_report
from dist_train.files import write_text
from dist_train.generate import decode, encode, interpolate_latents, reconstruct, sample_latents
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.progress import Progress
from dist_train.shards.discover import discover
from dist_train.shards.index import Index
from dist_train.shards.plan import split_of
from dist_train.shards.reader import ShardReader
from dist_train.shards.sources import units


def load_codec(model: str, tracking_uri: str | None) -> tuple[Codec, dict[str, Any]]:
    """The model of a bundle folder or of a registry entry 'models:/NAME@ALIAS', ready for use, and its config."""
    if not model.startswith("models:/"):
        network, config = read_bundle(Path(model))
        return Codec(network), config
    if not tracking_uri:
        raise ConfigError(f"{model} is in a registry: give --tracking-uri or set MLFLOW_TRACKING_URI")
    from dist_train.backends.mlflow_tracker import pull

    with tempfile.TemporaryDirectory() as folder:
        network, config = read_bundle(pull(tracking_uri, model, Path(folder)))
        return Codec(network), config


def read_crystals(inputs: Iterable[str], grid: GridSpec) -> list[Crystal]:
    """The crystals of folders, files, archives and tables. Raises CrystalError for the first that can't be read."""
    found, crystals = discover(inputs), []
    for _, file, reason in found.refused:
        raise CrystalError(f"{file}: {reason}")
    for unit in (unit for chunk in found.chunks for unit in units(chunk, grid.max_atoms)):
        for _, crystal in unit.items():
            if isinstance(crystal, CrystalError):
                raise CrystalError(f"{unit.file}: {crystal}")
            crystals.append(crystal)
    return crystals


def evaluate(
    model: str, tracking_uri: str | None, shards: Path, split: str, out: Path, workers: int, n_samples: int, steps: int
) -> dict[str, Any]:
    """Evaluate a model on a split of shards; writes metrics.json, report.html and CIF files, returns the metrics."""
    if out.exists() and not (out / "metrics.json").exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no evaluation; set --out to another folder")
    (codec, bundle), index = load_codec(model, tracking_uri), Index.read(shards)
    test, training = ShardReader(index, split), ShardReader(index, "train")
    crystals = [test.crystal(place) for place in range(len(test))]
    candidates = [training.crystal(place) for place in range(len(training))]
    spec = GridSpec.model_validate(index.config["grid"])
    with Progress("evaluate", 5 * len(crystals), "comparisons") as progress:
        result = evaluate_model(codec, crystals, candidates, spec, workers, lambda stage, n: progress.update(n, stage=stage))
    look = _look_around(codec, result, n_samples, steps)
    metrics = {**_metrics(result, look), "n_maybe_trained_on": _maybe_trained_on(crystals, bundle)}
    _write_evaluation(out, model, split, result, look, metrics)
    return metrics


def _maybe_trained_on(crystals: Sequence[Crystal], bundle: dict[str, Any]) -> int:
    """Crystals whose formula the model's own data set gives to its training split."""
    data = bundle["about"].get("run", {}).get("data", {})
    if not data.get("splits") or data.get("split_column") or data.get("split_ids"):
        return len(crystals)  # the formula doesn't tell
    return sum(split_of(crystal.formula, data["splits"]) == "train" for crystal in crystals)


def _look_around(codec: Codec, result: Evaluation, n_samples: int, steps: int) -> dict[str, list[Any]]:
    """Samples, and the way between the first two reconstructed test crystals, as lists of `Decoded`."""
    samples = list(decode(codec, sample_latents(codec, n_samples, seed=0), [f"sample-{i:03d}" for i in range(n_samples)]))
    held = [c for c, d in zip(result.crystals, result.reconstructed, strict=True) if d.crystal is not None][:2]
    frames = []
    if steps and len(held) == 2:
        start, stop = encode(codec, held)
        frames = list(decode(codec, interpolate_latents(start, stop, steps), [f"step-{i:02d}" for i in range(steps)]))
    return {"samples": samples, "interpolation": frames}


def _metrics(result: Evaluation, look: dict[str, list[Any]]) -> dict[str, Any]:
    systems = result.summary()
    samples = [decoded.crystal for decoded in look["samples"] if decoded.crystal is not None]
    return {
        **systems["model"],
        "match_rate_nearest_training": systems["nearest_training"]["match_rate"],
        "match_rate_ceiling": systems["ceiling"]["match_rate"],
        "nearest_training": systems["nearest_training"],
        "ceiling": systems["ceiling"],
        "by_number_of_atoms": [{"atoms": size, "crystals": n, **rates} for size, n, rates in result.by_size()],
        "n_samples": len(look["samples"]),
        "samples_decoded": len(samples),
        "samples_structurally_valid": sum(map(structure_valid, samples)),
        "samples_distinct_compositions": len({crystal.formula for crystal in samples}),
    }


def _write_evaluation(
    out: Path, model: str, split: str, result: Evaluation, look: dict[str, list[Any]], metrics: dict[str, Any]
) -> None:
    shutil.rmtree(out / "cifs", ignore_errors=True)
    groups = {"reconstructed": result.reconstructed, **look}
    for group, decoded in groups.items():
        _write_cifs(out / "cifs" / group, decoded)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_evaluation_report(out / "report.html", f"{model} on the {split} split", result, look, metrics)


def _write_cifs(folder: Path, decoded: Iterable[Decoded]) -> None:
    """A CIF file for each crystal, named by its id; ids that give the same name are numbered, so that none is lost."""
    names: Counter[str] = Counter()
    for item in decoded:
        if item.crystal is not None:
            name = re.sub(r"[^\w.-]", "_", item.crystal.id)
            names[name] += 1
            count = names[name]
            write_text(folder / (f"{name}-{count}.cif" if count > 1 else f"{name}.cif"), write_cif(item.crystal))


def generate(
    task: str, inputs: Sequence[str], model: str, tracking_uri: str | None, out: Path, n: int, steps: int, seed: int
) -> str:
    """Reconstruct, sample or interpolate; writes CIF files, returns a summary."""
    if (task == "sample") == bool(inputs):
        raise DataError(f"generate {task} takes {'no' if task == 'sample' else 'some'} crystals, {len(inputs)} were given")
    codec, _ = load_codec(model, tracking_uri)
    crystals = read_crystals(inputs, codec.model.grid) if inputs else []
    ids = [crystal.id for crystal in crystals]
    if task == "sample":
        ids = [f"sample-{seed}-{i:05d}" for i in range(n)]
        decoded = list(decode(codec, sample_latents(codec, n, seed), ids))
    elif task == "interpolate":
        if len(crystals) != 2:
            raise DataError(f"generate interpolate takes two crystals, {len(crystals)} were given")
        start, stop = encode(codec, [representable(crystal, codec.model.grid) for crystal in crystals])
        ids = [f"step-{i:02d}" for i in range(steps)]
        decoded = list(decode(codec, interpolate_latents(start, stop, steps), ids))
    else:
        decoded = reconstruct(codec, crystals)
    _write_cifs(out, decoded)
    failed = [f"\n  {id}: {item.reason}" for id, item in zip(ids, decoded, strict=True) if item.crystal is None]
    return f"{len(ids) - len(failed)} of {len(ids)} crystals written to {out}" + "".join(failed)
