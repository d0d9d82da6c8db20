"""`dist-train bench generate`: how many crystals a second a model samples and reconstructs, and what takes the time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from dist_train.bench import Row
from dist_train.commands.generation import GenerateOptions, Task, generate
from dist_train.commands.models import load_codec, read_crystals, write_cifs
from dist_train.crystal.cif import write_cif
from dist_train.crystal.frames import representable
from dist_train.crystal.parquet import read_parquet_rows, write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError
from dist_train.generate import CORRECTIONS, decode, encode, samples
from dist_train.generated import Finish, finished, result_of
from dist_train.models.export import SUMS_NAME
from dist_train.models.reconstruct import Codec
from dist_train.progress import Stages

ROUNDS = 3
RATE = 50.0
"""Wanted crystals a second on two cores with the released model of Perov-5."""

T = TypeVar("T")


def generate_rows(sample: Path, model: Path, n: int, workers: int) -> Iterator[Row]:
    """The whole verb `generate`, its model read anew, then its stages on one core, one after another.

    sample: folder of the shipped crystals, of which n perovskites are reconstructed; model: a bundle.
    """
    if not (model / SUMS_NAME).is_file():
        raise DataError(
            f"{model} is no model bundle: give --model one, such as data/models/perov_5 of a clone of the project"
        )
    table = sample / "perov_5.parquet"
    if not table.is_file():
        raise DataError(f"{table} is missing: give --sample data/sample of a clone of the project")
    with tempfile.TemporaryDirectory() as folder:
        crystals = [row for row in read_parquet_rows(table, 0, n) if isinstance(row, Crystal)]
        write_parquet(few := Path(folder, "few.parquet"), crystals)
        tasks: tuple[tuple[Task, list[str]], ...] = (("sample", []), ("reconstruct", [str(few)]))
        for task, inputs in tasks:
            count = n if task == "sample" else len(crystals)
            options = GenerateOptions(task, str(model), None, Path(folder, task), inputs, n, workers=workers)
            # The first one may compile.
            rate = count / median([_timed(partial(generate, options))[1] for _ in range(ROUNDS + 1)][1:])
            seconds = _stages(task, inputs, model, n, Path(folder, "stages"))
            total = sum(seconds.values())
            ratio = rate * total / count
            case = f"{task}: {count} crystals from model to CIF files, {workers} workers; reference: stages on one core"
            yield Row(case, rate, "1/s", count / total, ratio, RATE, rate >= RATE)
            for stage, spent in seconds.items():
                yield Row(f"  {stage}, a crystal: {spent / total:.0%} of the stages of {task}", 1e3 * spent / count, "ms")


def _stages(task: str, inputs: list[str], model: Path, n: int, out: Path) -> dict[str, float]:
    """Seconds of each stage on one core, medians."""
    codec, threads = load_codec(str(model), None)[0], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [_one_by_one(codec, task, inputs, n, out) for _ in range(ROUNDS + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    return {stage: median(seconds[stage] for seconds in rounds) for stage in rounds[0]}


def _one_by_one(codec: Codec, task: str, inputs: list[str], n: int, out: Path) -> dict[str, float]:
    """Seconds of each stage of what `generate` does, each of them for all crystals."""
    seconds: dict[str, float] = {}

    def stage(name: str, work: Callable[[], T]) -> T:
        made, seconds[name] = _timed(work)
        return made

    spec, ids = codec.model.grid, [f"crystal-{i:05d}" for i in range(n)]
    if task == "sample":
        found = stage("drawing, decoding, encoding, decoding", lambda: samples(codec, ids, 0))
        decoded = [item.decoded for item in found]
    else:
        crystals = stage("reading", lambda: [representable(crystal, spec) for crystal in read_crystals(inputs, spec)])
        latents, ids = stage("encoding", lambda: encode(codec, crystals)), ids[: len(crystals)]
        decoded = stage("decoding, correcting", lambda: list(decode(codec, latents, ids, corrections=CORRECTIONS)))
    results = [result_of(id, item) for id, item in zip(ids, decoded, strict=True)]
    stage("symmetry and CIF texts with it", lambda: finished(results, Finish(), Stages(len(ids) + 1)))
    texts = stage("CIF texts", lambda: [write_cif(item.crystal) for item in decoded if item.crystal is not None])
    stage("files", lambda: write_cifs(out, decoded))
    if not texts:
        raise DataError("the model made no crystal at all: nothing to measure")
    seconds["files"] = max(seconds["files"] - seconds["CIF texts"], 0.0)
    return seconds


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
