"""Launchers with two real ranks on the CPU: one code path, exact resuming, errors before the first step."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import (
    LIMIT_S,
    SLOWED,
    assert_same_training,
    errors,
    finished,
    launch_command,
    members,
    rank_at_step,
    started,
)  # fmt: skip
from small_run import ROOT

from dist_train.cli import main
from dist_train.commands.training import check_training
from dist_train.config import load_config
from dist_train.errors import ConfigError
from dist_train.node import free_port, port_fault


def launch(config: Path, *overrides: str, port: int | None = None, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`deepspeed ... dist_train train`, as typed by hand."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return finished([
        str(deepspeed), "--quiet", "--num_accelerators", str(ranks), "--master_port", str(port or free_port()),
        "--no_local_rank", "--module", "dist_train", "train", "--config", str(config),
        *(part for override in overrides for part in ("--set", override)),
    ])  # fmt: skip


@pytest.fixture
def config(undisturbed_run: Path) -> Path:
    return undisturbed_run


@pytest.mark.timeout(2 * LIMIT_S)
def test_the_printed_torchrun_command_runs_when_it_is_pasted(config: Path, tmp_path: Path) -> None:
    shown = finished(launch_command(config, "--ranks", "2", "--launcher", "torchrun", "--print", run_dir=f"{tmp_path}/it's"))
    assert shown.returncode == 0, shown.stderr
    assert "torchrun" in shown.stdout
    assert not (tmp_path / "it's").exists()
    pasted = finished(["bash", "-c", shown.stdout], OMP_NUM_THREADS="7")
    assert pasted.returncode == 0, pasted.stderr
    assert (tmp_path / "it's" / ".launch" / "exit_code").read_text() == "0"
    assert_same_training(config.parent / "whole", tmp_path / "it's")


SRUN = """#!/bin/bash
# What srun does with two tasks on this machine.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
exit $((a > b ? a : b))
"""


def write_tools(folder: Path, **scripts: str) -> str:
    """Programs that stand for those of Slurm; returns a PATH with them in front."""
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.timeout(2 * LIMIT_S)
def test_the_slurm_script_trains_to_the_same_weights(config: Path, tmp_path: Path) -> None:
    """Real processes with the variables that srun sets; Slurm itself is not here."""
    options = ("--slurm", "--nodes", "1", "--ranks-per-node", "2", "--print")
    shown = finished(launch_command(config, *options, run_dir=f"{tmp_path}/run"))
    assert shown.returncode == 0, shown.stderr
    job = next(number for number in range(os.getpid(), os.getpid() + 1000) if not port_fault(10_000 + number % 20_000))
    # As in a batch script: the job's variables, and the script's own place, but no step.
    variables = {
        "PATH": write_tools(tmp_path, srun=SRUN), "SLURM_JOB_ID": str(job), "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost,node[02-03]",
    }  # fmt: skip
    done = finished(["bash", "-c", shown.stdout], **variables)
    assert done.returncode == 0, done.stderr
    assert_same_training(config.parent / "whole", tmp_path / "run")


@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("code", [0, 85, 2])
def test_the_slurm_script_is_requeued_after_a_checkpoint_on_a_signal(config: Path, tmp_path: Path, code: int) -> None:
    wanted = ("--slurm", "--ranks-per-node", "2", "--print")
    shown = finished(launch_command(config, *wanted, run_dir=tmp_path / "run"))
    scontrol = f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n'
    path = write_tools(tmp_path, srun=f"#!/bin/sh\nexit {code}\n", scontrol=scontrol)
    done = finished(["bash", "-c", shown.stdout], PATH=path, SLURM_JOB_ID="4242")
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 4242\n" if code == 85 else "")


def test_the_slurm_script_in_the_repository_is_what_is_printed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    changes = (f"run_dir={tmp_path}", "train.global_batch_size=16", "train.unet_share=1.0")
    other = tmp_path / "run.yaml"
    other.write_text(load_config(config, changes).to_yaml())
    kept = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    options = ("--slurm", "--nodes", "2", "--ranks-per-node", "8", "--print")
    assert main(["launch", "--config", str(other), *options]) == 0
    printed = capsys.readouterr().out
    for own, shown in (
        (str(other), "launch/runs/demo.yaml"),
        (sys.executable, "python"),  # before the folder that it may lie in
        (os.getcwd(), "/shared/dist_train"),
    ):
        printed = printed.replace(own, shown)
    assert printed == kept


@pytest.mark.timeout(3 * LIMIT_S)
def test_a_killed_rank_is_started_again_and_changes_nothing(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = launch_command(config, "--ranks", "2", "--restarts", "1", run_dir=run, **SLOWED)
    with started(command) as process:
        rank_at_step(run, 4, process).send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert "on again from their newest checkpoint" in err
    assert "12 steps done" in out
    assert not members(run)
    assert_same_training(config.parent / "whole", run)


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_port_in_use_is_one_clear_message(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = launch(config, f"run_dir={config.parent}/never", port=port)
    assert result.returncode == 2
    told = errors(result)
    assert len(told) == 1
    assert str(port) in told[0]
    assert "--master_port" in told[0]
    assert not (config.parent / "never").exists()


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_fault_that_all_ranks_find_is_told_once(config: Path, tmp_path: Path) -> None:
    clash = tmp_path / "clash.json"
    clash.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 7}))
    settings = yaml.safe_load(config.read_text())
    settings["engine"]["deepspeed_json"] = str(clash)
    other = tmp_path / "run.yaml"
    other.write_text(yaml.safe_dump(settings))
    result = launch(other, f"run_dir={tmp_path}/never")
    assert result.returncode == 2
    told = errors(result)
    assert len(told) == 1
    assert "train_batch_size" in told[0]
    assert "train.global_batch_size" in told[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("stage", [4, "1"])
def test_zero_stages_that_do_not_exist_are_refused(config: Path, tmp_path: Path, stage: object) -> None:
    other = tmp_path / "zero.json"
    other.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run = load_config(config, (f"engine.deepspeed_json={other}",))
    with pytest.raises(ConfigError, match=f"ZeRO stage {stage}, known are 0, 1, 2, 3"):
        check_training(run, 2)
