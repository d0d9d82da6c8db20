"""dist_train: distributed training of generative models of 3-D crystal structures."""

__version__ = "0.1.0"
