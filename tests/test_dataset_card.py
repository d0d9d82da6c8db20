"""The card of a data set: every number against a count of its own, no markup out of foreign text, equal bytes."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from dist_train import figures
from dist_train.config import RunConfig, load_config
from dist_train.crystal.elements import SYMBOLS
from dist_train.crystal.structure import Crystal
from dist_train.dataset_card import Card, escaped, write_card

HOSTILE = (
    "a|b <script>alert(1)</script> `x` [l](javascript:1) ![i](http://e) **b** __u__ $m$ ~~s~~ &lt; \\| \x1b[31m\n# h\r\u202e"
)
SPLITS = ("train", "val", "test")
PICTURES = ("elements.png", "atoms.png", "volumes.png")


def settings(*overrides: str) -> dict[str, Any]:
    config: RunConfig = load_config(None, overrides)
    return {"data": config.data.model_dump(mode="json"), "grid": config.grid.model_dump(mode="json")}


@pytest.fixture(scope="module")
def crystals(sample_table: Callable[[str], list[Crystal]]) -> list[Crystal]:
    return sample_table("perov_5")[:120] + sample_table("materials_project")[:80]


@pytest.fixture(scope="module")
def card(crystals: list[Crystal]) -> Card:
    split_of = np.array([0, 0, 0, 1, 0, 0, 2, 0] * 25)
    sizes = {"train": 150, "val": 25, "test": 25}
    return Card(
        config=settings(
            "data.copies=2", "grid.random_origin=true", "grid.sigma_A=0.4321", "grid.channels=[occupancy, group]"
        ),
        config_hash="0123456789abcdef",
        code_version="9.8.7",
        counts={"inputs": 1234, "accepted": 200, "rejected": 1034, "duplicates": 17},
        splits={name: (n, 2 * n) for name, n in sizes.items()},
        sources=[("perov_5.parquet", "MIT", 120, 34), ("mp/*.cif", "", 80, 1000)],
        rejected_reasons=[("grid", "spacing over the limit", 30), ("parse", "no atoms", 1004)],
        atoms=np.array([len(c) for c in crystals]),
        volumes_A3=np.array([c.volume_A3 for c in crystals]),
        elements=dict(Counter(z for c in crystals for z in c.composition)),
        split_of=split_of,
        shapes={(8 * i, 16, 24): i for i in range(2, 27)},
        bytes=12_345_678,
    )


def written(root: Path, card: Card) -> str:
    write_card(root, card)
    return (root / "dataset_card.md").read_text()


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of cells of each table by the first cell of its head; every row must be as long as the head."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        assert all(len(row) == len(head) for row in rows)
        found[head[0]] = rows
    return found


def test_every_number_is_that_of_an_independent_count(card: Card, crystals: list[Crystal], tmp_path: Path) -> None:
    text = written(tmp_path / "set", card)
    found = tables(text)
    assert "# Data set of crystals\n" in text
    assert "400 samples of 200 crystals, 12.3 MB" in text
    assert "dist_train 9.8.7 with the settings 0123456789abcdef" in text
    assert "1,234 inputs = 200 accepted + 1,034 rejected." in text
    assert found["count"] == [["inputs", "1,234"], ["accepted", "200"], ["rejected", "1,034"], ["duplicates", "17"]]
    assert found["split"] == [["train", "150", "300"], ["val", "25", "50"], ["test", "25", "50"]]
    assert found["input"] == [["perov_5.parquet", "MIT", "120", "34"], ["mp/&#42;.cif", "not stated", "80", "1,000"]]
    assert found["stage"] == [["parse", "no atoms", "1,004"], ["grid", "spacing over the limit", "30"]]
    told = dict(found["setting"])
    assert told["sigma"].startswith("0.4321 angstrom")
    assert told["channels"] == "occupancy, group"
    assert told["copies"] == "2 of each crystal, each of random origin"
    counts = {symbol: sum(symbol in re.sub(r"\d", "", c.formula).split() for c in crystals) for symbol in SYMBOLS[1:]}
    listed = re.search(r"(\d+) elements; after each, how many crystals hold it: (.*)\.", text)
    assert listed is not None
    assert dict(item.split() for item in listed[2].split(", ")) == {s: str(n) for s, n in counts.items() if n}
    assert int(listed[1]) == sum(n > 0 for n in counts.values())
    by_count = sorted(range(26, 1, -1))[::-1]
    assert found["D x H x W"][:20] == [[f"{8 * i} x 16 x 24", str(i)] for i in by_count[:20]]
    assert found["D x H x W"][20:] == [["5 other shapes", str(sum(by_count[20:]))]]


def test_sizes_are_those_of_the_crystals(card: Card, crystals: list[Crystal], tmp_path: Path) -> None:
    rows = {name: values for name, *values in tables(written(tmp_path, card))["quantity"]}
    atoms = sorted(len(c.frac_N3) for c in crystals)
    volumes = sorted(abs(np.dot(np.cross(*c.lattice_A[:2]), c.lattice_A[2])) / len(c.frac_N3) for c in crystals)
    ranks = (0, 9, 99, 189, 199)  # of 200: the values that 0, 5, 50, 95 and 100 % don't exceed
    assert rows["atoms in the cell"] == [str(atoms[i]) for i in ranks]
    assert rows["volume per atom, cubic angstrom"] == [f"{volumes[i]:.2f}" for i in ranks]


def test_describing_a_set_loads_no_torch() -> None:
    code = "import sys, dist_train.dataset_card, dist_train.inspect_sample; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_equal_cards_give_equal_bytes_and_others_do_not(card: Card, tmp_path: Path) -> None:
    def files(folder: str, card: Card) -> dict[str, bytes]:
        write_card(tmp_path / folder / "set", card)
        return {str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in (tmp_path / folder).rglob("*") if p.is_file()}

    first, again = files("first", card), files("again", replace(card, elements=dict(reversed(card.elements.items()))))
    assert first == again
    assert set(first) == {"set/dataset_card.md", *(f"set/dataset_card/{name}" for name in PICTURES)}
    for name in PICTURES:
        picture = first[f"set/dataset_card/{name}"]
        assert picture.startswith(b"\x89PNG")
        assert b"Software" not in picture
        assert b"tIME" not in picture
    other = files(
        "other", replace(card, elements=card.elements | {8: 7}, volumes_A3=card.volumes_A3[::-1], atoms=card.atoms + 1)
    )
    assert all(other[name] != first[name] for name in first)


def test_the_card_is_written_over_an_older_one(card: Card, tmp_path: Path) -> None:
    written(tmp_path, card)
    assert "9.8.8" in written(tmp_path, replace(card, code_version="9.8.8"))
    assert {p.name for p in tmp_path.rglob("*")} == {"dataset_card.md", "dataset_card", *PICTURES}


def test_foreign_text_shows_as_it_is_and_breaks_nothing(card: Card, tmp_path: Path) -> None:
    fence = "```\n# broken out"
    hostile = replace(
        card,
        config={**card.config, "data": {**card.config["data"], "inputs": [fence, HOSTILE]}},
        code_version=HOSTILE,
        counts={**card.counts, HOSTILE: 3},
        splits={HOSTILE: (150, 300), "_val": (25, 50), "$t$": (25, 50)},
        sources=[(HOSTILE, HOSTILE, 120, 34)],
        rejected_reasons=[(HOSTILE, HOSTILE, 30)],
    )
    text = written(tmp_path / "a|<b>_*", hostile)
    prose = re.sub(r"```\w+\n.*?\n```\n?", "", text, flags=re.DOTALL)
    assert text.count("```") == 6 + 1, "three blocks of code, and the fence inside the settings"
    assert not re.search(r"[<>`$~\\\x1b\u202e]|\*|__|(?<!!)\[|javascript:1\)\s*\]", prose)
    assert len(re.findall(r"!\[", prose)) == 3
    assert [line for line in prose.splitlines() if line.startswith("# ")] == ["# Data set of crystals"]
    shown = " ".join(HOSTILE.replace("\x1b", " ").replace("\u202e", " ").split())
    assert html.unescape(tables(prose)["input"][0][0]) == shown
    assert html.unescape(tables(prose)["stage"][0][1]) == shown
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


@pytest.mark.parametrize("text", [HOSTILE, "mp_20/a_b.cif", "_a_", "é 漢", ""])
def test_escaped_text_is_read_back_as_one_line(text: str) -> None:
    assert html.unescape(escaped(text)) == " ".join("".join(c if c.isprintable() else " " for c in text).split())


def test_names_in_words_stay_readable() -> None:
    assert escaped("data/mp_20/mp-1.cif") == "data/mp_20/mp-1.cif"


def test_a_set_without_crystals_has_a_card_without_pictures(card: Card, tmp_path: Path) -> None:
    nothing = replace(
        card, counts={"inputs": 3, "accepted": 0, "rejected": 3}, splits={"train": (0, 0)}, atoms=np.zeros(0, int),
        volumes_A3=np.zeros(0), elements={}, split_of=np.zeros(0, int), shapes={}, rejected_reasons=[],
    )  # fmt: skip
    text = written(tmp_path, nothing)
    assert "No crystal was accepted." in text
    assert "![" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["dataset_card.md"]


def test_counts_that_do_not_add_up_are_never_written(card: Card, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_card(tmp_path, replace(card, counts={**card.counts, "rejected": 1033}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "stored", "shown"),
    [
        ((), "float16 density", ("density.npy", "species.npy")),
        (("data.encoding=compact",), "uint8 of the density's square root", ()),
        (("data.store=structures",), "structures alone", ()),
    ],
)
def test_what_is_stored_is_told(
    card: Card, tmp_path: Path, overrides: tuple[str, ...], stored: str, shown: tuple[str, ...]
) -> None:
    text = written(tmp_path, replace(card, config=settings(*overrides), shapes={}))
    assert dict(tables(text)["setting"])["stored"].startswith(stored)
    assert tuple(name for name in ("density.npy", "species.npy") if f'sample["{name}"]' in text) == shown
    assert "No grids are stored" in text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of `figures`, in order, instead of their bytes."""
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "png_bytes", lambda figure: kept.append(figure) or b"")
    return kept


def test_every_element_of_the_table_shows_its_count(card: Card, drawn: list[Figure]) -> None:
    counts = card.elements | {1: 123_456, 2: 4_560_000, 3: 99_999}
    figures.periodic_table(counts)
    texts = [t.get_text() for t in drawn[0].axes[0].texts]
    cells = {texts[i + 1]: (texts[i], texts[i + 2]) for i in range(0, len(texts), 3)}
    assert cells.pop("H") == ("1", "123k")
    assert cells.pop("He") == ("2", "4.56M")
    assert cells.pop("Li") == ("3", "99999")
    expected = {s: (str(z), str(counts.get(z) or "")) for z, s in enumerate(SYMBOLS) if z > 3}
    assert cells == expected
    corners = np.array([patch.get_xy() for patch in drawn[0].axes[0].patches])
    apart = np.abs(corners[:, None] - corners).max(axis=-1) + 9 * np.eye(len(corners))
    assert apart.min() > 0.99, "no element hides another"
    column, row = (corners + 0.48).round(3).T
    assert [(column[z - 1], row[z - 1]) for z in (1, 2, 5, 26, 72, 103)] == [
        (1, 1),
        (18, 1),
        (13, 2),
        (8, 4),
        (4, 6),
        (3, 7),
    ]
    assert column[57:70].tolist() == column[89:102].tolist() == list(range(4, 17))
    assert set(row[57:70]) == {row[56]}
    assert row[56] > 7.9
    assert (row[89:102] == row[56] + 1).all()


def test_the_pictures_of_a_card_show_its_crystals(card: Card, drawn: list[Figure], tmp_path: Path) -> None:
    write_card(tmp_path, card)
    for figure, values in zip(drawn[1:], (card.atoms, card.volumes_A3 / card.atoms), strict=True):
        for index, patch in enumerate(figure.axes[0].patches):
            shares, edges, _ = patch.get_data()
            assert edges[0] <= values.min() <= edges[1]
            assert edges[-2] <= values.max() <= edges[-1]
            chosen = values[card.split_of == index]
            assert shares == pytest.approx(np.histogram(chosen, edges)[0] / len(chosen))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_histograms_count_every_crystal_of_a_split_once(drawn: list[Figure], wide: bool, whole: bool) -> None:
    rng = np.random.default_rng(3)
    values = np.exp(rng.uniform(0, np.log(900 if wide else 12), 500))
    values = np.round(values).astype(int) if whole else values
    split_of = rng.choice(3, 500, p=(0.8, 0.2, 0.0))
    figures.split_histogram(values, split_of, SPLITS, "x")
    axis = drawn[0].axes[0]
    assert (axis.get_xscale() == "log") == wide
    for index, patch in enumerate(axis.patches):
        shares, edges, _ = patch.get_data()
        chosen = values[split_of == index]
        expected = [
            sum(low <= v < high for v in chosen.tolist()) / max(len(chosen), 1) for low, high in zip(edges, edges[1:])
        ]
        assert shares == pytest.approx(expected)
        assert sum(shares) == pytest.approx(float(len(chosen) > 0))
        assert not whole or not np.any(edges % 1 == 0), "whole numbers lie inside the bars"
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [
        f"{(split_of == i).sum()} {name}" for i, name in enumerate(SPLITS)
    ]


def test_one_value_is_a_histogram_too(drawn: list[Figure]) -> None:
    figures.split_histogram(np.full(4, 5), np.zeros(4, int), ("train",), "x")
    figures.split_histogram(np.full(4, 5.5), np.zeros(4, int), ("train",), "x")
    assert [sum(figure.axes[0].patches[0].get_data()[0]) for figure in drawn] == [1.0, 1.0]


def test_the_code_of_the_card_reads_the_shards(card: Card, tmp_path: Path) -> None:
    from small_run import write_small_shards

    index = write_small_shards(tmp_path, crystals=30)
    grid = {**card.config["grid"], "shape": 12}
    text = written(index.root, replace(card, config={"data": settings()["data"], "grid": grid}))
    plain, ours = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(plain.splitlines()) <= 4
    assert len(ours.splitlines()) <= 4
    samples = index.samples("train")

    def run(code: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=index.root, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    printed = run(plain)
    assert [key for key in re.findall(r"^(\S+) \{'id'", printed, re.MULTILINE)] == [sample.key for _, sample in samples]
    assert run(ours).startswith(f"{len(samples)} ")
