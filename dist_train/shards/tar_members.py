"""Members of a tar archive, in the POSIX and GNU formats, found without trusting a byte of it.

tarfile may search one hostile header for hours (CVE-2024-6232), loop (CVE-2025-8194), run out of stack in a chain of
headers, and take a damaged header for the end of the archive. Here each header is read once, forward, and everything
that isn't as it must be ends the reading with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from tarfile import BLOCKSIZE
from typing import BinaryIO

MAX_HEADER_BYTES = 2**16
"""Of a long name or a list of attributes; paths have 4096 at most."""
_FILE, _FOLDER = b"0\0007", b"5"
_LINKS_AND_DEVICES = b"123456"  # their sizes are no data
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"xX", b"g", b"S"


class TarError(ValueError):
    """An archive that can't be read on."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member lies in the decompressed archive, in bytes; kind is 'file', 'folder' or 'other'."""

    name: str
    offset: int
    size: int
    kind: str


def list_members(stream: BinaryIO, limit: int) -> Iterator[Member]:
    """The members in their order, read forward only. Raises TarError where the archive is damaged, over `limit` bytes
    long or lacks its end."""
    at = 0
    stated: dict[str, bytes] = {}  # of the next member, by the headers before it
    while header := _header(stream, at):
        at += BLOCKSIZE
        kind, size = header[156:157], _number(header[124:136], at)
        if kind in _PAX + _PAX_GLOBAL + _LONG_NAME + _LONG_LINK:
            if size > MAX_HEADER_BYTES:
                raise TarError(f"a header of {size} bytes, at most {MAX_HEADER_BYTES} are read")
            body = _read(stream, size)
            if kind in _PAX:
                stated |= _attributes(body)
            elif kind == _LONG_NAME:
                stated["path"] = body.partition(b"\0")[0]
            at += _padded(size)
        else:
            size = _decimal(stated.get("size", b"%d" % size))
            sparse = kind == _SPARSE or any(key.startswith("GNU.sparse") for key in stated)
            name = stated.get("path") or _name(header)
            at += _sparse_headers(stream, header) if kind == _SPARSE else 0
            what = "folder" if kind == _FOLDER else "file" if kind in _FILE and not sparse else "other"
            if what == "file" and name.endswith(b"/"):
                what = "folder"  # before POSIX
            yield Member(name.decode(errors="surrogateescape"), at, size, what)
            at += 0 if kind in _LINKS_AND_DEVICES else _padded(size)
            stated = {}
        if at > limit:
            raise TarError(f"a member ends at byte {at} of the decompressed archive, at most {limit} are read")
    _check_end(stream, limit)


def _header(stream: BinaryIO, at: int) -> bytes:
    """The header at this byte, or b'' at the end."""
    stream.seek(at)
    header = stream.read(BLOCKSIZE)
    if len(header) < BLOCKSIZE:
        raise TarError("truncated, the end of the archive is missing")
    if header.count(0) == BLOCKSIZE:
        return b""
    plain = header[:148] + b" " * 8 + header[156:]
    wrong = sum(plain) - _number(header[148:156], at + BLOCKSIZE)
    if wrong and wrong != 256 * sum(byte > 127 for byte in plain):  # some old programs add signed bytes
        raise TarError(f"damaged header at byte {at}")
    return header


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise TarError("truncated in a header")
    return data


def _number(field: bytes, end: int) -> int:
    """A size, octal or in GNU's base 256."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        digits = field.partition(b"\0")[0].strip()
        value = int(digits or b"0", 8) if all(digit in b"01234567" for digit in digits) else -1
    if not 0 <= value < 2**62:
        raise TarError(f"damaged header at byte {end - BLOCKSIZE}, a number of {field!r}")
    return value


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise TarError(f"damaged header, a number of {text[:20]!r}")
    return int(text)


def _attributes(body: bytes) -> dict[str, bytes]:
    """The 'LENGTH KEY=VALUE' lines of a POSIX header."""
    found = {}
    at = 0
    while at < len(body):
        length = body[at : at + 20].partition(b" ")[0]
        end = at + _decimal(length)
        key, equals, value = body[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or body[end - 1 : end] != b"\n":
            raise TarError("damaged header, attributes that don't end where they should")
        found[key.decode(errors="replace")] = value
        at = end
    return found


def _name(header: bytes) -> bytes:
    name, prefix = (header[a:b].partition(b"\0")[0] for a, b in ((0, 100), (345, 500)))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _sparse_headers(stream: BinaryIO, header: bytes) -> int:
    """Bytes of the headers that follow one of a GNU sparse file."""
    more, count = header[482], 0
    while more:
        more = _read(stream, BLOCKSIZE)[504]
        count += BLOCKSIZE
    return count


def _check_end(stream: BinaryIO, limit: int) -> None:
    """Refuse bytes behind the end: of members that a zeroed header hides, or of another archive."""
    while stream.tell() <= limit and (data := stream.read(2**20)):
        if data.count(0) < len(data):
            raise TarError("data behind its end, by a zeroed header or of another archive, which isn't read")


def _padded(size: int) -> int:
    return -(-size // BLOCKSIZE) * BLOCKSIZE
