"""The DeepSpeed engine: data parallel over any number of ranks, ZeRO, bf16. The only file that imports deepspeed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config import RunConfig
from dist_train.errors import ConfigError, DistTrainError
from dist_train.models.autoencoder import CrystalAutoencoder, CrystalBatch
from dist_train.models.objectives import JointObjective, Noise
from dist_train.ranks import place
from dist_train.training.checkpoint import load_tensors
from dist_train.training.engine import StepResult, WeightAverage, check_batch, make_optimizer

OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.gradient_clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate",
    "scheduler": "train.learning_rate",
}
"""Keys of a DeepSpeed JSON that RunConfig owns, and where each belongs."""


ZERO_STAGES = (1, 2)


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
    extra.setdefault("zero_optimization", {"stage": 1})
    stage = extra["zero_optimization"].get("stage")
    if stage not in ZERO_STAGES:
        # Stage 0 applies a non-finite gradient without a word; stage 3 leaves no whole weights to average or export.
        raise ConfigError(f"{path} sets ZeRO stage {stage}; this program runs {list(ZERO_STAGES)}")
    for key in extra.keys() & OWNED_KEYS.keys():
        raise ConfigError(f"{path} sets {key!r}, which {OWNED_KEYS[key]} of the run file decides: remove it from {path}")
    return {
        **extra,
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": check_batch(config, ranks),
        "gradient_clipping": config.train.gradient_clip,
        "bf16": {"enabled": config.train.precision == "bf16"},
    }


class DeepSpeedEngine:
    """The Engine protocol on deepspeed.initialize; the process group must be there (`init_process_group`)."""

    def __init__(self, model: CrystalAutoencoder, config: RunConfig) -> None:
        import deepspeed

        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.objective = JointObjective(model.to(self.device), config.train, self.device, dtype)
        self.average = WeightAverage(model, config.train.ema_decay)
        settings = deepspeed_config(config, self.ranks)
        self.layout = f"deepspeed, ZeRO {settings['zero_optimization']['stage']}, {self.ranks} ranks"
        self.engine, *_ = deepspeed.initialize(
            model=self.objective, optimizer=make_optimizer(model, config), config=settings
        )

    def step(self, batch: CrystalBatch, noise: Noise, learning_rate: float) -> StepResult:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        loss, parts = self.engine(batch.to(self.device), noise)
        self.engine.backward(loss)
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.average.update()
        # One tensor, so that a GPU is waited for once and not for each number.
        figures = torch.stack([loss.detach(), *parts.values()]).double()
        torch.distributed.all_reduce(figures)
        means = (figures / self.ranks).tolist()
        norm = self.engine.get_global_grad_norm()
        return StepResult(
            means[0], dict(zip(parts, means[1:], strict=True)), float("nan") if norm is None else float(norm), applied
        )

    def loss(self, batch: CrystalBatch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        found: tuple[Tensor, dict[str, Tensor]] = self.objective(batch.to(self.device), noise)
        return found

    def total(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return list(summed.tolist())

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        if self.rank == 0:
            torch.save(self.average.state(), folder / "average.pt")

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="deepspeed")
        self.average.restore(load_tensors(folder / "average.pt", self.device))

    def barrier(self) -> None:
        torch.distributed.barrier()

    def close(self) -> None:
        self.engine.destroy()
        torch.distributed.destroy_process_group()
