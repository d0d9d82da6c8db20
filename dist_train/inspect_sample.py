"""One sample for human eyes: its numbers as text, and a picture of its grid with the atoms of its structure on top.

A crystal is taken as it lies in the grid, turned and moved as the sample is. Where a sample holds no grid, one is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dist_train.config import GridSpec
from dist_train.crystal import kernels
from dist_train.crystal.decode import decode
from dist_train.crystal.density_files import channel_names
from dist_train.crystal.elements import SYMBOLS
from dist_train.crystal.frames import spacing_A
from dist_train.crystal.interop import to_pymatgen
from dist_train.crystal.lattice import FloatArray, compact_lattice, periodic_distances
from dist_train.crystal.metrics import shortest_distance
from dist_train.crystal.structure import Crystal, wrap
from dist_train.crystal.symmetry import space_group
from dist_train.crystal.voxelize import code_table, voxelize
from dist_train.figures import png_bytes

SYMPREC_A = 0.01
"""Tolerance of the space group in angstrom, spglib's usual one."""
EXACT_A = 0.1
"""Largest displacement in angstrom of an atom that still counts as given back."""

Density = NDArray[np.floating]
Species = NDArray[np.integer]


def inspect_sample(density_CDHW: Density | None, species_DHW: Species | None, crystal: Crystal, spec: GridSpec) -> str:
    """The numbers of a sample as lines of ASCII text: structure, grid, channels, species, and what the decoder gives back.

    density_CDHW, species_DHW: as stored, or None, where the grid that `spec` makes of the crystal is described instead.
    Raises CrystalError where the spec can't hold it.
    """
    density, species = _grid(density_CDHW, species_DHW, crystal, spec)
    a, b, c, alpha, beta, gamma = crystal.lengths_angles.tolist()
    steps = np.linalg.norm(_extent(species.shape, crystal, spec), axis=1) / species.shape
    origin = "made now" if density_CDHW is None or species_DHW is None else "as stored"
    rows = [
        ("id", ascii(crystal.id)[1:-1]),
        ("formula", f"{crystal.formula}, {len(crystal)} atoms: {_atoms_of(crystal)}"),
        ("cell", f"a {a:.4f}  b {b:.4f}  c {c:.4f} A   alpha {alpha:.3f}  beta {beta:.3f}  gamma {gamma:.3f} degrees"),
        ("volume", f"{crystal.volume_A3:.3f} A^3, {crystal.volume_A3 / len(crystal):.3f} A^3 per atom"),
        ("density", f"{float(to_pymatgen(crystal).density):.3f} g/cm^3"),
        ("shortest distance", f"{shortest_distance(crystal):.4f} A between two atoms, images included"),
        ("space group", f"{space_group(crystal, SYMPREC_A) or 'not found'}, within {SYMPREC_A} A"),
        ("grid", f"{spec.frame}, {_times(species.shape)} voxels of {_times(f'{step:.4f}' for step in steps)} A, {origin}"),
        *_channel_rows(density, crystal, spec, abs(float(np.linalg.det(_extent(species.shape, crystal, spec))))),
        *_species_rows(species),
        ("decoded", decoded_text(density, species, crystal, spec)),
    ]
    return "\n".join(f"{name:<18} {value}" for name, value in rows)


def decoded_text(density_CDHW: Density, species_DHW: Species, crystal: Crystal, spec: GridSpec) -> str:
    """What `decode` gives back of a cell grid, in a sentence: exactly the crystal's atoms, or how it differs."""
    channel: Literal["occupancy", "z_density"] = "occupancy" if "occupancy" in spec.channels else "z_density"
    if spec.frame != "cell" or channel not in spec.channels:
        return "not tried: only cell grids with the channel occupancy or z_density are"
    density = density_CDHW[channel_names(spec).index(channel)].astype(np.float32)
    labelled = (species_DHW > 0).astype(np.float32)
    result = decode(crystal.id, density, species_DHW, labelled, crystal.lattice_A, spec, channel)
    if result.crystal is None:
        return f"nothing: {result.reason}"
    found = result.crystal
    if found.composition != crystal.composition:
        return f"NOT exact: {len(found)} atoms instead of {len(crystal)}: {_atoms_of(found)}"
    lattice = compact_lattice(crystal.lattice_A)
    change = crystal.lattice_A @ np.linalg.inv(lattice)
    away = periodic_distances(lattice, crystal.frac_N3 @ change, found.frac_N3 @ change)
    unlike = crystal.numbers_N[:, None] != found.numbers_N
    moved = away[linear_sum_assignment(away**2 + 1e6 * unlike)]
    verdict = f"exact: all {len(crystal)} atoms" if moved.max() < EXACT_A else "NOT exact: the right atoms in other places"
    return f"{verdict}, RMSE {np.sqrt((moved**2).mean()):.5f} A, largest displacement {moved.max():.5f} A"


def _grid(density: Density | None, species: Species | None, crystal: Crystal, spec: GridSpec) -> tuple[Density, Species]:
    if density is None or species is None:
        grid = voxelize(crystal, spec)
        return grid.density_CDHW, grid.species_DHW
    return density, species


def _extent(shape: tuple[int, ...], crystal: Crystal, spec: GridSpec) -> FloatArray:
    """[3, 3] rows in angstrom that span the grid: the lattice of a cell, the edges of a cube of whole voxels."""
    return crystal.lattice_A if spec.frame == "cell" else spacing_A(spec) * np.diag(shape).astype(np.float64)


def _times(values: Iterator[str] | tuple[int, ...]) -> str:
    return " x ".join(map(str, values))


def _atoms_of(crystal: Crystal) -> str:
    return " ".join(f"{SYMBOLS[z]}{n}" for z, n in crystal.composition.items())


def _channel_rows(density: Density, crystal: Crystal, spec: GridSpec, volume_A3: float) -> Iterator[tuple[str, str]]:
    """A line for each channel; only in a cell, which cuts no Gaussian off, is it known what the integral should be."""
    yield "channels", f"{'':<14}{'min':>12}{'mean':>12}{'max':>12}{'integral, A^3':>16}{'of the atoms':>16}"
    expected = code_table(spec)[crystal.numbers_N].sum(axis=0, dtype=np.float64) * (2 * pi * spec.sigma_A**2) ** 1.5
    for name, values, due in zip(channel_names(spec), density, expected):
        mean = values.mean(dtype=np.float64)
        told = f"{due:16.3f}" if spec.frame == "cell" else f"{'-':>16}"
        yield "", f"{name:<14}{values.min():12.5f}{mean:12.5f}{values.max():12.5f}{mean * volume_A3:16.3f}{told}"


def _species_rows(species: Species) -> Iterator[tuple[str, str]]:
    numbers, counts = np.unique(species, return_counts=True)
    labelled = int(counts[numbers > 0].sum())
    yield "labelled", f"{labelled:,} of {species.size:,} voxels, {labelled / species.size:.2%}"
    for z, count in zip(numbers.tolist(), counts.tolist()):
        if z:
            symbol = SYMBOLS[z] if z < len(SYMBOLS) else f"unknown {z}"
            yield "", f"{symbol:<14}{count:12,}  {count / species.size:.2%}"


@dataclass(frozen=True)
class _Scene:
    """A grid in space: `extent_33` are the rows that span it; atoms [M] and their images in and around it, in angstrom.

    elements: atomic numbers in rising order, the colours of which are `colours`.
    """

    extent_33: FloatArray
    cart_M3: FloatArray
    numbers_M: NDArray[np.int64]
    elements: NDArray[np.int64]
    colours: ListedColormap
    axes: str
    radius_A: float

    def plane(self, axis: int, project: bool) -> tuple[int, int, FloatArray]:
        """The two other axes, first and second, and [3, 2] the paper's x and y: x along the first one.

        The paper is the plane of the two or, to project along `axis`, lies across that.
        """
        first, second = [other for other in range(3) if other != axis]
        along = self.extent_33[axis] / np.linalg.norm(self.extent_33[axis])
        u, v = (row - along * (row @ along) * project for row in self.extent_33[[first, second]])
        x = u / np.linalg.norm(u)
        y = v - x * (v @ x)
        return first, second, np.stack([x, y / np.linalg.norm(y)], axis=1)

    def tallest(self, project: bool) -> float:
        """Largest height over width of the panels of a row, as far as there is paper."""
        shapes = []
        for first, second, paper in (self.plane(axis, project) for axis in range(3)):
            width, height = np.abs(self.extent_33[[first, second]] @ paper).sum(axis=0)
            shapes.append(height / width)
        return float(np.clip(max(shapes), 0.4, 1.4))


def sample_figure(density_CDHW: Density | None, species_DHW: Species | None, crystal: Crystal, spec: GridSpec) -> bytes:
    """A PNG of a sample, to scale in angstrom, oblique cells oblique.

    Rows: the density in three planes of voxels through the densest one; its maximum along each axis, seen along it; the
    species in the same three planes. Circles are the structure's atoms: in planes where the plane cuts the ball of the
    species radius, in projections all, smaller. Colours tell elements; the arguments are those of `inspect_sample`.
    """
    density_CDHW, species = _grid(density_CDHW, species_DHW, crystal, spec)
    label, density = _shown(density_CDHW, spec)
    peak = np.unravel_index(int(density.argmax()), density.shape)
    scene = _scene(species, crystal, spec)
    heights = [scene.tallest(project) for project in (False, True, False)]
    figure = Figure(figsize=(12, 2 + 3 * sum(heights)), layout="constrained")
    panels = figure.subplots(3, 3, height_ratios=heights)
    ranks = np.where(species > 0, np.searchsorted(scene.elements, species), np.nan)
    tints = Normalize(0, max(float(density.max()), 1e-9)), matplotlib.colormaps["Greys"]
    colours = BoundaryNorm(np.arange(len(scene.elements) + 1) - 0.5, len(scene.elements)), scene.colours
    for column, axis in enumerate((2, 1, 0)):
        name, voxel = scene.axes[axis], int(peak[axis])
        place = voxel / density.shape[axis]
        where = f"{name} = {place:.3f}" if spec.frame == "cell" else f"{name} = {voxel * spacing_A(spec):.2f} A"
        _draw(panels[0, column], scene, np.take(density, voxel, axis), axis, place, *tints)
        _draw(panels[1, column], scene, density.max(axis), axis, None, *tints)
        _draw(panels[2, column], scene, np.take(ranks, voxel, axis), axis, place, *colours)
        titles = (f"density at {where}", f"largest density along {name}", f"species at {where}")
        for row, title in enumerate(titles):
            panels[row, column].set_title(title, fontsize=10)
    figure.colorbar(matplotlib.cm.ScalarMappable(*tints), ax=panels, shrink=0.4, pad=0.01, label=label)
    names = [f"{SYMBOLS[z]}, {crystal.composition.get(z, 0)}" for z in scene.elements.tolist()]
    patches = [Patch(facecolor=scene.colours(i), label=name) for i, name in enumerate(names)]
    figure.legend(handles=patches, title="atoms in\nthe cell", loc="outside right lower", ncols=1 + len(patches) // 16)
    figure.suptitle(f"{crystal.formula}   {ascii(crystal.id)[1:-1][:80]}", parse_math=False)
    return png_bytes(figure)


def _shown(density_CDHW: Density, spec: GridSpec) -> tuple[str, Density]:
    """The density of all atoms where a channel has it, else the sum of the first kind's channels; and its name."""
    names = channel_names(spec)
    kind = next((kind for kind in ("occupancy", "z_density") if kind in names), spec.channels[0])
    chosen = [index for index, name in enumerate(names) if name.split(" ")[0] == kind]
    return kind if len(chosen) == 1 else f"sum of the channels {kind}", density_CDHW[chosen].sum(axis=0, dtype=np.float32)


def _scene(species: Species, crystal: Crystal, spec: GridSpec) -> _Scene:
    numbers, cart = crystal.numbers_N, crystal.cart_N3
    if spec.frame == "cell":
        offsets = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
        cart = ((wrap(crystal.frac_N3) + offsets) @ crystal.lattice_A).reshape(-1, 3)
        numbers = np.tile(numbers, len(offsets))
    elif spec.frame == "window":
        inverse = np.linalg.inv(crystal.lattice_A)
        atoms, cart = kernels.images_near_box(crystal.frac_N3, crystal.lattice_A, inverse, spec.box_A, spec.radius_A)
        numbers = numbers[atoms]
    elements = np.union1d(crystal.numbers_N, species[species > 0]).astype(np.int64)
    palette = matplotlib.colormaps["tab10" if len(elements) <= 10 else "tab20" if len(elements) <= 20 else "turbo"]
    spread = np.linspace(0, 1, len(elements)) if len(elements) > 20 else np.arange(len(elements))
    axes = "abc" if spec.frame == "cell" else "xyz"
    extent = _extent(species.shape, crystal, spec)
    return _Scene(extent, cart, numbers, elements, ListedColormap(palette(spread)), axes, spec.radius_A)


def _draw(
    axis: Axes, scene: _Scene, values: Density, along: int, place: float | None, norm: Normalize, colours: Colormap
) -> None:
    """One panel: voxels [n, m] as parallelograms, the outline of the grid and the atoms.

    place: the fraction of axis `along` where the plane lies, or None for a projection along it.
    """
    first, second, paper = scene.plane(along, project=place is None)
    origin = scene.extent_33[along] * (place or 0.0)
    u, v = scene.extent_33[[first, second]] @ paper
    # Voxel i lies at i / n: its parallelogram begins half a voxel before.
    p, q = ((np.arange(n + 1) - 0.5) / n for n in values.shape)
    corners = p[:, None, None] * u + q[None, :, None] * v
    axis.pcolormesh(corners[..., 0], corners[..., 1], values, norm=norm, cmap=colours)
    outline = Polygon(corners[[0, -1, -1, 0], [0, 0, -1, -1]], closed=True, fill=False, edgecolor="0.4", linewidth=0.8)
    axis.add_patch(outline)
    if place is None:
        depth = (scene.cart_M3 @ np.linalg.inv(scene.extent_33))[:, along]
        chosen = np.floor(depth + 1e-6) == 0  # one copy of each, also of an atom at 0
        radii = np.full(len(depth), 0.5 * scene.radius_A)
    else:
        heights = (scene.cart_M3 - origin) @ np.cross(paper[:, 0], paper[:, 1])
        chosen = np.abs(heights) < scene.radius_A
        radii = np.sqrt(np.maximum(scene.radius_A**2 - heights**2, 0.0))
    centres, sizes = (scene.cart_M3[chosen] - origin) @ paper, 2 * radii[chosen]
    circles = EllipseCollection(
        sizes, sizes, np.zeros(len(sizes)), units="xy", offsets=centres, transOffset=axis.transData, linewidths=1.6,
        facecolors="none", edgecolors=scene.colours(np.searchsorted(scene.elements, scene.numbers_M[chosen])),
    )  # fmt: skip
    axis.add_collection(circles, autolim=False)
    circles.set_clip_path(outline)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel(f"A along {scene.axes[first]}", fontsize=8)
    axis.tick_params(labelsize=8)
