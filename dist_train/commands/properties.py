"""The verb fit-properties: labelled crystals to what reads properties off a model's latents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dist_train.commands.models import bundle_folder, seen
from dist_train.crystal.case import Case, make_case
from dist_train.crystal.interop import density_g_cm3
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.parquet import parquet_length, read_column, read_parquet_rows
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, DataError, kind_of
from dist_train.files import sha256
from dist_train.generate import posterior
from dist_train.model_card import model_card
from dist_train.models.export import SUMS_NAME, add_properties, check_place, read_bundle, read_properties, training_digests
from dist_train.models.properties import MEMBERS, BoolArray, Labels, fit_properties
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent
from dist_train.progress import Stages
from dist_train.tables import properties_table

COMPUTED: dict[str, tuple[str, Callable[[Crystal], float]]] = {
    "volume_per_atom": ("A^3", lambda crystal: crystal.volume_A3 / len(crystal)),
    "density": ("g/cm^3", density_g_cm3),
    "n_atoms": ("atoms", lambda crystal: float(len(crystal))),
}
"""Properties that follow from the structure, with their units: they need no column."""
FEW_FORMULAS = 20
"""With fewer formulas than this, crystals of one may be fitted and held out; near copies stay together all the same."""


@dataclass(frozen=True)
class FitOptions:
    """What `dist-train fit-properties` was asked for; see its help."""

    model: str
    tracking_uri: str | None
    data: Sequence[Path]
    test: Sequence[Path]
    property: Sequence[str]
    out: Path
    held_out: float
    seed: int
    steps: int
    workers: int


@dataclass(frozen=True)
class _Wanted:
    """A property to fit; column: of its labels, '' where it is computed."""

    name: str
    column: str
    unit: str


@dataclass
class _Rows:
    """Crystals that the model takes and their labels, a list a crystal; refused: why others aren't taken, counted."""

    cases: list[Case]
    values: list[list[float]]
    refused: Counter[str]


def fit(options: FitOptions) -> str:
    """Fit properties to the crystals of tables and write the bundle with them; returns a summary.

    Raises ConfigError or DataError for what can't be fitted.
    """
    out, stages = options.out, Stages()
    asked = [_wanted(text) for text in options.property]
    if doubled := [name for name, n in Counter(known.name for known in asked).items() if n > 1]:
        raise ConfigError(f"--property {doubled[0]!r} is given {len(asked)} times: give every name once")
    if not 0 < options.held_out < 1:
        raise ConfigError(f"--held-out {options.held_out:g} is no share: give a number between 0 and 1")
    check_place(out)
    names = {known.name for known in asked}
    if lost := sorted(_properties_of(out) - names):
        raise ConfigError(
            f"{out} holds properties that would be lost: {', '.join(lost)}; name them too by --property, as all are fitted "
            "together, or set --out to another folder"
        )
    with bundle_folder(options.model, options.tracking_uri) as folder:
        network, config = read_bundle(folder)
        codec = Codec(network)
        rows = _read(options.data, asked, codec, options.workers, stages)
        tests = _read(options.test, asked, codec, options.workers, stages)
        cases, n_data = rows.cases + tests.cases, len(rows.cases)
        seen_N = seen(
            [case.digests for case in cases], training_digests(folder), config["about"].get("training_digests", {})
        )
        groups_N = near_copies(cases)
        if options.test:
            held_N = np.arange(len(cases)) >= n_data
            kept_N = held_N | ~np.isin(groups_N, groups_N[n_data:])
        else:
            held_N, kept_N = split(groups_N, seen_N, options.held_out, options.seed), np.full(len(cases), True)
        with stages.stage("encode", len(cases)) as bar:
            found = posterior(codec, [case.crystal for case in cases], bar.update)
            latents = Latent(found.mean.cpu(), found.log_variance.cpu())
        values_NP = np.array(rows.values + tests.values)
        labels = [Labels(a.name, a.column, a.unit, np.where(kept_N, values_NP[:, p], np.nan)) for p, a in enumerate(asked)]
        with stages.stage("fit", MEMBERS * options.steps, "steps") as bar:
            heads = fit_properties(latents, labels, held_N, seen_N, options.seed, options.steps, bar.update)
        tables = {path.as_posix(): sha256(path) for path in (*options.data, *options.test)}
        told = {**heads.config(), "about": {"data": tables, "seed": options.seed, "steps": options.steps}}
        card = model_card(out.name, {**config, "properties": told}).encode()
        add_properties(folder, out, heads, told, {"model_card.md": card} if (folder / "model_card.md").exists() else {})
    lines = [properties_table(heads.properties)]
    if left_out := int((~kept_N).sum()):
        lines.append(f"{left_out} rows of --data were left out: their formula, or a near copy, is in --test")
    if dropped := sorted({known["name"] for known in config.get("properties", {}).get("properties", ())} - names):
        lines.append(f"not in it: {', '.join(dropped)} of {options.model}; all properties are fitted together")
    lines += [f"{n} rows were not taken: {why}" for why, n in (rows.refused + tests.refused).most_common()]
    return "\n".join([*lines, f"bundle with properties: {out}"])


def _properties_of(folder: Path) -> set[str]:
    """Names of the properties of the bundle in a folder, if there is one."""
    heads = read_properties(folder) if (folder / SUMS_NAME).is_file() else None
    return {known.name for known in heads.properties} if heads else set()


def _wanted(text: str) -> _Wanted:
    """Of NAME[=COLUMN][:UNIT]. Raises ConfigError."""
    match = re.fullmatch(r"(\w+)(?:=(\w+))?(?::(.+))?", text)
    if match is None:
        raise ConfigError(f"--property {text!r} can't be read: write NAME, NAME=COLUMN or NAME=COLUMN:UNIT")
    name, column, unit = match.groups()
    if name in COMPUTED and column is None:
        return _Wanted(name, "", COMPUTED[name][0])
    return _Wanted(name, column or name, unit or "")


def _read(tables: Sequence[Path], asked: Sequence[_Wanted], codec: Codec, workers: int, stages: Stages) -> _Rows:
    """The rows of tables that the model takes. Raises DataError for a table that can't be read or lacks a column."""
    found = _Rows([], [], Counter())
    spec = codec.model.grid
    prepare = partial(make_case, spec=spec, elements=codec.model.elements, move=None)
    for path in tables:
        length = parquet_length(path)
        columns = [_numbers(path, known.column, length) if known.column else [np.nan] * length for known in asked]
        crystals, values = [], []
        for item, row in zip(read_parquet_rows(path, 0, length, spec.max_atoms), zip(*columns, strict=True), strict=True):
            if isinstance(item, Crystal):
                crystals.append(item)
                values.append([*row])
            else:
                found.refused[kind_of(str(item[1]))] += 1
        with stages.stage("read", len(crystals)) as bar:
            cases = bar.over(parallel_map(prepare, crystals, workers))
            for crystal, case, labels in zip(crystals, cases, values, strict=True):
                if case.refusal:
                    found.refused[kind_of(case.refusal)] += 1
                    continue
                found.cases.append(case)
                found.values.append([
                    label if known.column else COMPUTED[known.name][1](crystal)
                    for known, label in zip(asked, labels, strict=True)
                ])  # fmt: skip
    if tables and not found.cases:
        raise DataError(f"none of the crystals in {[str(path) for path in tables]} is one that the model takes")
    return found


def _numbers(path: Path, column: str, length: int) -> list[float]:
    """The labels of a column, NaN for those that are missing."""
    try:
        return [np.nan if value is None else float(value) for value in read_column(path, column, 0, length)]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: column {column!r} holds no numbers: {error}; name another with NAME=COLUMN") from None


def near_copies(cases: Sequence[Case]) -> NDArray[np.int64]:
    """[N] the group of each crystal: one a formula; where these are few, of near copies (see `crystal.digest`)."""
    formulas = [case.crystal.formula for case in cases]
    keys: list[Iterable[object]] = (
        [(formula,) for formula in formulas] if len({*formulas}) >= FEW_FORMULAS else [case.digests for case in cases]
    )
    number: dict[object, int] = {}
    pairs = np.array([(row, number.setdefault(key, len(number))) for row, of in enumerate(keys) for key in of])
    size = len(cases) + len(number)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], len(cases) + pairs[:, 1])), shape=(size, size))
    groups: NDArray[np.int64] = connected_components(graph, directed=False)[1][: len(cases)].astype(np.int64)
    return groups


def split(groups_N: NDArray[np.int64], seen_N: BoolArray | None, share: float, seed: int) -> BoolArray:
    """[N] which crystals to hold out: whole groups, at random, those first of which the model has seen nothing."""
    groups, sizes = np.unique(groups_N, return_counts=True)
    seen = np.zeros(len(groups_N)) if seen_N is None else seen_N.astype(float)
    seen_of_group = np.array([seen[groups_N == group].max() for group in groups])
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    held, room = [], share * len(groups_N)
    for place in shuffled[np.argsort(seen_of_group[shuffled], kind="stable")]:
        if sizes[place] <= room:
            held.append(groups[place])
            room -= sizes[place]
    return np.isin(groups_N, held)
