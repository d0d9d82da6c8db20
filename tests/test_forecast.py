"""`dist-train plan`: what it says of a run is what the run then has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import small_config, write_small_shards

from dist_train.cli import main
from dist_train.commands import planning
from dist_train.commands.planning import plan
from dist_train.commands.training import build_model
from dist_train.config import RunConfig
from dist_train.errors import ConfigError
from dist_train.forecast import Machine, forecast, states_bytes
from dist_train.models.cost import activation_bytes, flops_per_sample
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.training.engine import TorchEngine
from dist_train.training.loop import batch_plan

MACHINE = Machine(flops=1e12, memory=80e9, network=1e9, disk=1e9, price=2.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("plan")
    write_small_shards(folder)
    return small_config(folder, "engine.name=deepspeed")


def test_parameters_steps_and_states_are_those_of_the_run(config: RunConfig) -> None:
    index = Index.read(config.data.shards)
    reader = ShardReader(index, "train")
    found = forecast(config, index, 1, {"stage": 0}, MACHINE)
    engine = TorchEngine(build_model(config, index, reader), config)
    order = batch_plan(config, reader, 0, 1)
    assert (found.steps, found.left_out, found.samples) == (order.steps, order.dropped, len(reader))
    assert found.parameters == found.trained == sum(p.numel() for p in engine.objective.model.parameters())
    gradients = 4 * found.trained
    states = sum(t.nbytes for piece in engine.pieces for t in (piece.weight, piece.exp_avg, piece.exp_avg_sq))
    states += sum(average.nbytes for average in engine.average.values)
    assert found.memory_of_states[0] - gradients == states
    assert found.checkpoint_bytes == states


def test_what_is_frozen_has_no_states(config: RunConfig) -> None:
    vae = config.model_copy(update={"train": config.train.model_copy(update={"objective": "vae"})})
    index = Index.read(config.data.shards)
    found = forecast(vae, index, 1, {"stage": 0}, MACHINE)
    unet = build_model(config, index, ShardReader(index, "train")).unet
    assert found.parameters - found.trained == sum(p.numel() for p in unet.parameters())
    assert found.memory_of_states[0] == 4 * found.parameters + 16 * found.trained


def test_states_are_shared_out_by_the_stage() -> None:
    """Rajbhandari et al. (2020), with an average besides: 20 bytes a number, and 2 of weights and gradients each."""
    n, ranks = 1000, 8
    sizes = [states_bytes(n, n, ranks, stage, "bf16", 1) for stage in range(4)]
    assert sizes == [20 * n, (2 + 2) * n + 16 * n // 8, 2 * n + 18 * n // 8, 20 * n // 8]
    assert states_bytes(n, n, 1, 1, "bf16", 2) == 24 * n, "parts of a batch add up in float32, each in bf16 beside"
    assert states_bytes(n, n, 1, 2, "bf16", 2) == 22 * n


def test_arithmetic_and_activations_grow_with_the_voxels(config: RunConfig) -> None:
    for count in (flops_per_sample, activation_bytes):
        small, large = (count(config, 5, (edge,) * 3) for edge in (12, 24))
        assert 6 < large / small < 8.1, "eight times the voxels, and what doesn't depend on them"
    again = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": True})})
    assert activation_bytes(again, 5, (12,) * 3) < 0.7 * activation_bytes(config, 5, (12,) * 3)
    assert flops_per_sample(again, 5, (12,) * 3) == flops_per_sample(config, 5, (12,) * 3)


def test_time_bytes_and_money_follow(config: RunConfig) -> None:
    index = Index.read(config.data.shards)
    one, two = (forecast(config, index, ranks, {"stage": 1}, MACHINE) for ranks in (1, 2))
    assert one.gradient_seconds == 0
    assert one.step_seconds == pytest.approx(config.train.global_batch_size * one.flops_per_sample / MACHINE.flops)
    assert two.step_seconds == pytest.approx(one.step_seconds / 2 + two.gradient_bytes / MACHINE.network)
    assert two.hours == pytest.approx(two.steps * two.step_seconds / 3600)
    assert two.cost == pytest.approx(two.hours * 2 * MACHINE.price)
    assert two.mtbf_hours == pytest.approx(one.mtbf_hours / 2)


@pytest.mark.parametrize(
    ("machine", "overrides", "told"),
    [
        (Machine(1e12, 1e6, 1e9, 1e9, 0), (), "GB: take a train.micro_batch_size under 6"),
        (Machine(1e15, 80e9, 1e6, 1e9, 0), (), "of a step on this network"),
        (Machine(1e15, 80e9, 1e9, 1e9, 0), ("train.checkpoint_every=1",), "waits for checkpoints"),
        (Machine(1e6, 80e9, 1e9, 1e9, 0), ("train.checkpoint_every=9000000",), "train.checkpoint_every is 9000000"),
    ],
)  # fmt: skip
def test_what_would_go_wrong_is_told(config: RunConfig, machine: Machine, overrides: tuple[str, ...], told: str) -> None:
    changed = small_config(Path(config.data.folder).parent, *overrides)
    found = forecast(changed, Index.read(config.data.shards), 2, {"stage": 1, "reduce_bucket_size": 1}, machine)
    assert any(told in warning for warning in found.warnings), found.warnings


def test_the_verb(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert main(["plan", "--config", str(path), "--world-size", "3", "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "12 crystals a step = 3 ranks x 1 x 4" in out
    assert "(h200)" in out
    assert main(["plan", "--config", str(path), "--device", "here", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 1
    with pytest.raises(ConfigError, match="can't be divided among 5 ranks"):
        plan(config, 5)


@pytest.mark.parametrize(("speed", "told"), [(1.3, True), (1.05, False)])
def test_a_precision_that_is_faster_here_is_named(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, speed: float, told: bool
) -> None:
    """Whichever this CPU is faster in: the measured speeds are made up, nothing else."""
    changed = small_config(Path(config.data.folder).parent, "train.precision=bf16")
    monkeypatch.setattr(planning, "measure", lambda config, *_: 1e9 * (speed if config.train.precision == "fp32" else 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = plan(changed, 1, "here")
    assert ("train.precision=fp32 is 1.3 times as fast as bf16 on this machine" in text) == told
    assert "times as fast" not in plan(config, 1, "here")  # which is of fp32
