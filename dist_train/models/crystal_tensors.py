"""A padded batch of crystals on any device, and fresh rotations and origins for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from dist_train.config import GridSpec
from dist_train.crystal.lattice import plane_spacings
from dist_train.crystal.structure import Crystal


@dataclass(frozen=True, eq=False)
class CrystalTensors:
    """Crystals padded to one number of atoms, on one device; the arrays stay on the host, where they bound what is padded.

    lattice_B33: float64, rows in angstrom; frac_BN3: float64; numbers_BN: int64, 0 after the last atom; elements_BE: int64,
    each crystal's different atomic numbers, 0 after the last. atoms_B: atoms; edges_B3, spacings_B3: lengths of the lattice
    vectors and distances between opposite faces in angstrom, which no rotation changes.
    """

    lattice_B33: Tensor
    frac_BN3: Tensor
    numbers_BN: Tensor
    elements_BE: Tensor
    atoms_B: NDArray[np.int64]
    edges_B3: NDArray[np.float64]
    spacings_B3: NDArray[np.float64]

    @classmethod
    def of(cls, crystals: Sequence[Crystal]) -> CrystalTensors:
        """On the CPU. Raises ValueError for no crystals."""
        if not crystals:
            raise ValueError("a batch needs at least one crystal")
        lattices = np.stack([crystal.lattice_A for crystal in crystals])
        return cls(
            torch.from_numpy(lattices),
            _padded([crystal.frac_N3 for crystal in crystals]),
            _padded([crystal.numbers_N for crystal in crystals]),
            _padded([np.array(list(crystal.composition)) for crystal in crystals]),
            np.array([len(crystal) for crystal in crystals]),
            np.linalg.norm(lattices, axis=2),
            np.stack([plane_spacings(lattice) for lattice in lattices]),
        )

    def __len__(self) -> int:
        return len(self.atoms_B)

    @property
    def device(self) -> torch.device:
        return self.lattice_B33.device

    def to(self, device: torch.device) -> CrystalTensors:
        """The same batch on a device."""
        return replace(
            self,
            lattice_B33=send(self.lattice_B33, device),
            frac_BN3=send(self.frac_BN3, device),
            numbers_BN=send(self.numbers_BN, device),
            elements_BE=send(self.elements_BE, device),
        )

    def rows(self, part: slice) -> CrystalTensors:
        """Some of the crystals, padded to the most atoms among them."""
        atoms = self.atoms_B[part]
        most = int(atoms.max())
        return CrystalTensors(
            self.lattice_B33[part], self.frac_BN3[part, :most], self.numbers_BN[part, :most], self.elements_BE[part],
            atoms, self.edges_B3[part], self.spacings_B3[part],
        )  # fmt: skip


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from page-locked memory, as the host would wait for the device's queue otherwise."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _padded(rows: list[NDArray[np.generic]]) -> Tensor:
    """[B, N, ...]: rows of different lengths below each other, zeros after their ends."""
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)


def randomise(batch: CrystalTensors, spec: GridSpec, seeds: Sequence[int]) -> CrystalTensors:
    """Each crystal turned, moved and centred as the spec says: `frames.placed` for a batch, with a seed for each crystal.

    The numbers are drawn on the host by numpy, in the order of `frames.placed`, from the crystal's own seed: they depend
    on neither the device nor the rest of the batch. Raises ValueError for another number of seeds than of crystals.
    """
    rotation, origin = _draw(spec, seeds, len(batch))
    lattice, frac = batch.lattice_B33, batch.frac_BN3
    if spec.random_rotation:
        lattice = rows_times(lattice, send(torch.from_numpy(rotation), batch.device))
    if spec.frame == "unit":
        present = (batch.numbers_BN > 0).unsqueeze(-1)
        cart = rows_times(_wrap(frac), lattice) * present
        middle = cart.sum(1, keepdim=True) / present.sum(1, keepdim=True)
        return replace(batch, lattice_B33=lattice, frac_BN3=rows_times(cart - middle + spec.box_A / 2, inverse(lattice)))
    if spec.random_origin:
        frac = _wrap(frac + send(torch.from_numpy(origin), batch.device)[:, None])
    return replace(batch, lattice_B33=lattice, frac_BN3=frac)


def _draw(spec: GridSpec, seeds: Sequence[int], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotations [B, 3, 3], uniform on SO(3), and origins [B, 3] in [0, 1); only what the spec asks for is drawn."""
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} crystals")
    quaternions, origins = np.zeros((count, 4)), np.zeros((count, 3))
    quaternions[:, 3] = 1.0
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        if spec.random_rotation:
            quaternions[row] = rng.normal(size=4)
        if spec.random_origin:
            origins[row] = rng.random(3)
    return Rotation.from_quat(quaternions).as_matrix(), origins


def _wrap(frac: Tensor) -> Tensor:
    """As `structure.wrap`."""
    wrapped = frac % 1.0
    return torch.where(wrapped >= 1.0, 0.0, wrapped)


def rows_times(rows_BN3: Tensor, matrix_B33: Tensor) -> Tensor:
    """rows @ matrix in a fixed order of operations, so that a crystal's result depends on no other of its batch."""
    x, y, z = rows_BN3.unsqueeze(-1).unbind(2)
    a, b, c = matrix_B33.unsqueeze(1).unbind(2)
    return x * a + y * b + z * c


def inverse(lattice_B33: Tensor) -> Tensor:
    """[B, 3, 3] inverses; column i is the reciprocal vector b_i. torch.linalg.inv would make the host wait."""
    a, b, c = lattice_B33.unbind(1)
    columns = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=2)
    return columns / volumes(lattice_B33)[:, None, None]


def volumes(lattice_B33: Tensor) -> Tensor:
    """[B] volumes of cells, negative for left-handed ones."""
    a, b, c = lattice_B33.unbind(1)
    volumes: Tensor = (a * torch.linalg.cross(b, c)).sum(1)
    return volumes
