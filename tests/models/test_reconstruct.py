"""Codec: cells of mixed shapes, latents of no cell, windows and units, each with a crystal or a clear reason."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from small_models import ADAPTIVE, CUBE, ELEMENTS, PAPER, WIDE, WINDOW, make_model
from torch import Tensor

from dist_train.config import GridSpec
from dist_train.crystal.decode_box import NO_LATTICE
from dist_train.crystal.frames import grid_shape, placed
from dist_train.crystal.metrics import compare
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import Shape, voxelize
from dist_train.generate import reconstruct
from dist_train.models.autoencoder import CrystalAutoencoder, EstimateErrors, cell_numbers, composition_vector
from dist_train.models.reconstruct import Codec, calibrate
from dist_train.models.vae import Decoding, Numbers, shape_numbers

UNIT = GridSpec.model_validate({"preset": "paper-unit", "random_rotation": False})
COARSE_CUBE = CUBE.model_copy(update={"max_spacing_A": 0.7})
SITES = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]


def perovskite(*edges_A: float) -> Crystal:
    """BaTiO3 in a cell with right angles, off the voxels."""
    return Crystal(f"perovskite {edges_A}", np.diag(edges_A), np.array(SITES) + 0.03, np.array([56, 22, 8, 8, 8]))


CRYSTALS = [perovskite(4.0, 4.1, 7.5), perovskite(4.0, 4.2, 4.3), perovskite(3.9, 4.0, 7.6), perovskite(4.0, 4.0, 4.1)]


def oracle(monkeypatch: pytest.MonkeyPatch, grid: GridSpec, crystals: Sequence[Crystal]) -> Codec:
    """A codec whose networks know the answers: the first number of a latent is the place of its crystal."""
    codec = Codec(make_model(grid, PAPER))
    grids = [voxelize(crystal, grid) for crystal in crystals]
    cells = torch.from_numpy(cell_numbers(np.stack([crystal.lengths_angles for crystal in crystals])))
    compositions = torch.from_numpy(np.stack([composition_vector(crystal) for crystal in crystals]))[:, list(ELEMENTS)]
    counts = (compositions.sum(1).log() - codec.scale.count_mean) / codec.scale.count_std
    asked: list[int] = []

    def numbers(latent: Tensor) -> Numbers:
        place = latent[:, 0].long()
        shape = torch.cat([shape_numbers(grids[k].species_DHW.shape, cells[:1]) for k in place])
        return Numbers(codec.scale.cell(cells[place]), shape)

    def decode(latent: Tensor, shape: Shape) -> Decoding:
        asked[:] = latent[:, 0].long().tolist()
        chosen = [grids[place].density_CDHW for place in asked]
        assert all(density.shape[1:] == shape for density in chosen)
        density = codec.scale.density(torch.from_numpy(np.stack(chosen)))
        return Decoding(density, counts[asked], compositions[asked], *numbers(latent))

    def segment(decoding: Decoding) -> Tensor:
        species = torch.from_numpy(np.stack([grids[place].species_DHW for place in asked]))
        return 20.0 * torch.nn.functional.one_hot(codec.scale.class_of_z[species.long()], 4).movedim(-1, 1).float()

    monkeypatch.setattr(codec.model.decoder, "numbers", numbers)
    monkeypatch.setattr(codec.model, "decode", decode)
    monkeypatch.setattr(codec.model, "segment", segment)
    return codec


def latents(count: int) -> Tensor:
    return torch.arange(float(count))[:, None].expand(-1, PAPER.latent).contiguous()


def test_latents_of_mixed_shapes_are_those_of_each_crystal_alone() -> None:
    codec = Codec(make_model(ADAPTIVE))
    assert len({grid_shape(crystal.lattice_A, ADAPTIVE) for crystal in CRYSTALS}) == 2
    together = codec.encode(CRYSTALS)
    torch.testing.assert_close(together, torch.cat([codec.encode([crystal]) for crystal in CRYSTALS]), rtol=1e-4, atol=1e-5)
    assert torch.pdist(together).min() > 1e-3


def test_compositions_of_mixed_shapes_come_in_order_and_with_gradients() -> None:
    codec = Codec(make_model(ADAPTIVE, WIDE))
    latents = codec.encode(CRYSTALS).clone().requires_grad_()
    found, shapes = codec.composition(latents), codec.shapes(latents.detach())
    assert len(set(shapes)) > 1
    for place, shape in enumerate(shapes):
        assert not isinstance(shape, str)
        alone = codec.model.decode(latents[place : place + 1], shape).composition_BE
        torch.testing.assert_close(found[place : place + 1], alone)
    found[1].sum().backward()
    assert latents.grad is not None
    assert (latents.grad[1, :11] != 0).all()
    assert not latents.grad[[0, 2, 3]].any()
    assert codec.composition(torch.full_like(latents, 1e3)).isfinite().all()  # of no possible cell


def test_cells_of_mixed_shapes_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = oracle(monkeypatch, ADAPTIVE, CRYSTALS)
    found = codec.crystals(latents(4), [crystal.id for crystal in CRYSTALS])
    for true, decoded in zip(CRYSTALS, found, strict=True):
        assert decoded.crystal is not None, decoded.reason
        assert decoded.crystal.id == true.id
        metrics = compare(true, decoded.crystal)
        assert metrics.species_correct == 5
        assert metrics.position_error_A < 0.01
        assert metrics.length_error_A < 0.001


def test_an_estimate_counts_as_much_as_it_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that know all but the number of atoms, of which they say half as many again."""
    codec, usual, names = oracle(monkeypatch, ADAPTIVE, CRYSTALS), EstimateErrors(), [crystal.id for crystal in CRYSTALS]
    monkeypatch.setattr(codec, "encode", lambda crystals: latents(4)[[CRYSTALS.index(crystal) for crystal in crystals]])
    calibrate(codec, CRYSTALS)
    assert codec.model.estimate_errors == EstimateErrors(usual.atoms, usual.atoms, usual.composition)

    codec.scale.count_mean += np.log(1.5)
    shape = grid_shape(CRYSTALS[0].lattice_A, ADAPTIVE)
    assert codec.fields(latents(1), [shape])[0].estimate.atoms == pytest.approx(6.25, abs=0.05)  # as good as the integral
    calibrate(codec, CRYSTALS)
    errors = codec.model.estimate_errors
    assert errors is not None
    assert errors.atoms == pytest.approx(2.5, rel=1e-3)
    assert errors.integral == usual.atoms
    estimate = codec.fields(latents(1), [shape])[0].estimate
    assert estimate.atoms == pytest.approx(5.0, abs=0.05)
    assert estimate.atoms_error == pytest.approx(usual.atoms, rel=0.01)
    for crystal, decoded in zip(CRYSTALS, codec.crystals(latents(4), names), strict=True):
        assert compare(crystal, decoded.crystal).match
    again = CrystalAutoencoder.from_config(json.loads(json.dumps(codec.model.config())))
    assert again.estimate_errors == errors


def test_a_model_that_decodes_no_cell_is_calibrated_calmly() -> None:
    model = make_model(ADAPTIVE)
    with torch.no_grad():
        model.decoder.known.bias[:3] = 1e6  # logarithms of lengths
    calibrate(Codec(model), CRYSTALS)
    assert model.estimate_errors == EstimateErrors()


def test_what_nobody_measured_is_no_part_of_a_models_identity() -> None:
    model = make_model()
    assert "estimate_errors" not in model.config()
    calibrate(Codec(make_model(WINDOW)), CRYSTALS)  # windows are decoded without estimates


@pytest.mark.parametrize(
    ("cell", "shape", "reason"),
    [(0.0, 6.0, "voxels are decoded, at most"), (np.inf, 1.0, "no cell has the parameters")],
)
def test_a_latent_of_no_cell_has_a_reason_and_disturbs_no_other(
    monkeypatch: pytest.MonkeyPatch, cell: float, shape: float, reason: str
) -> None:
    codec = oracle(monkeypatch, ADAPTIVE, CRYSTALS)
    numbers = codec.model.decoder.numbers

    def spoilt(latent: Tensor) -> Numbers:
        found = numbers(latent)
        found.cell_B6[latent[:, 0] == 1] += cell
        found.shape_B3[latent[:, 0] == 1] = shape
        return found

    monkeypatch.setattr(codec.model.decoder, "numbers", spoilt)
    found = codec.crystals(latents(4), ["a", "b", "c", "d"])
    assert found[1].crystal is None
    assert reason in found[1].reason
    assert [decoded.crystal.id if decoded.crystal else "" for decoded in found] == ["a", "", "c", "d"]


def test_a_window_gives_the_crystal_whatever_the_decoded_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    true = perovskite(4.0, 4.0, 4.2)
    codec = oracle(monkeypatch, WINDOW, [placed(true, WINDOW)])
    nothing = Numbers(torch.full((1, 6), torch.nan), torch.zeros(1, 0))
    monkeypatch.setattr(codec.model.decoder, "numbers", lambda latent: nothing)
    (found,) = codec.crystals(latents(1), ["w"])
    assert found.crystal is not None, found.reason
    assert compare(true, found.crystal).match


def test_a_unit_is_a_failure_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = oracle(monkeypatch, UNIT, [placed(CRYSTALS[1], UNIT)])
    (found,) = codec.crystals(latents(1), ["u"])
    assert found.crystal is None
    assert found.reason == NO_LATTICE
    assert len(found.confidence_N) == 5


def test_a_unit_is_encoded_with_its_atoms_in_the_middle() -> None:
    codec = Codec(make_model(UNIT, PAPER))
    move = np.array([1.0, 0.3, -0.5])
    away = Crystal("away", CRYSTALS[1].lattice_A, CRYSTALS[1].frac_N3 + move, CRYSTALS[1].numbers_N)
    torch.testing.assert_close(codec.encode([away]), codec.encode([CRYSTALS[1]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [COARSE_CUBE, ADAPTIVE, WINDOW, UNIT], ids=["cube", "adaptive", "window", "unit"])
def test_an_untrained_model_fails_calmly_on_every_grid(grid: GridSpec) -> None:
    codec = Codec(make_model(grid))
    found = reconstruct(codec, [*CRYSTALS, perovskite(4.0, 4.0, 500.0)])
    assert len(found) == 5
    assert all(decoded.crystal is not None or decoded.reason for decoded in found)
