"""`dist-train launch` while the ranks run: signals go on to them, a killed rank starts them again, none is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dist_train.commands.launch import Plan, check_hosts, in_parallel, on_host
from dist_train.errors import ConfigError, Interrupted, OutOfMemory
from dist_train.node import send
from dist_train.ranks import EXIT_CODE, PLACE, hand_over

FINAL = {0, 2, Interrupted.exit_code, 130}
"""Exit codes after which the same command would not do better: done, the user's fault, requeue, interrupted."""
GRACE_S = 120.0
"""Time that ranks have to end after SIGTERM or SIGINT before they are killed."""
POLL_S = 0.2


def run(plan: Plan, restarts: int) -> int:
    """Run a plan, up to `restarts` times again after a rank was killed; returns the exit code."""
    if there := _send(plan, 0, ranks_only=False):
        raise ConfigError(
            f"{there} processes of another launch still train in {plan.folder.parent}; end that "
            "launch, or set run_dir to another folder"
        )
    with _signals() as received, _folder(plan):
        if plan.hosts:
            check_hosts(plan)
        while not received.seen:
            code = _attempt(plan, received)
            if code in FINAL or received.seen:
                return code
            if code == OutOfMemory.exit_code:
                _say("starting the ranks again with fewer crystals at a time")
            elif not restarts:
                return code
            else:
                _say(
                    f"the ranks ended with exit code {code}; on again from their newest checkpoint, {restarts} restarts left"
                )
                restarts -= 1
        return 128 + received.seen[-1]


class Received:
    """Signals that came and are not yet passed on, and all that ever came."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.seen: list[int] = []

    def take(self, number: int, _: object) -> None:
        self.pending.append(number)
        self.seen.append(number)


@contextmanager
def _signals() -> Iterator[Received]:
    received = Received()
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, received.take) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _folder(plan: Plan) -> Iterator[None]:
    """The launch folder, which holds what this launch needs, and is removed with it."""
    shutil.rmtree(plan.folder, ignore_errors=True)
    made = [folder for folder in (plan.folder, *plan.folder.parents) if not folder.exists()]
    plan.folder.mkdir(parents=True)
    plan.folder.chmod(0o700)
    try:
        if plan.hosts:
            (plan.folder / "run.yaml").write_text(plan.config_text)
            hand_over(plan.folder)
        yield
    finally:
        shutil.rmtree(plan.folder, ignore_errors=True)
        for folder in made[1:]:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def _attempt(plan: Plan, received: Received) -> int:
    """Start the ranks and wait for their end; returns the exit code that tells it."""
    verdict = plan.folder / EXIT_CODE
    verdict.unlink(missing_ok=True)
    # A session of its own: Ctrl-C in the terminal comes to this process alone, which passes it on.
    process = subprocess.Popen(plan.command, env=_environment(plan), start_new_session=True)
    try:
        code = _wait(plan, process, received)
    finally:
        if process.poll() is None or process.returncode:
            _end(plan, process)
    if not plan.hosts:  # torchrun makes 1 of every code, and DeepSpeed's launcher 0 of its own death by a signal
        code = int(verdict.read_text()) if verdict.exists() else code or 1
    return 128 + received.seen[-1] if received.seen and code not in FINAL else code


def _environment(plan: Plan) -> dict[str, str]:
    """What the launcher inherits: no rank of another job, and nothing that DeepSpeed would put on a command line."""
    hidden = ("MLFLOW_",) if plan.hosts else ()
    kept = {name: value for name, value in os.environ.items() if name not in PLACE and not name.startswith(hidden)}
    return kept | plan.environment


def _wait(plan: Plan, process: subprocess.Popen[bytes], received: Received) -> int:
    deadline = float("inf")
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            pass
        while received.pending:
            number = received.pending[0]
            found = _send(plan, number, ranks_only=True)
            if not found and number == signal.SIGUSR1:
                break  # no rank is there yet
            received.pending.pop(0)
            if number != signal.SIGUSR1:
                again, deadline = deadline < float("inf"), time.monotonic() + GRACE_S
                if again or not found:
                    deadline = 0.0
        if time.monotonic() > deadline:
            _end(plan, process)


def _send(plan: Plan, number: int, ranks_only: bool) -> int:
    """Signal ranks, or all processes of this launch, on all nodes; returns how many there were."""
    folder = str(plan.folder)
    if not plan.hosts:
        return send(folder, number, ranks_only)
    answers = in_parallel(
        lambda host: on_host(host, "send", folder=folder, number=int(number), ranks_only=ranks_only), plan.hosts
    )
    return sum(int(answer.stdout.split()[-1]) for answer in answers if not answer.returncode)


def _end(plan: Plan, process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of an attempt, everywhere."""
    _send(plan, signal.SIGKILL, ranks_only=False)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _say(text: str) -> None:
    print(f"dist-train: {text}", file=sys.stderr, flush=True)
