"""One sample as members of a WebDataset tar: `KEY.density.npy`, `KEY.species.npy`, `KEY.structure.json`.

Density is float16 [C, D, H, W], species uint8 [D, H, W]; nothing is pickled and no key holds a dot.
"""

from __future__ import annotations

import io
import tarfile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import VoxelGrid

MEMBERS = ("density.npy", "species.npy", "structure.json")


def encode_sample(crystal: Crystal, grid: VoxelGrid) -> dict[str, bytes]:
    """The bytes of each member."""
    return {
        "density.npy": _npy(grid.density_CDHW.astype(np.float16)),
        "species.npy": _npy(grid.species_DHW),
        "structure.json": crystal.to_json().encode(),
    }


def _npy(array: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def read_npy(data: memoryview) -> NDArray[np.generic]:
    """The array of an .npy member, as a view of its bytes (no copy). Raises ValueError where it isn't one."""
    head = io.BytesIO(bytes(data[:128]))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("not an .npy of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if fortran or dtype.hasobject:
        raise ValueError("Fortran order and objects are not read")
    return np.frombuffer(data, dtype, count=int(np.prod(shape)), offset=head.tell()).reshape(shape)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member with fixed metadata, so that equal samples give equal bytes; returns the offset of its data."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - _padded(len(data))


def open_tar(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar writer of the POSIX ustar format, whose headers are always one block."""
    return tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
