"""The verbs embed and nearest: a table of the latents of many crystals, and which crystals in it are nearest to others."""

from __future__ import annotations

import csv
import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from dist_train.commands.models import bundle_folder, read_crystals
from dist_train.crystal.digest import digests_near
from dist_train.crystal.frames import representable
from dist_train.embed import Embedder, Part, input_digest, plan_parts
from dist_train.errors import ConfigError, DataError, ModelError
from dist_train.files import sha256, write_text
from dist_train.latents import (
    ABOUT_NAME,
    DECIDING,
    About,
    Neighbour,
    counts_of,
    nearest,
    read_about,
    schema_of,
    summed,
    write_about,
)
from dist_train.models.export import SUMS_NAME, read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.progress import Progress
from dist_train.shards.discover import discover

LISTED_REASONS = 12
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class EmbedOptions:
    """What the command line asks for. workers None: on Ray all CPUs, without Ray this process; 0: this process."""

    model: str
    tracking_uri: str | None
    input: Sequence[str]
    output: Path
    workers: int | None = None
    address: str | None = None
    decode: bool = True
    batch: int = 32
    part_rows: int = 256


def embed(options: EmbedOptions) -> str:
    """Write the latents of all inputs to `options.output`, of which finished parts are kept; returns a summary.

    Raises DataError where the folder holds another job's or the disk is full, and the error of the first fault of model,
    inputs or workers.
    """
    try:
        return _embed(options, options.output.absolute())
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"the disk of {options.output} is full; free space and run the same command again: it goes on from there"
        ) from None


def _embed(options: EmbedOptions, folder: Path) -> str:
    about, parts = _planned(options)
    about = _opened(folder, about)
    counts = {part.number: counts_of(folder, part.number, about.identity) for part in parts}
    missing = [part for part in parts if counts[part.number] is None]
    began, rows = time.monotonic(), 0
    prepare = partial(_prepare, folder, about, options.tracking_uri)
    done = sum(map(len, parts)) - sum(map(len, missing))
    with Progress("embed", about.units, "crystals", initial=done) as bar:
        for part, written in _mapped(prepare, missing, options):
            rows += written
            bar.update(len(part))
    seconds = time.monotonic() - began
    for leaving in folder.glob(".*.tmp"):
        leaving.unlink(missing_ok=True)  # of processes that were ended in the middle of a file
    found = [counts_of(folder, part.number, about.identity) for part in parts]
    if None in found:
        raise DataError(f"parts of {folder} are gone since they were written; is another job at work in it?")
    about = replace(about, counts=summed([one for one in found if one is not None]))
    write_about(folder, about)
    return _summary(folder, about, rows, seconds)


def _planned(options: EmbedOptions) -> tuple[About, list[Part]]:
    """The job that is asked for. An alias of a registry is resolved here, once: it may move while the job runs."""
    resolved = _resolved(options.model, options.tracking_uri)
    with bundle_folder(resolved, options.tracking_uri) as bundle:
        latent, bundle_sha256 = read_bundle(bundle)[0].model.latent_size, sha256(bundle / SUMS_NAME)
    found = discover(options.input)
    parts = plan_parts(found, options.part_rows)
    columns = {field.name: str(field.type) for field in schema_of(options.decode)}
    return About(
        options.model, resolved, bundle_sha256, latent, options.decode, options.batch, options.part_rows,
        tuple(options.input), input_digest(found), sum(map(len, parts)), len(parts), columns,
    ), parts  # fmt: skip


def _resolved(model: str, tracking_uri: str | None) -> str:
    """The bundle's folder, or the version of a registry that the name stands for now."""
    if not model.startswith("models:/") or not tracking_uri:
        return model if model.startswith("models:/") else str(Path(model).absolute())
    from dist_train.backends.mlflow_registry import pinned

    return pinned(tracking_uri, model)


def _opened(folder: Path, about: About) -> About:
    """What the folder is to hold: as an earlier start of the same job has written it. DataError for another's folder."""
    before = read_about(folder)
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(f"output folder {folder} is not empty and holds no {ABOUT_NAME}; set --output to a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_about(folder, about)
        return about
    if differing := [name for name in DECIDING if getattr(before, name) != getattr(about, name)]:
        told = "; ".join(f"{name} {_short(before, name)} there, {_short(about, name)} here" for name in differing)
        raise DataError(
            f"output folder {folder} holds the latents of another job, of model {before.model} ({told}); set --output to a "
            "new folder or remove that one"
        )
    return before


def _short(about: About, name: str) -> str:
    return str(getattr(about, name))[:12]


def _prepare(folder: Path, about: About, tracking_uri: str | None) -> Embedder:
    """A worker's embedder, of the model that the job began with. Raises ModelError where that isn't there any more."""
    torch.set_num_threads(1)  # workers share out the processors, and the bits are to be the same on any number of them
    with bundle_folder(about.resolved, tracking_uri) as bundle:
        network, _ = read_bundle(bundle)
        if (found := sha256(bundle / SUMS_NAME)) != about.bundle_sha256:
            raise ModelError(
                f"{about.resolved} is another model ({found[:12]}) than the one that the job began with "
                f"({about.bundle_sha256[:12]}); start the job anew in another folder"
            )
    return Embedder(Codec(network), folder, about)


def _mapped(prepare: Callable[[], Embedder], parts: list[Part], options: EmbedOptions) -> Iterator[tuple[Part, int]]:
    """(part, rows written) as they are done, on Ray or in this process."""
    if not parts:
        return
    if options.workers == 0 or (options.workers is None and not options.address and find_spec("ray") is None):
        threads = torch.get_num_threads()
        try:
            embedder = prepare()
            for part in parts:
                yield part, embedder(part)
        finally:
            torch.set_num_threads(threads)
        return
    if find_spec("ray") is None:
        raise ConfigError("--workers and --address need Ray, which isn't installed; --workers 0 works in this process")
    from dist_train.backends.ray_embed import on_ray

    yield from on_ray(prepare, parts, options.workers, options.address)


def _summary(folder: Path, about: About, rows: int, seconds: float) -> str:
    counts = about.counts
    assert counts is not None
    n, reasons = counts["rows"], counts["reasons"]
    lines = [
        f"{n} rows in {about.parts} parts: {counts['embedded']} with a latent of {about.latent}, "
        f"{n - counts['embedded']} without"
    ]
    if about.decoded and n:
        rms = f", RMS {counts['rms_sum'] / counts['matched']:.4f}" if counts["matched"] else ""
        lines.append(
            f"{counts['decoded']} decoded, {counts['valid']} of these valid; match rate {counts['matched'] / n:.1%} of all "
            f"rows{rms}"
        )
    lines += [f"  {count} x {reason}" for reason, count in list(reasons.items())[:LISTED_REASONS]]
    if len(reasons) > LISTED_REASONS:
        lines.append(f"  and {len(reasons) - LISTED_REASONS} more kinds of reasons, in {ABOUT_NAME}")
    speed = f"{rows} rows in {seconds:.1f} s, {rows / seconds:.1f} crystals/s" if rows else "nothing was missing"
    return "\n".join([*lines, f"this run: {speed}; output: {folder}"])


# Nearest


def nearest_crystals(
    inputs: Sequence[str], folder: Path, model: str, tracking_uri: str | None, k: int, as_json: bool, out: Path | None
) -> str:
    """The k crystals of a folder of latents that are nearest to each crystal of the inputs, as a table or JSON.

    Distances are Euclidean between latents, 1 being that of two training crystals on average (root mean square).
    Raises DataError where the folder is unfinished, ModelError where it is of another model.
    """
    about = read_about(folder)
    if about is None or about.counts is None:
        what = "holds an unfinished job" if about else f"has no {ABOUT_NAME}"
        raise DataError(f"--in {folder} {what}; dist-train embed makes it")
    with bundle_folder(model, tracking_uri) as bundle:
        network, _ = read_bundle(bundle)
        if (found := sha256(bundle / SUMS_NAME)) != about.bundle_sha256:
            raise ModelError(
                f"{folder} holds the latents of another model, {about.resolved} ({about.bundle_sha256[:12]}), than {model} "
                f"({found[:12]}): name that one, or embed the crystals with this one"
            )
    codec = Codec(network)
    crystals = [representable(crystal, network.grid) for crystal in read_crystals(inputs, network.grid)]
    latents = torch.cat([codec.encode([crystal]) for crystal in crystals]).cpu().numpy()
    unit = sqrt(2 * about.latent) * network.latent_scale
    results = []
    for crystal, rows in zip(crystals, nearest(folder, about, latents, k, unit), strict=True):
        same = digests_near(crystal)
        results.append(
            {
                "id": crystal.id,
                "formula": crystal.formula,
                "n_atoms": len(crystal),
                "nearest": [_told(row, same) for row in rows],
            }
        )
    document = {"model": model, "bundle_sha256": about.bundle_sha256, "latents": str(folder), "crystals": results}
    text = json.dumps(document, indent=1)
    if out:
        write_text(out / "nearest.json", f"{text}\n")
        write_text(out / "nearest.csv", _as_csv(results))
    written = f"\nwritten to {out}: nearest.json, nearest.csv" if out else ""
    return text if as_json else "\n\n".join(map(_as_table, results)) + written


def _told(row: Neighbour, digests: tuple[int, ...]) -> dict[str, Any]:
    return {"distance": row.distance, **row.info, "same_crystal": row.info["digest"] in digests}


def _as_table(result: dict[str, Any]) -> str:
    lines = [
        f"nearest to {result['id']} ({result['formula']}, {result['n_atoms']} atoms); a distance of 1 is that of two "
        "training crystals on average",
        f"{'distance':>8}  {'id':<20}  {'formula':<20}  {'atoms':>5}  {'crystal':<7}  source",
    ]
    for row in result["nearest"]:
        lines.append(
            f"{row['distance']:8.4f}  {row['id']:<20}  {row['formula']:<20}  {row['n_atoms']:>5}  "
            f"{'same' if row['same_crystal'] else 'other':<7}  {row['file']}, row {row['row']}"
        )
    return "\n".join(lines)


def _as_csv(results: list[dict[str, Any]]) -> str:
    text = StringIO()
    table = csv.writer(text, lineterminator="\n")
    head = ("query", "rank", *results[0]["nearest"][0]) if results and results[0]["nearest"] else ("query", "rank")
    table.writerow(head)
    for result in results:
        table.writerows((result["id"], rank, *row.values()) for rank, row in enumerate(result["nearest"], 1))
    return text.getvalue()
