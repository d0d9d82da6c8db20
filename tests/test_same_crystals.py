"""Crystals of the released models hang on seed and latent alone: not on cores, nor on what is made with them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train import generate
from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.voxelize import Shape
from dist_train.generate import decode, draw, encode, sample_latents
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec

MODELS = Path(__file__).parents[1] / "data" / "models"
N = 21


@pytest.fixture(scope="module", params=["perov_5", "carbon_24"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return Codec(read_bundle(MODELS / request.param)[0])


@pytest.fixture(scope="module")
def usual(codec: Codec) -> list[str]:
    """What one worker makes."""
    return sampled(codec)


@pytest.fixture
def threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def sampled(codec: Codec, n: int = N, workers: int = 1) -> list[str]:
    """CIF texts of samples, or the reasons that there are none."""
    found = decode(codec, sample_latents(codec, n, 3, workers), [f"s{i}" for i in range(n)], workers)
    return [text(item) for item in found]


def text(item: Decoded) -> str:
    return item.reason if item.crystal is None else write_cif(item.crystal)


@pytest.mark.timeout(120)
def test_any_number_of_workers_makes_the_same_crystals(
    codec: Codec, usual: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CODED", 8)
    monkeypatch.setattr(generate, "FLOWED", 16)
    assert sampled(codec, workers=2) == usual


@pytest.mark.usefixtures("threads")
def test_threads_of_torch_make_the_same_crystals(codec: Codec, usual: list[str]) -> None:
    number = torch.get_num_threads() + 1
    torch.set_num_threads(number)
    assert sampled(codec) == usual
    with ThreadPoolExecutor(1) as fresh:  # what comes after isn't left with one
        assert torch.get_num_threads() == fresh.submit(torch.get_num_threads).result() == number


@pytest.mark.parametrize("fewer", [1, 2, 10])
def test_fewer_samples_are_the_first_of_more(codec: Codec, usual: list[str], fewer: int) -> None:
    assert sampled(codec, fewer) == usual[:fewer]


def test_latents_of_crystals_do_not_hang_on_workers_or_company(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = sample_latents(codec, N, 3)
    crystals = [item.crystal for item in decode(codec, latents, ["x"] * N) if item.crystal is not None]
    together = encode(codec, crystals)
    assert len(together) == len(crystals) > N // 2
    monkeypatch.setattr(generate, "CODED", 5)
    assert torch.equal(together, encode(codec, crystals, workers=2))
    assert torch.equal(together[-1:], encode(codec, crystals[-1:]))


@pytest.mark.parametrize("shape", [(4, 4, 8), (12, 12, 12), (20, 24, 24)])
def test_grids_hang_on_their_own_latent_alone(shape: Shape) -> None:
    codec = Codec(read_bundle(MODELS / "carbon_24")[0])
    latents = draw(codec, 9, 3).latent_NL
    together = codec.fields(latents, [shape] * 9)
    for places in ([8], [1, 0], [7, 3, 5], [6, 4, 2, 8, 1]):
        for place, found in zip(places, codec.fields(latents[places], [shape] * len(places)), strict=True):
            assert np.array_equal(found.density_CDHW, together[place].density_CDHW)
            assert np.array_equal(found.probability_DHW, together[place].probability_DHW)
            assert np.array_equal(found.parameters_6, together[place].parameters_6)
            assert np.array_equal(found.estimate.composition_Z, together[place].estimate.composition_Z)


def test_no_samples_are_no_crystals(codec: Codec) -> None:
    assert sampled(codec, 0) == []
