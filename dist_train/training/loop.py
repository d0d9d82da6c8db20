"""The train loop, top to bottom, in the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from dist_train.config import RunConfig
from dist_train.errors import DistTrainError
from dist_train.models.autoencoder import CrystalBatch
from dist_train.models.objectives import PARTS, Noise, step_noise
from dist_train.models.reconstruct import Codec
from dist_train.progress import Progress
from dist_train.shards.reader import BatchPlan, ShardReader, collate, train_batches
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.engine import Engine, StepResult
from dist_train.training.state import TrainState, learning_rate
from dist_train.training.tracker import Tracker

VALIDATION_BATCH = 32
VALIDATED = ("loss", *PARTS, "count_exact", "composition_exact")


def fit(
    config: RunConfig, engine: Engine, train: ShardReader, val: ShardReader, tracker: Tracker,
    checkpoints: Checkpoints, state: TrainState,
) -> TrainState:  # fmt: skip
    """Train from `state` to the last step (or `stop_after_step`) and return the state reached, checkpointed.

    Raises DistTrainError after `max_nonfinite` steps in a row without a finite loss and gradient.
    """
    settings = config.train
    plan = batch_plan(config, train, engine.rank, engine.ranks)
    last = min(plan.steps, settings.stop_after_step or plan.steps)
    meter = Meter(settings.global_batch_size)
    in_a_row = 0
    with Progress("train", plan.steps, "steps", state.step, shown=engine.rank == 0) as progress:
        for step, batch in meter.timed(train_batches(train, plan, state.step, last)):
            rate = learning_rate(step, plan.steps, settings)
            result = engine.step(batch, _noise(config, engine, step, batch), rate)
            state = replace(state, step=step + 1, skipped=state.skipped + (not result.applied))
            in_a_row = 0 if result.applied else in_a_row + 1
            if in_a_row >= settings.max_nonfinite:
                raise DistTrainError(_nonfinite_message(in_a_row, step, train, plan))
            meter.add(result)
            progress.update(1, loss=f"{result.loss:.3f}", grad=f"{result.gradient_norm:.2f}", **meter.shown)
            if state.step % settings.log_every == 0 or state.step == last:
                tracker.log(state.step, {**meter.take(), "learning_rate": rate, "skipped": float(state.skipped)})
            if state.step % settings.validate_every == 0 or state.step == plan.steps:
                figures = validate(config, engine, val)
                tracker.log(state.step, figures)
                meter.shown["val_exact"] = f"{figures['val/composition_exact']:.1%}"
            if state.step % settings.checkpoint_every == 0 or state.step == last:
                checkpoints.save(engine, state)
    return state


def batch_plan(config: RunConfig, train: ShardReader, rank: int, ranks: int) -> BatchPlan:
    """The batches of a run. Raises ShardError where the training split doesn't fill one."""
    return BatchPlan(train.shapes, config.train.global_batch_size, config.train.epochs, config.seed, rank, ranks)


def _noise(config: RunConfig, engine: Engine, step: int, batch: CrystalBatch) -> Noise:
    """The noise of this rank's slice of a step's global batch."""
    share = config.train.global_batch_size // engine.ranks
    positions = range(engine.rank * share, (engine.rank + 1) * share)
    latent, shape = config.model.latent, batch.shape
    return step_noise(config.seed, step, positions, engine.objective.share, latent, shape, engine.device)


def _nonfinite_message(in_a_row: int, step: int, train: ShardReader, plan: BatchPlan) -> str:
    keys = [train.entries[place][1].key for place in plan.places(step)]
    return (
        f"{in_a_row} steps in a row had a non-finite loss or gradient and were skipped; the last, step {step}, held "
        f"{keys[:8]} on rank {plan.rank}; lower train.learning_rate or look at these samples"
    )


@dataclass
class Meter:
    """What is recorded now and then: the last step's losses, and since the last record throughput and waiting for data.

    The losses are of one step, not means of a window: a resumed run records the same numbers as an uninterrupted one.
    """

    global_batch: int
    shown: dict[str, str] = field(default_factory=dict)
    _results: list[StepResult] = field(default_factory=list)
    _waited: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def timed(self, batches: Iterable[tuple[int, CrystalBatch]]) -> Iterator[tuple[int, CrystalBatch]]:
        """The batches, with the wait for each measured."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            item = next(iterator, None)
            self._waited += time.perf_counter() - began
            if item is None:
                return
            yield item

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def take(self) -> dict[str, float]:
        """The metrics of now."""
        seconds, count, last = time.perf_counter() - self._since, len(self._results), self._results[-1]
        figures = {
            "train/loss": last.loss,
            **{f"train/{name}": value for name, value in last.parts.items()},
            "gradient_norm": last.gradient_norm,
            "samples_per_second": count * self.global_batch / seconds,
            "data_wait_percent": 100 * self._waited / seconds,
        }
        self._results, self._waited, self._since = [], 0.0, time.perf_counter()
        return figures


@torch.no_grad()
def validate(config: RunConfig, engine: Engine, val: ShardReader) -> dict[str, float]:
    """Losses and decoded accuracy of the averaged weights on the validation split, shared out among the ranks.

    composition_exact: crystals decoded with every atom's species right; count_exact: with the right number of atoms.
    """
    places = list(range(engine.rank, len(val), engine.ranks))
    sums = dict.fromkeys(VALIDATED, 0.0)  # all of them also on a rank that has no crystal: ranks add up in this order
    with engine.average.in_model():
        codec = Codec(engine.objective.model)
        for chosen in _of_one_shape(places, val):
            records = [val[place] for place in chosen]
            batch = collate(records)
            for name, value in _losses(config, engine, codec, batch, chosen).items():
                sums[name] += value * len(records)
            decoded = codec.crystals(codec.latents(batch.density_BCDHW, batch.cell_B6), [r.crystal.id for r in records])
            for found, record in zip(decoded, records, strict=True):
                if found.crystal is not None:
                    sums["count_exact"] += len(found.crystal) == len(record.crystal)
                    sums["composition_exact"] += found.crystal.composition == record.crystal.composition
        engine.objective.train()
    totals = engine.total([sums[name] for name in VALIDATED])
    return {f"val/{name}": total / len(val) for name, total in zip(VALIDATED, totals, strict=True)}


def _of_one_shape(places: list[int], val: ShardReader) -> Iterator[list[int]]:
    """The places in batches, each of crystals on grids of one shape."""
    shapes = val.shapes
    for _, group in groupby(sorted(places, key=lambda place: shapes[place]), key=lambda place: shapes[place]):
        alike = list(group)
        yield from (alike[start : start + VALIDATION_BATCH] for start in range(0, len(alike), VALIDATION_BATCH))


def _losses(config: RunConfig, engine: Engine, codec: Codec, batch: CrystalBatch, places: list[int]) -> dict[str, float]:
    """Loss and parts of validation crystals at the posterior mean."""
    share = 1.0 if engine.objective.share else 0.0
    noise = step_noise(config.seed, 0, places, share, codec.model.model.latent, batch.shape, engine.device)
    loss, parts = engine.loss(batch, replace(noise, latent_BL=torch.zeros_like(noise.latent_BL)))
    return {"loss": float(loss), **{name: float(value) for name, value in parts.items()}}
