"""Planned, byte-reproducible WebDataset tar shards and the index that describes them."""
