"""Which rank this process is, whoever started it, and what ranks and their launcher tell each other."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.errors import ConfigError, DistTrainError, Interrupted

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What every launcher tells its ranks; one of these alone is a mistake."""
MEETING = ("MASTER_ADDR", "MASTER_PORT")
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
CARRIED = r"^((MLFLOW|AWS|DS|OMP|MKL|GLOO|NCCL|TORCH)_\w+|(http|https|no)_proxy|(HTTP|HTTPS|NO)_PROXY)="
"""Which variables, as NAME=value, ranks on other nodes get from the launcher's environment."""
RANK_0_TELLS_S = 10.0
ENVIRONMENT, EXIT_CODE = "environment", "exit_code"
"""Files of a launch folder: variables for the ranks, NUL-separated; and how rank 0 ended."""


def place() -> tuple[int, int]:
    """(rank, ranks) of this process; completes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    They are those of torchrun or deepspeed where one of the first three is set, else follow from the task of a Slurm
    step, else are those of one process alone. Raises ConfigError for variables that are half set or no numbers.
    """
    given = {name: os.environ[name] for name in PLACE + MEETING if os.environ.get(name)}
    if not given.keys() & set(PLACE):
        os.environ.update(_slurm_task() or ALONE)
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wanted = PLACE if given.get("WORLD_SIZE") == "1" else PLACE + MEETING
    if missing := [name for name in wanted if name not in given]:
        there = ", ".join(f"{name}={given[name]}" for name in PLACE if name in given)
        raise ConfigError(
            f"the launcher's variables are half set: {there} without {', '.join(missing)}; start ranks with "
            "dist-train launch, or unset them all to train in one process"
        )
    for name in wanted:
        if name != "MASTER_ADDR" and not given[name].isdecimal():
            raise ConfigError(f"{name} is {given[name]!r}, not a whole number from 0 up; start ranks with dist-train launch")
    rank, ranks = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= ranks:
        raise ConfigError(f"RANK {rank} must be less than WORLD_SIZE {ranks}; start ranks with dist-train launch")
    os.environ.update(ALONE | given)
    return rank, ranks


def _slurm_task() -> dict[str, str] | None:
    """The place of a task that srun started among others; None outside a step, as in the batch script itself."""
    step = os.environ.get
    tasks = step("SLURM_STEP_NUM_TASKS") or step("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" not in os.environ or tasks == "1":
        return None
    found = {"RANK": step("SLURM_PROCID", ""), "WORLD_SIZE": tasks, "LOCAL_RANK": step("SLURM_LOCALID", "")}
    job = step("SLURM_JOB_ID", "")
    for name, value in (*found.items(), ("SLURM_JOB_ID", job)):
        if not value.isdecimal():
            raise ConfigError(f"the Slurm step has no number for {name} ({value!r}); start the ranks with srun")
    nodes = step("SLURM_STEP_NODELIST") or step("SLURM_JOB_NODELIST", "")
    master = step("MASTER_ADDR") or first_host(nodes)
    # Below the ports that systems hand out, and another one for the next job.
    return {**found, "MASTER_ADDR": master, "MASTER_PORT": step("MASTER_PORT") or str(10_000 + int(job) % 20_000)}


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: 'gpu[01-03,07],cpu1' begins with gpu01."""
    found = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if not found:
        raise ConfigError(f"SLURM_JOB_NODELIST {nodes!r} names no host; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", found[0])


@contextmanager
def told_once(folder: Path | None = None) -> Iterator[None]:
    """Let rank 0 tell what all ranks find: that they were asked to stop, or a fault of the user.

    After a fault the launcher ends the other ranks, but for those on other nodes: these find in the launch folder that
    rank 0 has told it.
    """
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    try:
        yield
    except DistTrainError as error:
        if next((os.environ[name] for name in names if os.environ.get(name)), "0") != "0":
            if error.exit_code == Interrupted.exit_code:
                # Any code but 0 makes a launcher end rank 0, which is still at its last work, and speak of a failure.
                raise SystemExit(0) from None
            if error.exit_code == DistTrainError.exit_code:
                time.sleep(RANK_0_TELLS_S)
                if folder and (folder / EXIT_CODE).exists():
                    raise SystemExit(error.exit_code) from None
        raise


def take_environment(folder: Path) -> None:
    """Set the variables that the launcher left for ranks on other nodes; there are none where it started the rank itself.

    Raises ConfigError where the launch folder isn't there: then run_dir isn't shared.
    """
    if not folder.is_dir():
        raise ConfigError(f"launch folder {folder} is not on {os.uname().nodename}; set run_dir to one that nodes share")
    path = folder / ENVIRONMENT
    if path.exists():
        os.environ.update(dict(re.findall(r"([^=\0]+)=([^\0]*)", path.read_text())))


def hand_over(folder: Path) -> None:
    """Leave this process's variables for `take_environment`, readable by this user alone."""
    items = [f"{name}={value}" for name, value in os.environ.items() if re.match(CARRIED, f"{name}={value}")]
    with open(folder / ENVIRONMENT, "x", opener=_private) as stream:
        stream.write("\0".join(items))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def tell_exit(folder: Path, code: int) -> None:
    """Leave rank 0's exit code for `dist-train launch`: some launchers replace it by their own."""
    if os.environ.get("RANK", "0") == "0" and folder.is_dir():
        (folder / EXIT_CODE).write_text(str(code))
