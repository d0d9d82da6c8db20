"""The joint objective: VAE and U-Net trained together, as Hoffmann et al. (2019) do, on element-coded channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.config import LossWeights, TrainConfig
from dist_train.models.autoencoder import CrystalAutoencoder, CrystalBatch, Standardiser, composition_gate
from dist_train.models.losses import (
    gaussian_kl,
    reparameterise,
    species_cross_entropy,
    species_voxels,
    squared_error,
)
from dist_train.models.vae import Decoding

PARTS = ("density", "species", "kl", "lattice", "count", "composition")
"""Names of the loss parts; `LossWeights` has a weight for each."""


@dataclass(frozen=True)
class Noise:
    """The random numbers of a batch of B crystals, b of which the U-Net sees.

    latent_BL: normal; seen_b: places of those crystals in the batch; voxels_bDHW: uniform in [0, 1), one grid each.
    """

    latent_BL: Tensor
    seen_b: Tensor
    voxels_bDHW: Tensor


def step_noise(
    seed: int, step: int, positions: Sequence[int], share: float, latent: int, shape: int, device: torch.device
) -> Noise:
    """Noise of the crystals at some positions of a step's global batch.

    Each crystal's numbers are a pure function of (seed, step, position): resuming repeats them, and neither they nor the
    choice of the crystals that the U-Net sees depend on the number of ranks. Drawn on the CPU, so that every device sees
    the same. share: of the crystals that the U-Net sees, evenly spread; share * len(positions) is a whole number.
    """
    generator = torch.Generator()
    size, seen = len(positions), round(share * len(positions))
    chosen = [place for place in range(size) if (place + 1) * seen // size > place * seen // size]
    latents, voxels = [], []
    for place, position in enumerate(positions):
        generator.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + position) % 2**63)
        latents.append(torch.randn(latent, generator=generator))
        if place in chosen:
            voxels.append(torch.rand(shape, shape, shape, generator=generator))
    return Noise(torch.stack(latents).to(device), torch.tensor(chosen, device=device), torch.stack(voxels).to(device))


class JointObjective(nn.Module):
    """Model and loss in one module, so that an engine wraps a single `forward(batch, noise) -> (loss, parts)`.

    The U-Net, which costs most, sees a share of the crystals only; their order is random.
    """

    def __init__(self, model: CrystalAutoencoder, train: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.weights: LossWeights = train.loss
        self.background_ratio = train.background_ratio
        self.scale = Standardiser(model, device, dtype)

    def forward(self, batch: CrystalBatch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss (float32 scalar) and its unweighted parts, detached."""
        density, cell = self.scale.density(batch.density_BCDHW), self.scale.cell(batch.cell_B6)
        posterior = self.model.encode(density, cell)
        decoding = self.model.decode(reparameterise(posterior, noise.latent_BL.to(density.dtype)))
        composition = batch.composition_BZ[:, self.scale.elements].float()
        log_count = (batch.composition_BZ.sum(1).log() - self.scale.count_mean) / self.scale.count_std
        parts = {
            "density": squared_error(decoding.density_BCDHW, density),
            "species": self._species(decoding, batch.species_BDHW, noise),
            "kl": gaussian_kl(posterior),
            "lattice": squared_error(decoding.cell_B6, cell),
            "count": squared_error(decoding.log_count_B, log_count),
            "composition": (decoding.composition_BE.float() - composition).square().sum(1).mean(),
        }
        loss = torch.stack([getattr(self.weights, name) * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _species(self, decoding: Decoding, species_BDHW: Tensor, noise: Noise) -> Tensor:
        species = species_BDHW[noise.seen_b]
        mask = species_voxels(species, self.background_ratio, noise.voxels_bDHW)
        features = self.model.unet(decoding.density_BCDHW[noise.seen_b]).movedim(1, -1)[mask]
        gate = composition_gate(decoding.composition_BE[noise.seen_b].float())
        crystal_of_voxel = mask.nonzero()[:, 0]
        logits = self.model.unet.classify(features).float() + gate[crystal_of_voxel]
        return species_cross_entropy(logits, self.scale.class_of_z[species[mask].long()], crystal_of_voxel)
