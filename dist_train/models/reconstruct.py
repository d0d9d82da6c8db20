"""Latents and network outputs to crystals: what validation, evaluation and generation share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import pi, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.crystal import decode as decoding
from dist_train.crystal.decode import Decoded, Estimate
from dist_train.crystal.decode_box import decode_frame
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.lattice import from_lengths_angles
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import Shape, VoxelGrid, n_channels, voxelize
from dist_train.errors import CrystalError
from dist_train.models.autoencoder import (
    USUAL_EDGE,
    CrystalAutoencoder,
    EstimateErrors,
    Standardiser,
    cell_numbers,
    cell_parameters,
    check_grid,
)
from dist_train.models.vae import Decoding, Latent, shape_of


@dataclass(frozen=True)
class Fields:
    """What the networks say of one crystal, in physical units.

    density_CDHW; species_DHW: most probable element of each voxel; probability_DHW: of any atom; parameters_6: cell;
    estimate: of the atoms.
    """

    density_CDHW: NDArray[np.float32]
    species_DHW: NDArray[np.uint8]
    probability_DHW: NDArray[np.float32]
    parameters_6: NDArray[np.float64]
    estimate: Estimate


BATCH = 32
"""Latents that are decoded at a time where nobody needs more."""
KNOWN_ERROR = 0.1
"""Of known numbers of atoms, as a decoder is told: it overrules all votes but leaves the choice of the site to them."""
GRIDS, GRIDS_ON_GPU = 4, 32
"""Grids that the networks are given at a time, always as many, the last one repeated: torch takes other ways for fewer or
more, which round otherwise, and a crystal would hang on its company. On a CPU more are hardly faster, and most shapes are
seldom; of two, torch 2.13 rounds the second one otherwise than the first."""
ROWS = 16
"""What the number of latents that layers without a grid are given is a multiple of, for the same reason."""


class Codec:
    """A model ready for inference: crystals -> latents -> fields -> crystals."""

    def __init__(self, model: CrystalAutoencoder, device: torch.device | None = None) -> None:
        parameter = next(model.parameters())
        self.device = device or parameter.device
        self.model = model.to(self.device).eval()
        self.scale = Standardiser(model, self.device, parameter.dtype)
        self.channel, self.channel_place = check_grid(model.grid)
        self._atomic_number = torch.tensor((0, *model.elements), dtype=torch.uint8, device=self.device)
        self._grids_together = GRIDS if self.device.type == "cpu" else GRIDS_ON_GPU

    def encode(self, crystals: Sequence[Crystal]) -> Tensor:
        """[B, latent] posterior means (float32). Raises CrystalError for a crystal that the grid can't hold."""
        return self.posterior(crystals).mean

    @torch.inference_mode()
    def posterior(self, crystals: Sequence[Crystal], shapes: Sequence[Shape] | None = None) -> Latent:
        """Float32 posteriors, on grids of these shapes where any are given.

        Raises CrystalError for a crystal that the grid can't hold.
        """
        grids = self._grids(crystals, [None] * len(crystals) if shapes is None else shapes)
        cell = torch.from_numpy(cell_numbers(np.stack([crystal.lengths_angles for crystal in crystals])))
        found = torch.empty(2, len(crystals), self.model.model.latent_size, device=self.device)
        for places in self._together([grid.shape for grid in grids]):
            latent = self._posterior(torch.from_numpy(np.stack([grids[place] for place in places])), cell[places])
            found[:, places] = torch.stack(latent)  # of those repeated, which are the same, one stays
        return Latent(*found)

    def _grids(self, crystals: Sequence[Crystal], shapes: Sequence[Shape | None]) -> list[NDArray[np.float32]]:
        spec = self.model.grid
        outs = [None if shape is None else VoxelGrid.empty(n_channels(spec), shape) for shape in shapes]
        return [voxelize(self.centred(crystal), spec, out).density_CDHW for crystal, out in zip(crystals, outs, strict=True)]

    def centred(self, crystal: Crystal) -> Crystal:
        """The crystal; for a unit with its atoms in the middle of the cube, where `frames.placed` has them."""
        if self.model.grid.frame != "unit":
            return crystal
        away = self.model.grid.box_A / 2 - crystal.cart_N3.mean(0)
        return replace(crystal, frac_N3=crystal.frac_N3 + away @ np.linalg.inv(crystal.lattice_A))

    @torch.inference_mode()
    def latents(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Tensor:
        """[B, latent] posterior means (float32) of grids and cell numbers in physical units (see `CrystalBatch`)."""
        return self._posterior(density_BCDHW, cell_B6).mean

    def _posterior(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Latent:
        density = self.scale.density(density_BCDHW.to(self.device))
        found = self.model.encode(density, self.scale.cell(cell_B6.to(self.device)))
        return Latent(found.mean.float(), found.log_variance.float())

    @torch.inference_mode()
    def shapes(self, latent_BL: Tensor) -> list[Shape | str]:
        """Of the grid of each latent, or why there is none: cell parameters of no cell at all are possible."""
        numbers = self.model.decoder.numbers(filled(latent_BL).to(self.device, self.scale.dtype))
        with np.errstate(over="ignore", invalid="ignore"):  # a latent may be far from all crystals
            parameters_B6 = cell_parameters(self.scale.physical_cell(numbers.cell_B6).cpu().numpy())
            rows = zip(parameters_B6, numbers.shape_B3.float().cpu().numpy(), strict=True)
            return [self._shape(*row) for row in islice(rows, len(latent_BL))]

    def some_shapes(self, latent_BL: Tensor) -> list[Shape]:
        """The same, latents of no grid as if of a cube."""
        return [(USUAL_EDGE,) * 3 if isinstance(shape, str) else shape for shape in self.shapes(latent_BL.detach())]

    def composition(self, latent_BL: Tensor) -> Tensor:
        """[B, E] atoms of each of the model's elements, float32, with gradients; by `some_shapes`."""
        shapes = self.some_shapes(latent_BL)
        groups = list(_of_one(shapes, BATCH))
        latents = latent_BL.to(self.device, self.scale.dtype)
        found = [self.model.decoder.composition(latents[places], shapes[places[0]]).float() for places in groups]
        return torch.cat(found)[np.argsort(np.concatenate(groups))]

    @torch.inference_mode()
    def fields(self, latent_BL: Tensor, shapes: Sequence[Shape]) -> list[Fields]:
        """The networks' outputs for latents, each on a grid of its own shape."""
        found: dict[int, Fields] = {}
        for places in self._together(shapes):
            latents = latent_BL[places].to(self.device, self.scale.dtype)
            found.update(zip(places, self._fields(latents, shapes[places[0]]), strict=True))
        return [found[place] for place in range(len(shapes))]

    def _together(self, shapes: Sequence[Shape]) -> Iterator[list[int]]:
        """The places of grids that the networks are given at a time, the last one repeated where there are too few."""
        n = self._grids_together
        return (places + places[-1:] * (n - len(places)) for places in _of_one(shapes, n))

    def _fields(self, latent_BL: Tensor, shape: Shape) -> Iterable[Fields]:
        decoding = self.model.decode(latent_BL, shape)
        logits = self.model.segment(decoding).float().movedim(1, -1)  # as they lie in memory
        species = self._atomic_number[logits[..., 1:].argmax(-1) + 1]
        probability = 1.0 - torch.softmax(logits, -1)[..., 0]
        density_BCDHW = self.scale.physical_density(decoding.density_BCDHW).cpu().numpy()
        parameters_B6 = cell_parameters(self.scale.physical_cell(decoding.cell_B6).cpu().numpy())
        return map(
            Fields,
            density_BCDHW,
            species.cpu().numpy(),
            probability.cpu().numpy(),
            parameters_B6,
            self._estimates(decoding, density_BCDHW, parameters_B6),
        )

    def _estimates(
        self, decoding: Decoding, density_BCDHW: NDArray[np.float32], parameters_B6: NDArray[np.float64]
    ) -> Iterator[Estimate]:
        counts = (decoding.log_count_B.float() * self.scale.count_std + self.scale.count_mean).exp().tolist()
        compositions = torch.full((len(counts), MAX_Z + 1), -torch.inf)  # of what the model doesn't know, nothing ever
        compositions[:, list(self.model.elements)] = decoding.composition_BE.float().cpu()
        errors = self.model.estimate_errors or EstimateErrors()
        for count, composition_Z, *density in zip(counts, compositions.numpy(), density_BCDHW, parameters_B6, strict=True):
            error = errors.atoms
            if errors.integral is not None:  # the mean of the two, each weighed by its error
                weights = np.array([errors.atoms, errors.integral]) ** -2.0
                count = float(np.average([count, self.atoms_of(*density)], weights=weights))
                error = float(weights.sum() ** -0.5)
            yield Estimate(count, composition_Z, error, errors.composition)

    def atoms_of(self, density_CDHW: NDArray[np.float32], parameters_6: NDArray[np.float64]) -> float:
        """The number of atoms that a density of `cell` integrates to: every one adds a Gaussian of height 1."""
        gaussian = (2.0 * pi) ** 1.5 * self.model.grid.sigma_A**3
        volume = abs(float(np.linalg.det(from_lengths_angles(parameters_6))))
        return float(density_CDHW[self.channel_place].mean() * volume / gaussian)

    def crystals(self, latent_BL: Tensor, ids: Sequence[str]) -> list[Decoded]:
        """A decoded crystal, or the reason that there is none, for each latent."""
        return [decode_frame(item, self.model.grid, self.channel) for item in self.decodable(latent_BL, ids)]

    def decodable(
        self, latent_BL: Tensor, ids: Sequence[str], atoms_BE: Tensor | None = None
    ) -> list[decoding.Fields | str]:
        """What `decode_frame` makes a crystal of, without the networks; the reason where a latent is of no cell.

        Crystals of one shape are decoded together. atoms_BE: what they are made of, where that is known.
        """
        shapes = self.shapes(latent_BL)
        possible = [place for place, shape in enumerate(shapes) if not isinstance(shape, str)]
        fields = iter(self.fields(latent_BL[possible], [shape for shape in shapes if not isinstance(shape, str)]))
        found = [shape if isinstance(shape, str) else self._images(id, next(fields)) for id, shape in zip(ids, shapes)]
        if atoms_BE is None:
            return found
        known = [self._known(atoms_E.cpu()) for atoms_E in atoms_BE]
        return [item if isinstance(item, str) else (*item[:-1], told) for item, told in zip(found, known, strict=True)]

    def _known(self, atoms_E: Tensor) -> Estimate:
        """An estimate that is sure of the atoms of each element."""
        composition_Z = np.full(MAX_Z + 1, -np.inf, np.float32)
        composition_Z[list(self.model.elements)] = atoms_E.numpy()
        return Estimate(float(atoms_E.sum()), composition_Z, KNOWN_ERROR, KNOWN_ERROR)

    def _images(self, id: str, fields: Fields) -> decoding.Fields:
        cell = self.model.grid.frame == "cell"
        lattice = from_lengths_angles(fields.parameters_6) if cell else np.zeros((3, 3))
        density = fields.density_CDHW[self.channel_place]
        return id, density, fields.species_DHW, fields.probability_DHW, lattice, fields.estimate

    def _shape(self, parameters_6: NDArray[np.float64], shape_numbers: NDArray[np.floating]) -> Shape | str:
        spec = self.model.grid
        if spec.frame == "cell":
            try:
                from_lengths_angles(parameters_6)
            except (ValueError, CrystalError) as error:
                return str(error)
        if spec.shape != "adaptive":
            return (spec.shape,) * 3
        shape = shape_of(shape_numbers, spec.multiple)
        if prod(shape) > spec.max_voxels:
            return f"{' x '.join(map(str, shape))} voxels are decoded, at most {spec.max_voxels} are allowed"
        return shape


def calibrate(codec: Codec, crystals: Sequence[Crystal]) -> None:
    """Measure how far off the model's estimates are, on crystals that it wasn't trained on, and set its `estimate_errors`.

    So that a decoder asks for as many atoms, and of such elements, as strictly as the model knows them: one that is sure of
    a poor estimate takes right atoms away, one that doubts a good estimate leaves wrong ones.
    """
    model, least = codec.model, EstimateErrors()
    if model.grid.frame != "cell":  # no other is decoded by estimates
        return
    model.estimate_errors = None
    errors: dict[str, list[float]] = {"atoms": [], "integral": [], "composition": []}
    for start in range(0, len(crystals), BATCH):
        part = crystals[start : start + BATCH]
        latents = codec.encode(part)
        shapes = codec.shapes(latents)
        possible = [place for place, shape in enumerate(shapes) if not isinstance(shape, str)]
        decoded = codec.fields(latents[possible], [shape for shape in shapes if not isinstance(shape, str)])
        for crystal, fields in zip((part[place] for place in possible), decoded, strict=True):
            errors["atoms"].append(fields.estimate.atoms - len(crystal))
            if codec.channel == "occupancy":
                errors["integral"].append(codec.atoms_of(fields.density_CDHW, fields.parameters_6) - len(crystal))
            known = [(z, count) for z, count in crystal.composition.items() if z in model.elements]
            errors["composition"] += [fields.estimate.composition_Z[z] - count for z, count in known]
    found = {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in errors.items() if values}
    # None is taken for smaller than the defaults: few crystals are looked at, and others lie farther off.
    found = {name: max(error, getattr(least, name) or least.atoms) for name, error in found.items()}
    model.estimate_errors = EstimateErrors(**found)


def filled(rows: Tensor) -> Tensor:
    """Rows of a tensor, the last one repeated up to a multiple of ROWS."""
    return rows[torch.arange(len(rows) + -len(rows) % ROWS).clamp(max=len(rows) - 1)]


def _of_one(shapes: Sequence[tuple[int, ...]], most: int) -> Iterator[list[int]]:
    """The places of each shape, in order, at most so many at a time."""
    for shape in dict.fromkeys(shapes):
        places = [place for place, other in enumerate(shapes) if other == shape]
        yield from (places[start : start + most] for start in range(0, len(places), most))
