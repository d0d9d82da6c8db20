"""A small flow that carries noise to latents as the training crystals have them: what samples are drawn from.

Flow matching on straight lines (Lipman et al. 2023, Liu et al. 2023): a network learns the velocity from points of N(0, I)
to latents. Neither N(0, I) nor one Gaussian fitted to the latents is near where these lie: see data/models/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import log, pi

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

N_TIME, FASTEST = 64, 100.0
"""Sines and cosines of the time that the network is told; the fastest makes so many half turns."""
STEPS = 50
"""Of Heun's method from noise to latents, with two evaluations each."""
HELD_OUT, CHECKED = 10, 2048
"""Every tenth latent chooses when to stop and is not fitted; the error is a mean over so many latents and noises."""
BATCH, LEARNING_RATE, AVERAGED, CHECKS = 512, 1e-3, 0.005, 20


class LatentFlow(nn.Module):
    """Velocity [B, size] at points [B, size] and times [B], or one for all [1], from 0 (noise) to 1 (latent)."""

    def __init__(self, size: int, width: int, depth: int) -> None:
        super().__init__()
        self.size, self.width, self.depth = size, width, depth
        self.time = nn.Sequential(nn.Linear(N_TIME, 2 * N_TIME), nn.SiLU())
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_BL: Tensor, time_B: Tensor) -> Tensor:
        turns = pi * torch.exp(torch.linspace(0, log(FASTEST), N_TIME // 2, device=x_BL.device))
        waves = time_B[:, None] * turns
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        h = self.first(x_BL)
        for block in self.blocks:
            h = block(h, time)
        velocity: Tensor = self.last(layer_norm(h, h.shape[1:]))
        return velocity

    @torch.inference_mode()
    def carry(self, noise_BL: Tensor) -> Tensor:
        """Points of N(0, I) to latents, by Heun's method."""
        x, step = noise_BL, 1.0 / STEPS
        for i in range(STEPS):
            time = x.new_full((1,), i * step)
            velocity = self(x, time)
            x = x + 0.5 * step * (velocity + self(x + step * velocity, time + step))
        return x


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
        found: Tensor = h + self.out(silu(self.wide(layer_norm(h, h.shape[1:]) * (1 + scale) + shift)))
        return found


def fit_flow(
    latents_NL: Tensor, width: int, depth: int, steps: int, seed: int, progress: Callable[[float], None] = lambda error: None
) -> LatentFlow:
    """The flow to latents whose mean square is about 1; not whitened: the small ones would count as much as the large ones.

    Of `CHECKS` averages of the weights it is the one with the smallest error on latents that were held out: from few
    crystals, a flow learns all by heart in the end. progress(error): one more step is done; the latest such error.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, latents_NL.shape[1], generator=generator).to(latents_NL)

    def times(n: int) -> Tensor:
        return torch.rand(n, generator=generator).to(latents_NL)

    order = torch.randperm(len(latents_NL), generator=generator)
    n_held = len(order) // HELD_OUT
    held, fitted = latents_NL[order[:n_held]], latents_NL[order[n_held:]]
    if not n_held:
        held = fitted
    held = held.repeat(-(-CHECKED // len(held)), 1)[:CHECKED]
    check = held, normal(len(held)), times(len(held))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = LatentFlow(latents_NL.shape[1], width, depth).to(latents_NL)
    average, best, least = deepcopy(flow), flow, float("inf")
    optimiser = torch.optim.AdamW(flow.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    for step in range(1, steps + 1):
        batch = fitted[torch.randint(len(fitted), (BATCH,), generator=generator)]
        loss = _error(flow, batch, normal(BATCH), times(BATCH))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        for mean, weight in zip(average.parameters(), flow.parameters(), strict=True):
            mean.data.lerp_(weight.data, max(AVERAGED, 1 / step))
        if step % max(steps // CHECKS, 1) == 0:
            with torch.inference_mode():
                error = float(_error(average, *check))
            if error < least:
                best, least = deepcopy(average), error
        progress(least)
    return best


def _error(flow: LatentFlow, latent_BL: Tensor, noise_BL: Tensor, time_B: Tensor) -> Tensor:
    """Mean squared error of the velocity. In bfloat16, which is three times as fast on CPUs that have it."""
    with torch.autocast(latent_BL.device.type, torch.bfloat16):
        velocity = flow(torch.lerp(noise_BL, latent_BL, time_B[:, None]), time_B)
    error: Tensor = (velocity.float() - (latent_BL - noise_BL)).square().mean()
    return error
