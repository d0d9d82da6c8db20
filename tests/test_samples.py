"""Samples of a released model: made of the atoms that were drawn, and as likely compositions as real crystals have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train import generate
from dist_train.commands.models import read_crystals
from dist_train.crystal.cif import write_cif
from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.frames import representable
from dist_train.crystal.structure import Crystal
from dist_train.generate import Sample, decode, draw, encode, sample_latents, samples
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec

DATA = Path(__file__).parents[1] / "data"
N = 60
IDS = [f"sample-{place}" for place in range(N)]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(read_bundle(DATA / "models" / "perov_5")[0])


@pytest.fixture(scope="module")
def crystals(codec: Codec) -> list[Crystal]:
    table = read_crystals([str(DATA / "benchmarks" / "perov_5_test_half_a.parquet")], codec.model.grid)
    return [representable(crystal, codec.model.grid) for crystal in table[:24]]


def atoms_of(crystal: Crystal, codec: Codec) -> torch.Tensor:
    return torch.tensor([float(crystal.composition.get(z, 0)) for z in codec.model.elements])


def test_atoms_that_are_known_overrule_the_votes_but_not_the_places(codec: Codec, crystals: list[Crystal]) -> None:
    """One element of each crystal exchanged for potassium, which none of them has: asked for, it takes that one's sites."""
    crystals = [crystal for crystal in crystals if NUMBERS["K"] not in crystal.composition]
    latents, ids = encode(codec, crystals), [crystal.id for crystal in crystals]
    given, wanted = [], []
    for crystal in crystals:
        z = int(crystal.numbers_N[0])
        numbers = np.where(crystal.numbers_N == z, NUMBERS["K"], crystal.numbers_N)
        wanted.append(Crystal(crystal.id, crystal.lattice_A, crystal.frac_N3, numbers))
        given.append(atoms_of(wanted[-1], codec))
    plain, told = (list(decode(codec, latents, ids, atoms_NE=atoms)) for atoms in (None, torch.stack(given)))
    for crystal, other, usual, found in zip(crystals, wanted, plain, told, strict=True):
        assert usual.crystal is not None
        assert found.crystal is not None
        assert usual.crystal.composition == crystal.composition
        assert found.crystal.composition == other.composition
        assert np.abs(found.crystal.frac_N3 - usual.crystal.frac_N3).max() < 0.02
        changed = found.crystal.numbers_N != usual.crystal.numbers_N
        assert (found.crystal.numbers_N[changed] == NUMBERS["K"]).all()


def made_of(items: list[Sample], codec: Codec, atoms_NE: torch.Tensor) -> list[bool]:
    return [
        item.decoded.crystal is not None and torch.equal(atoms_of(item.decoded.crystal, codec), atoms)
        for item, atoms in zip(items, atoms_NE, strict=True)
    ]


def test_samples_that_are_not_made_of_the_atoms_drawn_are_drawn_again(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(generate, "SAMPLED", 25)
    usual = samples(codec, IDS, seed=0, progress=told.append)
    assert told == [25, 25, 10]
    monkeypatch.undo()
    atoms = draw(codec, N, seed=0).atoms_NE
    assert atoms is not None
    monkeypatch.setattr(generate, "ATTEMPTS", 1)
    once = samples(codec, IDS, seed=0)
    right = made_of(once, codec, atoms)
    assert 0.8 < np.mean(right) < 1.0
    for place, (first, kept) in enumerate(zip(once, usual, strict=True)):
        assert torch.equal(first.latent_L, kept.latent_L) == right[place]
    second = draw(codec, N, seed=0, attempt=1).atoms_NE
    assert second is not None
    again = [place for place in range(N) if not right[place]]
    assert np.mean(made_of([usual[place] for place in again], codec, second[again])) > 0.5
    assert not torch.equal(atoms, second)


def test_a_sample_is_what_its_latent_decodes_to(codec: Codec) -> None:
    found = samples(codec, IDS[:8], seed=3)
    decoded = decode(codec, torch.stack([item.latent_L for item in found]), IDS[:8])
    for item, other in zip(found, decoded, strict=True):
        assert item.decoded.crystal is not None and other.crystal is not None
        assert write_cif(item.decoded.crystal) == write_cif(other.crystal)


def test_the_first_samples_are_the_same_however_many_there_are(codec: Codec) -> None:
    assert torch.equal(sample_latents(codec, 5, seed=1), sample_latents(codec, 9, seed=1)[:5])
    assert sample_latents(codec, 0, seed=1).shape == (0, codec.model.model.latent_size)
