"""Figures of a latent space: the released model of perovskites, real crystals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.crystal.structure import Crystal
from dist_train.generate import decode, posterior, sample_latents
from dist_train.latent_quality import latent_quality
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent

MODEL = Path(__file__).parents[1] / "data" / "models" / "perov_5"
N = 20


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(read_bundle(MODEL)[0])


@pytest.fixture(scope="module")
def crystals(codec: Codec, sample_table: Callable[[str], list[Crystal]]) -> list[Crystal]:
    return [representable(crystal, codec.model.grid) for crystal in sample_table("perov_5")[:N]]


def test_the_figures_of_a_trained_model(codec: Codec, crystals: list[Crystal]) -> None:
    """Decoded and encoded again, a crystal comes back; that of another lies as far away as crystals do from each other."""
    latent, drawn_NL = posterior(codec, crystals), sample_latents(codec, 8, 0)
    decoded = list(decode(codec, latent.mean, ["x"] * N))
    samples = list(decode(codec, drawn_NL, ["y"] * 8))
    found = latent_quality(codec, latent, decoded, drawn_NL, samples)
    assert found["size"] == codec.model.model.latent_size
    assert 10 < found["active_units"] <= found["size"]
    assert 100 < found["kl_nats"] < 1000
    assert found["round_trip"]["n"] == N and found["round_trip"]["n_lost"] == 0
    assert found["round_trip"]["median"] <= found["round_trip"]["ninth_decile"]
    assert found["round_trip"]["median"] < 0.3
    assert found["round_trip_of_samples"]["n"] == 8
    others = latent_quality(codec, latent, decoded[1:] + decoded[:1], drawn_NL, [Decoded(None, np.zeros(0), "none")] * 8)
    assert 1.0 < others["round_trip"]["median"] < 2.0
    assert others["round_trip_of_samples"] is None
    lost = latent_quality(codec, latent, [Decoded(None, np.zeros(0), "none"), *decoded[1:]], drawn_NL, samples)
    assert lost["round_trip"]["n_lost"] == 1


def test_one_crystal_has_no_spread_to_measure_by(codec: Codec, crystals: list[Crystal]) -> None:
    latent = posterior(codec, crystals[:1])
    decoded = list(decode(codec, latent.mean, ["x"]))
    found = latent_quality(codec, latent, decoded, sample_latents(codec, 0, 0), [])
    assert [found[name] for name in ("active_units", "kl_nats", "round_trip", "round_trip_of_samples")] == [None] * 4


def test_a_collapsed_posterior_uses_nothing(codec: Codec, crystals: list[Crystal]) -> None:
    size = codec.model.model.latent_size
    latent = Latent(torch.zeros(N, size), torch.zeros(N, size))
    latent.mean[:, 0] = torch.arange(float(N))
    decoded = [Decoded(crystal, np.ones(len(crystal)), "") for crystal in crystals]
    found = latent_quality(codec, latent, decoded, torch.zeros(0, size), [])
    assert found["active_units"] == 1
    assert found["kl_nats"] == pytest.approx(0.5 * float(torch.arange(float(N)).square().mean()))
