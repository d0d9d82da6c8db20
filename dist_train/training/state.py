"""`TrainState`: the position of a run, a frozen value that is JSON in every checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import cos, pi

from dist_train.config import TrainConfig


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With the config and the index it determines every later batch and random number.

    step: optimiser steps done; seed: of order and noise; data_digest: identity of the shards; model_digest: of the
    networks' configuration; layout: engine, ZeRO stage and ranks; skipped: steps skipped for a non-finite loss or gradient.
    """

    step: int
    seed: int
    data_digest: str
    model_digest: str
    layout: str
    skipped: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        return cls(**json.loads(text))


def kl_warmup(step: int, train: TrainConfig) -> float:
    """What the weight of the KL divergence is multiplied by in a step counted from 0: a line up to 1."""
    return min(1.0, (step + 1) / max(train.kl_warmup_steps, 1))


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Rate of a step counted from 0: linear warm-up, then half a cosine that reaches zero after the last step."""
    warm = min(1.0, (step + 1) / max(train.warmup_steps, 1))
    return train.learning_rate * warm * 0.5 * (1.0 + cos(pi * step / steps))
