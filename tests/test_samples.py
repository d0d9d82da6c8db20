"""Samples of a released model: made of the atoms that were drawn, and as likely compositions as real crystals have."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train import generate
from dist_train.commands.models import read_crystals
from dist_train.crystal.decode import Decoded
from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.frames import representable
from dist_train.crystal.metrics import crowded
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import EXACT_A, space_group
from dist_train.errors import ModelError
from dist_train.generate import Sample, decode, draw, encode, returned, sample_latents, samples
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import latent_shape

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
    """Of these atoms, with room for them."""
    return [
        (crystal := item.decoded.crystal) is not None
        and torch.equal(atoms_of(crystal, codec), atoms)
        and not crowded(crystal)
        for item, atoms in zip(items, atoms_NE, strict=True)
    ]


def test_latents_are_drawn_again_until_the_crystal_is_made_of_its_atoms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of up to 20 atoms, of which half come out at first."""
    codec, told = Codec(read_bundle(DATA / "models" / "mp_20")[0]), list[tuple[int, int]]()
    ids = IDS[:24]
    monkeypatch.setattr(generate, "SAMPLED", 10)
    usual = samples(codec, ids, seed=0, progress=lambda n, waiting: told.append((n, waiting)))
    assert [n for n, _ in told if n] == [10, 10, 4]
    first = [waiting for n, waiting in told[: told.index((10, 0))]]
    assert first[0] == 10  # of which fewer and fewer wait, and then those for whose atoms nothing was found
    assert all(after <= before for before, after in pairwise(first[: generate.ATTEMPTS]))
    assert told[-1] == (4, 0)
    monkeypatch.undo()
    atoms = draw(codec, len(ids), seed=0).atoms_NE
    second, late = (draw(codec, len(ids), seed=0, attempt=1, others=others).atoms_NE for others in (0, 1))
    assert atoms is not None and second is not None and late is not None
    assert torch.equal(second, atoms)  # the same compositions, however hard they are to make
    assert not torch.equal(late, atoms)  # but not those that can't be made
    monkeypatch.setattr(generate, "ATTEMPTS", 1)
    monkeypatch.setattr(generate, "COMPOSITIONS", 1)
    once = samples(codec, ids, seed=0)
    right, meant = made_of(once, codec, atoms), of_their_latents(once, codec, atoms)
    assert 0.2 < np.mean(right) < 0.8
    assert 0.1 < np.mean(meant) < np.mean(right)
    for first, kept, stays in zip(once, usual, meant, strict=True):
        assert not stays or torch.equal(first.latent_L, kept.latent_L)
    assert np.mean(made_of(usual, codec, atoms)) > np.mean(right) + 0.1
    assert np.mean(of_their_latents(usual, codec, atoms)) > np.mean(meant) + 0.1


def test_the_best_of_several_is_the_nearest_to_a_crystal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "symmetrized", lambda crystal: [])
    codec = Codec(read_bundle(DATA / "models" / "mp_20")[0])
    ids, errors, meant = IDS[:8], [], []
    for attempt in range(3):
        latents, atoms = draw(codec, len(ids), seed=0, attempt=attempt)
        assert atoms is not None
        rows = returned(codec, latents, atoms, ids=ids)
        items = [Sample(row.again_L, row.decoded) for row in rows]
        alone = list(decode(codec, torch.stack([row.again_L for row in rows]), ids))
        again = [Sample(row.again_L, item) for row, item in zip(rows, alone, strict=True)]
        right = np.array(made_of(items, codec, atoms)) & np.array(made_of(again, codec, atoms))
        errors.append(np.where(right, [row.error for row in rows], np.inf))
        meant.append([row.again_L for row in rows])
    best = samples(codec, ids, seed=0, best_of=3)
    several = 0
    for place, sample in enumerate(best):
        of_three = np.array([error[place] for error in errors])
        if np.isfinite(of_three).any():
            assert torch.equal(sample.latent_L, meant[of_three.argmin()][place])
            several += of_three.argmin() > 0
    assert several > 1  # not the first ones that would do


def test_a_cell_too_thin_for_any_atom_is_not_what_was_meant(codec: Codec, crystals: list[Crystal]) -> None:
    """All images within a bond's length of an atom would take more memory than there is."""
    whole = crystals[0]
    for lattice, right in ((whole.lattice_A, True), (np.diag([1e-6, 1e-6, 1e14]), False)):
        decoded = Decoded(replace(whole, lattice_A=lattice), np.ones(len(whole)))
        assert generate._as_meant(codec, decoded, atoms_of(whole, codec)) == right


def test_a_model_that_draws_no_atoms_has_no_best_of_several() -> None:
    codec = Codec(read_bundle(DATA / "models" / "carbon_24")[0])
    with pytest.raises(ModelError, match="best of 2: this model's samples are drawn without their atoms"):
        samples(codec, IDS[:2], seed=0, best_of=2)


def test_a_latent_that_is_drawn_has_no_more_numbers_than_its_grid() -> None:
    codec = Codec(read_bundle(DATA / "models" / "mp_20")[0])
    sizes, rest = codec.model.model, []
    assert sizes.latent_voxels is not None
    latents = draw(codec, 32, seed=0).latent_NL
    for latent, shape in zip(latents, codec.shapes(latents), strict=True):
        if not isinstance(shape, str):
            end = sizes.latent + sizes.latent_channels * prod(latent_shape(shape, sizes.latent_voxels))
            assert latent[:end].all()
            rest.append(latent[end:])
    assert torch.cat(rest).numel() > 0
    assert not torch.cat(rest).any()


def of_their_latents(items: list[Sample], codec: Codec, atoms_NE: torch.Tensor) -> list[bool]:
    """Whether a sample, and what its latent alone decodes to, is made of these atoms."""
    decoded = decode(codec, torch.stack([item.latent_L for item in items]), IDS[: len(items)])
    alone = [Sample(item.latent_L, other) for item, other in zip(items, decoded, strict=True)]
    return [a and b for a, b in zip(made_of(items, codec, atoms_NE), made_of(alone, codec, atoms_NE), strict=True)]


def test_a_samples_latent_is_what_its_crystal_is_encoded_to(codec: Codec) -> None:
    found = samples(codec, IDS[:8], seed=3)
    crystals = [item.decoded.crystal for item in found if item.decoded.crystal is not None]
    assert len(crystals) == len(found)
    latents = torch.stack([item.latent_L for item in found])
    torch.testing.assert_close(encode(codec, [representable(crystal, codec.model.grid) for crystal in crystals]), latents)
    for crystal, item in zip(crystals, decode(codec, latents, IDS[:8]), strict=True):
        assert item.crystal is not None
        assert item.crystal.formula == crystal.formula
        away_NN3 = crystal.frac_N3[:, None] - item.crystal.frac_N3  # in the cell and at the origin of its density
        away_NN3 -= away_NN3.round()
        assert np.linalg.norm(away_NN3 @ crystal.lattice_A, axis=-1).min(1).max() < 0.3


def test_samples_have_the_symmetry_that_their_latents_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(read_bundle(DATA / "models" / "mp_20")[0])

    def without_any() -> float:
        crystals = [item.decoded.crystal for item in samples(codec, IDS[:12], seed=0)]
        groups = [space_group(crystal, EXACT_A) for crystal in crystals if crystal is not None]
        return float(np.mean([group is None or group.number == 1 for group in groups]))

    assert without_any() < 0.5
    monkeypatch.setattr(generate, "HARDLY_FARTHER", 0.0)
    assert without_any() > 0.9


def test_the_first_samples_are_the_same_however_many_there_are(codec: Codec) -> None:
    assert torch.equal(sample_latents(codec, 5, seed=1), sample_latents(codec, 9, seed=1)[:5])
    assert sample_latents(codec, 0, seed=1).shape == (0, codec.model.model.latent_size)
