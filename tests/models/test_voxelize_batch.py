"""The batched voxeliser against the formula written out, against `voxelize`, and the randomness of its placements."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.config import Channel, GridSpec
from dist_train.crystal.elements import MAX_Z, NUMBERS, PLACES, SYMBOLS
from dist_train.crystal.frames import placed
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.models import voxelize_batch as module
from dist_train.models.crystal_tensors import CrystalTensors, randomise
from dist_train.models.voxelize_batch import voxelize_batch

FloatArray = NDArray[np.float64]
MakeCrystal = Callable[..., Crystal]
Shape = tuple[int, int, int]

SEEDS = st.integers(0, 2**32 - 1)
TABLE = {symbol: (z / 10, 1.0 if z % 2 else -2.0) for z, symbol in enumerate(SYMBOLS) if z}
CHANNELS: tuple[tuple[Channel, ...], ...] = (
    ("occupancy",),
    ("table", "z_density"),
    ("f_block", "occupancy", "period", "group"),
)


def spec_of(frame: str, **options: Any) -> GridSpec:
    """A spec on 12 voxels, boxes of 5 angstrom, with every randomness the frame has."""
    random = {"random_rotation": frame != "cell", "random_origin": frame != "unit"}
    table = {"element_table": TABLE} if "table" in options.get("channels", ()) else {}
    given_ = {"shape": 12, "box_A": 5.0, "max_spacing_A": 1.0, "radius_A": 0.8}
    return GridSpec.model_validate({"frame": frame} | given_ | random | table | options)


def heights(spec: GridSpec, z: int) -> FloatArray:
    """[C] heights of an atom's Gaussian, channel by channel."""
    values: list[float] = []
    for kind in spec.channels:
        if kind == "occupancy":
            values.append(1.0)
        elif kind == "z_density":
            values.append(z / np.sqrt((2 * np.pi * spec.sigma_A**2) ** 3))
        elif kind == "table":
            values += TABLE[SYMBOLS[z]]
        else:
            column, places = {"period": (0, 7), "group": (1, 18), "f_block": (2, 14)}[kind]
            values += [float(PLACES[z, column] == place) for place in range(1, places + 1)]
    return np.array(values)


def voxels_of(crystal: Crystal, spec: GridSpec, shape: Shape) -> FloatArray:
    """[V, 3] Cartesian places of the voxels."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    if spec.frame == "cell":
        return np.asarray(index / shape @ crystal.lattice_A)
    return np.asarray(index * spec.box_A / (np.array(shape) - 1))


def reference(crystal: Crystal, spec: GridSpec, points_V3: FloatArray) -> tuple[FloatArray, FloatArray]:
    """amounts [N, V] of unit Gaussians and distances [N, V] to the nearest image, over all images within 8 sigma."""
    middle = (points_V3.min(0) + points_V3.max(0)) / 2
    radius = np.linalg.norm(points_V3 - middle, axis=1).max() + max(8 * spec.sigma_A, spec.radius_A)
    inverse = np.linalg.inv(crystal.lattice_A)
    amounts, distances = [], []
    for frac in crystal.frac_N3:
        reach = np.ceil(radius * np.linalg.norm(inverse, axis=0)) + 1
        first = np.round(middle @ inverse - frac)
        images = np.array(list(itertools.product(*[np.arange(f - r, f + r + 1) for f, r in zip(first, reach)])))
        carts = (frac + (np.zeros((1, 3)) if spec.frame == "unit" else images)) @ crystal.lattice_A
        carts = carts[np.linalg.norm(carts - middle, axis=1) <= radius]
        squares = np.stack([((points_V3 - cart) ** 2).sum(1) for cart in carts] or [np.full(len(points_V3), np.inf)])
        amounts.append(np.exp(-squares / (2 * spec.sigma_A**2)).sum(0))
        distances.append(np.sqrt(squares.min(0)))
    return np.array(amounts), np.array(distances)


def check(crystal: Crystal, spec: GridSpec, shape: Shape, density_CDHW: Any, species_DHW: Any, some: int = 0) -> None:
    """Assert that grids hold what the formula says, at all voxels or at `some` random ones."""
    points = voxels_of(crystal, spec, shape)
    chosen = np.random.default_rng(0).integers(len(points), size=some) if some else np.arange(len(points))
    amounts, distances = reference(crystal, spec, points[chosen])
    codes = np.stack([heights(spec, z) for z in crystal.numbers_N.tolist()], axis=1)
    expected = codes @ amounts
    # 1e-6 of the largest value, or of an atom's height where a box holds only tails of the channel's atoms
    scale = np.maximum(abs(expected).max(1), abs(codes).max(1))[:, None]
    found = density_CDHW.flatten(1)[:, chosen].numpy()
    assert found.dtype == np.float32
    assert (abs(found - expected) <= 1e-6 * scale).all()

    ranked = np.sort(np.concatenate([distances, np.full((1, len(chosen)), np.inf)]), axis=0)
    decided = (ranked[1] - ranked[0] > 1e-6) & (abs(ranked[0] - spec.radius_A) > 1e-9)
    numbers = np.where(ranked[0] <= spec.radius_A, crystal.numbers_N[distances.argmin(0)], 0)
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(species_DHW.flatten()[chosen].numpy()[decided], numbers[decided])


def member(batch: CrystalTensors, row: int) -> Crystal:
    """A crystal of a batch, where it was placed."""
    atoms = int((batch.numbers_BN[row] > 0).sum())
    frac, numbers = batch.frac_BN3[row, :atoms].numpy(), batch.numbers_BN[row, :atoms].numpy()
    return Crystal("member", batch.lattice_B33[row].numpy(), frac, numbers)


def crystal_of(lattice: list[list[float]], symbols: str, seed: int = 0) -> Crystal:
    """Atoms at random places, some outside the cell."""
    numbers = np.array([NUMBERS[symbol] for symbol in symbols.split()])
    return Crystal("c", np.array(lattice), np.random.default_rng(seed).uniform(-1.5, 1.5, (len(numbers), 3)), numbers)


CRYSTALS = [
    crystal_of([[3.9, 0.3, -0.2], [1.1, 4.2, 0.4], [-1.3, 0.8, 4.6]], "La O Yb H", 1),
    crystal_of([[2.2, 0, 0], [0.7, 2.1, 0], [0.4, 0.6, 2.3]], "Ac", 2),
    crystal_of([[0, 4.0, 0], [3.8, 0.4, 0], [0, 0.5, 4.3]], "Pb I I", 3),  # left-handed
    crystal_of([[7.5, 0, 0], [7.0, 2.4, 0], [0.3, 0.4, 2.5]], "Fe Xe O", 4),  # 19 degrees
    crystal_of([[3.1, 0, 0], [0, 3.1, 0], [0, 0, 3.1]], "U U U O O O O", 5),
    crystal_of([[9.0, 0, 0], [0, 8.5, 0], [0.5, 0, 9.5]], "Cs", 6),
    crystal_of([[9.6, 0.4, 0], [0.5, 2.3, 0], [0, 0.4, 2.6]], "Na Cl", 7),
]
COUNT = len(CRYSTALS)


@pytest.mark.parametrize(("sigma", "radius"), [(0.3, 2.4), (0.5, 0.8), (1.0, 0.5)])
@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
def test_equals_the_formula(frame: str, sigma: float, radius: float) -> None:
    for channels in CHANNELS:
        spec = spec_of(frame, sigma_A=sigma, radius_A=radius, channels=channels)
        batch = randomise(CrystalTensors.of(CRYSTALS), spec, range(COUNT))
        density, species = voxelize_batch(batch, spec)
        assert (species.shape, species.dtype) == ((COUNT, 12, 12, 12), torch.uint8)
        for row in range(COUNT):
            check(member(batch, row), spec, (12, 12, 12), density[row], species[row])


@pytest.mark.parametrize("shape", [(12, 24, 16), (16, 12, 30), (12, 128, 40)])
def test_axes_of_a_cell_have_their_own_voxels(shape: Shape) -> None:
    spec = spec_of("cell", shape="adaptive")
    density, species = voxelize_batch(CrystalTensors.of(CRYSTALS[:4]), spec, shape)
    assert density.shape == (4, 1, *shape)
    for row, crystal in enumerate(CRYSTALS[:4]):
        check(crystal, spec, shape, density[row], species[row], some=300)


@pytest.mark.parametrize(("frame", "size"), [("cell", 24), ("window", 30), ("unit", 48)])
def test_a_thousand_atoms_beside_one(frame: str, size: int) -> None:
    many = np.random.default_rng(0).random((1000, 3))
    numbers = np.random.default_rng(1).integers(1, MAX_Z + 1, 1000)
    large = Crystal("large", np.array([[22.0, 0, 0], [4.0, 21.0, 0], [0, -3.0, 23.0]]), many, numbers)
    spec = spec_of(frame, shape=size, box_A=40.0 if frame == "unit" else 8.0, channels=("period", "group"))
    batch = randomise(CrystalTensors.of([CRYSTALS[0], large]), spec, [1, 2])
    density, species = voxelize_batch(batch, spec)
    for row in range(2):
        check(member(batch, row), spec, (size,) * 3, density[row], species[row], some=600 if frame == "unit" else 60)


@given(seed=SEEDS, frame=st.sampled_from(["cell", "window", "unit"]), sigma=st.floats(0.3, 1.0), atoms=st.integers(1, 6))
def test_equals_voxelize(random_crystal: MakeCrystal, seed: int, frame: str, sigma: float, atoms: int) -> None:
    spec = spec_of(frame, sigma_A=sigma, box_A=7.0, channels=("occupancy", "group"))
    batch = randomise(CrystalTensors.of([random_crystal(seed, atoms), CRYSTALS[2]]), spec, [seed, 0])
    density, species = voxelize_batch(batch, spec)
    for row in range(2):
        grid = voxelize(member(batch, row), spec)
        assert abs(density[row].numpy() - grid.density_CDHW).max() <= 5e-6 * max(1.0, grid.density_CDHW.max())
        np.testing.assert_array_equal(species[row].numpy(), grid.species_DHW)


@given(seed=SEEDS, steps=st.tuples(*[st.integers(-40, 40)] * 3))
@settings(max_examples=10)
def test_moving_by_whole_voxels_rolls_the_grid(random_crystal: MakeCrystal, seed: int, steps: Shape) -> None:
    spec, crystal = spec_of("cell", shape=16), random_crystal(seed)
    moved = replace(crystal, frac_N3=crystal.frac_N3 + np.array(steps) / 16)
    density, species = voxelize_batch(CrystalTensors.of([crystal, moved]), spec)
    rolled = torch.roll(density[0], steps, dims=(1, 2, 3))
    assert (density[1] - rolled).abs().max() <= 1e-6 * rolled.max()
    assert torch.equal(species[1], torch.roll(species[0], steps, dims=(0, 1, 2)))


@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
@pytest.mark.parametrize("workspace", [1, 20_000])
def test_neither_companions_nor_chunks_matter(frame: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels in CHANNELS:
        spec = spec_of(frame, channels=channels)
        batch = randomise(CrystalTensors.of(CRYSTALS), spec, range(COUNT))
        density, species = voxelize_batch(batch, spec)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_workspace", lambda device: workspace)
            parts = [slice(0, COUNT)] if workspace == 1 else [slice(row, row + 1) for row in range(COUNT)]
            grids = [voxelize_batch(batch.rows(part), spec) for part in parts]
        again = torch.cat([grid[0] for grid in grids])
        scale = density.abs().amax((2, 3, 4), keepdim=True).clamp(min=1e-3)
        assert ((again - density).abs() <= 1e-6 * scale).all()
        assert torch.equal(torch.cat([grid[1] for grid in grids]), species)


class Largest(TorchDispatchMode):
    """Takes down how many numbers the largest tensor held that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, values: Any = (), options: Any = None) -> Any:
        result = function(*values, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("frame", "options"),
    [
        ("cell", {"sigma_A": 0.3}),  # more modes than voxels
        ("cell", {"sigma_A": 1.0}),
        ("window", {"box_A": 1.0, "sigma_A": 1.0}),  # many images for few voxels
        ("window", {"box_A": 8.0, "radius_A": 3.0}),
        ("unit", {}),
    ],
)
def test_what_is_held_is_bounded(frame: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, workspace = spec_of(frame, **options), 21 * 12**3
    batch = randomise(CrystalTensors.of(CRYSTALS[:3] * 7), spec, range(21))
    monkeypatch.setattr(module, "_workspace", lambda device: workspace)
    with Largest() as largest:
        voxelize_batch(batch, spec)
    assert largest.numbers == workspace  # the grids themselves


def test_a_window_between_atoms_is_empty() -> None:
    sparse = Crystal("sparse", np.eye(3) * 30, np.array([[0.6, 0.6, 0.6]]), np.array([8]))
    spec = spec_of("window", random_origin=False, random_rotation=False)
    for crystals in ([sparse], [sparse, CRYSTALS[0]]):
        density, species = voxelize_batch(CrystalTensors.of(crystals), spec)
        assert not density[0].any() and not species[0].any()
    assert species[1].any()


@pytest.mark.parametrize("order", [(20, 30), (30, 20)])
@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
def test_a_tie_goes_to_the_atom_of_lower_index(frame: str, order: Shape) -> None:
    for edge in np.linspace(4, 5.6, 9):
        pair = Crystal("pair", np.eye(3) * edge, np.array([[0.4375, 0.5, 0.5], [0.5625, 0.5, 0.5]]), np.array(order))
        spec = spec_of(frame, shape=16 if frame == "cell" else 17, box_A=edge, random_rotation=False, random_origin=False)
        _, species = voxelize_batch(CrystalTensors.of([pair]), spec)
        assert species[0, 8, 8, 8] == order[0]


# Placement


def seed_of(crystal: Crystal, copy: int) -> int:
    """The seed that `frames.placed` uses."""
    return int.from_bytes(hashlib.sha256(f"{crystal.id}\0{copy}".encode()).digest()[:8], "big")


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
def test_placement_is_that_of_one_crystal_alone(frame: str, random: bool) -> None:
    options = {} if random else {"random_rotation": False, "random_origin": False}
    spec = spec_of(frame, box_A=9.0, **options)
    crystals = [replace(crystal, id=f"crystal {row}") for row, crystal in enumerate(CRYSTALS)]
    batch = randomise(CrystalTensors.of(crystals), spec, [seed_of(crystal, 3) for crystal in crystals])
    for row, crystal in enumerate(crystals):
        expected = placed(crystal, spec, 3)
        np.testing.assert_allclose(member(batch, row).lattice_A, expected.lattice_A, atol=1e-12)
        np.testing.assert_allclose(member(batch, row).frac_N3, expected.frac_N3, atol=1e-12)
        np.testing.assert_array_equal(member(batch, row).numbers_N, crystal.numbers_N)


@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
def test_a_seed_places_a_crystal_alike_in_any_batch(frame: str) -> None:
    spec = spec_of(frame)
    batch = randomise(CrystalTensors.of(CRYSTALS), spec, range(COUNT))
    for row in (1, 4):
        alone = randomise(CrystalTensors.of([CRYSTALS[row]]), spec, [row])
        other = randomise(CrystalTensors.of([CRYSTALS[row]]), spec, [row + 1])
        np.testing.assert_allclose(member(alone, 0).cart_N3, member(batch, row).cart_N3, atol=1e-12)
        assert frame == "unit" or abs(member(other, 0).cart_N3 - member(alone, 0).cart_N3).max() > 0.01
        assert frame == "cell" or abs(other.lattice_B33 - alone.lattice_B33).max() > 0.01


def test_units_are_centred_again_at_every_placement() -> None:
    spec = spec_of("unit")
    batch = CrystalTensors.of(CRYSTALS)
    for seeds in (range(COUNT), range(COUNT, 2 * COUNT)):
        batch = randomise(batch, spec, seeds)
        for row in range(COUNT):
            np.testing.assert_allclose(member(batch, row).cart_N3.mean(0), spec.box_A / 2, atol=1e-12)


def test_rotations_and_origins_are_uniform() -> None:
    count = 4000
    batch = CrystalTensors.of([Crystal("cube", np.eye(3), np.zeros((1, 3)), np.ones(1))] * count)
    moved = randomise(batch, spec_of("window"), range(count))
    rotation, origin = moved.lattice_B33.numpy(), moved.frac_BN3[:, 0].numpy()
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (count, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-12)
    # On SO(3): means 0 and variances 1/3 of all elements, 1 and 2 of the squared trace; 4.5 standard errors are allowed.
    assert abs(rotation.mean(0)).max() < 4.5 * np.sqrt(1 / 3 / count)
    assert abs((np.trace(rotation, axis1=1, axis2=2) ** 2).mean() - 1) < 4.5 * np.sqrt(2 / count)
    for axis in range(3):
        histogram, _ = np.histogram(origin[:, axis], bins=8, range=(0, 1))
        assert histogram.sum() == count
        assert abs(histogram - count / 8).max() < 4.5 * np.sqrt(count / 8)


# Precision and determinism


def grids_of(frame: str) -> tuple[torch.Tensor, torch.Tensor]:
    spec = spec_of(frame, channels=CHANNELS[2])
    return voxelize_batch(randomise(CrystalTensors.of(CRYSTALS), spec, range(COUNT)), spec)


def same(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("frame", ["cell", "window", "unit"])
def test_the_same_bits_again_and_under_autocast(frame: str) -> None:
    grids = grids_of(frame)
    torch.use_deterministic_algorithms(True)
    try:
        assert same(grids, grids_of(frame))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(grids, grids_of(frame))


@contextmanager
def precision(setting: str) -> Iterator[Callable[[], tuple[Any, ...]]]:
    """Sloppy float32 products, allowed through one of torch's interfaces; yields what reads the settings."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), cuda.fp32_precision, cpu.fp32_precision
    try:
        if setting == "new":
            cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        else:
            torch.set_float32_matmul_precision(setting)
        yield lambda: (
            cuda.fp32_precision,
            cpu.fp32_precision,
            *(() if setting == "new" else (torch.get_float32_matmul_precision(),)),
        )
    finally:
        torch.set_float32_matmul_precision(before[0])
        cuda.fp32_precision, cpu.fp32_precision = before[1:]


@pytest.mark.parametrize("setting", ["highest", "medium", "new"])
def test_products_are_full_float32_whatever_is_allowed(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    original = torch.mm

    def spy(*values: Any, **options: Any) -> Any:
        # Where torch's two records of the setting differ, these raise, as would a product on CUDA.
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        seen.add((torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none"), torch.is_autocast_enabled("cpu")))
        return original(*values, **options)

    monkeypatch.setattr(torch, "mm", spy)
    with precision(setting) as read, torch.autocast("cpu", dtype=torch.bfloat16):
        before = read()
        grids_of("cell")
        assert read() == before
    assert seen == {("highest", False), (True, False)}


def test_precision_is_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fill", lambda *values: 1 / 0)
    with precision("medium") as read:
        before = read()
        with pytest.raises(ZeroDivisionError):
            grids_of("cell")
        assert read() == before


# Refusals


def test_refusals_name_what_is_missing() -> None:
    with pytest.raises(ValueError, match="at least one crystal"):
        CrystalTensors.of([])
    batch = CrystalTensors.of(CRYSTALS[:2])
    with pytest.raises(ValueError, match="3 seeds for 2 crystals"):
        randomise(batch, spec_of("cell"), [1, 2, 3])
    with pytest.raises(ValueError, match="'adaptive' needs the shape"):
        voxelize_batch(batch, spec_of("cell", shape="adaptive"))
