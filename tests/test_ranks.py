"""Every launcher's variables lead to the same place; half of them are refused; variables cross to other nodes unseen."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import errors, started

from dist_train import ranks
from dist_train.errors import ConfigError, Interrupted
from dist_train.ranks import first_host, hand_over, place, take_environment, tell_exit, told_once

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1", "MASTER_PORT": "1234"}
STEP = {
    "SLURM_JOB_ID": "70042", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[01-03,07],cpu1",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of this process, empty; put back afterwards."""
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_without_a_launcher_a_process_is_alone(environment: dict[str, str]) -> None:
    environment["MASTER_ADDR"] = "left over"
    assert place() == (0, 1)
    assert environment.items() >= ranks.ALONE.items()
    assert place() == (0, 1)


def test_what_torchrun_and_deepspeed_tell_is_taken_as_it_is(environment: dict[str, str]) -> None:
    environment |= LAUNCHED | STEP  # torchrun in a step of Slurm
    assert place() == (3, 4)
    assert environment.items() >= (LAUNCHED | STEP).items()


def test_a_task_of_a_slurm_step_is_a_rank(environment: dict[str, str]) -> None:
    environment |= STEP
    assert place() == (3, 4)
    assert environment.items() >= (LAUNCHED | {"MASTER_ADDR": "gpu01", "MASTER_PORT": "20042"}).items()
    assert place() == (3, 4)


def test_the_step_goes_before_the_job_and_the_user_before_both(environment: dict[str, str]) -> None:
    """A step on some nodes of a job; a shell of salloc keeps the job's number of tasks."""
    environment |= STEP | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "cpu1", "MASTER_PORT": "77"}
    assert place() == (3, 8)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("cpu1", "77")


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": None}, {"SLURM_NTASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_an_allocation_without_tasks_is_one_process(environment: dict[str, str], change: dict[str, str | None]) -> None:
    environment.update({name: value for name, value in (STEP | change).items() if value is not None})
    assert place() == (0, 1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[01-03,07],cpu1", "gpu01"),
        ("gpu[7,9-11]", "gpu7"),
        ("rack[2-3]-node[010-019]", "rack2-node010"),
        ("cpu-a,gpu[1-2]", "cpu-a"),
        ("n[5]x.site.org,n6x", "n5x.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "0"}, "half set: RANK=0 without WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "half set: RANK=1, WORLD_SIZE=2 without LOCAL_RANK"),
        (LAUNCHED | {"LOCAL_RANK": ""}, "without LOCAL_RANK"),
        (LAUNCHED | {"MASTER_PORT": ""}, "without MASTER_PORT"),
        (LAUNCHED | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
        (LAUNCHED | {"RANK": "-1"}, "RANK is '-1', not a whole number"),
        (LAUNCHED | {"RANK": "4"}, "RANK 4 must be less than WORLD_SIZE 4"),
        (STEP | {"SLURM_PROCID": ""}, "Slurm step has no number for RANK"),
        (STEP | {"SLURM_JOB_NODELIST": ""}, "names no host; set MASTER_ADDR"),
    ],
)
def test_variables_that_say_half_are_refused(environment: dict[str, str], variables: dict[str, str], told: str) -> None:
    environment |= variables
    with pytest.raises(ConfigError, match=told):
        place()


@pytest.mark.timeout(120)
def test_rank_0_tells_a_fault_for_all() -> None:
    """Two real processes with half a launcher's variables: one line; the other rank is ended by its launcher meanwhile."""
    command = [sys.executable, "-m", "dist_train", "train", "--set", "engine.name=torch"]
    with started(command, RANK="0", LOCAL_RANK="0") as first, started(command, RANK="1", LOCAL_RANK="1") as second:
        out, err = first.communicate(timeout=60)
        assert second.poll() is None
    assert first.returncode == 2
    assert len(errors(subprocess.CompletedProcess(command, 2, out, err))) == 1
    assert "RANK=0, LOCAL_RANK=0 without WORLD_SIZE" in err


@pytest.mark.parametrize("told", [False, True])
def test_a_rank_of_another_node_is_silent_when_rank_0_has_told(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: bool
) -> None:
    monkeypatch.setattr(ranks, "RANK_0_TELLS_S", 0.1)
    if told:
        tell_exit(tmp_path, 2)
    environment["RANK"] = "1"
    began = time.monotonic()
    with pytest.raises(SystemExit if told else ConfigError), told_once(tmp_path):
        raise ConfigError("a fault")
    assert time.monotonic() - began >= 0.1


def test_other_ranks_leave_without_a_word_when_all_were_asked_to_stop(environment: dict[str, str]) -> None:
    for rank, raised in (("1", SystemExit), ("0", Interrupted)):
        environment["RANK"] = rank
        with pytest.raises(raised) as caught, told_once():
            raise Interrupted("asked to stop")
    assert getattr(caught.value, "exit_code", None) == 85


def test_variables_are_handed_over_whole_and_to_this_user_alone(environment: dict[str, str], tmp_path: Path) -> None:
    wanted = {"MLFLOW_TRACKING_PASSWORD": "a=b\n'$c", "AWS_PROFILE": "", "OMP_NUM_THREADS": "3", "https_proxy": "http://p"}
    environment |= wanted | {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "RANK": "0", "RAY_AUTH_TOKEN": "x"}
    hand_over(tmp_path)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    environment.clear()
    take_environment(tmp_path)
    assert environment == wanted


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is not on .*; set run_dir to one that nodes share"):
        take_environment(tmp_path / "nowhere")
