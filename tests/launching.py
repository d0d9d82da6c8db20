"""Launched trainings for tests: small runs on real shards, processes that end with their test, what a run left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from safetensors.torch import load_file
from small_run import ROOT, small_config, write_small_shards

from dist_train.training.tracker import read_spool

T = TypeVar("T")
Listed = Callable[[], Iterable[psutil.Process]]
LIMIT_S = 240
SLOWED = {"train__checkpoint_every": 1}
"""For runs that are to be caught at a step: a step then waits until the checkpoint of the one before is written."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def write_run(folder: Path) -> Path:
    """Shards and a run file of DeepSpeed in bf16 below `folder`."""
    write_small_shards(folder)
    settings = small_config(
        folder, "engine.name=deepspeed", f"engine.deepspeed_json={ROOT}/launch/deepspeed/zero1.json",
        "train.precision=bf16", f"run_dir={folder}/whole",
    )  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(settings.to_yaml())
    return path


def launch_command(config: Path, *options: str, **settings: object) -> list[str]:
    """`dist-train launch` with settings."""
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]
    return [sys.executable, "-m", "dist_train", "launch", "--config", str(config), *overrides, *options]


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process on CPUs with one thread, killed with all its descendants at the end, whatever their sessions."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    inherited |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    root = psutil.Process(process.pid)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for running in (*root.children(recursive=True), root):
                with suppress(psutil.NoSuchProcess):
                    running.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)


def finished(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    with started(command, **environment) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of a run's stderr, of any node, that tell a user's error."""
    return [line for line in done.stderr.splitlines() if "dist-train: error" in line]


def losses(run: Path) -> dict[int, float]:
    """Losses by step; each step is there once."""
    records = [r for r in read_spool(run / "metrics.jsonl") if "train/loss" in r["metrics"]]
    assert len({r["step"] for r in records}) == len(records)
    return {r["step"]: r["metrics"]["train/loss"] for r in records}


def assert_same_training(run: Path, other: Path) -> None:
    """Both runs end with the same bits, by way of the same losses."""
    expected, found = (load_file(folder / "bundle" / "model.safetensors") for folder in (run, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(run) == losses(other)
    assert set(losses(run)) == set(range(1, 13))


def members(run: Path, listed: Listed = psutil.process_iter) -> dict[psutil.Process, int | None]:
    """The living processes of a launch, by its folder among their arguments, with their ranks (None: a launcher)."""
    found: dict[psutil.Process, int | None] = {}
    for process in listed():
        with suppress(psutil.Error):
            if str(run / ".launch") in process.cmdline():
                rank = process.environ().get("RANK")
                found[process] = None if rank is None else int(rank)
    return found


def rank_at_step(
    run: Path,
    step: int,
    launcher: subprocess.Popen[str],
    listed: Callable[[], Iterable[psutil.Process]] = psutil.process_iter,
) -> psutil.Process:
    """The process of rank 1, as soon as the checkpoint of a step is there."""
    found = wait_until(lambda: [p for p, rank in members(run, listed).items() if rank == 1], launcher, poll_s=0.2)
    wait_until((run / "checkpoints" / f"step_{step:08d}" / "COMPLETE").exists, launcher)
    return found[0]


def wait_until(condition: Callable[[], T], process: subprocess.Popen[str], poll_s: float = 0.002) -> T:
    """Poll until a condition holds, and what it is then; fails when that takes too long, or the process ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert process.poll() is None, "it ended early:\n" + "".join(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(poll_s)
    return found
