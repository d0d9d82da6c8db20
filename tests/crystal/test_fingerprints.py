"""Fingerprints: known features, invariances of a crystal, the scale of CDVAE, and a cache that is believed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.fingerprints import COMPOSITION, STRUCTURE, fingerprint, fingerprints, matminer_installed
from dist_train.crystal.formats import read_crystals
from dist_train.crystal.magpie_scale import SCALE
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError

SAMPLE = Path(__file__).parents[2] / "data" / "sample"

needs_matminer = pytest.mark.skipif(not matminer_installed(), reason="matminer is not installed")

FCC = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
ROCK_SALT = Crystal("NaCl", 5.64 * FCC, [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17])
DIAMOND = Crystal("C", 3.567 * FCC, [[0, 0, 0], [0.25, 0.25, 0.25]], [6, 6])


@needs_matminer
def test_features_of_a_composition_are_standardised_statistics_of_its_elements() -> None:
    features = fingerprint(ROCK_SALT)[COMPOSITION].reshape(-1, 6)
    means, deviations = SCALE["Number"]
    statistics = [11, 17, 6, 14, 3, 11]  # minimum, maximum, range, mean, average deviation, mode
    assert features[0] == pytest.approx((np.array(statistics) - means) / deviations, abs=1e-12)


@needs_matminer
def test_what_is_not_known_of_an_element_counts_as_the_mean() -> None:
    features = np.array(
        [fingerprint(replace(DIAMOND, numbers_N=np.array([z, z])))[COMPOSITION] for z in range(1, MAX_Z + 1)]
    )
    assert np.isfinite(features).all()
    assert (features[MAX_Z - 1] == 0).any()


@needs_matminer
def test_features_of_a_structure_tell_coordinations() -> None:
    from matminer.featurizers.site.fingerprint import CrystalNNFingerprint

    labels = CrystalNNFingerprint.from_preset("ops").feature_labels()
    for crystal, motif in ((ROCK_SALT, "octahedral CN_6"), (DIAMOND, "tetrahedral CN_4")):
        values = dict(zip(labels, fingerprint(crystal)[STRUCTURE], strict=True))
        assert values[motif] == pytest.approx(1.0, abs=1e-3)
        assert values["body-centered cubic CN_8"] == 0.0


@needs_matminer
def test_the_scale_is_that_of_real_crystals() -> None:
    files = sorted((SAMPLE / "cifs" / "mp_20").glob("*.cif"))
    crystals = [crystal for path in files for crystal in read_crystals(path, 8) if isinstance(crystal, Crystal)]
    features = fingerprints(crystals, workers=1)[:, COMPOSITION]
    assert len(features) > 30
    assert np.abs(features.mean(0)).max() < 1
    assert np.median(np.abs(features.mean(0))) < 0.3
    assert 0.8 < np.median(features.std(0)) < 1.2


def pictures(crystal: Crystal) -> dict[str, Crystal]:
    """The same crystal, described otherwise."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(crystal))
    shear = np.array([[1, 1, 0], [0, 1, 0], [0, 2, 1]])
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return {
        "origin": replace(crystal, frac_N3=crystal.frac_N3 + rng.random(3)),
        "order": replace(crystal, frac_N3=crystal.frac_N3[order], numbers_N=crystal.numbers_N[order]),
        "orientation": replace(crystal, lattice_A=crystal.lattice_A @ turn),
        "cell": replace(
            crystal, lattice_A=shear @ crystal.lattice_A, frac_N3=crystal.frac_N3 @ np.linalg.inv(shear)
        ),
        "supercell": doubled(crystal),
    }  # fmt: skip


def doubled(crystal: Crystal) -> Crystal:
    """Two cells along the first lattice vector."""
    lattice = crystal.lattice_A * np.array([[2], [1], [1]])
    frac = np.concatenate([crystal.frac_N3, crystal.frac_N3 + np.eye(3)[0]]) / [2, 1, 1]
    return replace(crystal, lattice_A=lattice, frac_N3=frac, numbers_N=np.tile(crystal.numbers_N, 2))


@needs_matminer
@pytest.mark.parametrize("table", ["perov_5", "materials_project"])
def test_a_fingerprint_is_of_the_crystal_and_not_of_its_description(
    table: str, sample_table: Callable[[str], list[Crystal]]
) -> None:
    for crystal in [crystal for crystal in sample_table(table) if 2 <= len(crystal) <= 8][:4]:
        wanted = fingerprint(crystal)
        assert np.isfinite(wanted).all()
        for name, picture in pictures(crystal).items():
            assert np.abs(fingerprint(picture) - wanted).max() < 1e-6, (crystal.id, name)


@needs_matminer
def test_exchanged_species_change_the_structure_alone(sample_table: Callable[[str], list[Crystal]]) -> None:
    crystal = next(c for c in sample_table("perov_5") if len(c.composition) == 3)
    a, b = list(crystal.composition)[:2]
    exchanged = np.select([crystal.numbers_N == a, crystal.numbers_N == b], [b, a], crystal.numbers_N)
    other = replace(crystal, numbers_N=exchanged)
    difference = np.abs(fingerprint(other) - fingerprint(crystal))
    same = other.composition == crystal.composition
    assert (difference[COMPOSITION].max() < 1e-9) == same
    assert difference[STRUCTURE].max() > 1e-3


@needs_matminer
def test_processes_give_what_one_gives_in_order() -> None:
    crystals = [ROCK_SALT, DIAMOND, doubled(ROCK_SALT), ROCK_SALT]
    done: list[int] = []
    several = fingerprints(crystals, workers=2, progress=done.append)
    assert np.array_equal(several, np.stack([fingerprint(crystal) for crystal in crystals]))
    assert done == [1, 2, 3, 4]  # the last is a copy of the first


@needs_matminer
def test_the_cache_is_read_extended_and_replaced_when_broken(tmp_path: Path) -> None:
    path = tmp_path / "fingerprints.npz"
    first = fingerprints([ROCK_SALT], 1, cache=path)
    with np.load(path) as stored:
        np.savez(path, digests=stored["digests"], values=stored["values"] + 1)
    both = fingerprints([DIAMOND, ROCK_SALT], 1, cache=path)
    assert np.array_equal(both, [fingerprint(DIAMOND), first[0] + 1])
    with np.load(path) as stored:
        assert len(stored["digests"]) == 2
    moved = replace(ROCK_SALT, frac_N3=ROCK_SALT.frac_N3 * 0.98)
    assert not np.array_equal(fingerprints([moved], 1, cache=path)[0], both[1])
    path.write_bytes(path.read_bytes()[:200])
    assert np.array_equal(fingerprints([ROCK_SALT], 1, cache=path), first)
    with np.load(path) as stored:
        assert len(stored["digests"]) == 1


def test_without_matminer_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matminer", None)
    with pytest.raises(ConfigError, match=r"matminer.*pip install 'dist-train\[eval\]'"):
        fingerprints([ROCK_SALT], 1)
