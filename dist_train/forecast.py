"""`dist-train plan`: what a run will take, worked out before it: steps, memory, arithmetic, bytes, checkpoints, hours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

from dist_train.config import RunConfig
from dist_train.models.cost import activation_bytes, mean_flops, meta_model
from dist_train.shards.index import Index
from dist_train.shards.order import BatchPlan
from dist_train.training.engine import check_batch

FAILURES_PER_DEVICE_HOUR = 2.0e-5
"""Llama 3's training on 16,384 GPUs stopped 419 times in 54 days (Grattafiori et al. 2024)."""
UTILISATION = 0.35
"""Share of a device's arithmetic that training is taken to reach."""
CHECKPOINT_BYTES = 16
"""Of each number that is trained: weight, two moments and average in float32."""
COPY_BYTES_PER_S = 10e9
"""From a device into the host's memory, which is what training waits for at a checkpoint."""
MOST_WAITING = 0.02
"""Share of its time that training may wait for checkpoints without a warning."""
PERSISTENT_NUMBERS, BUCKET_NUMBERS = 100_000, 500_000_000
"""DeepSpeed's own values of stage3_param_persistence_threshold and reduce_bucket_size."""
KEPT_FREE = 0.1
"""Share of a device's memory for the allocator, the libraries and what an estimate leaves out."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. flops: that one device makes in a second; memory: bytes of one; network, disk: bytes a
    second of one rank; price: of a device and hour, in any currency."""

    flops: float
    memory: float
    network: float
    disk: float
    price: float


@dataclass(frozen=True)
class Forecast:
    """Figures of a run on `ranks` devices. Sizes in bytes; times in seconds unless the name says otherwise.

    memory_of_states: weights, gradients, optimiser and average on one rank, by ZeRO stage; memory_of_buckets: what
    DeepSpeed gathers gradients in before it sends them; checkpoint_every: Young's
    interval (1974) for the pause that a checkpoint makes, in steps, but never less than its writing takes.
    """

    ranks: int
    global_batch: int
    micro_batch: int
    parts: int
    samples: int
    left_out: int
    steps_per_epoch: int
    steps: int
    shapes: int
    shards: int
    shards_per_rank: float
    parameters: int
    trained: int
    stage: int
    memory_of_states: tuple[int, ...]
    memory_of_buckets: int
    memory_of_activations: float
    flops_per_sample: float
    step_seconds: float
    samples_per_second: float
    bytes_read_per_second: float
    gradient_bytes: int
    gradient_seconds: float
    checkpoint_bytes: int
    checkpoint_pause: float
    checkpoint_write: float
    checkpoint_every: int
    mtbf_hours: float
    hours: float
    cost: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return asdict(self)


def forecast(config: RunConfig, index: Index, ranks: int, zero: Mapping[str, Any], machine: Machine) -> Forecast:
    """Plan a run. zero: DeepSpeed's `zero_optimization`, with its stage.

    Raises ConfigError and ShardError where the batch or the split don't go with the ranks.
    """
    train, batch, micro = config.train, config.train.global_batch_size, check_batch(config, ranks)
    entries, shards, elements = index.samples("train"), index.split("train"), len(index.elements("train"))
    shapes = [(d, h, w) for _, sample in entries for d, h, w in [sample.shape]]
    order = BatchPlan(
        shapes, [len(shard.samples) for shard in shards], batch, train.epochs, config.seed, 0, ranks,
        config.data.shuffle_window, config.shape_group,
    )  # fmt: skip
    parameters = list(meta_model(config, elements).parameters())
    numbers, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    parts, stage = batch // ranks // micro, int(zero["stage"])
    persistent = zero.get("stage3_param_persistence_threshold", PERSISTENT_NUMBERS)
    kept = sum(p.numel() for p in parameters if p.numel() <= persistent)
    states = tuple(states_bytes(numbers, trained, ranks, s, train.precision, parts, kept) for s in range(4))
    largest = max(shapes, key=prod)
    activations = micro * activation_bytes(config, elements, largest)
    flops = mean_flops(config, elements, shapes)
    gradient = trained * (4 if train.precision == "fp32" or stage == 0 else 2)
    # Every scheme of all-reduce moves each number out of a rank and into it once, but for its own share.
    exchange = 2 * gradient * (ranks - 1) / ranks / machine.network
    step = batch / ranks * flops / machine.flops + exchange
    size = trained * CHECKPOINT_BYTES
    pause, write = size / ranks / COPY_BYTES_PER_S, size / ranks / machine.disk
    mtbf = 3600 / (FAILURES_PER_DEVICE_HOUR * ranks)
    every = max(1, round(max(write, sqrt(2 * pause * mtbf)) / step))
    read = sum(length for _, sample in entries for _, length in sample.members.values()) / len(entries)
    hours = order.steps * step / 3600
    found = Forecast(
        ranks, batch, micro, parts, len(entries), order.dropped, order.steps_per_epoch, order.steps, len(set(shapes)),
        len(shards), len(shards) / ranks, numbers, trained, stage, states,
        buckets_bytes(zero, train.precision, parts), activations, flops, step, batch / step,
        batch / step * read, gradient, exchange, size, pause, write, every, mtbf / 3600, hours,
        hours * ranks * machine.price, (),
    )  # fmt: skip
    return Forecast(**{**asdict(found), "warnings": tuple(_warnings(config, order, found, machine))})


def states_bytes(parameters: int, trained: int, ranks: int, stage: int, precision: str, parts: int, kept: int = 0) -> int:
    """Weights, gradients, AdamW's moments and average on one rank (Rajbhandari et al. 2020, section 5), in bytes.

    kept: numbers of the parameters that stage 3 leaves whole on every rank, as they are small. Stage 2 holds up to one
    parameter's gradient more: that of the parameter which two ranks share.
    """
    if stage == 0:  # float32 weights, with the rest of theirs, on every rank
        return 4 * parameters + trained * (4 + 8 + 4)
    low, share = 4 if precision == "fp32" else 2, 1 / ranks
    weights = low * (parameters * share + kept if stage == 3 else parameters)
    gradients = (4 if parts > 1 else low) * trained * (share if stage > 1 else 1)
    if stage == 1 and parts > 1 and low < 4:
        gradients += low * trained  # those of a part, beside the sums
    return round(weights + gradients + trained * (4 + 8 + 4) * share)


def buckets_bytes(zero: Mapping[str, Any], precision: str, parts: int) -> int:
    """DeepSpeed's buffers of gradients on one rank: as large as its settings say, whatever the model."""
    stage = zero["stage"]
    if not (stage and zero.get("contiguous_gradients", True)):
        return 0
    size = 4 if precision == "fp32" or (stage == 1 and parts > 1) else 2
    return int(zero.get("reduce_bucket_size", BUCKET_NUMBERS)) * size * (2 if stage < 3 and zero.get("overlap_comm") else 1)


def _warnings(config: RunConfig, order: BatchPlan, found: Forecast, machine: Machine) -> Iterator[str]:
    """What would go wrong, or is no good use of the machine."""
    states, every = found.memory_of_states, config.train.checkpoint_every
    needed = states[found.stage] + found.memory_of_buckets + found.memory_of_activations
    if needed > (1 - KEPT_FREE) * machine.memory:
        fits = [str(stage) for stage, size in enumerate(states) if size < states[found.stage]]
        more = f" or a higher ZeRO stage ({', '.join(fits)})" if fits else ""
        yield (
            f"{needed / 1e9:.1f} GB a rank are more than {1 - KEPT_FREE:.0%} of its {machine.memory / 1e9:.0f} GB: take a "
            f"train.micro_batch_size under {found.micro_batch}, train.activation_checkpointing{more}"
        )
    if order.never_seen:
        yield f"{order.never_seen} samples are of grid shapes that fill no train.shape_group: no epoch has them"
    if (share := found.gradient_seconds / found.step_seconds) > 0.25:
        yield f"gradients take {share:.0%} of a step on this network: fewer ranks or a larger train.global_batch_size"
    if every > 3 * found.checkpoint_every:
        yield f"train.checkpoint_every is {every}, the failure rate asks for about {found.checkpoint_every}"
    if (waits := found.checkpoint_pause / (every * found.step_seconds)) > MOST_WAITING:
        yield f"training waits for checkpoints {waits:.0%} of its time: raise train.checkpoint_every, now {every}"
    room, wanted = _free(config.run_dir), (config.train.keep_checkpoints + 2) * found.checkpoint_bytes
    if room < wanted:
        yield (
            f"{wanted / 1e9:.1f} GB of checkpoints on a disk with {room / 1e9:.1f} GB free: lower train.keep_checkpoints or "
            "free space"
        )


def _free(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
