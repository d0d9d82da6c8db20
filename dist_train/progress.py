"""One progress bar for every long job: tqdm on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
from typing import Self

from tqdm import tqdm


class Progress:
    """A bar with rate and time left; use as a context and call `update(n)`.

    In a log file a bar that rewrites itself is unreadable, so there it prints a line at most every five seconds.
    """

    def __init__(self, label: str, total: int, unit: str, initial: int = 0, shown: bool = True) -> None:
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=f"{label:>12}", total=total, unit=f" {unit}", initial=initial, ncols=100 if on_terminal else 90,
            mininterval=0.2 if on_terminal else 5.0, file=sys.stderr, ascii=None if on_terminal else " #", disable=not shown,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: int = 1, **figures: object) -> None:
        """Advance by n; figures are shown behind the bar."""
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(n)
