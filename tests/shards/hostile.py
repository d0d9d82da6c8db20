"""Files that somebody might feed to a voxelising job to stop it, hang it, fill its memory or write where it shouldn't.

Every one is written by code from a few lines; the large ones are small on the disk or made in memory.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MANY = 100_000
CODE = "__import__('os').system('touch /tmp/hostile-was-here')"

Reason = str
"""A regular expression for what is said of a file."""


def cif(cell: str = "4 4 4 90 90 90", sites: str = "Fe1 Fe 0 0 0 1\nO1 O 0.5 0.5 0.5 1", more: str = "") -> str:
    names = [f"_cell_length_{x}" for x in "abc"] + [f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")]
    parameters = "\n".join(f"{name} {value}" for name, value in zip(names, cell.split()))
    columns = ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy")
    head = "\n".join(f"_atom_site_{column}" for column in columns)
    return f"data_x\n{parameters}\n{more}\nloop_\n{head}\n{sites}\n"


GOOD = cif().encode()


def operations(*texts: str) -> str:
    return "\n".join(["loop_", "_symmetry_equiv_pos_as_xyz", *(f'"{text}"' for text in texts)])


def many_sites(count: int) -> str:
    return "\n".join(f"H{i} H 0.{i:06d} 0 0 1" for i in range(count))


def _full_cubic() -> list[str]:
    """192 operations: signs and permutations of the axes with face centring."""
    from itertools import permutations, product

    shifts = ["", "+1/2"]
    centres = [s for s in product(shifts, repeat=3) if s.count("+1/2") in (0, 2)]
    return [
        ",".join(sign + axis + shift for sign, axis, shift in zip(signs, axes, centre))
        for axes in permutations("xyz")
        for signs in product(["", "-"], repeat=3)
        for centre in centres
    ]


def cif_files() -> dict[str, tuple[str | bytes, Reason]]:
    two = cif().replace("data_x", "data_y")
    long = "x" + "+x" * 50_000
    return {
        "empty.cif": ("", "empty file"),
        "blank.cif": (" \n\t\n" * 1000, "empty file"),
        "nan_cell.cif": (cif("nan 4 4 90 90 90"), "_cell_length_a is 'nan', not a finite number"),
        "inf_coordinate.cif": (cif(sites="Fe1 Fe 1e999 0 0 1"), "_atom_site_fract_x is '1e999', not a finite"),
        "negative_cell.cif": (cif("-4 4 4 90 90 90"), r"no cell has the lengths \[-4"),
        "zero_cell.cif": (cif("4 0 4 90 90 90"), r"no cell has the lengths \[4.0, 0.0"),
        "huge_cell.cif": (cif("1e300 4 4 90 90 90"), r"cell edge of 1e\+300 A"),
        "impossible_angles.cif": (cif("4 4 4 10 10 170"), r"no cell has the parameters \[4.0, 4.0, 4.0, 10.0"),
        "flat_cell.cif": (cif("4 4 4 60 60 120"), r"no cell has the parameters \[4.0, 4.0, 4.0, 60.0"),
        "missing_cell.cif": (GOOD.decode().replace("_cell_length_b", "_other"), "_cell_length_b has 0 values"),
        "two_cells.cif": (cif(more="_cell_length_a 5"), "duplicate|2 values"),
        "no_atoms.cif": (cif(sites=""), "no atoms with fractional|empty loop|not a CIF"),
        "short_row.cif": (cif(sites="Fe1 Fe 0 0 0 1\nO1 O 0.5 0.5"), "not a CIF, .*(multiple|number of)"),
        "truncated_text.cif": (GOOD + b";\nthe rest of this is mis", "not a CIF, .*"),
        "truncated_quote.cif": (cif(more="_publ_author 'Nobody"), "not a CIF, .*"),
        "unknown_element.cif": (cif(sites="Xx1 Xx 0 0 0 1"), "unknown element 'Xx'"),
        "deuterium.cif": (cif(sites="D1 D 0 0 0 1"), "isotope of hydrogen"),
        "partial_occupancy.cif": (cif(sites="Fe1 Fe 0 0 0 0.5"), "disordered, a site has the occupancy 0.5"),
        "overfull_occupancy.cif": (cif(sites="Fe1 Fe 0 0 0 1.5"), "disordered, a site has the occupancy 1.5"),
        "nan_occupancy.cif": (cif(sites="Fe1 Fe 0 0 0 nan"), "occupancy is 'nan'"),
        "same_place.cif": (cif(sites="Fe1 Fe 0 0 0 1\nO1 O 0 0 0 1"), "overlapping atoms, 0.000 A"),
        "overlap.cif": (cif(sites="Fe1 Fe 0 0 0 1\nO1 O 0.05 0 0 1"), "overlapping atoms, 0.200 A"),
        "text_coordinate.cif": (cif(sites="Fe1 Fe here 0 0 1"), "fract_x is 'here'"),
        "far_coordinate.cif": (cif(sites="Fe1 Fe 123456 0 0 1"), "fractional coordinate 1.235e"),
        "other_formula.cif": (cif(more="_chemical_formula_sum 'Fe2 O3'"), "the file states Fe2 O3"),
        "nul.cif": (GOOD[:40] + b"\0" + GOOD[40:], "holds NUL bytes"),
        "utf16.cif": (GOOD.decode().encode("utf-16"), "byte 0 isn't UTF-8"),
        "latin1.cif": (b"# M\xfcller\n" + GOOD, "byte 3 isn't UTF-8"),
        "noise.cif": (np.random.default_rng(0).bytes(5000), "isn't UTF-8"),
        "same_block_twice.cif": (GOOD * 2, "not a CIF, .*duplicate"),
        "two_structures.cif": (cif() + two, "2 structures in one file"),
        "magnetic.cif": (cif(more="_space_group_magn.number_bns 1.1"), "magnetic or modulated"),
        "operation_is_code.cif": (cif(more=operations("x,y,z", CODE)), "symmetry not understood: .*no operation of a"),
        "operation_is_power.cif": (cif(more=operations("x,y,z", "9**9**9**9,y,z")), "symmetry not understood"),
        "operation_divides.cif": (cif(more=operations("x,y,z", "x+1/0,y,z")), "symmetry not understood"),
        "operation_is_long.cif": (cif(more=operations("x,y,z", f"{long},y,z")), "symmetry not understood"),
        "operations_singular.cif": (cif(more=operations("x,y,z", "x,x,z")), "no group"),
        "operations_300.cif": (cif(more=operations(*["x,y,z"] * 300)), "300 symmetry operations"),
        "symmetry_explodes.cif": (
            cif("30 30 30 90 90 90", "\n".join(f"H{i} H 0.{i:03d}1 0.{i + 7:03d}3 0.{i + 13:03d}7 1" for i in range(900)),
                operations(*_full_cubic())), r"at least \d+ atoms with symmetry, at most",
        ),
        "atoms_100000.cif": (cif(sites=many_sites(MANY)), "at least 100000 atoms"),
        "long_number.cif": (cif(sites=f"Fe1 Fe 0.{'1' * 10**6}x 0 0 1"), "not a finite number"),
        "long_label.cif": (cif(sites=f"{'a' * 10**6} ? 0 0 0 1"), "unknown element 'a{40}'"),
        "loops.cif": ("data_x\n" + "loop_ " * 10**5, "not a CIF"),
        "other_text.cif": ("Dear Sir or Madam,\n" * 50, "not a CIF"),
        "large.cif": (b"\n" * 20_000_001, "has over 20000000 bytes"),
    }  # fmt: skip


def gz_files() -> dict[str, tuple[str | bytes, Reason]]:
    packed = gzip.compress(GOOD, mtime=0)
    broken = bytearray(packed)
    broken[-8] ^= 1  # of the checksum
    return {
        "bomb.cif.gz": (gzip.compress(bytes(10**6), mtime=0) * 300, "decompresses to over 20000000 bytes"),
        "bomb.vasp.gz": (gzip.compress(b"\n" * 10**6, mtime=0) * 300, "decompresses to over 20000000 bytes"),
        "bomb.xyz.gz": (gzip.compress(b" " * 10**6, mtime=0) * 300, "over 20000000 bytes without the end of a frame"),
        "bad_frames.xyz.gz": (gzip.compress(b"0\n\n" * 10**5, mtime=0) * 300, "bad frames in a row"),
        "bomb.structure.json.gz": (gzip.compress(b"[" * 10**6, mtime=0) * 300, "decompresses to over 20000000 bytes"),
        "truncated.cif.gz": (packed[:-20], "Compressed file ended"),
        "checksum.cif.gz": (bytes(broken), "CRC check failed"),
        "plain.cif.gz": (GOOD, "Not a gzipped file"),
        "twice.cif.gz": (gzip.compress(packed, mtime=0), "byte 1 isn't UTF-8"),
        "empty.poscar.gz": (gzip.compress(b"", mtime=0), "empty, truncated or no POSCAR"),
    }


def poscar_files() -> dict[str, tuple[str | bytes, Reason]]:
    def poscar(
        scale: str = "1.0", a: str = "4 0 0", symbols: str = "Fe O", counts: str = "1 1", mode: str = "Direct",
        sites: str = "0 0 0\n0.5 0.5 0.5",
    ) -> str:  # fmt: skip
        return f"x\n{scale}\n{a}\n0 4 0\n0 0 4\n{symbols}\n{counts}\n{mode}\n{sites}\n"

    rows = "\n".join(f"0.{i:06d} 0 0" for i in range(MANY))
    return {
        "empty.poscar": ("", "empty, truncated or no POSCAR"),
        "POSCAR_nan_lattice": (poscar(a="nan 0 0"), "not finite"),
        "POSCAR_inf_coordinate": (poscar(sites="0 0 0\ninf 0 0"), "not finite"),
        "POSCAR_huge_lattice": (poscar(a="1e200 0 0"), "cell edge|volume"),
        "POSCAR_flat": (poscar(a="0 4 0"), "volume"),
        "POSCAR_zero_scale": (poscar(scale="0"), "scale '0'"),
        "POSCAR_nan_scale": (poscar(scale="nan"), "scale 'nan'"),
        "POSCAR_volume_of_1e300": (poscar(scale="-1e300"), "cell edge"),
        "POSCAR_unnamed": (poscar().replace("Fe O\n", ""), "VASP 4 file without elements"),
        "POSCAR_unknown": (poscar(symbols="Fe Qq"), "unknown element or isotope 'Qq'"),
        "POSCAR_deuterium": (poscar(symbols="Fe D"), "unknown element or isotope 'D'"),
        "POSCAR_counts": (poscar(counts="1 1 1"), "2 elements 'Fe O' with 3 numbers"),
        "POSCAR_negative": (poscar(counts="2 -1"), "no numbers of atoms"),
        "POSCAR_zero": (poscar(counts="0 0"), "no atoms$"),
        "POSCAR_huge_count": (poscar(counts="1 99999999999999999999"), "100000000000000000000 atoms, at most"),
        "POSCAR_digits": (poscar(counts="9" * 10**5), "4 elements 'Fe O 9{35}' with 3 numbers"),
        "POSCAR_100000": (poscar(counts=f"{MANY} 0", sites=rows), "100000 atoms, at most"),
        "POSCAR_truncated": (poscar(sites="0 0 0"), "truncated, 1 lines for 2 atoms"),
        "POSCAR_overlap": (poscar(sites="0 0 0\n0.01 0 0"), "overlapping atoms, 0.040 A"),
        "POSCAR_text": (poscar(sites="0 0 0\nhere it is"), "pymatgen can't take it"),
        "POSCAR_mode": (poscar(mode="0.0 0 0"), "'0.0 0 0' where Direct or Cartesian is needed"),
        "POSCAR_noise": (np.random.default_rng(1).bytes(5000), "isn't UTF-8"),
    }


def extxyz_files() -> dict[str, tuple[str | bytes, Reason]]:
    lattice, columns = 'Lattice="4 0 0 0 4 0 0 0 4"', "Properties=species:S:1:pos:R:3"

    def frame(comment: str = f"{lattice} {columns}", sites: str = "Fe 0 0 0", count: str = "1") -> str:
        return f"{count}\n{comment}\n{sites}\n"

    rows = "\n".join(f"H {i} 0 0" for i in range(MANY))
    return {
        "empty.extxyz": ("", "empty file"),
        "no_lattice.xyz": (frame(columns), "no Lattice"),
        "nan_lattice.xyz": (frame(f'Lattice="nan 0 0 0 4 0 0 0 4" {columns}'), "no cell, its vectors|not finite"),
        "short_lattice.xyz": (frame(f'Lattice="4 0 0" {columns}'), "ASE can't take it"),
        "slab.xyz": (frame(f'{lattice} {columns} pbc="T T F"'), "periodic in all three directions"),
        "zero.xyz": (frame(count="0", sites=""), "no atoms$"),
        "negative.xyz": (frame(count="-1"), "a number of atoms is needed where the file has '-1'"),
        "huge_count.xyz": (frame(count="9" * 18), "9{18} atoms, at most"),
        "digits.xyz": (frame(count="9" * 10**5), "a number of atoms is needed"),
        "atoms_100000.xyz": (frame(sites=rows, count=str(MANY)), "100000 atoms, at most"),
        "truncated.xyz": (frame(count="3"), "truncated, 1 of 3 atoms"),
        "unknown.xyz": (frame(sites="Qq 0 0 0"), "unknown element or isotope 'Qq'"),
        "deuterium.xyz": (frame(sites="D 0 0 0"), "unknown element or isotope 'D'"),
        "inf.xyz": (frame(sites="Fe inf 0 0"), "not finite"),
        "overlap.xyz": (frame(sites="Fe 0 0 0\nO 0 0 0.1", count="2"), "overlapping atoms, 0.100 A"),
        "columns.xyz": (frame(f"{lattice} Properties=species:S:1:pos:R:999999999"), "are needed, as species"),
        "wide_columns.xyz": (frame(f"{lattice} {columns}:force:R:99999999"), "don't fit the 4 columns"),
        "quotes.xyz": (frame(f'{lattice} x="' + '\\"' * 10**6, sites="Fe 0"), "ASE can't take it"),
        "equal_signs.xyz": (frame("a=" * 10**6, sites="Fe 0 0 0"), "no Lattice"),
        "noise.xyz": (b"\xff\xfe" * 5000, "a number of atoms is needed"),
    }


def structure_files() -> dict[str, tuple[str | bytes, Reason]]:
    def structure(**changes: object) -> str:
        row = {"id": "x", "lattice_A": [[4, 0, 0], [0, 4, 0], [0, 0, 4]], "frac": [[0, 0, 0]], "numbers": [26]}
        return json.dumps(row | changes)

    return {
        "deep.structure.json": ("[" * 10**6, "no structure as in shards: RecursionError"),
        "list.structure.json": ("[1, 2]", "no structure as in shards: TypeError"),
        "cut.structure.json": (structure()[:-5], "no structure as in shards: JSONDecodeError"),
        "few.structure.json": ("{}", "no structure as in shards: KeyError"),
        "nan.structure.json": (structure(frac=[[float("nan"), 0, 0]]), "not finite"),
        "ragged.structure.json": (structure(lattice_A=[[1], [2, 3]]), "no structure as in shards: ValueError"),
        "digits.structure.json": (structure(numbers=[10**4000]), "no structure as in shards: OverflowError"),
        "element.structure.json": (structure(numbers=[999]), "unknown atomic numbers"),
        "uneven.structure.json": (structure(numbers=[26, 8]), "1 positions for 2 atomic numbers"),
        "none.structure.json": (structure(numbers=[], frac=[]), "no atoms$"),
        "many.structure.json": (structure(numbers=[1] * MANY, frac=[[0, 0, 0]] * MANY), "100000 atoms, at most"),
        "long_id.structure.json": (structure(id="x" * 10**6), "an id of 1000000 characters"),
    }


# Archives

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str = "good.cif", data: bytes = GOOD, kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar(*members: Member, format: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """The block before a member, whose size is written as given."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _after_good(*blocks: bytes) -> bytes:
    """A good member, other blocks, another good member and the end."""
    good = tar(member())[: 512 + 512 * -(-len(GOOD) // 512)]
    last = tar(member("last.cif"))[: len(good)]
    return b"".join([good, *blocks, last, bytes(1024)])


def octal(size: int) -> bytes:
    return b"%011o" % size


def base256(size: int) -> bytes:
    return (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")


def tar_files() -> dict[str, tuple[bytes, Reason]]:
    whole = tar(member(), member("second.cif"))
    body = 512 * -(-len(GOOD) // 512)
    flipped, zeroed = bytearray(whole), bytearray(whole)
    flipped[512 + body] ^= 1
    zeroed[512 + body : 1024 + body] = bytes(512)
    attributes = b"1" * 60_000
    pax_sparse = b"22 GNU.sparse.major=1\n"
    negative = b"12 size=-99\n"
    return {
        "parent.tar": (tar(member(), member("../outside.cif")), "leads out of the archive"),
        "inner_parent.tar": (tar(member(), member("a/../../outside.cif")), "leads out of the archive"),
        "absolute.tar": (tar(member(), member("/tmp/hostile-outside.cif")), "leads out of the archive"),
        "drive.tar": (tar(member(), member("C:\\outside.cif")), "leads out of the archive"),
        "symlink.tar": (tar(member(), member("x.cif", b"", tarfile.SYMTYPE, "/etc/passwd")), "a link, device"),
        "hard_link.tar": (tar(member(), member("x.cif", b"", tarfile.LNKTYPE, "good.cif")), "a link, device"),
        "device.tar": (tar(member(), member("x.cif", b"", tarfile.CHRTYPE)), "a link, device"),
        "fifo.tar": (tar(member(), member("x.cif", b"", tarfile.FIFOTYPE)), "a link, device"),
        "sparse.tar": (_after_good(header("x.cif", octal(0), b"S")), "or sparse file"),
        "pax_sparse.tar": (
            _after_good(header("p", octal(22), b"x"), pax_sparse.ljust(512, b"\0"), header("x.cif", octal(0))),
            "or sparse file",
        ),
        "nested.tar": (tar(member(), member("inner.tar", tar(member()))), "an archive or table in an archive"),
        "long_name.tar": (_after_good(header("n", base256(10**10), b"L")), "a header of 10000000000 bytes"),
        "long_path.tar": (tar(member(), member("n/" * 5000 + "x.cif")), "its name has over 4096 bytes"),
        "huge_pax.tar": (_after_good(header("n", octal(10**9), b"x")), "a header of 1000000000 bytes"),
        "pax_digits.tar": (
            _after_good(header("n", octal(60_000), b"x"), attributes.ljust(60_416, b"\0"), header("x.cif", octal(0))),
            "damaged header, a number of b'1{20}'",
        ),
        "pax_chain.tar": (
            _after_good((header("n", octal(10), b"x") + b"10 a=bcde\n".ljust(512, b"\0")) * 3000, header("x.cif", octal(0))),
            "empty file",
        ),
        "pax_negative.tar": (
            _after_good(header("n", octal(12), b"x"), negative.ljust(512, b"\0"), header("x.cif", octal(0))),
            "damaged header, a number of b'-99'",
        ),
        "negative.tar": (_after_good(header("x.cif", base256(-1024))), "damaged header at byte 1024, a number"),
        "negative_link.tar": (_after_good(header("x.cif", base256(-1024), b"2")), "damaged header at byte 1024"),
        "enormous.tar": (_after_good(header("x.cif", base256(2**80))), "damaged header at byte 1024, a number"),
        "larger_than_it.tar": (_after_good(header("x.cif", octal(10**6))), "truncated, 2048 of 1000000 bytes"),
        "over_cap.tar": (_after_good(header("x.cif", octal(20_000_001))), "20000001 bytes, at most"),
        "cut_in_the_middle.tar": (whole[: 512 + body + 512 + 100], "truncated, 100 of"),
        "cut_at_a_member.tar": (whole[: 512 + body], "the end of the archive is missing"),
        "cut_in_a_header.tar": (whole[: 512 + body + 100], "the end of the archive is missing"),
        "flipped_header.tar": (bytes(flipped), "damaged header at byte 1024"),
        "zeroed_header.tar": (bytes(zeroed), "data behind its end, by a zeroed header"),
        "two_archives.tar": (whole + whole, "data behind its end"),
        "noise.tar": (np.random.default_rng(2).bytes(5000), "damaged header at byte 0"),
        "noise.tgz": (np.random.default_rng(3).bytes(5000), "Not a gzipped file"),
        "bomb.tar.gz": (
            gzip.compress(header("x.bin", octal(10**9)), mtime=0) + gzip.compress(bytes(10**6), mtime=0) * 1000,
            "a member ends at byte 1000000",
        ),
        "headers.tar.gz": (
            gzip.compress(header("x", octal(2**16), b"g") + bytes(2**16), mtime=0) * 1000,
            "of the decompressed archive, at most",
        ),
        "truncated.tar.gz": (gzip.compress(whole, mtime=0)[:-30], "Compressed file ended"),
        "truncated.tar.xz": (b"\xfd7zXZ\0", "Compressed file ended"),
        "noise.tar.bz2": (b"BZh9" + bytes(500), "Invalid data stream"),
    }


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _central(archive: bytes, number: int, offset: int, value: bytes, local: int | None = None) -> bytes:
    """The archive with other bytes in an entry of its directory and, where told, in the header of its member."""
    raw = bytearray(archive)
    for signature, place in ((b"PK\x01\x02", offset), (b"PK\x03\x04", local)):
        if place is not None:
            at = -1
            for _ in range(number + 1):
                at = raw.index(signature, at + 1)
            raw[at + place : at + place + len(value)] = value
    return bytes(raw)


def zip_files() -> dict[str, tuple[bytes, Reason]]:
    good = ("good.cif", GOOD)
    two = zip_of(good, ("x.cif", GOOD))
    link = zipfile.ZipInfo("x.cif")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    device = zipfile.ZipInfo("x.cif")
    device.create_system, device.external_attr = 3, 0o020666 << 16
    flipped = bytearray(two)
    flipped[two.rindex(b"PK\x03\x04") + 60] ^= 0xFF
    second = struct.pack("<I", two.rindex(b"PK\x03\x04"))
    return {
        "parent.zip": (zip_of(good, ("../outside.cif", GOOD)), "leads out of the archive"),
        "absolute.zip": (zip_of(good, ("/tmp/hostile-outside.cif", GOOD)), "leads out of the archive"),
        "backslash.zip": (zip_of(good, ("..\\outside.cif", GOOD)), "leads out of the archive"),
        "symlink.zip": (zip_of(good, (link, b"/etc/passwd")), "a link, device"),
        "device.zip": (zip_of(good, (device, b"")), "a link, device"),
        "nested.zip": (zip_of(good, ("inner.zip", zip_of(good))), "an archive or table in an archive"),
        "bomb.zip": (zip_of(good, ("x.cif", bytes(30_000_000))), "30000000 bytes, at most"),
        "lying_bomb.zip": (
            _central(zip_of(good, ("x.cif", bytes(30_000_000))), 1, 24, struct.pack("<I", 500), 22), "Bad CRC-32",
        ),
        "encrypted.zip": (_central(two, 1, 8, b"\x01\0", 6), "encrypted"),
        "method.zip": (_central(two, 1, 10, struct.pack("<H", 77), 8), "compression method is not supported"),
        "overlap.zip": (_central(two, 0, 42, second), "differ|Overlapped"),
        "flipped.zip": (bytes(flipped), "Error -3 while decompressing|Bad CRC-32"),
        "nowhere.zip": (_central(two, 1, 42, struct.pack("<I", 2**31)), "can't read x.cif|can't be read on"),
        "zip64.zip": (_central(two, 1, 24, b"\xff" * 4), "zip64|at most"),
        "cut.zip": (two[:-40], "File is not a zip file"),
        "noise.zip": (np.random.default_rng(4).bytes(5000), "File is not a zip file"),
        "empty.zip": (b"", "File is not a zip file"),
    }  # fmt: skip


# Tables


def table(rows: int = 3, **changes: object) -> pa.Table:
    columns: dict[str, object] = {
        "id": [f"row-{i}" for i in range(rows)],
        **{name: [4.0] * rows for name in "abc"},
        **{name: [90.0] * rows for name in ("alpha", "beta", "gamma")},
        "z": [[26]] * rows,
        "frac": [[0.0, 0.0, 0.0]] * rows,
    }
    return pa.table(columns | changes)


def parquet(content: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(content, stream, compression="none", use_dictionary=False)
    return stream.getvalue()


def parquet_files() -> dict[str, tuple[bytes, Reason]]:
    whole = parquet(table())
    footer, page = bytearray(whole), bytearray(parquet(table(500)))
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    footer[start : start + 40] = bytes(40)
    page[len(page) // 3 : len(page) // 2] = bytes(len(page) // 2 - len(page) // 3)
    nulls = {name: pa.nulls(10**6) for name in ("a", "b", "c", "alpha", "beta", "gamma", "z", "frac")}
    inf = float("inf")
    return {
        "footer.parquet": (bytes(footer), "no readable Parquet table"),
        "no_footer.parquet": (whole[:-200], "no readable Parquet table"),
        "huge_footer.parquet": (whole[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1", "no readable Parquet table"),
        "noise.parquet": (np.random.default_rng(5).bytes(5000), "no readable Parquet table"),
        "empty.parquet": (b"", "no readable Parquet table"),
        "columns.parquet": (parquet(table().drop_columns(["z", "frac"])), r"columns \['z', 'frac'\] are missing"),
        "page.parquet": (bytes(page), r"rows from \d+ on can't be read"),
        "text.parquet": (parquet(table(a=["four"] * 3)), "a value of another type than needed"),
        "objects.parquet": (parquet(table(z=[{"z": 26}] * 3)), "whole numbers"),
        "fractions.parquet": (parquet(table(z=[[26.5]] * 3)), "whole numbers"),
        "nan.parquet": (parquet(table(b=[4.0, float("nan"), 4.0])), "no cell has the lengths"),
        "inf.parquet": (parquet(table(frac=[[0.0] * 3, [0.0, inf, 0.0], [0.0] * 3])), ".*not finite"),
        "null.parquet": (parquet(table(c=[4.0, None, 4.0])), "no cell has the lengths"),
        "uneven.parquet": (parquet(table(frac=[[0.0] * 3, [0.0] * 4, [0.0] * 3])), r"z of shape \(1,\)"),
        "atoms.parquet": (parquet(table(1, z=[[1] * MANY], frac=[[0.0] * 3 * MANY])), "100000 atoms, at most"),
        "rows.parquet": (parquet(pa.table({"id": pa.nulls(10**6)} | nulls)), "no table has 1000000 rows in"),
    }


# Files that are none


def special_files(folder: Path) -> Iterator[tuple[str, Reason]]:
    """Make them, and say what each is refused for."""
    for name, target in (("nothing", "is/not/there"), ("self", "self.cif"), ("zero", "/dev/zero"), ("tty", "/dev/tty")):
        (folder / f"{name}.cif").symlink_to(target)
        yield f"{name}.cif", "isn't a file|can't read"
    (folder / "folder.cif").symlink_to("..")
    yield "folder.cif", "a link to a folder isn't followed"
    os.mkfifo(folder / "fifo.cif")
    yield "fifo.cif", "isn't a file"
    os.mkfifo(folder / "fifo.tar")
    yield "fifo.tar", "isn't a file"
    os.mkfifo(folder / "fifo.parquet")
    yield "fifo.parquet", "no file"
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        try:
            os.chdir(folder)  # the path of a socket has 107 bytes at most
            server.bind("socket.cif")
        finally:
            os.chdir(here)
    yield "socket.cif", "isn't a file"
    (folder / "zero.zip").symlink_to("/dev/zero")
    yield "zero.zip", "isn't a file"
    long = "n" * 251 + ".cif"
    (folder / long).write_text(cif(sites="Qq1 Qq 0 0 0 1"))
    yield long, "unknown element 'Qq'"


KINDS: dict[str, Callable[[], dict[str, tuple[str | bytes, Reason]]]] = {
    "cif": cif_files,
    "gz": gz_files,
    "poscar": poscar_files,
    "extxyz": extxyz_files,
    "structure": structure_files,
    "tar": tar_files,  # type: ignore[dict-item]
    "zip": zip_files,  # type: ignore[dict-item]
    "table": parquet_files,  # type: ignore[dict-item]
}

ODD_NAMES = ("line\nbreak.cif", 'tab\tand "quotes", and \'.cif', os.fsdecode(b"not-utf8-\xff\xfe.cif"), "-rf $(x).cif")
"""Of good files; they are accepted under these names."""


def write_corpus(folder: Path) -> dict[str, Reason]:
    """Write every hostile file below a folder, good ones between them: path of each in it, and what its reason matches.

    The good ones are called 'good' somewhere in their paths, or have one of the ODD_NAMES.
    """
    reasons: dict[str, Reason] = {}
    for kind, files in KINDS.items():
        (folder / kind).mkdir(parents=True)
        for name, (content, reason) in files().items():
            (folder / kind / name).write_bytes(content.encode() if isinstance(content, str) else content)
            reasons[f"{kind}/{name}"] = reason
    (folder / "special").mkdir()
    reasons |= {f"special/{name}": reason for name, reason in special_files(folder / "special")}
    (folder / "cif" / "good-empty-loop.cif").write_text(cif(more="loop_\n_geom_bond_distance\n"))
    for name in ("0-good.cif", "cif/m-good.cif", "extxyz/0-good.cif", "special/good.cif", "zz-good.cif"):
        (folder / name).write_bytes(GOOD)
    (folder / "odd").mkdir()
    for name in ODD_NAMES:
        (folder / "odd" / name).write_bytes(GOOD)
    return reasons
