"""`TrainState`: the position of a run, a frozen value that is JSON in every checkpoint; and the schedules."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from math import cos, pi

from dist_train.config import TrainConfig


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With the config and the index it determines every later batch and random number.

    step: optimiser steps done; seed: of order and noise; data_digest: identity of the shards; model_digest: of the
    networks' configuration; skipped: steps skipped for a non-finite loss or gradient; in_a_row: those just before this
    step; damaged: samples passed over; validation_loss: at this very step, if it was validated; began: when the run was
    first started, in seconds since 1970; useful_seconds: time in the steps that led here, of all launches together.
    """

    step: int
    seed: int
    data_digest: str
    model_digest: str
    skipped: int = 0
    in_a_row: int = 0
    damaged: int = 0
    validation_loss: float | None = None
    began: float = 0.0
    useful_seconds: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """Inverse of `to_json`; what a checkpoint adds beside is left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in json.loads(text).items() if key in known})


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Rate of a step counted from 0: linear warm-up, then half a cosine that reaches zero after the last step."""
    warm = min(1.0, (step + 1) / max(train.warmup_steps, 1))
    return train.learning_rate * warm * 0.5 * (1.0 + cos(pi * step / steps))
