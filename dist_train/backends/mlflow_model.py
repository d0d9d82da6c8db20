"""The code that MLflow runs when it loads a registered model (models from code): by its protocol, it acts at import."""

from dist_train.backends.mlflow_tracker import set_pyfunc_model

set_pyfunc_model()
