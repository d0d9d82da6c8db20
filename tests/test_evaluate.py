"""`dist-train evaluate` on tables, CIF files and shards, with a small trained model: every crystal is accounted for."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from small_run import ROOT, small_config, write_small_shards

from dist_train.cli import main
from dist_train.commands import training as commands
from dist_train.config import RunConfig
from dist_train.crystal.cif import write_cif
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.parquet import write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.evaluate import CLASSES, nearest_training
from dist_train.files import sha256
from dist_train.models.autoencoder import cell_numbers, composition_vector
from dist_train.models.export import DIGESTS_NAME, SUMS_NAME
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader

SampleTable = Callable[[str], list[Crystal]]
QUICK = ("--samples", "1", "--steps", "0", "--corrections", "2")
BROKEN = ROOT / "data" / "sample" / "cifs" / "broken"
pytestmark = pytest.mark.filterwarnings("ignore:dict interface:DeprecationWarning")  # of spglib, in pymatgen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a few steps on perovskites."""
    folder = tmp_path_factory.mktemp("trained")
    write_small_shards(folder)
    config = small_config(folder)
    commands.train(config)
    return config


@pytest.fixture(scope="module")
def split(trained: RunConfig) -> Callable[[str], list[Crystal]]:
    """split("test"): its crystals."""
    index = Index.read(trained.data.shards)
    readers = {name: ShardReader(index, name) for name in ("train", "test")}
    return lambda name: [readers[name].crystal(place) for place in range(len(readers[name]))]


def evaluated(config: RunConfig, out: Path, *more: str, workers: int = 1) -> dict[str, Any]:
    """The metrics of a run of the verb."""
    bundle = str(config.run_dir / "bundle")
    arguments = ["evaluate", "--model", bundle, "--out", str(out), "--workers", str(workers), *QUICK, *more]
    assert main(arguments) == 0
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def known_to(model: list[Crystal], crystals: list[Crystal]) -> list[Crystal]:
    """Those made of elements that the training crystals have."""
    elements = {z for crystal in model for z in crystal.composition}
    return [crystal for crystal in crystals if set(crystal.composition) <= elements]


def test_files_and_tables_with_crystals_that_cannot_be_read_or_held(
    trained: RunConfig, split: Callable[[str], list[Crystal]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, and a folder with a good file, a cell too large for the grid, a strange element and all the broken files."""
    good = known_to(split("train"), split("test"))
    table, folder = tmp_path / "test.parquet", tmp_path / "cifs"
    write_parquet(table, good[1:])
    shutil.copytree(BROKEN, folder)
    (folder / "good.cif").write_text(write_cif(good[0]))
    (folder / "long.cif").write_text(write_cif(replace(good[0], lattice_A=good[0].lattice_A * [[1], [1], [20]])))
    xenon = np.where(good[0].numbers_N == good[0].numbers_N[0], 54, good[0].numbers_N)
    (folder / "strange.cif").write_text(write_cif(replace(good[0], numbers_N=xenon)))
    out = tmp_path / "out"
    found = evaluated(trained, out, "--data", str(table), str(folder), "--training", str(table), workers=2)
    assert found["n_test"] == found["data"]["n_crystals"] == len(good) + 2
    assert found["n_not_held"] == sum(found["reasons"]["not_held"].values()) == 2
    told = " ".join(found["reasons"]["not_held"])
    assert "spacing of # A" in told and "in none of the crystals that the model was trained on" in told
    assert found["data"]["n_refused"] == len(found["refused"]) == sum(found["reasons"]["refused"].values())
    assert {entry["file"] for entry in found["refused"]} >= {"broken_empty.cif", "broken_nan_cell.cif"}
    assert found["match_rate_codec_ceiling"] == pytest.approx(len(good) / (len(good) + 2))
    assert found["match_rate_perfect_copy"] == 1.0
    assert found["n_failed"] == 2 + sum(found["reasons"]["failed_decode"].values())
    assert found["nearest_training"]["match_rate"] >= len(good[1:]) / (len(good) + 2)
    assert found["n_trained_on"] == 0
    assert set(found["seconds"]) >= {"read", "prepare", "encode", "decode", "nearest", "ceiling", "compare", "write"}
    rows = list(rows_of(out))
    assert len(rows) == found["n_test"]
    assert {row["id"] for row in rows if row["reason"].startswith(("spacing", "elements"))} == {"long", "strange"}
    errors = {row["id"]: float(row["latent error"]) for row in rows if row["latent error"]}
    of_all, missed = found["latent_error"], {row["id"] for row in rows if row["match"] == "no" or row["valid"] == "no"}
    far = {id for id, error in errors.items() if error > of_all["far"]}
    assert set(errors) == {row["id"] for row in rows if row["atoms decoded"] != "0"}
    assert of_all["median"] == pytest.approx(np.median([*errors.values()]))
    assert [of_all[name] for name in ("n_far", "n_far_missed", "n_missed")] == [
        len(far), len(far & missed), len(missed & set(errors)),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert f"beyond 1 in {len(far)} crystals, among them {len(far & missed)} of the" in printed
    assert "misses without a crystal: 2 that the model can't hold" in printed
    assert f"{found['data']['n_refused']} inputs could not be read" in printed
    page = (out / "report.html").read_text()
    assert "Match rate by crystal system" in page
    assert '"title":"' in page and "The model can't hold it" in page
    densities = json.loads(re.search(r'"densities":(\[.*?\]),"path":', page)[1])
    assert len(densities) == 4 and not any(name in density["title"] for density in densities for name in ("long", "strange"))
    assert all([volume["label"] for volume in density["volumes"]] == ["true", "decoded"] for density in densities)
    again = evaluated(trained, out, "--data", str(table), str(folder), "--training", str(table))
    # Any number of processes, and into the folder of an earlier evaluation; the last bits of sums may differ.
    texts = [json.dumps({**metrics, "seconds": None}) for metrics in (found, again)]
    first, second = (re.sub(r"\d+\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.6f}", text) for text in texts)
    assert first == second


def test_parts_add_up_to_the_whole(trained: RunConfig, tmp_path: Path) -> None:
    table = ROOT / "data" / "sample" / "materials_project.parquet"
    found = evaluated(trained, tmp_path, "--data", str(table), "--limit", "60", "--corrections", "0")
    assert found["n_test"] == 60
    assert found["latent_error"] is None
    assert found["nearest_training"] is found["match_rate_nearest_training"] is None
    assert set(found["breakdown"]) == set(CLASSES)
    for rows in found["breakdown"].values():
        assert len(rows) > 2
        assert sum(row["n_test"] for row in rows) == 60
        for system in ("codec_ceiling", "perfect_copy"):
            hits = sum(row["n_test"] * row[system]["match_rate"] for row in rows)
            assert hits == pytest.approx(60 * found[f"match_rate_{system}"])
            assert sum(row[system]["n_failed"] for row in rows) == found[system]["n_failed"]


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    """crystals.csv of an evaluation."""
    yield from csv.DictReader((folder / "crystals.csv").read_text().splitlines())


def test_training_crystals_are_known_again_in_another_file_and_writing(
    trained: RunConfig, split: Callable[[str], list[Crystal]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, held_out = split("train")[:5], split("test")
    table = tmp_path / "t.parquet"
    write_parquet(table, [replace(crystal, id=f"{i}") for i, crystal in enumerate([*seen, *held_out])])
    found = evaluated(trained, tmp_path / "out", "--data", str(table), "--move", "7")
    assert found["n_trained_on"] == 5
    assert found["data"]["moved_by_seed"] == 7
    told = f"WARNING: 5 of the {5 + len(held_out)} crystals are among the model's {len(split('train'))} training samples"
    printed = capsys.readouterr().out
    others = found["not_trained_on"]["model"]["match_rate"]
    hits = sum(row["match"] == "yes" and row["valid"] == "yes" for row in list(rows_of(tmp_path / "out"))[5:])
    assert others == pytest.approx(hits / len(held_out))
    assert told in printed
    assert f"match rate of the other {len(held_out)}: {others:.1%} of the model" in printed
    assert told.replace("'", "&#x27;") in (tmp_path / "out" / "report.html").read_text()
    assert found["match_rate_perfect_copy"] == 1.0
    assert found["codec_ceiling"]["n_failed"] == found["n_not_held"]
    still = evaluated(trained, tmp_path / "still", "--data", str(table))
    assert still["n_trained_on"] == 5
    true = [re.findall(r'"left":"(.*?)"', (tmp_path / name / "report.html").read_text()) for name in ("out", "still")]
    assert len(true[0]) == len(true[1]) > 1
    assert not set(true[0]) & set(true[1])


def test_a_bundle_of_an_older_program_says_unknown(trained: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir / "bundle", run / "bundle")
    (run / "bundle" / DIGESTS_NAME).unlink()
    sums = (run / "bundle" / SUMS_NAME).read_text().splitlines(keepends=True)
    (run / "bundle" / SUMS_NAME).write_text("".join(line for line in sums if DIGESTS_NAME not in line))
    older = trained.model_copy(update={"run_dir": run})
    found = evaluated(older, tmp_path / "out", "--shards", str(trained.data.shards), "--limit", "2")
    assert found["n_trained_on"] is None
    assert "UNKNOWN whether the model was trained on these" in (tmp_path / "out" / "report.html").read_text()


def test_shards_at_a_url_give_the_figures_of_their_folder(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = fsspec.filesystem("memory")
    for path in Path(trained.data.shards).iterdir():
        if path.is_file():
            system.pipe_file(f"/evaluated/{path.name}", path.read_bytes())
    places = "memory://evaluated", str(trained.data.shards)
    found = [
        evaluated(trained, tmp_path / f"out{i}", "--shards", place, "--cache-dir", str(tmp_path / "cache"))
        for i, place in enumerate(places)
    ]
    assert {path.name[:4] for path in (tmp_path / "cache").glob("*/*/*.tar")} == {"trai", "test"}
    assert [figures["data"].pop("source") for figures in found] == [f"{place}, split test" for place in places]
    assert json.dumps({**found[0], "seconds": None}) == json.dumps({**found[1], "seconds": None})
    capsys.readouterr()
    pictures = []
    for place in places:
        picture = tmp_path / "picture.png"
        assert main(["inspect", place, "--cache-dir", str(tmp_path / "cache"), "--out", str(picture)]) == 0
        pictures.append(picture.read_bytes())
    told = capsys.readouterr().out.splitlines()
    half = len(told) // 2
    assert told[half:] == [told[0].replace(*places), *told[1:half]] and f"in {places[0]}/" in told[0]
    assert pictures[0] == pictures[1]


def test_digests_are_covered_by_the_sums(trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(trained.run_dir / "bundle", bundle)
    assert sha256(bundle / DIGESTS_NAME) in (bundle / SUMS_NAME).read_text()
    np.save(bundle / DIGESTS_NAME, np.zeros(3, np.uint64))
    where = ["--shards", str(trained.data.shards), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--model", str(bundle), *where]) == 2
    assert f"{DIGESTS_NAME} is missing or differs from SHA256SUMS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--data", "{broken}"),
            "there is no crystal to evaluate in {broken}; the first of 18: broken_duplicate",
        ),
        (("--data", "{here}/none.cif"), "input {here}/none.cif is neither a folder nor a file"),
        (("--data", "{broken}", "--split", "val"), "--split val is of shards, and --data has none; leave it out"),
        (("--shards", "{here}/none"), "{here}/none"),
    ],
)
def test_bad_inputs_are_one_line(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    names = {"here": str(tmp_path), "broken": str(BROKEN)}
    given = [argument.format(**names) for argument in arguments]
    bundle, out = str(trained.run_dir / "bundle"), tmp_path / "out"
    assert main(["evaluate", "--model", bundle, "--out", str(out), "--workers", "1", *QUICK, *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and told.format(**names) in errors[0]
    assert not out.exists()


def test_the_nearest_crystal_is_that_of_all_distances(sample_table: SampleTable) -> None:
    """Against the plain sum over all elements and training crystals."""
    crystals, training = (
        sample_table("perov_5")[:40],
        [*sample_table("materials_project")[::3], *sample_table("perov_5")[40:80]],
    )
    compositions = np.stack([composition_vector(crystal) for crystal in training])
    assert compositions.shape[1] == MAX_Z + 1
    cells = cell_numbers(np.stack([crystal.lengths_angles for crystal in training]))
    for crystal, found in zip(crystals, nearest_training(crystals, training), strict=True):
        by_composition = np.abs(compositions - composition_vector(crystal)).sum(1)
        by_cell = np.abs(cells - cell_numbers(crystal.lengths_angles)).sum(1)
        assert found is training[np.lexsort((by_cell, by_composition))[0]]


def test_the_round_trip_of_samples_goes_through_the_decoder(tmp_path: Path) -> None:
    """A sample is what its latent is encoded from: encoded again, it would be off by nothing at all."""
    model, table = ROOT / "data" / "models" / "perov_5", ROOT / "data" / "benchmarks" / "perov_5_test_half_a.parquet"
    command = ["evaluate", "--model", str(model), "--data", str(table), "--limit", "8", "--samples", "8", "--steps", "0"]
    assert main([*command, "--corrections", "0", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    latent = json.loads((tmp_path / "out" / "metrics.json").read_text())["latent"]
    assert 0.005 < latent["round_trip_of_samples"]["median"] < 0.5
    assert 0.005 < latent["round_trip"]["median"] < 0.5
