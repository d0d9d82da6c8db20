"""The parts of the training loss, for each crystal. Inputs may be bf16; every loss is computed and returned in float32.

A part is the sum of weight times the crystal's own loss, over the number of crystals: a mean, so that the mean over equal
parts of a batch (ranks, micro-batches) is that of the whole. A crystal of weight 0 counts as a crystal without any loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dist_train.models.vae import Latent


def weighted_mean(own_B: Tensor, weight_B: Tensor) -> Tensor:
    """Sum of weight times own loss, over the number of crystals."""
    return (own_B * weight_B).sum() / len(own_B)


def gaussian_kl(latent: Latent) -> Tensor:
    """[B, latent] KL(q || N(0, I)) in nats of each dimension (Kingma and Welling 2014, appendix B)."""
    mean, log_variance = latent.mean.float(), latent.log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


def squared_error(predicted: Tensor, true: Tensor) -> Tensor:
    """[B] mean squared error of each crystal; relative to predicting the mean where `true` is standardised."""
    return (predicted.float() - true.float()).square().flatten(1).mean(1)


def density_error(predicted_BCDHW: Tensor, true_BCDHW: Tensor, weight_C: Tensor) -> Tensor:
    """[B] `squared_error` of each channel, and of these the mean by weight."""
    error_BC = (predicted_BCDHW.float() - true_BCDHW.float()).square().mean((2, 3, 4))
    return error_BC @ weight_C / weight_C.sum()


def species_voxels(species_BDHW: Tensor, background_ratio: float, uniform_BDHW: Tensor) -> Tensor:
    """Boolean mask of the voxels of the species loss: all foreground, and `background_ratio` as many of the rest.

    uniform_BDHW: uniform random numbers in [0, 1) that choose the background.
    """
    foreground = species_BDHW > 0
    share = foreground.float().mean(dim=(1, 2, 3), keepdim=True)
    return foreground | (uniform_BDHW < background_ratio * share / (1.0 - share).clamp(min=1e-6))


def species_cross_entropy(logits_NK: Tensor, classes_N: Tensor, voxel_weight_N: Tensor) -> Tensor:
    """Weighted sum of the voxels' cross entropies in nats; integer labels, no one-hot targets."""
    return (cross_entropy(logits_NK.float(), classes_N, reduction="none") * voxel_weight_N).sum()


def reparameterise(latent: Latent, noise: Tensor) -> Tensor:
    """mean + exp(log_variance / 2) * noise, [B, latent]."""
    return latent.mean + torch.exp(0.5 * latent.log_variance) * noise
