"""What `dist-train launch` asks each node."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dist_train import node


def faults(**changes: object) -> list[str]:
    asked = {"paths": [str(Path.cwd())], "ranks": 8, "master": "127.0.0.1", "port": None, "alone": True}
    return list(node.check(**(asked | changes))["faults"])  # type: ignore[arg-type]


def test_a_node_with_all_it_needs_has_no_fault() -> None:
    assert faults() == []


def test_each_fault_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = faults(paths=[f"{tmp_path}/none"], master="no-such-host.invalid", port=port)
    assert len(found) == 3
    assert found[0] == f"{tmp_path}/none is not there: put it at the same path on all nodes"
    assert found[1].startswith("the address no-such-host.invalid of rank 0 is unknown there")
    assert found[2] == f"port {port} can't be used (Address already in use): give another --port"


@pytest.mark.parametrize(("gpus", "told"), [(0, False), (4, True), (8, False)])
def test_ranks_need_a_gpu_each_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, told: bool
) -> None:
    for number in range(gpus):
        (tmp_path / str(number)).mkdir()
    monkeypatch.setattr(node, "GPUS", tmp_path)
    assert faults() == (["8 slots on 4 GPUs: a rank needs a GPU of its own; lower its slots"] if told else [])


@pytest.mark.parametrize(
    ("address", "interface", "alone", "told"),
    [("127.0.1.1", "", False, True), ("127.0.1.1", "eth0", False, False), ("127.0.1.1", "", True, False),
     ("10.0.0.1", "", False, False)],
)  # fmt: skip
def test_gloo_needs_an_address_that_others_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, interface: str, alone: bool, told: bool
) -> None:
    monkeypatch.setattr(node, "GPUS", tmp_path)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    found = faults(alone=alone)
    assert [fault.split(": ")[1] for fault in found] == ["set GLOO_SOCKET_IFNAME to the interface between nodes"] * told
