"""`dist-train bench loader step kills`: how fast samples become batches, what the train loop costs beside its networks, and
whether a run that is killed again and again ends as one that was not.

Whatever is compared is measured in turns, in processes of their own where they would disturb each other.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch

from dist_train.bench import Row
from dist_train.commands.launch import rank_environment
from dist_train.commands.training import be_deterministic, build_model, keep_memory
from dist_train.config import RunConfig, load_config
from dist_train.crystal.parquet import parquet_length, read_parquet_rows, write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.errors import DataError
from dist_train.files import sha256
from dist_train.models.blocks import Style
from dist_train.models.objectives import step_noise
from dist_train.models.unet import AttentionUNet
from dist_train.node import is_rank
from dist_train.progress import Progress
from dist_train.shards.batches import train_batches
from dist_train.shards.index import Index
from dist_train.shards.order import BatchPlan
from dist_train.shards.reader import ShardReader
from dist_train.training.engine import TorchEngine
from dist_train.training.tracker import read_spool

ROUNDS = 3
RAW_SHARE, WEBDATASET = 0.5, 5.0
"""Wanted of the loader: this share of the rate at which the files are read, and this many times plain webdataset."""
LOOP_SHARE, WAIT_PERCENT = 0.95, 2.0
"""Wanted of the train loop: this share of the bare loop's rate, and at most so much waiting for data."""
TWO_RANKS, BF16 = 1.8, 1.8
PLANNED = 0.3
"""How far the speed that is foretold may be from that of training."""
WARM, STEPS = 3, 18
LOADED = (
    ("1 channel, 32^3", (), 64, 3400),
    ("26 channels, 32^3", ("grid.channels=[occupancy, period, group]",), 16, 300),
)
"""Label, settings, crystals of a batch and of the data."""
PASSES = 6
"""Through the data in a measurement, as training makes many; the memory of its first batches is new."""
MODEL = (
    "data.encoding=compact", "train.epochs=1000", "train.log_every=1",
    "train.validate_every=1000000", "train.checkpoint_every=1000000", f"train.stop_after_step={STEPS}",
)  # fmt: skip
"""The default networks, grid and batch."""
KILLED = (
    "grid.shape=12", "grid.max_spacing_A=0.5", "model.preset=cell-tiny", "train.epochs=12", "train.global_batch_size=16",
    "train.log_every=1", "train.checkpoint_every=7", "train.validate_every=40",
)  # fmt: skip
KILLS, KILL_STEPS, KILL_SECONDS = 20, 9, 0.5
"""How often a rank is killed: within so many steps and then seconds of the kill before."""


def loader_rows(sample: Path) -> Iterator[Row]:
    """Samples a second of warm raw shards into batches."""
    for label, overrides, batch, crystals in LOADED:
        with tempfile.TemporaryDirectory() as folder:
            index = _shards(sample, load_config(None, (*overrides, f"data.shards={folder}/shards")), crystals)
            yield from _loader(index, label, batch)


def _loader(index: Index, label: str, batch: int) -> Iterator[Row]:
    reader = ShardReader(index, "train")
    order = BatchPlan(reader.shapes, reader.shard_sizes, batch, PASSES, 0, 0, 1)
    ways: dict[str, Callable[[], int]] = {
        "ours": lambda: sum(item.batch.size for item in train_batches(reader, order, 0, order.steps)),
        "read": lambda: sum(_read_whole(index, reader) and len(reader) for _ in range(PASSES)),
        "webdataset": lambda: _webdataset(index, batch),
    }
    rates = {name: list[float]() for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            rates[name].append(way() / (time.perf_counter() - began))
    found = {name: values[1:] for name, values in rates.items()}  # the first round warms the files
    for other, target in (("read", RAW_SHARE), ("webdataset", WEBDATASET)):
        ratio = median(a / b for a, b in zip(found["ours"], found[other], strict=True))
        told = {"read": "the files read as they are", "webdataset": "plain webdataset"}[other]
        case = f"samples a second of raw shards, {label}; reference: {told}"
        yield Row(case, median(found["ours"]), "1/s", median(found[other]), ratio, target, ratio >= target)


def _read_whole(index: Index, reader: ShardReader) -> int:
    """Read the shards of a split one after another through a megabyte of memory, in one thread; the bytes."""
    buffer, total = bytearray(2**20), 0
    for shard in reader.shards:
        with open(Path(index.root) / shard.name, "rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                total += size
    return total


def _webdataset(index: Index, batch: int) -> int:
    """Batches of the same samples by webdataset's own means, shuffled through its buffer; how many samples."""
    import webdataset

    def arrays(item: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray, bytes]:
        return np.load(io.BytesIO(item["density.npy"])), np.load(io.BytesIO(item["species.npy"])), item["structure.json"]

    def joined(rows: list[tuple[np.ndarray, np.ndarray, bytes]]) -> int:
        densities, species, texts = zip(*rows, strict=True)
        torch.from_numpy(np.stack(densities)), torch.from_numpy(np.stack(species)), list(map(json.loads, texts))
        return len(rows)

    urls = [str(Path(index.root) / shard.name) for shard in index.shards]
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(1000).map(arrays)
    return sum(stream.batched(batch, partial=True, collation_fn=joined))


def step_rows(sample: Path) -> Iterator[Row]:
    """The train loop with everything on, beside a bare one; two ranks beside one, and what two bare loops reach; bf16 beside
    fp32."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, (*MODEL, f"data.shards={folder}/shards", f"run_dir={folder}/run"))
        _shards(sample, config, 1024)
        path = Path(folder, "run.yaml")
        path.write_text(config.to_yaml())
        runs = {name: list[dict[str, float]]() for name in ("bare", "bares", "one", "two")}
        bare = [sys.executable, "-m", "dist_train.bench_train", str(path)]
        for turn in range(ROUNDS):
            for loops, name in ((1, "bare"), (2, "bares")):
                runs[name].append(_children(bare, loops))
            for ranks, name in ((1, "one"), (2, "two")):
                runs[name].append(_training(path, Path(folder, f"{name}{turn}"), ranks))
        foretold = _plan(path)
    rate = {name: [run["samples_per_second"] for run in found] for name, found in runs.items()}
    for name, other, target, case in (
        ("one", "bare", LOOP_SHARE, "DeepSpeed, loading and tracking on; reference: a bare loop on a batch in memory"),
        ("bares", "bare", None, "two bare loops at once, the most that two ranks could reach; reference: one"),
        ("two", "one", TWO_RANKS, "two ranks of one thread; reference: one"),
    ):
        ratio = median(a / b for a, b in zip(rate[name], rate[other], strict=True))
        holds = None if target is None else ratio >= target
        yield Row(f"samples a second: {case}", median(rate[name]), "1/s", median(rate[other]), ratio, target, holds)
    waited = median(run["data_wait_percent"] for run in runs["one"])
    ratio = foretold / median(rate["one"])
    case = "samples a second foretold by dist-train plan on this machine; reference: training"
    yield Row(case, foretold, "1/s", median(rate["one"]), ratio, None, abs(ratio - 1) <= PLANNED)
    yield Row("waiting for data, share of a step", waited, "%", None, None, WAIT_PERCENT, waited <= WAIT_PERCENT)
    yield _bf16()


def _training(config: Path, run_dir: Path, ranks: int) -> dict[str, float]:
    """A real training of a few steps by the launcher; its figures after the first ones."""
    options = ["--config", str(config), "--set", f"run_dir={run_dir}", "--ranks", str(ranks)]
    _run([sys.executable, "-m", "dist_train", "launch", *options], ranks)
    records = [r for r in read_spool(run_dir / "metrics.jsonl") if "step_seconds" in r["metrics"]]
    steps = [record["metrics"] for record in records[WARM:]]
    batch = load_config(config).train.global_batch_size
    seconds = median(step["step_seconds"] for step in steps)
    return {
        "samples_per_second": batch / seconds,
        "data_wait_percent": median(step["data_wait_percent"] for step in steps),
    }


def _plan(config: Path) -> float:
    """Samples a second of one rank on this machine, as `dist-train plan` foretells them."""
    command = [sys.executable, "-m", "dist_train", "plan", "--config", str(config), "--device", "here", "--json"]
    return float(json.loads(_run(command, 1))["samples_per_second"])


def _run(command: list[str], ranks: int) -> str:
    environment = os.environ | rank_environment(ranks) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def _children(command: list[str], number: int) -> dict[str, float]:
    """Sums of what so many processes at once print of themselves."""
    with ThreadPoolExecutor(number) as pool:
        found = [json.loads(out.splitlines()[-1]) for out in pool.map(_run, [command] * number, [number] * number)]
    return {key: sum(one[key] for one in found) for key in found[0]}


def bare_loop(config: RunConfig) -> float:
    """Samples a second of forward, backward and AdamW on one batch that is in memory already, and nothing else."""
    index = Index.read(config.data.shards)
    reader = ShardReader(index, "train")
    engine = TorchEngine(build_model(config, index, reader), config)
    size = config.train.global_batch_size
    order = BatchPlan(reader.shapes, reader.shard_sizes, size, 1, config.seed, 0, 1)
    batch = next(iter(train_batches(reader, order, 0, 1))).batch.to(engine.device)
    noise = step_noise(
        config.seed, 0, range(size), engine.objective.share, config.model.latent_size, batch.shape, engine.device
    )
    optimizer, seconds = torch.optim.AdamW(engine.objective.parameters(), lr=1e-4, fused=True), []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(engine.device.type, engine.dtype, enabled=engine.dtype != torch.float32):
            loss, _ = engine.objective(batch, noise)
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return size / median(seconds[WARM:])


def _bf16() -> Row:
    """The paper's U-Net, of width 64; fast on a CPU that multiplies matrices of bf16 (AMX), slow on all others."""
    case = "U-Net of width 64 on one crystal of 32^3, forward and backward, bf16; reference: fp32"
    fast = "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    times = {dtype: list[float]() for dtype in (torch.bfloat16, torch.float32)}
    networks = {dtype: AttentionUNet(1, 95, 64, 5, Style(periodic=False, paper=True, groups=8)).to(dtype) for dtype in times}
    for _ in range(ROUNDS + 1):
        for dtype, network in networks.items():
            began = time.perf_counter()
            network(torch.randn(1, 1, 32, 32, 32, dtype=dtype)).float().mean().backward()
            times[dtype].append(time.perf_counter() - began)
    low, full = (values[1:] for values in times.values())
    ratio = median(b / a for a, b in zip(low, full, strict=True))
    target, holds = (BF16, ratio >= BF16) if fast else (None, None)
    return Row(case if fast else f"{case} (this CPU has no AMX)", median(low), "s", median(full), ratio, target, holds)


def kill_rows(sample: Path) -> Iterator[Row]:
    """`kill -9` of a random rank at random steps of a launch that starts them again, beside an undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, (*KILLED, f"data.shards={folder}/shards"))
        _shards(sample, config, 300)
        path = Path(folder, "run.yaml")
        path.write_text(config.to_yaml())
        ends = []
        for kills in (0, KILLS):
            run_dir = Path(folder, f"run{kills}")
            made = _killed(path, run_dir, kills)
            records = [record for record in read_spool(run_dir / "metrics.jsonl") if "train/loss" in record["metrics"]]
            losses = {record["step"]: record["metrics"]["train/loss"] for record in records}
            ends.append((losses, sha256(run_dir / "bundle" / "model.safetensors")))
    same = ends[0] == ends[1] and made == KILLS
    yield Row("kills of a rank at random steps, all losses and weights as without", made, "kills", target=KILLS, holds=same)


def _killed(config: Path, run_dir: Path, kills: int) -> int:
    """Train on two ranks and kill one of them so many times; how many times it was done."""
    rng, made, step = random.Random(0), 0, 0
    command = [sys.executable, "-m", "dist_train", "launch", "--config", str(config), "--set", f"run_dir={run_dir}"]
    with run_dir.with_suffix(".log").open("w") as log, Progress(f"train, {kills} kills", kills, "kills") as bar:
        launch = psutil.Popen([*command, "--ranks", "2", "--restarts", str(kills)], stdout=log, stderr=log)
        while launch.poll() is None:
            if made < kills and _step(run_dir) >= step:
                time.sleep(rng.uniform(0, KILL_SECONDS))
                with suppress(psutil.Error, IndexError):  # it has just ended by itself, or none is there
                    rng.choice([child for child in launch.children(recursive=True) if is_rank(child)]).kill()
                    made, step = made + 1, _step(run_dir) + rng.randint(1, KILL_STEPS)
                    bar.update()
            time.sleep(0.05)
    if launch.returncode:
        told = run_dir.with_suffix(".log").read_text().strip().splitlines()[-1:]
        raise DataError(f"a run of which {made} ranks were killed ended with exit code {launch.returncode}: {told}")
    return made


def _step(run_dir: Path) -> int:
    """The last step that a run has logged."""
    spool = run_dir / "metrics.jsonl"
    return max((record["step"] for record in read_spool(spool)), default=0) if spool.exists() else 0


def _shards(sample: Path, config: RunConfig, crystals: int) -> Index:
    """Shards of the first perovskites."""
    from dist_train.backends.ray_voxelize import voxelize

    source = sample / "perov_5.parquet"
    found = [row for row in read_parquet_rows(source, 0, min(crystals, parquet_length(source))) if isinstance(row, Crystal)]
    table = Path(config.data.folder).with_name("few.parquet")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(table, found)
    changes = {"inputs": (str(table),), "splits": {"train": 0.9, "val": 0.1}}
    return voxelize(config.data.model_copy(update=changes), config.grid)


if __name__ == "__main__":
    be_deterministic()
    keep_memory()
    print(json.dumps({"samples_per_second": bare_loop(load_config(Path(sys.argv[1])))}))
