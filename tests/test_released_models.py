"""The models in data/models: small, whole, and as good on moved test crystals as their figures say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.commands.models import read_crystals
from dist_train.crystal.metrics import compare
from dist_train.crystal.moved import moved
from dist_train.generate import reconstruct
from dist_train.models.export import check_sums, read_bundle
from dist_train.models.reconstruct import Codec

DATA = Path(__file__).parents[1] / "data"
MODELS = sorted(path.parent for path in (DATA / "models").glob("*/config.json"))
MAX_BYTES = 12_000_000
SHOWN = 40


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_released_model_does_what_its_figures_say(folder: Path) -> None:
    check_sums(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES
    codec = Codec(read_bundle(folder)[0])
    told = json.loads((folder / "evaluation.json").read_text())
    table = read_crystals([str(DATA.parent / told["data"]["source"])], codec.model.grid)
    rng = np.random.default_rng(0)
    crystals = [moved(crystal, rng) for crystal in table[:: len(table) // SHOWN]]
    pairs = zip(crystals, reconstruct(codec, crystals), strict=True)
    matched = [compare(crystal, decoded.crystal).match for crystal, decoded in pairs]
    rate = told["match_rate"]
    assert np.mean(matched) >= rate - max(0.06, 2 * np.sqrt(rate * (1 - rate) / len(crystals)))
