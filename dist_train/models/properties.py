"""Properties read off latents: small networks and one direction each, fitted to labelled crystals, kept in the bundle.

A direction is an attribute vector: of all moves of a latent by which what the networks say of it rises, on average and to
first order, by one standard deviation of the labels, the shortest, in standard deviations of the latents along any axis. It
goes where latents are; the shortest in plain numbers would go across, where the decoder heeds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_train.errors import DataError, ModelError
from dist_train.models.vae import Latent

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

WIDTH, MEMBERS = 192, 4
"""Of the heads: width of their two layers, and how many are averaged; how far they differ tells where they guess."""
BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 2e-3, 0.01
MIN_FITTED, MIN_HELD_OUT = 50, 10
"""Labelled crystals without which nothing is fitted, and measured."""
RIDGE = 1e-2
"""Of the linear fit that the heads are compared with, to latents and labels of variance 1."""
MIN_LATENT_STD = 1e-3
"""Least spread of a number of the latent: one that is the same in all crystals isn't blown up."""


@dataclass(frozen=True)
class Labels:
    """One property of crystals: value_N in their order, NaN where it isn't known.

    column: of the table that they come from, '' where they are computed from the structure.
    """

    name: str
    column: str
    unit: str
    value_N: FloatArray


@dataclass(frozen=True)
class Property:
    """What is known of one property.

    column: as in `Labels`. n_fitted, n_held_out: labelled crystals; n_unseen: of those held out, the ones that the model
    wasn't trained on, None where that isn't known. mean, std, low, high: of the labels fitted. mae to mae_median: mean
    absolute errors on crystals held out, of the heads, of the linear fit, and of the mean and the median of the labels
    fitted, told for every crystal; r2: shares of the variance that heads and linear fit explain there.
    """

    name: str
    column: str
    unit: str
    n_fitted: int
    n_held_out: int
    n_unseen: int | None
    mean: float
    std: float
    low: float
    high: float
    mae: float = nan
    mae_linear: float = nan
    mae_mean: float = nan
    mae_median: float = nan
    r2: float = nan
    r2_linear: float = nan


class Prediction(NamedTuple):
    """value_NP: means of the heads, in the properties' units; spread_NP: standard deviations over the heads."""

    value_NP: Tensor
    spread_NP: Tensor


class PropertyHeads(nn.Module):
    """[N, size] latents -> P properties. Raises ModelError for a property that isn't there."""

    latent_mean: Tensor
    latent_std: Tensor
    direction_PL: Tensor

    def __init__(self, properties: Sequence[Property], size: int, width: int, members: int) -> None:
        super().__init__()
        self.properties, self.size, self.width = tuple(properties), size, width
        n = len(self.properties)
        self.register_buffer("latent_mean", torch.zeros(size))
        self.register_buffer("latent_std", torch.ones(size))
        self.register_buffer("direction_PL", torch.zeros(n, size))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, n))
            for _ in range(members)
        )

    @property
    def mean_P(self) -> Tensor:
        """Of the labels fitted."""
        return torch.tensor([known.mean for known in self.properties])

    @property
    def std_P(self) -> Tensor:
        """Of the labels fitted."""
        return torch.tensor([known.std for known in self.properties])

    def standardised(self, latent_NL: Tensor) -> Tensor:
        """Latents as the heads take them."""
        return (latent_NL - self.latent_mean) / self.latent_std

    def forward(self, latent_NL: Tensor) -> Tensor:
        """[members, N, P] in standard deviations of the labels from their mean."""
        x_NL = self.standardised(latent_NL)
        return torch.stack([head(x_NL) for head in self.heads])

    @torch.inference_mode()
    def predict(self, latent_NL: Tensor) -> Prediction:
        """Of every property, for latents on any device; on the CPU."""
        found_MNP = self(latent_NL.to(self.latent_mean)).cpu()
        return Prediction(found_MNP.mean(0) * self.std_P + self.mean_P, found_MNP.std(0, correction=0) * self.std_P)

    def place(self, name: str) -> int:
        """Of a property among the columns of predictions."""
        names = [known.name for known in self.properties]
        if name not in names:
            raise ModelError(
                f"no property {name!r} in this model, it has {names}: fit them together with it by dist-train fit-properties"
            )
        return names.index(name)

    def direction(self, name: str) -> Tensor:
        """[size] the move of a latent (see above) by which the property rises by one standard deviation of its labels."""
        return self.direction_PL[self.place(name)]

    def config(self) -> dict[str, Any]:
        """Everything but the numbers, ready for JSON; `from_config` rebuilds the module from it."""
        shape = {"size": self.size, "width": self.width, "members": len(self.heads)}
        return {**shape, "properties": [asdict(known) for known in self.properties]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PropertyHeads:
        """Inverse of `config`, with fresh weights."""
        shape = {name: config[name] for name in ("size", "width", "members")}
        return cls([Property(**known) for known in config["properties"]], **shape)


def fit_properties(
    latents: Latent,
    labels: Sequence[Labels],
    held_out_N: BoolArray,
    seen_N: BoolArray | None,
    seed: int,
    steps: int,
    progress: Callable[[], None] = lambda: None,
) -> PropertyHeads:
    """Heads and directions from the crystals that aren't held out, their errors from those that are; same seed, same bits.

    A step sees latents as the decoder learnt to see them, with the noise of their posteriors: what the decoder doesn't
    heed, the heads don't either. seen_N: crystals that the model was trained on. progress(): one more step of one head.
    """
    known = [_described(label, held_out_N, seen_N) for label in labels]
    fitted_N = torch.from_numpy(~held_out_N)
    mean_NL, noise_NL = latents.mean[fitted_N], (0.5 * latents.log_variance[fitted_N]).exp()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = PropertyHeads(known, mean_NL.shape[1], WIDTH, MEMBERS)
    heads.latent_mean = mean_NL.mean(0)
    heads.latent_std = mean_NL.std(0).clamp(min=MIN_LATENT_STD)
    value_NP = torch.from_numpy(np.stack([label.value_N for label in labels], axis=1)).float()
    wanted_NP = (value_NP - heads.mean_P) / heads.std_P
    generator = torch.Generator().manual_seed(seed)
    for head in heads.heads:
        _train(head, heads, mean_NL, noise_NL, wanted_NP[fitted_N], generator, steps, progress)
    heads.requires_grad_(False)
    x_NL = (latents.mean - heads.latent_mean) / heads.latent_std
    linear_NP = torch.empty_like(value_NP)
    for p, wanted_N in enumerate(wanted_NP.T):
        linear_NP[:, p] = _linear(x_NL, wanted_N, fitted_N) * heads.std_P[p] + heads.mean_P[p]
        heads.direction_PL[p] = _direction(heads, x_NL[fitted_N], p) * heads.latent_std
    told_NP = heads.predict(latents.mean).value_NP
    heads.properties = tuple(
        _measured(known[p], value_NP[:, p], told_NP[:, p], linear_NP[:, p], fitted_N) for p in range(len(known))
    )
    return heads


def _described(label: Labels, held_out_N: BoolArray, seen_N: BoolArray | None) -> Property:
    """Without errors. Raises DataError where there are too few labels, or all are equal."""
    there = np.isfinite(label.value_N)
    fitted, n_held_out = label.value_N[there & ~held_out_N], int((there & held_out_N).sum())
    if len(fitted) < MIN_FITTED or n_held_out < MIN_HELD_OUT:
        raise DataError(
            f"{label.name}: {len(fitted)} labelled crystals to fit and {n_held_out} held out, at least {MIN_FITTED} and "
            f"{MIN_HELD_OUT} are needed: give more rows, or hold out another share"
        )
    if fitted.std() == 0:
        raise DataError(f"{label.name} is {fitted[0]:g} in all {len(fitted)} crystals to fit: leave it out")
    numbers = [float(of(fitted)) for of in (np.mean, np.std, np.min, np.max)]
    unseen = None if seen_N is None else int((there & held_out_N & ~seen_N).sum())
    return Property(label.name, label.column, label.unit, len(fitted), n_held_out, unseen, *numbers)


def _train(
    head: nn.Module, heads: PropertyHeads, mean_NL: Tensor, noise_NL: Tensor, wanted_NP: Tensor,
    generator: torch.Generator, steps: int, progress: Callable[[], None],
) -> None:  # fmt: skip
    """Fit one head to standardised labels; those that are NaN don't count."""
    optimiser = torch.optim.AdamW(head.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    for _ in range(steps):
        rows = torch.randint(len(mean_NL), (BATCH,), generator=generator)
        noise_BL = noise_NL[rows] * torch.randn(BATCH, heads.size, generator=generator)
        error_BP = head(heads.standardised(mean_NL[rows] + noise_BL)) - wanted_NP[rows]
        known_BP = error_BP.isfinite()
        loss = torch.where(known_BP, error_BP, 0.0).square().sum() / known_BP.sum().clamp(min=1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress()


def _linear(x_NL: Tensor, wanted_N: Tensor, fitted_N: Tensor) -> Tensor:
    """[N] what a ridge regression from standardised latents, fitted to some of the crystals, says of all."""
    known_N = wanted_N.isfinite() & fitted_N
    x, y = x_NL[known_N].double(), wanted_N[known_N].double()
    square_LL = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    told_N: Tensor = x_NL @ torch.linalg.solve(square_LL, x.T @ y / len(x)).float()
    return told_N


def _direction(heads: PropertyHeads, x_NL: Tensor, p: int) -> Tensor:
    """[L] the direction (see above) of one property, in standardised latents."""
    at_NL = x_NL.clone().requires_grad_()
    told_N = torch.stack([head(at_NL) for head in heads.heads])[..., p].mean(0)
    gradient_L = torch.autograd.grad(told_N.sum(), at_NL)[0].mean(0)
    along_L = x_NL.T @ (x_NL @ gradient_L)
    direction_L: Tensor = along_L / (gradient_L @ along_L)
    return direction_L


def _measured(known: Property, value_N: Tensor, told_N: Tensor, linear_N: Tensor, fitted_N: Tensor) -> Property:
    """The property with its errors on the labelled crystals that were held out."""
    there = value_N.isfinite()
    test = there & ~fitted_N
    truth, median = value_N[test], value_N[there & fitted_N].median()

    def mae(told: Tensor) -> float:
        return float((told - truth).abs().mean())

    def r2(told: Tensor) -> float:
        return float(1 - (told - truth).square().sum() / (truth - truth.mean()).square().sum().clamp(min=1e-12))

    told, linear, mean = told_N[test], linear_N[test], torch.tensor(known.mean)
    return replace(
        known, mae=mae(told), mae_linear=mae(linear), mae_mean=mae(mean), mae_median=mae(median), r2=r2(told),
        r2_linear=r2(linear),
    )  # fmt: skip
