"""One sample of a shard by its byte offsets: checked and decoded, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.crystal.structure import Crystal
from dist_train.errors import ShardError
from dist_train.shards.codec import crc_of, decode_sample
from dist_train.shards.index import Sample, ShardRecord

Decoded = tuple[NDArray[np.float16] | None, NDArray[np.uint8] | None, Crystal]


def read_sample(root: Path, shard: ShardRecord, sample: Sample) -> Decoded:
    """Density, species (None where no grids are stored) and crystal. Raises ShardError naming a damaged sample."""
    members = {}
    try:
        with (root / shard.name).open("rb") as stream:
            for name, (offset, size) in sample.members.items():
                stream.seek(offset)
                members[name] = stream.read(size)
        if (crc := crc_of(members.values())) != sample.crc32:
            raise ValueError(f"crc32 {crc:08x}, {sample.crc32:08x} expected")
        return decode_sample(members)
    except (OSError, ValueError) as error:
        raise ShardError(f"sample {sample.key} ({sample.id}) of {root / shard.name} is damaged: {error}") from None
