"""The joint objective: VAE and U-Net trained together, as Hoffmann et al. (2019) do, on element-coded channels."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

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


@dataclass(frozen=True)
class Noise:
    """The random numbers of one rank's step: latent_BL normal, voxels_bDHW uniform in [0, 1) for b U-Net crystals."""

    latent_BL: Tensor
    voxels_bDHW: Tensor


def step_noise(
    seed: int, step: int, batch: int, rank: int, ranks: int, latent: int, shape: int, share: float, device: torch.device
) -> Noise:
    """Noise of a rank's slice, a pure function of (seed, step): drawn for the global batch, so resuming repeats it.

    batch: crystals a rank; share: of them the U-Net sees. Drawn on the CPU, so that every device sees the same numbers.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    normal = torch.randn(batch * ranks, latent, generator=generator)[rank * batch : (rank + 1) * batch]
    generator.manual_seed(((seed * 1_000_003 + step) * 4099 + rank + 1) % 2**63)
    uniform = torch.rand(ceil(batch * share), shape, shape, shape, generator=generator)
    return Noise(normal.to(device), uniform.to(device))


class JointObjective(nn.Module):
    """Model and loss in one module, so that an engine wraps a single `forward(batch, noise) -> (loss, parts)`.

    The U-Net sees the first crystals of the batch only (their order is random); validation passes noise of zeros and
    uniform numbers for all crystals.
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
            "species": self._species(decoding, batch.species_BDHW, noise.voxels_bDHW),
            "kl": gaussian_kl(posterior),
            "lattice": squared_error(decoding.cell_B6, cell),
            "count": squared_error(decoding.log_count_B, log_count),
            "composition": (decoding.composition_BE.float() - composition).square().sum(1).mean(),
        }
        loss = torch.stack([getattr(self.weights, name) * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _species(self, decoding: Decoding, species_BDHW: Tensor, uniform_bDHW: Tensor) -> Tensor:
        b = len(uniform_bDHW)
        species = species_BDHW[:b]
        mask = species_voxels(species, self.background_ratio, uniform_bDHW)
        features = self.model.unet(decoding.density_BCDHW[:b]).movedim(1, -1)[mask]
        gate = composition_gate(decoding.composition_BE[:b].float())
        crystal_of_voxel = mask.nonzero()[:, 0]
        logits = self.model.unet.classify(features).float() + gate[crystal_of_voxel]
        return species_cross_entropy(logits, self.scale.class_of_z[species[mask].long()])
