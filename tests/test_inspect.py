"""What is told and drawn of a sample is what its grid and its structure hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from ase.data import atomic_masses
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dist_train import inspect_sample as module
from dist_train.config import GridSpec
from dist_train.crystal.density_files import channel_names
from dist_train.crystal.frames import placed, representable
from dist_train.crystal.metrics import shortest_distance
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import space_group
from dist_train.crystal.voxelize import VoxelGrid, voxelize
from dist_train.inspect_sample import (
    decoded_text,
    inspect_sample,
    sample_figure,
)

ADAPTIVE = GridSpec(shape="adaptive", max_voxels=2**18)
CELL = GridSpec(channels=("occupancy", "period"))
WINDOW = GridSpec.model_validate({"preset": "paper-window"})
HOSTILE = "\x1b[31m$x^{$\n<b> é\ud800\\"

Table = Callable[[str], list[Crystal]]


@pytest.fixture(scope="module")
def perovskite(sample_table: Table) -> Crystal:
    return placed(representable(sample_table("perov_5")[3], CELL), CELL)


@pytest.fixture(scope="module")
def oblique(sample_table: Table) -> Crystal:
    """A Materials Project crystal with no right angle in its cell."""
    for crystal in sample_table("materials_project"):
        cell = crystal.reduced()
        if 6 <= len(cell) <= 20 and (np.abs(cell.lengths_angles[3:] - 90) > 5).all() and len(set(cell.composition)) > 2:
            return representable(crystal, ADAPTIVE)
    raise LookupError


def stored(crystal: Crystal, spec: GridSpec) -> tuple[np.ndarray, np.ndarray]:
    grid: VoxelGrid = voxelize(crystal, spec)
    return grid.density_CDHW.astype(np.float16), grid.species_DHW


def rows_of(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[19:] for line in text.splitlines() if line[:18].strip()}


def test_the_numbers_are_those_of_structure_and_grid(perovskite: Crystal) -> None:
    density, species = stored(perovskite, CELL)
    text = inspect_sample(density, species, perovskite, CELL)
    rows = rows_of(text)
    assert rows["id"] == perovskite.id
    assert rows["formula"].startswith(f"{perovskite.formula}, 5 atoms")
    edges_angles = [float(number) for number in re.findall(r"\d+\.\d+", rows["cell"])]
    assert edges_angles == pytest.approx(perovskite.lengths_angles.tolist(), abs=1e-3)
    volume = abs(np.linalg.det(perovskite.lattice_A))
    assert rows["volume"] == f"{volume:.3f} A^3, {volume / 5:.3f} A^3 per atom"
    grams = atomic_masses[perovskite.numbers_N].sum() / 6.02214076e23
    assert float(rows["density"].split()[0]) == pytest.approx(grams / (volume * 1e-24), rel=1e-3)
    spacing = perovskite.lengths_angles[0] / 32
    assert rows["grid"].startswith(f"cell, 32 x 32 x 32 voxels of {spacing:.4f}")
    assert rows["grid"].endswith("as stored")
    for name, values, heights in zip(("occupancy", "period-2"), density[[0, 2]], (np.ones(5), perovskite.numbers_N < 11)):
        told = re.search(rf"^ +{name} +(.*)$", text, re.MULTILINE)
        assert told is not None
        values = values.astype(np.float64)
        integral = values.sum() * volume / values.size
        due = heights.sum() * (2 * np.pi * 0.5**2) ** 1.5
        assert [float(n) for n in told[1].split()] == pytest.approx(
            [values.min(), values.mean(), values.max(), integral, due], abs=6e-4
        )
        assert integral == pytest.approx(due, rel=1e-3)
    assert rows["labelled"].startswith(f"{(species > 0).sum():,} of 32,768 voxels, {(species > 0).mean():.2%}")
    oxygen = re.search(r"^ +O +([\d,]+)  ([\d.]+)%$", text, re.MULTILINE)
    assert oxygen is not None
    assert int(oxygen[1].replace(",", "")) == (species == 8).sum()
    assert float(oxygen[2]) == pytest.approx(100 * (species == 8).mean(), abs=0.006)


def brute_shortest(crystal: Crystal) -> float:
    images = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    frac = crystal.frac_N3 % 1.0
    difference = frac[:, None, None] - frac[None, :, None] + images
    distances = np.linalg.norm(difference @ crystal.lattice_A, axis=-1)
    return float(distances[distances > 1e-9].min())


def test_the_shortest_distance_counts_images(sample_table: Table, random_crystal: Callable[..., Crystal]) -> None:
    lone = Crystal("fcc", np.array([[0, 2, 2], [2, 0, 2], [2, 2, 0]]), np.array([[0.3, 0.1, 5.2]]), np.array([29]))
    assert shortest_distance(lone) == pytest.approx(8**0.5)
    small = [c.reduced() for c in sample_table("materials_project") if len(c) <= 12][:20]
    for crystal in (*small, *(random_crystal(seed) for seed in range(10))):
        assert shortest_distance(crystal) == pytest.approx(brute_shortest(crystal), abs=1e-9)


def test_the_space_group_is_found_or_said_to_be_not() -> None:
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    cubic = Crystal("SrTiO3", 3.905 * np.eye(3), frac, np.array([38, 22, 8, 8, 8]))
    assert str(space_group(cubic)) == "Pm-3m (221)"
    assert space_group(replace(cubic, numbers_N=np.array([38, 22, 8, 8, 9]))) != space_group(cubic)
    assert space_group(replace(cubic, frac_N3=np.zeros((5, 3)))) is None


def test_the_decoder_is_compared_with_the_structure(perovskite: Crystal) -> None:
    density, species = stored(perovskite, CELL)
    assert re.match(r"exact: all 5 atoms, RMSE 0\.000\d+ A", decoded_text(density, species, perovskite, CELL))
    turned = replace(perovskite, frac_N3=perovskite.frac_N3[::-1] + 3.0, numbers_N=perovskite.numbers_N[::-1])
    assert decoded_text(density, species, turned, CELL).startswith("exact: all 5 atoms, RMSE 0.000")
    moved = perovskite.frac_N3.copy()
    moved[2] += np.linalg.solve(perovskite.lattice_A.T, [0.3, 0, 0])
    told = decoded_text(density, species, replace(perovskite, frac_N3=moved), CELL)
    assert told.startswith("NOT exact: the right atoms in other places")
    assert float(told.split()[-2]) == pytest.approx(0.3, abs=1e-3)
    assert float(told.split("RMSE ")[1].split()[0]) == pytest.approx(0.3 / 5**0.5, abs=1e-3)
    swapped = perovskite.numbers_N.copy()
    first, second = (int(np.flatnonzero(swapped == z)[0]) for z in np.unique(swapped)[:2])
    swapped[[first, second]] = swapped[[second, first]]
    told = decoded_text(density, species, replace(perovskite, numbers_N=swapped), CELL)
    assert told.startswith("NOT exact: the right atoms in other places")
    other = np.where(perovskite.numbers_N == 8, 9, perovskite.numbers_N)
    told = decoded_text(density, species, replace(perovskite, numbers_N=other), CELL)
    assert told.startswith("NOT exact: 5 atoms instead of 5: O2")
    assert decoded_text(density, np.zeros_like(species), perovskite, CELL).startswith("nothing: no atom found")


def test_the_decoder_reads_the_density_of_its_own_channel(perovskite: Crystal) -> None:
    spec = GridSpec(channels=("period", "z_density"))
    density, species = stored(perovskite, spec)
    assert decoded_text(density, species, perovskite, spec).startswith("exact")
    spec = GridSpec(channels=("group",))
    assert decoded_text(*stored(perovskite, spec), perovskite, spec).startswith("not tried")


def test_channels_are_named_and_numbered() -> None:
    spec = GridSpec.model_validate(
        {"channels": ["z_density", "period", "table"], "element_table": {"O": [1, 2], "Ti": [0, 1]}}
    )
    assert channel_names(spec) == ["z_density", *(f"period-{i}" for i in range(1, 8)), "table-1", "table-2"]
    assert len(channel_names(GridSpec(channels=("group", "f_block", "occupancy")))) == 18 + 14 + 1


def test_a_structure_alone_gets_the_grid_of_the_settings(perovskite: Crystal) -> None:
    grid = voxelize(perovskite, CELL)
    made = inspect_sample(None, None, perovskite, CELL)
    assert made == inspect_sample(grid.density_CDHW, grid.species_DHW, perovskite, CELL).replace("as stored", "made now")
    assert "made now" in made
    assert sample_figure(None, None, perovskite, CELL) == sample_figure(
        grid.density_CDHW, grid.species_DHW, perovskite, CELL
    )


def test_a_hostile_id_is_plain_ascii_on_one_line(perovskite: Crystal) -> None:
    hostile = replace(perovskite, id=HOSTILE)
    told, usual = (inspect_sample(None, None, crystal, CELL) for crystal in (hostile, perovskite))
    assert told.isascii()
    assert all(c.isprintable() for line in told.split("\n") for c in line)
    assert told.splitlines()[1:] == usual.splitlines()[1:]
    assert sample_figure(None, None, hostile, CELL).startswith(b"\x89PNG")


def test_equal_samples_give_equal_pictures_and_others_do_not(perovskite: Crystal) -> None:
    density, species = stored(perovskite, CELL)
    picture = sample_figure(density, species, perovskite, CELL)
    assert picture == sample_figure(density.copy(), species.copy(), perovskite, CELL)
    assert b"Software" not in picture
    for other in (
        (density * 0.5, species, perovskite),
        (density, np.where(species == 8, 9, species), perovskite),
        (density, species, replace(perovskite, frac_N3=perovskite.frac_N3 + 0.1)),
    ):
        assert sample_figure(*other, CELL) != picture


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Crystal, GridSpec], list[list[Axes]]]:
    """panels(crystal, spec): the panels of its picture, row by row."""
    kept: list[Figure] = []
    monkeypatch.setattr(module, "png_bytes", lambda figure: kept.append(figure) or b"")

    def draw(crystal: Crystal, spec: GridSpec) -> list[list[Axes]]:
        sample_figure(*stored(crystal, spec), crystal, spec)
        return [kept[-1].axes[row : row + 3] for row in (0, 3, 6)]

    return draw


def spans(axis: Axes) -> tuple[np.ndarray, np.ndarray]:
    """The two edges of the grid in a panel."""
    corners = np.asarray(axis.collections[0].get_coordinates())
    return corners[-1, 0] - corners[0, 0], corners[0, -1] - corners[0, 0]


@pytest.mark.parametrize("spec", [ADAPTIVE, WINDOW])
def test_cells_are_drawn_to_scale(oblique: Crystal, panels: Callable[..., list[list[Axes]]], spec: GridSpec) -> None:
    crystal = placed(oblique, spec)
    rows = panels(crystal, spec)
    extent = crystal.lattice_A if spec.frame == "cell" else np.eye(3) * spec.box_A * 30 / 29
    for column, axis in enumerate((2, 1, 0)):
        u, v = (extent[other] for other in range(3) if other != axis)
        for row in (0, 2):
            x, y = spans(rows[row][column])
            assert np.linalg.norm(x) == pytest.approx(np.linalg.norm(u))
            assert np.linalg.norm(y) == pytest.approx(np.linalg.norm(v))
            assert x @ y == pytest.approx(u @ v, abs=1e-9)
        x, y = spans(rows[1][column])
        area = abs(np.linalg.det(extent)) / np.linalg.norm(extent[axis])
        assert abs(x[0] * y[1] - x[1] * y[0]) == pytest.approx(area), "what is seen along an axis"
        assert all(rows[row][column].get_aspect() == 1 for row in range(3))


def under(axis: Axes) -> list[tuple[float, str, float]]:
    """Of each circle whose middle is in the grid: the value of the voxel under it, its colour and its diameter."""
    mesh, circles = axis.collections
    corners = np.asarray(mesh.get_coordinates())
    values = np.ma.filled(mesh.get_array().astype(float), np.nan)
    places = (np.asarray(circles.get_offsets()) - corners[0, 0]) @ np.linalg.inv(np.stack(spans(axis))) * values.shape
    inside = ((places > 0) & (places < values.shape)).all(axis=1)
    return [
        (values[tuple(place)], to_hex(colour), 2 * width)
        for place, colour, width in zip(
            places[inside].astype(int), circles.get_edgecolors()[inside], circles._widths[inside], strict=True
        )
    ]


@pytest.mark.parametrize(
    "spec", [ADAPTIVE, GridSpec(shape=12, box_A=6.0, max_spacing_A=0.6, frame="window", random_rotation=True)]
)
def test_circles_lie_on_the_atoms_of_the_grid(
    oblique: Crystal, panels: Callable[..., list[list[Axes]]], spec: GridSpec
) -> None:
    crystal = placed(oblique, spec)
    rows = panels(crystal, spec)
    elements = sorted(crystal.composition)
    palette = {to_hex(matplotlib.colormaps["tab10"](i)) for i in range(len(elements))}
    for axis in rows[1]:
        assert all(value > 0.75 for value, _, _ in under(axis))
        assert {colour for _, colour, _ in under(axis)} == palette
    if spec.frame == "cell":
        assert all(len(under(axis)) == len(crystal) for axis in rows[1])
    clear = 0
    for axis in rows[2]:
        for rank, colour, diameter in under(axis):
            if diameter > 1.5 * spec.radius_A:
                assert colour == to_hex(matplotlib.colormaps["tab10"](int(rank)))
                clear += 1
    assert clear >= 3
    for axis in rows[0]:
        assert all(value > 0.5 for value, _, diameter in under(axis) if diameter > 1.5 * spec.radius_A)


def test_a_voxel_is_drawn_around_its_point(panels: Callable[..., list[list[Axes]]]) -> None:
    lattice = np.array([[4.0, 0, 0], [1.0, 4.5, 0], [0.5, 1.2, 5.0]])
    spec = GridSpec(shape=16, max_spacing_A=0.5)
    atom = np.array([[3, 9, 5]]) / 16
    rows = panels(Crystal("one", lattice, atom, np.array([26])), spec)
    for row, diameter in zip(rows, (2 * spec.radius_A, spec.radius_A, 2 * spec.radius_A)):
        for axis, (i, j) in zip(row, ((3, 9), (3, 5), (9, 5))):
            mesh, circles = axis.collections
            corners = np.asarray(mesh.get_coordinates())
            middle = (corners[i, j] + corners[i + 1, j + 1]) / 2
            away = np.linalg.norm(np.asarray(circles.get_offsets()) - middle, axis=1)
            assert away.min() < 1e-9
            assert 2 * circles._widths[away.argmin()] == pytest.approx(diameter)


def test_slices_go_through_the_densest_voxel(oblique: Crystal, panels: Callable[..., list[list[Axes]]]) -> None:
    density, _ = stored(oblique, ADAPTIVE)
    for axis in panels(oblique, ADAPTIVE)[0]:
        assert axis.collections[0].get_array().max() == density.max()
