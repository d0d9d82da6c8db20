"""The attention U-Net that segments decoded density channels into elements."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.models.blocks import AttentionGate, Down, PeriodicConv, Up


class AttentionUNet(nn.Module):
    """[B, n_in, D, H, W] -> per-voxel features [B, width + n_in, D, H, W]; `classify` turns features into logits.

    Attention gates sit on every skip. The input joins the features, so that the element codes reach the classifier
    unblurred, and only the voxels that a loss looks at need to be classified.
    """

    def __init__(self, n_in: int, n_classes: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.first = nn.Sequential(PeriodicConv(n_in, width), nn.SiLU(), PeriodicConv(width, width), nn.SiLU())
        self.down = nn.ModuleList(
            nn.Sequential(Down(a, b), PeriodicConv(b, b), nn.SiLU()) for a, b in zip(widths, widths[1:], strict=False)
        )
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(Up(below, here) for below, here in pairs)
        self.gate = nn.ModuleList(AttentionGate(here, here) for _, here in pairs)
        self.merge = nn.ModuleList(nn.Sequential(PeriodicConv(2 * here, here), nn.SiLU()) for _, here in pairs)
        self.classifier = nn.Linear(width + n_in, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        skips = []
        for down in self.down:
            skips.append(features)
            features = down(features)
        for up, gate, merge in zip(self.up, self.gate, self.merge, strict=True):
            skip = skips.pop()
            features = up(features)
            features = merge(torch.cat([gate(skip, features), features], dim=1))
        return torch.cat([features, x], dim=1)

    def classify(self, features_NF: Tensor) -> Tensor:
        """[N, width + n_in] features of voxels -> [N, n_classes] logits; class 0 is 'no atom'."""
        logits: Tensor = self.classifier(features_NF)
        return logits
