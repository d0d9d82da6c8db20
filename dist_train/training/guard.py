"""What ends a run from outside or for its own good: signals of a scheduler, and a watchdog for steps that hang."""

from __future__ import annotations

import faulthandler
import signal
import threading
from types import FrameType
from typing import Any, Self

from dist_train.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Schedulers send these shortly before they end a job."""


STDERR = 2
"""The descriptor itself: Python's own stream may be closed or replaced."""


class StopRequest:
    """Notes SIGTERM and SIGUSR1 inside the block instead of dying of them; `made` is true from then on.

    A block that was left by `Interrupted` has done what they ask for: they are ignored from then on, as a scheduler may send
    them to one rank after another.
    """

    def __init__(self) -> None:
        self.made = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if kind is Interrupted else handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.made = True


class Watchdog:
    """Ends the process, with the stacks of its threads on stderr, where `beat` isn't called for so many seconds.

    A rank that hangs makes all others wait in a collective: each of them tells where it stands, and the one that stands
    elsewhere is at fault. The timer is a thread of C code, which a thread that holds Python's lock can't keep from its work.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """To be called at every step."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=STDERR)
