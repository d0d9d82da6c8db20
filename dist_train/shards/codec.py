"""One sample as members `KEY.NAME` of a WebDataset tar; nothing is pickled and no key holds a dot.

raw: `density.npy` float16 [C, D, H, W], `species.npy` uint8 [D, H, W], `structure.json`.
compact: `density.npy.zst`, `species.npy.zst`, `structure.json`: zstd frames of .npy files. Density is uint8 of the square
root, density = max * (q / 255)^2, the max of each channel under "density_max" in `structure.json`; the error is at most
0.45 % of that max (0.41 % measured), float16's rounding included.
structures: `structure.json` alone.

KB of a sample on 32^3 grids of both tables in data/sample; compact grids take longer to read, structures until voxelised:

| channels | raw | compact | structures |
| --- | --- | --- | --- |
| 1 | 99 | 12 | 0.4-0.6 |
| 26 | 1,737 | 30-36 | 0.4-0.6 |
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Iterable, Mapping
from functools import cache, reduce
from typing import IO, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import VoxelGrid
from dist_train.errors import CrystalError, ShardError
from dist_train.shards.half import LARGEST, to_half

T = TypeVar("T", bound=np.generic)
Encoding = Literal["raw", "compact"]
Buffer = bytes | bytearray | memoryview | NDArray[Any]
MEMBERS = {
    "raw": ("density.npy", "species.npy", "structure.json"),
    "compact": ("density.npy.zst", "species.npy.zst", "structure.json"),
    "structures": ("structure.json",),
}
"""Names of a sample's members, in order, by encoding; 'structures' where no grids are stored."""

MAX_BYTES = 2**28
"""Largest array in a zstd frame: a hostile frame of a few bytes would otherwise fill the memory."""
ZSTD_LEVEL = 6
"""Measured: level 3 packs up to 2.7 times as fast into 6 to 11 % more, 15 saves 2 to 5 % in 4 to 8 times as long."""
STEPS = 255

_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|]\w\d+)', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,9}, ){0,7}\d{1,9},?)\), \} *\n",
    re.DOTALL,
)
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def encode_sample(crystal: Crystal, grid: VoxelGrid | None, encoding: Encoding = "raw", copy: int = 0) -> dict[str, bytes]:
    """The bytes of each member; without a grid the structure alone. Equal bytes for equal samples (and version of zstd).

    Raises ShardError for densities that the encoding can't hold.
    """
    more: dict[str, Any] = {"copy": copy} if copy else {}
    members = {}
    if grid is not None and encoding == "raw":
        members = {"density.npy": _npy(_float16(grid.density_CDHW, crystal)), "species.npy": _npy(grid.species_DHW)}
    elif grid is not None:
        peaks, codes = _roots(grid.density_CDHW, crystal)
        more["density_max"] = peaks.tolist()
        members = {"density.npy.zst": _zstd(_npy(codes)), "species.npy.zst": _zstd(_npy(grid.species_DHW))}
    row = crystal.to_json()
    if more:
        row = f"{row[:-1]},{json.dumps(more, separators=(',', ':'))[1:]}"
    return members | {"structure.json": row.encode()}


def decode_sample(
    members: Mapping[str, bytes | memoryview],
) -> tuple[NDArray[np.float16] | None, NDArray[np.uint8] | None, Crystal]:
    """Density float16 [C, D, H, W], species uint8 [D, H, W] (None where only the structure is there) and the crystal.

    Raw arrays are views of the given bytes. Nothing is unpickled or evaluated, and memory is bounded: the bytes may be
    anybody's. Raises ValueError naming what is wrong.
    """
    kind = next((kind for kind, names in MEMBERS.items() if set(names) == set(members)), None)
    if kind is None:
        raise ValueError(f"members {sorted(members)} are none of {list(MEMBERS.values())}")
    crystal = decode_crystal(members["structure.json"])
    if kind == "structures":
        return None, None, crystal
    first, second = (memoryview(members[name]) for name in MEMBERS[kind][:2])
    if kind == "raw":
        density, species = read_npy(first, np.float16), read_npy(second, np.uint8)
    else:
        codes, species = read_npy(_unzstd(first), np.uint8), read_npy(_unzstd(second), np.uint8)
        density = _squares(codes, json.loads(bytes(members["structure.json"])).get("density_max"))
    if (density.ndim, density.shape[1:]) != (4, species.shape):
        raise ValueError(f"density has the shape {density.shape}, species {species.shape}: not [C, D, H, W] and [D, H, W]")
    return density, species, crystal


def decode_crystal(data: bytes | memoryview) -> Crystal:
    """The crystal of a `structure.json`, checked. Raises ValueError where it holds none."""
    try:
        crystal = Crystal.from_json(bytes(data))
        return crystal.checked(max_atoms=len(crystal))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, CrystalError) as error:
        raise ValueError(f"structure.json holds no crystal: {error!r}") from None


def read_npy(data: memoryview, scalar: type[T]) -> NDArray[T]:
    """The array of an .npy member, as a view of its bytes (no copy). Raises ValueError unless it holds such scalars."""
    # numpy's own reader evaluates the header as Python and takes any dtype.
    found = _NPY.match(data[:256])
    if found is None or found.end() != 10 + int.from_bytes(found[1], "little"):
        raise ValueError("not an .npy of version 1.0 with an array in C order")
    shape = [int(size) for size in re.findall(rb"\d+", found[3])]
    dtype = np.dtype(scalar)
    if found[2].decode() != dtype.str:
        raise ValueError(f"an .npy of type {found[2].decode()}, {dtype.str} expected")
    if len(data) - found.end() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data) - found.end()} bytes behind the .npy header of shape {shape} and type {dtype}")
    return np.frombuffer(data, dtype, offset=found.end()).reshape(shape)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member with fixed metadata, so that equal samples give equal bytes; returns the offset of its data."""
    tar.addfile(member_info(name, len(data)), io.BytesIO(data))
    return tar.offset - padded(len(data))


def member_info(name: str, size: int) -> tarfile.TarInfo:
    """The metadata of a member: its name and size decide every byte of its header."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info


def open_tar(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar writer of the POSIX ustar format, whose headers are always one block."""
    return tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=2**20)


def padded(size: int, block: int = tarfile.BLOCKSIZE) -> int:
    """Bytes of whole blocks that hold `size` bytes."""
    return -(-size // block) * block


def crc_of(members: Iterable[Buffer]) -> int:
    """crc32 of a sample's members, one after another."""
    return reduce(lambda crc, data: crc32(data, crc), members, 0)


@cache
def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What stands before the numbers of such an array in an .npy member."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype.str})
    return stream.getvalue()


def _npy(array: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _float16(density: NDArray[np.float32], crystal: Crystal) -> NDArray[np.float16]:
    try:
        return to_half(density)
    except ValueError as error:
        raise ShardError(f"{crystal.id}: the density has {error}; raise grid.sigma_A") from None


def _roots(density_CDHW: NDArray[np.float32], crystal: Crystal) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Maximum of each channel, and the codes round(255 sqrt(density / maximum))."""
    least, peaks = density_CDHW.min((1, 2, 3)), density_CDHW.max((1, 2, 3)).clip(min=0)
    _float16(peaks, crystal)
    # Sums of waves are negative by 1e-7 where they should be zero; a channel 'table' with negative heights is no rounding.
    if (least < -peaks / STEPS).any():
        raise ShardError(
            f"{crystal.id}: density down to {least.min():.4g}, 'compact' holds none below 0; set data.encoding=raw"
        )
    codes = np.empty(density_CDHW.shape, np.uint8)
    for code, channel, peak in zip(codes, density_CDHW, peaks.tolist()):
        root = np.sqrt(np.maximum(channel, 0) * np.float32(STEPS**2 / peak if peak else 0.0))
        code[:] = root + np.float32(0.5)
    return peaks, codes


def _squares(codes_CDHW: NDArray[np.uint8], maxima: Any) -> NDArray[np.float16]:
    """Inverse of `_roots`."""
    peaks = np.asarray(maxima if isinstance(maxima, list) else [])
    if peaks.dtype.kind not in "fiu" or peaks.shape != codes_CDHW.shape[:1]:
        raise ValueError(f"density_max {str(maxima)[:80]} for codes of shape {codes_CDHW.shape}: not a number a channel")
    if not ((peaks >= 0) & (peaks <= LARGEST)).all():
        raise ValueError(f"density_max {peaks.tolist()[:8]} is not within 0 and {LARGEST:.0f}")
    tables = (peaks[:, None] * (np.arange(STEPS + 1) / STEPS) ** 2).astype(np.float16)
    density = np.empty(codes_CDHW.shape, np.float16)
    for channel, table, codes in zip(density, tables, codes_CDHW):
        np.take(table, codes, out=channel, mode="clip")
    return density


def _zstd(data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise ShardError(f"a grid of {len(data)} bytes, 'compact' holds at most {MAX_BYTES}; set data.encoding=raw")
    return bytes(pa.Codec("zstd", compression_level=ZSTD_LEVEL).compress(data, asbytes=True))


def _unzstd(frame: memoryview) -> memoryview:
    """What a zstd frame holds; its header tells the size (RFC 8878, 3.1.1.1), the codec refuses one that it doesn't have."""
    head = bytes(frame[:18])
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        raise ValueError("not a zstd frame")
    flag, single, dictionary = head[4] >> 6, head[4] >> 5 & 1, head[4] & 3
    start = 5 + (not single) + (0, 1, 2, 4)[dictionary]
    size = int.from_bytes(head[start : start + (single, 2, 4, 8)[flag]], "little") + (256 if flag == 1 else 0)
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"a zstd frame of {size} bytes when unpacked (0: it doesn't tell), at most {MAX_BYTES} are taken")
    try:
        return memoryview(pa.Codec("zstd").decompress(frame, size))
    except OSError as error:
        raise ValueError(f"a damaged zstd frame: {error}") from None
