"""Tables of latents made in this process, and what is nearest in them: real crystals, the released model of perovskites."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from dist_train.cli import main
from dist_train.commands.embed import EmbedOptions, embed, nearest_crystals
from dist_train.commands.models import load_codec
from dist_train.crystal.cif import write_cif
from dist_train.crystal.digest import digest
from dist_train.crystal.extxyz import to_extxyz
from dist_train.crystal.frames import representable
from dist_train.crystal.metrics import compare
from dist_train.crystal.moved import moved
from dist_train.crystal.structure import Crystal
from dist_train.embed import Embedder, plan_parts
from dist_train.errors import DataError, DistTrainError, ModelError
from dist_train.files import sha256
from dist_train.latents import About, read_about
from dist_train.models.reconstruct import Codec
from dist_train.shards.discover import discover
from dist_train.shards.sources import units

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data" / "sample"
MODELS = ROOT / "data" / "models"
PEROV = str(MODELS / "perov_5")
TABLE_ROWS = 40


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec(PEROV, None)[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, sample_table: Callable[[str], list[Crystal]]) -> Path:
    """A table; CIF files, good, broken, of another size and of another chemistry; one file of two crystals; an archive."""
    folder = tmp_path_factory.mktemp("inputs")
    pq.write_table(pq.read_table(SAMPLE / "perov_5.parquet").slice(0, TABLE_ROWS), folder / "table.parquet")
    for family in ("broken", "perov_5", "carbon_24"):
        (folder / family).mkdir()
        for path in sorted((SAMPLE / "cifs" / family).glob("*.cif"))[:4]:
            shutil.copy(path, folder / family)
    two = sample_table("perov_5")[100:102]
    (folder / "two.extxyz").write_text("".join(map(to_extxyz, two)))
    packed = sorted((SAMPLE / "cifs" / "perov_5").glob("*.cif"))[4:6]
    (folder / "unpacked").mkdir()
    for path in packed:
        shutil.copy(path, folder / "unpacked")
    shutil.make_archive(str(folder / "packed"), "zip", folder / "unpacked")
    shutil.rmtree(folder / "unpacked")
    (folder / "elsewhere.cif").symlink_to(folder / "nothing")
    return folder


def run(inputs: Path, out: Path, **more: object) -> str:
    settings = {"tracking_uri": None, "workers": 0, "batch": 7, "part_rows": 16, "decode": False}
    return embed(EmbedOptions(model=PEROV, input=[str(inputs)], output=out, **settings | more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checked(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checked") / "latents"
    run(inputs, out, decode=True)
    return out


@pytest.fixture(scope="module")
def plain(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "latents"
    run(inputs, out)
    return out


def table(out: Path) -> pa.Table:
    return pq.read_table(out)  # as any program reads it


def rows(out: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = table(out).to_pylist()
    return found


def about(out: Path) -> About:
    found = read_about(out)
    assert found
    return found


# Rows


def test_one_row_for_each_crystal_in_their_order(inputs: Path, checked: Path) -> None:
    expected = [
        (id, item)
        for chunk in discover([str(inputs)]).chunks for unit in units(chunk, max_atoms=1000) for id, item in unit.items()
    ]  # fmt: skip
    found = rows(checked)
    assert [row["id"] for row in found] == [id for id, _ in expected]
    assert len(found) == TABLE_ROWS + 3 * 4 + 2 + 2 + 1
    for row, (_, item) in zip(found, expected, strict=True):
        assert (row["latent"] is None) == (str(row["error"]).startswith(("parse: ", "grid: ")))
        assert (row["formula"] is None) == (not isinstance(item, Crystal) or str(row["error"]).startswith("grid: spacing"))
    reasons = {row["id"]: str(row["error"]) for row in found}
    assert reasons["broken/broken_empty"] == "parse: empty file"
    assert "isn't a file" in reasons["elsewhere"]
    assert all(reasons[id].startswith("grid: ") for id in reasons if id.startswith("carbon_24/"))


def test_where_each_row_comes_from(inputs: Path, plain: Path) -> None:
    found = rows(plain)
    assert {row["input"] for row in found} == {str(inputs)}
    assert [row["row"] for row in found if row["file"] == "table.parquet"] == [*range(TABLE_ROWS)]
    assert [row["row"] for row in found if row["file"] == "two.extxyz"] == [0, 1]
    assert sum(str(row["file"]).startswith("packed.zip/") for row in found) == 2
    assert about(plain).units == len(found) - 1


def test_latents_and_checks_are_those_of_the_codec(
    codec: Codec, checked: Path, sample_table: Callable[[str], list[Crystal]]
) -> None:
    crystals = {crystal.id: crystal for crystal in sample_table("perov_5")[:TABLE_ROWS]}
    found = [row for row in rows(checked) if row["id"] in crystals and row["file"] == "table.parquet"]
    assert len(found) == TABLE_ROWS
    matches = 0
    for row in found[::5]:
        crystal = representable(crystals[str(row["id"])], codec.model.grid)
        latent = codec.encode([crystal])
        np.testing.assert_allclose(row["latent"], latent[0].cpu().numpy(), atol=1e-5)
        assert (row["formula"], row["n_atoms"], row["digest"]) == (crystal.formula, len(crystal), digest(crystal))
        (decoded,) = codec.crystals(latent, [crystal.id])
        assert decoded.crystal is not None
        pair = compare(crystal, decoded.crystal)
        assert (row["match"], row["valid"], row["decoded_formula"]) == (pair.match, pair.valid, decoded.crystal.formula)
        assert row["decoded_n_atoms"] == len(decoded.crystal)
        assert row["confidence"] == pytest.approx(decoded.confidence_N.mean(), abs=1e-3)
        if pair.rms is not None:
            assert row["rms"] == pytest.approx(pair.rms, abs=1e-3)
        matches += pair.match
    assert matches > 4


def test_counts_are_those_of_the_rows(checked: Path) -> None:
    found, counts = rows(checked), about(checked).counts
    assert counts
    assert counts["rows"] == len(found)
    assert counts["embedded"] == sum(row["latent"] is not None for row in found)
    assert counts["matched"] == sum(bool(row["match"] and row["valid"]) for row in found) > 20
    assert sum(counts["reasons"].values()) == sum(row["error"] is not None for row in found)
    assert about(checked).columns.keys() == {*table(checked).column_names}


def test_what_fails_for_one_crystal_of_a_batch_fails_for_it_alone(
    codec: Codec, plain: Path, tmp_path: Path, sample_table: Callable[[str], list[Crystal]]
) -> None:
    good = [representable(crystal, codec.model.grid) for crystal in sample_table("perov_5")[:2]]
    large = replace(good[0], lattice_A=good[0].lattice_A * 5)  # which `representable` would have refused
    batch: list[tuple[dict[str, object], Crystal]] = [({}, good[0]), ({}, large), ({}, good[1])]
    Embedder(codec, tmp_path, about(plain))._embed(batch)
    (first, _), (second, _), (third, _) = batch
    assert "latent" in first and "latent" in third and not {"error"} & {*first, *third}
    assert "latent" not in second and "spacing of" in str(second["error"]) and str(second["error"]).startswith("encode: ")


@pytest.mark.parametrize("size", [1, 3, 16, 1000])
def test_parts_hold_all_units_in_their_order(inputs: Path, size: int) -> None:
    found = discover([str(inputs)])
    found.refused += [("given", f"{number}", "a reason") for number in range(5)]
    parts = plan_parts(found, size)
    assert [part.number for part in parts] == [*range(len(parts))]
    assert {len(part) for part in parts[:-1]} <= {size} and 0 < len(parts[-1]) <= size
    assert [one for part in parts for one in part.refused] == found.refused

    def names(chunks: Sequence[object]) -> list[str]:
        return [chunk.name(number) for chunk in chunks for number in range(len(chunk))]  # type: ignore[attr-defined,arg-type]

    assert names([chunk for part in parts for chunk in part.chunks]) == names(found.chunks)


# Again, and other jobs


def test_a_rerun_does_nothing_and_a_lost_or_damaged_part_is_made_again(inputs: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    shutil.copytree(plain, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert "nothing was missing" in run(inputs, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")} == before
    (out / "part-00000.parquet").unlink()
    cut = out / "part-00001.parquet"
    cut.write_bytes(cut.read_bytes()[:-50])
    shutil.copy(out / "part-00002.parquet", out / "part-00003.parquet")  # a part of this job, but another one
    assert f"this run: {len(rows(plain)) - 16} rows" in run(inputs, out)
    assert {path.name: sha256(path) for path in out.iterdir()} == {path.name: sha256(path) for path in plain.iterdir()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": str(MODELS / "carbon_24")}, "bundle_sha256"),
        ({"input": [str(SAMPLE / "cifs" / "perov_5")]}, "input_digest"),
        ({"batch": 8}, "batch 7 there, 8 here"),
        ({"decode": True}, "decoded False there, True here"),
    ],
    ids=["model", "input", "batch", "decode"],
)
def test_another_job_in_its_folder_is_refused(inputs: Path, plain: Path, change: dict[str, object], told: str) -> None:
    before = {path.name: sha256(path) for path in plain.iterdir()}
    options = EmbedOptions(PEROV, None, [str(inputs)], plain, 0, decode=False, batch=7, part_rows=16)
    with pytest.raises(DataError, match=f"holds the latents of another job.*{told}"):
        embed(replace(options, **change))  # type: ignore[arg-type]
    assert {path.name: sha256(path) for path in plain.iterdir()} == before


def test_a_folder_of_other_things_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"is not empty and holds no _embed\.json"):
        run(inputs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_model_that_changes_while_the_job_runs_is_noticed(inputs: Path, plain: Path, tmp_path: Path) -> None:
    from dist_train.commands.embed import _prepare

    with pytest.raises(ModelError, match=r"is another model .* than the one that the job began with"):
        _prepare(tmp_path, replace(about(plain), resolved=str(MODELS / "carbon_24")), None)


# Nearest


def latents(out: Path) -> NDArray[np.float32]:
    return np.array([row["latent"] for row in rows(out) if row["latent"] is not None], dtype=np.float32)


def test_nearest_is_what_all_distances_say(
    codec: Codec, plain: Path, tmp_path: Path, sample_table: Callable[[str], list[Crystal]]
) -> None:
    crystal = sample_table("perov_5")[200]
    (tmp_path / "query.cif").write_text(write_cif(crystal))
    text = nearest_crystals([str(tmp_path / "query.cif")], plain, PEROV, None, 9, True, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "nearest.json").read_text()) == json.loads(text)
    assert len((tmp_path / "out" / "nearest.csv").read_text().splitlines()) == 10
    (result,) = json.loads(text)["crystals"]
    latent = codec.encode([representable(crystal, codec.model.grid)])[0].cpu().numpy()
    distances = np.linalg.norm(latents(plain) - latent, axis=1)
    order = np.argsort(distances, kind="stable")[:9]
    ids = [row["id"] for row in rows(plain) if row["latent"] is not None]
    assert [row["id"] for row in result["nearest"]] == [ids[place] for place in order]
    found = np.array([row["distance"] for row in result["nearest"]])
    np.testing.assert_allclose(found / found[0], distances[order] / distances[order[0]], rtol=1e-3)
    assert not any(row["same_crystal"] for row in result["nearest"])
    assert 0.3 < found[0] < 1.5, "in units of two training crystals"


def test_the_same_crystal_in_another_cell_is_found_at_no_distance(
    plain: Path, tmp_path: Path, sample_table: Callable[[str], list[Crystal]], capsys: pytest.CaptureFixture[str]
) -> None:
    crystal = sample_table("perov_5")[17]
    (tmp_path / "moved.cif").write_text(write_cif(moved(crystal, np.random.default_rng(5))))
    arguments = ["nearest", str(tmp_path / "moved.cif"), "--in", str(plain), "--model", PEROV, "-k", "3"]
    assert main(arguments) == 0
    _, _, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["0.0000", crystal.id] and " same " in first and first.endswith("table.parquet, row 17")
    assert " other " in second


def test_more_neighbours_than_rows_are_all_rows(plain: Path) -> None:
    text = nearest_crystals([str(SAMPLE / "cifs" / "perov_5" / "10133.cif")], plain, PEROV, None, 1000, True, None)
    (result,) = json.loads(text)["crystals"]
    assert len(result["nearest"]) == len(latents(plain))


def test_what_nearest_refuses(inputs: Path, plain: Path, tmp_path: Path) -> None:
    cif = str(SAMPLE / "cifs" / "perov_5" / "10133.cif")

    def told(message: str, folder: Path, model: str = PEROV) -> None:
        with pytest.raises(DistTrainError, match=message):
            nearest_crystals([cif], folder, model, None, 3, False, None)

    told("holds the latents of another model", plain, str(MODELS / "carbon_24"))
    told(r"has no _embed\.json", inputs)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(plain, unfinished)
    (unfinished / "part-00001.parquet").unlink()
    told(r"part-00001\.parquet can't be read", unfinished)
    document = json.loads((unfinished / "_embed.json").read_text())
    (unfinished / "_embed.json").write_text(json.dumps(document | {"counts": None}))
    told("holds an unfinished job", unfinished)
    (unfinished / "_embed.json").write_text("{")
    told(r"embed\.json can't be read", unfinished)
