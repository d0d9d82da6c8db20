"""Raw samples straight into arrays: the bytes of the file and no others, whole or told to be not; by threads at once."""

from __future__ import annotations

import _ctypes
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_shards import CRYSTALS, PER_SHARD, real_crystals, rewritten_member, write_shards

from dist_train.errors import ShardError
from dist_train.shards import raw
from dist_train.shards import reader as reading
from dist_train.shards.codec import npy_header
from dist_train.shards.index import Index
from dist_train.shards.raw import PIECE, read_rows
from dist_train.shards.reader import ShardReader

SHAPES = (3, 2, PIECE // 2 + 5, 2, 2), (3, PIECE // 4, 3, 3)
"""Of three samples: 4 pieces and 40 bytes of densities, 2.25 pieces of species."""
HEADS = npy_header(SHAPES[0][1:], np.dtype(np.float16)), npy_header(SHAPES[1][1:], np.dtype(np.uint8))


class File:
    """Three samples in a file, with noise between their members, some of them next to each other."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        self.density = rng.integers(0, 2**15, SHAPES[0], np.uint16).view(np.float16)
        self.species = rng.integers(0, 255, SHAPES[1], np.uint8)
        self.texts = [b"{}", b"", rng.bytes(5000)]
        content, spans = b"", []
        for gap, density, species, text in zip((512, 0, 77), self.density, self.species, self.texts, strict=True):
            members = (HEADS[0] + density.tobytes(), HEADS[1] + species.tobytes(), text)
            row = []
            for member in members:
                content += rng.bytes(gap)
                row += [len(content), len(member)]
                content += member
            spans.append([*row, zlib.crc32(b"".join(members))])
        path.write_bytes(content)
        self.spans, self.fd = np.array(spans), os.open(path, os.O_RDWR)

    def read(self, fd: int | None = None, heads: tuple[bytes, bytes] = HEADS) -> tuple[list[bytes | None], list[bool]]:
        """The texts, and which rows hold the densities and species of the file."""
        density, species = np.zeros(SHAPES[0], np.float16), np.zeros(SHAPES[1], np.uint8)
        found = read_rows(np.full(3, self.fd if fd is None else fd, np.int32), self.spans, heads, density, species)
        pairs = ((density, self.density), (species, self.species))
        equal = [all(one[row].tobytes() == other[row].tobytes() for one, other in pairs) for row in range(3)]
        return [None if text is None else bytes(text) for text in found], equal


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    made = File(tmp_path / "samples")
    yield made
    os.close(made.fd)


def test_the_bytes_are_those_of_the_file(file: File) -> None:
    assert file.read() == (file.texts, [True] * 3)


def test_threads_that_read_at_once_read_the_same(file: File) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: file.read(), range(40)))
    assert found == [(file.texts, [True] * 3)] * 40


def test_a_wrong_byte_anywhere_in_a_sample_is_found_and_none_besides_it_counts(file: File) -> None:
    """At both ends of headers, numbers, texts and pieces."""
    for row, texts in ((0, [None, *file.texts[1:]]), (2, [*file.texts[:2], None])):
        for member in range(3):
            start, size = file.spans[row, 2 * member : 2 * member + 2].tolist()
            ends = {0, 60, 127, 128, 128 + PIECE - 1, 128 + PIECE, size // 2, size - 1}
            for at in (start + end for end in ends if end < size):
                before = os.pread(file.fd, 1, at)
                os.pwrite(file.fd, bytes([before[0] ^ 1]), at)
                assert file.read()[0] == texts, (row, member, at - start)
                os.pwrite(file.fd, before, at)
    for at in (0, *(file.spans[2, [0, 2, 4]] - 2).tolist()):
        os.pwrite(file.fd, b"\0\0", at)
    assert file.read() == (file.texts, [True] * 3)


def test_what_is_behind_the_end_of_a_file_is_not_whole(file: File) -> None:
    start, size = file.spans[2, 2:4].tolist()
    for end in (size - 1, PIECE + 200, 50, 0):
        os.truncate(file.fd, start + end)
        assert file.read()[0] == [*file.texts[:2], None]
    os.truncate(file.fd, 0)
    assert file.read() == ([None] * 3, [False] * 3)


@pytest.mark.parametrize("mode", [os.O_WRONLY, None])
def test_a_file_that_cannot_be_read_is_not_whole(file: File, tmp_path: Path, mode: int | None) -> None:
    """Whatever the reason."""
    file.spans[:, 6] = -1, 0, 2**32 - 1  # no checksum stands for what can't be read
    fd = -1 if mode is None else os.open(tmp_path / "samples", mode)
    assert file.read(fd) == ([None] * 3, [False] * 3)
    if mode is not None:
        os.close(fd)


def test_another_header_is_not_whole_though_its_checksum_is_right(file: File) -> None:
    for number, wanted in enumerate((b"<f2", b"|u1")):
        heads = [*HEADS]
        heads[number] = heads[number].replace(wanted, b"<i2")
        assert heads[number] != HEADS[number]
        assert file.read(heads=(heads[0], heads[1]))[0] == [None] * 3


@pytest.mark.parametrize("column", [1, 3])
def test_a_sample_of_another_size_is_not_read(file: File, column: int) -> None:
    file.spans[1, column] += 1
    assert file.read() == ([file.texts[0], None, file.texts[2]], [True, False, True])


def test_an_isal_without_the_function_is_told(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw.isal_zlib, "__file__", _ctypes.__file__)
    raw._link.cache_clear()
    with pytest.raises(ShardError, match="lacks crc32_gzip_refl of ISA-L: install the package isal"):
        file.read()


# Of shards


def arrays(reader: ShardReader, count: int) -> tuple[np.ndarray, np.ndarray]:
    record = reader[0]
    return np.zeros((count, *record.density_CDHW.shape), np.float16), np.zeros((count, *record.species_DHW.shape), np.uint8)


def test_samples_of_several_shards_are_read_into_their_rows(index: Index) -> None:
    reader = ShardReader(index, "train")
    places = np.array([20, 3, 3, 9, 0, CRYSTALS - 1])
    density, species = arrays(reader, len(places))
    texts = reader.read_raw(places, density, species)
    for row, place in enumerate(places.tolist()):
        np.testing.assert_array_equal(density[row], reader[place].density_CDHW)
        np.testing.assert_array_equal(species[row], reader[place].species_DHW)
        text = texts[row]
        assert text is not None
        assert bytes(text) == reader._members(*reader.entries[place])["structure.json"]


def test_what_the_index_says_wrongly_is_not_read(index: Index) -> None:
    """Nor does it end the process: numbers of an index may be anybody's."""
    shard, *others = index.shards
    sample = shard.samples[2]
    end = shard.bytes
    density, species, text = sample.members.values()
    for changes in (
        {"members": {name: (2**70, 5) for name in sample.members}},
        {"members": {**sample.members, "structure.json": (text[0], end)}},
        {"members": {**sample.members, "structure.json": (2**63 - 1, 2**63 - 1)}},
        {"members": {**sample.members, "structure.json": (text[0], 2**60)}},
        {"members": {**sample.members, "density.npy": (end - density[1] + 1, density[1])}},
        {"members": {**sample.members, "density.npy": species, "species.npy": density}},
        {"members": {"species.npy": species, "density.npy": density, "structure.json": text}},
        {"members": {"structure.json": text}},
        {"members": {"density": density, "species": species, "structure": text}},
        {"crc32": 2**80},
        {"crc32": sample.crc32 + 2**32},
        {"crc32": -(2**80)},
    ):
        samples = (*shard.samples[:2], replace(sample, **changes), *shard.samples[3:])  # type: ignore[arg-type]
        reader = ShardReader(replace(index, shards=(replace(shard, samples=samples), *others)), "train")
        into = arrays(reader, 3)
        texts = reader.read_raw(np.array([1, 2, 3]), *into)
        assert [text is None for text in texts] == [False, True, False], changes
        np.testing.assert_array_equal(into[0][2], reader[3].density_CDHW)


def test_a_shard_of_impossible_size_concerns_no_other(index: Index) -> None:
    shard, *others = index.shards
    members = {name: (2**70, 5) for name in shard.samples[0].members}
    samples = (replace(shard.samples[0], members=members), *shard.samples[1:])
    reader = ShardReader(replace(index, shards=(replace(shard, bytes=2**80, samples=samples), *others)), "train")
    into = arrays(ShardReader(index, "train"), 1)
    assert reader.read_raw(np.array([PER_SHARD]), *into) != [None]
    with pytest.raises(ShardError, match=rf"{shard.name} has \d+ bytes, {2**80} expected"):
        reader.read_raw(np.array([1]), *into)


def test_samples_of_another_shape_or_encoding_are_not_read(index: Index, tmp_path: Path) -> None:
    reader = ShardReader(index, "train")
    density, species = arrays(reader, 1)
    turned = density.reshape(1, -1, 32, 16, 8)
    for one, other in ((density[:, :1], species), (density, species[:, :8]), (turned, species)):
        assert reader.read_raw(np.array([0]), one.copy(), other.copy()) == [None]
    compact = ShardReader(write_shards(tmp_path, real_crystals(4), encoding="compact"), "train")
    assert compact.read_raw(np.array([0, 1]), *arrays(reader, 2)) == [None, None]


def test_a_structure_that_grew_into_what_follows_is_read_as_the_index_says(own_index: Index) -> None:
    index = rewritten_member(own_index, PER_SHARD, "structure.json", b"[]")
    reader = ShardReader(index, "train")
    (text,) = reader.read_raw(np.array([PER_SHARD]), *arrays(reader, 1))
    assert text is not None
    assert bytes(text) == b"[]"


def test_files_stay_open_while_threads_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the reader keeps fewer, and closes them."""
    monkeypatch.setattr(reading, "OPEN_FILES", 2)
    reader = ShardReader(write_shards(tmp_path, real_crystals(CRYSTALS), per_shard=1), "train")
    expected = np.stack([reader[place].density_CDHW for place in range(CRYSTALS)])

    def read(seed: int) -> bool:
        places = np.random.default_rng(seed).permutation(CRYSTALS)
        density, species = arrays(reader, CRYSTALS)
        texts = reader.read_raw(places, density, species)
        return None not in texts and np.array_equal(density, expected[places])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(100)))
    reader._file.cache_clear()
    assert not [name for name in os.listdir("/proc/self/fd") if linked_below(name, tmp_path)]


def linked_below(descriptor: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder))
    except OSError:
        return False
