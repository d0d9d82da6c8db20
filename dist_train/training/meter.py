"""What a run records of its own speed: samples, arithmetic, waiting, memory, and how much of its time was of use."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from dist_train.training.engine import Engine, StepResult
from dist_train.training.state import TrainState

T = TypeVar("T")


DEVICES = {"h200": (989e12, 141e9), "h100": (989e12, 80e9), "a100": (312e12, 80e9), "l40s": (362e12, 48e9)}
"""Dense bf16 FLOP a second, and bytes of memory, from the makers' data sheets."""


def peak_flops(device: torch.device, precision: str) -> float:
    """Dense FLOP a second of a GPU by its name, in bf16 or fp16; 0 for one that isn't known, for a CPU and in fp32."""
    if device.type != "cuda" or precision == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device).lower()
    return next((flops for known, (flops, _) in DEVICES.items() if known in name), 0.0)


@dataclass(frozen=True)
class Reduced:
    """A step's figures over all ranks: means of loss and parts, damaged samples, and whether any was asked to stop."""

    loss: float
    parts: dict[str, float]
    stop: bool
    damaged: int


def reduce_step(engine: Engine, result: StepResult, stop: bool, damaged: int) -> Reduced:
    """Bring a step's figures of all ranks together, in one vector, so that a GPU is waited for once."""
    told = torch.tensor([float(stop), float(damaged)], dtype=torch.float64, device=engine.device)
    values = torch.cat([torch.stack([result.loss, *result.parts.values()]).double(), told])
    loss, *parts, stops, all_damaged = engine.total(values)
    means = {name: value / engine.ranks for name, value in zip(result.parts, parts, strict=True)}
    return Reduced(loss / engine.ranks, means, stops > 0, round(all_damaged))


@dataclass
class Meter:
    """Counts from one record to the next.

    The losses of a record are of one step, not means of a window: a resumed run records the same numbers as an
    uninterrupted one. flops: of forward and backward pass for one crystal; peak: FLOP a second of one device. Either may
    be 0, when it isn't known.
    """

    engine: Engine
    global_batch: int
    flops: float = 0.0
    peak: float = 0.0
    _steps: int = 0
    _waited: float = 0.0
    _step_seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)
    _wait_began: float = 0.0
    saving: float = 0.0
    """Seconds that training has waited for checkpoints since this start."""

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the wait for each measured."""
        iterator = iter(batches)
        while True:
            self._wait_began = time.perf_counter()
            item = next(iterator, None)
            self._waited += time.perf_counter() - self._wait_began
            if item is None:
                return
            yield item

    def stepped(self) -> float:
        """Note the end of a step; the seconds that it took, the wait for its batch included."""
        seconds = time.perf_counter() - self._wait_began
        self._steps += 1
        self._step_seconds += seconds
        return seconds

    def take(self, state: TrainState) -> dict[str, float]:
        """Figures since the last call; memory and goodput since the start."""
        now = time.perf_counter()
        rate = self._steps * self.global_batch / (now - self._since)
        figures = {
            "samples_per_second": rate,
            "samples_per_second_rank": rate / self.engine.ranks,
            "data_wait_percent": 100 * self._waited / (now - self._since),
            "checkpoint_seconds": self.saving,
            "step_seconds": self._step_seconds / max(self._steps, 1),
            "memory_GiB": memory_GiB(self.engine.device),
            "goodput_percent": 100 * min(1.0, state.useful_seconds / max(time.time() - state.began, 1e-9)),
        }
        if self.flops:
            flops = rate / self.engine.ranks * self.flops
            figures["tflops_rank"] = flops / 1e12
            if self.peak:
                figures["mfu_percent"] = 100 * flops / self.peak
        self._steps, self._waited, self._step_seconds, self._since = 0, 0.0, 0.0, now
        return figures


def memory_GiB(device: torch.device) -> float:
    """Most memory in use so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
