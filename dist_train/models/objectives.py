"""The objectives: VAE and U-Net trained together, as Hoffmann et al. (2019) do, or one of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.config import LossWeights, TrainConfig
from dist_train.crystal.voxelize import Shape
from dist_train.errors import ConfigError
from dist_train.models.autoencoder import CrystalAutoencoder, CrystalBatch, Standardiser, check_grid, composition_gate
from dist_train.models.blocks import GridConv
from dist_train.models.losses import (
    density_error,
    gaussian_kl,
    reparameterise,
    species_cross_entropy,
    species_voxels,
    squared_error,
    weighted_mean,
)
from dist_train.models.vae import Decoding, shape_numbers

PARTS = ("density", "species", "kl", "lattice", "count", "composition")
"""Names of the loss parts; `LossWeights` has a weight for each. Every objective reports all of them."""


@dataclass(frozen=True)
class Noise:
    """The random numbers of a batch of B crystals, b of which the U-Net sees.

    latent_BL: normal; seen_b: places of those crystals in the batch; voxels_bDHW: uniform in [0, 1), one grid each.
    """

    latent_BL: Tensor
    seen_b: Tensor
    voxels_bDHW: Tensor


def step_noise(
    seed: int, step: int, positions: Sequence[int], share: float, latent: int, shape: Shape, device: torch.device
) -> Noise:
    """Noise of the crystals at some positions of a step's global batch, all on grids of one shape.

    Each crystal's numbers are a pure function of (seed, step, position): resuming repeats them, and neither they nor the
    choice of the crystals that the U-Net sees depend on the number of ranks. Drawn on the CPU, so that every device sees
    the same. share: of the crystals that the U-Net sees (see `Objective.share`), evenly spread; share * len(positions) is a
    whole number.
    """
    generator = torch.Generator()
    size, seen = len(positions), round(share * len(positions))
    chosen = [place for place in range(size) if (place + 1) * seen // size > place * seen // size]
    latents, voxels = torch.empty(size, latent), torch.empty(seen, *shape)
    for place, position in enumerate(positions):
        generator.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + position) % 2**63)
        torch.randn(latent, generator=generator, out=latents[place])
        if place in chosen:
            torch.rand(shape, generator=generator, out=voxels[chosen.index(place)])
    return Noise(latents.to(device), torch.tensor(chosen, dtype=torch.int64, device=device), voxels.to(device))


class Objective(nn.Module):
    """Model and loss in one module, so that an engine wraps a single `forward(batch, noise, kl_weight) -> (loss, parts)`.

    joint: the U-Net is trained on what the VAE decodes, and its loss reaches the VAE. It costs most, and sees a share of the
    crystals only; their order is random. vae: the U-Net doesn't run; the part `species` is 0. unet: all parts are
    reported, only `species` is trained, and there is no graph through the VAE. What an objective doesn't train is frozen
    (requires_grad is False), as engines of several ranks wait for a gradient of every parameter that isn't.
    """

    def __init__(self, model: CrystalAutoencoder, train: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.kind = train.objective
        self.weights: LossWeights = train.loss
        self.background_ratio = train.background_ratio
        self.share = 0.0 if self.kind == "vae" else train.unet_share
        """Share of the crystals that the U-Net sees in a step of training."""
        self.scale = Standardiser(model, device, dtype)
        self.channel_weight_C = torch.ones(len(model.statistics.channel_mean), device=device)
        self.channel_weight_C[check_grid(model.grid)[1]] = train.loss.position_channel
        for network in self.frozen():
            network.requires_grad_(False)

    def frozen(self) -> list[nn.Module]:
        """The networks that are not trained."""
        model = self.model
        if self.kind == "joint":
            return []
        return [model.unet] if self.kind == "vae" else [model.encoder, model.decoder]

    def train(self, mode: bool = True) -> Objective:
        """Networks that are not trained stay in evaluation mode."""
        super().train(mode)
        for network in self.frozen():
            network.eval()
        return self

    def forward(
        self, batch: CrystalBatch, noise: Noise, kl_weight: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss (float32 scalar) and its unweighted parts, detached.

        kl_weight: multiplies the weight of the KL divergence (see `kl_warmup`). With free bits, the loss holds
        max(KL, free_bits) of each crystal and latent dimension, and the part `kl` the true divergence: maxima of means over
        the batch would not add up over ranks.
        """
        density, cell, weight = self.scale.density(batch.density_BCDHW), self.scale.cell(batch.cell_B6), batch.weight_B
        posterior = self.model.encode(density, cell)
        decoding = self.model.decode(reparameterise(posterior, noise.latent_BL.to(density.dtype)), batch.shape)
        kl_BL = gaussian_kl(posterior)
        composition, log_count = self._counts(batch)
        parts = {
            "density": weighted_mean(density_error(decoding.density_BCDHW, density, self.channel_weight_C), weight),
            "species": kl_BL.new_zeros(()) if self.kind == "vae" else self._species(decoding, batch, noise),
            "kl": weighted_mean(kl_BL.sum(1), weight),
            "lattice": weighted_mean(self._cell_error(decoding, cell, batch.shape), weight),
            "count": weighted_mean(squared_error(decoding.log_count_B[:, None], log_count[:, None]), weight),
            "composition": weighted_mean((decoding.composition_BE.float() - composition).square().sum(1), weight),
        }
        paid = {**parts, "kl": weighted_mean(kl_BL.clamp(min=self.weights.free_bits).sum(1), weight) * kl_weight}
        trained = ("species",) if self.kind == "unet" else PARTS
        loss = torch.stack([getattr(self.weights, name) * paid[name] for name in trained]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _counts(self, batch: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Atoms of each of the model's elements [B, E], and standardised logarithm of the number of atoms [B]."""
        # No crystal is empty but in place of a damaged one: its logarithm would be infinite, and 0 times that not a number.
        atoms = batch.composition_BZ.sum(1).clamp(min=1.0)
        return batch.composition_BZ[:, self.scale.elements].float(), (
            atoms.log() - self.scale.count_mean
        ) / self.scale.count_std

    def _cell_error(self, decoding: Decoding, cell_B6: Tensor, shape: Shape) -> Tensor:
        """[B] squared error of the cell, and of the shape of an adaptive grid."""
        error = squared_error(decoding.cell_B6, cell_B6)
        return (
            error + squared_error(decoding.shape_B3, shape_numbers(shape, cell_B6)) if self.model.encoder.adaptive else error
        )

    def _species(self, decoding: Decoding, batch: CrystalBatch, noise: Noise) -> Tensor:
        """Mean over each crystal's voxels, then over the crystals that the U-Net sees: all of these count alike."""
        species = batch.species_BDHW[noise.seen_b]
        mask = species_voxels(species, self.background_ratio, noise.voxels_bDHW)
        features = self.model.unet(decoding.density_BCDHW[noise.seen_b]).movedim(1, -1)[mask]
        crystal_of_voxel = mask.nonzero()[:, 0]
        logits = self.model.unet.classify(features).float()
        if self.model.model.gate:
            logits = logits + composition_gate(decoding.composition_BE[noise.seen_b].float())[crystal_of_voxel]
        voxel_weight = batch.weight_B[noise.seen_b] / mask.sum((1, 2, 3)).clamp(min=1) / len(species)
        return species_cross_entropy(logits, self.scale.class_of_z[species[mask].long()], voxel_weight[crystal_of_voxel])


def prepare(objective: Objective, train: TrainConfig) -> Objective:
    """Turn on what makes steps faster or smaller and changes no result but by rounding; names of parameters stay.

    Before the weights are handed to an engine. Raises ConfigError where torch.compile finds no compiler.
    """
    model = objective.model
    networks = (model.encoder, model.decoder, model.unet)
    for network in networks:
        network.recompute = train.activation_checkpointing
    for layer in objective.modules():
        if isinstance(layer, GridConv):
            layer.channels_last = train.channels_last
    if train.compile:
        if model.grid.shape == "adaptive":
            # Each of dozens of shapes would be compiled anew: one graph for all of them fails inside torch 2.13.
            raise ConfigError(
                "train.compile needs grids of one shape, grid.shape is 'adaptive'; give a number or set train.compile=false"
            )
        _check_compiler(next(model.parameters()).device)
        for network in networks:
            network.compile(dynamic=False)
    return objective


def _check_compiler(device: torch.device) -> None:
    """Compile something tiny now: torch.compile finds out at the first step only."""
    try:
        torch.compile(lambda x: x.sin() + 1.0)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise ConfigError(
            f"train.compile finds no working compiler: {str(error).strip().splitlines()[0]}; install one (a C++ compiler "
            "for CPUs, Triton for GPUs) or set train.compile=false"
        ) from None
