"""The ordered map over processes: same results, order kept, items read only as far as needed, errors not swallowed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dist_train.crystal.parallel import CHUNKS_IN_FLIGHT, parallel_map

SPAWNS = pytest.mark.timeout(60)


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse_seven(number: int) -> int:
    if number == 7:
        raise ValueError("seven")
    return number


@SPAWNS
@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    results = list(parallel_map(square, range(50), workers, chunk=4))
    assert [value for value, _ in results] == [number * number for number in range(50)]
    assert (os.getpid() in {process for _, process in results}) == (workers == 1)


@SPAWNS
def test_items_are_read_only_as_far_as_results_are_taken() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = parallel_map(square, items(), 2, chunk=3)
    assert next(results)[0] == 0
    assert len(taken) <= 3 * (2 * CHUNKS_IN_FLIGHT + 1)
    results.close()


@SPAWNS
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_reaches_the_caller(workers: int) -> None:
    with pytest.raises(ValueError, match="seven"):
        list(parallel_map(refuse_seven, range(20), workers, chunk=2))


def test_nothing_to_do() -> None:
    assert list(parallel_map(square, [], 1)) == []
