"""The verb generate: crystals from a trained model, as CIF files, one extxyz file, a table, and densities where asked."""

from __future__ import annotations

import csv
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train import __version__
from dist_train.commands.models import bundle_folder, file_names, read_crystals, read_many
from dist_train.commands.steering import (
    PROPERTY_COLUMNS,
    PropertyRow,
    named_numbers,
    property_lines,
    property_rows,
    searched,
    wanted_atoms,
)
from dist_train.config import GridSpec
from dist_train.crystal.alter import make_edit
from dist_train.crystal.case import unknown_elements
from dist_train.crystal.decode import Decoded
from dist_train.crystal.density_files import channel_names, in_box, to_chgcar, to_cube
from dist_train.crystal.frames import representable
from dist_train.crystal.relax import make_calculator
from dist_train.crystal.structure import Crystal
from dist_train.densities import generated_densities
from dist_train.errors import ConfigError, CrystalError, DataError, ModelError
from dist_train.files import STAGE_NAME, check_writable, sha256, staged, write_text
from dist_train.generate import CORRECTIONS, altered_latents, decode, encode, interpolate_latents, samples
from dist_train.generate_report import MAX_SHOWN, Output, write_generation_report
from dist_train.generated import COLUMNS, RELAX_STEPS, Finish, Result, counts, finished, processes, result_of, write_files
from dist_train.models.export import SUMS_NAME, read_bundle, read_properties, training_digests
from dist_train.models.properties import PropertyHeads
from dist_train.models.reconstruct import BATCH, Codec
from dist_train.progress import Stages
from dist_train.report import Table
from dist_train.screens import Screens, parse_screens
from dist_train.shards.discover import read_inputs
from dist_train.steer import ROUNDS, move_along

log = logging.getLogger(__name__)
Task = Literal["reconstruct", "sample", "target", "interpolate", "alter"]
PACKAGES = ("numpy", "torch", "scipy", "spglib", "pymatgen", "ase")
OUTPUTS = (
    "cifs", "cifs_symmetrized", "density", "crystals.csv", "crystals.extxyz", "crystals.zip", "metrics.json",
    "properties.csv", "report.html",
)  # fmt: skip
"""What a generation may write, and removes of one before it."""
UNSAID = ("model", "tracking_uri", "out", "task", "seed", "workers")
"""Options that change no crystal, or stand elsewhere in metrics.json."""

PAGE_COLUMNS = (
    "id", "status", "formula", "atoms", "volume_A3", "density_g_cm3", "nearest_A", "space_group", "confidence",
    "latent_error", "energy_eV_per_atom", "reason",
)  # fmt: skip
"""Those of crystals.csv that are in the page, where they aren't empty."""
PAGE_DENSITIES = 4
LISTED, LEAST_SHOWN = 20, 32
"""Failed crystals that are told one by one; crystals below which there is no progress bar, unless they are relaxed."""


@dataclass(frozen=True)
class GenerateOptions:
    """What the command line asks for.

    inputs: files, folders, archives, tables, of all tasks but 'sample' and 'target'. n: crystals to make, or around each
    known one. best_of: see `generate.samples`. target: pairs such as 'band_gap=1.5', beyond all labels with `extrapolate`;
    composition, elements: such as 'BaTiO3' and 'Ba,Ti,O', of 'sample' and 'target'. along: pairs as target, in standard
    deviations of the labels. steps, path: crystals from one input to the next, both included, on a 'linear' or 'spherical'
    path. replace: pairs such as 'Ti=Zr'; scale: of the density; both `within` angstrom of the fractional coordinates `of`,
    or everywhere. perturb: distance in latent space, in standard deviations of the training crystals. screens: see
    `screens.SCREENS`; training: files, folders, archives, tables of crystals that aren't novel. corrections: see
    `generate.decode`; mere samples have none. symmetrize, relax, relax_steps: see `generated.Finish`. density: 'cube' or
    'chgcar'.
    """

    task: Task
    model: str
    tracking_uri: str | None
    out: Path
    inputs: Sequence[str] = ()
    n: int = 1
    best_of: int = 1
    steps: int = 9
    path: Literal["linear", "spherical"] = "linear"
    seed: int = 0
    replace: Sequence[str] = ()
    scale: float | None = None
    within: float | None = None
    of: Sequence[float] | None = None
    perturb: float | None = None
    target: Sequence[str] = ()
    extrapolate: bool = False
    composition: str | None = None
    elements: str | None = None
    along: Sequence[str] = ()
    corrections: int = CORRECTIONS
    screens: Sequence[str] = ()
    training: Sequence[str] = ()
    symmetrize: float | None = None
    relax: str | None = None
    relax_steps: int = RELAX_STEPS
    density: Literal["cube", "chgcar"] | None = None
    workers: int = 1


@dataclass(frozen=True)
class Generation:
    """All that was asked for, in order.

    rows: those of crystals.csv, of `generated.COLUMNS`; metrics: of metrics.json; lines: what to tell of properties.
    """

    options: GenerateOptions
    results: list[Result]
    rows: list[tuple[object, ...]]
    metrics: dict[str, Any]
    lines: list[str]

    @property
    def title(self) -> str:
        """What was done with which model, in a line."""
        given = [*self.options.inputs[:3], *["..."][: len(self.options.inputs) > 3], *self.options.target]
        return f"{' '.join([self.options.task, *given])} by {self.options.model}"


@dataclass(frozen=True)
class _Asked:
    """A crystal to make of a latent, or the reason that there is none; see `Result` for the known crystals.

    before_L: latent of the known crystal, where it was moved. decoded: what the latent decodes to, where that is known.
    """

    id: str
    latent_L: Tensor | str
    original: Crystal | None = None
    given: Crystal | None = None
    before_L: Tensor | None = None
    decoded: Decoded | None = None


class _Model(NamedTuple):
    """What tasks work with; aims: properties wanted, or how far to move along them."""

    codec: Codec
    heads: PropertyHeads | None
    aims: dict[str, float]


def generate(options: GenerateOptions) -> Generation:
    """Make crystals and write all of `OUTPUTS` that were asked for to `options.out`, whole or not at all.

    Raises the error of the first fault found, before anything is written. What can't be reconstructed or decoded, and what
    screens take out, is counted and told; only where nothing that was given can be used it is an error.
    """
    _check(options)
    if options.task == "sample" and not _steered(options):
        options = replace(options, corrections=0)  # such crystals have none, and metrics.json says so
    stages = Stages(0 if options.relax else LEAST_SHOWN)
    with bundle_folder(options.model, options.tracking_uri) as folder:
        network, config = read_bundle(folder)
        known, bundle_digest = training_digests(folder), sha256(folder / SUMS_NAME)
        heads = read_properties(folder)
    aims = named_numbers("--target", options.target) | named_numbers("--along", options.along)
    if aims and heads is None:
        raise ModelError(
            f"the model {options.model} has no properties, {next(iter(aims))!r} was asked for: fit it with dist-train "
            "fit-properties"
        )
    screens = _screens(options, known, network.grid.max_atoms, stages)
    calculator = make_calculator(options.relax) if options.relax else None
    finish = Finish(screens, options.symmetrize, calculator, options.relax_steps, options.workers)
    codec = Codec(network)
    model = _Model(codec, heads and heads.to(codec.device), aims)
    asked = list(_TASKS[options.task](options, model, stages))
    results = finished(_decoded(codec, asked, options, stages), finish, stages)
    metrics = {
        "task": options.task,
        "seed": options.seed,
        "model": {
            "name": options.model,
            "bundle_sha256": bundle_digest,
            "code_version": config["code_version"],
            "step": config["about"].get("step"),
        },
        "settings": {name: value for name, value in asdict(options).items() if name not in UNSAID},
        "versions": {"dist_train": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        **counts(results, finish),
    }
    told = _read_off(model, asked, results, stages)
    atoms = wanted_atoms(options.composition, options.elements)
    kept = [result.crystal for result in results if result.status == "written" and result.crystal is not None]
    lines = [f"{sum(map(part.hold, kept))} of {len(kept)} crystals are made of {part}" for part in atoms]
    if model.heads is not None and told:
        lines += property_lines(model.heads, told, options.task == "target", LISTED)
    with staged(options.out, OUTPUTS) as stage:
        file_stems = file_names(result.id for result in results)
        with stages.stage("write", len(results)) as bar:
            rows = write_files(stage, results, file_stems)
            bar.update(len(results))
        if options.density:
            (stage / "density").mkdir()
            places = [place for place, result in enumerate(results) if result.status == "written"]
            with stages.stage("density", len(places)) as bar:
                for place, files in bar.over(_densities(codec, asked, results, places, options.density)):
                    for form, text in files.items():
                        (stage / "density" / form.format(file_stems[place])).write_text(text)
        if told:
            with (stage / "properties.csv").open("w", newline="") as stream:
                csv.writer(stream, lineterminator="\n").writerows([PROPERTY_COLUMNS, *told])
        with stages.stage("page", len(results)) as bar:
            _write_page(stage / "report.html", Generation(options, results, rows, metrics, lines), codec, asked, told)
            bar.update(len(results))
        metrics["seconds"] = {name: round(seconds, 2) for name, seconds in stages.seconds.items()}
        write_text(stage / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return Generation(options, results, rows, metrics, lines)


def _screens(options: GenerateOptions, known: NDArray[np.uint64] | None, max_atoms: int, stages: Stages) -> Screens:
    names, distance = parse_screens(options.screens)
    if "novel" not in names:
        if options.training:
            raise ConfigError("--training is for the screen 'novel' alone: give --screen novel, too, or leave it out")
        return Screens(names, distance)
    if known is None and not options.training:
        raise ModelError(
            f"--screen novel: {options.model} doesn't list its training crystals; give them by --training or leave it out"
        )
    training: Sequence[Crystal] = ()
    if options.training:
        training, refused = read_many(options.training, max_atoms, None, options.workers, stages)
        for file, reason in refused:
            log.warning("--training: %s: %s", file, reason)
        if not training:
            raise DataError(f"--training {' '.join(options.training)} holds no crystal that can be read")
    return Screens(names, distance, frozenset(() if known is None else known.tolist()), training)


def _write_page(
    path: Path, generation: Generation, codec: Codec, asked: Sequence[_Asked], told: Sequence[PropertyRow]
) -> None:
    """All that was made, as `generated` left it, with the decoded densities of the first few."""
    options, metrics, results = generation.options, generation.metrics, generation.results
    outputs = [
        Output(
            result.id,
            replace(result.decoded, crystal=result.crystal, reason=result.reason),
            _as_decoded(result.original, codec.model.grid) if result.original and place < MAX_SHOWN else result.original,
            f"screened out: {result.reason}" if result.screen else "",
        )
        for place, result in enumerate(results)
    ]
    dense = [
        (result, item.latent_L)
        for result, item in zip(results, asked, strict=True)
        if result.status == "written" and isinstance(item.latent_L, Tensor)
    ][:PAGE_DENSITIES]
    densities = (
        generated_densities(
            codec,
            [result.title for result, _ in dense],
            torch.stack([latent_L for _, latent_L in dense]),
            [result.decoded for result, _ in dense],
        )
        if dense
        else []
    )
    shown = [place for place, name in enumerate(COLUMNS) if name in PAGE_COLUMNS]
    full = [place for place in shown if any(row[place] not in (None, "") for row in generation.rows)]
    write_generation_report(
        path,
        title=generation.title,
        summary="; ".join(line.removesuffix(":") for line in _counted(generation) if not line.startswith(" ")) + ".",
        outputs=outputs,
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        columns=[COLUMNS[place].replace("_", " ") for place in full],
        rows=[[row[place] for place in full] for row in generation.rows],
        is_path=options.task == "interpolate",
        heading="Reconstructions" if options.task == "reconstruct" else "Before and after",
        labels=("true", "reconstructed") if options.task == "reconstruct" else ("before", "after"),
        densities=densities,
        tables=[Table("Properties", PROPERTY_COLUMNS, tuple(map(tuple, told)), "Read off latents by the model's heads.")],
    )


def _as_decoded(crystal: Crystal, spec: GridSpec) -> Crystal:
    """The crystal in the cell and at the origin at which it is decoded, to be compared by eye."""
    with suppress(CrystalError):
        return representable(crystal, spec)
    return crystal


def _read_off(model: _Model, asked: Sequence[_Asked], results: Sequence[Result], stages: Stages) -> list[PropertyRow]:
    """The properties that were aimed at, of latents and of what they decoded to; none where there are no aims."""
    if model.heads is None or not model.aims:
        return []
    with stages.stage("properties", len(asked)) as bar:
        rows = [
            (item.id, item.latent_L, item.before_L, result.decoded.crystal)
            for item, result in zip(asked, results, strict=True)
            if isinstance(item.latent_L, Tensor)
        ]
        found = property_rows(model.codec, model.heads, model.aims, rows)
        bar.update(len(asked))
    return found


def _check(options: GenerateOptions) -> None:
    """Raise ConfigError or DataError for options that make no sense together, or an output folder of something else."""
    new = options.task in ("sample", "target")
    if new == bool(options.inputs):
        many = "no" if new else "some"
        raise DataError(f"generate {options.task} takes {many} crystals, {len(options.inputs)} were given")
    if options.task == "alter":
        edits = (options.scale, options.within, options.perturb)
        if not options.replace and not options.along and edits == (None, None, None):
            raise ConfigError("generate alter has nothing to do: give --replace, --scale, --along or --perturb")
        if options.n > 1 and options.perturb is None:
            raise ConfigError(f"-n {options.n} crystals would be one and the same: give --perturb, too, or leave -n out")
    if options.best_of > 1 and _steered(options):
        raise ConfigError(f"--best-of {options.best_of} is of crystals that aren't steered; leave it out")
    if options.relax is None and options.relax_steps != RELAX_STEPS:
        raise ConfigError(f"--relax-steps {options.relax_steps} is of --relax, which isn't given: add it or leave both out")
    check_writable(options.out)
    if options.out.is_dir() and {path.name for path in options.out.iterdir()} - {STAGE_NAME}:
        try:
            ours = "n_screened_out" in json.loads((options.out / "metrics.json").read_text())
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ConfigError(f"{options.out} is not empty and holds no generated crystals; set --out to another folder")


def _steered(options: GenerateOptions) -> bool:
    return bool(options.composition or options.elements)


# Tasks: the latents to decode


def _sample(options: GenerateOptions, model: _Model, stages: Stages) -> Iterator[_Asked]:
    if _steered(options):
        yield from _search(options, model, stages)
        return
    ids = [f"sample-{options.seed}-{place:05d}" for place in range(options.n)]
    with stages.stage("sample", options.n) as bar:
        workers = processes(options.workers, options.n)
        found = samples(model.codec, ids, options.seed, workers, bar.update, options.best_of)
    for id, sample in zip(ids, found, strict=True):
        yield _Asked(id, sample.latent_L, decoded=sample.decoded)


def _search(options: GenerateOptions, model: _Model, stages: Stages) -> Iterator[_Asked]:
    """As many latents as were asked for, with a reason in place of those that weren't found."""
    atoms = wanted_atoms(options.composition, options.elements)
    with stages.stage("search", ROUNDS, "rounds") as bar:
        found = searched(
            model.codec, model.heads, model.aims, atoms, options.n, options.seed, options.extrapolate, bar.update
        )
    for place in range(options.n):
        latent = found[place] if place < len(found) else "no more latents were found that decode to a crystal"
        yield _Asked(f"{options.task}-{options.seed}-{place:05d}", latent)


def _reconstruct(options: GenerateOptions, model: _Model, stages: Stages) -> Iterator[_Asked]:
    """All inputs; one that can't be read, or that the model can't take, is told with its row."""
    codec = model.codec
    items: list[tuple[str, Crystal | None, Crystal | str]] = []
    for item in read_inputs(options.inputs, codec.model.grid.max_atoms):
        if isinstance(item, CrystalError):
            file, _, reason = str(item).partition(": ")
            items.append((file, None, reason))
            continue
        try:
            items.append((item.id, item, _held(item, codec)))
        except CrystalError as error:
            items.append((item.id, item, str(error).removeprefix(f"{item.id}: ")))
    held = [crystal for *_, crystal in items if isinstance(crystal, Crystal)]
    if not held:
        told = f"; the first of {len(items)}" if len(items) > 1 else ""
        raise DataError(f"no crystal given can be reconstructed{told}: {items[0][0]}: {items[0][2]}")
    latents = iter(_encoded(codec, held, stages, options.workers))
    for id, crystal, found in items:
        yield _Asked(id, found if isinstance(found, str) else next(latents), crystal, crystal)


def _interpolate(options: GenerateOptions, model: _Model, stages: Stages) -> Iterator[_Asked]:
    codec = model.codec
    crystals = read_crystals(options.inputs, codec.model.grid)
    if len(crystals) < 2:
        raise DataError(f"generate interpolate takes two crystals or more, {len(crystals)} is given")
    ends = _encoded(codec, [_held(crystal, codec) for crystal in crystals], stages, options.workers)
    around = codec.model.prior_mean.cpu().float() if options.path == "spherical" else None
    legs = [interpolate_latents(start, stop, options.steps, around) for start, stop in zip(ends, ends[1:])]
    latent_NL = torch.cat([legs[0][:1], *(leg[1:] for leg in legs)])
    for place, latent in enumerate(latent_NL):
        given, between = divmod(place, options.steps - 1)
        yield _Asked(f"step-{place:02d}" + (f"-{crystals[given].id}" if not between else ""), latent)


def _alter(options: GenerateOptions, model: _Model, stages: Stages) -> Iterator[_Asked]:
    codec = model.codec
    edit = make_edit(options.replace, options.scale, options.within, options.of, codec.model.elements)
    crystals = read_crystals(options.inputs, codec.model.grid)
    edited = [edit(crystal) for crystal in crystals]
    latents = _encoded(codec, [_held(crystal, codec) for crystal in edited], stages, options.workers)
    for original, given, before in zip(crystals, edited, latents, strict=True):
        latent = before
        for name, amount in model.aims.items():
            assert model.heads is not None
            latent = move_along(latent, model.heads, name, amount)
        if options.perturb is None:
            yield _Asked(f"{original.id}-altered", latent, original, given, before)
            continue
        for place, near in enumerate(altered_latents(codec, latent, options.n, options.perturb, options.seed)):
            yield _Asked(f"{original.id}-{options.seed}-{place:05d}", near, original, given, before)


_TASKS = {"sample": _sample, "target": _search, "reconstruct": _reconstruct, "interpolate": _interpolate, "alter": _alter}


def _held(crystal: Crystal, codec: Codec) -> Crystal:
    """The crystal as the model takes it. Raises CrystalError where its grid can't hold it, or it doesn't know an element."""
    held = representable(crystal, codec.model.grid)
    if refusal := unknown_elements(held, codec.model.elements):
        raise CrystalError(f"{held.id}: {refusal}")
    return held


def _encoded(codec: Codec, crystals: Sequence[Crystal], stages: Stages, workers: int) -> Tensor:
    with stages.stage("encode", len(crystals)) as bar:
        return encode(codec, crystals, bar.update, workers).cpu()


def _decoded(codec: Codec, asked: Sequence[_Asked], options: GenerateOptions, stages: Stages) -> list[Result]:
    there = [(item.id, item.latent_L) for item in asked if isinstance(item.latent_L, Tensor) and item.decoded is None]
    found: Iterator[Decoded] = iter(())
    if there:
        ids, latents = zip(*there, strict=True)
        workers = processes(options.workers, len(ids))
        with stages.stage("decode", len(ids)) as bar:
            corrections, latent_NL = options.corrections, torch.stack(latents)
            found = iter(list(decode(codec, latent_NL, ids, workers, corrections=corrections, progress=bar.update)))
    results = []
    for item in asked:
        latent = item.latent_L
        decoded = Decoded(None, np.zeros(0), latent) if isinstance(latent, str) else item.decoded or next(found)
        results.append(result_of(item.id, decoded, item.original, item.given))
    return results


def _densities(
    codec: Codec, asked: Sequence[_Asked], results: Sequence[Result], kept: Sequence[int], form: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """(place, text of each channel by a pattern of its file's name) of crystals: their grids and atoms as decoded."""
    spec = codec.model.grid
    names = channel_names(spec)
    for start in range(0, len(kept), BATCH):
        places = kept[start : start + BATCH]
        latents = torch.stack([latent for place in places if isinstance(latent := asked[place].latent_L, Tensor)])
        shapes = [shape for shape in codec.shapes(latents) if not isinstance(shape, str)]
        for place, fields in zip(places, codec.fields(latents, shapes), strict=True):
            crystal = results[place].decoded.crystal
            assert crystal is not None
            boxed, files = in_box(crystal, spec), {}
            for name, density in zip(names, fields.density_CDHW, strict=True):
                if form == "cube":
                    files[f"{{}}.{name}.cube"] = to_cube(boxed, density, f"{name} of {crystal.id} as decoded")
                else:
                    files[f"CHGCAR_{{}}_{name}"] = to_chgcar(boxed, density)
            yield place, files


def summary(generation: Generation) -> str:
    """What became of all crystals, for the terminal."""
    first, *others = _counted(generation)
    return "\n  ".join([f"{first} to {generation.options.out}", *others, *generation.lines])


def _counted(generation: Generation) -> list[str]:
    """How many crystals were written, screened out, failed, and what they are; lines that begin with spaces are details."""
    metrics = generation.metrics
    lines = [f"{metrics['n_written']} of {metrics['n_asked']} crystals written"]
    if generation.options.screens:
        told = ", ".join(f"{name} {count}" for name, count in metrics["screened_out"].items())
        lines.append(f"{metrics['n_screened_out']} screened out: {told}")
    if metrics["n_failed"]:
        lines.append(f"{metrics['n_failed']} failed:")
        failed = [result for result in generation.results if result.status == "failed"]
        lines += [f"  {result.title}" for result in failed[:LISTED]]
        lines += [f"  and {len(failed) - LISTED} more, see crystals.csv"] * (len(failed) > LISTED)
    if metrics["n_formula_as_given"] is not None:
        kind = "altered " if generation.options.replace or generation.options.scale else ""
        lines.append(f"{metrics['n_formula_as_given']} have the formula of the {kind}crystal given")
    if generation.options.task in ("sample", "target"):
        lines.append(f"{metrics['n_distinct_formulas']} different formulas")
    groups = list(metrics["space_groups"].items())
    if groups:
        more = f" and {len(groups) - 5} others" if len(groups) > 5 else ""
        told = ", ".join(f"{name} ({count})" for name, count in groups[:5])
        lines.append(f"space groups within {metrics['symmetry_tolerance_A']:g} A: {told}{more}")
    if snaps := metrics["snapped"]:
        lines.append(f"{snaps['n_snapped']} snapped to their symmetry, {snaps['n_left']} left as they were")
    if runs := metrics["relaxation"]:
        steps = generation.options.relax_steps
        done = f"{runs['n_relaxed']} relaxed, {runs['n_stopped']} stopped after {steps} steps"
        energies = f"energies of {runs['n_relaxed'] + runs['n_stopped']} as they are"
        lines.append(f"{done if steps else energies}, {runs['n_failed']} failed")
        lines += [f"  {count}: {reason}" for reason, count in runs["failed"].items()]
    return lines
