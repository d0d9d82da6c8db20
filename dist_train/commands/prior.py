"""What samples are drawn from: fitted at the end of every training, and anew, to crystals of one's choice, by fit-prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import log as ln
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_train.commands.models import bundle_folder, read_many, read_split, seen
from dist_train.config import GridSpec, PriorConfig
from dist_train.crystal.case import unknown_elements
from dist_train.crystal.digest import digest, digests_near
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, CrystalError, DataError
from dist_train.generate import posterior
from dist_train.model_card import model_card
from dist_train.models.autoencoder import composition_vector
from dist_train.models.compositions import fit_compositions
from dist_train.models.export import check_place, read_bundle, replace_prior, training_digests
from dist_train.models.flow import Pairs, fit_flow
from dist_train.models.grid_flow import fit_grid_flow
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent, latent_shape
from dist_train.progress import Progress, Stages
from dist_train.shards.index import Index

MOST_LATENTS = 100_000
"""Crystals that are encoded for the flow: a few minutes of one core."""
COMPOSITION_STEPS = 8_000
"""That compositions are fitted in at most, so that more for the flows don't take them, too: of 60,000 that is 17 epochs."""


def fit_prior(
    codec: Codec, crystals: Sequence[Crystal], settings: PriorConfig, seed: int, workers: int, stages: Stages
) -> None:
    """Fit the model's prior to crystals: to the composition of each, and to the latents of `MOST_LATENTS` at most, spread
    over all."""
    model = codec.model
    chosen = np.linspace(0, len(crystals) - 1, min(len(crystals), MOST_LATENTS)).astype(int)
    with stages.stage("encode", len(chosen)) as bar:
        found = posterior(codec, [crystals[place] for place in chosen], bar.update, workers)
    latents = found.mean.cpu().double()
    centred = latents - latents.mean(0)
    covariance = centred.T @ centred / max(len(latents) - 1, 1)
    ridge = 1e-6 * covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(len(covariance), dtype=torch.float64)
    model.prior_mean.copy_(latents.mean(0))
    model.prior_cholesky.copy_(torch.linalg.cholesky(covariance + ridge))
    model.flow = None
    if settings.kind != "flow":
        return
    elements = list(model.elements)
    atoms_NE = torch.from_numpy(np.stack([composition_vector(crystal)[elements] for crystal in crystals])).to(codec.device)
    steps = min(settings.steps, COMPOSITION_STEPS)
    with stages.stage("compositions", steps, "steps") as bar:
        compositions = fit_compositions(atoms_NE, elements, steps, seed, partial(_told, bar), settings.temperature)
    voxels, n_vector = model.model.latent_voxels, model.model.latent
    centre_L, scale = model.flow_centre(n_vector if voxels else model.model.latent_size), model.latent_scale
    pairs = Pairs(Latent((found.mean - centre_L) / scale, found.log_variance - 2 * ln(scale)), atoms_NE[chosen])
    network = settings.width, settings.depth, settings.steps, seed
    with stages.stage("prior", settings.steps * (2 if voxels else 1), "steps") as bar:
        told = partial(_told, bar)
        if voxels is None:
            model.flow = fit_flow(pairs, compositions, *network, told)
            return
        shapes = [latent_shape(grid_shape(crystals[place].lattice_A, model.grid), voxels) for place in chosen]
        model.flow = fit_grid_flow(pairs, shapes, n_vector, model.model.latent_channels, compositions, *network, told)


def _told(bar: Progress, error: float) -> None:
    bar.update(error=f"{error:.3f}")


@dataclass(frozen=True)
class FitPriorOptions:
    """What `dist-train fit-prior` was asked for; see its help. None: as the bundle's run had it."""

    model: str
    tracking_uri: str | None
    shards: str | None
    cache_dir: Path | None
    split: str | None
    data: Sequence[str]
    max_volume: float | None
    out: Path
    width: int | None
    depth: int | None
    steps: int | None
    temperature: float | None
    seed: int
    workers: int


def fit(options: FitPriorOptions) -> str:
    """Fit what samples are drawn from to crystals and write the bundle with it; returns a summary.

    The crystals count as training crystals from then on: samples can be copies of them. Raises ConfigError or DataError.
    """
    stages = Stages()
    check_place(options.out)
    if options.data and options.split:
        raise ConfigError(f"--split {options.split} is of shards, and --data has none; leave it out")
    if options.temperature is not None and options.temperature > 1:
        raise ConfigError(f"--temperature {options.temperature:g} is above 1, as compositions occur: give 1 or less")
    with bundle_folder(options.model, options.tracking_uri) as folder:
        network, config = read_bundle(folder)
        listed = training_digests(folder)
        codec, about = Codec(network), config["about"]
        taken, refused = _read(options, codec, stages)
        seen_N = seen([item.digests for item in taken], listed, about.get("training_digests", {}))
        settings = _settings(options, about["run"]["prior"])
        crystals = [item.crystal for item in taken]
        fit_prior(codec, crystals, settings, options.seed, options.workers, stages)
        told = {"data": _source(options), "crystals": len(crystals), "seed": options.seed}
        told |= {"max_volume": options.max_volume} if options.max_volume else {}
        about = {**about, "prior": told | settings.model_dump(mode="json")}
        new = "nobody knows how many of them it was trained on"
        if listed is not None and seen_N is not None:
            digests = [digest(crystals[place]) for place in np.flatnonzero(~seen_N)]
            counts, new = about["training_digests"], f"{len(digests)} of which are new to it"
            about["training_digests"] = counts | {name: counts[name] + len(digests) for name in ("samples", "of")}
            listed = np.union1d(listed, np.array(digests, np.uint64))
        card = {"model_card.md": model_card(options.out.name, {**config, "about": about}).encode()}
        replace_prior(folder, options.out, network, about, listed, card if (folder / "model_card.md").exists() else {})
    lines = [f"what the model's samples are drawn from is fitted to {len(crystals)} crystals; {new}"]
    if refused:
        lines.append(f"{refused} crystals were not taken: unreadable, too large, or of no kind that the model takes")
    return "\n".join([*lines, f"bundle: {options.out}"])


def _settings(options: FitPriorOptions, before: dict[str, Any]) -> PriorConfig:
    asked = {name: getattr(options, name) for name in ("width", "depth", "steps", "temperature")}
    return PriorConfig.model_validate(before | {"kind": "flow"} | {k: v for k, v in asked.items() if v is not None})


def _source(options: FitPriorOptions) -> str:
    return " ".join(options.data) if options.data else f"{options.shards}, split {options.split or 'train'}"


class _Taken(NamedTuple):
    """A crystal as the model's grid takes it, and its digests; or why the model can't take it."""

    crystal: Crystal
    digests: tuple[int, ...]
    refusal: str = ""


def _taken(crystal: Crystal, spec: GridSpec, elements: tuple[int, ...], placed: bool, max_volume: float | None) -> _Taken:
    """placed: it is already as the grid takes it; max_volume: A^3 an atom."""
    try:
        crystal = crystal if placed else representable(crystal, spec)
        if max_volume is not None and (volume := crystal.volume_A3 / len(crystal)) > max_volume:
            return _Taken(crystal, (), f"has {volume:.0f} A^3 an atom, more than --max-volume {max_volume:g}")
        return _Taken(crystal, digests_near(crystal), unknown_elements(crystal, elements))
    except CrystalError as error:
        return _Taken(crystal, (), str(error).removeprefix(f"{crystal.id}: "))


def _read(options: FitPriorOptions, codec: Codec, stages: Stages) -> tuple[list[_Taken], int]:
    """The crystals that the model takes, and how many others there are. Raises DataError where it takes none."""
    spec, n_refused, placed = codec.model.grid, 0, False
    if options.shards:
        index = Index.read(options.shards, options.cache_dir)
        crystals, placed = read_split(index, options.split or "train", None, stages), index.grid == spec
    else:
        crystals, refused = read_many(options.data, spec.max_atoms, None, options.workers, stages)
        n_refused = len(refused)
    with stages.stage("prepare", len(crystals)) as bar:
        prepare = partial(_taken, spec=spec, elements=codec.model.elements, placed=placed, max_volume=options.max_volume)
        found = list(bar.over(parallel_map(prepare, crystals, options.workers)))
    taken = [item for item in found if not item.refusal]
    if not taken:
        told = f"; the first: {found[0].refusal}" if found else ""
        raise DataError(f"there is no crystal in {_source(options)} that the model takes{told}")
    return taken, n_refused + len(found) - len(taken)
