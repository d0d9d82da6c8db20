"""How often crystals are made of which atoms, learnt from the compositions of the training crystals.

Samples are drawn from it first, and latents of such crystals then (see `models.flow`): which elements go together, and how
many of each, is a matter of whole numbers, which a flow from noise to latents blurs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.crystal.elements import ELECTRONEGATIVITY_ORDER
from dist_train.models.fitting import Fit, split

WIDTH, DROPOUT = 256, 0.2
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 2e-3, 0.05
CHECKED = 4096
"""Compositions that weren't fitted, of which the error is a mean, at most."""
USUAL_ATOMS = 4.0
"""Atoms of an element that a network is told as 1."""
NEVER = -1e9
"""Logarithm of a probability that is 0."""


class CompositionModel(nn.Module):
    """p(atoms of each element [B, E]): how many atoms in all, as often as they occur; then one element after the other, by
    rising electronegativity, and how many of each, until all atoms have their element.

    elements: atomic numbers of the columns. most_elements, most_atoms: in a crystal, and of an element in it. temperature:
    of draws; below 1, what is likely is drawn more often than it occurs.
    """

    order: Tensor
    log_share: Tensor

    def __init__(self, elements: Sequence[int], most_elements: int, most_atoms: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.most_elements, self.most_atoms, self.temperature = most_elements, most_atoms, temperature
        n = len(elements)
        order = torch.tensor([ELECTRONEGATIVITY_ORDER[z] for z in elements]).argsort()
        self.register_buffer("order", order, persistent=False)
        largest = min(most_elements, n) * most_atoms
        self.register_buffer("log_share", torch.tensor([NEVER] + [-log(largest)] * largest))
        self.element = _network(2 * n + 2, n)
        self.number = _network(3 * n + 2, most_atoms)

    def config(self) -> dict[str, Any]:
        """As part of a flow's config: everything but the weights and the elements."""
        return {"compositions": {name: getattr(self, name) for name in ("most_elements", "most_atoms", "temperature")}}

    @classmethod
    def from_config(cls, elements: Sequence[int], config: dict[str, Any]) -> CompositionModel | None:
        """Inverse of `config`, with fresh weights; None where a flow has none."""
        told = config.get("compositions")
        return cls(elements, **told) if told else None

    def count(self, atoms_NE: Tensor) -> None:
        """Take the shares of numbers of atoms in all from these compositions."""
        totals = torch.bincount(atoms_NE.sum(1).long(), minlength=len(self.log_share))
        self.log_share.copy_((totals / totals.sum()).log().clamp_min(NEVER))

    def log_prob(self, atoms_BE: Tensor) -> Tensor:
        """[B] logarithm of the probability. The atoms are within `most_elements` and `most_atoms`."""
        x = atoms_BE[:, self.order]
        rank, all_B = (x > 0).cumsum(1) - 1, x.sum(1)
        total = self.log_share[all_B.long()]
        for k in range(self.most_elements):
            here = (x > 0) & (rank == k)
            rows = here.any(1).nonzero()[:, 0]
            before = torch.where(rank < k, x, 0.0)[rows]
            left = all_B[rows] - before.sum(1)
            element = here[rows].float().argmax(1)
            of_element = self._next(before, left, k).log_softmax(1).gather(1, element[:, None])
            many = x[rows, element].long() - 1
            of_number = self._many(before, left, element, k).log_softmax(1).gather(1, many[:, None])
            total = total.index_add(0, rows, (of_element + of_number)[:, 0])
        return total

    @torch.inference_mode()
    def draw(self, uniform_BK2: Tensor) -> Tensor:
        """[B, E] atoms for numbers from 0 to 1 [B, most_elements + 1, 2]; the same for the same numbers."""
        x = uniform_BK2.new_zeros(len(uniform_BK2), len(self.order))
        left = _chosen(self.log_share.expand(len(x), -1), uniform_BK2[:, self.most_elements, 0]).to(x)
        for k in range(self.most_elements):
            rows = (left > 0).nonzero()[:, 0]
            element = _chosen(self._next(x[rows], left[rows], k) / self.temperature, uniform_BK2[rows, k, 0])
            numbers = self._many(x[rows], left[rows], element, k) / self.temperature
            many = 1.0 + _chosen(numbers, uniform_BK2[rows, k, 1])
            x[rows, element] = many
            left[rows] -= many
        return torch.zeros_like(x).index_copy(1, self.order, x)

    def _told(self, x_BE: Tensor, left_B: Tensor) -> Tensor:
        numbers = torch.stack([x_BE.sum(1), left_B], dim=1)
        return torch.cat([x_BE / USUAL_ATOMS, (x_BE > 0).float(), numbers / (2 * USUAL_ATOMS)], dim=1)

    def _room(self, place: Tensor, k: int) -> Tensor:
        """Atoms that elements after the one at a place, the k-th of the crystal, can have."""
        return (len(self.order) - 1 - place).clamp(max=self.most_elements - 1 - k) * self.most_atoms

    def _next(self, x_BE: Tensor, left_B: Tensor, k: int) -> Tensor:
        """[B, E] logits of the next element, after k of them, where so many atoms are left."""
        logits: Tensor = self.element(self._told(x_BE, left_B))
        places = torch.arange(len(self.order), device=x_BE.device)
        last = torch.where(x_BE > 0, places, -1).amax(1, keepdim=True)
        barred = (places <= last) | (left_B[:, None] > self._room(places, k) + self.most_atoms)
        return logits.masked_fill(barred, NEVER)

    def _many(self, x_BE: Tensor, left_B: Tensor, element_B: Tensor, k: int) -> Tensor:
        """[B, most_atoms] logits of how many atoms there are of an element, the k-th, of those left."""
        one = nn.functional.one_hot(element_B, len(self.order)).to(x_BE)
        logits: Tensor = self.number(torch.cat([self._told(x_BE, left_B), one], dim=1))
        after = left_B[:, None] - torch.arange(1, self.most_atoms + 1, device=x_BE.device)
        return logits.masked_fill((after < 0) | (after > self._room(element_B, k)[:, None]), NEVER)


def _network(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (n_in, WIDTH):
        layers += [nn.Linear(width, WIDTH), nn.SiLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, n_out))


def _chosen(logits_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] where each number from 0 to 1 falls among the probabilities; never where that is 0."""
    upto = logits_BN.double().softmax(1).cumsum(1)
    return (upto <= uniform_B[:, None] * upto[:, -1:]).sum(1)


def fit_compositions(
    atoms_NE: Tensor, elements: Sequence[int], steps: int, seed: int, progress: Callable[[float], None] = lambda error: None,
    temperature: float = 1.0,
) -> CompositionModel:  # fmt: skip
    """The model of compositions [N, E], by columns `elements`; see `Fit.run` for when it stops.

    progress(error): one more step is done; the latest error, in nats a crystal.
    """
    generator = torch.Generator().manual_seed(seed)
    held, fitted = split(len(atoms_NE), generator)
    checked = atoms_NE[held[:CHECKED]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        most = int((atoms_NE > 0).sum(1).max()), int(atoms_NE.max())
        model = CompositionModel(elements, *most, temperature).to(atoms_NE.device)
        model.count(atoms_NE)

        def loss() -> Tensor:
            rows = fitted[torch.randint(len(fitted), (BATCH,), generator=generator)]
            value: Tensor = -model.log_prob(atoms_NE[rows]).mean()
            return value

        def error(average: CompositionModel) -> float:
            return -float(average.log_prob(checked).mean())

        return Fit(LEARNING_RATE, WEIGHT_DECAY, steps).run(model, loss, error, progress)
