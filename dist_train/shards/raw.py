"""Raw samples from their shards into the arrays of a batch, without Python's lock: threads don't wait for each other.

The checksum of each piece of a file is taken while the processor's cache still holds it. `dist-train bench loader` compares
this with reading the files through one small buffer.
"""

from __future__ import annotations

import ctypes
from functools import cache

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
from isal import isal_zlib
from numba import njit, types
from numpy.typing import NDArray

from dist_train.errors import ShardError

PIECE = 2**17
"""Bytes; as fast for 2^16 to 2^18, slower where pieces don't fit into a core's own cache."""

# Compiled functions that call these by their names are kept; those that hold a ctypes function would be compiled each time.
_crc32 = types.ExternalFunction("crc32_gzip_refl", types.uint32(types.uint32, types.intp, types.uint64))
_pread = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.uintp, types.int64))


@cache
def _link() -> None:
    """Tell the compiler where ISA-L's checksum is: in the module of the package isal. Raises ShardError where it isn't."""
    try:
        function = ctypes.CDLL(isal_zlib.__file__).crc32_gzip_refl
    except AttributeError:
        told = f"{isal_zlib.__file__} lacks crc32_gzip_refl of ISA-L"
        raise ShardError(f"{told}: install the package isal from PyPI, 1.7 or later") from None
    llvm.add_symbol("crc32_gzip_refl", ctypes.cast(function, ctypes.c_void_p).value)


def read_rows(
    fds: NDArray[np.int32], spans: NDArray[np.int64], heads: tuple[bytes, bytes], density: NDArray[np.generic],
    species: NDArray[np.generic],
) -> list[memoryview | None]:  # fmt: skip
    """Read samples into the rows of C-ordered arrays; their `structure.json`, undecoded, None where a sample is not whole.

    fds: [B] file descriptors that nobody closes meanwhile. spans: [B, 7] offset and bytes of `density.npy`, `species.npy`
    and `structure.json`, and crc32 of all three. heads: what stands before the numbers in the first two.
    A sample is whole if these two have the bytes of a row behind these heads, and the crc32 is right.
    """
    _link()
    rows = len(fds)
    assert density.flags.c_contiguous and species.flags.c_contiguous and len(density) == len(species) == len(spans) == rows
    one, other = (array.reshape(rows, -1).view(np.uint8) for array in (density, species))
    first, second = (np.frombuffer(bytearray(head), np.uint8) for head in heads)
    ends = spans[:, 5].cumsum()
    texts, whole = np.empty(ends[-1], np.uint8), np.zeros(rows, np.bool_)
    _read_rows(fds, spans, first, second, one, other, texts, ends, whole)
    starts, view = (ends - spans[:, 5]).tolist(), texts.data
    return [view[a:b] if right else None for a, b, right in zip(starts, ends.tolist(), whole.tolist())]


@njit(cache=True, nogil=True)
def _read_rows(fds, spans, first, second, density, species, texts, ends, whole):  # type: ignore[no-untyped-def]
    head, other = np.empty_like(first), np.empty_like(second)
    for row in range(len(fds)):
        at, size, at_species, size_species, at_text, size_text, expected = spans[row]
        if size != len(head) + density.shape[1] or size_species != len(other) + species.shape[1]:
            continue
        crc = _read(fds[row], at, head, 0)
        crc = _read(fds[row], at + len(head), density[row], crc)
        crc = _read(fds[row], at_species, other, crc)
        crc = _read(fds[row], at_species + len(other), species[row], crc)
        crc = _read(fds[row], at_text, texts[ends[row] - size_text : ends[row]], crc)
        whole[row] = 0 <= crc == expected and np.array_equal(head, first) and np.array_equal(other, second)


@njit(cache=True, nogil=True)
def _read(fd, at, into, crc):  # type: ignore[no-untyped-def]
    """Fill an array from a file and continue a checksum, which is -1 from the first byte on that can't be read."""
    done = 0
    while crc >= 0 and done < len(into):
        piece = into[done : done + PIECE]
        found = _pread(fd, piece.ctypes.data, len(piece), at + done)
        crc = np.int64(_crc32(crc, piece.ctypes.data, found)) if found > 0 else -1
        done += found
    return crc
