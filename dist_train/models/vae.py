"""The convolutional VAE: density channels and cell -> latent -> density channels, cell, atom count, composition.

The latent is one vector, or a vector and a coarse periodic grid of a few numbers a voxel, which says where the atoms are in
the network's own terms: convolutions then do all the work, and what is learnt at one place holds at every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from dist_train.config import ModelConfig
from dist_train.crystal.voxelize import Shape
from dist_train.models.blocks import Residual, Style, fourier_resample, padded, run, run_layers

N_CELL = 6
"""Cell parameters: the logarithms of a, b, c and the cosines of alpha, beta, gamma, standardised."""
N_CELL_FEATURES = 64
N_SHAPE, USUAL_VOXELS = 3, 16
"""Numbers that say the shape of an adaptive grid (see `shape_numbers`), and the edge for which they are 0."""
USUAL_ROOT = 64
"""Voxels of a decoder's first grid over which sums are about as large as what is summed."""
LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -12.0, 6.0
FIRST_LOG_VARIANCE = -6.0
"""Where numbers of a latent begin that are near the truth from the first: with variance 1, they would drown in noise."""


class Latent(NamedTuple):
    """mean and log_variance: [B, latent_size] of the approximate posterior."""

    mean: Tensor
    log_variance: Tensor


class Decoding(NamedTuple):
    """What a latent vector says of a crystal; everything standardised as the encoder's input is.

    density_BCDHW; log_count_B: logarithm of the number of atoms; composition_BE: atoms of each element; the others as in
    Numbers.
    """

    density_BCDHW: Tensor
    log_count_B: Tensor
    composition_BE: Tensor
    cell_B6: Tensor
    shape_B3: Tensor


class Numbers(NamedTuple):
    """What has to be known of a crystal before its grid: cell_B6, standardised; shape_B3: `shape_numbers` of an adaptive
    grid, else [B, 0].
    """

    cell_B6: Tensor
    shape_B3: Tensor


class Encoder(nn.Module):
    """[B, C, D, H, W] density and [B, 6] cell -> Latent. coarse: voxels along each axis of the last grid.

    The latent begins with the cell and the shape of an adaptive grid, and what the network adds to them: nobody has to learn
    what is known, and a wrong shape would be a wrong crystal.
    """

    recompute = False

    def __init__(self, n_channels: int, coarse: int, model: ModelConfig, adaptive: bool, style: Style) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.multiple = 1 if style.periodic else 2**model.halvings
        sizes = (n_channels, *model.vae_widths)
        whole = len(model.vae_widths) - model.halvings
        self.down = nn.Sequential(*[
            nn.Sequential(*(style.layer(a, b) if layer < whole else style.down(a, b)), *_residual(b, model, style))
            for layer, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        ])  # fmt: skip
        width = model.vae_widths[-1]
        n_cell = N_CELL + N_SHAPE * adaptive
        self.head = (
            GridHead(n_cell, model, style) if model.latent_voxels else VectorHead(width, n_cell, coarse, model, style)
        )

    def forward(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Latent:
        grids = [padded(density_BCDHW, self.multiple)]
        for down in self.down:
            grids.append(run(self.recompute, down, grids[-1]))
        d, h, w = density_BCDHW.shape[2:]
        shape = d, h, w
        numbers = torch.cat([cell_B6, shape_numbers(shape, cell_B6)], dim=1) if self.adaptive else cell_B6
        mean, log_variance = self.head(grids[1:], numbers, shape)
        known = pad(numbers, (0, mean.shape[1] - numbers.shape[1]))
        return Latent(mean + known, log_variance.clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE))


class Decoder(nn.Module):
    """[B, latent_size] -> Decoding on grids of a shape. coarse: voxels along each axis of the first grid."""

    recompute = False

    def __init__(
        self, n_channels: int, coarse: int, model: ModelConfig, n_elements: int, adaptive: bool, style: Style
    ) -> None:
        super().__init__()
        widths = model.vae_widths
        self.multiple = 2**model.halvings
        self.root: GridRoot | VectorRoot = (
            GridRoot(widths[-1], model) if model.latent_voxels else VectorRoot(widths[-1], coarse, model, style)
        )
        self.n_known = N_CELL + N_SHAPE * adaptive
        self.known = nn.Linear(model.latent, self.n_known)
        nn.init.zeros_(self.known.weight)
        nn.init.zeros_(self.known.bias)
        self.n_vector, width = model.latent, model.atoms_width
        # Of each voxel of the first grid, summed over these: atoms add up.
        self.local_atoms = nn.Sequential(
            style.activation(), nn.Conv3d(widths[-1], width, 1), style.activation(), nn.Conv3d(width, width, 1)
        ) if width else None  # fmt: skip
        sizes = (model.latent + width, *((width, width) if width else (model.latent,)))
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), style.activation())]
        self.atoms = nn.Sequential(*hidden, nn.Linear(sizes[-1], 1 + n_elements))
        whole = len(widths) - model.halvings
        layers: list[nn.Module] = []
        for layer in range(len(widths) - 1, 0, -1):
            n_in, n_out = widths[layer], widths[layer - 1]
            layers += [style.conv(n_in, n_out) if layer < whole else style.up(n_in, n_out), *style.rest(n_out)]
            layers += _residual(n_out, model, style)
        first = [*style.layer(widths[-1], widths[-1]), *_residual(widths[-1], model, style)]
        self.up = nn.Sequential(style.activation(), *first, *layers)
        self.out = style.conv(widths[0], n_channels) if whole else style.up(widths[0], n_channels)

    def forward(self, latent: Tensor, shape: Shape) -> Decoding:
        d, h, w = shape
        root = self.root(latent, shape)
        grid = fourier_resample(root, (-(-d // self.multiple), -(-h // self.multiple), -(-w // self.multiple)))
        density = run(self.recompute, self.out, run_layers(self.recompute, self.up, grid))
        return Decoding(density[:, :, :d, :h, :w], *self._atoms(latent, root), *self.numbers(latent))

    def composition(self, latent: Tensor, shape: Shape) -> Tensor:
        """[B, E] atoms of each element, of latents whose grids have a shape."""
        return self._atoms(latent, None if self.local_atoms is None else self.root(latent, shape))[1]

    def _atoms(self, latent: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor]:
        """log_count_B and composition_BE; root: the decoder's first grid, which only `local_atoms` looks at."""
        said = latent[:, : self.n_vector]
        if self.local_atoms is not None:
            said = torch.cat([said, self.local_atoms(root).sum((2, 3, 4)) / USUAL_ROOT], dim=1)
        said = self.atoms(said)
        return said[:, 0], said[:, 1:]

    def numbers(self, latent: Tensor) -> Numbers:
        """Of the latent's vector alone: how its grid is to be read follows from them."""
        vector = latent[:, : self.n_vector]
        known = self.known(vector) + vector[:, : self.n_known]
        return Numbers(known[:, :N_CELL], known[:, N_CELL:])


class VectorHead(nn.Module):
    """Features [B, n_in, D, H, W], the last ones, and [B, n_cell] cell -> mean and log variance of a latent vector."""

    def __init__(self, n_in: int, n_cell: int, coarse: int, model: ModelConfig, style: Style) -> None:
        super().__init__()
        self.coarse: Shape = (coarse, coarse, coarse)
        self.cell = nn.Linear(n_cell, N_CELL_FEATURES)
        self.out, last = _linear(n_in * coarse**3 + N_CELL_FEATURES, 2 * model.latent, model.hidden, style)
        nn.init.constant_(last.bias[model.latent : model.latent + n_cell], FIRST_LOG_VARIANCE)

    def forward(self, grids: Sequence[Tensor], cell: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        grid = fourier_resample(grids[-1], self.coarse)
        mean, log_variance = self.out(torch.cat([grid.flatten(1), self.cell(cell)], dim=1)).chunk(2, dim=1)
        return mean, log_variance


class VectorRoot(nn.Module):
    """[B, latent] -> the decoder's first grid [B, n_out, coarse, coarse, coarse]."""

    def __init__(self, n_out: int, coarse: int, model: ModelConfig, style: Style) -> None:
        super().__init__()
        self.coarse = (n_out, coarse, coarse, coarse)
        self.expand, _ = _linear(model.latent, prod(self.coarse), model.hidden, style)

    def forward(self, latent: Tensor, shape: Shape) -> Tensor:
        grid: Tensor = self.expand(latent).reshape(len(latent), *self.coarse)
        return grid


class GridHead(nn.Module):
    """Features of all resolutions and [B, n_cell] cell -> mean and log variance of a latent with a grid.

    The vector hangs on the means of the features, and so not on the origin. The latent holds it, then the channels of the
    coarse grid (see `latent_shape`), then zeros of variance 1, which cost nothing, where that grid has fewer than
    `latent_voxels`.
    """

    def __init__(self, n_cell: int, model: ModelConfig, style: Style) -> None:
        super().__init__()
        assert model.latent_voxels is not None
        self.voxels, n_in = model.latent_voxels, model.vae_widths[-1]
        self.cell = nn.Linear(n_cell, n_in)
        self.mix = nn.Sequential(style.activation(), *style.layer(n_in, n_in))
        self.grid = nn.Conv3d(n_in, 2 * model.latent_channels, 1)
        last = nn.Linear(n_in, 2 * model.latent)
        self.vector = nn.Sequential(
            nn.Linear(sum(model.vae_widths) + n_in + n_cell, 2 * n_in), style.activation(), nn.Linear(2 * n_in, n_in),
            style.activation(), last,
        )  # fmt: skip
        for layer in (self.grid, last):
            assert layer.bias is not None
            nn.init.constant_(layer.bias.chunk(2)[1], FIRST_LOG_VARIANCE)

    def forward(self, grids: Sequence[Tensor], cell: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        grid = fourier_resample(grids[-1], latent_shape(shape, self.voxels))
        grid = self.mix(grid + _everywhere(self.cell(cell)))
        means = [features.mean((2, 3, 4)) for features in (*grids, grid)]
        vectors = self.vector(torch.cat([*means, cell], dim=1)).chunk(2, dim=1)
        grids = self.grid(grid).chunk(2, dim=1)
        missing = grids[0].shape[1] * (self.voxels - prod(grid.shape[2:]))
        mean, log_variance = (
            torch.cat([vector, pad(part.flatten(1), (0, missing))], dim=1)
            for vector, part in zip(vectors, grids, strict=True)
        )
        return mean, log_variance


class GridRoot(nn.Module):
    """[B, latent_size] -> the decoder's first grid [B, n_out, *latent_shape]; the vector is told to all of its voxels."""

    def __init__(self, n_out: int, model: ModelConfig) -> None:
        super().__init__()
        assert model.latent_voxels is not None
        self.n_vector, self.n_channels, self.voxels = model.latent, model.latent_channels, model.latent_voxels
        self.grid = nn.Conv3d(model.latent_channels, n_out, 1)
        self.vector = nn.Linear(model.latent, n_out)

    def forward(self, latent: Tensor, shape: Shape) -> Tensor:
        vector, rest = latent[:, : self.n_vector], latent[:, self.n_vector :]
        coarse = latent_shape(shape, self.voxels)
        grid = rest[:, : self.n_channels * prod(coarse)].reshape(len(latent), self.n_channels, *coarse)
        found: Tensor = self.grid(grid) + _everywhere(self.vector(vector))
        return found


@cache
def latent_shape(shape: Shape, voxels: int) -> Shape:
    """Of the coarse grid that stands for a grid of a shape: at most so many voxels, which are as near to cubes as may be.

    The longest edge of a coarse voxel is as short as it can be, then the second one, then the third.
    """
    edges = range(1, voxels + 1)
    shapes = [(a, b, c) for a in edges for b in edges[: voxels // a] for c in edges[: voxels // (a * b)]]
    return min(shapes, key=lambda n: (sorted((size / k for size, k in zip(shape, n, strict=True)), reverse=True), n))


def shape_numbers(shape: Shape, like: Tensor) -> Tensor:
    """[B, 3] logarithms to base 2 of a shape over USUAL_VOXELS, for each of the B rows of `like`.

    A latent says the shape itself: computed from a decoded cell, it would be another one where an edge is near a limit.
    """
    return torch.tensor(shape, device=like.device).div(USUAL_VOXELS).log2().to(like.dtype).expand(len(like), N_SHAPE)


def shape_of(numbers_3: NDArray[np.floating], multiple: int) -> Shape:
    """The shape of multiples that decoded `shape_numbers` are nearest to."""
    edges = USUAL_VOXELS * 2.0 ** numbers_3.clip(-8, 8)
    d, h, w = (multiple * max(1, round(edge / multiple)) for edge in edges.tolist())
    return d, h, w


def _everywhere(features_BF: Tensor) -> Tensor:
    return features_BF[:, :, None, None, None]


def _residual(width: int, model: ModelConfig, style: Style) -> list[nn.Module]:
    return [Residual(width, style) for _ in range(model.vae_depth)]


def _linear(n_in: int, n_out: int, hidden: int, style: Style) -> tuple[nn.Module, nn.Linear]:
    """A linear layer, or two with an activation between them, and the last one of these."""
    last = nn.Linear(hidden or n_in, n_out)
    return nn.Sequential(nn.Linear(n_in, hidden), style.activation(), last) if hidden else last, last
