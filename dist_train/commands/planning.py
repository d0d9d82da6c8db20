"""The verb plan: a forecast of a run as a table, for a named device or this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import psutil
import torch

from dist_train.commands.launch import rank_environment
from dist_train.commands.training import build_model, check_training, keep_memory
from dist_train.config import RunConfig
from dist_train.forecast import UTILISATION, Forecast, Machine, forecast
from dist_train.models.cost import flops_per_sample
from dist_train.models.objectives import step_noise
from dist_train.shards.batches import train_batches
from dist_train.shards.index import Index
from dist_train.shards.order import BatchPlan
from dist_train.shards.reader import ShardReader
from dist_train.training.engine import TorchEngine, check_batch
from dist_train.training.meter import DEVICES

ROUNDS, FEW_ROUNDS = 5, 2
"""Steps that are measured, after a first one."""
WORTHWHILE = 1.1
HERE = "here"


def plan(
    config: RunConfig, ranks: int, device: str = "h200", utilisation: float = UTILISATION, network_GBs: float = 25.0,
    disk_GBs: float = 1.0, price: float = 0.0, as_json: bool = False,
) -> str:  # fmt: skip
    """The forecast of a run on `ranks` devices, as a table or JSON.

    device: one of DEVICES, of whose arithmetic `utilisation` is reached, or 'here': what this machine makes of a few steps.
    Raises the error of whatever would stop the run before its first step.
    """
    index, warnings = check_training(config, ranks), list[str]()
    if device == HERE:
        flops, memory = measure(config, index, ranks), psutil.virtual_memory().total / ranks
        warnings += faster_precision(config, index, ranks, flops)
    else:
        peak, memory = DEVICES[device]
        flops = peak * utilisation
    zero = {"stage": 0}
    if config.engine.name == "deepspeed":
        from dist_train.backends.deepspeed_engine import deepspeed_config

        zero = deepspeed_config(config, ranks)["zero_optimization"]
    found = forecast(config, index, ranks, zero, Machine(flops, memory, network_GBs * 1e9, disk_GBs * 1e9, price))
    found = replace(found, warnings=(*found.warnings, *warnings))
    return json.dumps(found.as_json(), indent=1) if as_json else table(found, device)


def faster_precision(config: RunConfig, index: Index, ranks: int, flops: float) -> Iterator[str]:
    """A warning where float32 is faster than bf16, as on CPUs that don't multiply matrices of it (AMX); flops: with bf16."""
    if config.train.precision != "bf16" or torch.cuda.is_available():
        return
    train = config.train.model_copy(update={"precision": "fp32"})
    ratio = measure(config.model_copy(update={"train": train}), index, ranks, FEW_ROUNDS) / flops
    if ratio > WORTHWHILE:
        yield f"train.precision=fp32 is {ratio:.1f} times as fast as bf16 on this machine: its CPU has no fast bf16"


def measure(config: RunConfig, index: Index, ranks: int, rounds: int = ROUNDS) -> float:
    """FLOP a second that a rank of this machine, with its share of the cores, makes of one part of a step."""
    threads, micro = torch.get_num_threads(), check_batch(config, ranks)
    keep_memory()
    torch.set_num_threads(int(rank_environment(ranks)["OMP_NUM_THREADS"]))
    try:
        reader = ShardReader(index, "train")
        order = BatchPlan(reader.shapes, reader.shard_sizes, micro, 1, config.seed, 0, 1, config.data.shuffle_window)
        engine = TorchEngine(build_model(config, index, reader), config)
        seconds, flops = [], 0.0
        for item in train_batches(reader, order, 0, min(rounds + 1, order.steps), engine.device):
            batch = item.batch.to(engine.device)
            share, latent = engine.objective.share, config.model.latent_size
            noise = step_noise(config.seed, item.step, range(micro), share, latent, batch.shape, engine.device)
            began = time.perf_counter()
            engine.step([(batch, noise)], config.train.learning_rate, 1.0)
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            flops = micro * flops_per_sample(config, len(index.elements("train")), batch.shape)
            seconds.append((time.perf_counter() - began) / flops)
        return 1 / median(seconds[1:] or seconds)  # the first one also makes the optimiser's state
    finally:
        torch.set_num_threads(threads)


def table(found: Forecast, device: str) -> str:
    """The forecast for a terminal."""
    states = found.memory_of_states
    rows: list[tuple[str, str]] = [
        ("batch", f"{found.global_batch} crystals a step = {found.ranks} ranks x {found.parts} x {found.micro_batch}"),
        ("data", f"{found.samples:,} samples of {found.shapes} grid shapes in {found.shards} shards, "
                 f"{found.shards_per_rank:.1f} a rank; {found.left_out:,} left out of an epoch"),
        ("steps", f"{found.steps:,} = {found.steps // found.steps_per_epoch} epochs x {found.steps_per_epoch:,}"),
        ("parameters", f"{found.parameters / 1e6:.2f} M, {found.trained / 1e6:.2f} M of them trained"),
        ("memory a rank", f"{_bytes(states[found.stage])} of states at ZeRO {found.stage}"
                          f" + {_bytes(found.memory_of_buckets)} of DeepSpeed's buckets"
                          f" + {_bytes(found.memory_of_activations)} of activations"),
        ("", "states at ZeRO " + ", ".join(f"{stage}: {_bytes(size)}" for stage, size in enumerate(states))),
        ("arithmetic", f"{found.flops_per_sample / 1e9:.2f} GFLOP a crystal, forward and backward"),
        ("speed", f"{_time(found.step_seconds)} a step, {found.samples_per_second:,.1f} crystals/s in all ({device})"),
        ("reading", f"{_bytes(found.bytes_read_per_second)}/s in all"),
        ("gradients", f"{_bytes(found.gradient_bytes)} a step and rank, {_time(found.gradient_seconds)} on the network"),
        ("checkpoint", f"{_bytes(found.checkpoint_bytes)}; training waits {_time(found.checkpoint_pause)}, it is written in "
                       f"{_time(found.checkpoint_write)}"),
        ("", f"one failure in {found.mtbf_hours:,.0f} h: one every {found.checkpoint_every:,} steps "
             f"({_time(found.checkpoint_every * found.step_seconds)})"),
        ("in all", f"{_time(found.hours * 3600)}, {found.hours * found.ranks:,.1f} device hours"
                   + (f", {found.cost:,.0f} at the given price" if found.cost else "")),
    ]  # fmt: skip
    lines = [f"{name:<14} {text}" for name, text in rows]
    return "\n".join([*lines, *(f"WARNING: {text}" for text in found.warnings)])


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _time(seconds: float) -> str:
    for limit, unit, size in ((1e-3, "us", 1e-6), (1.0, "ms", 1e-3), (120.0, "s", 1.0), (7200.0, "min", 60.0)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.1f} h"
