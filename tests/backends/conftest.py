"""Fixtures of tests that start Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import ISOLATED


@pytest.fixture(scope="module")
def no_foreign_cluster() -> Iterator[None]:
    """Clusters are those that a module starts itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in ISOLATED.items():
            patch.setenv(name, value)
        yield
