"""Checkpoints that are committed or not there: step_00001000/{rank_*.safetensors, state.json, run.yaml, manifest.json, ...}.

Every rank copies its pieces to the host, which is all that training waits for; a thread then writes them into a temporary
folder. When all ranks have told theirs written and flushed, rank 0 adds the state and the manifest with every file's hash,
flushes, writes the marker, renames the folder and only then points `latest` at it. A folder without a marker, or whose
files differ from the manifest, is never loaded. Pieces are runs of parameters (see `engine`), so that any number of ranks
at any ZeRO stage loads what another wrote.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_train.config import RunConfig
from dist_train.errors import CheckpointError
from dist_train.files import fsync, sha256, write_text
from dist_train.training.engine import MOMENTS, Engine
from dist_train.training.state import TrainState

FULL_BYTES = 2**20
"""Free space below which a failed write is put down to a full disk."""
AVERAGE = "average"
KINDS = ("weight", *MOMENTS, AVERAGE)
"""What is kept of every number of a parameter."""
log = logging.getLogger(__name__)
_MARKER, _MANIFEST, _STATE, _LATEST = "COMPLETE", "manifest.json", "state.json", "latest"


@dataclass(frozen=True)
class Snapshot:
    """What one rank adds to a checkpoint, as it stood at the end of a step."""

    state: TrainState
    updates: int
    scaler: dict[str, Any]
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of a run, in `folder`: the last `train.keep_checkpoints` and the best are kept."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, engine: Engine, state: TrainState) -> None:
        """Begin a checkpoint, after the one before is done with; called by all ranks.

        Raises what the one before failed with: CheckpointError where its disk was full.
        """
        self.wait()
        snapshot = Snapshot(state, engine.updates, engine.scaler(), self._copy(engine))
        self._thread = threading.Thread(target=self._work, args=(engine, snapshot), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint begun last is committed. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, engine: Engine) -> dict[str, Tensor]:
        """The pieces on the host, in memory that is used again: fresh memory costs far more than the copy."""
        found = dict(tensors(engine))
        if engine.replicated:  # each rank writes its share
            found = dict(list(found.items())[engine.rank :: engine.ranks])
        if self._host.keys() != found.keys():
            pin = engine.device.type == "cuda"
            self._host = {name: torch.empty_like(t, device="cpu", pin_memory=pin) for name, t in found.items()}
        for name, tensor in found.items():
            self._host[name].copy_(tensor, non_blocking=True)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return self._host

    def _work(self, engine: Engine, snapshot: Snapshot) -> None:
        try:
            self._write(engine, snapshot)
        except Exception as error:  # raised in the training thread, by `wait`
            self._error = error

    def _write(self, engine: Engine, snapshot: Snapshot) -> None:
        target = self.folder / f"step_{snapshot.state.step:08d}"
        temporary = self.folder / f".{target.name}.tmp"

        def together(work: Any, *arguments: Any) -> None:
            """Do it on this rank, then wait for all; all ranks raise where one failed."""
            fault = None
            try:
                work(*arguments)
            except Exception as error:  # whatever it is, the other ranks must not wait for this one
                fault = f"{type(error).__name__}: {error}"
            faults = {rank: told for rank, told in enumerate(engine.agree(fault)) if told}
            if faults:
                raise self._failure(faults, temporary, snapshot.state.step)

        def alone(work: Any, *arguments: Any) -> None:
            if engine.rank == 0:
                work(*arguments)

        together(alone, _make, temporary)
        together(_write_tensors, temporary / f"rank_{engine.rank:05d}.safetensors", snapshot.tensors)
        together(alone, self._commit, snapshot, temporary, target)

    def _failure(self, faults: dict[int, str], temporary: Path, step: int) -> CheckpointError:
        # A failed write of tensors says nothing of its cause: look at the disk.
        full = shutil.disk_usage(self.folder).free < FULL_BYTES
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            return CheckpointError(
                f"the disk of {self.folder} is full: the checkpoint of step {step} was not written, the one "
                "before it is whole; free space and start again"
            )
        rank, told = next(iter(faults.items()))
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder} by rank {rank} ({told}); the one before "
            "it is whole: mend that and start again"
        )

    def _commit(self, snapshot: Snapshot, temporary: Path, target: Path) -> None:
        own = {"updates": snapshot.updates, "scaler": snapshot.scaler}
        write_text(temporary / _STATE, json.dumps({**json.loads(snapshot.state.to_json()), "engine": own}, indent=1))
        write_text(temporary / "run.yaml", self.config.to_yaml())
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        write_text(temporary / _MANIFEST, json.dumps(manifest, indent=1))
        write_text(temporary / _MARKER, sha256(temporary / _MANIFEST))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync(self.folder)
        write_text(self.folder / _LATEST, target.name)
        self._remove_old(target)

    def _remove_old(self, newest: Path) -> None:
        """Keep the last ones up to the newest, and the best of them all."""
        until = [folder for folder in self.committed() if folder.name <= newest.name]
        kept = {*until[-self.config.train.keep_checkpoints :], *([best] if (best := self.best(until)) else [])}
        # A later checkpoint was found damaged when this run resumed before it; it must not crowd out whole ones.
        for folder in set(self.committed()) - kept:
            shutil.rmtree(folder)

    def best(self, folders: list[Path]) -> Path | None:
        """The one with the lowest validation loss, of those that were taken at a validated step."""
        losses = {}
        for folder in folders:
            with suppress(OSError, ValueError, KeyError, TypeError):
                losses[folder] = float(json.loads((folder / _STATE).read_text())["validation_loss"])
        return min(losses, key=lambda folder: losses[folder], default=None)

    def clean(self) -> None:
        """Remove what a killed run left half written; for rank 0, before the first save."""
        for folder in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)

    def committed(self) -> list[Path]:
        """Folders with a marker, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step_*/{_MARKER}"))

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None where there is none.

        Raises CheckpointError where committed checkpoints exist but none is whole.
        """
        damaged: list[str] = []
        for folder in reversed(self.committed()):
            if (fault := find_fault(folder)) is None:
                for line in damaged:
                    log.warning("passed over a damaged checkpoint: %s", line)
                return folder
            damaged.append(f"{folder}: {fault}")
        if damaged:
            raise CheckpointError("no whole checkpoint is left: " + "; ".join(damaged) + "; start a new run_dir")
        return None


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(path: Path, values: dict[str, Tensor]) -> None:
    save_file(values, path)
    fsync(path)


def tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """('KIND START NAME', [n] float32) of the pieces that this rank holds."""
    for piece, average in zip(engine.pieces, engine.average.values, strict=True):
        for kind in KINDS:
            yield f"{kind} {piece.start} {piece.name}", average if kind == AVERAGE else getattr(piece, kind)


def read_state(folder: Path) -> TrainState:
    """The position that a whole checkpoint was taken at."""
    return TrainState.from_json((folder / _STATE).read_text())


def load(engine: Engine, folder: Path) -> None:
    """Bring an engine, of any number of ranks and any ZeRO stage, to where a whole checkpoint was taken.

    Raises CheckpointError where it lacks a number of a parameter.
    """
    own = json.loads((folder / _STATE).read_text())["engine"]
    with Stored(folder) as stored:
        for name, tensor in tensors(engine):
            kind, start, parameter = name.split(" ", 2)
            stored.read(kind, parameter, int(start), tensor)
    engine.updates = own["updates"]
    engine.set_scaler(own["scaler"])
    engine.refresh()


class Run(NamedTuple):
    """Where a run of numbers of a parameter lies."""

    start: int
    stop: int
    file: Any
    key: str


class Stored:
    """The numbers in the rank files of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[tuple[str, str], list[Run]] = defaultdict(list)

    def __enter__(self) -> Stored:
        for path in sorted(self.folder.glob("rank_*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 - no mapping
                kind, start, name = key.split(" ", 2)
                (size,) = file.get_slice(key).get_shape()  # type: ignore[no-untyped-call]
                self._runs[kind, name].append(Run(int(start), int(start) + size, file, key))
        return self

    def __exit__(self, *_: object) -> None:
        self._runs.clear()

    @torch.no_grad()
    def read(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Fill a vector with the numbers from `start` on."""
        stop, missing = start + len(into), len(into)
        for run in self._runs[kind, name]:
            low, high = max(start, run.start), min(stop, run.stop)
            if low < high:
                into[low - start : high - start] = run.file.get_slice(run.key)[low - run.start : high - run.start]
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"checkpoint {self.folder} lacks {missing} of the numbers {start} to {stop} of {kind} {name}; it is of "
                "another model: set run_dir to a new folder"
            )


def find_fault(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, or None."""
    if not (folder / _MANIFEST).is_file():
        return f"{_MANIFEST} is missing"
    if sha256(folder / _MANIFEST) != (folder / _MARKER).read_text():
        return f"{_MANIFEST} was altered"
    for name, entry in json.loads((folder / _MANIFEST).read_text()).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != entry["sha256"]:
            return f"{name} was altered"
    return None
