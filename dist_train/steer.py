"""Latents of crystals with wanted properties or atoms, and moves along a property's direction.

A network that reads latents is easily told what it wants to hear: a gradient finds a latent near by of which it says
anything, and the decoder makes the old crystal of it. So latents begin at samples that are near to what is wanted already,
gradient steps don't take them far, and each is judged by the crystal that it decodes to, encoded again: from there the next
round begins, and the best crystals of all rounds are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import inf

import torch
from torch import Tensor

from dist_train.crystal.elements import NUMBERS, SYMBOLS
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, ModelError
from dist_train.generate import Returned, draw, returned
from dist_train.models.properties import PropertyHeads
from dist_train.models.reconstruct import Codec

POOL, CANDIDATES, ROUNDS = 64, 4, 4
"""Samples drawn, and latents that are steered, for each crystal that is asked for; rounds of decoding them."""
STEPS, LEARNING_RATE = 100, 0.05
"""Of Adam in each round, in standard deviations of the latents."""
PULL = 0.01
"""Cost of a move of one standard deviation of one number of the latent; 1 is the cost of an error of one of a property."""

MULTIPLES = 8
"""Of a formula's atoms, that may be in a cell."""

Cost = Callable[[Tensor], Tensor]
"""[N, latent] -> [N], 0 where all is as wanted; gradients flow through it."""


def property_cost(heads: PropertyHeads, targets: Mapping[str, float], extrapolate: bool = False) -> Cost:
    """Squared errors of properties, in standard deviations of their labels, averaged over the heads and summed.

    Raises ModelError for a property that isn't there, and for a target beyond all labels, unless `extrapolate`.
    """
    places = [heads.place(name) for name in targets]
    wanted = []
    for place, target in zip(places, targets.values(), strict=True):
        known = heads.properties[place]
        if not (extrapolate or known.low <= target <= known.high):
            raise ModelError(
                f"target {known.name}={target:g}: the labels fitted go from {known.low:g} to {known.high:g}; "
                "choose one between them, or give --extrapolate"
            )
        wanted.append((target - known.mean) / known.std)

    def cost(latent_NL: Tensor) -> Tensor:
        error_MNP = heads(latent_NL)[..., places] - torch.tensor(wanted, device=latent_NL.device)
        total_N: Tensor = error_MNP.square().mean(0).sum(1)
        return total_N

    return cost


def steer(start_NL: Tensor, cost: Cost, std_L: Tensor, steps: int) -> Tensor:
    """[N, latent] where `cost` and the way from the start, in units of `std_L`, are smallest together; by Adam."""
    move_NL = torch.zeros_like(start_NL).requires_grad_()
    optimiser = torch.optim.Adam([move_NL], LEARNING_RATE)
    for _ in range(steps):
        total = (cost(start_NL + move_NL * std_L) + PULL * move_NL.square().sum(1)).sum()
        (move_NL.grad,) = torch.autograd.grad(total, move_NL)
        optimiser.step()
    return (start_NL + move_NL * std_L).detach()


def search(
    codec: Codec, cost: Cost, n: int, seed: int, progress: Callable[[], None] = lambda: None, steps: int = STEPS,
    wanted: Callable[[Crystal], bool] = lambda crystal: True,
) -> list[Returned]:  # fmt: skip
    """At most n crystals that, encoded again, cost little, of as many formulas as there are; same seed, same crystals.

    The best one of each formula comes first, then each second best, and at last those that aren't `wanted`; fewer than n
    where fewer latents gave a crystal. progress(): one more of `ROUNDS` is done.
    """
    if n == 0:
        return []
    pool_NL = draw(codec, POOL * n, seed).latent_NL.to(codec.device)
    with torch.inference_mode():
        order = cost(pool_NL).argsort(stable=True)
    latent_NL, std_L = pool_NL[order[: CANDIDATES * n]], codec.model.prior_cholesky.float().norm(dim=1)
    best: dict[int, tuple[float, Returned]] = {}
    for _ in range(ROUNDS):
        latent_NL = steer(latent_NL, cost, std_L, steps)
        rows = returned(codec, latent_NL)
        latent_NL = torch.stack([row.again_L for row in rows])
        with torch.inference_mode():
            costs = cost(latent_NL).tolist()
        for place, (row, its) in enumerate(zip(rows, costs, strict=True)):
            if row.decoded.crystal is not None and its < best.get(place, (inf, row))[0]:
                best[place] = its, row
        progress()
    formulas: Counter[str] = Counter()
    ranked = []
    for its, row in sorted(best.values(), key=lambda pair: pair[0]):
        assert row.decoded.crystal is not None
        formulas[row.decoded.crystal.formula] += 1
        ranked.append((not wanted(row.decoded.crystal), formulas[row.decoded.crystal.formula], its, row))
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])[:n]]


def move_along(latent_NL: Tensor, heads: PropertyHeads, name: str, amount: float) -> Tensor:
    """Latents moved along a property's direction by so many standard deviations of its labels."""
    return latent_NL + amount * heads.direction(name).to(latent_NL)


@dataclass(frozen=True)
class Atoms:
    """What a crystal has to be made of: a formula's atoms, or at least one of each of some elements and none of others.

    counts: atoms by atomic number, for elements 1 each.
    """

    counts: dict[int, int]
    formula: bool

    def __str__(self) -> str:
        return ("" if self.formula else ",").join(f"{SYMBOLS[z]}{n if n > 1 else ''}" for z, n in self.counts.items())

    def hold(self, crystal: Crystal) -> bool:
        """Whether a crystal is made of them; of a formula, any multiple."""
        there = crystal.composition
        if set(there) != set(self.counts):
            return False
        return not self.formula or len({Fraction(there[z], n) for z, n in self.counts.items()}) == 1


def atoms_of(text: str, formula: bool) -> Atoms:
    """Of a formula such as 'BaTiO3', or of elements such as 'Ba,Ti,O'. Raises ConfigError."""
    counts: dict[int, int] = {}
    parts = re.findall(r"([A-Z][a-z]?)(\d*)", text) if formula else [(symbol.strip(), "") for symbol in text.split(",")]
    if not text or (formula and "".join(map("".join, parts)) != text):
        raise ConfigError(f"composition {text!r} can't be read: write a formula such as BaTiO3")
    for symbol, count in parts:
        if symbol not in NUMBERS or count.startswith("0"):
            told = "write a formula such as BaTiO3" if formula else "write symbols of elements such as Ba,Ti,O"
            number = " with its number of atoms" if formula else ""
            raise ConfigError(f"{text!r}: {symbol + count!r} is no element{number}; {told}")
        counts[NUMBERS[symbol]] = counts.get(NUMBERS[symbol], 0) + int(count or 1)
    return Atoms(counts, formula)


def atoms_cost(codec: Codec, wanted: Atoms) -> Cost:
    """Squared errors of the atoms of each element that the decoder's network for them reads off a latent, summed.

    Of a formula, the multiple that is nearest counts. Raises ModelError for elements that the model doesn't know.
    """
    model = codec.model
    if unknown := [SYMBOLS[z] for z in wanted.counts if z not in model.elements]:
        raise ModelError(f"{wanted}: the model knows no {unknown}, only {[SYMBOLS[z] for z in model.elements]}")
    one_E = torch.tensor([float(wanted.counts.get(z, 0)) for z in model.elements], device=codec.device)
    multiples_K1 = torch.arange(1.0, MULTIPLES + 1, device=codec.device)[:, None]

    def cost(latent_NL: Tensor) -> Tensor:
        found_NE = codec.composition(latent_NL)
        if wanted.formula:
            return (found_NE[:, None] - multiples_K1 * one_E).square().sum(2).min(1).values
        return torch.where(one_E > 0, 1 - found_NE, found_NE).relu().square().sum(1)

    return cost
