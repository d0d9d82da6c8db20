"""The DeepSpeed launcher with two real ranks on the CPU: one code path, exact resuming, errors before the first step."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import ROOT, small_config, write_small_shards

from dist_train.commands.training import check_training
from dist_train.config import load_config
from dist_train.errors import ConfigError
from dist_train.training.tracker import read_spool

LIMIT_S = 150


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(config: Path, *overrides: str, port: int | None = None, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`deepspeed ... dist_train train` in a process group that is ended with the test."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [
        str(deepspeed), "--quiet", "--num_accelerators", str(ranks), "--master_port", str(port or free_port()),
        "--no_local_rank", "--module", "dist_train", "train", "--config", str(config),
        *(part for override in overrides for part in ("--set", override)),
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_small_shards(folder)
    settings = small_config(
        folder, "engine.name=deepspeed", f"engine.deepspeed_json={ROOT}/launch/deepspeed/zero1.json",
        "train.precision=bf16", f"run_dir={folder}/whole",
    )  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(settings.to_yaml())
    return path


def losses(run: Path) -> dict[int, float]:
    records = [r for r in read_spool(run / "metrics.jsonl") if "train/loss" in r["metrics"]]
    assert len({r["step"] for r in records}) == len(records)
    return {r["step"]: r["metrics"]["train/loss"] for r in records}


@pytest.mark.timeout(4 * LIMIT_S)
def test_two_ranks_resume_bit_for_bit(config: Path) -> None:
    """ZeRO 1 in bf16: a run stopped at a checkpoint and started again ends with the weights of the uninterrupted run."""
    folder = config.parent
    whole = launch(config)
    assert whole.returncode == 0, whole.stderr
    assert "12 steps done" in whole.stdout
    stopped = launch(config, f"run_dir={folder}/cut", "train.stop_after_step=5")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped after step 5" in stopped.stdout
    resumed = launch(config, f"run_dir={folder}/cut")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (load_file(folder / run / "bundle" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(folder / "whole") == losses(folder / "cut")
    assert set(losses(folder / "whole")) == set(range(1, 13))


@pytest.mark.timeout(LIMIT_S)
def test_one_rank_learns_as_two_do(config: Path) -> None:
    """The global batches and their noise don't depend on the number of ranks: the losses agree."""
    folder = config.parent
    options = ("train.precision=fp32", "train.stop_after_step=3")
    one = launch(config, f"run_dir={folder}/one", *options, ranks=1)
    two = launch(config, f"run_dir={folder}/two", *options, ranks=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    found = [[r["metrics"] for r in read_spool(folder / run / "metrics.jsonl")] for run in ("one", "two")]
    for a, b in zip(*found, strict=True):
        for part in ("loss", "density", "species", "kl", "lattice", "count", "composition"):
            assert a[f"train/{part}"] == pytest.approx(b[f"train/{part}"], rel=1e-4)


@pytest.mark.timeout(LIMIT_S)
def test_a_port_in_use_is_one_clear_message(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = launch(config, f"run_dir={config.parent}/never", port=port)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "dist-train: error" in line]
    assert len(errors) == 1
    assert str(port) in errors[0]
    assert "--master_port" in errors[0]
    assert not (config.parent / "never").exists()


@pytest.mark.timeout(LIMIT_S)
def test_a_fault_that_all_ranks_find_is_told_once(config: Path, tmp_path: Path) -> None:
    clash = tmp_path / "clash.json"
    clash.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 7}))
    settings = yaml.safe_load(config.read_text())
    settings["engine"]["deepspeed_json"] = str(clash)
    other = tmp_path / "run.yaml"
    other.write_text(yaml.safe_dump(settings))
    result = launch(other, f"run_dir={tmp_path}/never")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "dist-train: error" in line]
    assert len(errors) == 1
    assert "train_batch_size" in errors[0]
    assert "train.global_batch_size" in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stages_that_can_not_keep_the_promises_are_refused(config: Path, tmp_path: Path, stage: int) -> None:
    other = tmp_path / "zero.json"
    other.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run = load_config(config, (f"engine.deepspeed_json={other}",))
    with pytest.raises(ConfigError, match=rf"ZeRO stage {stage}; this program runs \[1, 2\]"):
        check_training(run, 2)
