"""`dist-train launch`: the command that starts the ranks of a training, checked before it runs, or shown to be copied."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist_train.commands.training import check_training
from dist_train.config import RunConfig, load_config
from dist_train.errors import ConfigError, Interrupted
from dist_train.node import free_port, port_fault
from dist_train.ranks import CARRIED, ENVIRONMENT, EXIT_CODE

Launcher = Literal["deepspeed", "torchrun", "slurm"]
CONNECT_S = 5
"""Seconds within which a host must take an ssh connection."""
CHECK_S = 60
NODES_PORT = 29500
"""Where ranks on several nodes meet unless --port says otherwise; on one machine it is a free port."""
PDSH_SAFE = r"[\w@%+=:,./-]+"
SLURM_WARNING_S = 120


@dataclass(frozen=True)
class LaunchOptions:
    """What the user asked for."""

    config: Path | None
    overrides: tuple[str, ...]
    launcher: Launcher
    ranks: int | None
    hostfile: Path | None
    nodes: int | None
    ranks_per_node: int | None
    master_addr: str | None
    port: int | None


@dataclass(frozen=True)
class Plan:
    """How a training is started: a command, the variables that it gets, and what lies in its folder, below run_dir."""

    command: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    master: str
    port: int
    hosts: dict[str, int] = field(default_factory=dict)
    """Ranks of each host of a hostfile; empty for this machine."""
    paths: tuple[str, ...] = ()
    """What every host must have."""
    config_text: str = ""

    def shell(self) -> str:
        """The same for a terminal (bash): commands that can be pasted; values of variables that it inherits don't show."""
        folder = shlex.quote(str(self.folder))
        lines = [f"cd {shlex.quote(os.getcwd())} && rm -rf {folder} && mkdir -p {folder} || exit 2"]
        if self.hosts:
            lines += [
                f"trap 'rm -f {folder}/{ENVIRONMENT}' EXIT",
                f"(umask 077 && cat > {folder}/run.yaml && env -0 | grep -zE '{CARRIED}' > {folder}/{ENVIRONMENT}) <<'END'",
                f"{self.config_text}END",
                "unset ${!MLFLOW_@}  # DeepSpeed would put them on command lines; the ranks read them from that file",
            ]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return "\n".join(["(", *lines, shlex.join(self.command), ")"])


def make_plan(options: LaunchOptions) -> Plan:
    """The plan of a launch on this machine or the hosts of a file, after all checks that need no other machine."""
    config = load_config(options.config, options.overrides)
    _check_options(options)
    hosts = read_hostfile(options.hostfile) if options.hostfile else {}
    ranks = sum(hosts.values()) or options.ranks or max(1, gpus())
    check_training(config, ranks)
    folder = (config.run_dir / ".launch").absolute()
    if hosts:
        return _plan_of_nodes(options, config, folder, hosts)
    if 0 < gpus() < ranks:
        raise ConfigError(f"--ranks {ranks} on a machine with {gpus()} GPUs: a rank needs a GPU of its own; lower --ranks")
    port = free_port() if options.port is None else options.port
    if fault := port_fault(port):
        raise ConfigError(f"port {port} for the training ranks can't be used: {fault}; give another --port")
    settings = [part for item in options.overrides for part in ("--set", item)]
    chosen = ["--config", str(options.config)] if options.config else []
    train = ["train", *chosen, *settings, "--launch-dir", str(folder)]
    command = torchrun_command(ranks, port) if options.launcher == "torchrun" else deepspeed_command(ranks, port)
    return Plan((*command, *train), rank_environment(ranks), folder, "127.0.0.1", port)


def _check_options(options: LaunchOptions) -> None:
    if options.hostfile and (options.ranks or options.launcher != "deepspeed"):
        raise ConfigError("--hostfile gives the number of ranks itself, and goes with --launcher deepspeed alone")
    if options.nodes or options.ranks_per_node:
        raise ConfigError("--nodes and --ranks-per-node are for Slurm: add --slurm, or give --ranks or --hostfile")
    if options.master_addr and not options.hostfile:
        raise ConfigError("--master-addr is for several nodes: give their --hostfile")


def deepspeed_command(ranks: int, port: int) -> list[str]:
    """The start of the command line of ranks on this machine, to be followed by a verb."""
    chosen = ["--num_accelerators", str(ranks)]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) and gpus():
        # The launcher would forget them and take the first GPUs of the machine.
        chosen = ["--include", f"localhost:{','.join(visible.split(',')[:ranks])}"]
    return [
        str(Path(sys.executable).with_name("deepspeed")), "--quiet", *chosen, "--master_port", str(port),
        "--no_local_rank", "--module", "dist_train",
    ]  # fmt: skip


def torchrun_command(ranks: int, port: int) -> list[str]:
    """The same for torchrun."""
    return [
        str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1",
        "--master-port", str(port), "-m", "dist_train",
    ]  # fmt: skip


def rank_environment(ranks: int) -> dict[str, str]:
    """Variables for ranks on this machine, where the user hasn't set them: the cores shared out, no GPU where none is."""
    wanted = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    if not gpus():
        wanted["DS_ACCELERATOR"] = "cpu"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def gpus() -> int:
    """GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()


# Several nodes


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks of each host, in the order of the file. Raises ConfigError naming the line that can't be used."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"hostfile {path} can't be read: {reason}; see launch/hostfile.example") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s+slots=(\d+)", text, re.ASCII)
        if not found:
            raise ConfigError(f"hostfile {path}, line {number}: {text!r} is not of the form 'HOST slots=RANKS'; mend it")
        host, slots = found[1], int(found[2])
        if not slots:
            raise ConfigError(f"hostfile {path}, line {number}: {host} has 0 slots; give it at least 1 or remove the line")
        if host in hosts:
            raise ConfigError(f"hostfile {path}, line {number}: {host} is listed twice; add its slots up in one line")
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"hostfile {path} names no host; give it lines such as 'node-1 slots=8'")
    return hosts


def _plan_of_nodes(options: LaunchOptions, config: RunConfig, folder: Path, hosts: dict[str, int]) -> Plan:
    assert options.hostfile
    if not shutil.which("pdsh"):
        raise ConfigError("pdsh is not installed: DeepSpeed starts the ranks of a --hostfile with it; install that package")
    for what, value in (("the working folder", os.getcwd()), ("run_dir", str(folder)), ("Python", sys.executable)):
        if not re.fullmatch(PDSH_SAFE, value):
            raise ConfigError(f"{what} {value!r} has characters that pdsh's shell takes for its own; rename the folder")
    _check_env_files()
    master, port = options.master_addr or next(iter(hosts)), NODES_PORT if options.port is None else options.port
    command = (
        str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--hostfile", str(options.hostfile.absolute()),
        # One host alone may be another machine, too. The launcher's check of ssh knows no options of ssh: ours does.
        "--force_multi", "--no_ssh_check", "--master_addr", master, "--master_port", str(port), "--no_local_rank",
        # All settings in one file: pdsh's shell would read what is special to it in --set.
        "--module", "dist_train", "train", "--config", f"{folder}/run.yaml", "--launch-dir", str(folder),
    )  # fmt: skip
    ssh = {name: os.environ[name] for name in ("PDSH_SSH_ARGS_APPEND",) if name in os.environ}
    needed = (Path.cwd(), config.data.shards, config.engine.deepspeed_json, folder / "run.yaml")
    paths = tuple(str(path.absolute()) for path in needed if isinstance(path, Path))  # shards may be a URL
    return Plan(command, ssh, folder, master, port, hosts, paths, config.to_yaml())


def _check_env_files() -> None:
    """Refuse secrets in DeepSpeed's own files of variables: it puts these on command lines."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path.cwd() / name):
        for line in path.read_text().splitlines() if path.is_file() else ():
            variable = line.partition("=")[0].strip()
            if re.search("PASSWORD|TOKEN|SECRET|CREDENTIAL|ACCESS_KEY", variable, re.I):
                raise ConfigError(
                    f"{path} sets {variable}, which all users of the nodes would see in ps; remove it there "
                    "and export it where dist-train launch is started"
                )


def on_host(host: str, task: str, **arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a task of `dist_train.node` on a host, with the options of ssh that pdsh gets."""
    python_path = ":".join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    remote = ["env", f"PYTHONPATH={python_path}"]
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        remote.append(f"GLOO_SOCKET_IFNAME={interface}")
    remote += [sys.executable, "-m", "dist_train.node", task, json.dumps(arguments)]
    more = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", *more, host, shlex.join(remote)]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_S)
    except FileNotFoundError:
        raise ConfigError("ssh is not installed; install the package openssh-client") from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 255, "", f"no answer in {CHECK_S} s")


def check_hosts(plan: Plan) -> None:
    """Raise ConfigError, naming every host that ssh can't reach or that lacks something."""
    first, alone = next(iter(plan.hosts)), len(plan.hosts) == 1

    def check(host: str) -> subprocess.CompletedProcess[str]:
        port, ranks = plan.port if host == first else None, plan.hosts[host]
        return on_host(host, "check", paths=plan.paths, ranks=ranks, master=plan.master, port=port, alone=alone)

    faults, machines = [], dict[str, str]()
    for host, answer in zip(plan.hosts, in_parallel(check, plan.hosts), strict=True):
        if answer.returncode:
            faults.append(f"{host}: {_ssh_fault(answer)}")
            continue
        found = json.loads(answer.stdout.splitlines()[-1])
        faults += [f"{host}: {fault}" for fault in found["faults"]]
        if (other := machines.setdefault(found["machine"], host)) != host:
            faults.append(f"{other} and {host} are one machine, {found['machine'].split()[0]}: keep one of them")
    if faults:
        raise ConfigError(f"the hosts can't be used: {'; '.join(faults)}")


def in_parallel(
    task: Callable[[str], subprocess.CompletedProcess[str]], hosts: Iterable[str]
) -> list[subprocess.CompletedProcess[str]]:
    """What a task gives for each host, 32 at a time."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(task, hosts))


def _ssh_fault(answer: subprocess.CompletedProcess[str]) -> str:
    told = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    if answer.returncode == 255:
        return f"ssh fails within {CONNECT_S} s or asks for a password ({told}); mend it, or set PDSH_SSH_ARGS_APPEND"
    return f"{sys.executable} doesn't run dist_train there ({told}); install it at the same path"


# Slurm


def slurm_script(options: LaunchOptions) -> str:
    """A batch script for sbatch that runs the ranks as tasks of one step, checked as far as can be before it runs."""
    if options.ranks or options.hostfile or options.master_addr or options.port is not None:
        raise ConfigError("Slurm takes no --ranks, --hostfile, --master-addr or --port: give --nodes and --ranks-per-node")
    nodes, share = options.nodes or 1, options.ranks_per_node or 1
    check_training(load_config(options.config, options.overrides), nodes * share)
    settings = [part for item in options.overrides for part in ("--set", item)]
    chosen = ["--config", str(options.config)] if options.config else []
    train = shlex.join([sys.executable, "-m", "dist_train", "train", *chosen, *settings])
    cpu, requeue = os.environ.get("DS_ACCELERATOR") == "cpu", Interrupted.exit_code
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=dist-train",
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --ntasks-per-node={share}",
        *([] if cpu else [f"#SBATCH --gpus-per-node={share}"]),
        f"#SBATCH --signal=USR1@{SLURM_WARNING_S}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "# More options, as time limit and partition: to sbatch itself, or as SBATCH_TIMELIMIT, SBATCH_PARTITION.",
        f"cd {shlex.quote(os.getcwd())} || exit 2",
        *(["export DS_ACCELERATOR=cpu"] if cpu else []),
        f"srun --kill-on-bad-exit=1 {train}",
        "code=$?",
        f"# The ranks get SIGUSR1 {SLURM_WARNING_S} s before the time limit, save a checkpoint and leave with {requeue}.",
        f'if [ "$code" -eq {requeue} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def submit(script: str) -> str:
    """Hand a batch script to Slurm; returns its answer."""
    if not shutil.which("sbatch"):
        raise ConfigError("sbatch is not on the PATH: start this on a machine of the Slurm cluster, or add --print")
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch refuses the job: {done.stderr.strip()}; SBATCH_* variables hold its options")
    return done.stdout.strip()


def print_of(plan: Plan) -> str:
    """What --print shows."""
    where = ", ".join(plan.hosts) or "this machine"
    return f"# For bash: ranks on {where}. Rank 0 leaves its exit code in {plan.folder / EXIT_CODE}.\n{plan.shell()}"
