"""Crystals to latents, part by part: what a worker of `dist-train embed` does, wherever it runs. Needs no engine."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_train.config import DataConfig
from dist_train.crystal.case import unknown_elements
from dist_train.crystal.digest import digest
from dist_train.crystal.metrics import compare
from dist_train.crystal.structure import Crystal
from dist_train.errors import CrystalError
from dist_train.latents import About, schema_of, write_part
from dist_train.models.reconstruct import Codec
from dist_train.shards.discover import Found
from dist_train.shards.scan import messages
from dist_train.shards.sources import Chunk

LIMITS = DataConfig()
"""Time and memory that a file may take to be read, as in voxelising."""
FAULTS = (CrystalError, ArithmeticError, ValueError, LookupError, RuntimeError)
"""What networks, decoder and comparison may raise of a crystal that makes no sense to them."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A run of the inputs: what couldn't even be opened, as (input, file, reason), then chunks of the others."""

    number: int
    refused: tuple[tuple[str, str, str], ...]
    chunks: tuple[Chunk, ...]

    def __len__(self) -> int:
        """Files, archive members and table rows."""
        return len(self.refused) + sum(map(len, self.chunks))

    def __str__(self) -> str:
        places = dict.fromkeys([*(file for _, file, _ in self.refused), *(chunk.place for chunk in self.chunks)])
        return f"part {self.number} ({len(self)} rows of {', '.join(islice(places, 3))}{', ...' if len(places) > 3 else ''})"


def plan_parts(found: Found, size: int) -> list[Part]:
    """Part k holds the units k * size <= number < (k + 1) * size of the inputs, refused ones first, then in their order."""
    pieces: dict[int, list[Chunk]] = defaultdict(list)
    first = len(found.refused)
    for chunk in found.chunks:
        for part in range(first // size, -(-(first + len(chunk)) // size)):
            start = part * size - first
            pieces[part].append(chunk.cut(max(start, 0), start + size))
        first += len(chunk)
    return [
        Part(part, tuple(found.refused[part * size : (part + 1) * size]), tuple(pieces[part]))
        for part in range(-(-first // size))
    ]


def input_digest(found: Found) -> str:
    """SHA-256 of what the inputs are: files with their sizes, members and rows in their order."""
    whole = hashlib.sha256(json.dumps([sorted(found.sizes.items()), found.refused]).encode())
    for chunk in found.chunks:
        whole.update(json.dumps(list(asdict(chunk).values())).encode())
    return whole.hexdigest()


class Embedder:
    """A model at work on the parts of one job: each call writes one, of which nothing hangs on what was called before."""

    def __init__(self, codec: Codec, folder: Path, about: About) -> None:
        self.codec, self.folder, self.about = codec, folder, about
        self.schema = schema_of(about.decoded)

    def __call__(self, part: Part) -> int:
        """Write the part; returns its number of rows."""
        rows: list[Row] = []
        batch: list[tuple[Row, Crystal]] = []
        for row, crystal in self._read(part):
            rows.append(row)
            if crystal is not None:
                batch.append((row, crystal))
            if len(batch) == self.about.batch:
                self._embed(batch)
                batch = []
        self._embed(batch)
        write_part(self.folder, part.number, rows, self.schema, self.about.identity)
        return len(rows)

    def _read(self, part: Part) -> Iterator[tuple[Row, Crystal | None]]:
        """A row for each crystal in the part, with what is known without the model; None for one that it can't take."""
        for given, file, reason in part.refused:
            yield _row(file, given, file, 0, error=f"parse: {reason}"), None
        spec = self.codec.model.grid
        for chunk in part.chunks:
            place, before = -1, ""
            for kind, id, file, *told in messages(chunk, LIMITS, spec):
                # A table gives a row each time, another file as many as there are crystals in it.
                place = place + 1 if not chunk.names or file == before else 0
                before = file
                row = _row(id, chunk.input, _named(chunk, file), chunk.start + place)
                if kind == "rejected":
                    stage, reason = told
                    yield row | {"error": _text(f"{stage}: {reason.removeprefix(f'{id}: ')}")}, None
                    continue
                crystal = Crystal.from_json(told[-1])
                row |= {"formula": crystal.formula, "n_atoms": len(crystal), "digest": digest(crystal)}
                refusal = unknown_elements(crystal, self.codec.model.elements)
                yield (row | {"error": f"grid: {refusal}"}, None) if refusal else (row, crystal)

    def _embed(self, batch: Sequence[tuple[Row, Crystal]]) -> None:
        """Fill in the rows of a batch; where one makes it fail, each by itself, so that the others don't."""
        if not batch:
            return
        try:
            latents = self.codec.encode([crystal for _, crystal in batch])
            for (row, _), latent in zip(batch, latents.cpu().numpy(), strict=True):
                row["latent"] = latent
            if self.about.decoded:
                self._check(batch, latents)
        except FAULTS as error:
            if len(batch) > 1:
                for one in batch:
                    self._embed([one])
            else:
                ((row, _),) = batch
                row["error"] = _text(f"{'decode' if 'latent' in row else 'encode'}: {type(error).__name__}: {error}")

    def _check(self, batch: Sequence[tuple[Row, Crystal]], latents: Tensor) -> None:
        """Decode the latents and compare what comes out with the true crystals."""
        decoded = self.codec.crystals(latents, [crystal.id for _, crystal in batch])
        for (row, crystal), found in zip(batch, decoded, strict=True):
            pair = compare(crystal, found.crystal)
            row |= {"match": pair.match, "rms": pair.rms, "valid": pair.valid}
            if found.crystal is None:
                row["error"] = _text(f"decode: {found.reason.removeprefix(f'{crystal.id}: ')}")
            else:
                row |= {"decoded_formula": found.crystal.formula, "decoded_n_atoms": len(found.crystal)}
                row["confidence"] = float(found.confidence_N.mean())


def _row(id: str, given: str, file: str, row: int, **more: str) -> Row:
    return {"id": _text(id), "input": _text(given), "file": _text(file), "row": row, **more}


def _named(chunk: Chunk, file: str) -> str:
    """The file in its input: of an archive that is the input itself, with the archive's name."""
    inside = chunk.kind in ("tar", "zip") and not chunk.prefix
    return f"{chunk.place.rpartition('/')[2]}/{file}" if inside else file


def _text(text: str) -> str:
    """Without lone surrogates, which UTF-8 lacks; names of files may hold them."""
    return text.encode(errors="replace").decode()
