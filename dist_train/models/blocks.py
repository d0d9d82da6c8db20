"""Building blocks shared by the VAE and the U-Net: periodic where the grid is a cell, with an outside where it is a box."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import pi

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, pad
from torch.utils.checkpoint import checkpoint

from dist_train.crystal.voxelize import Shape


class GridConv(nn.Conv3d):
    """3-D convolution padded by (kernel - stride + 1) // 2 voxels, so that stride 1 keeps the shape.

    A periodic grid is padded with its other side; one that isn't with zeros, the mean of a standardised channel. This is
    done before the convolution: padded by it, small grids (2^3) in bfloat16 on a CPU (torch 2.13, oneDNN) give a gradient
    of the weights that is made of memory which nobody wrote.
    """

    channels_last = False
    """Whether the grid is laid out so before it is convolved. Weights aren't: DeepSpeed can't send such."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1, periodic: bool = True) -> None:
        super().__init__(n_in, n_out, kernel, stride)
        self.margin, self.outside = (kernel - stride + 1) // 2, "circular" if periodic else "constant"

    def forward(self, x: Tensor) -> Tensor:
        if self.margin:
            x = pad(x, (self.margin,) * 6, mode=self.outside)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return conv3d(x, self.weight, self.bias, self.stride)


@dataclass(frozen=True)
class Style:
    """How layers are made (see `ModelConfig.blocks` and `norm_groups`), and whether grids are periodic."""

    periodic: bool = True
    paper: bool = False
    groups: int = 0

    def conv(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1) -> GridConv:
        return GridConv(n_in, n_out, kernel, stride, self.periodic)

    def activation(self) -> nn.Module:
        return nn.LeakyReLU() if self.paper else nn.SiLU()

    def rest(self, n_out: int) -> list[nn.Module]:
        """What follows a convolution: the norm, if any, and the activation."""
        return [*([nn.GroupNorm(self.groups, n_out)] if self.groups else []), self.activation()]

    def layer(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        """Convolution, norm, activation."""
        return [self.conv(n_in, n_out, kernel, stride), *self.rest(n_out)]

    def down(self, n_in: int, n_out: int) -> nn.Sequential:
        """Halves a grid by a strided convolution: [B, n_in, D, H, W] -> [B, n_out, D/2, H/2, W/2]."""
        return nn.Sequential(*self.layer(n_in, n_out, kernel=3 if self.paper else 4, stride=2))

    def up(self, n_in: int, n_out: int) -> nn.Module:
        """Doubles a grid: [B, n_in, D, H, W] -> [B, n_out, 2D, 2H, 2W], without norm or activation."""
        if self.paper:
            return nn.Sequential(Double(self.periodic), self.conv(n_in, n_out))
        return ShuffleUp(n_in, n_out, self.periodic)


class Residual(nn.Module):
    """x plus two convolutions of it (He et al. 2016), the second of which starts at zero: [B, width, D, H, W], both ways."""

    def __init__(self, width: int, style: Style) -> None:
        super().__init__()
        self.layers = nn.Sequential(*style.layer(width, width), style.conv(width, width))
        last = self.layers[-1]
        assert isinstance(last, GridConv) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.activation = style.activation()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(x + self.layers(x))
        return out


class ShuffleUp(nn.Module):
    """Doubles a grid by pixel shuffle (Shi et al. 2016, in 3-D): [B, n_in, D, H, W] -> [B, n_out, 2D, 2H, 2W]."""

    def __init__(self, n_in: int, n_out: int, periodic: bool) -> None:
        super().__init__()
        self.conv = GridConv(n_in, 8 * n_out, periodic=periodic)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle_3d(self.conv(x))


def pixel_shuffle_3d(x: Tensor) -> Tensor:
    """[B, 8 C, D, H, W] -> [B, C, 2D, 2H, 2W]: eight channels become the eight voxels of a 2x2x2 block."""
    b, c8, d, h, w = x.shape
    blocks = x.reshape(b, c8 // 8, 2, 2, 2, d, h, w)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c8 // 8, 2 * d, 2 * h, 2 * w)


class MaxPool(nn.Module):
    """Halves a grid: the largest of each 2x2x2 block. nn.MaxPool3d has no deterministic gradient on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, d, h, w = x.shape
        return x.reshape(b, c, d // 2, 2, h // 2, 2, w // 2, 2).amax((3, 5, 7))


class Double(nn.Module):
    """Doubles a grid by trilinear interpolation, as `interpolate(x, scale_factor=2, mode="trilinear")` does where the grid
    isn't periodic. That function knows no other side, and has no deterministic gradient on GPUs."""

    def __init__(self, periodic: bool) -> None:
        super().__init__()
        self.periodic = periodic

    def forward(self, x: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            last = x.shape[axis] - 1
            low, high = (0, last) if not self.periodic else (last, 0)
            before = torch.cat([x.narrow(axis, low, 1), x.narrow(axis, 0, last)], axis)
            after = torch.cat([x.narrow(axis, 1, last), x.narrow(axis, high, 1)], axis)
            x = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1).flatten(axis, axis + 1)
        return x


class AttentionGate(nn.Module):
    """Additive attention on a skip connection (Oktay et al. 2018): weights in (0, 1) for each voxel.

    skip: [B, n_skip, D, H, W]; gate: [B, n_gate, D, H, W], the decoder's features at the same resolution.
    """

    def __init__(self, n_skip: int, n_gate: int) -> None:
        super().__init__()
        hidden = max(n_skip // 2, 1)
        self.skip = nn.Conv3d(n_skip, hidden, 1, bias=False)
        self.gate = nn.Conv3d(n_gate, hidden, 1)
        self.weight = nn.Conv3d(hidden, 1, 1)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.skip(skip) + self.gate(gate))
        return skip * torch.sigmoid(self.weight(hidden))


def fourier_resample(x: Tensor, shape: Shape) -> Tensor:
    """[B, C, D, H, W] samples of a periodic field -> the same field at [B, C, *shape]; voxel i of n lies at i / n.

    Trigonometric interpolation: the waves that both grids hold are kept, the others left out. So a larger grid holds all of
    a smaller one and gives it back; a smaller one has no aliases of what it can't hold; and moving the field by a part of
    the cell that is whole voxels on both grids moves both alike. Trilinear interpolation has only the last of these.
    A product with a matrix for each axis, as FFTs know neither bf16 nor channels-last, and these grids are small.
    """
    for axis, size in enumerate(shape, start=2):
        if x.shape[axis] != size:
            waves = fourier_matrix(x.shape[axis], size, x.device).to(x.dtype)
            x = (x.movedim(axis, -1) @ waves.T).movedim(-1, axis)
    return x


def fourier_matrix(n: int, m: int, device: torch.device) -> Tensor:
    """[m, n] float32: n samples of a period -> m samples. The highest wave of an even number is taken as a cosine."""
    least = min(n, m)
    wave = torch.arange(least // 2 + 1, device=device)
    # A wave stands for its conjugate, too; the highest of an even grid is its own, and is halved on a larger one.
    twice = 2.0 - (wave == 0).float() - ((2 * wave == n) & (n < m)).float()
    place = torch.arange(m, device=device)[:, None] * n - torch.arange(n, device=device) * m
    # Whole turns are taken away while the numbers are whole: the cosines are exact, and the rows add up to 1.
    turns = (place[:, :, None] * wave).remainder(n * m).double() / (n * m)
    return ((2 * pi * turns).cos() @ twice.double() / n).float()


def padded(x: Tensor, multiple: int) -> Tensor:
    """The grid with zeros after its ends, up to a multiple of voxels along each axis: 30 can't be halved five times."""
    missing = [-size % multiple for size in x.shape[:1:-1]]
    return pad(x, [part for size in missing for part in (0, size)]) if any(missing) else x


def run(recompute: bool, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The output of a block; with `recompute` only its inputs are kept for the backward pass."""
    if recompute and torch.is_grad_enabled():
        found: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return found
    return block(*inputs)


def run_layers(recompute: bool, layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers(x)`, in blocks that end with an activation."""
    for block in _blocks(layers):
        x = run(recompute, partial(_apply, block), x)
    return x


def _blocks(layers: nn.Sequential) -> Iterator[list[nn.Module]]:
    block: list[nn.Module] = []
    for layer in layers:
        block.append(layer)
        if isinstance(layer, nn.SiLU | nn.LeakyReLU | Residual):
            yield block
            block = []
    if block:
        yield block


def _apply(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x
