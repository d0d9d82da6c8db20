"""The convolutional VAE: density channels and cell -> latent -> density channels, cell, atom count, composition."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_train.models.blocks import Down, PeriodicConv, Up

N_CELL = 6
"""Cell parameters: the logarithms of a, b, c and the cosines of alpha, beta, gamma, standardised."""


class Latent(NamedTuple):
    """mean and log_variance: [B, latent] of the approximate posterior."""

    mean: Tensor
    log_variance: Tensor


class Decoding(NamedTuple):
    """What a latent vector says of a crystal; everything standardised as the encoder's input is.

    density_BCDHW; cell_B6; log_count_B: logarithm of the number of atoms; composition_BE: atoms of each element.
    """

    density_BCDHW: Tensor
    cell_B6: Tensor
    log_count_B: Tensor
    composition_BE: Tensor


class Encoder(nn.Module):
    """[B, C, D, H, W] density and [B, 6] cell -> Latent."""

    def __init__(self, n_channels: int, shape: tuple[int, int, int], widths: tuple[int, ...], latent: int) -> None:
        super().__init__()
        sizes = (n_channels, *widths)
        self.down = nn.Sequential(*[Down(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])
        self.cell = nn.Linear(N_CELL, 64)
        n_features = widths[-1] * prod(n >> len(widths) for n in shape)
        self.out = nn.Linear(n_features + 64, 2 * latent)

    def forward(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Latent:
        features = torch.cat([self.down(density_BCDHW).flatten(1), self.cell(cell_B6)], dim=1)
        mean, log_variance = self.out(features).chunk(2, dim=1)
        return Latent(mean, log_variance.clamp(-12.0, 6.0))


class Decoder(nn.Module):
    """[B, latent] -> Decoding."""

    def __init__(
        self, n_channels: int, shape: tuple[int, int, int], widths: tuple[int, ...], latent: int, n_elements: int
    ) -> None:
        super().__init__()
        self.coarse = (widths[-1], *[n >> len(widths) for n in shape])
        self.expand = nn.Linear(latent, prod(self.coarse))
        ups: list[nn.Module] = []
        for n_in, n_out in zip(widths[::-1], widths[-2::-1], strict=False):
            ups += [Up(n_in, n_out), nn.SiLU()]
        self.up = nn.Sequential(nn.SiLU(), PeriodicConv(widths[-1], widths[-1]), nn.SiLU(), *ups)
        self.out = Up(widths[0], n_channels)
        self.heads = nn.Linear(latent, N_CELL + 1)
        self.composition = nn.Sequential(nn.Linear(latent, latent), nn.SiLU(), nn.Linear(latent, n_elements))

    def forward(self, latent: Tensor) -> Decoding:
        coarse = self.expand(latent).reshape(len(latent), *self.coarse)
        numbers = self.heads(latent)
        return Decoding(self.out(self.up(coarse)), numbers[:, :N_CELL], numbers[:, N_CELL], self.composition(latent))
