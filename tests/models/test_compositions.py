"""Compositions drawn as the training crystals have them: a true distribution, and a function of its seed and numbers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dist_train.crystal.elements import ELECTRONEGATIVITY_ORDER, MAX_Z, NUMBERS
from dist_train.models.compositions import CompositionModel, fit_compositions

ELEMENTS = [8, 11, 16]
"""Columns; sodium comes first by electronegativity."""


@pytest.fixture(scope="module")
def oxides() -> Tensor:
    """[600, 3] of sodium oxide, sulfide and peroxide, three, two and one sixth of them."""
    kinds = [[1.0, 2.0, 0.0]] * 3 + [[0.0, 2.0, 1.0]] * 2 + [[2.0, 2.0, 0.0]]
    return torch.tensor(kinds * 100)


@pytest.fixture(scope="module")
def model(oxides: Tensor) -> CompositionModel:
    return fit_compositions(oxides, ELEMENTS, 300, seed=0)


def uniform(n: int, model: CompositionModel, seed: int = 0) -> Tensor:
    return torch.rand(n, model.most_elements + 1, 2, generator=torch.Generator().manual_seed(seed))


def test_every_element_has_its_place_by_electronegativity() -> None:
    assert sorted(ELECTRONEGATIVITY_ORDER) == list(range(1, MAX_Z + 1))
    assert sorted(ELECTRONEGATIVITY_ORDER.values()) == list(range(MAX_Z))
    ranked = [ELECTRONEGATIVITY_ORDER[NUMBERS[symbol]] for symbol in ("Cs", "Na", "Fe", "S", "O", "F")]
    assert ranked == sorted(ranked)


@pytest.mark.parametrize("trained", [True, False])
def test_probabilities_of_all_compositions_add_up_to_one(model: CompositionModel, trained: bool) -> None:
    if not trained:
        model = CompositionModel(ELEMENTS, 2, 2).eval()
    every = [
        row for row in product(range(model.most_atoms + 1), repeat=3) if 0 < sum(n > 0 for n in row) <= model.most_elements
    ]
    with torch.inference_mode():
        total = model.log_prob(torch.tensor(every).float()).double().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_draws_are_as_frequent_as_they_were_and_as_the_model_says(model: CompositionModel, oxides: Tensor) -> None:
    drawn = model.draw(uniform(6000, model))
    for kind, share in zip(oxides[[0, 3, 5]], (3 / 6, 2 / 6, 1 / 6), strict=True):
        found = float((drawn == kind).all(1).float().mean())
        with torch.inference_mode():
            assert found == pytest.approx(float(model.log_prob(kind[None]).exp()), abs=0.02)
        assert found == pytest.approx(share, abs=0.1)


def test_crystals_have_as_many_atoms_as_those_that_were_learnt(model: CompositionModel, oxides: Tensor) -> None:
    totals = torch.bincount(model.draw(uniform(3000, model)).sum(1).long(), minlength=5) / 3000
    known = torch.bincount(oxides.sum(1).long(), minlength=5) / len(oxides)
    assert totals[known == 0].sum() == 0
    assert torch.allclose(totals, known, atol=0.03)


def test_a_low_temperature_draws_likely_compositions_more_often(oxides: Tensor) -> None:
    usual, cold = (fit_compositions(oxides, ELEMENTS, 300, seed=0, temperature=t) for t in (1.0, 0.2))
    numbers = uniform(3000, usual)
    oxide, sulfide = (
        [float((model.draw(numbers) == oxides[place]).all(1).float().mean()) for model in (usual, cold)] for place in (0, 3)
    )
    assert oxide[1] > oxide[0] + 0.05  # of 3 atoms both, and the oxide is the likelier one
    assert sulfide[1] < sulfide[0] - 0.05


def test_a_draw_hangs_on_its_own_numbers_alone(model: CompositionModel) -> None:
    numbers = uniform(64, model)
    assert torch.equal(model.draw(numbers)[:7], model.draw(numbers[:7]))
    assert not torch.equal(model.draw(numbers), model.draw(uniform(64, model, seed=1)))


def test_the_ends_of_the_unit_interval_give_compositions_too(model: CompositionModel) -> None:
    for value in (0.0, 1.0 - 2**-24):
        drawn = model.draw(torch.full((4, model.most_elements + 1, 2), value))
        assert (drawn.sum(1) >= 1).all()
        assert (drawn <= model.most_atoms).all()


def test_same_seed_same_model(oxides: Tensor) -> None:
    first, again, other = (fit_compositions(oxides, ELEMENTS, 20, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["element.0.weight"], other["element.0.weight"])


def test_one_composition_is_enough() -> None:
    model = fit_compositions(torch.tensor([[6.0]]), [6], 5, seed=0)
    drawn = model.draw(uniform(20, model))
    assert ((drawn >= 1) & (drawn <= 6)).all()
