"""What `dist-train launch` does on each node, its own included; over ssh: `python -m dist_train.node TASK ARGUMENTS`."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

GPUS = Path("/proc/driver/nvidia/gpus")


def check(paths: list[str], ranks: int, master: str, port: int | None, alone: bool) -> dict[str, Any]:
    """What is wrong with this node for a training, and which machine it is.

    Looks for paths, resolves the master's address and listens on a port (where it is the master). A GPU for each rank is
    wanted where there are any; without them gloo connects the nodes, by the address that a node's own name has there.
    """
    faults = [f"{path} is not there: put it at the same path on all nodes" for path in paths if not os.path.exists(path)]
    try:
        socket.getaddrinfo(master, None)
    except OSError as error:
        faults.append(f"the address {master} of rank 0 is unknown there ({error.strerror}): give --master-addr")
    if port is not None and (fault := port_fault(port)):
        faults.append(f"port {port} can't be used ({fault}): give another --port")
    gpus = len(list(GPUS.glob("*")))
    if 0 < gpus < ranks:
        faults.append(f"{ranks} slots on {gpus} GPUs: a rank needs a GPU of its own; lower its slots")
    if not (gpus or alone) and not os.environ.get("GLOO_SOCKET_IFNAME") and (address := _own_address()).startswith("127."):
        name = socket.gethostname()
        faults.append(f"its own name {name} is {address} there: set GLOO_SOCKET_IFNAME to the interface between nodes")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"faults": faults, "machine": f"{socket.gethostname()} {boot}"}


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"  # what gloo takes then


def port_fault(port: int) -> str | None:
    """Why this machine can't listen on a TCP port, or None."""
    with socket.socket() as probe:
        # As the ranks do: connections of a run that has just ended don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except (OSError, OverflowError) as error:
            return str(getattr(error, "strerror", None) or error)
    return None


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def send(folder: str, number: int, ranks_only: bool) -> int:
    """Signal the processes of a launch, known by its folder among their arguments; returns how many there were."""
    sent = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if folder in process.cmdline()[1:] and (not ranks_only or is_rank(process)):
                process.send_signal(number)
                sent += 1
    return sent


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank, not a launcher, which has no RANK, nor a worker that a rank forked."""
    parent = process.parent()
    return "RANK" in process.environ() and (parent is None or parent.cmdline() != process.cmdline())


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    print(json.dumps(check(**arguments) if sys.argv[1] == "check" else send(**arguments)))
