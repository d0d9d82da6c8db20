"""Two nodes on one machine: network, process and mount namespaces with an sshd each, on a bridge in a namespace too.

All of it hangs on one process, `unshare`: when that is killed, or the tests that started it are, the kernel ends all that
runs in its process namespace, and with it the network. Nothing outside is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

TOOLS = {
    "pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client", "ip": "iproute2", "unshare": "util-linux",
    "nsenter": "util-linux", "setpriv": "util-linux",
}  # fmt: skip
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PRIVATE = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
START = r"""
set -eu
cd "$1"
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount --bind hosts /etc/hosts
ip link set lo up
ip link add nodes type bridge && ip addr add 10.77.0.254/24 dev nodes && ip link set nodes up
for i in 1 2; do
    unshare --uts "${@:2}" bash -eu node.sh $i 2> sshd_$i.log &
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
    ip link add node$i type veth peer name eth0 netns $!
    ip link set node$i master nodes up
done
for i in 1 2; do
    until ssh -F ssh_config node-$i true 2> ssh_$i.log; do sleep 0.1; done
done
echo ready
read -r _
"""
NODE = r"""
hostname node-$1
[ $1 = 1 ] || mount -t tmpfs tmpfs only_on_node_1
until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
ip addr add 10.77.0.$1/24 dev eth0
ip link set lo up
ip link set eth0 up
exec $(command -v sshd) -D -e -f sshd_config
"""
SSHD = """HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
SSH = """Host *
User root
IdentityFile {folder}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
HOSTS = """127.0.0.1 localhost
10.77.0.1 node-1 also-node-1
10.77.0.2 node-2
"""


def missing() -> str:
    """Why two nodes can't be had here, or ''."""
    lacking = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=SEARCHED)})
    if lacking:
        return f"packages that two nodes need are not installed: {', '.join(lacking)}"
    if os.geteuid() != 0:
        return "two nodes need root, for network namespaces"
    done = subprocess.run(["unshare", *PRIVATE, "ip", "link"], capture_output=True, text=True, timeout=20)
    return f"two nodes need namespaces, which are not allowed here: {done.stderr.strip()}" if done.returncode else ""


@dataclass
class TwoHosts:
    """The running nodes node-1 and node-2, which share all folders but `only_on_node_1`."""

    folder: Path
    inside: int
    """Process in whose namespaces the commands run: a third machine of the network."""

    @property
    def ssh_options(self) -> str:
        return f"-F {self.folder}/ssh_config"

    def command(self, *words: str) -> list[str]:
        """A command line that runs another on the third machine."""
        return ["nsenter", "--target", str(self.inside), "--net", "--mount", "--pid", f"--wd={os.getcwd()}", "--", *words]

    def processes(self) -> Iterator[psutil.Process]:
        """All that runs on the three machines."""
        yield from psutil.Process(self.inside).children(recursive=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """The nodes, their files in `folder`; gone at the end."""
    (folder / "only_on_node_1").mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True, timeout=20)
    for name, text in (("node.sh", NODE), ("sshd_config", SSHD), ("ssh_config", SSH), ("hosts", HOSTS)):
        (folder / name).write_text(text.format(folder=folder) if name.endswith("config") else text)
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        *PRIVATE,
        "bash",
        "-c",
        START,
        "two_hosts",
        str(folder),
        *PRIVATE,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PATH": SEARCHED},
    )  # fmt: skip
    assert process.stdout and process.stderr
    try:
        if process.stdout.readline() != "ready\n":
            raise AssertionError(f"two nodes don't start: {process.stderr.read()}")
        (inside,) = psutil.Process(process.pid).children()
        yield TwoHosts(folder, inside.pid)
    finally:
        process.kill()
        process.communicate(timeout=20)
