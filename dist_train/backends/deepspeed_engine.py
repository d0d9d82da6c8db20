"""The DeepSpeed engine: data parallel over any number of ranks, ZeRO, bf16. The only file that imports deepspeed."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_train.config import RunConfig
from dist_train.errors import ConfigError, DistTrainError
from dist_train.models.autoencoder import CrystalAutoencoder
from dist_train.ranks import place
from dist_train.training.engine import (
    MOMENTS,
    ClippedAdamW,
    Engine,
    Part,
    Piece,
    StepResult,
    check_batch,
    parameter_groups,
    plain_pieces,
    set_updates,
    with_state,
)

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scale consists of."""
SIDE_TIMEOUT = timedelta(hours=6)
"""A rank may write its part of a checkpoint much faster than another."""

OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "managed_gradient_accumulation": "train.micro_batch_size",
    "data_types": "train.precision",
    "gradient_clipping": "train.gradient_clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate",
    "scheduler": "train.learning_rate",
}
"""Keys of a DeepSpeed JSON that RunConfig owns, and where each belongs."""


ZERO_STAGES = (0, 1, 2, 3)


def init_process_group() -> tuple[int, int]:
    """(rank, ranks) of this process, joined to the others; a process without a launcher is a group of one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    place()
    import deepspeed
    import deepspeed.ops

    # DeepSpeed calls collectives under names that torch renames; nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Without this DeepSpeed compiles a shared-memory collective (over a minute) that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    except torch.distributed.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistTrainError(
            f"the ranks can't meet at {where}: {str(error).splitlines()[0]}; "
            "give the launcher a free --master_port (dist-train launch: --port)"
        ) from None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def deepspeed_config(config: RunConfig, ranks: int) -> dict[str, Any]:
    """The DeepSpeed JSON with the numbers of RunConfig added.

    Raises ConfigError where the JSON can't be read or repeats a number that RunConfig owns.
    """
    path, extra = config.engine.deepspeed_json, {}
    if path is not None:
        try:
            extra = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"engine.deepspeed_json {path} can't be read: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"engine.deepspeed_json {path} holds a {type(extra).__name__}, not an object")
    for key in extra.keys() & OWNED_KEYS.keys():
        raise ConfigError(f"{path} sets {key!r}, which {OWNED_KEYS[key]} of the run file decides: remove it from {path}")
    stage = extra.setdefault("zero_optimization", {}).setdefault("stage", 1)
    if stage not in ZERO_STAGES:
        raise ConfigError(f"{path} sets ZeRO stage {stage}, known are {', '.join(map(str, ZERO_STAGES))}")
    precision = config.train.precision
    if precision == "fp16" and not stage:
        raise ConfigError("train.precision 'fp16' needs ZeRO stage 1 to 3, which keep float32 weights beside; set stage 1")
    micro, batch = check_batch(config, ranks), config.train.global_batch_size
    parts = batch // ranks // micro
    return {
        **extra,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": parts,
        # The train loop says where a step ends; many small gradients are added up in float32.
        "managed_gradient_accumulation": False,
        "data_types": {"grad_accum_dtype": "fp32" if parts > 1 else None},
        # At stage 0 DeepSpeed would clip, but neither report the norm nor skip a step: ClippedAdamW does all three.
        "gradient_clipping": config.train.gradient_clip if stage else 0.0,
        # Stage 0 has no float32 weights beside those of the networks, so these stay float32.
        "bf16": {"enabled": precision == "bf16" and stage > 0},
        "torch_autocast": {"enabled": precision == "bf16" and stage == 0, "dtype": "bfloat16"},
        "fp16": {"enabled": precision == "fp16"},
    }


class DeepSpeedEngine(Engine):
    """The Engine on deepspeed.initialize; the process group must be there (`init_process_group`)."""

    def __init__(self, model: CrystalAutoencoder, config: RunConfig) -> None:
        import deepspeed

        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        super().__init__(model, config, device, DTYPES[config.train.precision])
        settings = deepspeed_config(config, self.ranks)
        self.stage = settings["zero_optimization"]["stage"]
        self.replicated = self.stage == 0
        groups, train = parameter_groups(model, config), config.train
        self.optimizer = (
            ClippedAdamW(groups, train.learning_rate, train.gradient_clip)
            if self.stage == 0
            else torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
        )
        with redirect_stdout(io.StringIO()):  # where some stages print how much memory is in use
            self.engine, *_ = deepspeed.initialize(model=self.objective, optimizer=self.optimizer, config=settings)
        # Checkpoints are agreed on in a thread of their own, which must not mix with the collectives of training.
        self.side = torch.distributed.new_group(backend="gloo", timeout=SIDE_TIMEOUT)
        self.start()

    def find_pieces(self) -> list[Piece]:
        if self.stage == 0:
            return plain_pieces(self.objective.model, self.optimizer)
        find = self._partitions if self.stage == 3 else self._fragments
        named = [(name, p) for name, p in self.objective.model.named_parameters() if p.requires_grad]
        return [piece for name, parameter in named for piece in find(name, parameter)]

    def _fragments(self, name: str, parameter: Any) -> Iterator[Piece]:
        """Up to stage 2: the part of a parameter in this rank's run of all parameters of its group, laid end to end."""
        if (mapping := parameter._hp_mapping) is not None:
            (run,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
            state, where = with_state(self.optimizer, run), mapping.hp_fragment_address
            tensors = (run.detach(), *(state[key] for key in MOMENTS))
            yield Piece(name, mapping.lp_fragment_address.start, *(t.narrow(0, where.start, where.numel) for t in tensors))

    def _partitions(self, name: str, parameter: Any) -> Iterator[Piece]:
        """Stage 3: every parameter is cut into equal parts, the last of them filled up."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for run in parameter._z3_optimizer.fp32_partitioned_groups_flat:
            with_state(self.optimizer, run)
        weight = safe_get_local_fp32_param(parameter).detach()
        start = self.rank * len(weight)
        size = min(len(weight), parameter.ds_numel - start)
        if size > 0:
            moments = (safe_get_local_optimizer_state(parameter, key) for key in MOMENTS)
            yield Piece(name, start, *(t.narrow(0, 0, size) for t in (weight, *moments)))

    def step(self, parts: Sequence[Part], learning_rate: float, kl_weight: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        found = []
        for batch, noise in parts:
            found.append(self.engine(batch, noise, kl_weight))
            self.engine.backward(found[-1][0] / len(parts), scale_wrt_gas=False)
        scale = self._scale()
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        result = self.stepped(found, float(self.engine.get_global_grad_norm()), applied)
        return replace(result, rescaled=not applied and self._scale() < scale)

    def refresh(self) -> None:
        import deepspeed

        set_updates(self.optimizer, self.updates)
        parameters = dict(self.objective.model.named_parameters())
        for name, value in self.whole([piece.weight for piece in self.pieces]):
            with (
                torch.no_grad(),
                deepspeed.zero.GatheredParameters(parameters[name], modifier_rank=0, enabled=self.stage == 3),
            ):
                parameters[name].copy_(value)

    def add_bits(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor.view(torch.int32))

    def total(self, values: Tensor) -> list[float]:
        torch.distributed.all_reduce(values)
        return list(values.tolist())

    def agree(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(found, value, group=self.side)
        return found

    def _scale(self) -> float:
        return float(self.engine.optimizer.loss_scale) if self.dtype == torch.float16 else 1.0

    def scaler(self) -> dict[str, Any]:
        return {key: getattr(self.engine.optimizer.loss_scaler, key) for key in SCALER if self.dtype == torch.float16}

    def set_scaler(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self.engine.optimizer.loss_scaler, key, value)

    def close(self) -> None:
        self.engine.destroy()
        torch.distributed.destroy_process_group()
