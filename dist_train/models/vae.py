"""The convolutional VAE: density channels and cell -> latent -> density channels, cell, atom count, composition."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.crystal.voxelize import Shape
from dist_train.models.blocks import Style, fourier_resample, padded, run, run_layers

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
    """[B, C, D, H, W] density and [B, 6] cell -> Latent. coarse: voxels along each axis of the last grid."""

    recompute = False

    def __init__(self, n_channels: int, coarse: int, model: ModelConfig, style: Style) -> None:
        super().__init__()
        self.coarse: Shape = (coarse, coarse, coarse)
        self.multiple = 1 if style.periodic else 2**model.halvings
        sizes = (n_channels, *model.vae_widths)
        whole = len(model.vae_widths) - model.halvings
        self.down = nn.Sequential(*[
            nn.Sequential(*style.layer(a, b)) if layer < whole else style.down(a, b)
            for layer, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        ])  # fmt: skip
        self.cell = nn.Linear(N_CELL, 64)
        self.out = _linear(model.vae_widths[-1] * coarse**3 + 64, 2 * model.latent, model.hidden, style)

    def forward(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Latent:
        grid = padded(density_BCDHW, self.multiple)
        for down in self.down:
            grid = run(self.recompute, down, grid)
        grid = fourier_resample(grid, self.coarse)
        features = torch.cat([grid.flatten(1), self.cell(cell_B6)], dim=1)
        mean, log_variance = self.out(features).chunk(2, dim=1)
        return Latent(mean, log_variance.clamp(-12.0, 6.0))


class Decoder(nn.Module):
    """[B, latent] -> Decoding on grids of a shape. coarse: voxels along each axis of the first grid."""

    recompute = False

    def __init__(self, n_channels: int, coarse: int, model: ModelConfig, n_elements: int, style: Style) -> None:
        super().__init__()
        widths, latent = model.vae_widths, model.latent
        self.coarse = (widths[-1], coarse, coarse, coarse)
        self.multiple = 2**model.halvings
        self.expand = _linear(latent, prod(self.coarse), model.hidden, style)
        whole = len(widths) - model.halvings
        layers: list[nn.Module] = []
        for layer in range(len(widths) - 1, 0, -1):
            n_in, n_out = widths[layer], widths[layer - 1]
            layers += [style.conv(n_in, n_out) if layer < whole else style.up(n_in, n_out), *style.rest(n_out)]
        self.up = nn.Sequential(style.activation(), *style.layer(widths[-1], widths[-1]), *layers)
        self.out = style.conv(widths[0], n_channels) if whole else style.up(widths[0], n_channels)
        self.heads = nn.Linear(latent, N_CELL + 1)
        self.composition = nn.Sequential(nn.Linear(latent, latent), style.activation(), nn.Linear(latent, n_elements))

    def forward(self, latent: Tensor, shape: Shape) -> Decoding:
        d, h, w = shape
        grid = self.expand(latent).reshape(len(latent), *self.coarse)
        grid = fourier_resample(grid, (-(-d // self.multiple), -(-h // self.multiple), -(-w // self.multiple)))
        density = run(self.recompute, self.out, run_layers(self.recompute, self.up, grid))
        return Decoding(density[:, :, :d, :h, :w], *self.numbers(latent), self.composition(latent))

    def numbers(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised cell [B, 6] and logarithm of the number of atoms [B]."""
        numbers = self.heads(latent)
        return numbers[:, :N_CELL], numbers[:, N_CELL]


def _linear(n_in: int, n_out: int, hidden: int, style: Style) -> nn.Module:
    if not hidden:
        return nn.Linear(n_in, n_out)
    return nn.Sequential(nn.Linear(n_in, hidden), style.activation(), nn.Linear(hidden, n_out))
