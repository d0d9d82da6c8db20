"""Real perovskites in three shards of the training split."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_shards import CRYSTALS, PER_SHARD, real_crystals, write_shards

from dist_train.shards.index import Index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_shards(tmp_path_factory.mktemp("shared"), real_crystals(CRYSTALS), per_shard=PER_SHARD)


@pytest.fixture
def own_index(tmp_path: Path) -> Index:
    """Shards that a test may damage."""
    return write_shards(tmp_path, real_crystals(CRYSTALS), per_shard=PER_SHARD)
