"""Figures and files of a registered model, written to MLflow below the run that made it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_train.config import flattened
from dist_train.errors import ConfigError, ModelError

ABOUT = ("task", "seed", "model", "data", "settings", "versions")
"""Parts of metrics.json that become parameters: they tell what was done, the others what was found."""

NOT_IN_NAMES = r"[^\w. -]"
"""What MLflow takes in no figure's name, and a space group or a reason has."""


class Record:
    """Where to write what is found of 'models:/NAME@ALIAS': made before the work, so that it fails before it.

    model: 'models:/NAME/VERSION', which stays the same if the alias moves meanwhile.
    """

    def __init__(self, model: str, tracking_uri: str | None) -> None:
        if not (model.startswith("models:/") and tracking_uri):
            raise ConfigError(
                f"--record writes to the MLflow run of a registered model, which {model} isn't: give --model "
                "models:/NAME@ALIAS and --tracking-uri, or leave --record out"
            )
        from dist_train.backends.mlflow_registry import find

        self._registry, self._version = find(tracking_uri, model)
        self.model = f"models:/{self._registry.name}/{self._version.number}"
        if not self._version.run_id:
            raise ModelError(f"{self.model} was registered without a run, below which --record could write; leave it out")

    def write(self, title: str, metrics: dict[str, Any], out: Path, names: Iterable[str]) -> str:
        """Write the parameters and figures of `metrics`, and those of the named files of a folder that there are.

        Returns what to tell. Raises ModelError where the server refuses.
        """
        about = {name: metrics[name] for name in ABOUT if name in metrics}
        params = {key: str(value) for key, value in flattened(about)}
        figures = dict(_figures({name: value for name, value in metrics.items() if name not in ABOUT}))
        files = [path for name in names if (path := out / name).is_file()]
        try:
            run_id = self._registry.record(self._version, title, params, figures, files)
        except ModelError as error:
            raise ModelError(f"{error}; not recorded, but all of it is in {out}") from None
        return f"recorded in MLflow as run {run_id}, below the run of {self.model}"


def _figures(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """('a/b', value) of every number."""
    for key, value in values.items():
        name = prefix + re.sub(NOT_IN_NAMES, "_", key)
        if isinstance(value, dict):
            yield from _figures(value, f"{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)
