"""Crystals from a trained model: reconstructed, sampled from its latent space, or on the way between two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_train.crystal.cif import parse_cif, write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError
from dist_train.models.reconstruct import Codec

BATCH = 32


def _batches(items: Sequence[Crystal]) -> Iterator[Sequence[Crystal]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def encode(codec: Codec, crystals: Sequence[Crystal]) -> Tensor:
    """[N, latent] posterior means of crystals that the model's grid holds (see `representable`)."""
    return torch.cat([codec.encode(batch) for batch in _batches(crystals)])


def decode(codec: Codec, latent_NL: Tensor, ids: Sequence[str]) -> Iterator[Decoded]:
    """The crystals of latents, in order."""
    for start in range(0, len(ids), BATCH):
        yield from codec.crystals(latent_NL[start : start + BATCH], ids[start : start + BATCH])


def sample_latents(codec: Codec, n: int, seed: int) -> Tensor:
    """[n, latent] draws from the Gaussian that was fitted to the training crystals' latents; same seed, same draws."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn(n, codec.model.model.latent, generator=generator)
    return codec.model.prior_mean.cpu().float() + noise @ codec.model.prior_cholesky.cpu().float().T


def interpolate_latents(start_L: Tensor, stop_L: Tensor, steps: int) -> Tensor:
    """[steps, latent] on the straight line from one latent to another, both ends included."""
    weights = torch.linspace(0, 1, steps)[:, None]
    return start_L + weights * (stop_L - start_L)


def reconstruct(codec: Codec, crystals: Sequence[Crystal]) -> list[Decoded]:
    """Each crystal through encoder and decoder; one that the grid can't hold gives an empty result with the reason."""
    results: list[Decoded | None] = []
    held: list[Crystal] = []
    for crystal in crystals:
        try:
            held.append(representable(crystal, codec.model.grid))
            results.append(None)
        except CrystalError as error:
            results.append(Decoded(None, np.zeros(0), str(error)))
    decoded = decode(codec, encode(codec, held), [crystal.id for crystal in held]) if held else iter(())
    return [result or next(decoded) for result in results]


def reconstruct_cifs(codec: Codec, texts: Sequence[str]) -> dict[str, list[object]]:
    """CIF texts through the model, as columns: reconstructed cif, latent (JSON list), confidence, error.

    A bad row has an error and empty cells; the others are not affected.
    """
    columns: dict[str, list[object]] = {"cif": [], "latent": [], "confidence": [], "error": []}
    for row, text in enumerate(texts):
        latent, found, reason = "", None, ""
        try:
            crystal = representable(parse_cif(text, f"row-{row}", codec.model.grid.max_atoms), codec.model.grid)
            means = codec.encode([crystal])
            (found,) = codec.crystals(means, [crystal.id])
            latent, reason = json.dumps(means[0].tolist()), found.reason
        except CrystalError as error:
            reason = str(error)
        decoded = found.crystal if found else None
        columns["cif"].append(write_cif(decoded) if decoded else "")
        columns["latent"].append(latent)
        columns["confidence"].append(float(found.confidence_N.mean()) if found and decoded else 0.0)
        columns["error"].append(reason)
    return columns
