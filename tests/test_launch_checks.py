"""What `dist-train launch` refuses before anything starts: one line, exit code 2."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from launching import write_run

from dist_train.cli import main
from dist_train.commands import launch
from dist_train.commands.launch import deepspeed_command, read_hostfile
from dist_train.errors import ConfigError
from dist_train.node import free_port


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("checks"))


def refused(capsys: pytest.CaptureFixture[str], config: Path, *options: str) -> str:
    """The one line that a launch ends with."""
    assert main(["launch", "--config", str(config), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert not (config.parent / "whole").exists()
    return line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a slots=1\nb slots=x\n", "line 2: 'b slots=x' is not of the form 'HOST slots=RANKS'"),
        ("a\n", "line 1: 'a' is not of the form"),
        ("a slots=1 b slots=1\n", "line 1: 'a slots=1 b slots=1' is not of the form"),
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x slots=1' is not of the form"),
        ("n[1-2] slots=1\n", r"line 1: 'n\[1-2\] slots=1' is not of the form"),
        ("# two\n\na slots=0 # none\n", "line 3: a has 0 slots"),
        ("a slots=1\n\na slots=2\n", "line 3: a is listed twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_hostfile_is_refused_by_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"hostfile {path}(, |.*){told}"):
        read_hostfile(path)


def test_the_example_of_a_hostfile_is_read() -> None:
    assert read_hostfile(Path(__file__).parents[1] / "launch" / "hostfile.example") == {"node-1": 8, "node-2": 8}


def test_a_hostfile_that_is_missing_is_no_local_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, run_file, "--hostfile", "no/hosts")
    assert "hostfile no/hosts can't be read: No such file or directory; see launch/hostfile.example" in line


def test_ranks_that_do_not_share_the_batch(run_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=4\nb slots=1\n")
    for options in (["--ranks", "5"], ["--hostfile", str(hosts)], ["--slurm", "--nodes", "5"]):
        assert "train.global_batch_size 12 can't be divided among 5 ranks" in refused(capsys, run_file, *options)


def test_a_port_in_use(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(capsys, run_file, "--ranks", "2", "--port", str(port))
    assert f"port {port} for the training ranks can't be used: Address already in use; give another --port" in line


def test_options_that_contradict_each_other(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (["--ranks", "2", "--hostfile", "h"], "--hostfile gives the number of ranks itself"),
        (["--launcher", "torchrun", "--hostfile", "h"], "goes with --launcher deepspeed alone"),
        (["--nodes", "2"], "are for Slurm: add --slurm"),
        (["--ranks", "2", "--master-addr", "a"], "give their --hostfile"),
        (["--slurm", "--ranks", "2"], "give --nodes and --ranks-per-node"),
    ):
        assert told in refused(capsys, run_file, *options)


def test_programs_that_are_not_installed(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pdsh is not installed" in refused(capsys, run_file, "--hostfile", str(hosts))
    assert "sbatch is not on the PATH" in refused(capsys, run_file, "--slurm", "--nodes", "2")


def test_a_host_that_does_not_answer(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not (shutil.which("pdsh") and shutil.which("ssh")):
        pytest.skip("pdsh and openssh-client are not installed")
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", f"-F none -p {free_port()}")
    line = refused(capsys, run_file, "--hostfile", str(hosts))
    assert "localhost: ssh fails within 5 s or asks for a password (" in line
    assert "Connection refused" in line


@pytest.mark.parametrize("home", [True, False])
def test_secrets_that_deepspeed_would_show(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: bool
) -> None:
    hosts, tools = tmp_path / "hosts", tmp_path / "pdsh"
    hosts.write_text("localhost slots=2\n")
    tools.write_text("")
    tools.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path if home else tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nMLFLOW_TRACKING_PASSWORD=p\n")
    line = refused(capsys, run_file, "--hostfile", str(hosts))
    assert f"{tmp_path}/.deepspeed_env sets MLFLOW_TRACKING_PASSWORD" in line
    assert "export it where dist-train launch is started" in line


def test_a_folder_that_the_shell_of_pdsh_would_not_leave_alone(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    line = refused(capsys, run_file, "--hostfile", f"{tmp_path}/hosts", "--set", f"run_dir={tmp_path}/a;b")
    assert f"run_dir '{tmp_path}/a;b/.launch' has characters" in line


def test_gpus_are_neither_shared_nor_forgotten(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "gpus", lambda: 2)
    assert "--ranks 3 on a machine with 2 GPUs" in refused(capsys, run_file, "--ranks", "3", "--set", "train.unet_share=1.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert "--include localhost:3,5" in " ".join(deepspeed_command(2, 1234))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "--num_accelerators 2" in " ".join(deepspeed_command(2, 1234))
