"""`dataset_card.md`: what a data set of shards holds, where it comes from and how to read it, with pictures beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.elements import SYMBOLS
from dist_train.files import atomic_path, write_text

CARD_NAME, PICTURES_NAME = "dataset_card.md", "dataset_card"
MAX_SHAPES = 20
"""Grid shapes listed one by one, the most frequent first."""

_FRAMES = {
    "cell": "the cell, periodic; voxel (i, j, k) lies at the fractional coordinates (i / D, j / H, k / W)",
    "window": "a Cartesian cube cut from the infinite crystal",
    "unit": "a Cartesian cube around the atoms of one cell, without periodic images",
}
_ENCODINGS = {
    "raw": "float16 density [C, D, H, W] and uint8 atomic numbers [D, H, W], as .npy",
    "compact": "uint8 of the density's square root and uint8 atomic numbers, under zstd",
}


@dataclass(frozen=True)
class Card:
    """What a card tells, counted by whoever made the shards; n is the number of accepted crystals.

    config: the resolved settings, {"data": ..., "grid": ...} as `DataConfig` and `GridSpec` dump them.
    counts: 'inputs' = 'accepted' + 'rejected', and any others.
    splits: name -> (crystals, samples), in the order of `split_of`.
    sources: (input, its licence or '', accepted, rejected).
    rejected_reasons: (stage, kind of reason, rejected).
    atoms, volumes_A3: [n] atoms in each crystal's cell, and the volume of the cell in cubic angstrom.
    elements: atomic number -> crystals that hold it.
    split_of: [n] index into `splits`.
    shapes: (D, H, W) -> samples of that grid shape; empty where no grids are stored.
    bytes: size of all shards.
    """

    config: dict[str, Any]
    config_hash: str
    code_version: str
    counts: dict[str, int]
    splits: dict[str, tuple[int, int]]
    sources: Sequence[tuple[str, str, int, int]]
    rejected_reasons: Sequence[tuple[str, str, int]]
    atoms: NDArray[np.integer]
    volumes_A3: NDArray[np.floating]
    elements: dict[int, int]
    split_of: NDArray[np.integer]
    shapes: dict[tuple[int, int, int], int]
    bytes: int


def write_card(root: Path, card: Card) -> None:
    """Write `root/dataset_card.md` and, before it, its pictures in `root/dataset_card/`; each file whole or not at all.

    Equal cards give equal bytes. Without accepted crystals there are no pictures.
    """
    counts = card.counts
    assert counts["inputs"] == counts["accepted"] + counts["rejected"], counts
    if len(card.atoms):
        # Here, since matplotlib takes half a second that a job refused or finished long ago shouldn't pay.
        from dist_train.figures import periodic_table, split_histogram

        names = list(card.splits)
        pictures = {
            "elements": periodic_table(card.elements),
            "atoms": split_histogram(card.atoms, card.split_of, names, "atoms in the cell"),
            "volumes": split_histogram(
                card.volumes_A3 / card.atoms, card.split_of, names, "volume of the cell per atom, cubic angstrom"
            ),
        }
        for name, data in pictures.items():
            with atomic_path(root / PICTURES_NAME / f"{name}.png") as temporary:
                temporary.write_bytes(data)
    parts = (_head(root, card), _origin(card), _making(card), _content(card), _shapes(card), _rejected(card), _reading(card))
    write_text(root / CARD_NAME, "\n\n".join(parts) + "\n")


def escaped(value: object) -> str:
    """Any text as one line of Markdown that shows it as it is: no markup, HTML, table cell or line break comes of it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    # In CommonMark a character reference is never markup; an underscore within a word isn't either.
    return re.sub(r"[&<>|`\\\[\]*~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda found: f"&#{ord(found[0])};", line)


def _table(columns: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; `columns` are separated by commas, and whole numbers stand to the right with separators."""
    rows = [list(row) for row in rows]
    names = columns.split(",")
    numeric = [any(isinstance(row[i], int) for row in rows) for i in range(len(names))]
    lines = [[name.strip() for name in names], ["---:" if right else "---" for right in numeric]]
    lines += [[f"{cell:,}" if isinstance(cell, int) else escaped(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(root: Path, card: Card) -> str:
    counts, samples = card.counts, sum(samples for _, samples in card.splits.values())
    grids = "crystal structures" if card.config["data"]["store"] == "structures" else "voxel grids of crystals"
    others = [(name.replace("_", " "), n) for name, n in counts.items() if name not in ("inputs", "accepted", "rejected")]
    return (
        "# Data set of crystals\n\n"
        f"A WebDataset of {grids}: {samples:,} samples of {counts['accepted']:,} crystals, {card.bytes / 1e6:,.1f} MB "
        f"in tar shards.\nMade by dist_train {escaped(card.code_version)} with the settings {escaped(card.config_hash)}.\n\n"
        f"{counts['inputs']:,} inputs = {counts['accepted']:,} accepted + {counts['rejected']:,} rejected.\n\n"
        + _table("count, number", [*((name, counts[name]) for name in ("inputs", "accepted", "rejected")), *others])
        + "\n\n## Splits\n"
        + _table("split, crystals, samples", ((name, *numbers) for name, numbers in card.splits.items()))
    )


def _origin(card: Card) -> str:
    rows = ((name, licence or "not stated", accepted, rejected) for name, licence, accepted, rejected in card.sources)
    return "## Sources and licences\n" + _table("input, licence, accepted, rejected", rows)


def _making(card: Card) -> str:
    grid, data = card.config["grid"], card.config["data"]
    placed = " and ".join(name for name in ("rotation", "origin") if grid[f"random_{name}"])
    rows = [
        ("frame", f"{grid['frame']}: {_FRAMES[grid['frame']]}"),
        ("shape", f"{grid['shape']}, at most {grid['max_spacing_A']} angstrom between neighbouring voxels"),
        *([] if grid["frame"] == "cell" else [("edge of the cube", f"{grid['box_A']} angstrom")]),
        ("cell", "canonical" if grid["canonical"] else "Niggli-reduced" if grid["niggli"] else "as in the source"),
        ("sigma", f"{grid['sigma_A']} angstrom, the standard deviation of the Gaussian that stands for an atom"),
        ("species", f"atomic number of the nearest atom within {grid['radius_A']} angstrom, else 0"),
        ("channels", ", ".join(grid["channels"])),
        ("stored", "structures alone" if data["store"] == "structures" else _ENCODINGS[data["encoding"]]),
        ("copies", f"{data['copies']} of each crystal" + (f", each of random {placed}" if placed else "")),
    ]
    settings = json.dumps(card.config, indent=1, sort_keys=True, default=str)
    return f"## How the samples were made\n{_table('setting, value', rows)}\n\nAll settings:\n\n```json\n{settings}\n```"


def _content(card: Card) -> str:
    if not len(card.atoms):
        return "## Elements and sizes\nNo crystal was accepted."
    ordered = sorted(card.elements.items(), key=lambda item: (-item[1], item[0]))
    per_atom = card.volumes_A3 / card.atoms
    rows = [
        (name, *(f"{value:.{digits}f}" for value in np.quantile(values, (0, 0.05, 0.5, 0.95, 1), method="inverted_cdf")))
        for name, values, digits in (("atoms in the cell", card.atoms, 0), ("volume per atom, cubic angstrom", per_atom, 2))
    ]
    return (
        f"## Elements and sizes\n{len(ordered)} elements; after each, how many crystals hold it: "
        + ", ".join(f"{SYMBOLS[z]} {count:,}" for z, count in ordered)
        + f".\n\n![Periodic table: crystals that hold each element]({PICTURES_NAME}/elements.png)\n\n"
        + _table("quantity, least, 5 %, median, 95 %, largest", rows)
        + f"\n\n![Histogram of atoms in the cell]({PICTURES_NAME}/atoms.png)\n\n"
        f"![Histogram of volume per atom]({PICTURES_NAME}/volumes.png)"
    )


def _shapes(card: Card) -> str:
    if not card.shapes:
        return "## Grid shapes\nNo grids are stored; structures are voxelised when they are read."
    ordered = sorted(card.shapes.items(), key=lambda item: (-item[1], item[0]))
    rows: list[tuple[str, int]] = [(" x ".join(map(str, shape)), count) for shape, count in ordered[:MAX_SHAPES]]
    if rest := ordered[MAX_SHAPES:]:
        rows.append((f"{len(rest)} other shapes", sum(count for _, count in rest)))
    return "## Grid shapes\n" + _table("D x H x W, samples", rows)


def _rejected(card: Card) -> str:
    rows = sorted(card.rejected_reasons, key=lambda row: (-row[2], row[:2]))
    return "## Rejected inputs\n" + (_table("stage, reason, inputs", rows) if rows else "None.")


def _reading(card: Card) -> str:
    split = json.dumps(next((name for name, (_, samples) in card.splits.items() if samples), "train"))
    grids, raw = card.config["data"]["store"] == "grids", card.config["data"]["encoding"] == "raw"
    plain = ['"structure.json"', *(['"density.npy"', '"species.npy"'] if grids and raw else [])]
    note = "" if raw or not grids else "\nThe grids of this encoding are read with dist_train."
    return f"""## How to read it
With webdataset alone, in this folder:{note}

```python
import glob, webdataset as wds
shards = sorted(glob.glob({split} + "-*.tar"))
for sample in wds.WebDataset(shards, shardshuffle=False).decode():
    print(sample["__key__"], {", ".join(f"sample[{name}]" for name in plain)})
```

With dist_train, any sample by its place, from the first to the last:

```python
from pathlib import Path
from dist_train.shards import index, reader
samples = reader.ShardReader(index.Index.read(Path(".")), {split})
print(len(samples), samples[0].crystal.formula)
```"""
