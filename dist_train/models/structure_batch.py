"""A batch of crystals without grids, which are made on the device in the training step, freshly turned and moved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dist_train.config import GridSpec
from dist_train.models.autoencoder import CrystalBatch
from dist_train.models.crystal_tensors import CrystalTensors, randomise
from dist_train.models.voxelize_batch import Shape, voxelize_batch


@dataclass(frozen=True, eq=False)
class StructureBatch:
    """Crystals as they lie in shards, and what makes a CrystalBatch of them: the interface of one, on the CPU.

    shape: of the grids; seeds: of each crystal's random rotation and origin. cell_B6, composition_BZ and weight_B are as in
    CrystalBatch; the grids of a crystal of weight 0 are zeros.
    """

    crystals: CrystalTensors
    spec: GridSpec
    shape: Shape
    seeds: tuple[int, ...]
    cell_B6: Tensor
    composition_BZ: Tensor
    weight_B: Tensor

    @property
    def size(self) -> int:
        """Crystals, damaged ones included."""
        return len(self.weight_B)

    def rows(self, part: slice) -> StructureBatch:
        """Some of the crystals."""
        return replace(
            self,
            crystals=self.crystals.rows(part),
            seeds=self.seeds[part],
            cell_B6=self.cell_B6[part],
            composition_BZ=self.composition_BZ[part],
            weight_B=self.weight_B[part],
        )

    def to(self, device: torch.device) -> CrystalBatch:
        """The crystals on grids, made on a device; density is float32."""
        crystals = randomise(_unwrapped(self.crystals, self.spec).to(device), self.spec, self.seeds)
        density, species = voxelize_batch(crystals, self.spec, self.shape)
        for row in np.flatnonzero(self.weight_B.numpy() == 0).tolist():
            density[row], species[row] = 0.0, 0
        rest = (tensor.to(device, non_blocking=True) for tensor in (self.cell_B6, self.composition_BZ, self.weight_B))
        return CrystalBatch(density, species, *rest)


def _unwrapped(crystals: CrystalTensors, spec: GridSpec) -> CrystalTensors:
    """The crystals so that `randomise`, which wraps coordinates, keeps the images that units were stored with.

    The atoms of a unit span less than a cell along each axis; around its middle no wrapping parts them.
    """
    if spec.frame != "unit":
        return crystals
    frac, absent = crystals.frac_BN3, (crystals.numbers_BN == 0).unsqueeze(-1)
    low = frac.masked_fill(absent, torch.inf).amin(1, keepdim=True)
    high = frac.masked_fill(absent, -torch.inf).amax(1, keepdim=True)
    inside = (frac - (low + high) / 2 + 0.5).clamp(0.0, np.nextafter(1.0, 0.0))
    return replace(crystals, frac_BN3=inside.masked_fill(absent, 0.0))
