"""`crystal.voxelize` for a whole batch on any device: the same grids, with fresh rotations and origins every step.

A box (window or unit) is a sum of products of three one-dimensional Gaussians, one matrix product for all its atoms. In an
oblique cell a Gaussian is no such product, but its Fourier transform is (Poisson's summation formula):

    sum over images of exp(-d^2 / 2 sigma^2) = sum over h of A_h exp(2 pi i h (r - u)),
    A_h = (2 pi sigma^2)^1.5 / V exp(-sigma^2 k_h^2 / 2),    k_h = 2 pi (h_1 b_1 + h_2 b_2 + h_3 b_3)

for an atom at u, with r and u fractional and b_i the rows of the reciprocal lattice. Both sums end at REACH standard
deviations. Where there are more channels than elements, a density is made for each element of a crystal, and the channels
are mixed from these.

Precision: positions, distances and phases are float64, and what is summed is float32 (complex64) at full precision, whatever
autocast and TF32 say; errors stay below 1e-6 of the largest value, so a density may be as far below 0. Nothing is added in
an order that could vary, so the same call gives the same bits (CUDA wants CUBLAS_WORKSPACE_CONFIG set for that).
Memory: besides the grids, at most some 64 bytes * `_workspace`, or what one crystal needs, atom by atom.
The host waits for the device only in windows, twice for each part of the batch, to learn how many images there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import floor, pi, prod, sqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import GridSpec
from dist_train.crystal.voxelize import code_table
from dist_train.models.crystal_tensors import CrystalTensors, inverse, rows_times, send, volumes

REACH = 6.0
"""Standard deviations after which Gaussians end: 1.5e-8 of their height in space, 1e-7 in all missing waves together."""
RANK_BITS, INDEX_BITS, NUMBER_BITS = 39, 16, 7
"""Squared distance over squared radius, place in the crystal and atomic number of an atom, together in a sortable int64.

Crystals of more than 2^16 atoms don't fit."""
NO_ATOM = 2**63 - 2**NUMBER_BITS
"""More than any such number; its atomic number is 0."""

Shape = tuple[int, int, int]


class _Atoms(NamedTuple):
    """Atoms, or their images, where a grid sees them.

    centre_BN3: float64 position in voxels; label_BN: place in the crystal and atomic number, in the lower bits of an int64,
    the number 0 for padding; weight_BKN: float32 height in each of the densities to make.
    """

    centre_BN3: Tensor
    label_BN: Tensor
    weight_BKN: Tensor


def voxelize_batch(batch: CrystalTensors, spec: GridSpec, shape: Shape | None = None) -> tuple[Tensor, Tensor]:
    """density_BCDHW float32 and species_BDHW uint8 of crystals as they are placed, on the batch's device.

    shape: voxels along each axis; needed for a spec of shape 'adaptive'. What `frames.grid_shape` and `representable` refuse
    is not refused again. Raises ValueError without a shape.
    """
    if shape is None:
        if spec.shape == "adaptive":
            raise ValueError("a spec of shape 'adaptive' needs the shape of this batch's grids")
        shape = (spec.shape,) * 3
    codes = _codes(spec, batch.device)
    channels, elements = codes.shape[1], batch.elements_BE.shape[1]
    density = torch.empty((len(batch), channels, prod(shape)), device=batch.device)
    species = torch.empty((len(batch), prod(shape)), dtype=torch.uint8, device=batch.device)
    each = _size(batch, spec, shape, min(channels, elements))
    with torch.no_grad(), _full_precision(batch.device):
        for part in _parts(len(batch), each, batch.device):
            _fill(batch.rows(part), spec, codes, shape, density[part], species[part])
    return density.view(len(batch), channels, *shape), species.view(len(batch), *shape)


def _size(batch: CrystalTensors, spec: GridSpec, shape: Shape, fields: int) -> int:
    """Numbers in the largest intermediate result of a crystal that isn't made atom by atom."""
    if spec.frame == "cell":
        bounds = _mode_bounds(batch, spec.sigma_A)
        return fields * prod(max(n, 2 * m + 1) for n, m in zip(shape, bounds, strict=True))
    images = batch.atoms_B * _image_counts(batch, spec).prod(1) if spec.frame == "window" else np.zeros(1)
    return max(fields * prod(shape), 16 * int(images.max()))


@cache
def _codes(spec: GridSpec, device: torch.device) -> Tensor:
    """`code_table` on a device."""
    return torch.tensor(code_table(spec), device=device)


def _workspace(device: torch.device) -> int:
    """Numbers that an intermediate result may hold: few enough for a CPU's cache, or enough to keep a GPU busy."""
    return 2**19 if device.type == "cpu" else 2**24


def _parts(count: int, each: int, device: torch.device) -> Iterator[slice]:
    """Slices of range(count) of as many items, of `each` numbers, as the workspace holds."""
    step = max(1, _workspace(device) // max(1, each))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 products in float32: neither autocast nor the TF32 and bfloat16 that the process may have allowed.

    torch keeps each of these settings twice and refuses to work while the two differ, so both are set and put back.
    Autocast leaves in-place products and those with `out` alone, as torch's documentation says; here it is off for any.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting alone was changed
        legacy = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def _fill(
    batch: CrystalTensors, spec: GridSpec, codes: Tensor, shape: Shape, density_BCV: Tensor, species_BV: Tensor
) -> None:
    """Write the grids of some crystals."""
    mixed = codes.shape[1] > batch.elements_BE.shape[1]
    weight_BKN = _element_weights(batch) if mixed else codes[batch.numbers_BN].mT
    fields_BKV = density_BCV.new_empty(*weight_BKN.shape[:2], prod(shape)) if mixed else density_BCV
    if spec.frame == "cell":
        atoms = _cell_atoms(batch, weight_BKN, shape)
        basis_B33 = batch.lattice_B33 / send(torch.tensor(shape), batch.device)[:, None]
        planes_3 = batch.spacings_B3.min(0) / shape
        _fill_cell(batch, weight_BKN, spec.sigma_A, shape, fields_BKV)
    else:
        planes_3 = spec.box_A / (np.array(shape) - 1)
        atoms = _box_atoms(batch, weight_BKN, spec, planes_3)
        basis_B33 = send(torch.from_numpy(np.diag(planes_3)), batch.device).expand(len(batch), 3, 3)
        _fill_box(atoms, spec.sigma_A, planes_3, shape, fields_BKV)
    if mixed:
        torch.bmm(codes[batch.elements_BE].mT, fields_BKV, out=density_BCV)
    reach = [floor(spec.radius_A / plane * (1 + 1e-9) + 0.5) for plane in planes_3.tolist()]
    nearest_BV = _nearest(atoms, basis_B33, spec.radius_A, reach, shape, periodic=spec.frame == "cell")
    species_BV.copy_(nearest_BV.bitwise_and_(2**NUMBER_BITS - 1))


def _element_weights(batch: CrystalTensors) -> Tensor:
    """[B, E, N] 1 where an atom is of an element; padding is of the element 0, all of whose codes are 0."""
    return batch.elements_BE.unsqueeze(2).eq(batch.numbers_BN.unsqueeze(1)).float()


def _cell_atoms(batch: CrystalTensors, weight_BKN: Tensor, shape: Shape) -> _Atoms:
    """The atoms of the cells."""
    return _Atoms(batch.frac_BN3 * send(torch.tensor(shape), batch.device), _labels(batch), weight_BKN)


def _labels(batch: CrystalTensors) -> Tensor:
    """[B, N] labels of atoms."""
    places = torch.arange(batch.numbers_BN.shape[1], device=batch.device)
    return batch.numbers_BN + (places << NUMBER_BITS)


def _box_atoms(batch: CrystalTensors, weight_BKN: Tensor, spec: GridSpec, step_3: NDArray[np.float64]) -> _Atoms:
    """The atoms of units, the images of windows that reach into the box."""
    step = send(torch.from_numpy(step_3), batch.device)
    if spec.frame == "unit":
        return _Atoms(rows_times(batch.frac_BN3, batch.lattice_B33) / step, _labels(batch), weight_BKN)
    cart_BM3, label_BM = _images(batch, spec)
    places = (label_BM >> NUMBER_BITS).unsqueeze(1).expand(-1, weight_BKN.shape[1], -1)
    weight_BKM = weight_BKN.gather(2, places) * _present(label_BM).unsqueeze(1)
    return _Atoms(cart_BM3 / step, label_BM, weight_BKM)


def _present(label: Tensor) -> Tensor:
    """Which labels are atoms rather than padding."""
    return label.bitwise_and(2**NUMBER_BITS - 1).gt(0)


def _half(spec: GridSpec) -> float:
    """Half the edge of the cube that holds every image which matters in a window, in angstrom."""
    return spec.box_A / 2 + max(REACH * spec.sigma_A, spec.radius_A)


def _image_counts(batch: CrystalTensors, spec: GridSpec) -> NDArray[np.int64]:
    """[B, 3] most images of an atom along each axis of the cell: however the cube is turned, a sphere goes round it."""
    return np.floor(2 * sqrt(3) * _half(spec) / batch.spacings_B3 * (1 + 1e-9)).astype(np.int64) + 1


def _images(batch: CrystalTensors, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Cartesian positions [B, M, 3] and labels [B, M] of the images that matter in windows, filled up with zeros."""
    most_B3, half, box = _image_counts(batch, spec), _half(spec), spec.box_A
    many_B = batch.atoms_B * most_B3.prod(1)
    host = np.column_stack([many_B, many_B.cumsum() - many_B, most_B3])
    many, start, *most = send(torch.from_numpy(host), batch.device).unbind(1)
    crystal = torch.repeat_interleave(many, output_size=int(many_B.sum()))
    rest = torch.arange(len(crystal), device=batch.device) - start[crystal]
    image = []
    for axis in (2, 1, 0):
        image.append(rest % most[axis][crystal])
        rest = rest // most[axis][crystal]
    frac = batch.frac_BN3[crystal, rest]
    reciprocal = inverse(batch.lattice_B33)
    low = reciprocal.sum(1) * (box / 2) - reciprocal.abs().sum(1) * half
    frac = frac + torch.ceil(low[crystal] - frac) + torch.stack(image[::-1], dim=1)
    cart = rows_times(frac.unsqueeze(1), batch.lattice_B33[crystal]).squeeze(1)
    near = ((cart - box / 2).abs() <= half).all(1).nonzero().squeeze(1)
    return _pad_images(cart[near], _labels(batch)[crystal[near], rest[near]], crystal[near], len(batch))


def _pad_images(cart: Tensor, label: Tensor, crystal: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The images, sorted by crystal, as rows of one length for each crystal."""
    bounds = torch.searchsorted(crystal, torch.arange(count + 1, device=crystal.device))
    width = int(bounds.diff().max())
    slot = crystal * width + torch.arange(len(crystal), device=crystal.device) - bounds[crystal]
    cart_all, label_all = cart.new_zeros(count * width, 3), label.new_zeros(count * width)
    cart_all[slot], label_all[slot] = cart, label
    return cart_all.view(count, width, 3), label_all.view(count, width)


def _fill_box(atoms: _Atoms, sigma: float, step_3: NDArray[np.float64], shape: Shape, fields_BKV: Tensor) -> None:
    """Write the weighted sums of Gaussians on Cartesian grids."""
    x, y, z = (
        _decay(0.5 * ((torch.arange(size, device=fields_BKV.device) - centre.unsqueeze(-1)) * (step / sigma)).square())
        for centre, size, step in zip(atoms.centre_BN3.unbind(2), shape, step_3.tolist(), strict=True)
    )
    _sum_products(atoms.weight_BKN, x, y, z, fields_BKV)


def _mode_bounds(batch: CrystalTensors, sigma: float) -> list[int]:
    """Largest |h_i| of the modes with |k_h| up to REACH / sigma: h_i is k_h . a_i / 2 pi."""
    return [floor(REACH / sigma * edge / (2 * pi) * (1 + 1e-9)) for edge in batch.edges_B3.max(0).tolist()]


def _fill_cell(batch: CrystalTensors, weight_BKN: Tensor, sigma: float, shape: Shape, fields_BKV: Tensor) -> None:
    """Write the weighted periodic sums of Gaussians on fractional grids, by their Fourier series."""
    m0, m1, m2 = _mode_bounds(batch, sigma)
    # The conjugate half of the modes along the last axis is left out.
    modes = [torch.arange(low, high + 1, device=batch.device) for low, high in ((-m0, m0), (-m1, m1), (0, m2))]
    x, y, z = (_waves(-u.unsqueeze(-1) * mode) for u, mode in zip(batch.frac_BN3.unbind(2), modes, strict=True))
    waves = fields_BKV.new_empty(*weight_BKN.shape[:2], prod(map(len, modes)), dtype=torch.complex64)
    _sum_products(weight_BKN, x, y, z, waves)
    waves *= _amplitudes(batch.lattice_B33, sigma, modes).view(len(batch), 1, -1)
    d, h, w = (_grid_waves(mode, size) for mode, size in zip(modes, shape, strict=True))
    waves = torch.matmul(h, waves.view(-1, len(modes[1]), len(modes[2])))
    waves = torch.matmul(d, waves.view(-1, len(modes[0]), shape[1] * len(modes[2])))
    # The real part of a product is a real product of twice the inner length; modes other than 0 stand for two.
    twice = torch.where(modes[2] == 0, 1.0, 2.0)
    basis_WZ2 = torch.stack([w.real * twice, -w.imag * twice], dim=2)
    pairs = torch.view_as_real(waves).view(-1, 2 * len(modes[2]))
    torch.mm(pairs, basis_WZ2.flatten(1).T, out=fields_BKV.view(-1, shape[2]))


def _sum_products(weight_BKN: Tensor, x_BNX: Tensor, y_BNY: Tensor, z_BNZ: Tensor, out_BKV: Tensor) -> None:
    """Write the sums over n of weight * x * y * z at V = (X, Y, Z) as matrix products; tables are real or complex."""
    (count, fields, many), x, yz = weight_BKN.shape, x_BNX.shape[2], y_BNY.shape[2] * z_BNZ.shape[2]
    total = out_BKV.zero_().view(count, fields * x, yz)
    for part in _parts(many, count * max(fields * x, yz), total.device):
        left = weight_BKN[:, :, None, part] * x_BNX[:, part].mT.unsqueeze(1)
        right = y_BNY[:, part].unsqueeze(3) * z_BNZ[:, part].unsqueeze(2)
        total.baddbmm_(left.flatten(1, 2), right.flatten(2))


def _decay(exponent: Tensor) -> Tensor:
    """float32 exp(-exponent), 0 beyond REACH standard deviations: products of these are no denormal numbers."""
    return torch.where(exponent <= 0.5 * REACH**2, torch.exp(-exponent.float()), 0.0)


def _waves(turns: Tensor) -> Tensor:
    """complex64 exp(2 pi i turns)."""
    return torch.polar(torch.ones_like(turns), 2 * pi * turns).to(torch.complex64)


def _grid_waves(modes_M: Tensor, size: int) -> Tensor:
    """[size, M] exp(2 pi i h j / size) at voxels j."""
    return _waves((torch.arange(size, device=modes_M.device)[:, None] * modes_M).remainder(size).double() / size)


def _amplitudes(lattice_B33: Tensor, sigma: float, modes: list[Tensor]) -> Tensor:
    """[B, X, Y, Z] float32 Fourier coefficients A_h of one atom's Gaussians (see the module)."""
    reciprocal_B33 = inverse(lattice_B33).mT
    x, y, z = (mode.double().view(1, 1, -1) for mode in modes)
    exponent = 0.5 * (2 * pi * sigma) ** 2 * _squared_lengths(reciprocal_B33, x, y, z).squeeze(1)
    height = (2 * pi * sigma**2) ** 1.5 / volumes(lattice_B33).abs()
    return _decay(exponent).mul_(height.float().view(-1, 1, 1, 1))


def _squared_lengths(rows_B33: Tensor, x_BNX: Tensor, y_BNY: Tensor, z_BNZ: Tensor) -> Tensor:
    """[B, N, X, Y, Z] squared length of x * rows[0] + y * rows[1] + z * rows[2]."""
    x, y, z = x_BNX[..., None, None], y_BNY[..., None, :, None], z_BNZ[..., None, None, :]
    g = (rows_B33 @ rows_B33.mT).view(-1, 9, 1, 1, 1, 1).unbind(1)
    return g[0] * x * x + y * (2 * g[1] * x + g[4] * y) + z * (2 * (g[2] * x + g[5] * y) + g[8] * z)


def _nearest(atoms: _Atoms, basis_B33: Tensor, radius: float, reach: list[int], shape: Shape, periodic: bool) -> Tensor:
    """[B, V] squared distance and label of the nearest atom within the radius as one number, NO_ATOM where there is none.

    The smallest number is that of the nearest atom; distances that agree to 2^-39 of the squared radius leave it to the
    place in the crystal. reach: how many voxels beside the one next to an atom the radius spans, along each axis.
    """
    count, many = atoms.label_BN.shape
    nearest = torch.full((count, prod(shape)), NO_ATOM, device=basis_B33.device)
    for part in _parts(many, count * prod(2 * r + 1 for r in reach), nearest.device):
        label = atoms.label_BN[:, part, None, None, None]
        place, inside, steps = torch.zeros_like(label), _present(label), []
        for axis, (r, size) in enumerate(zip(reach, shape, strict=True)):
            centre = atoms.centre_BN3[:, part, axis, None]
            voxel = centre.round().long() + torch.arange(-r, r + 1, device=nearest.device)
            steps.append(voxel - centre)
            spread = [*voxel.shape[:2], 1, 1, 1]
            spread[2 + axis] = -1
            if not periodic:
                inside = inside & ((voxel >= 0) & (voxel < size)).view(spread)
            place = place * size + voxel.remainder(size).view(spread)
        rank = _squared_lengths(basis_B33 * (2 ** (RANK_BITS / 2) / radius), *steps).round_().long()
        found = torch.where(inside & (rank <= 2**RANK_BITS), (rank << (INDEX_BITS + NUMBER_BITS)) + label, NO_ATOM)
        nearest.scatter_reduce_(1, place.flatten(1), found.flatten(1), "amin")
    return nearest
