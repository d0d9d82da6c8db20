"""`dist-train generate` with the released models: what is written, the same bytes again, and what is refused in one line."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.io import iread, read
from ase.io.cube import read_cube
from pymatgen.io.vasp.outputs import Chgcar

from dist_train.cli import main
from dist_train.commands.generation import GenerateOptions, Generation, generate, summary
from dist_train.commands.models import file_names, read_crystals
from dist_train.config import GridSpec
from dist_train.crystal.alter import Region, replaced, scaled
from dist_train.crystal.cif import parse_cif, read_cif, write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.density_files import channel_names, to_chgcar, to_cube
from dist_train.crystal.elements import NUMBERS
from dist_train.crystal.interop import from_ase, same_crystal
from dist_train.crystal.metrics import shortest_distance
from dist_train.crystal.relax import make_calculator, relax
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import EXACT_A, snapped, space_group, symmetrized
from dist_train.crystal.voxelize import voxelize
from dist_train.errors import ConfigError, CrystalError, DataError, DistTrainError, ModelError
from dist_train.files import staged
from dist_train.generate import decode, encode, interpolate_latents, sample_latents
from dist_train.generated import COLUMNS, Finish, finished, result_of
from dist_train.models.export import SUMS_NAME, read_bundle, training_digests
from dist_train.models.reconstruct import Codec
from dist_train.progress import Stages
from dist_train.screens import Screens
from dist_train.serving import answer

ROOT = Path(__file__).parents[1]
PEROV, CARBON = (str(ROOT / "data" / "models" / name) for name in ("perov_5", "carbon_24"))
CIFS = ROOT / "data" / "sample" / "cifs"
KNOWN = CIFS / "perov_5" / "10133.cif"  # SnBiSO2, five atoms
EMT_NAME = "ase.calculators.emt:EMT"
CUBIC = Crystal("cubic", 4 * np.eye(3), [[0, 0, 0], [0.5, 0.5, 0.5]], [55, 17])


def made(out: Path, task: Any, model: str = PEROV, **options: Any) -> Generation:
    inputs = [str(path) for path in options.pop("inputs", ())]
    return generate(GenerateOptions(task, model, None, out, inputs, **options))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "crystals.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(read_bundle(Path(PEROV))[0])


# The command


def test_the_command_writes_the_same_bytes_again(tmp_path: Path) -> None:
    """As typed, in two processes: everything but the seconds is equal, and every file can be read."""
    command = ["generate", "sample", "--model", PEROV, "-n", "6", "--seed", "5", "--density", "cube"]
    command += ["--screen", "composition", "unique", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", *command, str(tmp_path / "b")], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    a, b = (contents(tmp_path / name) for name in ("a", "b"))
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("a", "b")]
    assert all(found.pop("seconds") for found in metrics)
    assert metrics[0] == metrics[1]
    del a["metrics.json"], b["metrics.json"]
    assert a == b
    (found, _) = metrics
    assert found["n_asked"] == 6 == found["n_written"] + found["n_screened_out"] + found["n_failed"]
    assert done.stdout.startswith(f"{found['n_written']} of 6 crystals written to {tmp_path / 'b'}\n")
    assert f"{found['n_screened_out']} screened out: composition {found['screened_out']['composition']}, " in done.stdout
    assert found["model"]["bundle_sha256"] == hashlib.sha256((Path(PEROV) / SUMS_NAME).read_bytes()).hexdigest()
    rows = table(tmp_path / "a")
    assert [row["id"] for row in rows] == [f"sample-5-{place:05d}" for place in range(6)]
    frames = iread(tmp_path / "a" / "crystals.extxyz", ":")
    with zipfile.ZipFile(tmp_path / "a" / "crystals.zip") as archive:
        for row, atoms in zip([row for row in rows if row["status"] == "written"], frames, strict=True):
            crystal = read_cif(tmp_path / "a" / row["file"], 1000)
            assert archive.read(row["file"]) == (tmp_path / "a" / row["file"]).read_bytes()
            assert atoms.info["id"] == row["id"]
            assert same_crystal(from_ase(atoms, row["id"]), crystal, 1e-4)
            assert crystal.formula == row["formula"]
            symmetric = read_cif(tmp_path / "a" / "cifs_symmetrized" / f"{row['id']}.cif", 1000)
            assert space_group(symmetric, EXACT_A) == (int(row["space_group_number"]), row["space_group"])
            assert len(list((tmp_path / "a" / "density").glob(f"{row['id']}.*.cube"))) == 13


def test_every_action_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for action, option in (("sample", "-n N"), ("reconstruct", "IN"), ("interpolate", "--path"), ("alter", "--perturb")):
        with pytest.raises(SystemExit, match="0"):
            main(["generate", action, "--help"])
        told = capsys.readouterr().out
        assert f"generate {action} [-h]" in told
        assert option in told
        assert ("--replace" in told) == (action == "alter")


def test_a_folder_is_replaced_only_where_it_holds_a_generation(tmp_path: Path) -> None:
    (tmp_path / "cifs").mkdir()
    (tmp_path / "cifs" / "mine.cif").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty and holds no generated crystals"):
        made(tmp_path, "sample")
    assert contents(tmp_path).keys() == {"cifs/mine.cif"}
    made(tmp_path / "out", "sample", n=3, density="chgcar")
    (tmp_path / "out" / "note.txt").write_text("kept")
    made(tmp_path / "out", "sample", n=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "note.txt", "cifs", "cifs_symmetrized", "crystals.csv", "crystals.extxyz", "crystals.zip", "metrics.json",
        "report.html",
    }  # fmt: skip
    assert len(list((tmp_path / "out" / "cifs").iterdir())) == 2
    assert [crystal.id for crystal in read_crystals([str(tmp_path / "out")], GridSpec())] == [
        f"sample-0-{place:05d}" for place in range(2)
    ], "other verbs read each generated crystal once"


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    with pytest.raises(FileNotFoundError), staged(tmp_path, ["old"]) as stage:
        (stage / "new").write_text((tmp_path / "nowhere").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_crystals_of_the_same_name_are_all_written(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(KNOWN, tmp_path / folder / "x.cif")
    made(tmp_path / "out", "reconstruct", inputs=[tmp_path / folder / "x.cif" for folder in ("a", "b")])
    assert {path.name for path in (tmp_path / "out" / "cifs").iterdir()} == {"x.cif", "x-2.cif"}
    assert [row["file"] for row in table(tmp_path / "out")] == ["cifs/x.cif", "cifs/x-2.cif"]


def test_names_of_files_are_all_different() -> None:
    ids = ["a/b", "a_b", "a_b-2", "a_b", "é" * 300, ""]
    names = file_names(ids)
    assert len({*names}) == len(ids)
    assert names[:2] == ["a_b", "a_b-2"]
    assert all("/" not in name and len(name.encode()) < 210 for name in names)


# Tasks


def test_corrected_crystals_tell_how_far_they_are_from_their_latents(tmp_path: Path) -> None:
    errors = []
    for name, turns in (("usual", {}), ("plain", {"corrections": 0}), ("few", {"corrections": 1})):
        found = made(tmp_path / name, "reconstruct", inputs=[KNOWN], **turns)
        assert found.metrics["settings"]["corrections"] == turns.get("corrections", 16)
        errors.append(table(tmp_path / name)[0]["latent_error"])
        assert ("latent error" in (tmp_path / name / "report.html").read_text()) == bool(errors[-1])
    usual, plain, few = errors
    assert plain == ""
    assert 0.0 < float(usual) <= float(few) < 1.0


def test_what_cannot_be_reconstructed_is_a_row_with_its_reason(tmp_path: Path) -> None:
    mine = tmp_path / "uranium.cif"
    mine.write_text(write_cif(replaced(read_cif(KNOWN, 1000), {NUMBERS["Sn"]: NUMBERS["U"]})))
    large = next((CIFS / "mp2025_n101_up").glob("*.cif"))
    broken = CIFS / "broken" / "broken_truncated.cif"
    found = made(tmp_path / "out", "reconstruct", inputs=[KNOWN, mine, large, broken])
    assert [result.status for result in found.results] == ["written", "failed", "failed", "failed"]
    reasons = [row["reason"] for row in table(tmp_path / "out")]
    for reason, told in zip(reasons, ("", "['U'] in none", "A is allowed", "not a CIF"), strict=True):
        assert told in reason
    assert (found.metrics["n_failed"], found.metrics["n_formula_as_given"]) == (3, 1)
    assert sum(found.metrics["failed"].values()) == 3
    assert all(reason in summary(found) for reason in reasons)
    original = found.results[0].original
    assert original is not None
    assert original.id == "10133"
    assert len(found.rows) == 4
    assert all(len(row) == len(COLUMNS) for row in found.rows)


def test_interpolation_passes_each_crystal_once(tmp_path: Path, codec: Codec) -> None:
    inputs = [KNOWN, CIFS / "perov_5" / "10149.cif", CIFS / "perov_5" / "10505.cif"]
    found = made(tmp_path / "out", "interpolate", inputs=inputs, steps=3, path="spherical")
    assert [result.id for result in found.results] == [
        "step-00-10133", "step-01", "step-02-10149", "step-03", "step-04-10505",
    ]  # fmt: skip
    known = made(tmp_path / "known", "reconstruct", inputs=inputs)
    for step, end in zip(found.results[::2], known.results, strict=True):
        assert step.crystal is not None
        assert end.crystal is not None
        assert same_crystal(step.crystal, end.crystal, 1e-3)


def test_an_arc_keeps_its_distance_from_the_mean_and_a_line_does_not(codec: Codec) -> None:
    mean = codec.model.prior_mean.float()
    start, stop = sample_latents(codec, 2, 0)
    stop = mean + (stop - mean) * (start - mean).norm() / (stop - mean).norm()
    line, arc = interpolate_latents(start, stop, 5), interpolate_latents(start, stop, 5, mean)
    radius = (start - mean).norm()
    torch.testing.assert_close((arc - mean).norm(dim=1), radius.expand(5))
    assert (line[2] - mean).norm() < 0.95 * radius
    turns = [torch.cosine_similarity(a - mean, b - mean, dim=0) for a, b in zip(arc, arc[1:])]
    torch.testing.assert_close(torch.stack(turns), turns[0].expand(4), rtol=1e-4, atol=1e-4)
    for path in (line, arc):
        torch.testing.assert_close(path[[0, -1]], torch.stack([start, stop]))
    twice = interpolate_latents(start, 2 * start - mean, 3, mean)  # one direction: the straight line
    torch.testing.assert_close(twice, interpolate_latents(start, 2 * start - mean, 3))


def test_replaced_elements_are_decoded(tmp_path: Path) -> None:
    """One of two oxygens, told apart by the region alone; the centre is an image of the atom in another cell."""
    near = {"within": 0.8, "of": (1.4268, -0.5, 2.0)}
    found = made(tmp_path / "out", "alter", inputs=[KNOWN], replace=["O=F"], **near)
    (result,) = found.results
    assert result.crystal is not None
    assert result.crystal.formula == "Bi1 F1 O1 S1 Sn1"
    assert found.metrics["n_formula_as_given"] == 1
    assert result.original is not None
    assert result.original.formula == "Bi1 O2 S1 Sn1"
    everywhere = made(tmp_path / "all", "alter", inputs=[KNOWN], replace=["Sn=Zr", "S=O"])
    assert everywhere.results[0].title.startswith("10133-altered, Bi1 O3 Zr1")


def test_a_replacement_changes_the_grid_around_the_atom_alone(codec: Codec) -> None:
    """In every channel the density moves by the difference of the codes, under the one atom's Gaussian."""
    crystal, spec = read_cif(KNOWN, 1000), codec.model.grid
    other = replaced(crystal, {NUMBERS["O"]: NUMBERS["F"]}, Region(tuple(crystal.frac_N3[3]), 0.1))
    assert (other.numbers_N != crystal.numbers_N).tolist() == [False, False, False, True, False]
    change = voxelize(other, spec).density_CDHW - voxelize(crystal, spec).density_CDHW
    alone = replace(crystal, frac_N3=crystal.frac_N3[3:4], numbers_N=crystal.numbers_N[3:4])
    bump = voxelize(alone, spec).density_CDHW[0]
    for channel in change:
        height = np.round(channel.ravel()[bump.argmax()] / bump.max())
        np.testing.assert_allclose(channel, height * bump, atol=1e-5)


def test_a_region_is_a_sphere_in_any_cell() -> None:
    """Cubic, written in a skewed cell: distances from an atom's image to all atoms are those of the cube."""
    change = np.array([[1, 0, 0], [3, 1, 0], [-2, 5, 1]])
    skewed = replace(CUBIC, lattice_A=change @ CUBIC.lattice_A, frac_N3=CUBIC.frac_N3 @ np.linalg.inv(change))
    centre = skewed.frac_N3[1] + (2, -1, 7)
    np.testing.assert_allclose(Region(tuple(centre), 1).distances(skewed), [2 * 3**0.5, 0], atol=1e-9)
    half = Region(tuple(np.array([0.5, 0, 0]) @ np.linalg.inv(change)), 2.0)
    assert replaced(skewed, {55: 37, 17: 9}, half).numbers_N.tolist() == [37, 17]


def test_a_scaled_density_becomes_the_nearest_element() -> None:
    crystal = read_cif(KNOWN, 1000)
    assert scaled(crystal, 0.8, [8, 40, 66]).numbers_N.tolist() == [40, 66, 8, 8, 8]
    region = Region(tuple(crystal.frac_N3[0]), 0.1)
    assert scaled(crystal, 0.8, [8, 40, 66], region).numbers_N.tolist() == [40, 83, 16, 8, 8]
    with pytest.raises(DataError, match="give another factor"):
        scaled(crystal, 1.001, [8, 16, 50, 83])


def test_perturbed_crystals_lie_at_the_radius_and_follow_from_the_seed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"inputs": [KNOWN], "perturb": 16.0, "n": 4}
    one, same, other = (made(tmp_path / f"{i}", "alter", seed=seed, **options) for i, seed in enumerate((1, 1, 2)))
    assert [row[1:] for row in one.rows] == [row[1:] for row in same.rows]
    assert contents(tmp_path / "0" / "cifs") == contents(tmp_path / "1" / "cifs")
    crystals = [result.crystal for result in (*one.results, *other.results)]
    cells = {tuple(crystal.lengths_angles.round(4)) for crystal in crystals if crystal}
    assert len(cells) == 8 == len(crystals)


def test_a_served_model_alters_and_interpolates_as_the_command_does(tmp_path: Path, codec: Codec) -> None:
    cifs = [path.read_text() for path in (KNOWN, CIFS / "perov_5" / "10149.cif")]
    edit: dict[str, Any] = {"replace": "Sn=Zr Bi=Pb", "within": 1.0, "of": "0.13 0 0"}
    served = answer(codec, {"cif": cifs[:1]}, {"task": "alter", "n": 2, "radius": 3.0, "seed": 4, **edit})
    options: dict[str, Any] = {"replace": edit["replace"].split(), "within": 1.0, "of": (0.13, 0, 0)}
    found = made(tmp_path / "a", "alter", inputs=[KNOWN], perturb=3.0, n=2, seed=4, **options)
    for text, result in zip(served["cif"], found.results, strict=True):
        crystal = parse_cif(str(text), "served", 1000)
        assert crystal.formula == "Bi1 O2 S1 Zr1"
        assert result.crystal is not None
        assert same_crystal(crystal, result.crystal, 1e-3)
    arc = answer(codec, {"cif": cifs}, {"task": "interpolate", "steps": 3, "path": "spherical"})
    line = answer(codec, {"cif": cifs}, {"task": "interpolate", "steps": 3})
    assert [a == b for a, b in zip(arc["latent"], line["latent"], strict=True)][1] is False
    latent = str(line["latent"][0])
    for table, params, told in (
        ({"cif": cifs[:1]}, {"replace": "Ti=Zr"}, "row 0: no Ti to replace"),
        ({"latent": [latent]}, {"replace": "Ti=Zr"}, "row 0: a latent has no atoms to replace"),
    ):
        (error,) = answer(codec, table, {"task": "alter", **params})["error"]
        assert told in str(error)
    for params, told in (
        ({"replace": "Ti"}, "give OLD=NEW"),
        ({"replace": "Sn=Zr", "within": 1.0}, "give both or none"),
        ({"replace": "Sn=Zr", "within": 1.0, "of": "0 0"}, "three fractional coordinates"),
        ({"replace": "Sn=Zr", "within": 1.0, "of": "here"}, "could not convert"),
        ({"scale": float("inf")}, "not a number that can be used"),
    ):
        with pytest.raises(ModelError, match=told):
            answer(codec, {"cif": cifs}, {"task": "alter", **params})


def test_samples_hold_only_elements_of_the_model(tmp_path: Path) -> None:
    """sample-0-00008 has 19 atoms where its latent says 18 of carbon."""
    made(tmp_path, "sample", CARBON, n=9)
    assert {row["formula"].rstrip("0123456789") for row in table(tmp_path)} == {"C"}


# Screens


def test_screens_count_what_they_take_out(tmp_path: Path, codec: Codec) -> None:
    """Of crystals made for it: a double, overlapping atoms, a close pair, a composition out of balance, a known one."""
    pytest.importorskip("smact")
    known = read_cif(KNOWN, 1000)
    close = replace(CUBIC, frac_N3=[[0, 0, 0], [0.2, 0, 0]], id="close")
    overlapping = replace(close, frac_N3=[[0, 0, 0], [0.1, 0, 0]], id="overlapping")
    unbalanced = replace(known, numbers_N=[4, 4, 9, 8, 8], id="unbalanced")
    larger = replace(CUBIC, lattice_A=4.1 * np.eye(3), id="double")
    crystals = [CUBIC, larger, overlapping, close, unbalanced, known]
    digests = training_digests(Path(PEROV))
    assert digests is not None
    from dist_train.crystal.digest import digest

    learnt = frozenset({*digests.tolist(), digest(known)})
    screens = Screens(("unique", "valid", "distance", "composition", "novel"), 1.0, learnt)
    results = [result_of(crystal.id, Decoded(crystal, np.ones(len(crystal)))) for crystal in crystals]
    done = finished(results, Finish(screens), Stages(99))
    assert [result.screen for result in done] == ["", "unique", "valid", "distance", "composition", "novel"]
    assert [result.reason for result in done[1:4]] == [
        "like cubic", "two atoms 0.400 A apart, less than 0.5 A", "two atoms 0.800 A apart, 1 A are asked for",
    ]  # fmt: skip
    assert shortest_distance(CUBIC) == pytest.approx(2 * 3**0.5)
    assert shortest_distance(replace(CUBIC, lattice_A=np.diag([4, 4, 1.5]))) == pytest.approx(1.5), "an atom's own image"


def test_screened_crystals_stay_in_the_table(tmp_path: Path) -> None:
    found = made(tmp_path, "alter", inputs=[KNOWN], perturb=0.01, n=3, screens=["unique"])
    assert [row["status"] for row in table(tmp_path)] == ["written", "screened out", "screened out"]
    assert [path.name for path in (tmp_path / "cifs").iterdir()] == ["10133-0-00000.cif"]
    assert found.metrics["screened_out"] == {"unique": 2}
    assert "2 screened out: unique 2" in summary(found)


def test_crystals_that_it_was_trained_on_are_not_novel(tmp_path: Path) -> None:
    """What perov_5 makes again of crystals that it was trained on is mostly known by its digest."""
    table = str(ROOT / "data" / "sample" / "perov_5.parquet")
    codec = Codec(read_bundle(Path(PEROV))[0])
    crystals = read_crystals([table], codec.model.grid)[:12]
    ids = [crystal.id for crystal in crystals]
    from dist_train.crystal.frames import representable

    again = list(decode(codec, encode(codec, [representable(c, codec.model.grid) for c in crystals]), ids))
    known = training_digests(Path(PEROV))
    assert known is not None
    screens = Screens(("novel",), known=frozenset(known.tolist()))
    taken = [screen for screen, _ in screens.verdicts([decoded.crystal for decoded in again if decoded.crystal])]
    assert taken.count("novel") >= 4
    screens = Screens(("novel",), training=crystals)
    taken = [reason for _, reason in screens.verdicts([decoded.crystal for decoded in again if decoded.crystal])]
    assert taken == [f"like {id}, which the model was trained on" for id in ids]


def test_training_crystals_can_be_named(tmp_path: Path) -> None:
    """Of a crystal made again and one made of other elements only the second is novel; other tasks refuse the option."""
    found = made(tmp_path, "reconstruct", inputs=[KNOWN], screens=["novel"], training=[str(KNOWN)])
    assert found.metrics["screened_out"] == {"novel": 1}
    found = made(tmp_path, "alter", inputs=[KNOWN], replace=["Sn=Zr"], screens=["novel"], training=[str(KNOWN)])
    assert found.metrics["n_written"] == 1
    with pytest.raises(ConfigError, match="--training is for the screen 'novel' alone"):
        made(tmp_path / "other", "reconstruct", inputs=[KNOWN], training=[str(KNOWN)])
    (tmp_path / "bad.cif").write_text("nothing")
    with pytest.raises(DataError, match="holds no crystal that can be read"):
        made(tmp_path / "other", "reconstruct", inputs=[KNOWN], screens=["novel"], training=[str(tmp_path / "bad.cif")])


# Symmetry


def test_the_best_of_several_is_not_of_steered_crystals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--best-of 3 is of crystals that aren't steered"):
        made(tmp_path, "sample", PEROV, best_of=3, composition="BaTiO3")


def test_a_tolerance_as_large_as_distances_is_taken_for_half_of_them() -> None:
    """spglib 2.8 read memory that wasn't its own here; in a process of its own, which may crash."""
    made = """
import numpy as np
from dist_train.crystal.structure import Crystal
from dist_train.crystal.symmetry import snapped
lattice = np.array([[3.907, 0, 0], [-0.136, 4.198, 0], [0.024, 0.024, 4.11]])
sites = [[0.081, 0.002, 0.077], [0.681, 0.48, 0.681], [0.691, 0.492, 0.18], [0.693, 0.973, 0.667], [0.217, 0.976, 0.209]]
crystal = Crystal("near", lattice, np.array(sites), np.array([6, 6, 50, 50, 6]))
for tolerance in (0.65, 0.7, 0.75, 5.0):
    snapped(crystal, tolerance)
print("whole")
"""
    found = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "whole\n"), found.stderr


def test_a_snapped_crystal_has_exactly_the_symmetry_that_was_found() -> None:
    rng = np.random.default_rng(0)
    for path in sorted((CIFS / "mp_20").glob("*.cif"))[:8]:
        true = read_cif(path, 1000)
        noise = 0.01 * rng.normal(size=true.frac_N3.shape) @ np.linalg.inv(true.lattice_A)
        noisy = replace(true, frac_N3=true.frac_N3 + noise)
        group = space_group(noisy, 0.1)
        exact = snapped(noisy, 0.1)
        assert group is not None
        assert exact is not None, path
        assert space_group(exact, EXACT_A) == group == space_group(true, 0.1)
        assert exact.formula == true.formula
    triclinic = Crystal("p1", np.eye(3) * [3, 4, 5] + 0.3, rng.random((5, 3)), [1, 6, 7, 8, 9])
    assert space_group(triclinic, 0.01) == (1, "P1")


def test_a_symmetrized_crystal_keeps_its_cell_and_its_origin() -> None:
    """Real crystals whose atoms are moved by some 0.1 A, and what is nearest of all to each symmetry."""
    rng = np.random.default_rng(0)
    again = 0
    paths = sorted((CIFS / "mp_20").glob("*.cif"))[:12]
    for path in paths:
        true = read_cif(path, 1000)
        noise = 0.06 * rng.normal(size=true.frac_N3.shape)
        strain = np.eye(3) + 0.005 * rng.normal(size=(3, 3))
        lattice = true.lattice_A @ strain
        noisy = replace(true, lattice_A=lattice, frac_N3=true.frac_N3 + noise @ np.linalg.inv(lattice))
        found = symmetrized(noisy)
        assert all(first.order < second.order for first, second in pairwise(found))
        for order, crystal in found:
            (exact,) = symmetrized(crystal, (EXACT_A,))
            assert exact.order >= order > 1
            np.testing.assert_allclose(exact.crystal.lattice_A, crystal.lattice_A, atol=1e-9)
            np.testing.assert_array_equal(crystal.numbers_N, true.numbers_N)
            np.testing.assert_allclose(crystal.lattice_A, lattice, atol=0.04 * np.abs(lattice).max())
            away = crystal.frac_N3 - noisy.frac_N3
            assert np.linalg.norm((away - away.round()) @ lattice, axis=1).max() < 1.0
        again += space_group(true) in [space_group(crystal, EXACT_A) for _, crystal in found]
    assert again > 0.6 * len(paths)
    assert not symmetrized(Crystal("p1", np.eye(3) * [3, 4, 5] + 0.3, rng.random((5, 3)), [1, 6, 7, 8, 9]), (0.01,))


def test_a_crystal_that_snaps_to_another_symmetry_is_left_as_it_is() -> None:
    """One of the rare ones (found among 360): spglib's standardised cell has P-1 where it had found Ibam."""
    true = read_cif(CIFS / "mp_20" / "mp-1208901.cif", 1000)
    noise = 0.03 * np.random.default_rng(2).normal(size=true.frac_N3.shape) @ np.linalg.inv(true.lattice_A)
    noisy = replace(true, frac_N3=true.frac_N3 + noise)
    assert space_group(noisy, 0.3) == (72, "Ibam")
    assert snapped(noisy, 0.3) is None
    (result,) = finished([result_of("x", Decoded(noisy, np.ones(1)))], Finish(symmetrize_A=0.3), Stages(99))
    assert (result.crystal, result.snapped) == (noisy, False)


def test_symmetrized_samples_are_written_with_their_space_group(tmp_path: Path) -> None:
    found = made(tmp_path, "sample", n=8, seed=2, symmetrize=0.2)
    snaps = found.metrics["snapped"]
    assert snaps["n_snapped"] + snaps["n_left"] == 8
    assert snaps["n_snapped"] >= 6
    for row in table(tmp_path):
        group = space_group(read_cif(tmp_path / row["file"], 1000), EXACT_A)
        assert group is not None
        assert (group.number == int(row["space_group_number"])) == (row["snapped"] == "yes")
    assert sum(found.metrics["space_groups"].values()) == 8


# Relaxation


def test_a_relaxed_crystal_has_the_lattice_constant_of_its_potential() -> None:
    """Copper by EMT: a minimum at 3.59 A, from a cell squeezed and sheared."""
    atoms = Crystal("Cu", 3.9 * np.array([[0, 0.5, 0.5], [0.5, 0, 0.52], [0.5, 0.5, 0]]), [[0, 0, 0]], [29])
    found = relax(atoms, EMT(), 200, 0.001)
    assert found.converged
    assert found.steps <= 200
    np.testing.assert_allclose(found.crystal.lengths_angles, [3.59 / 2**0.5] * 3 + [60] * 3, rtol=5e-3)
    still = relax(atoms, EMT(), 0)
    assert (still.steps, still.converged) == (0, False)
    assert still.crystal is atoms
    assert still.energy_eV > found.energy_eV
    with pytest.raises(CrystalError, match="No EMT-potential for C"):
        relax(CUBIC, EMT(), 5)


def test_relaxation_is_bounded_and_its_failures_are_counted(tmp_path: Path) -> None:
    found = made(tmp_path / "c", "sample", CARBON, n=4, seed=1, relax=EMT_NAME, relax_steps=3)
    runs = found.metrics["relaxation"]
    assert runs["n_relaxed"] + runs["n_stopped"] == 4
    assert all(row["relax_steps"] in "123" and float(row["energy_eV_per_atom"]) for row in table(tmp_path / "c"))
    assert f"stopped after 3 steps, {runs['n_failed']} failed" in summary(found)
    still = made(tmp_path / "s", "sample", CARBON, n=4, seed=1, relax=EMT_NAME, relax_steps=0)
    assert "energies of 4 as they are, 0 failed" in summary(still)
    with pytest.raises(ConfigError, match="--relax-steps 3 is of --relax, which isn't given"):
        made(tmp_path / "s", "sample", CARBON, relax_steps=3)
    other = made(tmp_path / "p", "reconstruct", inputs=[KNOWN], relax=EMT_NAME)
    assert other.metrics["relaxation"]["n_failed"] == other.metrics["n_written"] == 1
    assert "No EMT-potential for " in table(tmp_path / "p")[0]["relax_failure"]


def test_calculators_that_are_none_are_told_in_a_line() -> None:
    for name, told in (
        ("emt", "give MODULE:FACTORY"),
        ("no_such_module:X", "no module no_such_module"),
        ("ase.calculators.emt:Nope", "has no attribute 'Nope'"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            make_calculator(name)
        assert "\n" not in str(error.value)


# Densities


OBLIQUE = np.array([[3.5, 0, 0], [-1.2, 4.1, 0], [0.6, 0.9, 4.8]])


@pytest.mark.parametrize("lattice", [np.diag([3.0, 4.0, 5.0]), OBLIQUE], ids=["right", "oblique"])
def test_density_files_are_read_back_by_ase_and_pymatgen(tmp_path: Path, lattice: np.ndarray) -> None:
    crystal = Crystal("x y", lattice, [[0, 0, 0], [0.25, 0.5, 0.75], [0.5, 0.5, 0.1]], [8, 22, 8])
    spec = GridSpec(shape="adaptive", multiple=2, max_spacing_A=0.5)
    density = voxelize(crystal, spec).density_CDHW[0]
    assert len({*density.shape}) > 1
    (tmp_path / "x.cube").write_text(to_cube(crystal, density, "occupancy\nof x"))
    with (tmp_path / "x.cube").open() as stream:
        cube = read_cube(stream)
    np.testing.assert_allclose(cube["data"], density, atol=1e-5)
    np.testing.assert_allclose(cube["atoms"].cell, lattice, atol=1e-5)
    np.testing.assert_allclose(cube["atoms"].positions, crystal.cart_N3, atol=1e-5)
    assert cube["atoms"].numbers.tolist() == [8, 22, 8]
    assert np.allclose(cube["origin"], 0)
    (tmp_path / "CHGCAR_x").write_text(to_chgcar(crystal, density))
    chgcar = Chgcar.from_file(tmp_path / "CHGCAR_x")
    np.testing.assert_allclose(chgcar.data["total"] / crystal.volume_A3, density, atol=1e-6)
    np.testing.assert_allclose(chgcar.structure.frac_coords, crystal.frac_N3, atol=1e-9)
    assert [site.specie.Z for site in chgcar.structure] == [8, 22, 8]


def test_decoded_densities_have_their_atoms_where_they_are_dense(tmp_path: Path) -> None:
    made(tmp_path, "sample", CARBON, n=2, seed=1, density="cube")
    files = sorted((tmp_path / "density").iterdir())
    assert [path.name for path in files] == [f"sample-1-{place:05d}.occupancy.cube" for place in range(2)]
    for path in files:
        with path.open() as stream:
            cube = read_cube(stream)
        shape = np.array(cube["data"].shape)
        at = np.rint(cube["atoms"].get_scaled_positions() * shape).astype(int) % shape
        assert (cube["data"][tuple(at.T)] > 0.5).all()
        assert cube["data"].mean() < 0.4
        assert len(read(tmp_path / "cifs" / f"{path.name[:14]}.cif")) == len(cube["atoms"])


def test_channels_have_names() -> None:
    names = channel_names(GridSpec(channels=("occupancy", "period", "code")))
    assert names[:2] == ["occupancy", "period-1"]
    assert names[8] == "code-01"
    assert len({*names}) == len(names) == 20


# What is refused


def altered_bundle(folder: Path, version: int) -> str:
    shutil.copytree(PEROV, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": version}))
    sums = (folder / SUMS_NAME).read_text().splitlines()
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    lines = [f"{digest}  config.json" if line.endswith("  config.json") else line for line in sums]
    (folder / SUMS_NAME).write_text("\n".join(lines) + "\n")
    return str(folder)


LARGE = min((CIFS / "mp2025_n101_up").glob("*.cif"))


@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        ("reconstruct", {"inputs": [LARGE]}, "no crystal given can be reconstructed: .* is allowed"),
        ("reconstruct", {"inputs": [CIFS / "broken" / "broken_truncated.cif"]}, "not a CIF"),
        ("reconstruct", {"inputs": []}, "takes some crystals, 0 were given"),
        ("interpolate", {"inputs": [KNOWN]}, "takes two crystals or more, 1 is given"),
        ("interpolate", {"inputs": [KNOWN, LARGE]}, "is allowed"),
        ("alter", {"inputs": [KNOWN]}, "has nothing to do: give --replace, --scale, --along or --perturb"),
        ("alter", {"inputs": [KNOWN], "replace": ["Sn"]}, "give OLD=NEW"),
        ("alter", {"inputs": [KNOWN], "replace": ["Sn=Q"]}, "'Q' is no element"),
        ("alter", {"inputs": [KNOWN], "replace": ["Sn=U"]}, "the model was trained without U, it knows Li Be"),
        ("alter", {"inputs": [KNOWN], "replace": ["Ti=Zr"]}, "no Ti to replace in the crystal, which holds O 2"),
        (
            "alter", {"inputs": [KNOWN], "replace": ["Sn=Zr"], "within": 0.1, "of": (0.3, 0.3, 0.3)},
            "no atom lies within 0.1 A of 0.3 0.3 0.3, the nearest is 1.789 A away",
        ),
        ("alter", {"inputs": [KNOWN], "replace": ["Sn=Zr"], "within": 0.1}, "give both or none"),
        ("alter", {"inputs": [KNOWN], "within": 0.1, "of": (0, 0, 0)}, "and neither is given"),
        ("alter", {"inputs": [KNOWN], "replace": ["Sn=Zr"], "n": 2}, "one and the same"),
        ("sample", {"composition": "BaTiO3", "elements": "Ba,Ti"}, "says which elements: leave out --elements Ba,Ti"),
        ("sample", {"elements": "Ba,Xx"}, "'Xx' is no element; write symbols"),
        ("sample", {"screens": ["nice"]}, "--screen 'nice' is none of valid, distance=1.0"),
        ("sample", {"screens": ["distance=-1"]}, "'-1' is no distance"),
        ("sample", {"model": "nowhere"}, "no model bundle"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(
    tmp_path: Path, task: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(DistTrainError, match=told) as error:
        made(tmp_path / "out", task, **options)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_newer_and_damaged_bundles_and_those_without_digests(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has format 99, this program reads up to"):
        made(tmp_path / "out", "sample", altered_bundle(tmp_path / "newer", 99))
    bundle = altered_bundle(tmp_path / "same", 2)
    sums = tmp_path / "same" / SUMS_NAME
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "digests" not in line))
    with pytest.raises(ModelError, match="doesn't list its training crystals"):
        made(tmp_path / "out", "sample", bundle, screens=["novel"])
    weights = tmp_path / "same" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="differs from SHA256SUMS"):
        made(tmp_path / "out", "sample", bundle)


def test_a_screen_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dist_train.crystal.validity import chemistry

    chemistry.cache_clear()
    monkeypatch.setitem(sys.modules, "smact", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist-train\[eval\]'"):
        made(tmp_path, "sample", screens=["composition"])
    chemistry.cache_clear()
