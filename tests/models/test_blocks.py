"""Layers: no edges on periodic grids, resampling that commutes with translations, pooling and doubling as torch has them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate, max_pool3d

from dist_train.models.blocks import Double, GridConv, MaxPool, Style, fourier_resample, padded, pixel_shuffle_3d

PAPER = Style(paper=True)


@pytest.mark.parametrize(
    "layer", [GridConv(3, 4), Style().down(3, 4), PAPER.down(3, 4), PAPER.up(3, 4), Double(True)],
    ids=["conv", "down", "strided", "trilinear", "double"],
)  # fmt: skip
def test_every_voxel_sees_as_much_as_every_other(layer: torch.nn.Module) -> None:
    """No edge: a constant field stays constant, which zero padding would spoil."""
    out = layer(torch.ones(1, 3, 8, 8, 8))
    torch.testing.assert_close(out, out.mean((2, 3, 4), keepdim=True).expand_as(out))


def test_pixel_shuffle_puts_eight_channels_into_a_block() -> None:
    x = torch.arange(16.0).reshape(1, 16, 1, 1, 1)
    out = pixel_shuffle_3d(x)
    assert out.shape == (1, 2, 2, 2, 2)
    assert out[0, 0].flatten().tolist() == list(range(8))


def test_doubling_and_pooling_are_those_of_torch() -> None:
    x = torch.randn(2, 3, 4, 6, 8)
    torch.testing.assert_close(Double(False)(x), interpolate(x, scale_factor=2, mode="trilinear", align_corners=False))
    assert torch.equal(MaxPool()(x), max_pool3d(x, 2))


def test_doubling_a_periodic_grid_knows_its_other_side() -> None:
    x = torch.randn(1, 2, 4, 6, 8)
    tiled = Double(False)(torch.cat([x, x, x], dim=2))[:, :, 8:16, 2:-2, 2:-2]
    torch.testing.assert_close(Double(True)(x)[:, :, :, 2:-2, 2:-2], tiled)


@pytest.mark.parametrize(("shape", "target"), [((6, 4, 5), (9, 8, 7)), ((8, 6, 12), (4, 6, 3)), ((4, 8, 6), (8, 4, 5))])
def test_resampling_keeps_constants_and_low_waves(shape: tuple[int, int, int], target: tuple[int, int, int]) -> None:
    """A wave that both grids hold is the same wave on both."""

    def field(size: tuple[int, int, int]) -> torch.Tensor:
        d, h, w = (torch.arange(n).double() / n for n in size)
        turns = d[:, None, None] + h[None, :, None] - w[None, None, :] + 0.1
        return (0.7 + torch.sin(2 * torch.pi * turns)).float()[None, None]

    torch.testing.assert_close(fourier_resample(field(shape), target), field(target), atol=2e-6, rtol=0)


def test_resampling_commutes_with_moves_by_whole_voxels_of_both_grids() -> None:
    x = torch.randn(1, 2, 8, 6, 12, dtype=torch.float64)
    for target, shift, moved in (((12, 9, 6), (2, 2, -4), (3, 3, -2)), ((4, 2, 24), (4, 3, 1), (2, 1, 2))):
        there = fourier_resample(torch.roll(x, shift, (2, 3, 4)), target)
        torch.testing.assert_close(there, torch.roll(fourier_resample(x, target), moved, (2, 3, 4)), atol=1e-6, rtol=0)


def test_a_larger_grid_gives_the_smaller_one_back() -> None:
    for small, large in (((4, 5, 6), (8, 8, 7)), ((2, 3, 4), (5, 9, 16))):
        x = torch.randn(1, 3, *small)
        torch.testing.assert_close(fourier_resample(fourier_resample(x, large), small), x, atol=2e-6, rtol=0)
    assert fourier_resample(x, small) is x


def test_grids_are_filled_up_behind_their_ends() -> None:
    x = torch.randn(1, 1, 30, 32, 5)
    out = padded(x, 4)
    assert out.shape == (1, 1, 32, 32, 8)
    assert torch.equal(out[:, :, :30, :, :5], x)
    assert torch.count_nonzero(out) == torch.count_nonzero(x)
    assert padded(x, 1) is x


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 3, 4), (1, 2, 5), (4, 4, 4)])
def test_gradients_on_small_grids_in_bfloat16_are_those_of_float32(shape: tuple[int, int, int], periodic: bool) -> None:
    """oneDNN made some of unwritten memory: see GridConv."""
    torch.manual_seed(0)
    conv = GridConv(32, 32, periodic=periodic)
    x = torch.randn(16, 32, *shape)
    expected = torch.autograd.grad(conv(x).square().sum(), conv.parameters())
    for _ in range(3):
        unwritten = [torch.full((2**size,), 1e30) for size in range(6, 21) for _ in range(3)]
        del unwritten
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x)
        found = torch.autograd.grad(out.float().square().sum(), conv.parameters())
        for gradient, wanted in zip(found, expected, strict=True):
            assert (gradient - wanted).abs().max() < 0.05 * wanted.abs().max()
