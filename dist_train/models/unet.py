"""The attention U-Net that segments decoded density channels into elements."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dist_train.models.blocks import AttentionGate, Double, MaxPool, Style, padded, run


class AttentionUNet(nn.Module):
    """[B, n_in, D, H, W] -> per-voxel features [B, width + n_in, D, H, W]; `classify` turns features into logits.

    Attention gates sit on every skip. The input joins the features, so that the element codes reach the classifier
    unblurred, and only the voxels that a loss looks at need to be classified.
    """

    recompute = False
    """Whether blocks are computed again in the backward pass (see `TrainConfig.activation_checkpointing`)."""

    def __init__(self, n_in: int, n_classes: int, width: int, levels: int, style: Style) -> None:
        super().__init__()
        self.multiple = 1 if style.periodic else 2 ** (levels - 1)
        widths = [width << level for level in range(levels)]
        self.first = nn.Sequential(*style.layer(n_in, width), *style.layer(width, width))
        self.down = nn.ModuleList(
            nn.Sequential(*_halving(style, a, b), *style.layer(b, b)) for a, b in zip(widths, widths[1:], strict=False)
        )
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(_doubling(style, below, here) for below, here in pairs)
        self.gate = nn.ModuleList(AttentionGate(here, here) for _, here in pairs)
        self.merge = nn.ModuleList(
            nn.Sequential(*style.layer(2 * here, here), *(style.layer(here, here) if style.paper else []))
            for _, here in pairs
        )
        self.classifier = nn.Linear(width + n_in, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        d, h, w = x.shape[2:]
        features = run(self.recompute, self.first, padded(x, self.multiple))
        skips = []
        for down in self.down:
            skips.append(features)
            features = run(self.recompute, down, features)
        for level in range(len(self.up)):
            features = run(self.recompute, partial(self.rise, level), features, skips.pop())
        return torch.cat([features[:, :, :d, :h, :w], x], dim=1)

    def rise(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        """Features of the level above, from those below and the skip connection."""
        features = self.up[level](features)
        merged: Tensor = self.merge[level](torch.cat([self.gate[level](skip, features), features], dim=1))
        return merged

    def classify(self, features_NF: Tensor) -> Tensor:
        """[N, width + n_in] features of voxels -> [N, n_classes] logits; class 0 is 'no atom'."""
        logits: Tensor = self.classifier(features_NF)
        return logits


def _halving(style: Style, n_in: int, n_out: int) -> list[nn.Module]:
    return [MaxPool(), *style.layer(n_in, n_out)] if style.paper else [style.down(n_in, n_out)]


def _doubling(style: Style, n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(Double(style.periodic), *style.layer(n_in, n_out)) if style.paper else style.up(n_in, n_out)
