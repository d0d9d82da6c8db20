"""The verb train."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dist_train import __version__
from dist_train.commands.prior import fit_prior
from dist_train.commands.registry import register
from dist_train.config import RunConfig, load_config
from dist_train.crystal.digest import DIGEST_VERSION, digest
from dist_train.errors import CheckpointError, ConfigError, Interrupted, OutOfMemory
from dist_train.figures import loss_curves, slices
from dist_train.files import write_text
from dist_train.model_card import environment
from dist_train.models.autoencoder import CrystalAutoencoder, Statistics, cell_numbers, check_grid
from dist_train.models.export import Ancestor, check_place, start_from, write_bundle
from dist_train.models.reconstruct import Codec, calibrate
from dist_train.progress import Progress, Stages
from dist_train.ranks import place
from dist_train.shards.index import Index
from dist_train.shards.prefetch import check_room, fetched
from dist_train.shards.reader import Record, ShardReader, check_shards, whole
from dist_train.training.checkpoint import Checkpoints, load, read_state
from dist_train.training.engine import Engine, TorchEngine, check_batch
from dist_train.training.loop import batch_plan, fit, for_calibration
from dist_train.training.state import TrainState
from dist_train.training.tracker import NoTracker, Spool, read_spool
from dist_train.training_report import REPORT, SHOWN, write_training_report

if TYPE_CHECKING:
    from dist_train.backends.mlflow_tracker import MlflowUploader

log = logging.getLogger(__name__)
STATISTICS_SAMPLES = 512
MAX_DIGESTS = 200_000
"""Of the training samples that a bundle lists: 1.6 MB and a few minutes at the end of a run."""
MIN_CELL_STD = 0.01
"""Least spread of the cell numbers: where all crystals share a number, the network's noise is scaled down to this."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt."""
MICRO_BATCH = "micro_batch_size"
"""File of a run folder with the micro-batch that fits into the device, where that asked for did not."""


def train(config: RunConfig) -> str:
    """Train (or resume) in this process, one rank of possibly many; returns a summary for rank 0, '' for others.

    Raises OutOfMemory where one of several ranks ran out of memory: they have to be started again together.
    """
    rank, ranks = place()
    index = check_training(config, ranks)
    be_deterministic()
    keep_memory()
    if config.engine.name == "deepspeed":
        from dist_train.backends.deepspeed_engine import init_process_group

        rank, ranks = init_process_group()
    while True:
        try:
            return _train_rank(_fitting(config, ranks), index, rank)
        except torch.OutOfMemoryError as error:
            told = _halve(config, ranks, str(error))
        if ranks > 1:
            raise OutOfMemory(told)
        log.warning("%s", told)
        gc.collect()
        torch.cuda.empty_cache()


def _fitting(config: RunConfig, ranks: int) -> RunConfig:
    """The config with the micro-batch that earlier starts of the run found to fit into the device."""
    found = config.run_dir / MICRO_BATCH
    return _with_micro(config, min(int(found.read_text()), check_batch(config, ranks))) if found.exists() else config


def _with_micro(config: RunConfig, micro: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": micro})})


def _halve(config: RunConfig, ranks: int, reason: str) -> str:
    """Note half the micro-batch, or the next less that divides, for the next start; what to tell of it.

    Raises ConfigError where there is none.
    """
    micro = check_batch(_fitting(config, ranks), ranks)
    told = f"out of memory with {micro} crystals at a time ({reason.splitlines()[0]})"
    for less in range(micro // 2, 0, -1):
        with suppress(ConfigError):
            check_batch(_with_micro(config, less), ranks)
            write_text(config.run_dir / MICRO_BATCH, str(less))
            return f"{told}; the run goes on from its newest checkpoint with {less}, the global batch unchanged"
    raise ConfigError(f"{told}, and fewer can't be taken: use a smaller model or grid, or train.activation_checkpointing")


def be_deterministic() -> None:
    """Make torch repeat itself bit for bit: by default it adds up scattered gradients in the order threads arrive."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs time, and no result depends on it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_memory() -> None:
    """Make the C library keep freed memory for the next step; no effect where it isn't glibc.

    By default it gives large blocks back to the system, which has to clear each page of them again: on CPUs this took up to
    half the time of a step.
    """
    with suppress(AttributeError, OSError):
        set_option = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            set_option(option, value)


def check_training(config: RunConfig, ranks: int) -> Index:
    """Everything that can be known to go wrong before the first step. Raises the error of the first fault found."""
    if config.engine.name == "torch" and ranks > 1:
        raise ConfigError(f"engine.name 'torch' runs one process, {ranks} were started; set engine.name=deepspeed")
    check_batch(config, ranks)
    if config.train.precision == "fp16" and not (config.engine.name == "deepspeed" and torch.cuda.is_available()):
        raise ConfigError(
            "train.precision 'fp16' needs a GPU and engine.name deepspeed; set train.precision to bf16 or fp32"
        )
    check_grid(config.grid)
    config.check_halvings()
    check_place(config.run_dir / "bundle")
    if config.engine.name == "deepspeed":
        from dist_train.backends.deepspeed_engine import deepspeed_config

        deepspeed_config(config, ranks)
    index = Index.read(config.data.shards, config.data.cache_dir, config.data.cache_MB)
    grid, there = (spec.model_dump(mode="json") for spec in (config.grid, index.grid))
    differing = [key for key, value in grid.items() if there[key] != value]
    if differing:
        told = "; ".join(f"{key} is {there[key]} there, {grid[key]} here" for key in differing)
        raise ConfigError(f"the shards in {index.place} have another grid: {told}; voxelise anew or set grid.* to theirs")
    check_shards(index, ("train", "val"))
    if config.train.substitution and index.store != "structures":
        raise ConfigError(
            f"train.substitution {config.train.substitution:g} exchanges elements before grids are made, and the shards in "
            f"{index.place} hold grids: voxelise with data.store=structures, or set it to 0"
        )
    reader = ShardReader(index, "train")
    plan = batch_plan(config, reader, 0, ranks)
    if index.cache:
        check_room(index.cache, reader.shards, plan)
    kept = config.run_dir / "run.yaml"
    if kept.exists():
        _check_same_run(config, load_config(kept), config.run_dir)
    return index


def _check_same_run(config: RunConfig, before: RunConfig, run_dir: Path) -> None:
    """A run folder is continued only with the settings that decide its numbers; where to stop or log may change."""
    free = {
        "stop_after_step", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite",
        "micro_batch_size", "watchdog_seconds",
    }  # fmt: skip

    def deciding(run: RunConfig) -> dict[str, Any]:
        values = run.model_dump(
            mode="json", include={"seed": True, "grid": True, "model": True, "train": True, "data": {"shuffle_window"}}
        )
        return {**values, "train": {k: v for k, v in values["train"].items() if k not in free}}

    now, then = deciding(config), deciding(before)
    for section, value in now.items():
        values, old = (value, then[section]) if isinstance(value, dict) else ({"": value}, {"": then[section]})
        for key in values:
            if values[key] != old[key]:
                name = f"{section}.{key}".rstrip(".")
                raise CheckpointError(
                    f"{run_dir} holds another run: its {name} was {old[key]}, now {values[key]}; set run_dir to a new folder"
                )


def _train_rank(config: RunConfig, index: Index, rank: int) -> str:
    reader, val = ShardReader(index, "train"), ShardReader(index, "val")
    engine = _engine(config, build_model(config, index, reader))
    checkpoints = Checkpoints(config.run_dir / "checkpoints", config)
    state = _first_state(config, index, engine, checkpoints)
    if rank:
        reached = fit(config, engine, reader, val, NoTracker(), checkpoints, state)
        if reached.step == batch_plan(config, reader, rank, engine.ranks).steps:
            engine.averaged()  # rank 0 makes the bundle of it, for which it needs the pieces of all
        engine.close()
        return ""
    checkpoints.clean()
    # Now: in the end the one may be gone, and the other may be newer than the code that runs.
    ancestor, commit = Ancestor.of(start) if (start := config.train.init_from) else None, _git_commit()
    plan = batch_plan(config, reader, rank, engine.ranks)
    if plan.never_seen:
        log.warning(
            "%d of %d training samples are never seen: their grid shapes have fewer than train.shape_group %d",
            plan.never_seen, len(reader), plan.group_size,
        )  # fmt: skip
    write_text(config.run_dir / "run.yaml", config.to_yaml())
    spool = Spool(config.run_dir / "metrics.jsonl")
    uploader = _uploader(config, index, commit, spool.path)
    status = "FAILED"
    try:
        reached = fit(config, engine, reader, val, spool, checkpoints, state)
        done = reached.step == plan.steps
        if done:
            summary = _finish(config, index, engine, reader, val, reached, ancestor, commit)
        else:
            summary = f"stopped after step {reached.step}"
            write_training_report(config.run_dir, config.run_dir / REPORT, None, [])
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    except torch.OutOfMemoryError:
        if engine.ranks == 1:  # this process goes on, from there
            checkpoints.wait()
        raise
    finally:
        spool.close()
        pictures = [path for path in (config.run_dir / "figures", config.run_dir / REPORT) if path.exists()]
        sent = uploader.close(status, pictures) if uploader else True
    engine.close()
    if not sent:
        return f"{summary}\nMLflow could not be reached: the metrics are in {spool.path}" + (
            f"; to register the model, once it can be: dist-train register {config.run_dir}" if done else ""
        )
    return f"{summary}\n{_register(config.run_dir)}" if done and uploader else summary


def _register(run_dir: Path) -> str:
    """Register the model of a run that has just ended; returns what came of it."""
    try:
        return register(run_dir)
    except Exception as error:  # whatever a server or its client raises must not end a finished training
        reason = (str(error) or repr(error)).splitlines()[0]
        return f"the model was not registered ({reason}); to do it later: dist-train register {run_dir}"


def _engine(config: RunConfig, model: CrystalAutoencoder) -> Engine:
    if config.engine.name == "torch":
        return TorchEngine(model, config)
    from dist_train.backends.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, config)


def build_model(config: RunConfig, index: Index, reader: ShardReader) -> CrystalAutoencoder:
    """The model of a new run, for the elements and the statistics of the training split; equal on every rank."""
    elements = index.elements("train")
    torch.manual_seed(config.seed)
    if config.train.init_from is not None:
        return start_from(config.train.init_from, config.grid, config.model, elements)
    statistics = training_statistics(whole(reader.__getitem__, fetched(reader, min(len(reader), STATISTICS_SAMPLES))))
    return CrystalAutoencoder(config.grid, config.model, elements, statistics)


def training_statistics(records: Iterable[Record]) -> Statistics:
    """Mean and standard deviation over all voxels and over all crystals; one pass, as adaptive grids of a batch's size are
    larger than all the memory that training takes."""
    cells, log_counts, sums = [], [], []
    for record in records:
        values = record.density_CDHW.reshape(len(record.density_CDHW), -1).astype(np.float64)
        sums.append((np.full(len(values), values.shape[1]), values.sum(1), (values**2).sum(1)))
        cells.append(record.crystal.lengths_angles)
        log_counts.append(np.log(len(record.crystal)))
    voxels, total, squares = np.sum(sums, axis=0)
    mean = total / voxels
    std = np.sqrt(np.maximum(squares / voxels - mean**2, 0.0))
    cell = cell_numbers(np.stack(cells)).astype(np.float64)
    return Statistics(
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(np.where(std < 1e-5, 1.0, std).tolist()),  # 1 for a channel that is empty
        cell_mean=tuple(cell.mean(0).tolist()),
        cell_std=tuple(cell.std(0).clip(min=MIN_CELL_STD).tolist()),
        count_mean=float(np.mean(log_counts)),
        count_std=float(np.std(log_counts).clip(min=MIN_CELL_STD)),
    )


def _first_state(config: RunConfig, index: Index, engine: Engine, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest checkpoint, or that of a new run. Raises CheckpointError where the data have changed."""
    digest = hashlib.sha256(json.dumps(engine.objective.model.config(), sort_keys=True).encode()).hexdigest()[:16]
    fresh = TrainState(0, config.seed, index.digest, digest, began=time.time())
    found = engine.agree(checkpoints.newest() if engine.rank == 0 else None)[0]
    if found is None:
        if engine.rank == 0:
            _forget_other_data(config.run_dir, index.digest)
        return fresh
    state = read_state(found)
    for name in ("seed", "data_digest", "model_digest"):
        if getattr(state, name) != getattr(fresh, name):
            raise CheckpointError(
                f"checkpoint {found} has the {name} {getattr(state, name)!r}, this run {getattr(fresh, name)!r}; "
                "start it as before, or set run_dir to a new folder"
            )
    load(engine, found)
    return state


def _forget_other_data(run_dir: Path, data_digest: str) -> None:
    """Drop the metrics of a run on other data that was ended before its first checkpoint."""
    kept = run_dir / "data_digest"
    if kept.exists() and kept.read_text() != data_digest:
        for name in ("metrics.jsonl", "mlflow_run_id"):
            (run_dir / name).unlink(missing_ok=True)
    write_text(kept, data_digest)


def _uploader(config: RunConfig, index: Index, commit: str, spool: Path) -> MlflowUploader | None:
    if not config.tracking.uri:
        return None
    from dist_train.backends.mlflow_tracker import MlflowUploader

    tags = {"data_digest": index.digest, "code_version": __version__, "git_commit": commit}
    return MlflowUploader(config, spool, tags)


def _git_commit() -> str:
    """The commit of the source tree, or '' outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _finish(
    config: RunConfig, index: Index, engine: Engine, reader: ShardReader, val: ShardReader, state: TrainState,
    ancestor: Ancestor | None, commit: str,
) -> str:  # fmt: skip
    """Rank 0, after the last step: the bundle with its prior, and the pictures."""
    model = engine.averaged()
    codec = Codec(model)
    calibrate(codec, for_calibration(val))
    crystals = whole(reader.crystal, fetched(reader, min(len(reader), MAX_DIGESTS)))
    with Progress("digests", len(crystals), "crystals") as bar:
        digests = [digest(crystal) for crystal in bar.over(crystals)]
    fit_prior(codec, crystals, config.prior, config.seed, torch.get_num_threads(), Stages())
    about = {
        "step": state.step,
        "data_digest": index.digest,
        "data_counts": index.counts,
        "training_digests": {"version": DIGEST_VERSION, "samples": len(digests), "of": len(reader)},
        "evaluation_digest": _evaluation_digest(index),
        "metrics": _last_validation(config.run_dir / "metrics.jsonl"),
        "git_commit": commit,
        "environment": environment(engine.ranks),
        "run": config.model_dump(mode="json"),
    }
    unique = np.unique(np.array(digests, np.uint64))
    about, listed = ancestor.inherit(about, unique) if ancestor else (about, unique)
    bundle = write_bundle(config.run_dir / "bundle", model, model.state_dict(), about, listed)
    shown = [val.crystal(place) for place in range(min(SHOWN, len(val)))]
    for name, png in (
        ("slices.png", slices(codec, shown)),
        ("loss_curves.png", loss_curves(config.run_dir / "metrics.jsonl")),
    ):
        (config.run_dir / "figures").mkdir(exist_ok=True)
        (config.run_dir / "figures" / name).write_bytes(png)
    write_training_report(config.run_dir, config.run_dir / REPORT, codec, shown)
    return f"{state.step} steps done, {state.skipped} skipped; model bundle: {bundle}"


def _evaluation_digest(index: Index) -> str:
    """The identity of the validation split alone: models trained on different data may share it."""
    return hashlib.sha256("".join(shard.sha256 for shard in index.shards if shard.split == "val").encode()).hexdigest()


def _last_validation(spool: Path) -> dict[str, float]:
    """The metrics of the last validation of a run, by name."""
    found = [record["metrics"] for record in read_spool(spool) if "val/loss" in record["metrics"]]
    return {name: value for name, value in found[-1].items() if name.startswith("val/")} if found else {}
