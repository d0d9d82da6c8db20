"""The code that MLflow runs when it loads a registered model (models from code): by its protocol, it acts at import."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import set_model

with warnings.catch_warnings():
    # MLflow asks for type hints on `predict`, from which it would make another signature than the given one.
    warnings.simplefilter("ignore", UserWarning)

    class CrystalModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc,unused-ignore]
        """`dist_train.serving.answer` for a DataFrame."""

        def load_context(self, context: Any) -> None:
            from dist_train.models.export import read_bundle
            from dist_train.models.reconstruct import Codec

            self.codec = Codec(read_bundle(Path(context.artifacts["bundle"]))[0])

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            import pandas as pd

            from dist_train.errors import DistTrainError
            from dist_train.serving import answer

            table = {name: list(model_input[name]) for name in model_input.columns}
            try:
                return pd.DataFrame(answer(self.codec, table, params or {}))
            except DistTrainError as error:  # what MLflow answers with 400 and this line, not with a traceback
                raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(CrystalModel())
