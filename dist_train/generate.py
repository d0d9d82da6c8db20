"""Crystals from a trained model: reconstructed, sampled from its latent space, or on the way between two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dist_train.crystal.decode import Decoded
from dist_train.crystal.decode_box import decode_frame
from dist_train.crystal.frames import representable
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent

BATCH, FLOW_BATCH = 32, 1024


def _batches(items: Sequence[Crystal]) -> Iterator[Sequence[Crystal]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def encode(codec: Codec, crystals: Sequence[Crystal], progress: Callable[[int], None] = lambda n: None) -> Tensor:
    """[N, latent] posterior means of crystals that the model's grid holds (see `representable`).

    progress(n): n more are encoded.
    """
    return posterior(codec, crystals, progress).mean


def posterior(codec: Codec, crystals: Sequence[Crystal], progress: Callable[[int], None] = lambda n: None) -> Latent:
    """The same with the variances."""
    empty = torch.empty(0, codec.model.model.latent_size, device=codec.device)
    found = [Latent(empty, empty)]
    for batch in _batches(crystals):
        found.append(codec.posterior(batch))
        progress(len(batch))
    return Latent(*(torch.cat(part) for part in zip(*found, strict=True)))


def decode(codec: Codec, latent_NL: Tensor, ids: Sequence[str], workers: int = 1) -> Iterator[Decoded]:
    """The crystals of latents, in order: networks in this process, `decode_frame` over `workers` (one: here, too)."""
    batches = (slice(start, start + BATCH) for start in range(0, len(ids), BATCH))
    fields = (item for batch in batches for item in codec.decodable(latent_NL[batch], ids[batch]))
    return parallel_map(partial(decode_frame, spec=codec.model.grid, channel=codec.channel), fields, workers)


def sample_latents(codec: Codec, n: int, seed: int) -> Tensor:
    """[n, latent] draws from what was fitted to the training crystals' latents, the bundle's flow or else a Gaussian.

    Same seed, same draws, however many.
    """
    model, generator = codec.model, torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn(n, model.model.latent_size, generator=generator)
    mean = model.prior_mean.cpu().float()
    if model.flow is None:
        return mean + noise @ model.prior_cholesky.cpu().float().T
    drawn = [model.flow.carry(part.to(codec.device)).cpu().float() for part in torch.split(noise, FLOW_BATCH)]
    return mean + model.latent_scale * torch.cat([*drawn, noise[:0]])


def interpolate_latents(start_L: Tensor, stop_L: Tensor, steps: int) -> Tensor:
    """[steps, latent] on the straight line from one latent to another, both ends included."""
    weights = torch.linspace(0, 1, steps)[:, None]
    return start_L + weights * (stop_L - start_L)


def altered_latents(codec: Codec, latent_L: Tensor, n: int, radius: float, seed: int) -> Tensor:
    """[n, latent] around one latent, in random directions; same seed, same directions.

    radius: how far away all of them are, in standard deviations of the training crystals' latents (Mahalanobis distance).
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn(n, codec.model.model.latent_size, generator=generator)
    steps: Tensor = radius * noise / noise.norm(dim=1, keepdim=True)
    return latent_L.cpu() + steps @ codec.model.prior_cholesky.cpu().float().T


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
    decoded = decode(codec, encode(codec, held), [crystal.id for crystal in held])
    return [result or next(decoded) for result in results]
