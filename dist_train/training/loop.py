"""The train loop, top to bottom, in the order in which things happen."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import torch

from dist_train.config import RunConfig
from dist_train.crystal.structure import Crystal
from dist_train.errors import DistTrainError, Interrupted
from dist_train.models.autoencoder import CrystalBatch
from dist_train.models.cost import mean_flops
from dist_train.models.objectives import PARTS, Objective, step_noise
from dist_train.models.reconstruct import Codec, calibrate
from dist_train.models.structure_batch import StructureBatch
from dist_train.progress import Progress
from dist_train.shards.batches import collate, train_batches
from dist_train.shards.order import BatchPlan
from dist_train.shards.reader import DamagedSample, Record, ShardReader, whole
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.engine import Engine, Part, check_batch
from dist_train.training.guard import StopRequest, Watchdog
from dist_train.training.meter import Meter, peak_flops, reduce_step
from dist_train.training.state import TrainState, kl_warmup, learning_rate
from dist_train.training.tracker import Tracker

log = logging.getLogger(__name__)
VALIDATION_BATCH = 32
CALIBRATED = 256
"""Validation crystals that tell how far off a model's estimates are."""
DECODED = ("count_exact", "composition_exact")


def fit(
    config: RunConfig, engine: Engine, train: ShardReader, val: ShardReader, tracker: Tracker,
    checkpoints: Checkpoints, state: TrainState,
) -> TrainState:  # fmt: skip
    """Train from `state` to the last step (or `stop_after_step`) and return the state reached, checkpointed.

    Raises DistTrainError after `max_nonfinite` steps in a row without a finite loss and gradient, and Interrupted, after a
    checkpoint, where SIGTERM or SIGUSR1 was sent to any rank.
    """
    settings = config.train
    plan = batch_plan(config, train, engine.rank, engine.ranks)
    last = min(plan.steps, settings.stop_after_step or plan.steps)
    meter = Meter(engine, settings.global_batch_size, *arithmetic(config, engine, train))
    shown, data = {}, config.data
    with (
        Progress("train", plan.steps, "steps", state.step, shown=engine.rank == 0) as progress,
        Watchdog(settings.watchdog_seconds) as watchdog,
        StopRequest() as stop,
    ):
        batches = train_batches(
            train, plan, state.step, last, engine.device, data.reader_threads, data.max_damaged, settings.substitution
        )
        for step, parts, damaged in meter.timed(batches):
            for message in damaged:
                log.warning("passed over at step %d: %s", step, message)
            rate, kl_weight = learning_rate(step, plan.steps, settings), kl_warmup(step, settings)
            result = engine.step(list(_forward_parts(config, engine, step, parts)), rate, kl_weight)
            reduced = reduce_step(engine, result, stop.made, len(damaged))
            state = replace(
                state,
                step=step + 1,
                skipped=state.skipped + (not result.applied),
                in_a_row=0 if result.applied else state.in_a_row + (not result.rescaled),
                damaged=state.damaged + reduced.damaged,
                validation_loss=None,
                useful_seconds=state.useful_seconds + meter.stepped(),
            )
            if state.in_a_row >= settings.max_nonfinite:
                raise DistTrainError(_nonfinite_message(state.in_a_row, step, train, plan))
            done = state.step == last or reduced.stop
            if state.step % settings.log_every == 0 or done:
                figures = {"train/loss": reduced.loss, **{f"train/{name}": value for name, value in reduced.parts.items()}}
                figures |= {"gradient_norm": result.gradient_norm, "learning_rate": rate}
                figures |= {"skipped": float(state.skipped), "damaged": float(state.damaged)}
                speed = meter.take(state)
                tracker.log(state.step, figures | speed)
                shown["samples/s"] = f"{speed['samples_per_second']:.1f}"
            if state.step % settings.validate_every == 0 or state.step == plan.steps:
                found = validate(config, engine, val)
                tracker.log(state.step, found)
                state = replace(state, validation_loss=found["val/loss"])
                exact = found.get("val/composition_exact")
                shown |= {"val_loss": f"{found['val/loss']:.3f}"} if exact is None else {"val_exact": f"{exact:.1%}"}
            if state.step % settings.checkpoint_every == 0 or done:
                began = time.perf_counter()
                checkpoints.save(engine, state)
                meter.saving += time.perf_counter() - began
            progress.update(1, loss=f"{reduced.loss:.3f}", grad=f"{result.gradient_norm:.2f}", **shown)
            watchdog.beat()
            if reduced.stop:
                checkpoints.wait()
                raise Interrupted(f"asked to stop after step {state.step}; the same command goes on from there")
        checkpoints.wait()
    return state


def batch_plan(config: RunConfig, train: ShardReader, rank: int, ranks: int) -> BatchPlan:
    """The batches of a run. Raises ShardError where the training split doesn't fill one."""
    settings = config.train
    return BatchPlan(
        train.shapes, train.shard_sizes, settings.global_batch_size, settings.epochs, config.seed, rank, ranks,
        config.data.shuffle_window, config.shape_group,
    )  # fmt: skip


def arithmetic(config: RunConfig, engine: Engine, train: ShardReader) -> tuple[float, float]:
    """FLOP of a crystal, in the mean over the training split, and FLOP a second of this rank's device; 0 if unknown."""
    shapes = [(d, h, w) for d, h, w in train.shapes]
    return mean_flops(config, len(engine.objective.model.elements), shapes), peak_flops(
        engine.device, config.train.precision
    )


def _forward_parts(
    config: RunConfig, engine: Engine, step: int, parts: Sequence[CrystalBatch | StructureBatch]
) -> Iterator[Part]:
    """This rank's slice of a step's global batch in parts of the size of a forward pass, each with its noise."""
    micro, latent = check_batch(config, engine.ranks), config.model.latent_size
    position = engine.rank * sum(part.size for part in parts)
    for part in parts:
        batch = part.to(engine.device)
        for start in range(0, batch.size, micro):
            positions = range(position, position + micro)
            noise = step_noise(config.seed, step, positions, engine.objective.share, latent, batch.shape, engine.device)
            yield batch.rows(slice(start, start + micro)), noise
            position += micro


def _nonfinite_message(in_a_row: int, step: int, train: ShardReader, plan: BatchPlan) -> str:
    keys = [train.entries[place][1].key for place in plan.places(step)]
    return (
        f"{in_a_row} steps in a row had a non-finite loss or gradient and were skipped; the last, step {step}, held "
        f"{keys[:8]} on rank {plan.rank}; lower train.learning_rate or look at these samples"
    )


@torch.no_grad()
def validate(config: RunConfig, engine: Engine, val: ShardReader) -> dict[str, float]:
    """Losses and decoded accuracy of the averaged weights on the validation split, shared out among the ranks.

    composition_exact: crystals decoded with every atom's species right; count_exact: with the right number of atoms (both
    left out where the objective trains no U-Net); crystals: how many there are, damaged samples left out.
    """
    places = list(range(engine.rank, len(val), engine.ranks))
    codec = Codec(engine.averaged())
    objective = Objective(codec.model, config.train, engine.device, torch.float32).eval()
    if objective.share:
        calibrate(codec, for_calibration(val))
    # All of them also on a rank that has no crystal: ranks add up in this order.
    names = ("loss", *PARTS, *(DECODED if objective.share else ()), "crystals")
    sums = dict.fromkeys(names, 0.0)
    for chosen in _of_one_shape(places, val):
        found: dict[int, Record] = {}
        for place in chosen:
            with suppress(DamagedSample):
                found[place] = val[place]
        if not found:
            continue
        records = list(found.values())
        sums["crystals"] += len(records)
        batch = collate(records).to(engine.device)
        for name, value in _losses(config, engine, objective, batch, list(found)).items():
            sums[name] += value * len(records)
        if not objective.share:
            continue
        decoded = codec.crystals(codec.latents(batch.density_BCDHW, batch.cell_B6), [r.crystal.id for r in records])
        for made, record in zip(decoded, records, strict=True):
            if made.crystal is not None:
                sums["count_exact"] += len(made.crystal) == len(record.crystal)
                sums["composition_exact"] += made.crystal.composition == record.crystal.composition
    *totals, crystals = engine.total(torch.tensor(list(sums.values()), dtype=torch.float64, device=engine.device))
    means = {f"val/{name}": total / max(crystals, 1.0) for name, total in zip(names[:-1], totals, strict=True)}
    return means | {"val/crystals": crystals}


def for_calibration(val: ShardReader) -> list[Crystal]:
    """Some validation crystals, spread over all of them, the same on all ranks."""
    return whole(val.crystal, range(0, len(val), -(-len(val) // CALIBRATED) or 1))


def _of_one_shape(places: list[int], val: ShardReader) -> Iterator[list[int]]:
    """The places in batches, each of crystals on grids of one shape."""
    shapes = val.shapes
    for _, group in groupby(sorted(places, key=lambda place: shapes[place]), key=lambda place: shapes[place]):
        alike = list(group)
        yield from (alike[start : start + VALIDATION_BATCH] for start in range(0, len(alike), VALIDATION_BATCH))


def _losses(
    config: RunConfig, engine: Engine, objective: Objective, batch: CrystalBatch, places: list[int]
) -> dict[str, float]:
    """Loss and parts of validation crystals at the posterior mean, in the number format of training."""
    share = 1.0 if objective.share else 0.0
    noise = step_noise(config.seed, 0, places, share, config.model.latent_size, batch.shape, engine.device)
    with torch.autocast(engine.device.type, engine.dtype, enabled=engine.dtype != torch.float32):
        loss, parts = objective(batch, replace(noise, latent_BL=torch.zeros_like(noise.latent_BL)))
    return {"loss": float(loss), **{name: float(value) for name, value in parts.items()}}
