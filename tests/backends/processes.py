"""Processes that tests end in the middle: each in a session of its own, which is ended as a whole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from dist_train.files import sha256

T = TypeVar("T")
LIMIT_S = 120
ISOLATED = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "token"}


def session(leader: int) -> list[int]:
    """The living processes of a session; Ray gives its workers process groups of their own within it."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def commands(leader: int) -> list[tuple[psutil.Process, str]]:
    """The processes of a session with their command lines."""
    found = []
    for pid in session(leader):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            found.append((process, " ".join(process.cmdline())))
    return found


def holders(leader: int, pattern: str) -> list[psutil.Process]:
    """The Ray workers of a session that have a file open whose path matches."""
    workers = (process for process, command in commands(leader) if command.startswith("ray::"))
    return [worker for worker in workers if any(re.fullmatch(pattern, path) for path in _open_files(worker))]


def _open_files(process: psutil.Process) -> Iterator[str]:
    for link in Path(f"/proc/{process.pid}/fd").glob("*"):
        with suppress(OSError):
            yield os.readlink(link)


def kill_session(leader: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of a session, its leader's group at once, until none is left."""
    if leader.poll() is None:
        os.killpg(leader.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while members := session(leader.pid):
        assert time.monotonic() < deadline, f"processes {members} can't be ended"
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        leader.poll()
        time.sleep(0.05)
    leader.wait(10)


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that meets no other Ray cluster, ended with all that it started."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipe = subprocess.PIPE
    # Where pytest runs in the background, the shell has it ignore SIGINT, and all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, start_new_session=True, text=True, stdin=pipe, stdout=pipe, stderr=pipe,
        env=inherited | ISOLATED | environment,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        yield process
    finally:
        kill_session(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream
            with suppress(BrokenPipeError):
                stream.close()


def dist_train(verb: str, settings: tuple[str, ...], *options: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "dist_train", verb, *(part for item in settings for part in ("--set", item)), *options]


def wait_until(condition: Callable[[], T], process: subprocess.Popen[str] | None = None) -> T:
    """Poll until a condition holds, and what it is then; fails when that takes too long, or the process ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        if process and process.poll() is not None:
            pytest.fail("it ended early:\n" + "".join(process.communicate()))
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones included."""
    return {str(path.relative_to(root)): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A small file system. Skips the test where none can be mounted."""
    if os.geteuid() or sys.platform != "linux":
        pytest.skip("only root on Linux can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)
