"""Signals, restarts and exit codes of `dist-train launch`, on a launcher of a few lines with two ranks that do as told."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launching import members, started, wait_until

# Like torchrun: 1 is its code whatever its ranks end with. Like both launchers: dead on SIGUSR1, and ranks live on.
LAUNCHER = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(r)}) for r in (0, 1)]
sys.exit(any([rank.wait() for rank in ranks]))
"""
RANK = """
import os, pathlib, signal, sys, time
from dist_train.ranks import tell_exit
folder, does = pathlib.Path(sys.argv[1]), sys.argv[2]
def leave(code):
    tell_exit(folder, code)
    sys.exit(code)
started = folder.parent / "started"
started.open("a").write(os.environ["RANK"])
if does == "save on a signal":
    signal.signal(signal.SIGUSR1, lambda *_: leave(85))
if does == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if does == "die once" and len(started.read_text()) > 2:
    leave(0)
if does == "be wrong":
    leave(2)
(folder / ("ready" + os.environ["RANK"])).touch()
time.sleep(100)
"""
SUPERVISOR = """
import pathlib, sys
from dist_train.commands.launch import Plan
from dist_train.commands.supervise import run
folder = pathlib.Path(sys.argv[1]) / ".launch"
plan = Plan((sys.executable, *sys.argv[3:5], str(folder), sys.argv[2]), {}, folder, "127.0.0.1", 1)
sys.exit(run(plan, 1))
"""


@contextmanager
def supervised(run: Path, does: str) -> Iterator[subprocess.Popen[str]]:
    """Ranks that do something, under a launcher, under the code of `dist-train launch` with one restart."""
    (run / "launcher.py").write_text(LAUNCHER)
    (run / "rank.py").write_text(RANK)
    with started([sys.executable, "-c", SUPERVISOR, str(run), does, str(run / "launcher.py"), str(run / "rank.py")]) as it:
        yield it


def ready(run: Path, process: subprocess.Popen[str]) -> dict[int | None, psutil.Process]:
    """The ranks (None: their launcher), once both have begun."""
    wait_until(lambda: all((run / ".launch" / f"ready{rank}").exists() for rank in (0, 1)), process)
    return {rank: found for found, rank in members(run).items()}


def begun(run: Path) -> int:
    """Ranks that have ever been started."""
    return len((run / "started").read_text())


@pytest.mark.timeout(150)
def test_a_checkpoint_on_sigusr1_is_told_as_85_and_not_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path, "save on a signal") as process:
        ready(tmp_path, process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(50) == 85
    assert begun(tmp_path) == 2
    assert not members(tmp_path)
    assert not (tmp_path / ".launch").exists()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    with supervised(tmp_path, "wait") as process:
        ready(tmp_path, process)
        process.send_signal(number)
        assert process.wait(50) == 128 + number
    assert begun(tmp_path) == 2
    assert not members(tmp_path)


@pytest.mark.timeout(150)
def test_a_second_signal_kills_ranks_that_hang(tmp_path: Path) -> None:
    with supervised(tmp_path, "hang") as process:
        ready(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(50) == 128 + signal.SIGTERM
    assert not members(tmp_path)


@pytest.mark.timeout(150)
def test_ranks_whose_launcher_was_killed_are_ended_and_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path, "die once") as process:
        found = ready(tmp_path, process)
        found[None].send_signal(signal.SIGKILL)
        assert process.wait(50) == 0
        assert begun(tmp_path) == 4
        assert not members(tmp_path)


@pytest.mark.timeout(150)
def test_a_run_that_another_launch_trains_is_left_alone(tmp_path: Path) -> None:
    with supervised(tmp_path, "wait") as process:
        ready(tmp_path, process)
        with supervised(tmp_path, "wait") as second:
            _, err = second.communicate(timeout=60)
        assert f"3 processes of another launch still train in {tmp_path}" in err
        assert process.poll() is None
        assert (tmp_path / ".launch").exists()
    assert begun(tmp_path) == 2


@pytest.mark.timeout(150)
def test_restarts_end_and_pass_the_code_on(tmp_path: Path) -> None:
    with supervised(tmp_path, "wait") as process:
        for attempt in (1, 2):
            wait_until(lambda attempt=attempt: (tmp_path / "started").exists() and begun(tmp_path) == 2 * attempt, process)
            for rank, found in ready(tmp_path, process).items():
                if rank is not None:
                    found.send_signal(signal.SIGKILL)
        assert process.wait(50) == 1
    assert begun(tmp_path) == 4


@pytest.mark.timeout(150)
def test_a_fault_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    with supervised(tmp_path, "be wrong") as process:
        assert process.wait(50) == 2
    assert begun(tmp_path) == 2
