"""What samples are drawn from: a composition first, then a latent of such a crystal, by a flow from noise.

Flow matching on straight lines (Lipman et al. 2023, Liu et al. 2023): a network learns the velocity from points of N(0, I)
to latents. Neither N(0, I) nor one Gaussian fitted to the latents is near where these lie: see data/models/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, pi
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, silu

from dist_train.models.compositions import USUAL_ATOMS, CompositionModel
from dist_train.models.fitting import Fit, split
from dist_train.models.vae import Latent

N_TIME, FASTEST = 64, 100.0
"""Sines and cosines of the time that the network is told; the fastest makes so many half turns."""
STEPS = 50
"""Of Heun's method from noise to latents, with two evaluations each."""
CHECKED = 2048
"""The error is a mean over so many latents and noises."""
BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 512, 1e-3, 0.01, 0.1

V = TypeVar("V", bound="Velocity")


class Velocity(nn.Module):
    """Velocity [B, size] at points [B, size] and times [B], or one for all [1], from 0 (noise) to 1 (what is drawn).

    n_told: numbers of each row that the network is told beside them.
    """

    def __init__(self, size: int, width: int, depth: int, n_told: int) -> None:
        super().__init__()
        self.size, self.width, self.depth = size, width, depth
        self.time = nn.Sequential(nn.Linear(N_TIME, 2 * N_TIME), nn.SiLU())
        self.first = nn.Linear(size, width)
        if n_told:  # by the names of bundles of old, whose flows were told of atoms alone
            self.atoms = nn.Sequential(nn.Linear(n_told, 4 * N_TIME), nn.SiLU(), nn.Linear(4 * N_TIME, 2 * N_TIME))
            self.of_atoms = nn.Linear(2 * N_TIME, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_BL: Tensor, time_B: Tensor, told_BT: Tensor | None = None) -> Tensor:
        turns = pi * torch.exp(torch.linspace(0, log(FASTEST), N_TIME // 2, device=x_BL.device))
        waves = time_B[:, None] * turns
        told = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        h = self.first(x_BL)
        if told_BT is not None:
            more = self.atoms(told_BT)
            told, h = told + more, h + self.of_atoms(more)
        for block in self.blocks:
            h = block(h, told)
        velocity: Tensor = self.last(layer_norm(h, h.shape[1:]))
        return velocity

    @torch.inference_mode()
    def carried(self, noise_BL: Tensor, told_BT: Tensor | None = None, there_BL: Tensor | float = 1.0) -> Tensor:
        """Points of N(0, I) to where time ends, by Heun's method; there_BL: as in `Points`."""
        x, step = noise_BL, 1.0 / STEPS
        for i in range(STEPS):
            time = x.new_full((1,), i * step)
            velocity = self(x, time, told_BT) * there_BL
            x = x + 0.5 * step * (velocity + self(x + step * velocity, time + step, told_BT) * there_BL)
        return x


class LatentFlow(Velocity):
    """From noise to latents, in one piece.

    compositions: of what the crystals are made, told to the flow; without, as in bundles of old, it is told nothing.
    """

    def __init__(self, size: int, width: int, depth: int, compositions: CompositionModel | None = None) -> None:
        super().__init__(size, width, depth, n_atoms_told(compositions) if compositions else 0)
        self.compositions = compositions

    @property
    def n_centred(self) -> int:
        """Numbers of a latent, the first ones, that the flow knows without their mean."""
        return self.size

    def carry(self, noise_BL: Tensor, atoms_BE: Tensor | None = None) -> Tensor:
        """Points of N(0, I) to latents of crystals made of such atoms."""
        return self.carried(noise_BL, None if atoms_BE is None else atoms_told(atoms_BE))

    def config(self) -> dict[str, Any]:
        """Everything but the weights and the model's elements, ready for JSON."""
        return {"width": self.width, "depth": self.depth, **(self.compositions.config() if self.compositions else {})}

    @classmethod
    def from_config(cls, size: int, elements: Sequence[int], config: dict[str, Any]) -> LatentFlow:
        """Inverse of `config`, with fresh weights."""
        return cls(size, config["width"], config["depth"], CompositionModel.from_config(elements, config))


def n_atoms_told(compositions: CompositionModel) -> int:
    """Length of `atoms_told`."""
    return 2 * len(compositions.order) + 1


def atoms_told(atoms_BE: Tensor) -> Tensor:
    """[B, 2 E + 1] what networks are told of atoms of each element [B, E]."""
    total = atoms_BE.sum(1, keepdim=True)
    return torch.cat([atoms_BE / USUAL_ATOMS, atoms_BE / total, total / (2 * USUAL_ATOMS)], dim=1)


class _Block(nn.Module):
    """h plus a layer of it that the time scales and shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(2 * N_TIME, 2 * width)
        self.wide = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time).chunk(2, dim=1)
        wide = silu(self.wide(layer_norm(h, h.shape[1:]) * (1 + scale) + shift))
        found: Tensor = h + self.out(dropout(wide, DROPOUT, self.training))
        return found


class Pairs(NamedTuple):
    """What a flow is fitted to: posteriors in the flow's units, and what the crystals are made of [N, E]."""

    latent: Latent
    atoms_NE: Tensor


def fit_flow(
    pairs: Pairs, compositions: CompositionModel | None, width: int, depth: int, steps: int, seed: int,
    progress: Callable[[float], None] = lambda error: None,
) -> LatentFlow:  # fmt: skip
    """The flow to latents whose mean square is about 1; not whitened: the small ones would count as much as the large ones.

    To draws from the posteriors, which are what the decoder learnt to read. progress(error): one more step is done; the
    latest error, see `Fit.run`. compositions: those of the crystals, or None for a flow that isn't told of them.
    """
    size = pairs.latent.mean.shape[1]
    told_NT = atoms_told(pairs.atoms_NE) if compositions else None
    return fit_velocity(
        lambda: LatentFlow(size, width, depth, compositions), Points(pairs.latent, told_NT), steps, seed, progress
    )


class Points(NamedTuple):
    """What a velocity leads to: draws from posteriors [N, size], each with what the network is told [N, T].

    there_NL: 1, or 0 for numbers that a row doesn't have.
    """

    latent: Latent
    told_NT: Tensor | None
    there_NL: Tensor | None = None


def fit_velocity(
    new: Callable[[], V], points: Points, steps: int, seed: int, progress: Callable[[float], None],
    learning_rate: float = LEARNING_RATE,
) -> V:  # fmt: skip
    """new(): the network with fresh weights, drawn from `seed`. See `fit_flow`."""
    mean_NL, log_variance_NL = points.latent
    generator = torch.Generator().manual_seed(seed)
    held, fitted = split(len(mean_NL), generator)

    def drawn(rows: Tensor) -> _Batch:
        noise, start = (torch.randn(len(rows), mean_NL.shape[1], generator=generator).to(mean_NL) for _ in range(2))
        time = torch.rand(len(rows), generator=generator).to(mean_NL)
        told, there = (None if rest is None else rest[rows].to(mean_NL) for rest in points[1:])
        latent = mean_NL[rows] + (0.5 * log_variance_NL[rows]).exp() * noise
        return _Batch(latent, start if there is None else start * there, time, told, there)

    check = drawn(held.repeat(-(-CHECKED // len(held)))[:CHECKED])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = new().to(mean_NL.device)

        def loss() -> Tensor:
            return _error(network, drawn(fitted[torch.randint(len(fitted), (BATCH,), generator=generator)]))

        return Fit(learning_rate, WEIGHT_DECAY, steps).run(
            network, loss, lambda average: float(_error(average, check)), progress
        )


class _Batch(NamedTuple):
    latent_BL: Tensor
    noise_BL: Tensor
    time_B: Tensor
    told_BT: Tensor | None
    there_BL: Tensor | None


def _error(network: Velocity, batch: _Batch) -> Tensor:
    """Mean squared error of the velocity. In bfloat16, which is three times as fast on CPUs that have it."""
    latent_BL, noise_BL, time_B, told_BT, there_BL = batch
    with torch.autocast(latent_BL.device.type, torch.bfloat16):
        velocity = network(torch.lerp(noise_BL, latent_BL, time_B[:, None]), time_B, told_BT)
    square = (velocity.float() - (latent_BL - noise_BL)).square()
    error: Tensor = square.mean() if there_BL is None else (square * there_BL).sum() / there_BL.sum()
    return error
