"""Latents with a grid, drawn in two steps: the vector, which says the cell and the shape of the grid, then the grid.

The grids of crystals have many shapes, and what is known of one should serve for the others: the flow works on the waves
of the grid, not on its voxels. A wave is the same on every grid that holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import pi, prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.crystal.voxelize import Shape
from dist_train.models.compositions import CompositionModel
from dist_train.models.flow import LatentFlow, Pairs, Points, Velocity, atoms_told, fit_flow, fit_velocity, n_atoms_told
from dist_train.models.vae import Latent

EXACT = -100.0
"""Logarithm of the variance of what isn't spread: symmetries show where atoms lie exactly, and draws from posteriors, which
the flow of a vector alone is fitted to, spoil them."""
LEARNING_RATE = 2e-3


class GridFlow(nn.Module):
    """From noise to latents of `n_vector` numbers and grids of `n_channels`, all in units of the flow.

    shapes: those of the coarse grids that occur; others are drawn, too, as far as their waves are known.
    """

    def __init__(
        self, n_vector: int, n_channels: int, shapes: Sequence[Shape], width: int, depth: int, compositions: CompositionModel
    ) -> None:
        super().__init__()
        self.vector = LatentFlow(n_vector, width, depth, compositions)
        self.n_channels, self.shapes = n_channels, list(shapes)
        self.waves = {wave: place for place, wave in enumerate(sorted({wave for s in shapes for wave in _waves(s)}))}
        n_told = n_atoms_told(compositions) + n_vector + len(shapes)
        self.grid = Velocity(n_channels * len(self.waves), width, depth, n_told)

    @property
    def compositions(self) -> CompositionModel | None:
        """Of what the crystals are made."""
        return self.vector.compositions

    @property
    def n_centred(self) -> int:
        """Numbers of a latent, the first ones, that the flow knows without their mean."""
        return self.vector.size

    def carry(self, noise_BL: Tensor, atoms_BE: Tensor, coarse: Callable[[Tensor], list[Shape]]) -> Tensor:
        """Points of N(0, I) to latents of crystals made of such atoms; coarse: shapes of the grids, by the vectors.

        Of the noise only the numbers of the vector count. A grid is what the middle of the noise leads to: the flow isn't
        exact, and its errors grow from there. By its vector and atoms most of a grid is known; what crystals of one
        composition differ by, the vectors say.
        """
        n = self.vector.size
        vector_BV = self.vector.carry(noise_BL[:, :n], atoms_BE)
        shapes = coarse(vector_BV)
        there_BL = torch.stack([self.there(shape) for shape in shapes]).to(noise_BL)
        # What a row doesn't have is 0 all the way: the network was fitted so.
        grid_BL = self.grid.carried(torch.zeros_like(there_BL), self.told(vector_BV, atoms_BE, shapes), there_BL)
        found = noise_BL.new_zeros(noise_BL.shape)
        found[:, :n] = vector_BV
        for place, (row, shape) in enumerate(zip(grid_BL, shapes, strict=True)):
            found[place, n : n + self.n_channels * prod(shape)] = self.to_voxels(row, shape)
        return found

    def told(self, vector_BV: Tensor, atoms_BE: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """[B, T] what the second step is told."""
        which = [[float(shape == one) for one in self.shapes] for shape in shapes]
        return torch.cat([atoms_told(atoms_BE), vector_BV, torch.tensor(which).to(vector_BV)], dim=1)

    def there(self, shape: Shape) -> Tensor:
        """[channels * waves] 1 for waves that a grid of this shape has, else 0."""
        found = torch.zeros(len(self.waves))
        found[self._places(shape)[1]] = 1.0
        return found.repeat(self.n_channels)

    def to_waves(self, voxels_M: Tensor, shape: Shape) -> Tensor:
        """[channels * waves] of a latent's numbers behind its vector; white noise stays white."""
        grid = voxels_M[: self.n_channels * prod(shape)].reshape(self.n_channels, *shape)
        here, there = self._places(shape)
        found = voxels_M.new_zeros(self.n_channels, len(self.waves))
        found[:, there] = _turned(grid, shape, "cxyz,ix,jy,kz->cijk").flatten(1)[:, here]
        return found.flatten()

    def to_voxels(self, waves_L: Tensor, shape: Shape) -> Tensor:
        """Inverse of `to_waves`: [channels * voxels]."""
        here, there = self._places(shape)
        grid = waves_L.new_zeros(self.n_channels, prod(shape))
        grid[:, here] = waves_L.reshape(self.n_channels, -1)[:, there]
        return _turned(grid.reshape(self.n_channels, *shape), shape, "cijk,ix,jy,kz->cxyz").flatten()

    def _places(self, shape: Shape) -> tuple[list[int], list[int]]:
        """Of the known waves of a grid, among its own and among all."""
        known = [(here, self.waves[wave]) for here, wave in enumerate(_waves(shape)) if wave in self.waves]
        return [here for here, _ in known], [there for _, there in known]

    def config(self) -> dict[str, Any]:
        """Everything but the weights and the model's elements, ready for JSON."""
        return {**self.vector.config(), "n_channels": self.n_channels, "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_config(cls, n_vector: int, elements: Sequence[int], config: dict[str, Any]) -> GridFlow:
        """Inverse of `config`, with fresh weights."""
        compositions = CompositionModel.from_config(elements, config)
        assert compositions is not None
        shapes = [(d, h, w) for d, h, w in config["shapes"]]
        return cls(n_vector, config["n_channels"], shapes, config["width"], config["depth"], compositions)


def fit_grid_flow(
    pairs: Pairs, shapes: Sequence[Shape], n_vector: int, n_channels: int, compositions: CompositionModel, width: int,
    depth: int, steps: int, seed: int, progress: Callable[[float], None] = lambda error: None,
) -> GridFlow:  # fmt: skip
    """The flow to the means of posteriors; shapes: of each crystal's coarse grid. See `flow.fit_flow`.

    progress(error): one more of twice as many steps is done; the latest error.
    """
    latent_NL = pairs.latent.mean
    vector_NV = latent_NL[:, :n_vector]
    vector = fit_flow(Pairs(_exact(vector_NV), pairs.atoms_NE), compositions, width, depth, steps, seed, progress)
    with torch.random.fork_rng(devices=[]):
        flow = GridFlow(n_vector, n_channels, sorted(set(shapes)), width, depth, compositions).to(latent_NL.device)
    flow.vector = vector
    there = {shape: flow.there(shape) for shape in flow.shapes}
    waves_NL = torch.stack([flow.to_waves(row, shape) for row, shape in zip(latent_NL[:, n_vector:], shapes, strict=True)])
    told_NT = flow.told(vector_NV, pairs.atoms_NE, shapes)
    there_NL = torch.stack([there[shape] for shape in shapes]).to(waves_NL.device, torch.uint8)
    flow.grid = fit_velocity(
        lambda: Velocity(waves_NL.shape[1], width, depth, told_NT.shape[1]), Points(_exact(waves_NL), told_NT, there_NL),
        steps, seed, progress, LEARNING_RATE,
    )  # fmt: skip
    return flow.eval()


def _exact(mean_NL: Tensor) -> Latent:
    return Latent(mean_NL, mean_NL.new_full((1, 1), EXACT).expand_as(mean_NL))


@cache
def _waves(shape: Shape) -> list[tuple[int, int, int]]:
    """Of a grid of this shape, in the order of `_turned`: places among the waves of each axis."""
    d, h, w = shape
    return [(i, j, k) for i in range(d) for j in range(h) for k in range(w)]


def _turned(grid: Tensor, shape: Shape, axes: str) -> Tensor:
    return torch.einsum(axes, grid, *(_orthonormal(n).to(grid) for n in shape))


@cache
def _orthonormal(n: int) -> Tensor:
    """[n, n] the waves of n samples of a period, each a row of length 1: 1, cosine and sine of one turn, of two, ..."""
    turns = torch.arange(n, dtype=torch.float64) / n
    rows = [torch.ones_like(turns)]
    for k in range(1, n // 2 + 1):
        rows += [(2 * pi * k * turns).cos(), (2 * pi * k * turns).sin()]
    waves = torch.stack(rows[:n])
    unit: Tensor = waves / waves.norm(dim=1, keepdim=True)
    return unit
