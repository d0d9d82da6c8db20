"""Properties read off latents, and latents steered to them: real crystals, the released model of perovskites."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dist_train.cli import main
from dist_train.commands.properties import near_copies, split
from dist_train.commands.release import release
from dist_train.crystal.case import Case
from dist_train.crystal.cif import read_cif
from dist_train.crystal.digest import digests_near
from dist_train.crystal.frames import representable
from dist_train.crystal.moved import moved
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError, DataError, ModelError
from dist_train.files import sha256
from dist_train.generate import encode, posterior, returned, sample_latents
from dist_train.models.export import CONFIG_NAME, PROPERTIES_NAME, add_properties, read_bundle, read_properties
from dist_train.models.properties import Labels, PropertyHeads, fit_properties
from dist_train.models.reconstruct import Codec
from dist_train.models.vae import Latent
from dist_train.steer import atoms_cost, atoms_of, move_along, property_cost, search, steer

DATA = Path(__file__).parents[2] / "data"
MODEL = DATA / "models" / "perov_5"
N = 400
Table = Callable[[str], list[Crystal]]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(read_bundle(MODEL)[0])


@pytest.fixture(scope="module")
def heads() -> PropertyHeads:
    found = read_properties(MODEL)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def crystals(codec: Codec, sample_table: Table) -> list[Crystal]:
    return [representable(crystal, codec.model.grid) for crystal in sample_table("perov_5")[:N]]


@pytest.fixture(scope="module")
def latents(codec: Codec, crystals: list[Crystal]) -> Latent:
    return posterior(codec, crystals)


@pytest.fixture(scope="module")
def labels(crystals: list[Crystal]) -> list[Labels]:
    """The second one is unknown of every third crystal."""
    volume_N = np.array([crystal.volume_A3 / len(crystal) for crystal in crystals])
    heat_N = np.array(pq.read_table(DATA / "sample" / "perov_5.parquet")["heat_all"].to_pylist()[:N], float)
    heat_N[::3] = np.nan
    return [Labels("volume", "", "A^3", volume_N), Labels("heat", "heat_all", "eV", heat_N)]


HELD_OUT = np.arange(N) >= 300


def test_what_is_fitted_holds_for_crystals_held_out(latents: Latent, labels: list[Labels]) -> None:
    volume, heat = fit_properties(latents, labels, HELD_OUT, HELD_OUT, seed=0, steps=80).properties
    assert (volume.n_fitted, volume.n_held_out, volume.n_unseen) == (300, 100, 0)
    assert (heat.n_fitted, heat.n_held_out) == (200, 66)
    assert volume.mae < 0.4 * volume.mae_mean
    assert volume.r2 > 0.85
    assert heat.mae < 0.8 * heat.mae_mean
    truth = labels[0].value_N[HELD_OUT]
    assert volume.mae_mean == pytest.approx(np.abs(truth - labels[0].value_N[~HELD_OUT].mean()).mean(), rel=1e-5)


def test_same_seed_same_bits_whatever_was_drawn_before(latents: Latent, labels: list[Labels]) -> None:
    torch.manual_seed(1)
    first = fit_properties(latents, labels, HELD_OUT, None, seed=5, steps=5)
    torch.manual_seed(2)
    again, other = (fit_properties(latents, labels, HELD_OUT, None, seed=seed, steps=5) for seed in (5, 6))
    assert first.config() == again.config()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.heads[0][0].weight, other.heads[0][0].weight)
    assert first.properties[0].n_unseen is None


def test_too_few_labels_and_equal_ones_are_refused(latents: Latent) -> None:
    value_N = np.full(N, np.nan)
    value_N[:30] = 1.0
    with pytest.raises(DataError, match="30 labelled crystals to fit and 0 held out, at least 50 and 10"):
        fit_properties(latents, [Labels("few", "x", "", value_N)], HELD_OUT, None, 0, 1)
    with pytest.raises(DataError, match="is 5 in all 300 crystals"):
        fit_properties(latents, [Labels("same", "x", "", np.full(N, 5.0))], HELD_OUT, None, 0, 1)


def test_what_is_held_out_has_no_near_copy_among_what_is_fitted(crystals: list[Crystal], sample_table: Table) -> None:
    """Of perovskites, no equal formula; of carbon, where all formulas are equal, no crystal moved elsewhere."""
    cases = [Case(crystal, "", "", (place,)) for place, crystal in enumerate(crystals)]
    seen_N = np.arange(N) >= 100
    held_N = split(near_copies(cases), seen_N, 0.2, seed=0)
    formulas = np.array([crystal.formula for crystal in crystals])
    assert not set(formulas[held_N]) & set(formulas[~held_N])
    assert 0.19 * N <= held_N.sum() <= 0.2 * N
    alone = ~np.isin(formulas, formulas[seen_N])
    assert held_N[alone].all() or not held_N[seen_N].any()
    few = crystals[:8]
    copies = [moved(crystal, np.random.default_rng(1)) for crystal in few]
    groups = near_copies([Case(crystal, "", "", digests_near(crystal)) for crystal in (*few, *copies)])
    assert (groups[:8] == groups[8:]).all()
    assert len(set(groups[:8])) == 8


def test_steered_latents_are_told_nearer_to_the_target(codec: Codec, heads: PropertyHeads) -> None:
    cost = property_cost(heads, {"formation_energy": 0.5})
    start_NL = sample_latents(codec, 8, seed=1)
    std_L = codec.model.prior_cholesky.norm(dim=1)
    before, after = cost(start_NL), cost(steer(start_NL, cost, std_L, steps=40))
    assert (after < before).all()
    assert after.mean() < 0.1 * before.mean()


def test_crystals_searched_for_have_the_volume_that_was_asked_for(codec: Codec, heads: PropertyHeads) -> None:
    """Measured on the crystals themselves, not read off any latent."""
    cost = property_cost(heads, {"volume_per_atom": 13.0})
    found = search(codec, cost, 2, seed=0, steps=20)
    again = search(codec, cost, 2, seed=0, steps=20)
    decoded = [row.decoded.crystal for row in found]
    assert len({crystal.formula for crystal in decoded if crystal}) == 2
    assert all(crystal and abs(crystal.volume_A3 / len(crystal) - 13.0) < 0.4 for crystal in decoded)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one.latent_L, other.latent_L)
        assert one.decoded.crystal and other.decoded.crystal
        assert one.decoded.crystal.to_json() == other.decoded.crystal.to_json()
    assert search(codec, cost, 0, seed=0) == []


def test_moves_along_a_direction_change_the_crystals(codec: Codec, heads: PropertyHeads, crystals: list[Crystal]) -> None:
    latent_NL = encode(codec, crystals[:6])
    known = heads.properties[heads.place("volume_per_atom")]
    volumes = []
    for amount in (-0.5, 0.5):
        rows = returned(codec, move_along(latent_NL, heads, "volume_per_atom", amount))
        volumes.append(np.mean([row.decoded.crystal.volume_A3 / 5 for row in rows if row.decoded.crystal]))
    assert 0.5 < (volumes[1] - volumes[0]) / known.std < 1.5


def test_a_formula_is_found_and_held(codec: Codec) -> None:
    atoms = atoms_of("BaTiO3", formula=True)
    assert str(atoms) == "BaTiO3"
    (row,) = search(codec, atoms_cost(codec, atoms), 1, seed=0, steps=40, wanted=atoms.hold)
    assert row.decoded.crystal
    assert atoms.hold(row.decoded.crystal)
    assert atoms_of("O,Ti,Ba", formula=False).hold(row.decoded.crystal)
    assert not atoms_of("Ba2TiO3", formula=True).hold(row.decoded.crystal)
    assert not atoms_of("Ti,O", formula=False).hold(row.decoded.crystal)
    assert atoms_of("Ba2Ti2O6", formula=True).hold(row.decoded.crystal)


def test_properties_that_are_not_there_and_targets_beyond_the_labels(codec: Codec, heads: PropertyHeads) -> None:
    with pytest.raises(ModelError, match=r"no property 'colour'.*fit-properties"):
        property_cost(heads, {"colour": 1.0})
    with pytest.raises(ModelError, match=r"band_gap=15: the labels fitted go from 0 to 7\.3"):
        property_cost(heads, {"band_gap": 15.0})
    property_cost(heads, {"band_gap": 15.0}, extrapolate=True)
    with pytest.raises(ModelError, match=r"no \['Xe'\]"):
        atoms_cost(codec, atoms_of("XeO3", formula=True))


def write_table(path: Path, n: int, without: str = "") -> None:
    table = pq.read_table(DATA / "sample" / "perov_5.parquet").slice(0, n)
    pq.write_table(table.drop_columns([without]) if without else table, path)


def test_the_verbs_from_table_to_crystals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path / "rows.parquet", 150)
    plain = tmp_path / "plain"
    shutil.copytree(DATA / "models" / "carbon_24", tmp_path / "carbon")
    assert read_properties(tmp_path / "carbon") is None
    fit = [
        "fit-properties", "--model", str(MODEL), "--data", str(tmp_path / "rows.parquet"), "--property", "volume_per_atom",
        "gap=dir_gap:eV", "--held-out", "0.2", "--steps", "20", "--workers", "1", "--out",
    ]  # fmt: skip
    assert main([*fit, str(plain)]) == 0
    told = capsys.readouterr().out
    assert "gap, eV" in told
    assert "WARNING: gap is hardly read off" in told
    assert main([*fit, str(tmp_path / "again")]) == 0
    for name in (CONFIG_NAME, PROPERTIES_NAME):
        assert sha256(plain / name) == sha256(tmp_path / "again" / name)
    found = read_properties(plain)
    assert found is not None
    assert [known.name for known in found.properties] == ["volume_per_atom", "gap"]
    assert read_bundle(plain)[1]["properties"]["properties"][0]["n_held_out"] == found.properties[0].n_held_out
    capsys.readouterr()
    target = ["generate", "target", "--target", "volume_per_atom=13", "-n", "1", "--out", str(tmp_path / "out"), "--model"]
    assert main([*target, str(plain)]) == 0
    told = capsys.readouterr().out
    assert "mean absolute error of" in told
    assert "1 of 1 crystals" in told
    (written,) = (tmp_path / "out" / "cifs").glob("*.cif")
    assert len(read_cif(written, max_atoms=100)) > 0
    rows = list(csv.DictReader((tmp_path / "out" / "properties.csv").read_text().splitlines()))
    assert [(row["id"], row["property"], row["before"]) for row in rows] == [("target-0-00000", "volume_per_atom", "")]
    assert abs(float(rows[0]["at_latent"]) - 13) < 0.5
    assert "Properties" in (tmp_path / "out" / "report.html").read_text()
    alter = ["generate", "alter", str(written), "--along", "volume_per_atom=+0.5", "--model", str(plain)]
    assert main([*alter, "--out", str(tmp_path / "altered")]) == 0
    assert len([*(tmp_path / "altered" / "cifs").glob("*.cif")]) == 1
    capsys.readouterr()
    for model, wanted in ((plain, "band_gap=1.5"), (tmp_path / "carbon", "band_gap=1.5")):
        target[3] = wanted
        assert main([*target, str(model)]) == 2
        error = capsys.readouterr().err
        assert "band_gap" in error
        assert error.count("\n") == 1
    (plain / "properties.safetensors").write_bytes(b"damaged")
    assert main([*target, str(plain)]) == 2
    assert "properties.safetensors is missing or differs" in capsys.readouterr().err


def test_a_bundle_replaces_nothing_but_a_bundle(tmp_path: Path, heads: PropertyHeads) -> None:
    """Not even one with a file of the user's in it, for which that is."""
    shutil.copytree(MODEL, tmp_path / "run" / "bundle")
    shutil.copy(MODEL / "run.yaml", tmp_path / "run")
    out = tmp_path / "out"
    (out / "chapters").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds 'chapters', which is of no bundle and would be lost"):
        release(tmp_path / "run", out, None)
    assert [path.name for path in out.iterdir()] == ["chapters"]
    (out / "chapters").rmdir()
    release(tmp_path / "run", out, None)
    release(tmp_path / "run", out, None)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'notes.txt'"):
        add_properties(out, out, heads, heads.config())
    read_bundle(out)
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_properties_are_not_lost_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    data = ["--data", str(DATA / "sample" / "perov_5.parquet"), "--property", "volume_per_atom"]
    assert main(["fit-properties", "--model", str(MODEL), *data, "--out", str(tmp_path / "model")]) == 2
    assert "holds properties that would be lost: band_gap, formation_energy; name them too" in capsys.readouterr().err


def test_a_release_keeps_the_properties_of_its_run(tmp_path: Path, heads: PropertyHeads) -> None:
    shutil.copytree(MODEL, tmp_path / "run" / "bundle")
    shutil.copy(MODEL / "run.yaml", tmp_path / "run")
    release(tmp_path / "run", tmp_path / "released", None)
    found = read_properties(tmp_path / "released")
    assert found is not None
    assert found.config() == heads.config()
    assert "| band_gap | eV |" in (tmp_path / "released" / "model_card.md").read_text()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--property", "nothing"), "no column 'nothing'"),
        (("--property", "x=formula"), "holds no numbers"),
        (("--property", "a b"), "write NAME, NAME=COLUMN or NAME=COLUMN:UNIT"),
        (("--property", "n_atoms", "n_atoms"), "give every name once"),
        (("--property", "n_atoms", "--held-out", "2"), "no share"),
    ],
)
def test_labels_that_can_not_be_had(
    option: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "rows.parquet", 4)
    where = ["--model", str(MODEL), "--data", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "out")]
    assert main(["fit-properties", *where, "--workers", "1", *option]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
