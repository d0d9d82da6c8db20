"""The model registry: register, and registry list, promote and rollback."""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.config import GateConfig, RunConfig, load_config
from dist_train.crystal.cif import write_cif
from dist_train.errors import ConfigError, ModelError
from dist_train.files import sha256, write_text
from dist_train.model_card import model_card
from dist_train.models.export import SUMS_NAME, read_bundle
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader

if TYPE_CHECKING:
    from dist_train.backends.mlflow_registry import Registry, Upload


def register(run_dir: Path, alias: str | None = None, reason: str | None = None) -> str:
    """Make a finished run's bundle a version of its model, once, with the alias candidate; returns a summary.

    A new version becomes champion where the gate of the run's config holds. alias: moved to the version by hand; for
    champion with a reason.
    """
    from dist_train.backends.mlflow_registry import CANDIDATE, CHAMPION, PREVIOUS, Registry

    kept, bundle = run_dir / "run.yaml", run_dir / "bundle"
    if not (kept.is_file() and bundle.is_dir()):
        raise ModelError(f"{run_dir} holds no finished run (run.yaml and bundle/ are needed); finish its training first")
    config = load_config(kept)
    run_id = run_dir / "mlflow_run_id"
    if not (config.tracking.uri and run_id.is_file()):
        raise ConfigError(f"the run {run_dir} was not tracked by MLflow: set tracking.uri and train")
    if alias is not None and (not re.fullmatch(r"[A-Za-z][\w-]*", alias) or re.fullmatch(r"latest|v\d+", alias)):
        raise ConfigError(f"alias {alias!r} can't be used: letters, digits, '-' and '_', and neither 'latest' nor 'v1'")
    if alias in (CANDIDATE, PREVIOUS):
        raise ConfigError(f"alias {alias!r} can't be given: registering a run and a change of champion move it")
    if (alias == CHAMPION) != (reason is not None):
        raise ConfigError("--alias champion and --reason go together: say why the champion moves by hand")
    with tempfile.TemporaryDirectory() as folder:
        upload = _upload(config, run_dir, Path(folder))
        registry = Registry(config.tracking.uri, config.tracking.model_name)
        told = [_add(registry, config, upload, run_id.read_text())]
    name = registry.name
    number = _registered(registry, upload)
    assert number is not None
    if alias == CHAMPION:
        told.append(promote(registry.uri, name, str(number), str(reason)))
    elif alias:
        registry.point(alias, number)
        told.append(f"alias {alias}: models:/{name}@{alias}")
    return "\n".join(told)


def _upload(config: RunConfig, run_dir: Path, folder: Path) -> Upload:
    """What a version of a run is made of; run_dir may have been moved since; folder: for the card."""
    from dist_train.backends.mlflow_registry import MAX_TAG, SUMS_TAG, Upload

    bundle, figures = run_dir / "bundle", run_dir / "figures"
    about = (described := read_bundle(bundle)[1])["about"]
    card = model_card(config.tracking.model_name, described)
    write_text(folder / "model_card.md", card)
    tags = {
        SUMS_TAG: sha256(bundle / SUMS_NAME),
        "data_digest": about["data_digest"],
        "evaluation_digest": about.get("evaluation_digest", ""),
        "git_commit": about["git_commit"],
        "code_version": described["code_version"],
        "metrics": json.dumps(about.get("metrics", {})),
        "environment": json.dumps(about.get("environment", {})),
    }
    example = ShardReader(Index.read(config.data.shards, config.data.cache_dir, config.data.cache_MB), "val").crystal(0)
    pictures = {"figures": figures} if figures.is_dir() else {}
    return Upload(
        bundle, {"card": folder / "model_card.md", **pictures}, card,
        {name: value for name, value in tags.items() if value and len(value) <= MAX_TAG}, write_cif(example),
    )  # fmt: skip


def _registered(registry: Registry, upload: Upload) -> int | None:
    """The number of the version that holds this very bundle, or None."""
    from dist_train.backends.mlflow_registry import SUMS_TAG

    same = [v.number for v in registry.versions() if v.tags.get(SUMS_TAG) == upload.tags[SUMS_TAG]]
    return same[0] if same else None


def _add(registry: Registry, config: RunConfig, upload: Upload, run_id: str) -> str:
    """A new version, unless this very bundle is one already, and the gate's verdict on it."""
    if (number := _registered(registry, upload)) is not None:
        return f"{registry.name} version {number} is this model already"
    number = registry.add(run_id, upload)
    champion = registry.champion()
    gate = config.tracking.gate
    told = f"registered {registry.name} version {number}, alias candidate"
    if gate.metric is None:
        return told
    holds, why = verdict(gate, upload.tags, champion.tags if champion else None)
    if holds:
        registry.promote(registry.version(str(number)), f"{_now()}, by the gate: {why}")
    return f"{told}; {'it is champion now' if holds else 'the champion stays'}: {why}"


def verdict(gate: GateConfig, new: dict[str, str], champion: dict[str, str] | None) -> tuple[bool, str]:
    """Whether a model passes the gate, by the tags of its version and of the champion's, and why."""
    assert gate.metric is not None
    value = json.loads(new.get("metrics", "{}")).get(gate.metric)
    if value is None or not math.isfinite(value):
        return False, f"its last validation has no finite {gate.metric}"
    if champion is None:
        return True, f"{gate.metric} {value:.6g}, and there was no champion"
    if not new.get("evaluation_digest") or new["evaluation_digest"] != champion.get("evaluation_digest"):
        return False, "it was validated on other data than the champion, so their metrics can't be compared"
    other = json.loads(champion.get("metrics", "{}")).get(gate.metric)
    if other is None or not math.isfinite(other):
        return False, f"the champion's last validation has no finite {gate.metric}"
    holds = (value - other if gate.better == "higher" else other - value) > gate.margin
    return holds, (
        f"{gate.metric} {value:.6g} is {'' if holds else 'not '}{gate.better} than the champion's {other:.6g} "
        f"by more than {gate.margin:g}"
    )


def list_versions(uri: str, name: str) -> str:
    """A table of all versions, the newest first, and why each that was champion became it."""
    from dist_train.backends.mlflow_registry import Registry

    registry = Registry(uri, name)
    versions = registry.versions() or [registry.version("latest")]
    lines = [f"{'version':>7}  {'aliases':<20}  {'created (UTC)':<16}  {'commit':<8}  {'data':<8}  last validation"]
    for version in versions:
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(version.created_ms / 1000))
        metrics = json.loads(version.tags.get("metrics", "{}"))
        shown = ", ".join(f"{key.removeprefix('val/')} {value:.4g}" for key, value in sorted(metrics.items()))
        aliases = ", ".join(version.aliases) or "-"
        commit, data = (version.tags.get(key, "-")[:8] for key in ("git_commit", "data_digest"))
        lines.append(f"{version.number:>7}  {aliases:<20}  {made:<16}  {commit:<8}  {data:<8}  {shown}".rstrip())
    # Reasons begin with the time.
    reasons = sorted(((reason, v.number) for v in versions for reason in v.reasons), reverse=True)
    return "\n".join((*lines, *(f"version {number} became champion {reason}" for reason, number in reasons)))


def promote(uri: str, name: str, which: str, reason: str) -> str:
    """Make a version (number or alias) the champion, by hand; the old one stays as previous."""
    from dist_train.backends.mlflow_registry import CHAMPION, Registry

    if not reason.strip():
        raise ConfigError("--reason is empty: say why the champion moves by hand")
    registry = Registry(uri, name)
    version = registry.version(which)
    if CHAMPION in version.aliases:
        return f"{name} version {version.number} is champion already"
    before = registry.promote(version, f"{_now()}, by hand: {' '.join(reason.split())}")
    return f"{name} version {version.number} is champion" + (f", version {before.number} is previous" if before else "")


def rollback(uri: str, name: str, reason: str) -> str:
    """Make the previous champion the champion again; the one that goes is the previous one then."""
    from dist_train.backends.mlflow_registry import PREVIOUS

    return promote(uri, name, PREVIOUS, reason)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
