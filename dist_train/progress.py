"""One progress bar for every long job: tqdm on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_SECONDS = 5.0


class Progress:
    """A bar with rate and time left; use as a context and call `update(n)`.

    In a log file a bar that rewrites itself is unreadable, so there it prints a line at most every five seconds.
    """

    def __init__(self, label: str, total: int, unit: str, initial: int = 0, shown: bool = True) -> None:
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            desc=f"{label:>12}", total=total, unit=f" {unit}", initial=initial, dynamic_ncols=True, mininterval=0.2,
            disable=not shown or self._lines,
        )  # fmt: skip
        self._label, self._total, self._unit, self._done, self._initial = label, total, unit, initial, initial
        self._figures, self._shown = "", -1
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._lines and self._shown != self._done:
            self._print()

    def update(self, n: int = 1, **figures: object) -> None:
        """Advance by n; figures are shown behind the bar."""
        self._done += n
        if figures:
            self._figures = ", ".join(f"{name}={value}" for name, value in figures.items())
            self._bar.set_postfix_str(self._figures, refresh=False)
        self._bar.update(n)
        if self._lines and time.monotonic() - self._printed > LINE_SECONDS:
            self._print()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the bar advances by one for each that its user is done with."""
        for item in items:
            yield item
            self.update()

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        line = tqdm.format_meter(
            self._done, self._total, self._printed - self._began, prefix=f"{self._label:>12}", unit=f" {self._unit}",
            initial=self._initial, ncols=120, ascii=" #", postfix=self._figures,
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)


class Stages:
    """The stages of a job, each with a progress bar; `seconds` holds how long each took.

    least: a stage of fewer steps has no bar.
    """

    def __init__(self, least: int = 0) -> None:
        self.seconds: dict[str, float] = {}
        self._least = least

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "crystals") -> Iterator[Progress]:
        """A stage of so many steps; one of the same name again adds to its seconds."""
        began = time.monotonic()
        with Progress(name, total, unit, shown=total >= self._least) as bar:
            yield bar
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
