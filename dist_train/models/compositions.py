"""How often crystals are made of which atoms, learnt from the compositions of the training crystals.

Samples are drawn from it first, and latents of such crystals then (see `models.flow`): which elements go together, and how
many of each, is a matter of whole numbers, which a flow from noise to latents blurs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class CompositionModel(nn.Module):
    """p(atoms of each element [B, E]): one element after the other, by rising electronegativity, and how many of each.

    elements: atomic numbers of the columns. most_elements, most_atoms: in a crystal, and of an element in it.
    """

    order: Tensor

    def __init__(self, elements: Sequence[int], most_elements: int, most_atoms: int) -> None:
        super().__init__()
        self.most_elements, self.most_atoms = most_elements, most_atoms
        n = len(elements)
        order = torch.tensor([ELECTRONEGATIVITY_ORDER[z] for z in elements]).argsort()
        self.register_buffer("order", order, persistent=False)
        self.element = _network(2 * n + 1, n + 1)  # or the end
        self.number = _network(3 * n + 1, most_atoms)

    def log_prob(self, atoms_BE: Tensor) -> Tensor:
        """[B] logarithm of the probability. The atoms are within `most_elements` and `most_atoms`."""
        x, n = atoms_BE[:, self.order], len(self.order)
        rank = (x > 0).cumsum(1) - 1
        total = x.new_zeros(len(x))
        for k in range(self.most_elements + 1):
            before = torch.where(rank < k, x, 0.0)
            here = (x > 0) & (rank == k)
            there = here.any(1)
            next_B = torch.where(there, here.float().argmax(1), n)
            of_element = self._next(before, k).log_softmax(1).gather(1, next_B[:, None])[:, 0]
            total = total + torch.where((x > 0).sum(1) >= k, of_element, 0.0)
            rows = there.nonzero()[:, 0]
            of_number = self._many(before[rows], next_B[rows]).log_softmax(1)
            many = x[rows, next_B[rows]].long() - 1
            total = total.index_add(0, rows, of_number.gather(1, many[:, None])[:, 0])
        return total

    @torch.inference_mode()
    def draw(self, uniform_BK2: Tensor) -> Tensor:
        """[B, E] atoms for numbers from 0 to 1 [B, most_elements + 1, 2]; the same for the same numbers."""
        n = len(self.order)
        x = uniform_BK2.new_zeros(len(uniform_BK2), n)
        for k in range(self.most_elements):
            chosen = _chosen(self._next(x, k), uniform_BK2[:, k, 0])
            rows = (chosen < n).nonzero()[:, 0]
            many = _chosen(self._many(x[rows], chosen[rows]), uniform_BK2[rows, k, 1])
            x[rows, chosen[rows]] = 1.0 + many
        return torch.zeros_like(x).index_copy(1, self.order, x)

    def _told(self, x_BE: Tensor) -> Tensor:
        return torch.cat([x_BE / USUAL_ATOMS, (x_BE > 0).float(), x_BE.sum(1, keepdim=True) / (2 * USUAL_ATOMS)], dim=1)

    def _next(self, x_BE: Tensor, k: int) -> Tensor:
        """[B, E + 1] logits of the next element, after k of them or fewer, and of there being none."""
        n = len(self.order)
        logits: Tensor = self.element(self._told(x_BE))
        places = torch.arange(n, device=x_BE.device)
        last = torch.where(x_BE > 0, places, -1).amax(1)
        barred = torch.zeros_like(logits, dtype=torch.bool)
        barred[:, :n] = (places <= last[:, None]) | (k >= self.most_elements) | ((x_BE > 0).sum(1) < k)[:, None]
        barred[:, n] = k == 0
        return logits.masked_fill(barred, -1e9)

    def _many(self, x_BE: Tensor, element_B: Tensor) -> Tensor:
        """[B, most_atoms] logits of how many atoms there are of an element."""
        one = nn.functional.one_hot(element_B, len(self.order)).to(x_BE)
        logits: Tensor = self.number(torch.cat([self._told(x_BE), one], dim=1))
        return logits


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
    atoms_NE: Tensor, elements: Sequence[int], steps: int, seed: int, progress: Callable[[float], None] = lambda error: None
) -> CompositionModel:
    """The model of compositions [N, E], by columns `elements`; see `Fit.run` for when it stops.

    progress(error): one more step is done; the latest error, in nats a crystal.
    """
    generator = torch.Generator().manual_seed(seed)
    held, fitted = split(len(atoms_NE), generator)
    checked = atoms_NE[held[:CHECKED]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CompositionModel(elements, int((atoms_NE > 0).sum(1).max()), int(atoms_NE.max())).to(atoms_NE.device)

        def loss() -> Tensor:
            rows = fitted[torch.randint(len(fitted), (BATCH,), generator=generator)]
            value: Tensor = -model.log_prob(atoms_NE[rows]).mean()
            return value

        def error(average: CompositionModel) -> float:
            return -float(average.log_prob(checked).mean())

        return Fit(LEARNING_RATE, WEIGHT_DECAY, steps).run(model, loss, error, progress)
