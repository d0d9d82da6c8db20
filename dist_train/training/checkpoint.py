"""Checkpoints that are committed or not there: step_00001000/{engine/, state.json, run.yaml, manifest.json, COMPLETE}.

All ranks write into a temporary folder; after a barrier rank 0 hashes every file into the manifest, flushes, writes the
marker, renames the folder and only then points `latest` at it. A folder without a marker, or whose files differ from the
manifest, is never loaded. This is the only module that reads a pickle-based file: its own, after the hashes were checked.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from dist_train.config import RunConfig
from dist_train.errors import CheckpointError
from dist_train.files import fsync, sha256, write_text
from dist_train.training.engine import Engine
from dist_train.training.state import TrainState

FULL_BYTES = 2**20
"""Free space below which a failed write is put down to a full disk."""
log = logging.getLogger(__name__)
_MARKER, _MANIFEST, _LATEST = "COMPLETE", "manifest.json", "latest"


class Checkpoints:
    """The checkpoints of a run, in `folder`; the last `keep` are kept."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Commit a checkpoint; called by all ranks. Raises CheckpointError where the disk is full."""
        target = self.folder / f"step_{state.step:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        try:
            self._write(engine, state, temporary, target)
        except (OSError, RuntimeError):
            # torch tells a failed write as a RuntimeError that says nothing of the cause: look at the disk.
            full = shutil.disk_usage(self.folder).free < FULL_BYTES
            shutil.rmtree(temporary, ignore_errors=True)
            if full:
                raise CheckpointError(
                    f"the disk of {self.folder} is full: the checkpoint of step {state.step} was not written, the one "
                    "before it is whole; free space and start again"
                ) from None
            raise
        return target

    def _write(self, engine: Engine, state: TrainState, temporary: Path, target: Path) -> None:
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "engine").mkdir(parents=True)
        engine.barrier()
        engine.save(temporary / "engine")
        engine.barrier()
        if engine.rank == 0:
            write_text(temporary / "state.json", state.to_json())
            write_text(temporary / "run.yaml", self.config.to_yaml())
            self._commit(temporary, target)
        engine.barrier()

    def _commit(self, temporary: Path, target: Path) -> None:
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        for path in files:
            fsync(path)
        manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        write_text(temporary / _MANIFEST, json.dumps(manifest, indent=1))
        write_text(temporary / _MARKER, sha256(temporary / _MANIFEST))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync(self.folder)
        write_text(self.folder / _LATEST, target.name)
        # A later checkpoint was found damaged when this run resumed before it; it must not crowd out whole ones.
        later = [folder for folder in self.committed() if folder.name > target.name]
        for folder in (*later, *self.committed()[: -self.config.train.keep_checkpoints - len(later)]):
            shutil.rmtree(folder)

    def committed(self) -> list[Path]:
        """Folders with a marker, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step_*/{_MARKER}"))

    def newest(self) -> tuple[Path, TrainState] | None:
        """The newest whole checkpoint and its state (its engine's part is in `engine/`); None where there is none.

        Raises CheckpointError where committed checkpoints exist but none is whole.
        """
        damaged: list[str] = []
        for folder in reversed(self.committed()):
            if (fault := find_fault(folder)) is None:
                for line in damaged:
                    log.warning("passed over a damaged checkpoint: %s", line)
                return folder, TrainState.from_json((folder / "state.json").read_text())
            damaged.append(f"{folder}: {fault}")
        if damaged:
            raise CheckpointError("no whole checkpoint is left: " + "; ".join(damaged) + "; start a new run_dir")
        return None


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


def load_tensors(path: Path, device: torch.device) -> dict[str, Any]:
    """A dictionary of tensors and numbers written by torch.save; anything else in it is refused."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
