"""Crystals decoded, encoded again and corrected: nearer to their latents, so to the true crystals, and told where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_train import generate
from dist_train.commands.models import read_crystals
from dist_train.crystal.cif import write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import grid_shape, representable
from dist_train.crystal.metrics import compare
from dist_train.crystal.structure import Crystal
from dist_train.generate import FAR, decode, encode
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def perovskites() -> tuple[Codec, list[Crystal]]:
    return known("perov_5", "perov_5_test_half_a", 24)


@pytest.fixture(scope="module")
def cells() -> tuple[Codec, list[Crystal]]:
    """Of the Materials Project, on grids of many shapes."""
    return known("mp_20", "mp_20_val_2000", 20)


def known(model: str, table: str, n: int) -> tuple[Codec, list[Crystal]]:
    codec = Codec(read_bundle(DATA / "models" / model)[0])
    crystals = read_crystals([str(DATA / "benchmarks" / f"{table}.parquet")], codec.model.grid)[:n]
    return codec, [representable(crystal, codec.model.grid) for crystal in crystals]


def decoded(codec: Codec, latents: Tensor, corrections: int, workers: int = 1) -> list[Decoded]:
    return list(decode(codec, latents, [f"{place}" for place in range(len(latents))], workers, corrections=corrections))


@pytest.mark.parametrize(("of", "better"), [("perovskites", 0.7), ("cells", 0.5)])
def test_corrected_crystals_are_nearer_to_the_true_ones(of: str, better: float, request: pytest.FixtureRequest) -> None:
    codec, crystals = request.getfixturevalue(of)
    latents = encode(codec, crystals)
    plain, many = (
        [compare(crystal, item.crystal) for crystal, item in zip(crystals, decoded(codec, latents, turns), strict=True)]
        for turns in (0, 16)
    )
    assert sum(pair.match for pair in many) >= sum(pair.match for pair in plain)
    both = [place for place in range(len(crystals)) if plain[place].match and many[place].match]
    error, after = (np.median([pairs[place].position_error_A for place in both]) for pairs in (plain, many))
    assert after < better * error


def test_the_error_of_a_latent_is_that_of_the_crystal_encoded_again(cells: tuple[Codec, list[Crystal]]) -> None:
    codec, crystals = cells
    latents = encode(codec, crystals[:10])
    first, found = decoded(codec, latents, 0), decoded(codec, latents, 16)
    of_first = codec.posterior([item.crystal for item in first if item.crystal is not None])
    again = codec.posterior([item.crystal for item in found if item.crystal is not None])
    errors = ((again.mean - latents).square() / of_first.log_variance.exp()).mean(1).sqrt()
    before = ((of_first.mean - latents).square() / of_first.log_variance.exp()).mean(1).sqrt()
    assert [item.latent_error for item in first] == [None] * 10
    assert [item.latent_error for item in found] == pytest.approx(errors.tolist(), rel=1e-3, abs=1e-4)
    assert (errors <= before + 1e-4).all()
    assert errors.median() < 0.4 * before.median()
    # More turns leave the best of fewer.
    turns = [[item.latent_error for item in decoded(codec, latents, n)] for n in (1, 2, 4)]
    for fewer, more in pairwise([*turns, [item.latent_error for item in found]]):
        assert all(a is not None and b is not None and b <= a for a, b in zip(fewer, more, strict=True))


def test_a_crystal_far_from_its_latent_is_said_to_be_far(perovskites: tuple[Codec, list[Crystal]]) -> None:
    """A decoder told of atoms that the latent doesn't mean makes another crystal, whatever is corrected."""
    codec, crystals = perovskites
    atoms = torch.zeros(len(crystals), len(codec.model.elements))
    for row, crystal in enumerate(crystals):
        for z, count in crystal.composition.items():
            atoms[row, codec.model.elements.index(z)] = count
    latents, ids = encode(codec, crystals), [crystal.id for crystal in crystals]
    right, wrong = (
        list(decode(codec, latents, ids, atoms_NE=told, corrections=3)) for told in (atoms, atoms.roll(1, dims=0))
    )
    assert all(item.latent_error is not None and item.latent_error < FAR for item in right)
    others = [a.composition != b.composition for a, b in zip(crystals, [crystals[-1], *crystals])]
    assert all(item.latent_error is None or item.latent_error > FAR for item, other in zip(wrong, others) if other)


def test_the_bits_hang_on_nothing_but_the_latent(
    cells: tuple[Codec, list[Crystal]], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, crystals = cells
    latents, told = encode(codec, crystals[:10]), list[int]()
    ids = [f"{place}" for place in range(len(latents))]
    found = list(decode(codec, latents, ids, corrections=5, progress=told.append))
    assert sum(told) == 10
    monkeypatch.setattr(generate, "CORRECTED", 3)
    for others in (decoded(codec, latents, 5), decoded(codec, latents, 5, workers=2)):
        for item, other in zip(found, others, strict=True):
            assert item.crystal is not None and other.crystal is not None
            assert write_cif(item.crystal) == write_cif(other.crystal)
            assert item.latent_error == other.latent_error
    (alone,) = decoded(codec, latents[7:8], 5)
    assert alone.latent_error == found[7].latent_error


def test_latents_of_no_crystal_keep_their_reasons(perovskites: tuple[Codec, list[Crystal]]) -> None:
    codec, crystals = perovskites
    latents = encode(codec, crystals[:3])
    latents[0] += 1e6
    latents[2] = torch.nan
    plain, found = decoded(codec, latents, 0), decoded(codec, latents, 4)
    assert [item.reason for item in found] == [item.reason for item in plain]
    assert [item.crystal is None for item in found] == [True, False, True]
    assert [item.latent_error is None for item in found] == [True, False, True]
    assert [item.reason for item in decoded(codec, latents[[0, 2]], 4)] == [plain[0].reason, plain[2].reason]
    assert decoded(codec, latents[:0], 4) == []


def test_a_cell_decoded_beyond_the_limit_of_its_grid_is_encoded_on_that_grid(cells: tuple[Codec, list[Crystal]]) -> None:
    """Cells whose longest edge is a hair shorter than what takes four voxels more."""
    codec, crystals = cells
    step_A = codec.model.grid.multiple * codec.model.grid.max_spacing_A
    scaled = []
    for crystal in crystals:
        edge = np.linalg.norm(crystal.lattice_A, axis=1).max()
        limit = step_A * round(edge / step_A)
        if abs(limit / edge - 1) < 0.06:
            scaled.append(replace(crystal, lattice_A=crystal.lattice_A * (limit * (1 - 1e-6) / edge)))
    latents = encode(codec, scaled)
    shapes = [grid_shape(crystal.lattice_A, codec.model.grid) for crystal in scaled]
    beyond = [
        item.crystal is not None and grid_shape(item.crystal.lattice_A, codec.model.grid) != shape
        for item, shape in zip(decoded(codec, latents, 0), shapes, strict=True)
    ]
    assert any(beyond)
    found = decoded(codec, latents, 4)
    assert all(item.latent_error is not None and item.latent_error < 0.3 for item in found)


def test_a_turn_that_leads_away_leaves_the_nearest_crystal(
    perovskites: tuple[Codec, list[Crystal]], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, crystals = perovskites
    latents = encode(codec, crystals)

    def away(turns: Sequence[tuple[Tensor, Tensor]], precision_L: Tensor) -> Tensor:
        told_L, lack_L = turns[-1]
        return told_L + (1.0 if len(turns) == 1 else -20.0) * lack_L

    monkeypatch.setattr(generate, "_extrapolated", away)
    once, twice = ([item.latent_error for item in decoded(codec, latents, turns)] for turns in (1, 2))
    assert once == twice


def test_what_is_linear_in_two_directions_is_right_in_the_fourth_turn() -> None:
    """A decoder that is off by a matrix of rank two: two differences of turns tell all of it."""
    generator = torch.Generator().manual_seed(0)
    off = torch.randn(30, 2, generator=generator) @ torch.randn(2, 30, generator=generator) / 40
    latent, precision = torch.randn(30, generator=generator), 1 + torch.rand(30, generator=generator)
    turns, told = [], latent
    for _ in range(4):
        turns.append((told, lack := latent - (told + off @ told)))
        told = generate._extrapolated(turns[-3:], precision)
    assert lack.norm() < 1e-4 * (off @ latent).norm()


def test_turns_that_change_nothing_lead_nowhere_far() -> None:
    told, lack = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    found = generate._extrapolated([(told, lack), (told + lack, lack), (told + 2 * lack, lack)], torch.ones(8))
    assert torch.allclose(found, told + 3 * lack)
