"""How much of its latent space a model uses, and whether what is decoded there leads back to where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.errors import CrystalError
from dist_train.generate import encode
from dist_train.models.losses import gaussian_kl
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent

ACTIVE_VARIANCE = 0.01
"""Variance of the posterior mean over crystals above which a dimension is used (Burda et al., ICLR 2016)."""
QUANTILE = 0.9


def latent_quality(
    codec: Codec, latent: Latent, decoded: Sequence[Decoded], drawn_NL: Tensor, samples: Sequence[Decoded], workers: int = 1
) -> dict[str, Any]:
    """Figures of a latent space, ready for JSON; None where fewer than two crystals give nothing to measure by.

    latent: posteriors of test crystals, and what their means were decoded to; drawn_NL, samples: the same of draws from the
    prior. size, active_units: dimensions, and those in use (see ACTIVE_VARIANCE); kl_nats: mean over the crystals.
    round_trip, round_trip_of_samples: distance of encode(decode(z)) from z over the root mean square distance of a crystal's
    latent from their mean, its median and ninth decile, of n; n_lost gave no crystal that could be encoded.
    """
    spread = float(latent.mean.var(0, correction=0).sum().sqrt()) if len(latent.mean) > 1 else 0.0
    return {
        "size": latent.mean.shape[1],
        "active_units": int((latent.mean.var(0, correction=0) > ACTIVE_VARIANCE).sum()) if spread else None,
        "kl_nats": float(gaussian_kl(latent).sum(1).mean()) if spread else None,
        "round_trip": _round_trip(codec, latent.mean, decoded, spread, workers),
        "round_trip_of_samples": _round_trip(codec, drawn_NL, samples, spread, workers),
    }


def _round_trip(
    codec: Codec, latent_NL: Tensor, decoded: Sequence[Decoded], spread: float, workers: int
) -> dict[str, Any] | None:
    held = {}
    for place, item in enumerate(decoded):
        if item.crystal is not None:
            try:
                held[place] = representable(item.crystal, codec.model.grid)
            except CrystalError:  # counted as lost
                continue
    if not (held and spread):
        return None
    away_n = (encode(codec, list(held.values()), workers=workers).cpu() - latent_NL.cpu()[list(held)]).norm(dim=1) / spread
    return {
        "n": len(decoded),
        "n_lost": len(decoded) - len(held),
        "median": float(away_n.median()),
        "ninth_decile": float(torch.quantile(away_n, QUANTILE)),
    }
