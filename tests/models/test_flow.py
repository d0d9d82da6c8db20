"""The flow from noise to latents: it finds what a Gaussian can't say, and is a function of its seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_train.models.flow import LatentFlow, fit_flow


@pytest.fixture(scope="module")
def rings() -> Tensor:
    """[1000, 4] points near a circle of radius sqrt(2) in the first two numbers, and small in the others."""
    angle = 2 * torch.pi * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    near = 0.05 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    return near + 2**0.5 * torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)


@pytest.fixture(scope="module")
def flow(rings: Tensor) -> LatentFlow:
    return fit_flow(rings, width=64, depth=2, steps=800, seed=0)


def test_samples_lie_where_the_latents_lie(flow: LatentFlow) -> None:
    """A Gaussian of the same moments is at home in the middle, where no latent is."""
    noise = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    found = flow.carry(noise)

    def near(points: Tensor) -> float:
        return float(((points[:, :2].norm(dim=1) - 2**0.5).abs() < 0.3).float().mean())

    assert near(found) > 0.8 > 0.5 > near(noise)
    assert found[:, 2:].std() < 0.15
    quarters = torch.bincount((found[:, 0] > 0).long() + 2 * (found[:, 1] > 0).long(), minlength=4)
    assert quarters.min() > 75


def test_same_seed_same_flow_whatever_was_drawn_before(rings: Tensor) -> None:
    torch.manual_seed(7)
    first = fit_flow(rings, 16, 1, 20, seed=3).state_dict()
    torch.manual_seed(8)
    again, other = (fit_flow(rings, 16, 1, 20, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])


def test_few_latents_are_enough_to_fit_something() -> None:
    for n in (1, 5, 12):
        assert fit_flow(torch.zeros(n, 3), 8, 1, 5, seed=0).carry(torch.randn(2, 3)).isfinite().all()


def test_the_error_that_is_told_falls(rings: Tensor) -> None:
    told: list[float] = []
    fit_flow(rings, 32, 1, 200, seed=0, progress=told.append)
    assert len(told) == 200
    assert told[-1] < 0.8 * told[10]
