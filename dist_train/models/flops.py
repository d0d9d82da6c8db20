"""How much arithmetic a step of training is, counted on tensors without memory."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config import RunConfig
from dist_train.crystal.voxelize import Shape, n_channels
from dist_train.models.autoencoder import CrystalAutoencoder, Statistics
from dist_train.models.objectives import Objective


def meta_model(config: RunConfig, elements: int) -> CrystalAutoencoder:
    """The model of a run without memory for its weights: to count its parameters and arithmetic."""
    channels = n_channels(config.grid)
    statistics = Statistics((0.0,) * channels, (1.0,) * channels, (0.0,) * 6, (1.0,) * 6, 0.0, 1.0)
    with torch.device("meta"):
        return CrystalAutoencoder(config.grid, config.model, tuple(range(1, elements + 1)), statistics)


def flops_per_sample(config: RunConfig, elements: int, shape: Shape) -> float:
    """Floating-point operations of the networks, forward and backward, for one crystal on a grid of a shape.

    A product and its sum are two. The U-Net counts with the share of crystals that it sees. Left out, as they are a few
    percent or less: losses, activations, the classifier of the chosen voxels, and what activation checkpointing does twice.
    """
    device, train = torch.device("meta"), config.train
    model = Objective(meta_model(config, elements), train, device, torch.float32).model
    with FlopCounterMode(display=False) as vae:
        posterior = model.encode(
            torch.empty(1, n_channels(config.grid), *shape, device=device), torch.empty(1, 6, device=device)
        )
        decoding = model.decode(posterior.mean + posterior.log_variance, shape)
        if train.objective != "unet":
            torch.autograd.backward(torch.cat([part.flatten() for part in decoding]).sum())
    # In joint training the loss of the U-Net reaches what it sees.
    seen = decoding.density_BCDHW.detach().requires_grad_(train.objective == "joint")
    with FlopCounterMode(display=False) as unet:
        if train.objective != "vae":
            torch.autograd.backward(model.unet(seen).sum())
    return float(vae.get_total_flops() + train.unet_share * unet.get_total_flops())
