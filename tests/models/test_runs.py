"""Whole runs of what other tests see piece by piece: adaptive grids, and a U-Net on a VAE that was trained before it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import make_model
from small_run import small_config, write_mixed_shards, write_small_shards

from dist_train.commands import training as commands
from dist_train.errors import ModelError
from dist_train.generate import reconstruct
from dist_train.model_card import model_card
from dist_train.models.export import Ancestor, read_bundle, write_bundle
from dist_train.models.reconstruct import Codec
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.training.tracker import read_spool


def records(run: Path, name: str) -> list[float]:
    return [record["metrics"][name] for record in read_spool(run / "metrics.jsonl") if name in record["metrics"]]


def test_a_run_on_adaptive_grids_learns_validates_and_reconstructs(tmp_path: Path) -> None:
    """Batches of two crystals of one shape and two of another, which is seldom the same."""
    batches = ("train.global_batch_size=4", "train.shape_group=2", "train.epochs=5")
    adaptive = ("grid.shape=adaptive", *batches, "train.learning_rate=1e-2")
    config = small_config(tmp_path, *adaptive, "train.validate_every=1000", f"data.shards={write_mixed_shards(tmp_path)}")
    index = Index.read(config.data.shards)
    assert len(set(ShardReader(index, "train").shapes)) > 2
    assert len(set(ShardReader(index, "val").shapes)) > 1
    assert "model bundle" in commands.train(config)
    species = records(tmp_path / "run", "train/species")
    assert sum(species[-4:]) < 0.8 * sum(species[:4]), species
    assert records(tmp_path / "run", "val/loss")
    codec = Codec(read_bundle(tmp_path / "run" / "bundle")[0])
    val = ShardReader(index, "val")
    found = reconstruct(codec, [val.crystal(place) for place in range(len(val))])
    assert all(decoded.crystal is not None or decoded.reason for decoded in found)
    assert (tmp_path / "run" / "figures" / "slices.png").stat().st_size > 0


def test_a_unet_is_trained_on_the_vae_of_a_bundle(tmp_path: Path) -> None:
    write_small_shards(tmp_path)
    steps = "train.epochs=2"
    first, second = tmp_path / "vae", tmp_path / "unet"
    commands.train(small_config(tmp_path, f"run_dir={first}", "train.objective=vae", steps))
    assert set(records(first, "train/species")) == {0.0}
    start = f"train.init_from={first}/bundle"
    commands.train(small_config(tmp_path, f"run_dir={second}", "train.objective=unet", start, steps))
    before, after = (read_bundle(run / "bundle")[0].state_dict() for run in (first, second))
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all(name.startswith("unet.") for name in changed)
    old, new = (json.loads((run / "bundle" / "config.json").read_text())["about"] for run in (first, second))
    assert new["started_from"] == {name: old[name] for name in ("step", "data_digest", "git_commit")}
    assert new["training_digests"] == old["training_digests"]  # the same samples
    assert f"started from a model of {old['step']} steps" in model_card("m", read_bundle(second / "bundle")[1])
    with pytest.raises(ModelError, match=r"init_from .* has another model: latent is 10 there, 9 here"):
        commands.train(small_config(tmp_path, f"run_dir={tmp_path}/never", "train.objective=unet", start, "model.latent=9"))


def test_a_model_has_seen_what_the_one_it_started_from_was_trained_on(tmp_path: Path) -> None:
    model, seen = make_model(), np.array([3, 5], np.uint64)
    about = {"step": 7, "data_digest": "a", "training_digests": {"version": 2, "samples": 2, "of": 9}}
    new = {"data_digest": "b", "training_digests": {"version": 2, "samples": 3, "of": 3}}
    known, unknown = (write_bundle(tmp_path / n, model, model.state_dict(), about, d) for n, d in (("k", seen), ("u", None)))
    told, digests = Ancestor.of(known).inherit(dict(new), np.array([4, 5], np.uint64))
    assert digests is not None
    assert digests.tolist() == [3, 4, 5]
    assert told["training_digests"] == {"version": 2, "samples": 5, "of": 12}
    assert told["started_from"] == {"step": 7, "data_digest": "a"}
    assert Ancestor.of(unknown).inherit(dict(new), np.array([4], np.uint64))[1] is None
    other = new | {"training_digests": {"version": 3, "samples": 3, "of": 3}}
    assert Ancestor.of(known).inherit(other, np.array([4], np.uint64))[1] is None  # digests of another kind
