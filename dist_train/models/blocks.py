"""Building blocks shared by the VAE and the U-Net. All convolutions are periodic, as the grids are."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PeriodicConv(nn.Conv3d):
    """3-D convolution with circular padding of (kernel - stride + 1) // 2 voxels, so that stride 1 keeps the shape."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1) -> None:
        padding = (kernel - stride + 1) // 2
        super().__init__(n_in, n_out, kernel, stride, padding=padding, padding_mode="circular")


class Down(nn.Sequential):
    """Halves a grid: [B, n_in, D, H, W] -> [B, n_out, D/2, H/2, W/2]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(PeriodicConv(n_in, n_out, kernel=4, stride=2), nn.SiLU())


class Up(nn.Module):
    """Doubles a grid by pixel shuffle (Shi et al. 2016, in 3-D): [B, n_in, D, H, W] -> [B, n_out, 2D, 2H, 2W]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = PeriodicConv(n_in, 8 * n_out)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle_3d(self.conv(x))


def pixel_shuffle_3d(x: Tensor) -> Tensor:
    """[B, 8 C, D, H, W] -> [B, C, 2D, 2H, 2W]: eight channels become the eight voxels of a 2x2x2 block."""
    b, c8, d, h, w = x.shape
    blocks = x.reshape(b, c8 // 8, 2, 2, 2, d, h, w)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c8 // 8, 2 * d, 2 * h, 2 * w)


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
