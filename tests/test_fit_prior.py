"""`dist-train fit-prior` on a released model: other samples, the same reconstructions, honest digests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_train.cli import main
from dist_train.crystal.digest import digest, digests_near
from dist_train.crystal.parquet import write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.files import sha256
from dist_train.generate import draw
from dist_train.models.export import read_bundle, read_properties, training_digests
from dist_train.models.reconstruct import Codec

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "models" / "perov_5"
STEPS = 100
QUICK = ("--steps", str(STEPS), "--width", "16", "--depth", "1")


@pytest.fixture(scope="module")
def lithium(tmp_path_factory: pytest.TempPathFactory, sample_table: Callable[[str], list[Crystal]]) -> Path:
    """A table of the perovskites that hold lithium."""
    path = tmp_path_factory.mktemp("tables") / "lithium.parquet"
    write_parquet(path, [crystal for crystal in sample_table("perov_5") if 3 in crystal.composition])
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, lithium: Path) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "lithium"
    assert main(["fit-prior", "--model", str(MODEL), "--data", str(lithium), "--out", str(out), *QUICK]) == 0
    return out


def test_samples_are_made_of_what_the_crystals_are_made_of(fitted: Path) -> None:
    codec = Codec(read_bundle(fitted)[0])
    atoms_NE = draw(codec, 40, seed=0).atoms_NE
    assert atoms_NE is not None
    assert (atoms_NE[:, codec.model.elements.index(3)] > 0).float().mean() > 0.5  # of all perovskites, 0.05
    assert (atoms_NE.sum(1) == 5).all()


def test_all_but_the_prior_is_as_it_was(fitted: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (MODEL, fitted))
    small = {name for name, value in after.items() if value.dtype == torch.int8}
    assert small == {name.removesuffix(".scale") for name in after if name.endswith(".scale")}
    assert all(name.startswith("flow.") for name in small)
    assert {value.dtype for name, value in after.items() if not name.startswith("flow.")} == {torch.float16}
    changed = {name for name in before if name not in after or not torch.equal(before[name], after[name])}
    assert all(name.startswith(("flow.", "prior_")) for name in changed | (after.keys() - before.keys()))
    assert {"prior_mean", "prior_cholesky"} <= changed
    heads = read_properties(fitted)
    assert heads is not None and heads.properties
    assert (fitted / "run.yaml").read_bytes() == (MODEL / "run.yaml").read_bytes()
    assert not (fitted / "evaluation.json").exists()


def test_the_bundle_tells_what_it_was_fitted_to(fitted: Path, lithium: Path) -> None:
    about = json.loads((fitted / "config.json").read_text())["about"]
    assert about["prior"]["data"] == str(lithium)
    assert (about["prior"]["steps"], about["prior"]["width"]) == (STEPS, 16)
    assert f"samples: fitted to {about['prior']['crystals']} crystals of {lithium}" in (fitted / "model_card.md").read_text()


def test_crystals_of_more_volume_an_atom_are_left_out(
    lithium: Path, sample_table: Callable[[str], list[Crystal]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes = [crystal.volume_A3 / len(crystal) for crystal in sample_table("perov_5") if 3 in crystal.composition]
    limit = round(float(np.median(volumes)), 1)
    small = sum(volume <= limit for volume in volumes)
    assert 0 < small < len(volumes)
    out, command = tmp_path / "small", ["fit-prior", "--model", str(MODEL), "--data", str(lithium), *QUICK]
    assert main([*command, "--out", str(out), "--max-volume", str(limit)]) == 0
    told = capsys.readouterr().out
    assert f"fitted to {small} crystals" in told
    assert f"{len(volumes) - small} crystals were not taken" in told
    assert f"fitted to {small} crystals of {lithium} with at most {limit} A^3 an atom" in (out / "model_card.md").read_text()
    assert json.loads((out / "config.json").read_text())["about"]["prior"]["max_volume"] == limit
    assert main([*command, "--out", str(tmp_path / "none"), "--max-volume", "1"]) == 2
    assert "A^3 an atom, more than --max-volume 1" in capsys.readouterr().err


def test_crystals_that_the_model_had_not_seen_count_as_seen(
    fitted: Path, tmp_path: Path, sample_table: Callable[[str], list[Crystal]], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = training_digests(fitted)
    assert listed is not None
    known = set(listed.tolist())
    new = [crystal for crystal in sample_table("perov_5")[:600] if known.isdisjoint(digests_near(crystal))]
    assert new
    write_parquet(tmp_path / "new.parquet", new)
    command = ["fit-prior", "--model", str(fitted), "--data", str(tmp_path / "new.parquet"), *QUICK]
    shutil.copytree(fitted, tmp_path / "same")
    assert main([*command, "--out", str(tmp_path / "same")]) == 0
    assert f"fitted to {len(new)} crystals; {len(new)} of which are new to it" in capsys.readouterr().out
    found = training_digests(tmp_path / "same")
    assert found is not None
    assert np.isin(np.array([digest(crystal) for crystal in new], np.uint64), found).all()
    counts = [json.loads((f / "config.json").read_text())["about"]["training_digests"] for f in (fitted, tmp_path / "same")]
    assert counts[1]["samples"] == counts[0]["samples"] + len(new)


def test_same_seed_same_bytes(fitted: Path, lithium: Path, tmp_path: Path) -> None:
    for name, seed in (("again", "0"), ("other", "1")):
        out = tmp_path / name / "lithium"
        command = ["fit-prior", "--model", str(MODEL), "--data", str(lithium), "--out", str(out), "--seed", seed, *QUICK]
        assert main(command) == 0
    folders = fitted, tmp_path / "again" / "lithium", tmp_path / "other" / "lithium"
    first, again, other = (sha256(folder / "model.safetensors") for folder in folders)
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--data", str(DATA / "sample" / "cifs" / "carbon_24")), "that the model takes; the first: spacing of"),
        (("--data", str(MODEL), "--split", "val"), "--split val is of shards, and --data has none"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", str(MODEL), "--temperature", "3"), "--temperature 3 is above 1"),
    ],
)
def test_what_can_not_be_fitted_is_told(
    options: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit-prior", "--model", str(MODEL), "--out", str(tmp_path / "bundle"), *options, *QUICK]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
