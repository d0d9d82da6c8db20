"""Input files, plain or gzipped, wherever they lie, of which no more than a cap is ever held."""

from __future__ import annotations

import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_train.errors import CrystalError

MAX_FILE_BYTES = 20_000_000
"""Most that is read for one crystal, as stored and after decompression; the largest of 2,455 real CIFs has 135 kB."""

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)
"""What damaged files and archives raise."""


@dataclass(frozen=True)
class Source:
    """A file that isn't on a disk: in an archive or an object store. Its name tells its format."""

    name: str
    open: Callable[[], BinaryIO]

    def __str__(self) -> str:
        return self.name


@contextmanager
def open_input(source: Path | Source, id: str) -> Iterator[BinaryIO]:
    """The file as a stream of bytes, decompressed where its name ends in `.gz`.

    Raises CrystalError for what isn't a file or can't be read, also while it is being read.
    """
    try:
        with ExitStack() as stack:
            if isinstance(source, Path):
                if not source.is_file():
                    raise CrystalError(f"{id}: {source} isn't a file")
                file: BinaryIO = stack.enter_context(source.open("rb"))
            else:
                file = stack.enter_context(source.open())
            if source.name.lower().endswith(".gz"):
                file = stack.enter_context(gzip.open(file))  # type: ignore[assignment]
            yield file
    except UNREADABLE as error:
        raise CrystalError(f"{id}: can't read {source}: {error}") from error


def read_text(source: Path | Source, id: str) -> str:
    """The file's text; at most one byte over the cap is ever held, so that no gzip bomb goes off.

    Raises CrystalError for a file that can't be read, is too large or isn't UTF-8.
    """
    with open_input(source, id) as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        packed = source.name.lower().endswith(".gz")
        raise CrystalError(f"{id}: {'decompresses to' if packed else 'has'} over {MAX_FILE_BYTES} bytes, no more are read")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CrystalError(f"{id}: not text, byte {error.start} isn't UTF-8") from error
