"""How the small networks of a prior are fitted: an average of the weights, stopped where crystals held out say so."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

HELD_OUT = 10
"""Every tenth crystal chooses when to stop and is not fitted."""
AVERAGED, CHECKS = 0.005, 20

M = TypeVar("M", bound=nn.Module)


def split(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of those held out, at random, and of the others; of fewer than ten, all are both."""
    order = torch.randperm(n, generator=generator)
    held, fitted = order[: n // HELD_OUT], order[n // HELD_OUT :]
    return (held, fitted) if len(held) else (fitted, fitted)


class Fit(NamedTuple):
    """Settings of AdamW; the learning rate rises for a twentieth of the steps and falls to 0."""

    learning_rate: float
    weight_decay: float
    steps: int

    def run(self, model: M, loss: Callable[[], Tensor], error: Callable[[M], float], progress: Callable[[float], None]) -> M:
        """Of `CHECKS` averages of the weights, the one with the smallest `error`, ready for use.

        From few crystals, a network learns all by heart in the end. loss(): of `model` on a batch of its own choice.
        progress(error): one more step is done; the smallest error so far.
        """
        model.train()
        average = deepcopy(model).eval().requires_grad_(False)
        best, least = average, float("inf")
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, self.learning_rate, total_steps=self.steps + 1, pct_start=0.05
        )
        for step in range(1, self.steps + 1):
            value = loss()
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(weight.detach(), max(AVERAGED, 1 / step))
            if step % max(self.steps // CHECKS, 1) == 0:
                with torch.inference_mode():
                    found = error(average)
                if found < least:
                    best, least = deepcopy(average), found
            progress(least)
        return best
