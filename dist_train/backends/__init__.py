"""One module per engine (Ray, DeepSpeed, MLflow): the only files that import them."""
