"""Metrics of generated crystals on cases whose answer is known, and the verb that prints them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_train import generation_metrics as module
from dist_train.cli import main
from dist_train.crystal.fingerprints import COMPOSITION, STRUCTURE, matminer_installed
from dist_train.crystal.parquet import write_parquet
from dist_train.crystal.structure import Crystal
from dist_train.crystal.validity import smact_installed
from dist_train.errors import ConfigError
from dist_train.generation_metrics import BENCHMARKS, PUBLISHED_KEYS, Cutoffs, coverage, generation_metrics, total_steps

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
needs_smact = pytest.mark.skipif(not smact_installed(), reason="smact is not installed")
needs_both = pytest.mark.skipif(not (smact_installed() and matminer_installed()), reason="needs smact and matminer")

FCC = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
ROCK_SALT = Crystal("NaCl", 5.64 * FCC, [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17])
ZINC_BLENDE = replace(ROCK_SALT, frac_N3=np.array([[0, 0, 0], [0.25, 0.25, 0.25]]))
MAGNESIA = Crystal("MgO", 4.21 * FCC, [[0, 0, 0], [0.5, 0.5, 0.5]], [12, 8])
CONVENTIONAL = Crystal(
    "NaCl, conventional cell, larger", 5.8 * np.eye(3),
    [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]],
    [11] * 4 + [17] * 4,
)  # fmt: skip
IMPOSSIBLE = replace(ROCK_SALT, lattice_A=np.zeros((3, 3)))
OVERLAPPING = replace(ROCK_SALT, frac_N3=np.array([[0, 0, 0], [0.01, 0, 0]]))


@pytest.mark.parametrize("failed", [None, IMPOSSIBLE])
@pytest.mark.parametrize("workers", [1, 2])
def test_uniqueness_novelty_and_metre_count_everything_that_was_to_be_generated(
    failed: Crystal | None, workers: int
) -> None:
    generated = [ROCK_SALT, CONVENTIONAL, failed, MAGNESIA, ZINC_BLENDE]
    steps: list[int] = []
    metrics = generation_metrics(
        generated, reference=[replace(ROCK_SALT, lattice_A=6.0 * FCC), DIAMOND], training=[MAGNESIA], workers=workers,
        progress=lambda stage, n: steps.append(n),
    )  # fmt: skip
    assert metrics["unique_rate"] == pytest.approx(3 / 5)  # the conventional cell is the same crystal
    assert metrics["novel_rate"] == pytest.approx(3 / 5)  # neither the failed nor magnesia
    assert metrics["unique_novel_rate"] == pytest.approx(2 / 5)
    assert metrics["metre"] == pytest.approx(1 / 2)
    assert metrics["crmse"] == pytest.approx((0.0 + 0.5) / 2, abs=1e-6)
    assert (metrics["n_generated"], metrics["n_failed"], metrics["n_training"]) == (5, 1, 1)
    assert sum(steps) <= total_steps(5, 2)


DIAMOND = Crystal("C", 3.567 * FCC, [[0, 0, 0], [0.25, 0.25, 0.25]], [6, 6])


def test_metre_takes_the_best_of_all_matches() -> None:
    displaced = replace(ROCK_SALT, frac_N3=np.array([[0, 0, 0], [0.53, 0.5, 0.5]]))
    alone = generation_metrics([displaced], [ROCK_SALT])
    both = generation_metrics([displaced, ROCK_SALT], [ROCK_SALT])
    assert 0.01 < alone["crmse"] < 0.5
    assert both["crmse"] == pytest.approx(0.0, abs=1e-6)
    assert alone["metre"] == both["metre"] == 1.0


@needs_smact
def test_validity_is_of_structure_composition_and_both() -> None:
    wrong_composition = replace(ROCK_SALT, numbers_N=np.array([11, 2]))  # no ion of helium
    metrics = generation_metrics([ROCK_SALT, OVERLAPPING, wrong_composition, None], [ROCK_SALT], [DIAMOND])
    assert metrics["structure_valid_rate"] == 2 / 4
    assert metrics["composition_valid_rate"] == 2 / 4
    assert metrics["valid_rate"] == 1 / 4
    assert metrics["valid_unique_novel_rate"] == 1 / 4
    assert metrics["unique_novel_rate"] == 3 / 4


@needs_smact
def test_distances_of_density_and_elements_are_means_of_sorted_differences() -> None:
    wide = replace(ROCK_SALT, lattice_A=2 * ROCK_SALT.lattice_A)
    metrics = generation_metrics([wide, OVERLAPPING, DIAMOND, None], [ROCK_SALT, MAGNESIA])
    salt, magnesia, diamond = (
        4 * mass / 0.602214076 / edge**3 for mass, edge in ((58.443, 5.64), (40.304, 4.21), (2 * 12.011, 3.567))
    )
    low, high = sorted([salt / 8, diamond])
    assert metrics["wdist_density"] == pytest.approx((abs(low - salt) + abs(high - magnesia)) / 2, rel=1e-4)
    assert metrics["wdist_elements"] == pytest.approx((1 + 0) / 2)
    assert metrics["n_property_samples"] == 2


@needs_smact
def test_a_seed_draws_the_crystals_whose_density_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROPERTY_SAMPLES", 3)
    scaled = [replace(ROCK_SALT, lattice_A=s * ROCK_SALT.lattice_A) for s in np.linspace(1, 2, 12)]
    distances = [generation_metrics(scaled, [ROCK_SALT], seed=seed)["wdist_density"] for seed in (0, 0, 1)]
    assert distances[0] == distances[1] != distances[2]
    assert generation_metrics(scaled, [ROCK_SALT])["n_property_samples"] == 3


def test_coverage_is_what_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(0)
    made, reference = rng.normal(size=(1100, 193)), rng.normal(size=(37, 193))
    made[3, STRUCTURE], reference[5, STRUCTURE] = np.nan, np.nan
    cutoffs = Cutoffs(structure=8.8, composition=14.4)

    def covered(one: np.ndarray, others: np.ndarray) -> bool:
        parts = ((STRUCTURE, cutoffs.structure), (COMPOSITION, cutoffs.composition))
        whole = np.isfinite(others).all(1)
        return all(np.linalg.norm(others[whole][:, part] - one[part], axis=1).min() <= limit for part, limit in parts)

    recall = np.mean([covered(one, made) for one in reference])
    precision = np.sum([covered(one, reference) for one in made]) / 2000
    assert 0.1 < recall < 0.95 and 0.02 < precision < 0.5
    found = coverage(made, reference, 2000, cutoffs)
    assert (found["cov_recall"], found["cov_precision"]) == (recall, precision)
    assert (found["n_without_fingerprint"], found["n_reference_without_fingerprint"]) == (901, 1)
    nothing = coverage(np.zeros((0, 193)), reference, 5, cutoffs)
    assert (nothing["cov_recall"], nothing["cov_precision"]) == (0.0, 0.0)


@needs_both
def test_a_data_set_covers_itself_and_garbage_covers_nothing(
    sample_table: Callable[[str], list[Crystal]], tmp_path: Path
) -> None:
    reference = sample_table("perov_5")[:40]
    cutoffs, cache = BENCHMARKS["perov-5"].cutoffs, tmp_path / "fingerprints.npz"
    itself = generation_metrics(reference, reference, cutoffs=cutoffs, cache=cache)
    for key in ("structure_valid_rate", "cov_recall", "cov_precision", "unique_rate", "metre"):
        assert itself[key] == 1.0, key
    assert itself["composition_valid_rate"] > 0.9
    assert (itself["wdist_elements"], itself["crmse"]) == pytest.approx((0, 0), abs=0.05)
    half: list[Crystal | None] = [*reference[:20], *[None] * 20]
    halved = generation_metrics(half, reference, cutoffs=cutoffs, cache=cache)
    assert halved["cov_precision"] == halved["unique_rate"] == 0.5
    rng = np.random.default_rng(0)
    garbage = [
        replace(c, frac_N3=rng.random((len(c), 3)), numbers_N=rng.integers(1, 90, len(c)), lattice_A=1.5 * c.lattice_A)
        for c in reference
    ]
    metrics = generation_metrics(garbage, reference, cutoffs=cutoffs, cache=cache)
    assert metrics["cov_recall"] <= 0.1 and metrics["cov_precision"] <= 0.1 and metrics["metre"] == 0
    assert metrics["wdist_density"] > 1 and metrics["composition_valid_rate"] < 0.7


def test_empty_sets_are_one_error() -> None:
    with pytest.raises(ConfigError, match="no generated crystals, at least 1"):
        generation_metrics([], [ROCK_SALT])
    with pytest.raises(ConfigError, match="no reference crystals, at least 1"):
        generation_metrics([None], [])


def test_published_figures_have_a_place_in_the_table() -> None:
    for benchmark in BENCHMARKS.values():
        for figures in benchmark.published.values():
            assert len(figures) == len(PUBLISHED_KEYS)


# The verb


def write_tables(folder: Path, crystals: list[Crystal]) -> tuple[str, str]:
    """Tables of a few crystals as generated, and more as reference."""
    write_parquet(folder / "generated.parquet", crystals[:4])
    write_parquet(folder / "reference.parquet", crystals[:6])
    return str(folder / "generated.parquet"), str(folder / "reference.parquet")


def test_files_that_cannot_be_read_and_those_never_written_count_as_failed(
    tmp_path: Path, sample_table: Callable[[str], list[Crystal]], capsys: pytest.CaptureFixture[str]
) -> None:
    generated, reference = write_tables(tmp_path, sample_table("perov_5"))
    out = tmp_path / "score"
    arguments = [
        "score",
        generated,
        str(SAMPLE / "cifs" / "broken"),
        "--reference",
        reference,
        "--out",
        str(out),
        "--workers=1",
    ]
    assert main(arguments) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    broken = len(list((SAMPLE / "cifs" / "broken").glob("*.cif")))
    assert metrics["n_generated"] == 4 + broken
    assert metrics["n_failed"] >= broken - 3  # some can be read as another crystal than was meant
    assert main([*arguments, "--attempts", "40", "--training", generated]) == 0
    metrics, fewer = json.loads((out / "metrics.json").read_text()), metrics
    assert metrics["n_generated"] == 40
    assert metrics["n_failed"] == fewer["n_failed"] + 40 - 4 - broken
    assert metrics["structure_valid_rate"] == pytest.approx((40 - metrics["n_failed"]) / 40)
    assert metrics["metre"] == pytest.approx(4 / 6)
    assert "40 generated" in capsys.readouterr().out
    assert main([*arguments, "--attempts", "3"]) == 2
    assert "--attempts 3 is less than the" in capsys.readouterr().err
    (out / "metrics.json").write_text("{}")
    assert main(arguments) == 2
    assert "set --out to another folder" in capsys.readouterr().err


def test_a_limit_takes_the_same_crystals_again_and_others_for_another_seed(tmp_path: Path) -> None:
    table = str(SAMPLE / "perov_5.parquet")
    found = []
    for number, seed in enumerate(("0", "0", "1")):
        out = tmp_path / str(number)
        arguments = ["score", table, "--reference", table, "--limit=6", "--seed", seed, "--out", str(out), "--workers=1"]
        assert main([*arguments, "--ceiling"]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["n_generated"] == metrics["n_reference"] == metrics["ceiling"]["n_generated"] == 6
        assert metrics["ceiling"]["metre"] == 1.0
        for result in (metrics, metrics["ceiling"]):
            del result["seconds"]
        found.append({**metrics, "seed": None, "ceiling": {**metrics["ceiling"], "seed": None}})
        assert metrics["metre"] < 1.0  # other crystals of the same table
    assert found[0] == found[1] != found[2]


@needs_both
def test_the_table_shows_published_figures_beside_ours(
    tmp_path: Path, sample_table: Callable[[str], list[Crystal]], capsys: pytest.CaptureFixture[str]
) -> None:
    generated, reference = write_tables(tmp_path, sample_table("perov_5"))
    assert (
        main(["score", generated, "--reference", reference, "--data-set=perov-5", f"--out={tmp_path}", "--workers=1"]) == 0
    )
    lines = {line[:30].strip(): line[30:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["4 generated, 0 failed"] == ["generated", "ICSG3D", "CDVAE", "DiffCSP"]
    assert lines["COV-P, %"] == ["100.00", "10.13", "98.46", "98.27"]
    assert lines["METRe, %"] == ["66.67", "-", "-", "-"]
    assert (tmp_path / "fingerprints.npz").exists()


def test_without_the_extra_packages_metrics_are_unknown_and_the_remedy_is_named(
    tmp_path: Path, sample_table: Callable[[str], list[Crystal]]
) -> None:
    generated, reference = write_tables(tmp_path, sample_table("perov_5"))
    arguments = ["score", generated, "--reference", reference, "--data-set=mp-20", f"--out={tmp_path}", "--workers=1"]
    script = (
        "import sys; sys.modules['matminer'] = sys.modules['smact'] = None\n"
        f"from dist_train.cli import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "not installed: matminer, smact" in done.stdout and "pip install 'dist-train[eval]'" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for key in ("composition_valid_rate", "valid_rate", "cov_recall", "cov_precision", "wdist_density", "wdist_elements"):
        assert metrics[key] is None, key
    assert (metrics["structure_valid_rate"], metrics["unique_rate"], metrics["metre"]) == (1.0, 1.0, pytest.approx(4 / 6))
