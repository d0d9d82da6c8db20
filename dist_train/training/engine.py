"""What the train loop needs of an engine, and the plain PyTorch one (one process).

A rank holds *pieces*: runs of the flattened parameters in float32 with their optimiser state. Every number of every trained
parameter is in exactly one piece, of one rank or of each, whatever the engine and its ZeRO stage. The average of the
weights, the checkpoints and the export are made of pieces, so none of them depends on the engine or the number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_train.config import RunConfig
from dist_train.errors import ConfigError
from dist_train.models.autoencoder import CrystalAutoencoder, CrystalBatch
from dist_train.models.objectives import Noise, Objective, prepare

T = TypeVar("T")
Part = tuple[CrystalBatch, Noise]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a number besides the number itself."""


@dataclass(frozen=True, eq=False)
class Piece:
    """numbers [start, start + n) of a flattened parameter: float32 views, [n] each, of the weight and of AdamW's moments."""

    name: str
    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.weight)


@dataclass(frozen=True)
class StepResult:
    """One rank's step. loss and parts are means over this rank's crystals; the others are equal on all ranks.

    applied: false where a non-finite loss or gradient made all ranks skip the update. rescaled: they did so only because
    the loss scale of fp16 was too high, and it was lowered.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    gradient_norm: float
    applied: bool
    rescaled: bool = False


class Engine(ABC):
    """One rank's share of the training step. Every method but `agree` is called by all ranks together, in one thread.

    objective: model and loss; shapes: of the trained parameters, by name, in the model's order; pieces: what this rank
    holds of them; replicated: whether that is all of them, on every rank; average: of the weights, in the same pieces.
    """

    rank, ranks, replicated = 0, 1, True

    def __init__(self, model: CrystalAutoencoder, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.objective = prepare(Objective(model.to(device), config.train, device, dtype), config.train)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._fixed = {name: value.cpu() for name, value in model.state_dict().items() if name not in self.shapes}
        self.pieces: list[Piece] = []
        self.updates = 0

    def start(self) -> None:
        """To be called by a subclass once its optimiser is there."""
        self.pieces = self.find_pieces()
        self.average = WeightAverage(self.pieces, self.config.train.ema_decay)

    @abstractmethod
    def find_pieces(self) -> list[Piece]:
        """This rank's pieces, in the order of the model's parameters; made once."""

    @abstractmethod
    def step(self, parts: Sequence[Part], learning_rate: float, kl_weight: float) -> StepResult:
        """Forward and backward for each part of this rank's slice of the global batch, parts of one size; one update."""

    @abstractmethod
    def refresh(self) -> None:
        """Tell the optimiser and the networks, on all ranks, that `updates` and the pieces were written."""

    def stepped(self, found: Sequence[tuple[Tensor, dict[str, Tensor]]], norm: float, applied: bool) -> StepResult:
        """The end of a step: the average follows an update. found: the loss of each part of the batch, and its parts."""
        if applied:
            self.average.update(self.updates)
            self.updates += 1
        loss, *values = torch.stack([torch.stack([loss.detach(), *named.values()]) for loss, named in found]).mean(0)
        return StepResult(loss, dict(zip(found[0][1], values, strict=True)), norm, applied)

    def whole(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of every trained parameter from the pieces of all ranks; `values` replace the weights."""
        mine: dict[str, list[tuple[Piece, Tensor]]] = {}
        for piece, value in zip(self.pieces, values, strict=True):
            mine.setdefault(piece.name, []).append((piece, value))
        for name, shape in self.shapes.items():
            full = torch.zeros(shape.numel(), device=self.device)
            for piece, value in mine.get(name, ()):
                full[piece.start : piece.stop] = value
            if not self.replicated:
                self.add_bits(full)
            yield name, full.view(shape)

    def averaged(self) -> CrystalAutoencoder:
        """A model of its own with the averaged weights, in float32 on this device, equal on all ranks."""
        model = CrystalAutoencoder.from_config(self.objective.model.config())
        model.load_state_dict(self._fixed | dict(self.whole(self.average.values)))
        return model.to(self.device).eval()

    def add_bits(self, tensor: Tensor) -> None:
        """Replace a float32 tensor that is zero but on one rank, number by number, by that rank's, bit for bit."""
        return

    def total(self, values: Tensor) -> list[float]:
        """Sums over ranks of a vector of float64 on the device."""
        return list(values.tolist())

    def agree(self, value: T) -> list[T]:
        """Every rank's value, on all ranks; for one thread beside the training thread."""
        return [value]

    def scaler(self) -> dict[str, Any]:
        """State of the loss scale, ready for JSON; empty where there is none."""
        return {}

    def set_scaler(self, state: dict[str, Any]) -> None:
        """Inverse of `scaler`."""
        return

    def close(self) -> None:
        """Leave the process group."""
        return


class WeightAverage:
    """Exponential moving average of the pieces' weights, in float32.

    The decay starts at 0.1 and reaches `decay` as (1 + n) / (10 + n) after n updates: the first weights are forgotten.
    """

    def __init__(self, pieces: Sequence[Piece], decay: float) -> None:
        self.decay = decay
        self.weights = [piece.weight for piece in pieces]
        self.values = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """updates: those made before this one."""
        if self.values:
            decay = min(self.decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_(self.values, self.weights, 1.0 - decay)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW over whole gradients that clips their norm first and, where it isn't finite, changes nothing.

    `_global_grad_norm` and `overflow` tell of the last step, by the names under which DeepSpeed looks for them.
    """

    def __init__(self, groups: Any, lr: float, clip: float) -> None:
        super().__init__(groups, lr=lr, fused=True)
        self.clip, self.overflow, self._global_grad_norm = clip, False, 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip))
        self.overflow = not isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step(closure)


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Trained parameters for AdamW; biases are spared the weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.train.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def with_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter in a fused AdamW, made now where the first step would make it."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.tensor(0.0, device=parameter.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter)
    return state


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """The number of updates that AdamW's bias correction goes by."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def plain_pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Piece]:
    """Whole parameters as pieces, where a plain optimiser holds them all."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = with_state(optimizer, parameter)
            found.append(Piece(name, 0, *(t.view(-1) for t in (parameter.detach(), *(state[key] for key in MOMENTS)))))
    return found


class TorchEngine(Engine):
    """Plain PyTorch in one process; bf16 by autocast over float32 weights."""

    def __init__(self, model: CrystalAutoencoder, config: RunConfig) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(model, config, device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
        train = config.train
        self.optimizer = ClippedAdamW(parameter_groups(model, config), train.learning_rate, train.gradient_clip)
        self.start()

    def find_pieces(self) -> list[Piece]:
        return plain_pieces(self.objective.model, self.optimizer)

    def step(self, parts: Sequence[Part], learning_rate: float, kl_weight: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        for batch, noise in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                found.append(self.objective(batch, noise, kl_weight))
            (found[-1][0] / len(parts)).backward()
        self.optimizer.step()
        return self.stepped(found, self.optimizer._global_grad_norm, not self.optimizer.overflow)

    def refresh(self) -> None:
        set_updates(self.optimizer, self.updates)


def check_batch(config: RunConfig, ranks: int) -> int:
    """Crystals of a forward pass on each rank.

    Raises ConfigError where they, or the U-Net's share of them, don't divide.
    """
    batch, share, group = config.train.global_batch_size, config.train.unet_share, config.shape_group
    if batch % group:
        raise ConfigError(f"train.shape_group {group} doesn't divide train.global_batch_size {batch}; set a divisor of that")
    if batch % ranks:
        raise ConfigError(f"train.global_batch_size {batch} can't be divided among {ranks} ranks; set a multiple of {ranks}")
    micro = config.train.micro_batch_size or gcd(batch // ranks, group)
    if batch // ranks % micro:
        raise ConfigError(
            f"train.micro_batch_size {micro} doesn't divide the {batch // ranks} crystals of each of {ranks} ranks "
            f"(train.global_batch_size {batch}); set a divisor of {batch // ranks}"
        )
    if group % micro:
        raise ConfigError(
            f"train.micro_batch_size {micro} doesn't divide the {group} crystals of one grid shape (train.shape_group); "
            f"set a divisor of {group}"
        )
    seen = micro * share
    if config.train.objective != "vae" and (seen < 1 or abs(seen - round(seen)) > 1e-6):
        raise ConfigError(
            f"train.unet_share {share} of the {micro} crystals of a forward pass is {seen:.4g}, not a whole number; set "
            f"another share, train.global_batch_size (now {batch} on {ranks} ranks) or train.micro_batch_size"
        )
    return micro
