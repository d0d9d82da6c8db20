"""The parts of the training loss. Inputs may be bf16; every loss is computed and returned in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dist_train.models.vae import Latent


def gaussian_kl(latent: Latent) -> Tensor:
    """KL(q || N(0, I)) in nats, mean over crystals (Kingma and Welling 2014, appendix B)."""
    mean, log_variance = latent.mean.float(), latent.log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()


def squared_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean squared error; relative to predicting the mean where `true` is standardised."""
    return (predicted.float() - true.float()).square().mean()


def species_voxels(species_BDHW: Tensor, background_ratio: float, uniform_BDHW: Tensor) -> Tensor:
    """Boolean mask of the voxels of the species loss: all foreground, and `background_ratio` as many of the rest.

    uniform_BDHW: uniform random numbers in [0, 1) that choose the background.
    """
    foreground = species_BDHW > 0
    share = foreground.float().mean(dim=(1, 2, 3), keepdim=True)
    return foreground | (uniform_BDHW < background_ratio * share / (1.0 - share).clamp(min=1e-6))


def species_cross_entropy(logits_NK: Tensor, classes_N: Tensor, crystal_N: Tensor) -> Tensor:
    """Cross entropy in nats: mean over each crystal's voxels, then over crystals; integer labels, no one-hot targets.

    crystal_N: the crystal of each voxel, rising. Every crystal counts alike, so the mean over ranks is that of the batch.
    """
    voxels = torch.bincount(crystal_N)
    weights = 1.0 / (voxels * (voxels > 0).sum()).float()
    return (cross_entropy(logits_NK.float(), classes_N, reduction="none") * weights[crystal_N]).sum()


def reparameterise(latent: Latent, noise: Tensor) -> Tensor:
    """mean + exp(log_variance / 2) * noise, [B, latent]."""
    return latent.mean + torch.exp(0.5 * latent.log_variance) * noise
