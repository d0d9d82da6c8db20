"""Fingerprints of crystals, between which the field measures how well samples cover a data set (COV).

The only file that imports matminer (Ward et al., Comput. Mater. Sci. 2018), inside functions: it is an optional package and
loads pandas. The fingerprints are those of CDVAE's evaluation (Xie et al., ICLR 2022): of the composition, Magpie's
statistics of elemental properties; of the structure, the mean over sites of CrystalNN's local order parameters.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.interop import to_pymatgen
from dist_train.crystal.magpie_scale import SCALE
from dist_train.crystal.parallel import parallel_map
from dist_train.crystal.structure import Crystal
from dist_train.errors import ConfigError
from dist_train.files import atomic_path

FloatArray = NDArray[np.float64]

N_COMPOSITION, N_STRUCTURE = 132, 61
COMPOSITION, STRUCTURE = slice(0, N_COMPOSITION), slice(N_COMPOSITION, N_COMPOSITION + N_STRUCTURE)
"""Where the two parts lie in a fingerprint."""

CHUNK = 8

_MEANS, _DEVIATIONS = np.array(list(SCALE.values())).transpose(1, 0, 2).reshape(2, N_COMPOSITION)


def matminer_installed() -> bool:
    """Whether fingerprints can be made at all."""
    return find_spec("matminer") is not None


def fingerprint(crystal: Crystal) -> FloatArray:
    """[193]: 132 standardised features of the composition, then 61 order parameters of the structure, none with a unit.

    Free of origin, orientation, order of the atoms and choice of the cell, but for rounding. The features are standardised
    by CDVAE's means and deviations, and one that isn't known of an element (NaN) is taken as the mean. The structure's part
    is NaN where CrystalNN finds no neighbours, as between atoms that overlap.
    Raises ConfigError where matminer isn't installed.
    """
    magpie, structure = _featurizers()[0], to_pymatgen(crystal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every crystal: it states no oxidation states
        features = np.array(magpie.featurize(structure.composition))
        return np.concatenate([np.nan_to_num((features - _MEANS) / _DEVIATIONS, nan=0.0), _structure(structure)])


def fingerprints(
    crystals: Sequence[Crystal], workers: int, progress: Callable[[int], None] | None = None, cache: Path | None = None
) -> FloatArray:
    """[M, 193]: the `fingerprint` of every crystal, in order, over processes; `progress` gets the number done so far.

    cache: a file that keeps them by a digest of the crystal and the versions of the libraries; what it holds is not
    computed again, and what is computed is added to it, also when the work is interrupted. One that can't be read is
    replaced. Raises ConfigError where matminer isn't installed.
    """
    if not matminer_installed():
        raise ConfigError("fingerprints need the package matminer: pip install 'dist-train[eval]'")
    known = _read_cache(cache) if cache else {}
    digests = [_digest(crystal) for crystal in crystals]
    new = {digest: crystal for digest, crystal in zip(digests, crystals, strict=True) if digest not in known}
    done = len(crystals) - len(new)
    if progress:
        progress(done)
    try:
        for digest, values in zip(new, parallel_map(fingerprint, new.values(), workers, CHUNK)):
            known[digest] = values
            done += 1
            if progress:
                progress(done)
    finally:
        if cache and new:
            _write_cache(cache, known)
    return np.array([known[digest] for digest in digests]).reshape(-1, N_COMPOSITION + N_STRUCTURE)


@cache
def _featurizers() -> tuple[Any, Any]:
    """matminer's Magpie statistics and CrystalNN order parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it loads
        try:
            from matminer.featurizers.composition.composite import ElementProperty
            from matminer.featurizers.site.fingerprint import CrystalNNFingerprint
        except ImportError as error:
            raise ConfigError(f"fingerprints need the package matminer ({error}): pip install 'dist-train[eval]'") from error
        return ElementProperty.from_preset("magpie", impute_nan=False), CrystalNNFingerprint.from_preset("ops")


def _structure(structure: Any) -> FloatArray:
    """[61] order parameters of a pymatgen Structure, mean over sites, or all NaN."""
    featurizer = _featurizers()[1]
    try:
        mean = np.mean([featurizer.featurize(structure, site) for site in range(len(structure))], axis=0)
    # CrystalNN raises whatever went wrong first inside: ValueError, QhullError, IndexError, ZeroDivisionError...
    except Exception:
        return np.full(N_STRUCTURE, np.nan)
    return mean if np.isfinite(mean).all() else np.full(N_STRUCTURE, np.nan)


def _digest(crystal: Crystal) -> str:
    """Hexadecimal SHA-256 of the cell, its atoms, and the versions that decide what becomes of them."""
    parts = [f"{version('matminer')} {version('pymatgen')}".encode()]
    parts += [array.tobytes() for array in (crystal.lattice_A, crystal.frac_N3, crystal.numbers_N)]
    return hashlib.sha256(b" ".join(parts)).hexdigest()


def _read_cache(path: Path) -> dict[str, FloatArray]:
    try:
        with path.open("rb") as stream, np.load(stream) as stored:
            return dict(zip(stored["digests"].tolist(), stored["values"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _write_cache(path: Path, known: Mapping[str, FloatArray]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, digests=np.array(list(known)), values=np.array(list(known.values())))
