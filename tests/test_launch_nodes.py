"""`dist-train launch` over two real nodes: DeepSpeed's launcher, pdsh and ssh between network namespaces."""

from __future__ import annotations

import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launching import (
    LIMIT_S,
    SLOWED,
    assert_same_training,
    errors,
    finished,
    launch_command,
    members,
    rank_at_step,
    started,
    wait_until,
)
from two_hosts import TwoHosts, missing, two_hosts

SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "secret-1", "MLFLOW_TRACKING_PASSWORD": "secret-2", "MLFLOW_TRACKING_TOKEN": "secret-3",
    "MLFLOW_TRACKING_URI": "http://user:secret-4@host", "AWS_ACCESS_KEY_ID": "secret-5", "AWS_SECRET_ACCESS_KEY": "secret-6",
    "AWS_SESSION_TOKEN": "secret-7", "RAY_AUTH_TOKEN": "secret-8",
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as nodes:
        yield nodes


def hostfile(hosts: TwoHosts, *names: str) -> str:
    path = hosts.folder / "hostfile"
    path.write_text("# two nodes\n" + "".join(f"{name} slots=1\n" for name in names))
    return str(path)


def command_lines() -> str:
    """The command lines of all processes of this machine, those in its namespaces included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has just ended
    return "\n".join(found)


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has asked for its exit code doesn't."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def pending(process: psutil.Process) -> set[int]:
    """Signals that wait for a stopped process."""
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
    return {bit + 1 for mask in masks for bit in range(64) if int(mask, 16) >> bit & 1}


@pytest.mark.timeout(3 * LIMIT_S)
def test_two_nodes_stop_on_a_signal_go_on_after_a_kill_and_tell_no_secret(
    hosts: TwoHosts, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--hostfile", hostfile(hosts, "node-1", "node-2"), "--restarts", "1")
    command = hosts.command(*launch_command(undisturbed_run, *options, run_dir=run, **SLOWED))
    environment = {"PDSH_SSH_ARGS_APPEND": hosts.ssh_options, **SECRETS}

    with started(command, **environment) as process:
        rank_at_step(run, 4, process, hosts.processes).suspend()  # the other rank waits for it
        ranks = {rank: found for found, rank in members(run, hosts.processes).items() if rank is not None}
        assert ranks.keys() == {0, 1}
        ranks[0].suspend()
        handed_over = run / ".launch" / "environment"
        assert stat.S_IMODE(handed_over.stat().st_mode) == 0o600
        carried = set(SECRETS.values()) - {"secret-8"}
        assert all(value in handed_over.read_text() for value in carried)
        assert str(handed_over.parent) in command_lines()
        assert "secret-" not in command_lines()
        (launcher,) = psutil.Process(process.pid).children()
        launcher.send_signal(signal.SIGTERM)
        wait_until(lambda: all(signal.SIGTERM in pending(rank) for rank in ranks.values()), process)
        for rank in ranks.values():
            rank.resume()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 85, err
        assert len([line for line in err.splitlines() if "asked to stop" in line]) == 1
        assert "on again from their newest checkpoint" not in err
        assert not members(run, hosts.processes)
        assert not handed_over.exists()

    recorded = (run / "metrics.jsonl").stat().st_size
    with started(command, **environment) as process:
        rank_1 = rank_at_step(run, 4, process, hosts.processes)  # of the first start
        wait_until(lambda: (run / "metrics.jsonl").stat().st_size > recorded, process)
        rank_1.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert "on again from their newest checkpoint" in err
    assert "12 steps done" in out
    assert not members(run, hosts.processes)
    assert_same_training(undisturbed_run.parent / "whole", run)


@pytest.mark.timeout(2 * LIMIT_S)
def test_hosts_that_can_not_be_used_are_told_at_once_and_by_name(hosts: TwoHosts, undisturbed_run: Path) -> None:
    run = hosts.folder / "only_on_node_1" / "run"
    options = ("--hostfile", hostfile(hosts, "node-1", "node-2", "also-node-1", "10.77.0.9"), "--port", "22")
    command = launch_command(undisturbed_run, *options, run_dir=run, train__global_batch_size=16, train__unet_share=1.0)
    done = finished(hosts.command(*command), PDSH_SSH_ARGS_APPEND=hosts.ssh_options)
    assert done.returncode == 2
    (line,) = errors(done)
    assert "node-1: port 22 can't be used (Address already in use): give another --port" in line
    assert f"node-2: {run}/.launch/run.yaml is not there" in line
    assert "node-1 and also-node-1 are one machine, node-1" in line
    assert "10.77.0.9: ssh fails within 5 s" in line
    assert not run.exists()


@pytest.mark.timeout(2 * LIMIT_S)
def test_the_printed_command_of_several_hosts_runs_when_it_is_pasted(
    hosts: TwoHosts, undisturbed_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--hostfile", hostfile(hosts, "node-2"), "--print")
    wanted = launch_command(undisturbed_run, *options, run_dir=run, train__stop_after_step=1)
    environment = {"PDSH_SSH_ARGS_APPEND": hosts.ssh_options, **SECRETS}
    shown = finished(wanted, **environment)
    assert shown.returncode == 0, shown.stderr
    assert "secret-" not in shown.stdout
    assert not run.exists()
    done = finished(hosts.command("bash", "-c", shown.stdout), **environment)
    assert done.returncode == 0, done.stderr
    assert "node-2: stopped after step 1" in done.stdout
    assert not (run / ".launch" / "environment").exists()


@pytest.mark.timeout(60)
def test_the_nodes_are_gone_when_the_tests_are_killed(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    script = (
        "import pathlib, signal, sys, two_hosts\n"
        "with two_hosts.two_hosts(pathlib.Path(sys.argv[1])) as hosts:\n"
        "    print(*(p.pid for p in hosts.processes()), flush=True)\n"
        "    signal.pause()\n"  # not at the end of a standard input: there may be none from the start
    )
    with started([sys.executable, "-c", script, str(tmp_path)], PYTHONPATH=str(Path(__file__).parent)) as process:
        assert process.stdout
        processes = []
        for word in process.stdout.readline().split():
            with suppress(psutil.NoSuchProcess):  # the end of the connection that looked whether sshd is there
                processes.append(psutil.Process(int(word)))
        assert len(processes) >= 4
        process.kill()
        deadline = time.monotonic() + 20
        while any(alive(process) for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
