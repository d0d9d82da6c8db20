"""What the train loop needs of an engine, and the plain PyTorch one (one process)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_train.config import RunConfig
from dist_train.errors import ConfigError
from dist_train.models.autoencoder import CrystalAutoencoder, CrystalBatch
from dist_train.models.objectives import Noise, Objective, prepare


@dataclass(frozen=True)
class StepResult:
    """Means over all ranks. `applied` is false where a non-finite loss or gradient made all ranks skip the update."""

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    applied: bool


class Engine(Protocol):
    """One rank's share of the training step. Every method is called by all ranks together."""

    rank: int
    ranks: int
    device: torch.device
    objective: Objective
    average: WeightAverage
    layout: str
    """Engine, ZeRO stage and ranks: a checkpoint is loaded into the same layout only."""

    def step(self, batch: CrystalBatch, noise: Noise, learning_rate: float) -> StepResult:
        """Forward, backward and update on this rank's slice of the global batch."""

    def loss(self, batch: CrystalBatch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of this rank's batch alone, in the number format of `step`."""

    def total(self, values: list[float]) -> list[float]:
        """Sums over ranks."""

    def save(self, folder: Path) -> None:
        """Write everything but the position (parameters, optimiser, average) into an existing folder."""

    def load(self, folder: Path) -> None:
        """Inverse of `save`, at the same number of ranks."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the process group."""


class WeightAverage:
    """Exponential moving average of a model's parameters, kept in float32 beside it.

    The decay starts at 0.1 and reaches `decay` as (1 + n) / (10 + n), so that the first weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages = list(self.average.values())
        current = [p.detach().float() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, current, 1.0 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model holds the average inside the block and its own weights again after it."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])

    def weights(self) -> dict[str, Tensor]:
        """The average in float32 on the CPU, by the model's parameter names."""
        return {name: value.cpu() for name, value in self.average.items()}

    def state(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW of what is trained; biases are spared the weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    plain = [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.train.learning_rate)


class TorchEngine:
    """Plain PyTorch in one process; bf16 by autocast over float32 weights."""

    rank, ranks, layout = 0, 1, "torch, 1 rank"

    def __init__(self, model: CrystalAutoencoder, config: RunConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.objective = prepare(Objective(model.to(self.device), config.train, self.device, self.dtype), config.train)
        self.optimizer = make_optimizer(model, config)
        self.average = WeightAverage(model, config.train.ema_decay)
        self.clip = config.train.gradient_clip

    def step(self, batch: CrystalBatch, noise: Noise, learning_rate: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self.loss(batch, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip))
        applied = bool(torch.isfinite(loss)) and norm < float("inf")
        if applied:
            self.optimizer.step()
            self.average.update()
        return StepResult(loss.item(), {k: float(v) for k, v in parts.items()}, norm, applied)

    def loss(self, batch: CrystalBatch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            found: tuple[Tensor, dict[str, Tensor]] = self.objective(batch.to(self.device), noise)
        return found

    def total(self, values: list[float]) -> list[float]:
        return values

    def save(self, folder: Path) -> None:
        state = {
            "model": self.objective.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state(),
        }
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        from dist_train.training.checkpoint import load_tensors

        state = load_tensors(folder / "state.pt", self.device)
        self.objective.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.restore(state["average"])

    def barrier(self) -> None:
        return

    def close(self) -> None:
        return


def check_batch(config: RunConfig, ranks: int) -> int:
    """Crystals a rank takes of each global batch. Raises ConfigError where they, or the U-Net's share, don't divide."""
    batch, share = config.train.global_batch_size, config.train.unet_share
    if batch % ranks:
        raise ConfigError(f"train.global_batch_size {batch} can't be divided among {ranks} ranks; set a multiple of {ranks}")
    seen = batch // ranks * share
    if seen < 1 or abs(seen - round(seen)) > 1e-6:
        raise ConfigError(
            f"train.unet_share {share} of the {batch // ranks} crystals of each of {ranks} ranks is {seen:.4g}, not a whole "
            "number; set another share or train.global_batch_size"
        )
    return batch // ranks
