"""Pictures for people who look rather than read: slices through grids and loss curves, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.models.reconstruct import Codec
from dist_train.training.tracker import read_spool


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def slices(codec: Codec, crystals: Sequence[Crystal]) -> bytes:
    """Rows: crystals. Columns: true and reconstructed occupancy, true and reconstructed species, in the plane through
    the atom of the highest atomic number, spanned by a and b."""
    fields = codec.fields(codec.encode(crystals))
    channel = codec.model.grid.channels.index("occupancy")
    columns = ("true density", "reconstructed density", "true species", "reconstructed species")
    figure = Figure(figsize=(10, 2.5 * len(crystals) + 0.3), layout="constrained")
    axes = figure.subplots(len(crystals), 4, squeeze=False)
    species_colours = matplotlib.colormaps["nipy_spectral"].with_extremes(under="white")
    for row, crystal in enumerate(crystals):
        grid = voxelize(crystal, codec.model.grid)
        depth = grid.species_DHW.shape[2]
        plane = round(crystal.frac_N3[crystal.numbers_N.argmax(), 2] * depth) % depth
        decoded = np.where(fields.probability_BDHW[row] > 0.5, fields.species_BDHW[row], 0)
        densities = (grid.density_CDHW[channel], fields.density_BCDHW[row, channel])
        for column, values in enumerate((*densities, grid.species_DHW, decoded)):
            axis, is_density = axes[row, column], column < 2
            axis.imshow(
                values[:, :, plane].T, origin="lower", interpolation="nearest", vmin=0 if is_density else 0.5,
                vmax=1 if is_density else 100, cmap="magma" if is_density else species_colours,
            )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(columns[column], fontsize=10)
        axes[row, 0].set_ylabel(f"{crystal.formula}\n{crystal.id}", fontsize=9)
    return _png(figure)


def loss_curves(spool: Path) -> bytes:
    """Loss parts of training and validation, and decoded accuracy on the validation split, by step."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in read_spool(spool):
        for name, value in record["metrics"].items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    parts = [name.removeprefix("train/") for name in series if name.startswith("train/")]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    for axis, part in zip(panels, parts, strict=False):
        for kind in ("train", "val"):
            if f"{kind}/{part}" in series:
                axis.plot(*series[f"{kind}/{part}"], label=kind, marker="o" if kind == "val" else None, markersize=3)
        axis.set_yscale("log")
        axis.set_title(part, fontsize=10)
    accuracy = panels[len(parts)]
    for name in ("val/composition_exact", "val/count_exact"):
        if name in series:
            accuracy.plot(*series[name], marker="o", markersize=3, label=name.removeprefix("val/"))
    accuracy.set_ylim(0, 1.02)
    accuracy.set_title("decoded validation crystals", fontsize=10)
    for axis in panels[: len(parts) + 1]:
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8)
    return _png(figure)
