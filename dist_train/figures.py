"""Pictures for people who look rather than read, as PNG bytes: slices through grids, loss curves, what a data set holds.

Equal input gives equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from dist_train.crystal.elements import MAX_Z, PLACES, SYMBOLS
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.training.tracker import read_series

if TYPE_CHECKING:  # torch isn't wanted where a data set is described
    from dist_train.models.reconstruct import Codec

HISTOGRAM_BINS = 60

Values = NDArray[np.floating] | NDArray[np.integer]


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG file without date and software version, which would change the bytes and not the picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def slices(codec: Codec, crystals: Sequence[Crystal]) -> bytes:
    """Rows: crystals. Columns: true and reconstructed density, true and reconstructed species, in the plane across the last
    axis of the grid that holds the most of the highest atomic number."""
    grids = [voxelize(crystal, codec.model.grid) for crystal in crystals]
    fields = codec.fields(codec.encode(crystals), [grid.species_DHW.shape for grid in grids])
    columns = ("true density", "reconstructed density", "true species", "reconstructed species")
    figure = Figure(figsize=(10, 2.5 * len(crystals) + 0.3), layout="constrained")
    axes = figure.subplots(len(crystals), 4, squeeze=False)
    species_colours = matplotlib.colormaps["nipy_spectral"].with_extremes(under="white")
    for row, (crystal, grid, field) in enumerate(zip(crystals, grids, fields, strict=True)):
        heaviest = grid.species_DHW == grid.species_DHW.max()
        plane = int(heaviest.sum((0, 1)).argmax())
        decoded = np.where(field.probability_DHW > 0.5, field.species_DHW, 0)
        densities = (grid.density_CDHW[codec.channel_place], field.density_CDHW[codec.channel_place])
        highest = 1.0 if codec.channel == "occupancy" else densities[0].max()
        for column, values in enumerate((*densities, grid.species_DHW, decoded)):
            axis, is_density = axes[row, column], column < 2
            axis.imshow(
                values[:, :, plane].T, origin="lower", interpolation="nearest", vmin=0 if is_density else 0.5,
                vmax=highest if is_density else 100, cmap="magma" if is_density else species_colours,
            )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(columns[column], fontsize=10)
        axes[row, 0].set_ylabel(f"{crystal.formula}\n{crystal.id}", fontsize=9, parse_math=False)
    return png_bytes(figure)


def loss_curves(spool: Path) -> bytes:
    """Loss parts of training and validation, and decoded accuracy on the validation split, by step."""
    series = read_series(spool)
    parts = [name.removeprefix("train/") for name in series if name.startswith("train/")]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    for axis, part in zip(panels, parts, strict=False):
        for kind in ("train", "val"):
            if f"{kind}/{part}" in series:
                axis.plot(*series[f"{kind}/{part}"], label=kind, marker="o" if kind == "val" else None, markersize=3)
        if any(value > 0 for value in series[f"train/{part}"][1]):  # a part that isn't trained is 0
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
        if axis.get_lines():
            axis.legend(fontsize=8)
    return png_bytes(figure)


def periodic_table(counts: Mapping[int, int]) -> bytes:
    """The periodic table, each element with its count and a colour by the count's logarithm; grey: none.

    counts: atomic number -> crystals that hold the element.
    """
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    axis = figure.subplots()
    norm, colours = LogNorm(1, max(10, *counts.values(), 0)), matplotlib.colormaps["YlGnBu"]
    for z in range(1, MAX_Z + 1):
        period, group, f_place = PLACES[z].tolist()
        x, y = (f_place + 2, period + 2.4) if f_place else (group, period)
        count = counts.get(z, 0)
        colour = colours(norm(count)) if count else (0.94, 0.94, 0.94, 1.0)
        ink = "0.65" if not count else "white" if norm(count) > 0.6 else "black"
        axis.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour, edgecolor="0.8", linewidth=0.5))
        axis.text(x - 0.42, y - 0.38, str(z), fontsize=6, color=ink, va="top")
        axis.text(x, y - 0.02, SYMBOLS[z], fontsize=13, color=ink, ha="center", va="center", weight="bold")
        axis.text(x, y + 0.42, _short(count) if count else "", fontsize=8, color=ink, ha="center", va="bottom")
    axis.set(xlim=(0.4, 18.6), ylim=(10.0, 0.4), aspect="equal")
    axis.set_axis_off()
    scale = matplotlib.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, ax=axis, shrink=0.7, pad=0.01, label="crystals that hold the element")
    return png_bytes(figure)


def _short(count: int) -> str:
    """A count in at most five characters: 99999, 123k, 4.56M."""
    return str(count) if count < 100_000 else f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.3g}M"


def split_histogram(values: Values, split_of: NDArray[np.integer], splits: Sequence[str], label: str) -> bytes:
    """How values are spread in each split: shares of its crystals, so that small and large splits can be compared.

    values: [n] positive numbers, in bins of equal width or, where they span a factor of over 20, on a logarithmic axis;
    whole numbers never share a bar with a part of another. split_of: [n] index into `splits`; label: of the axis, with
    the unit.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    wide = bool(values.max() > 20 * values.min())
    bins = _bins(values, wide)
    for index, name in enumerate(splits):
        chosen = values[split_of == index]
        shares = np.histogram(chosen, bins)[0] / max(len(chosen), 1)
        axis.stairs(
            shares, bins, label=f"{len(chosen):,} {ascii(name)[1:-1]}", fill=index == 0, alpha=0.4 if index == 0 else 1
        )
    if wide:
        axis.set_xscale("log")
        _plain_ticks(axis, bins)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set(xlabel=label, ylabel="share of the split's crystals", xlim=(bins[0], bins[-1]))
    axis.legend(title="crystals", fontsize=9, title_fontsize=9)
    return png_bytes(figure)


def _plain_ticks(axis: Axes, bins: NDArray[np.float64]) -> None:
    """Ticks 1, 2, 5, 10... of a logarithmic axis."""
    ticks = [m * 10.0**e for e in range(-2, 7) for m in (1, 2, 5) if bins[0] <= m * 10.0**e <= bins[-1]]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _bins(values: Values, wide: bool) -> NDArray[np.float64]:
    """Edges of at most HISTOGRAM_BINS bins around positive values; those of whole numbers lie between them."""
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer):
        edges = np.geomspace(low, high + 1, HISTOGRAM_BINS) if wide else np.arange(low, high + 2)
        step = max(1, -(-len(edges) // HISTOGRAM_BINS))
        return np.unique(np.append(np.round(edges[::step]), high + 1)) - 0.5
    if wide:
        return np.geomspace(low, high * (1 + 1e-9), HISTOGRAM_BINS + 1)
    return np.linspace(low, max(high, low * 1.01) * (1 + 1e-9), HISTOGRAM_BINS + 1)
