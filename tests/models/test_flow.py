"""The flow from noise to latents: it finds what a Gaussian can't say, and is a function of its seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_train.models.compositions import fit_compositions
from dist_train.models.flow import LatentFlow, Pairs, fit_flow
from dist_train.models.vae import Latent


@pytest.fixture(scope="module")
def rings() -> Tensor:
    """[1000, 4] points near a circle of radius sqrt(2) in the first two numbers, and small in the others."""
    angle = 2 * torch.pi * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    near = 0.05 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    return near + 2**0.5 * torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)


def exact(latents_NL: Tensor, atoms_NE: Tensor | None = None) -> Pairs:
    """Posteriors without a spread."""
    atoms_NE = torch.zeros(len(latents_NL), 0) if atoms_NE is None else atoms_NE
    return Pairs(Latent(latents_NL, torch.full_like(latents_NL, -100.0)), atoms_NE)


@pytest.fixture(scope="module")
def flow(rings: Tensor) -> LatentFlow:
    return fit_flow(exact(rings), None, width=64, depth=2, steps=800, seed=0)


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
    first = fit_flow(exact(rings), None, 16, 1, 20, seed=3).state_dict()
    torch.manual_seed(8)
    again, other = (fit_flow(exact(rings), None, 16, 1, 20, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["first.weight"], other["first.weight"])


def test_few_latents_are_enough_to_fit_something() -> None:
    for n in (1, 5, 12):
        assert fit_flow(exact(torch.zeros(n, 3)), None, 8, 1, 5, seed=0).carry(torch.randn(2, 3)).isfinite().all()


def test_the_error_that_is_told_falls(rings: Tensor) -> None:
    told: list[float] = []
    fit_flow(exact(rings), None, 32, 1, 200, seed=0, progress=told.append)
    assert len(told) == 200
    assert told[-1] < 0.8 * told[10]


def test_latents_have_the_spread_of_their_posteriors() -> None:
    posteriors = Latent(torch.zeros(500, 3), torch.tensor([0.0, -4.0, -20.0]).repeat(500, 1))
    flow = fit_flow(Pairs(posteriors, torch.zeros(500, 0)), None, 64, 2, 400, seed=0)
    found = flow.carry(torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))).std(0)
    assert found[0] == pytest.approx(1.0, rel=0.15)
    assert found[1] == pytest.approx(0.135, rel=0.4)
    assert found[2] < 0.1


def test_a_flow_makes_the_latents_of_the_atoms_that_it_is_told_of() -> None:
    """Two kinds of crystals on either side of the mean, and back from its config."""
    atoms = torch.tensor([[1.0, 2.0], [4.0, 0.0]]).repeat(300, 1)
    side = torch.tensor([1.0, -1.0]).repeat(300)[:, None]
    latents = side * torch.tensor([1.4, 0.2, 0.0]) + 0.05 * torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    flow = fit_flow(exact(latents, atoms), fit_compositions(atoms, [3, 8], 50, seed=0), 32, 1, 800, seed=0)
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(1))
    found = flow.carry(noise, atoms)
    assert (found[:, 0] * side[:, 0] > 0).float().mean() > 0.98
    again = LatentFlow.from_config(3, [3, 8], flow.config()).eval()
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.carry(noise, atoms), found)
