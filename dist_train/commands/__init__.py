"""What each verb of the command line does: the place where engines, shards, models and trackers are put together.

Engines are imported inside functions, so that `--help` and the verbs that need none stay fast.
"""
