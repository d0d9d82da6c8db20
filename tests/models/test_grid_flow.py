"""The flow to latents with a grid: waves that all shapes share, the vector first, and a function of its seed."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

from dist_train.crystal.voxelize import Shape
from dist_train.models.compositions import fit_compositions
from dist_train.models.flow import Pairs
from dist_train.models.grid_flow import GridFlow, fit_grid_flow
from dist_train.models.vae import Latent

SHAPES: list[Shape] = [(2, 2, 2), (1, 2, 4)]
VECTOR, CHANNELS, MOST = 3, 2, 8
ELEMENTS = [3, 8]


def field(shape: Shape, height: float) -> Tensor:
    """[CHANNELS * voxels] a cosine along the last axis in the first channel, a constant in the second."""
    d, h, w = shape
    along = (2 * torch.pi * torch.arange(w) / w).cos().expand(d, h, w)
    return torch.cat([height * along.flatten(), torch.full((d * h * w,), height)])


@pytest.fixture(scope="module")
def crystals() -> tuple[Pairs, list[Shape]]:
    """600 crystals of two kinds. The atoms say which grid there is, the vector how high its field."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(600) % 2
    atoms = torch.tensor([[1.0, 2.0], [4.0, 0.0]])[kinds]
    heights = torch.rand(600, generator=generator) + 0.5
    shapes = [SHAPES[kind] for kind in kinds.tolist()]
    latents = torch.zeros(600, VECTOR + CHANNELS * MOST)
    latents[:, 0], latents[:, 1] = heights, 2.0 * kinds - 1.0
    for row, shape, height in zip(latents, shapes, heights.tolist(), strict=True):
        row[VECTOR : VECTOR + CHANNELS * prod(shape)] = field(shape, height)
    # Spreads that would hide all: the flow is to lead to the means.
    return Pairs(Latent(latents, torch.zeros_like(latents)), atoms), shapes


@pytest.fixture(scope="module")
def flow(crystals: tuple[Pairs, list[Shape]]) -> GridFlow:
    pairs, shapes = crystals
    known = fit_compositions(pairs.atoms_NE, ELEMENTS, 50, seed=0)
    return fit_grid_flow(pairs, shapes, VECTOR, CHANNELS, known, 64, 2, 600, seed=0)


def coarse(vector_BV: Tensor) -> list[Shape]:
    return [SHAPES[int(says > 0)] for says in vector_BV[:, 1]]


def test_grids_come_out_on_the_shape_and_of_the_height_that_the_vector_says(
    flow: GridFlow, crystals: tuple[Pairs, list[Shape]]
) -> None:
    atoms = crystals[0].atoms_NE[:100]
    noise = torch.randn(100, VECTOR + CHANNELS * MOST, generator=torch.Generator().manual_seed(1))
    found = flow.carry(noise, atoms, coarse)
    shapes = coarse(found[:, :VECTOR])
    assert shapes == [SHAPES[place % 2] for place in range(100)]
    assert 0.2 < found[:, 0].std() < 0.4  # uniform between 0.5 and 1.5: 0.29
    errors = []
    for row, shape in zip(found, shapes, strict=True):
        end = VECTOR + CHANNELS * prod(shape)
        errors.append((row[VECTOR:end] - field(shape, float(row[0]))).abs().max())
        assert not row[end:].any()
    assert torch.stack(errors).median() < 0.12


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 4, 4), (3, 3, 7), (2, 2, 16), (5, 2, 6), (1, 2, 32)])
def test_waves_say_all_of_a_grid_and_noise_stays_noise(flow: GridFlow, shape: Shape) -> None:
    known = flow.compositions
    assert known is not None
    flow = GridFlow(VECTOR, CHANNELS, [(4, 4, 4), shape], 8, 1, known)
    voxels = torch.randn(CHANNELS * prod(shape), generator=torch.Generator().manual_seed(2))
    waves = flow.to_waves(voxels, shape)
    assert torch.allclose(flow.to_voxels(waves, shape), voxels, atol=1e-5)
    assert float(waves.norm()) == pytest.approx(float(voxels.norm()), rel=1e-5)
    assert not (waves * (1 - flow.there(shape))).any()
    assert flow.there(shape).sum() == len(voxels)


def test_a_field_has_the_same_waves_on_every_grid_that_holds_it(flow: GridFlow) -> None:
    """Over the root of the number of voxels, which is about the same for all grids of a model."""
    known = flow.compositions
    assert known is not None
    shapes: list[Shape] = [(3, 3, 4), (2, 5, 6), (1, 1, 5)]
    flow = GridFlow(VECTOR, CHANNELS, shapes, 8, 1, known)
    waves = [flow.to_waves(field(shape, 1.0), shape) / prod(shape) ** 0.5 for shape in shapes]
    assert waves[0].abs().max() > 0.5
    for other in waves[1:]:
        assert torch.allclose(other, waves[0], atol=1e-6)


def test_a_grid_that_was_never_seen_is_drawn_from_the_waves_that_are_known(flow: GridFlow) -> None:
    strange: Shape = (1, 1, 8)
    voxels = torch.randn(CHANNELS * 8, generator=torch.Generator().manual_seed(3))
    smooth = flow.to_voxels(flow.to_waves(voxels, strange), strange)
    assert 0 < smooth.norm() < voxels.norm()
    assert torch.allclose(flow.to_voxels(flow.to_waves(smooth, strange), strange), smooth, atol=1e-5)
    noise = torch.randn(4, VECTOR + CHANNELS * MOST)
    assert flow.carry(noise, torch.tensor([[1.0, 2.0]]).expand(4, 2), lambda vector: [strange] * 4).isfinite().all()


def test_same_seed_same_flow_and_back_from_its_config(flow: GridFlow, crystals: tuple[Pairs, list[Shape]]) -> None:
    pairs, shapes = crystals
    known = flow.compositions
    assert known is not None
    fit = partial(fit_grid_flow, pairs, shapes, VECTOR, CHANNELS, known, 16, 1, 10)
    first, again, other = (fit(seed=seed) for seed in (3, 3, 4))
    for part in ("vector.first.weight", "grid.first.weight", "grid.last.weight"):
        assert torch.equal(first.state_dict()[part], again.state_dict()[part])
        assert not torch.equal(first.state_dict()[part], other.state_dict()[part])
    back = GridFlow.from_config(VECTOR, ELEMENTS, flow.config()).eval()
    back.load_state_dict(flow.state_dict())
    noise, atoms = torch.randn(6, VECTOR + CHANNELS * MOST), pairs.atoms_NE[:6]
    assert torch.equal(back.carry(noise, atoms, coarse), flow.carry(noise, atoms, coarse))
