"""Errors a user can cause, one small tree. A message names the thing, its value, the limit and the remedy."""

import re


class DistTrainError(Exception):
    """Root of every error that the command line reports in one line, with this exit code."""

    exit_code = 2


class ConfigError(DistTrainError):
    """A run file, an override or a combination of settings that can't be used."""


class DataError(DistTrainError):
    """Input crystals that are missing, unreadable or rejected beyond the stated fraction."""


class CrystalError(DataError):
    """One crystal that can't be read or represented; recorded as a rejected row, never fatal for a job."""


class ShardError(DistTrainError):
    """A shard folder that is incomplete, damaged, of another run or too small for the ranks."""


class CheckpointError(DistTrainError):
    """A checkpoint that is missing, uncommitted, damaged or of another configuration."""


class ModelError(DistTrainError):
    """A model bundle or registry entry that is missing, damaged or doesn't fit the crystals."""


class Interrupted(DistTrainError):
    """A training that was asked to stop, has saved where it is, and goes on when it is started again."""

    exit_code = 85


class OutOfMemory(DistTrainError):
    """A device that is too small for a forward pass; started again at once, the training takes half as much at a time."""

    exit_code = 86


def kind_of(reason: str) -> str:
    """A reason without what differs from one crystal to the next, to count reasons by."""
    return re.sub(r"'[^']*'|\[[^\]]*\]", "...", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", reason))[:120]
