"""Latents and network outputs to crystals: what validation, evaluation and generation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.crystal.decode import Decoded, decode
from dist_train.crystal.lattice import from_lengths_angles
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.models.autoencoder import CrystalAutoencoder, Standardiser, cell_numbers, cell_parameters


@dataclass(frozen=True)
class Fields:
    """What the networks say of B crystals, in physical units.

    density_BCDHW; species_BDHW: most probable element of each voxel; probability_BDHW: of any atom; parameters_B6: cell.
    """

    density_BCDHW: NDArray[np.float32]
    species_BDHW: NDArray[np.uint8]
    probability_BDHW: NDArray[np.float32]
    parameters_B6: NDArray[np.float64]


class Codec:
    """A model ready for inference: crystals -> latents -> fields -> crystals."""

    def __init__(self, model: CrystalAutoencoder, device: torch.device | None = None) -> None:
        parameter = next(model.parameters())
        self.device = device or parameter.device
        self.model = model.to(self.device).eval()
        self.scale = Standardiser(model, self.device, parameter.dtype)
        self._atomic_number = torch.tensor((0, *model.elements), dtype=torch.uint8, device=self.device)

    @torch.inference_mode()
    def encode(self, crystals: Sequence[Crystal]) -> Tensor:
        """[B, latent] posterior means (float32). Raises CrystalError for a crystal that the grid can't hold."""
        density = np.stack([voxelize(crystal, self.model.grid).density_CDHW for crystal in crystals])
        cell = cell_numbers(np.stack([crystal.lengths_angles for crystal in crystals]))
        return self.latents(torch.from_numpy(density), torch.from_numpy(cell))

    @torch.inference_mode()
    def latents(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Tensor:
        """[B, latent] posterior means (float32) of grids and cell numbers in physical units (see `CrystalBatch`)."""
        density = self.scale.density(density_BCDHW.to(self.device))
        return self.model.encode(density, self.scale.cell(cell_B6.to(self.device))).mean.float()

    @torch.inference_mode()
    def fields(self, latent_BL: Tensor) -> Fields:
        """The networks' outputs for latents."""
        decoding = self.model.decode(latent_BL.to(self.device, self.scale.dtype))
        logits = self.model.segment(decoding).float()
        species = self._atomic_number[logits[:, 1:].argmax(1) + 1]
        probability = 1.0 - torch.softmax(logits, 1)[:, 0]
        return Fields(
            self.scale.physical_density(decoding.density_BCDHW).cpu().numpy(),
            species.cpu().numpy(),
            probability.cpu().numpy(),
            cell_parameters(self.scale.physical_cell(decoding.cell_B6).cpu().numpy()),
        )

    def crystals(self, latent_BL: Tensor, ids: Sequence[str]) -> list[Decoded]:
        """A decoded crystal, or the reason that there is none, for each latent."""
        return self.decode_fields(self.fields(latent_BL), ids)

    def decode_fields(self, fields: Fields, ids: Sequence[str]) -> list[Decoded]:
        """The crystals in fields."""
        spec = self.model.grid
        occupancy = spec.channels.index("occupancy")
        found = []
        for id, density, species, probability, parameters in zip(
            ids, fields.density_BCDHW, fields.species_BDHW, fields.probability_BDHW, fields.parameters_B6, strict=True
        ):
            try:
                lattice = from_lengths_angles(parameters)
            except ValueError as error:
                found.append(Decoded(None, np.zeros(0), str(error)))
                continue
            found.append(decode(id, density[occupancy], species, probability, lattice, spec))
        return found
