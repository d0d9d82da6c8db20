"""Trainings of several ranks that are killed, stopped, hung and starved: afterwards the bits of an undisturbed run."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Request, encode
from processes import small_disk, started
from safetensors.torch import load_file
from small_run import small_config, write_mixed_shards, write_small_shards

from dist_train.config import load_config
from dist_train.forecast import Machine, forecast
from dist_train.shards.index import Index
from dist_train.training.checkpoint import find_fault
from dist_train.training.tracker import read_spool

KILLS = 20
EPOCHS = 11
STEPS = 4 * EPOCHS


class Runs:
    """Runs of one small model below a folder, each launch of forked ranks."""

    def __init__(self, folder: Path, server) -> None:  # type: ignore[no-untyped-def]
        self.folder, self.server = folder, server

    def launch(self, name: str, ranks: int = 2, *overrides: str, signals=(), patches=(), stage: int = 1) -> list[int]:  # type: ignore[no-untyped-def]
        """One launch, to its end; the exit codes."""
        run = self.run(name)
        run.mkdir(exist_ok=True)
        json_file = self.folder / f"zero{stage}.json"
        json_file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = small_config(
            self.folder, f"run_dir={run}", "engine.name=deepspeed", f"engine.deepspeed_json={json_file}", *overrides
        )
        (self.folder / "run.yaml").write_text(config.to_yaml())
        arguments = ["train", "--config", str(self.folder / "run.yaml")]
        request = Request(ranks, arguments, str(run), str(run / "metrics.jsonl"), list(signals), list(patches))
        self.server.stdin.write(encode(request) + "\n")
        self.server.stdin.flush()
        return list(json.loads(self.server.stdout.readline()))

    def run(self, name: str) -> Path:
        return self.folder / name

    def told(self, name: str, rank: int = 0) -> str:
        """What a rank has printed in all launches."""
        return (self.run(name) / f"rank_{rank}.txt").read_text()

    def losses(self, name: str) -> dict[int, tuple[float, float]]:
        """Loss and norm of the gradient by step; each step is recorded once."""
        records = [r for r in read_spool(self.run(name) / "metrics.jsonl") if "train/loss" in r["metrics"]]
        assert len({r["step"] for r in records}) == len(records)
        return {r["step"]: (r["metrics"]["train/loss"], r["metrics"]["gradient_norm"]) for r in records}

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.run(name) / "bundle" / "model.safetensors")

    def last(self, name: str) -> int:
        return max(self.losses(name), default=0) if (self.run(name) / "metrics.jsonl").exists() else 0

    def assert_equal(self, name: str, other: str) -> None:
        """Bit for bit."""
        assert self.losses(name) == self.losses(other)
        expected, found = self.weights(other), self.weights(name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("faults")
    write_small_shards(folder)
    script = str(Path(__file__).with_name("forks.py"))
    with started([sys.executable, script], DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") as server:
        assert server.stdin and server.stdout
        line = server.stdout.readline()
        while line and line.strip() != "ready":
            line = server.stdout.readline()
        yield Runs(folder, server)
        server.stdin.close()
        server.wait(30)


LONG = (f"train.epochs={EPOCHS}", "train.checkpoint_every=3", "train.validate_every=11", "train.precision=bf16")


@pytest.fixture(scope="module")
def whole(runs: Runs) -> str:
    """An undisturbed run of two ranks."""
    assert runs.launch("whole", 2, *LONG) == [0, 0], runs.told("whole")
    assert set(runs.losses("whole")) == set(range(1, STEPS + 1))
    return "whole"


@pytest.mark.timeout(300)
def test_ranks_killed_at_random_again_and_again(runs: Runs, whole: str) -> None:
    """Until the run is through: each time one of the ranks gets SIGKILL at some moment of some step."""
    kills, chance = 0, random.Random(20191)
    while kills < KILLS or runs.last("killed") < STEPS:
        ahead = 1 if kills < KILLS else STEPS
        at = runs.last("killed") + chance.randint(0, ahead) if runs.last("killed") < STEPS - 2 else STEPS + 1
        signals = [(chance.randrange(2), signal.SIGKILL, at)] if kills < KILLS else []
        codes = runs.launch("killed", 2, *LONG, signals=signals)
        if -signal.SIGKILL in codes:
            kills += 1
        else:
            assert codes == [0, 0], runs.told("killed")
            break
    assert kills >= KILLS
    runs.assert_equal("killed", whole)


SAVE = "dist_train.training.checkpoint"
PHASES = {
    "nothing is written yet": (f"{SAVE}:_make", 2),
    "one rank's tensors are written, not flushed": (f"{SAVE}:save_file", 2),
    "tensors are flushed": (f"{SAVE}:_write_tensors", 2),
    "no state is written": (f"{SAVE}:Checkpoints._commit", 2),
    "no run.yaml is written": (f"{SAVE}:write_text", 7),
    "no manifest is written": (f"{SAVE}:write_text", 8),
    "no marker is written": (f"{SAVE}:write_text", 9),
    "it is not renamed": ("pathlib:Path.rename", 2),
    "it is renamed, not flushed": (f"{SAVE}:fsync", 4),
    "latest points at the one before": (f"{SAVE}:write_text", 10),
    "the old ones are still there": (f"{SAVE}:Checkpoints._remove_old", 2),
}
"""The call at which rank 0 is killed, in the second checkpoint of a launch."""


@pytest.mark.timeout(120)
def test_a_kill_in_every_phase_of_a_save(runs: Runs, whole: str) -> None:
    """The checkpoint before it, or it itself, is loaded next, and nothing half written is left in the end."""
    folder = runs.run("phases") / "checkpoints"
    for number, (phase, (place, call)) in enumerate(PHASES.items()):
        before = runs.last("phases")
        codes = runs.launch("phases", 2, *LONG, patches=[(0, place, call, "kill")])
        assert codes[0] == -signal.SIGKILL, phase
        left = sorted(folder.glob("step_*"))
        assert left and all(find_fault(path) is None for path in left if (path / "COMPLETE").exists()), phase
        assert number == 0 or runs.last("phases") > before, phase
    assert runs.launch("phases", 2, *LONG) == [0, 0], runs.told("phases")
    runs.assert_equal("phases", whole)
    assert not list(folder.glob(".*"))
    assert all(find_fault(path) is None for path in folder.glob("step_*"))


@pytest.mark.timeout(60)
def test_a_disk_that_fills_during_a_save(runs: Runs, whole: str, tmp_path: Path) -> None:
    """Said once, as one line; the checkpoint before it is whole, and a start with room goes on from there."""
    with small_disk(tmp_path, "1500k"):
        (runs.folder / "full").symlink_to(tmp_path)
        codes = runs.launch("full", 2, *LONG, "train.keep_checkpoints=100")
        assert codes[0] == 2
        folder = tmp_path / "checkpoints"
        assert not list(folder.glob(".*"))
        left = sorted(folder.glob("step_*"))
        assert left and all(find_fault(path) is None for path in left)
        told = runs.told("full") + runs.told("full", 1)
        (line,) = [line for line in told.splitlines() if "dist-train: error" in line]
        assert re.search(r"the disk of .* is full: the checkpoint of step \d+ was not written", line)
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path)], check=True, timeout=30)
        assert runs.launch("full", 2, *LONG, "train.keep_checkpoints=100") == [0, 0]
        runs.assert_equal("full", whole)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_saves_and_ends_all(runs: Runs, whole: str, number: signal.Signals) -> None:
    name = f"signal{number}"
    assert runs.launch(name, 2, *LONG, signals=[(1, number, 5)]) == [85, 0], runs.told(name)
    assert "asked to stop after step" in runs.told(name)
    at = runs.last(name)
    assert 5 <= at < STEPS
    assert (runs.run(name) / "checkpoints" / "latest").read_text() == f"step_{at:08d}"
    assert runs.launch(name, 2, *LONG) == [0, 0]
    runs.assert_equal(name, whole)


@pytest.mark.timeout(60)
def test_a_rank_that_hangs_is_ended_with_its_stack(runs: Runs, whole: str) -> None:
    place = "dist_train.backends.deepspeed_engine:DeepSpeedEngine.step"
    codes = runs.launch("hang", 2, *LONG, "train.watchdog_seconds=4", patches=[(1, place, 9, "hang")])
    assert codes == [1, 1]
    assert "Timeout" in runs.told("hang", 1) and "go_wrong" in runs.told("hang", 1)
    assert "go_wrong" not in runs.told("hang", 0)
    assert runs.launch("hang", 2, *LONG) == [0, 0]
    runs.assert_equal("hang", whole)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_stage_goes_on_from_any_other(runs: Runs, precision: str) -> None:
    """ZeRO 0 to 3 in float32 agree but for how AdamW rounds the last numbers of a run; in bf16 each has bits of its own.

    A flow is left out: its own training, after the run, makes much of what AdamW rounds.
    """
    options = (f"train.precision={precision}", "prior.kind=gaussian")
    for stage in range(4):
        assert runs.launch(f"{precision}{stage}", 2, *options, stage=stage) == [0, 0], runs.told(f"{precision}{stage}")
    if precision == "fp32":
        for stop, stage in ((3, 1), (5, 3), (7, 0), (9, 2)):
            codes = runs.launch("mixed", 2, *options, f"train.stop_after_step={stop}", stage=stage)
            assert codes == [0, 0], runs.told("mixed")
        assert runs.launch("mixed", 2, *options, stage=1) == [0, 0]
        for name in ("mixed", "fp320", "fp322", "fp323"):
            torch.testing.assert_close(runs.weights(name), runs.weights("fp321"), rtol=1e-6, atol=1e-7)
    else:
        for stage in range(4):
            name = f"cut{stage}"
            assert runs.launch(name, 2, *options, "train.stop_after_step=5", stage=stage) == [0, 0]
            assert runs.launch(name, 2, *options, stage=stage) == [0, 0]
            runs.assert_equal(name, f"{precision}{stage}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shape", ["12", "adaptive"])
def test_two_ranks_then_one_then_three(runs: Runs, shape: str) -> None:
    """Adaptive: each batch of three groups of one shape, which two ranks cut in two."""
    options, two, elastic = ("train.precision=fp32",), f"two-{shape}", f"elastic-{shape}"
    if shape == "adaptive":
        mixed = ("grid.shape=adaptive", f"data.shards={write_mixed_shards(runs.folder)}")
        options += (*mixed, "train.shape_group=4", "train.epochs=6")
    assert runs.launch(two, 2, *options) == [0, 0], runs.told(two)
    for ranks, stop, stage in ((2, 4, 1), (1, 8, 3), (3, 12, 2)):
        codes = runs.launch(elastic, ranks, *options, f"train.stop_after_step={stop}", stage=stage)
        assert codes == [0] * ranks, runs.told(elastic)
    found, expected = runs.losses(elastic), runs.losses(two)
    assert len(expected) >= 9
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parts_add_up_to_the_whole_batch(runs: Runs, stage: int) -> None:
    for name, more in ((f"whole_batch{stage}", ()), (f"parts{stage}", ("train.micro_batch_size=2",))):
        assert runs.launch(name, 2, "train.precision=fp32", *more, stage=stage) == [0, 0], runs.told(name)
    found, expected = runs.losses(f"parts{stage}"), runs.losses(f"whole_batch{stage}")
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4)


ENGINE = "dist_train.backends.deepspeed_engine:DeepSpeedEngine"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(runs: Runs, stage: int) -> None:
    name = f"nan{stage}"
    scale = "dist_train.models.autoencoder:Standardiser.density"
    assert runs.launch(name, 2, "train.precision=bf16", patches=[(1, scale, 3, "nan")], stage=stage) == [0, 0], runs.told(
        name
    )
    assert "12 steps done, 1 skipped" in runs.told(name)
    bad = {step for step, (_, norm) in runs.losses(name).items() if not math.isfinite(norm)}
    assert len(bad) == 1
    assert all(torch.isfinite(value).all() for value in runs.weights(name).values())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("precision", "micro"), [("fp32", 6), ("bf16", 6), ("bf16", 3)])
def test_memory_of_states_and_buckets_is_what_plan_foretells(runs: Runs, precision: str, micro: int) -> None:
    """On each of two ranks at each ZeRO stage, when the gradients are there."""
    wide = ("model.vae_widths=[16, 32]", "model.unet_width=16", "train.global_batch_size=12", "train.unet_share=1")
    options = (f"train.precision={precision}", f"train.micro_batch_size={micro}", "train.stop_after_step=2", *wide)
    for stage in range(4):
        name = f"held{precision}{micro}{stage}"
        before_update = [(rank, f"{ENGINE}._scale", 2, "bytes") for rank in range(2)]
        assert runs.launch(name, 2, *options, patches=before_update, stage=stage) == [0, 0], runs.told(name)
        config = load_config(runs.folder / "run.yaml")
        found = forecast(config, Index.read(config.data.shards), 2, {"stage": stage}, Machine(1e12, 80e9, 1e9, 1e9, 0))
        for rank in range(2):
            (line,) = [line for line in runs.told(name, rank).splitlines() if line.startswith('{"bytes"')]
            held = json.loads(line)["bytes"]
            assert held["states"] == pytest.approx(found.memory_of_states[stage], rel=0.03), (stage, rank)
            if stage == 3 or (stage == 1 and micro == 6):  # elsewhere they are gone when the gradients are whole
                assert held["buckets"] == found.memory_of_buckets
            assert held["buckets"] in (0, found.memory_of_buckets)


@pytest.mark.timeout(60)
def test_out_of_memory_halves_what_is_taken_at_once(runs: Runs) -> None:
    """The global batch stays what it is: the losses are those of a run that had the memory."""
    options = ("train.precision=fp32", "train.epochs=3", "train.checkpoint_every=3", "train.global_batch_size=8")
    assert runs.launch("roomy", 2, *options) == [0, 0]
    codes = runs.launch("tight", 2, *options, patches=[(1, f"{ENGINE}.step", 5, "memory")])
    assert codes[1] == 86
    assert "out of memory with 4 crystals at a time" in runs.told("tight", 1)
    assert "goes on from its newest checkpoint with 2" in runs.told("tight", 1)
    assert runs.launch("tight", 2, *options) == [0, 0], runs.told("tight")
    expected, found = runs.losses("roomy"), runs.losses("tight")
    assert all(found[step] == pytest.approx(values, rel=1e-4) for step, values in expected.items())


@pytest.mark.timeout(60)
def test_one_process_out_of_memory_goes_on_by_itself(runs: Runs) -> None:
    options = ("train.precision=fp32", "train.global_batch_size=8")
    patches = [(0, f"{ENGINE}.step", 5, "memory"), (0, "dist_train.commands.training:load", 1, "note")]
    assert runs.launch("alone", 1, *options, patches=patches) == [0], runs.told("alone")
    told = runs.told("alone")
    assert "out of memory with 8 crystals at a time" in told and "goes on from its newest checkpoint with 4" in told
    assert "called load" in told, "it goes on from a checkpoint"


def test_out_of_memory_with_one_crystal_is_the_end(runs: Runs) -> None:
    options = ("train.global_batch_size=2", "train.unet_share=1", "train.micro_batch_size=1")
    assert runs.launch("hopeless", 1, *options, patches=[(0, f"{ENGINE}.step", 2, "memory")]) == [2]
    assert "fewer can't be taken" in runs.told("hopeless")
