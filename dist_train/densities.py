"""Densities of crystals for a report: on the true grids, and as a model decodes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.decode import Decoded
from dist_train.crystal.density_files import channel_names
from dist_train.crystal.frames import spacing_A
from dist_train.crystal.lattice import FloatArray, from_lengths_angles
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import Shape, voxelize
from dist_train.report import Density, Volume

if TYPE_CHECKING:  # torch isn't wanted where a page is only written
    from torch import Tensor

    from dist_train.models.reconstruct import Codec, Fields


def reconstructed_densities(
    codec: Codec, titles: Sequence[str], crystals: Sequence[Crystal], decoded: Sequence[Decoded]
) -> list[Density]:
    """The true density of each crystal, as `representable` gives it, beside that which its latent is decoded to.

    decoded: what became of each; its atoms are marked.
    """
    if not crystals:
        return []
    found = _fields(codec, codec.encode(crystals))
    return [
        _density(codec, title, [_true(codec, crystal)], fields, item)
        for title, crystal, fields, item in zip(titles, crystals, found, decoded, strict=True)
    ]


def generated_densities(codec: Codec, titles: Sequence[str], latent_NL: Tensor, decoded: Sequence[Decoded]) -> list[Density]:
    """The density that each latent is decoded to; without those of a latent that is of no cell."""
    rows = zip(titles, _fields(codec, latent_NL), decoded, strict=True)
    found = [_density(codec, title, [], fields, item) for title, fields, item in rows]
    return [density for density in found if density.volumes]


def _density(codec: Codec, title: str, true: list[Volume], fields: Fields | str, decoded: Decoded) -> Density:
    names = channel_names(codec.model.grid)
    channels = tuple(names[place] for place in _channels(codec))
    volumes = true if isinstance(fields, str) else [*true, _decoded(codec, fields, decoded)]
    note = fields if isinstance(fields, str) else "" if decoded.crystal else f"No crystal was made of it: {decoded.reason}"
    return Density(title, channels, tuple(volumes), note)


def _channels(codec: Codec) -> list[int]:
    """Places of the channels, that which atoms are placed by at first."""
    places = range(len(channel_names(codec.model.grid)))
    return sorted(places, key=lambda place: place != codec.channel_place)


def _true(codec: Codec, crystal: Crystal) -> Volume:
    centred = codec.centred(crystal)
    density = voxelize(centred, codec.model.grid).density_CDHW
    return _volume(codec, "true", density, crystal.lattice_A, crystal)


def _decoded(codec: Codec, fields: Fields, decoded: Decoded) -> Volume:
    cell = codec.model.grid.frame == "cell"
    lattice = from_lengths_angles(fields.parameters_6) if cell else np.zeros((3, 3))
    return _volume(codec, "decoded", fields.density_CDHW, lattice, decoded.crystal)


def _volume(
    codec: Codec, label: str, density_CDHW: NDArray[np.float32], lattice_A: FloatArray, crystal: Crystal | None
) -> Volume:
    """On a cell's grid with the atoms; on a cube's, which has no cell, without."""
    spec = codec.model.grid
    density = density_CDHW[_channels(codec)]
    if spec.frame == "cell":
        return Volume(label, density, lattice_A, crystal=crystal)
    return Volume(label, density, spacing_A(spec) * np.diag(density.shape[1:]), periodic=False)


def _fields(codec: Codec, latent_NL: Tensor) -> Iterator[Fields | str]:
    """What the networks decode each latent to, or why there is no grid for it."""
    shapes = codec.shapes(latent_NL)
    held: list[tuple[int, Shape]] = [(i, shape) for i, shape in enumerate(shapes) if not isinstance(shape, str)]
    found = iter(codec.fields(latent_NL[[i for i, _ in held]], [shape for _, shape in held]))
    return (shape if isinstance(shape, str) else next(found) for shape in shapes)
