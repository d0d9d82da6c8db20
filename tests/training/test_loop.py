"""The train loop on the plain engine: exact resuming, checkpoints that survive damage, skipped steps, metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_config, write_small_shards

from dist_train.commands import training as commands
from dist_train.errors import CheckpointError, ConfigError, DistTrainError, ModelError
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.training.checkpoint import Checkpoints, find_fault, read_state
from dist_train.training.engine import TorchEngine
from dist_train.training.loop import fit, validate
from dist_train.training.state import TrainState, learning_rate
from dist_train.training.tracker import NoTracker, Spool, read_spool


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_small_shards(folder)
    return folder


def settings(shards: Path, run: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return small_config(shards, f"run_dir={run}", *overrides)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "bundle" / "model.safetensors")


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["metrics"]["train/loss"] for r in read_spool(run / "metrics.jsonl") if "train/loss" in r["metrics"]}


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path / "whole"))
    for stop in (3, 4, 7):
        assert "stopped" in commands.train(settings(shards, tmp_path / "cut", f"train.stop_after_step={stop}"))
    commands.train(settings(shards, tmp_path / "cut"))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "whole")) == 12


def test_training_lowers_the_loss(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path, "train.epochs=20", "train.learning_rate=5e-3"))
    found = losses(tmp_path)
    first, last = (sum(found[s] for s in steps) / 4 for steps in (range(1, 5), range(len(found) - 3, len(found) + 1)))
    assert last < 0.8 * first


def test_finished_run_can_be_started_again_and_changes_nothing(shards: Path, tmp_path: Path) -> None:
    config = settings(shards, tmp_path)
    commands.train(config)
    before = weights(tmp_path)
    commands.train(config)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())


@pytest.mark.parametrize("damage", ["altered", "missing", "manifest", "uncommitted"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(shards: Path, tmp_path: Path, damage: str) -> None:
    commands.train(settings(shards, tmp_path, "train.stop_after_step=8"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", settings(shards, tmp_path))
    *_, before, newest = checkpoints.committed()
    target = newest / "rank_00000.safetensors"
    if damage == "altered":
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    elif damage == "missing":
        target.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{}")
    else:
        (newest / "COMPLETE").unlink()
    assert checkpoints.newest() == before
    assert read_state(before).step == 4
    assert find_fault(before) is None


def test_no_whole_checkpoint_is_an_error_that_names_all(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path, "train.stop_after_step=8"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", settings(shards, tmp_path))
    for folder in checkpoints.committed():
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_00000008: state\.json was altered.*step_00000004"):
        checkpoints.newest()


def test_old_checkpoints_are_removed_and_latest_points_at_the_newest(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path, "train.checkpoint_every=2"))
    names = [folder.name for folder in (tmp_path / "checkpoints").glob("step_*")]
    assert sorted(names) == ["step_00000010", "step_00000012"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000012"
    assert not list((tmp_path / "checkpoints").glob(".*"))


class BrokenEngine(TorchEngine):
    """An engine on a machine where the first steps overflow."""

    bad_steps = 0

    def step(self, parts, learning_rate, kl_weight):  # type: ignore[no-untyped-def]
        if self.bad_steps:
            type(self).bad_steps -= 1
            parts = [(batch._replace(density_BCDHW=batch.density_BCDHW * float("nan")), noise) for batch, noise in parts]
        return super().step(parts, learning_rate, kl_weight)


def broken_run(shards: Path, run: Path, bad_steps: int) -> TrainState:
    config = settings(shards, run, "train.max_nonfinite=3")
    index = Index.read(config.data.shards)
    train, val = ShardReader(index, "train"), ShardReader(index, "val")
    engine = BrokenEngine(commands.build_model(config, index, train), config)
    BrokenEngine.bad_steps = bad_steps
    state = TrainState(0, config.seed, index.digest, "")
    return fit(config, engine, train, val, NoTracker(), Checkpoints(run / "checkpoints", config), state)


def test_steps_without_a_finite_gradient_are_skipped_and_counted(shards: Path, tmp_path: Path) -> None:
    state = broken_run(shards, tmp_path, bad_steps=2)
    assert (state.step, state.skipped) == (12, 2)


def test_too_many_such_steps_in_a_row_stop_the_run_and_name_the_samples(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DistTrainError, match=r"3 steps in a row.*step 2.*train0000"):
        broken_run(shards, tmp_path, bad_steps=3)


def test_other_settings_in_the_same_run_folder_are_refused(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path, "train.stop_after_step=2"))
    with pytest.raises(CheckpointError, match="holds another run"):
        commands.train(settings(shards, tmp_path, "train.learning_rate=1e-3"))


def test_other_data_under_the_same_run_folder_are_refused(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path / "run", "train.stop_after_step=2"))
    write_small_shards(tmp_path / "other", crystals=64)
    with pytest.raises(CheckpointError, match="data_digest"):
        commands.train(settings(tmp_path / "other", tmp_path / "run"))


def test_grid_that_differs_from_the_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sigma_A is 0\.5 there, 0\.4 here"):
        commands.train(settings(shards, tmp_path, "grid.sigma_A=0.4"))


def test_learning_rate_warms_up_and_ends_near_zero(shards: Path) -> None:
    train = settings(shards, shards).train
    rates = [learning_rate(step, 100, train) for step in range(100)]
    assert rates[0] == pytest.approx(train.learning_rate / train.warmup_steps, rel=1e-3)
    assert max(rates) <= train.learning_rate
    assert rates[-1] < 1e-3 * train.learning_rate
    assert rates[train.warmup_steps :] == sorted(rates[train.warmup_steps :], reverse=True)


def test_spool_survives_a_torn_line_and_writes_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    spool = Spool(path)
    spool.log(1, {"a": 1.0})
    spool.log(2, {"a": 2.0})
    spool.close()
    with path.open("a") as stream:
        stream.write('{"step": 3, "ti')
    again = Spool(path)
    for step in (2, 3):
        again.log(step, {"a": float(step)})
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_bf16_trains_and_validates(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path, "train.precision=bf16"))
    assert any("val/loss" in record["metrics"] for record in read_spool(tmp_path / "metrics.jsonl"))


def test_a_rank_without_validation_crystals_adds_up_the_same_numbers(shards: Path, tmp_path: Path) -> None:
    """Ranks sum lists of numbers: one with nothing to add must still have all of them, in order."""
    config = settings(shards, tmp_path)
    index = Index.read(config.data.shards)
    engine = TorchEngine(commands.build_model(config, index, ShardReader(index, "train")), config)
    val = ShardReader(index, "val")
    names = list(validate(config, engine, val))
    engine.rank, engine.ranks = len(val), len(val) + 1
    idle = validate(config, engine, val)
    assert list(idle) == names
    assert set(idle.values()) == {0.0}


def test_whole_checkpoints_are_not_crowded_out_by_a_damaged_later_one(shards: Path, tmp_path: Path) -> None:
    commands.train(settings(shards, tmp_path, "train.stop_after_step=8"))
    (tmp_path / "checkpoints" / "step_00000008" / "state.json").write_text("{}")
    config = settings(shards, tmp_path, "train.keep_checkpoints=1", "train.stop_after_step=6")
    commands.train(config)
    validated, last = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert (validated.name, last.name) == ("step_00000004", "step_00000006")
    assert find_fault(last) is None


def test_metrics_of_other_data_are_forgotten(shards: Path, tmp_path: Path) -> None:
    """A run that was ended before its first checkpoint starts anew, and its records are those of the data it has now."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "data_digest").write_text("of other data")
    spool = Spool(run / "metrics.jsonl")
    spool.log(1, {"train/loss": -1.0})
    spool.close()
    commands.train(settings(shards, run, "train.stop_after_step=2"))
    assert losses(run)[1] > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [("grid.channels=[period]", "lack 'occupancy' or 'z_density'"), ("grid.shape=13", "must be a multiple of 4")],
)
def test_grids_that_can_not_be_trained_on_are_refused_at_once(shards: Path, tmp_path: Path, change: str, told: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=told):
        commands.train(settings(shards, tmp_path, change))


def test_crystals_that_no_batch_takes_are_told(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = Index.read(settings(shards, tmp_path).data.shards)
    shapes = [(8, 8, 8)] * 5 + ShardReader(index, "train").shapes[5:]
    monkeypatch.setattr(ShardReader, "shapes", property(lambda _: shapes))
    commands.train(settings(shards, tmp_path, "train.stop_after_step=1"))
    assert f"5 of {len(shapes)} training samples are never seen" in caplog.text


def test_a_vae_alone_is_not_judged_by_a_unet_that_nothing_trained(shards: Path, tmp_path: Path) -> None:
    """Nor does the U-Net's share of the crystals have to be a whole number of them."""
    commands.train(settings(shards, tmp_path, "train.objective=vae", "train.unet_share=0.1", "train.epochs=1"))
    (found,) = (r["metrics"] for r in read_spool(tmp_path / "metrics.jsonl") if "val/loss" in r["metrics"])
    assert found["val/loss"] > 0
    assert not {"val/count_exact", "val/composition_exact"} & found.keys()
    assert (tmp_path / "figures" / "loss_curves.png").exists()
