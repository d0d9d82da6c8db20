"""Input files, plain or gzipped, of which no more than a cap is ever held."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

from dist_train.errors import CrystalError

MAX_FILE_BYTES = 20_000_000
"""Most that is read for one crystal, as stored and after decompression; the largest of 2,455 real CIFs has 135 kB."""


@contextmanager
def open_input(path: Path, id: str) -> Iterator[BufferedIOBase]:
    """The file as a stream of bytes, decompressed where its name ends in `.gz`.

    Raises CrystalError for what isn't a file or can't be read, also while it is being read.
    """
    try:
        if not path.is_file():
            raise CrystalError(f"{id}: {path} isn't a file")
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise CrystalError(f"{id}: can't read {path}: {error}") from error


def read_text(path: Path, id: str) -> str:
    """The file's text; at most one byte over the cap is ever held, so that no gzip bomb goes off.

    Raises CrystalError for a file that can't be read, is too large or isn't UTF-8.
    """
    with open_input(path, id) as file:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise CrystalError(f"{id}: file of {size} bytes, at most {MAX_FILE_BYTES} are read")
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise CrystalError(f"{id}: decompresses to over {MAX_FILE_BYTES} bytes, no more are read")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CrystalError(f"{id}: not text, byte {error.start} isn't UTF-8") from error
