"""Planning of a voxelising job: which rows are doubled or duplicates, which split each gets, and that none is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_shards import real_crystals

from dist_train.config import DataConfig
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError
from dist_train.shards.plan import (
    ShardTask,
    alike,
    distinct,
    find_duplicates,
    plan_shards,
    read_split_ids,
    split_of,
    split_rows,
    unit_hash,
    without,
)
from dist_train.shards.scan import Rejected, Row, ScanResult, part_path

SPLITS = {"train": 0.9, "val": 0.04, "test": 0.06}
EVEN = {"train": 0.5, "val": 0.3, "test": 0.2}

formulas = st.text("ABCOa123 ", min_size=1, max_size=12)


def row(id: str, formula: str = "Fe1", split: str | None = None, atoms: int = 1, volume: float = 10.0) -> Row:
    return Row(id, "in", f"{id}.cif", formula, atoms, volume, (16, 16, 16), split, 0, 0, 0)


@st.composite
def rows_of(draw: st.DrawFn) -> list[Row]:
    """Rows of different ids, in any order, of few formulas."""
    numbers = draw(st.lists(st.integers(0, 200), unique=True, max_size=40))
    return [row(f"id{i}", f"f{i % 7}") for i in numbers]


# Doubled ids


@given(st.lists(st.lists(st.integers(0, 40), max_size=15), min_size=1, max_size=5))
def test_every_row_is_kept_once_or_rejected_as_doubled(numbers: list[list[int]]) -> None:
    bad = Rejected("bad", "in", "bad.cif", "parse", "bad: no atoms")
    results = [ScanResult(tuple(row(f"id{i}") for i in some), (bad,)) for some in numbers]
    rows, rejected = distinct(iter(results))
    ids = [f"id{i}" for some in numbers for i in some]
    assert [r.id for r in rows] == list(dict.fromkeys(ids))
    doubled = [r for r in rejected if r is not bad]
    assert Counter(r.id for r in rows) + Counter(r.id for r in doubled) == Counter(ids)
    assert len(rejected) - len(doubled) == len(numbers)
    assert all(r.stage == "plan" for r in doubled)


def test_a_doubled_id_keeps_the_first_and_tells_where_it_is() -> None:
    first = replace(row("x"), input="one", file="a/x.cif")
    again = replace(row("x"), input="two", file="b/x.cif")
    rows, (rejected,) = distinct([ScanResult((first,), ()), ScanResult((again,), ())])
    assert rows == [first]
    reason = "x: this id is already taken by a/x.cif of one"
    assert rejected == Rejected("x", "two", "b/x.cif", "plan", reason)


# Duplicates


def written(crystals: Sequence[Crystal], work: Path) -> list[Row]:
    """The rows of crystals in a part file."""
    rows, at = [], 0
    with part_path(work, 0).open("wb") as stream:
        for crystal in crystals:
            line = f"{crystal.to_json()}\n".encode()
            stream.write(line)
            told = (crystal.formula, len(crystal), crystal.volume_A3, (16, 16, 16), None)
            rows.append(Row(crystal.id, "in", f"{crystal.id}.cif", *told, 0, at, len(line)))
            at += len(line)
    return rows


def duplicates(work: Path, *crystals: Crystal, tolerance_A: float = 0.01) -> dict[str, str]:
    """Duplicates among crystals named by their places, 'a', 'b' and so on."""
    named = [replace(crystal, id=chr(ord("a") + i)) for i, crystal in enumerate(crystals)]
    return dict(find_duplicates(alike(written(named, work)), work, tolerance_A))


def rewritten(crystal: Crystal, seed: int, noise_A: float = 0.0) -> Crystal:
    """The crystal in another orientation, cell, origin and order of its atoms, each moved by about `noise_A`."""
    rng = np.random.default_rng(seed)
    change = np.eye(3, dtype=int)
    for _ in range(3):  # shears and exchanges of axes keep the volume
        a, b = rng.choice(3, 2, replace=False)
        change[a] += rng.integers(-1, 2) * change[b]
        change = change[rng.permutation(3)]
    if np.linalg.det(change) < 0:
        change = -change
    turn, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    turn = turn * np.sign(np.diag(upper))
    turn *= np.sign(np.linalg.det(turn))
    cart = crystal.cart_N3 + rng.normal(scale=noise_A / np.sqrt(3), size=crystal.frac_N3.shape)
    lattice = change @ crystal.lattice_A
    frac = cart @ np.linalg.inv(lattice) + rng.uniform(-2, 2, 3)
    order = rng.permutation(len(crystal))
    return replace(crystal, lattice_A=lattice @ turn, frac_N3=frac[order], numbers_N=crystal.numbers_N[order])


REAL = [*real_crystals(2), *real_crystals(6, table="materials_project")[::2]]


@pytest.mark.parametrize("crystal", REAL, ids=lambda crystal: crystal.id)
def test_the_same_crystal_written_otherwise_is_found(crystal: Crystal, tmp_path: Path) -> None:
    others = [rewritten(crystal, seed) for seed in range(2)] + [rewritten(crystal, 2, noise_A=0.002)]
    assert duplicates(tmp_path, crystal, *others) == {"b": "a", "c": "a", "d": "a"}


@pytest.mark.parametrize("crystal", REAL[:2], ids=lambda crystal: crystal.id)
def test_other_crystals_are_not_duplicates(crystal: Crystal, tmp_path: Path) -> None:
    moved = crystal.frac_N3.copy()
    moved[0] += [0.1, 0, 0]
    swapped = crystal.numbers_N.copy()
    swapped[[0, -1]] = swapped[[-1, 0]]
    others = [
        replace(crystal, frac_N3=moved),
        replace(crystal, lattice_A=crystal.lattice_A * 1.02),
        replace(crystal, lattice_A=crystal.lattice_A * np.array([[1.01], [1 / 1.01], [1]])),
        replace(crystal, numbers_N=crystal.numbers_N + 1),
        replace(crystal, numbers_N=swapped),
    ]
    assert duplicates(tmp_path, crystal, *others) == {}


def test_the_tolerance_decides(tmp_path: Path) -> None:
    noisy = rewritten(REAL[0], 0, noise_A=0.05)
    assert duplicates(tmp_path, REAL[0], noisy, tolerance_A=0.01) == {}
    assert duplicates(tmp_path, REAL[0], noisy, tolerance_A=0.2) == {"b": "a"}


def test_polymorphs_are_not_duplicates_and_mirror_images_are(tmp_path: Path) -> None:
    """Rock salt and zinc blende of one cell; a crystal without any mirror and its image."""
    cubic = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]) * 4.5
    salt = Crystal("x", cubic, [[0, 0, 0], [0.5, 0.5, 0.5]], [30, 16])  # type: ignore[arg-type]
    blende = replace(salt, frac_N3=np.array([[0, 0, 0], [0.25, 0.25, 0.25]]))
    rng = np.random.default_rng(0)
    chiral = Crystal("x", np.diag([4.0, 5.0, 6.0]), rng.random((5, 3)), np.array([8, 8, 26, 26, 3]))
    image = replace(chiral, frac_N3=-chiral.frac_N3)
    assert duplicates(tmp_path, salt, blende, chiral, image) == {"d": "c"}


def test_the_first_is_kept_and_the_others_name_it(tmp_path: Path) -> None:
    crystals = [replace(rewritten(REAL[0], i), id=id) for i, id in enumerate(("z", "a", "m"))]
    rows = written([crystals[0], replace(REAL[1], id="other"), *crystals[1:]], tmp_path)
    kept, rejected = without(rows, dict(find_duplicates(alike(rows), tmp_path, 0.01)))
    assert [r.id for r in kept] == ["z", "other"]
    assert [(r.id, r.file, r.stage) for r in rejected] == [("a", "a.cif", "plan"), ("m", "m.cif", "plan")]
    assert all(r.reason == f"{r.id}: duplicate of z, the same reduced cell and atoms" for r in rejected)


@given(st.lists(st.tuples(st.sampled_from("AB"), st.integers(1, 2), st.floats(1, 3)), max_size=30))
def test_groups_hold_all_that_may_be_duplicates(told: list[tuple[str, int, float]]) -> None:
    """Any two of one composition whose volumes differ by under 1 % are in one group, in the order of the rows."""
    rows = [row(f"id{i}", formula, None, atoms, volume) for i, (formula, atoms, volume) in enumerate(told)]
    groups = alike(rows)
    place = {member.id: number for number, group in enumerate(groups) for member in group}
    assert len(place) == sum(map(len, groups))
    for i, one in enumerate(rows):
        for other in rows[:i]:
            if (one.formula, one.atoms) != (other.formula, other.atoms):
                assert place.get(one.id, -1) != place.get(other.id, -2)
            elif abs(one.volume_A3 - other.volume_A3) < 0.0099 * min(one.volume_A3, other.volume_A3):
                assert place[one.id] == place[other.id]
    for group in groups:
        assert len(group) > 1
        assert list(group) == sorted(group, key=rows.index)


# Splits


@given(formulas)
def test_the_hash_of_a_formula_is_a_fraction_that_never_changes(formula: str) -> None:
    assert 0 <= unit_hash("split", formula) < 1
    assert unit_hash("split", formula) == unit_hash("split", formula)


def test_the_hash_is_the_one_that_shards_were_written_with() -> None:
    """A changed hash would move crystals between the splits of old and new shards."""
    assert unit_hash("split", "Ga1 Te1") == pytest.approx(0.111828, abs=1e-6)
    assert unit_hash("ab", "c") != unit_hash("a", "bc")
    assert unit_hash("order", "\udcff") != unit_hash("order", "x")  # a name that isn't UTF-8


@given(formulas, st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_a_formula_keeps_its_split_when_the_first_share_grows(formula: str, weights: list[int]) -> None:
    splits = {f"s{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    split = split_of(formula, splits)
    assert split in splits
    grown = {**splits, "s0": splits["s0"] + splits["s1"], "s1": 0.0}
    assert split_of(formula, grown) == {"s1": "s0"}.get(split, split)


def test_shares_of_many_formulas() -> None:
    counts = Counter(split_of(f"A{a} B{b}", SPLITS) for a in range(100) for b in range(100))
    assert {split: count / 10_000 for split, count in counts.items()} == pytest.approx(SPLITS, abs=0.01)


@given(rows_of())
def test_polymorphs_share_a_split_and_all_rows_have_one(rows: list[Row]) -> None:
    splits, rejected = split_rows(rows, DataConfig(splits=EVEN))
    assert not rejected
    assert sorted(r.id for members in splits.values() for r in members) == sorted(r.id for r in rows)
    where = {(r.formula, split) for split, members in splits.items() for r in members}
    assert len(where) == len({r.formula for r in rows})
    assert list(splits) == [split for split in EVEN if split in splits]


def test_splits_by_a_column() -> None:
    rows = [row("a", split="test"), row("b", split="fold 7"), row("c", split="train"), row("d"), row("e", split="../x")]
    splits, rejected = split_rows(rows, DataConfig(split_column="fold"))
    assert {split: [r.id for r in members] for split, members in splits.items()} == {"test": ["a"], "train": ["c"]}
    assert [(r.id, r.stage, r.reason) for r in rejected] == [
        (id, "plan", f"{id}: {name!r} in the column 'fold' names no split")
        for id, name in (("b", "fold 7"), ("d", None), ("e", "../x"))
    ]


def test_splits_by_ids_go_before_the_others(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("\ufeffa\n\n  b c \r\nnobody\n", encoding="utf-8")
    by_ids = DataConfig(split_ids={"held": tmp_path / "held.txt"}, splits={"train": 1.0})
    rows = [row("a", split="train"), row("b c"), row("d", split="train")]
    splits, rejected = split_rows(rows, by_ids)
    assert {split: [r.id for r in members] for split, members in splits.items()} == {"train": ["d"], "held": ["a", "b c"]}
    assert not rejected
    splits, (rejected_one,) = split_rows([*rows, row("e")], by_ids.model_copy(update={"split_column": "fold"}))
    assert {split: [r.id for r in members] for split, members in splits.items()} == {"train": ["d"], "held": ["a", "b c"]}
    assert rejected_one.id == "e"


def test_lists_of_ids_that_cant_be_used(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("a\nb\na\n")
    other.write_text("c\nb\n")
    assert read_split_ids({"x": one}) == {"a": "x", "b": "x"}
    assert read_split_ids({}) == {}
    with pytest.raises(DataError, match=r"data\.split_ids: b is in the files of both x and y"):
        read_split_ids({"x": one, "y": other})
    with pytest.raises(DataError, match=rf"data\.split_ids\.x: {tmp_path}/gone can't be read"):
        read_split_ids({"x": tmp_path / "gone"})
    other.write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match="can't be read"):
        read_split_ids({"y": other})


# Shards


def samples_of(tasks: list[ShardTask]) -> list[tuple[str, int]]:
    return [(r.id, copy) for task in tasks for r, copy in task.entries]


@given(rows_of(), st.integers(1, 6), st.integers(1, 3))
def test_shards_are_full_and_numbered_and_hold_every_copy_once(rows: list[Row], per_shard: int, copies: int) -> None:
    data = DataConfig(splits=EVEN, samples_per_shard=per_shard, copies=copies)
    splits, _ = split_rows(rows, data)
    tasks = plan_shards(splits, data)
    assert sorted(samples_of(tasks)) == sorted((r.id, copy) for r in rows for copy in range(copies))
    for split, members in splits.items():
        mine = [task for task in tasks if task.split == split]
        assert sorted(samples_of(mine)) == sorted((r.id, copy) for r in members for copy in range(copies))
        assert [task.name for task in mine] == [f"{split}-{i:06d}.tar" for i in range(len(mine))]
        assert [task.first for task in mine] == [i * per_shard for i in range(len(mine))]
        assert all(len(task.entries) == per_shard for task in mine[:-1])
        assert all(1 <= len(task.entries) <= per_shard for task in mine[-1:])
    assert len({task.name for task in tasks}) == len(tasks)


@given(rows_of(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_rows(rows: list[Row], random: object) -> None:
    data = DataConfig(splits=EVEN, samples_per_shard=4)
    turned = list(rows)
    random.shuffle(turned)  # type: ignore[attr-defined]
    assert plan_shards(split_rows(turned, data)[0], data) == plan_shards(split_rows(rows, data)[0], data)


@given(rows_of())
def test_more_copies_leave_the_order_of_the_first(rows: list[Row]) -> None:
    one, three = DataConfig(splits=EVEN), DataConfig(splits=EVEN, copies=3)
    splits, _ = split_rows(rows, one)
    first = [sample for sample in samples_of(plan_shards(splits, three)) if sample[1] == 0]
    assert first == samples_of(plan_shards(splits, one))
    for split, members in splits.items():  # as in the shards of earlier versions
        ids = [id for id, _ in samples_of(plan_shards({split: members}, one))]
        assert ids == sorted((r.id for r in members), key=lambda id: unit_hash("order", id))


def test_families_and_copies_mix() -> None:
    """The order is that of a hash: a family that is read first doesn't fill the first shards, nor do copies follow."""
    rows = [row(f"{family}/{i}") for family in "ab" for i in range(100)]
    for task in plan_shards({"train": rows}, DataConfig(samples_per_shard=50)):
        assert 15 <= sum(r.id.startswith("a/") for r, _ in task.entries) <= 35
    ids = [id for id, _ in samples_of(plan_shards({"train": rows}, DataConfig(copies=3)))]
    assert sum(one == other for one, other in zip(ids, ids[1:])) < 30
