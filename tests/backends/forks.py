"""Trainings of several real processes, started at a fraction of the cost: this process imports all that they need, once, and
forks them. One JSON request a line on stdin, one answer a line on stdout; see `Request`."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_train.node import free_port

END_SECONDS = 1.0
"""What a launcher gives the other ranks after one has ended badly."""


@dataclass(frozen=True)
class Request:
    """A launch. arguments: of dist-train; folder: of the ranks' outputs, rank_N.txt.

    signals: [rank, number, step]: sent to a rank as soon as `spool` has a record of the step, a random moment later.
    patches: [rank, 'module:name', call, what]: at that call of a function, from 1, the rank kills itself ('kill'), sleeps
    ('hang'), runs out of memory ('memory'), has nothing but nan in its tensor arguments
    ('nan'), or only says that it was called ('note') or what its engine holds ('bytes', see `bytes_held`).
    """

    ranks: int
    arguments: list[str]
    folder: str
    spool: str = ""
    signals: list[tuple[int, int, int]] = field(default_factory=list)
    patches: list[tuple[int, str, int, str]] = field(default_factory=list)
    limit: float = 60.0


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch imports its compiler for that
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

    import dist_train.backends.deepspeed_engine
    import dist_train.cli
    import dist_train.commands.training

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(launch(Request(**json.loads(line)), dist_train.cli.main)), flush=True)


def launch(request: Request, run: Callable[[list[str]], int]) -> list[int]:
    """The exit codes of the ranks, negative for a signal."""
    port = free_port()
    pids = {rank: fork(request, rank, port, run) for rank in range(request.ranks)}
    codes: dict[int, int] = {}
    left, deadline = list(request.signals), time.monotonic() + request.limit
    while len(codes) < len(pids):
        for rank, pid in pids.items():
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + END_SECONDS)
        for sent in [s for s in left if s[2] <= last_step(request.spool)]:
            left.remove(sent)
            time.sleep(random.random() * 0.05)
            if sent[0] not in codes:
                os.kill(pids[sent[0]], sent[1])
        if time.monotonic() > deadline:
            for rank in pids.keys() - codes.keys():
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.002)
    return [codes[rank] for rank in sorted(codes)]


def last_step(spool: str) -> int:
    """The step of the last record; -1 where there is no spool."""
    path = Path(spool)
    lines = path.read_bytes().splitlines() if spool and path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=-1)


def fork(request: Request, rank: int, port: int, run: Callable[[list[str]], int]) -> int:
    """The process id of a rank."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        out = os.open(Path(request.folder) / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(request.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for _, place, call, what in (patch for patch in request.patches if patch[0] == rank):
            patch(place, call, what)
        code = run(request.arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def patch(place: str, call: int, what: str) -> None:
    """Make a call of a function go wrong."""
    module_name, _, name = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, last), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and what == "nan":
            arguments = tuple(a * float("nan") if isinstance(a, torch.Tensor) else a for a in arguments)
        elif calls == call and what == "note":
            print(f"called {last}")
        elif calls == call and what == "bytes":
            print(json.dumps({"bytes": bytes_held(arguments[0])}))
        elif calls == call:
            go_wrong(what)
        return function(*arguments, **options)

    setattr(owner, last, wrapped)


def bytes_held(engine: Any) -> dict[str, int]:
    """Bytes of a DeepSpeedEngine's buckets, and of all else that it keeps or has the gradients in, each storage once."""
    zero, seen = engine.engine.optimizer, set[int]()
    buckets = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    states = [list(engine.objective.parameters()), engine.optimizer.param_groups, list(engine.optimizer.state.values())]
    others = [engine.average.values, vars(zero) if engine.stage else None]
    return {
        name: sum(tensor.untyped_storage().nbytes() for tensor in tensors(held, seen))
        for name, held in (("buckets", buckets), ("states", [states, others]))
    }


def tensors(holder: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors below an object, one for each storage that isn't in `seen`."""
    if not isinstance(holder, torch.Tensor | dict | list | tuple):
        return
    address = holder.untyped_storage().data_ptr() if isinstance(holder, torch.Tensor) else id(holder)
    if isinstance(holder, torch.Tensor):
        if address not in seen:
            yield holder
        below = [getattr(holder, name, None) for name in ("grad", "grad_accum", "ds_tensor") if holder.is_leaf]
    else:
        below = [] if address in seen else list(holder.values() if isinstance(holder, dict) else holder)
    seen.add(address)
    for item in below:
        yield from tensors(item, seen)


def go_wrong(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(3600)
    else:
        raise torch.OutOfMemoryError("a GPU with too little memory")


def encode(request: Request) -> str:
    return json.dumps(asdict(request))


if __name__ == "__main__":
    main()
