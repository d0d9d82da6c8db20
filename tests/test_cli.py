"""The command line as a user meets it: help that is there at once, and errors of one line that say what to do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from sharding import few_rows, write_shards

from dist_train.config import DataConfig, GridSpec, RunConfig, load_config
from dist_train.files import sha256
from dist_train.shards.index import Index

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data" / "sample"
VERBS = (
    "demo", "config", "voxelize", "verify", "inspect", "plan", "train", "report", "launch", "register", "registry",
    "release", "fit-properties", "evaluate", "generate", "embed", "nearest", "score", "bench",
)  # fmt: skip
LIMIT_S = 60
TRAINING_CRYSTALS = 8


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`dist-train ARGUMENTS`, ended with all its descendants when it takes too long."""
    hidden = {"MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "RAY_ADDRESS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "dist_train", *arguments]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            root = psutil.Process(process.pid)
            for running in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    running.kill()
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a run that has to have failed as a user's error does: code 2, one such line, no traceback."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("dist-train: error:")]
    assert len(lines) == 1, done.stderr
    return done.stderr[done.stderr.index(lines[0]) + len("dist-train: error: ") :].rstrip()


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


# Help


def test_the_console_script_answers() -> None:
    script = Path(sys.executable).with_name("dist-train")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(re.search(rf"^    {verb}\s", done.stdout, re.MULTILINE) for verb in VERBS)


def test_help_of_every_verb_imports_no_engine() -> None:
    script = f"""
import sys
from dist_train.cli import main
for arguments in ([], *([verb] for verb in {VERBS})):
    try:
        main([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0, arguments
    else:
        raise AssertionError(arguments)
heavy = {{"ray", "deepspeed", "mlflow", "torch", "pymatgen", "scipy", "pydantic", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage: ") == 1 + len(VERBS)
    assert all(f" {verb} [-h]" in done.stdout for verb in VERBS)


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("dist-train ")


def test_a_verb_that_is_none_and_an_option_that_is_none() -> None:
    for arguments in ((), ("trian",), ("train", "--confg", "x.yaml")):
        done = run(*arguments)
        assert done.returncode == 2
        assert "usage: dist-train" in done.stderr
        assert "Traceback" not in done.stderr


# Run files


@pytest.mark.parametrize("name", ["demo", "families"])
def test_config_prints_what_it_reads_back(name: str, tmp_path: Path) -> None:
    done = run("config", "--config", str(ROOT / "launch" / "runs" / f"{name}.yaml"), *sets("seed=7"))
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    printed = load_config(tmp_path / "printed.yaml")
    assert printed == load_config(ROOT / "launch" / "runs" / f"{name}.yaml", ("seed=7",))
    assert printed.seed == 7


def test_config_without_a_file_prints_the_defaults(tmp_path: Path) -> None:
    done = run("config")
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "printed.yaml") == RunConfig()


def test_missing_config_file(tmp_path: Path) -> None:
    message = error_of(run("voxelize", "--config", str(tmp_path / "no.yaml")))
    assert message == (
        f"config {tmp_path / 'no.yaml'} can't be read: No such file or directory; give --config an existing YAML file"
    )


def test_unknown_key_is_named_with_its_likely_meaning(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("grid: {shpe: 16}\n")
    assert error_of(run("config", "--config", str(path))) == (
        f"{path} can't be used:\n  grid.shpe = 16: unknown key; did you mean 'shape'?"
    )


def test_override_without_value() -> None:
    assert "write --set section.key=value" in error_of(run("config", *sets("seed")))


# Voxelising


def test_no_crystals_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    message = error_of(run("voxelize", *sets(f"data.inputs=[{tmp_path}/in]", f"data.shards={tmp_path}/out")))
    assert message.startswith(f"no crystals found in {tmp_path}/in: expected CIF")
    assert not (tmp_path / "out").exists()


def test_missing_input(tmp_path: Path) -> None:
    message = error_of(run("voxelize", *sets(f"data.inputs=[{tmp_path}/in]", f"data.shards={tmp_path}/out")))
    assert message.startswith(f"input {tmp_path}/in is neither a folder")


def test_output_folder_that_holds_other_things(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    inputs = SAMPLE / "cifs" / "perov_5"
    message = error_of(run("voxelize", *sets(f"data.inputs=[{inputs}]", f"data.shards={tmp_path}")))
    assert message.startswith(f"output folder {tmp_path} is not empty")
    assert contents(tmp_path).keys() == {"letter.txt"}


@pytest.mark.parametrize(
    "verb",
    [
        ("evaluate", "--data", "data/sample/perov_5.parquet", "--model"),
        ("generate", "sample", "-n", "100000", "--model"),
        ("score", "data/sample/perov_5.parquet", "--reference"),
        ("fit-properties", "--data", "data/sample/perov_5.parquet", "--property", "volume_per_atom", "--model"),
    ],
)
def test_output_that_cant_be_written_is_told_before_the_work(verb: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    message = error_of(run(*verb, "data/models/perov_5", "--out", str(tmp_path / "letter" / "out")))
    assert message == f"{tmp_path / 'letter'}: Not a directory; mend that or choose another folder"
    assert contents(tmp_path).keys() == {"letter"}


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A few real perovskites as shards of three splits, written without Ray."""
    folder = tmp_path_factory.mktemp("few")
    table = few_rows(SAMPLE / "perov_5.parquet", TRAINING_CRYSTALS + 2, folder)
    ids = pq.read_table(table)["id"].to_pylist()
    listed = {}
    for split, id in (("val", ids[-2]), ("test", ids[-1])):
        listed[split] = folder / f"{split}.txt"
        listed[split].write_text(f"{id}\n")
    data = DataConfig(inputs=(table,), shards=folder / "shards", splits={"train": 1.0}, split_ids=listed)
    return write_shards(data, GridSpec(shape=16, max_spacing_A=0.5))


@pytest.fixture
def of_shards(shards: Index) -> list[str]:
    """The settings of a run on them."""
    return [f"data.shards={shards.root}", "grid.shape=16", "grid.max_spacing_A=0.5", "engine.name=torch"]


def damaged(shards: Index, folder: Path) -> tuple[Path, str]:
    """A copy without its validation shard, and with one bit of a sample of the training shard changed; its key."""
    shutil.copytree(shards.root, folder)
    (folder / "val-000000.tar").unlink()
    (train,) = (shard for shard in shards.shards if shard.split == "train")
    offset, _ = train.samples[3].members["species.npy"]
    raw = bytearray((folder / train.name).read_bytes())
    raw[offset + 200] ^= 1
    (folder / train.name).write_bytes(raw)
    return folder, train.samples[3].key


def test_verify_tells_whole_and_damaged_shards_and_samples(shards: Index, tmp_path: Path) -> None:
    done = run("verify", str(shards.root))
    assert done.returncode == 0
    assert done.stdout == f"3 shards, {TRAINING_CRYSTALS + 2} samples: all as the index says\n"
    copy, key = damaged(shards, tmp_path / "copy")
    for more in ((), ("--quick",)):
        told = error_of(run("verify", str(copy), *more))
        assert told.startswith(f"2 of 3 shards of {copy} are damaged:\n  train-000000.tar: sha256 differs\n")
        assert (f"  train-000000.tar {key}: crc32" in told) == (not more)
        assert "  val-000000.tar: missing\n" in told
        assert f"dist-train verify {copy} --repair" in told
    assert contents(copy).keys() == contents(shards.root).keys() - {"val-000000.tar"}


def test_damaged_shards_are_moved_aside(shards: Index, tmp_path: Path) -> None:
    copy, _ = damaged(shards, tmp_path / "copy")
    assert f"1 moved to {copy}/quarantined" in error_of(run("verify", str(copy), "--quarantine"))
    assert (copy / "quarantined" / "train-000000.tar").is_file()
    assert not (copy / "train-000000.tar").exists()


def test_inspect_shows_numbers_and_a_picture(shards: Index, tmp_path: Path) -> None:
    sample = shards.shards[0].samples[1]
    picture = tmp_path / "new" / "picture.png"
    shown = {name: run("inspect", str(shards.root), name, "--out", str(picture)) for name in (sample.key, sample.id)}
    assert {done.returncode for done in shown.values()} == {0}
    text = shown[sample.key].stdout
    assert text == shown[sample.id].stdout
    assert text.startswith(f"{sample.key}, copy 0 of {sample.id}, in {shards.root}/train-000000.tar (train)\n")
    assert "16 x 16 x 16 voxels" in text
    assert "exact: all 5 atoms" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_names_what_is_close_to_an_unknown_sample(shards: Index, tmp_path: Path) -> None:
    id = shards.shards[0].samples[0].id
    message = error_of(run("inspect", str(shards.root), f"{id}x", "--out", str(tmp_path / "p.png")))
    assert message.startswith(f"no sample of {shards.root} has the key or id '{id}x'; close to it: ")
    assert id in message
    assert not list(tmp_path.iterdir())


def test_verify_without_shards(tmp_path: Path) -> None:
    assert "holds no finished shards; run dist-train voxelize" in error_of(run("verify", str(tmp_path)))


# Training


def test_training_without_shards(tmp_path: Path) -> None:
    message = error_of(run("train", *sets(f"data.shards={tmp_path}/none", f"run_dir={tmp_path}/run")))
    assert message == (
        f"{tmp_path}/none/index.json does not exist: {tmp_path}/none holds no finished shards; run dist-train voxelize"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_whose_bundle_would_replace_something_else_does_not_begin(of_shards: list[str], tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    message = error_of(run("train", *sets(*of_shards, f"run_dir={tmp_path}")))
    assert "holds 'notes.txt', which is of no bundle and would be lost" in message
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_too_few_crystals_for_a_global_batch(of_shards: list[str], tmp_path: Path) -> None:
    message = error_of(run("train", *sets(*of_shards, f"run_dir={tmp_path}/run", "train.global_batch_size=16")))
    assert message == (
        f"the training split has {TRAINING_CRYSTALS} samples of 1 grid shapes, 0 of them in groups of 16 of one shape, "
        "fewer than train.global_batch_size 16; lower it or voxelise more crystals"
    )
    assert not (tmp_path / "run").exists()


def test_shards_of_another_grid(of_shards: list[str], tmp_path: Path) -> None:
    message = error_of(run("train", *sets(*of_shards, f"run_dir={tmp_path}/run", "grid.shape=32")))
    assert "have another grid: shape is 16 there, 32 here" in message


def test_run_folder_that_holds_another_run(of_shards: list[str], tmp_path: Path) -> None:
    settings = [*of_shards, f"run_dir={tmp_path}", "train.global_batch_size=4"]
    (tmp_path / "run.yaml").write_text(load_config(None, (*settings, "seed=1")).to_yaml())
    before = contents(tmp_path)
    message = error_of(run("train", *sets(*settings, "seed=2")))
    assert message == f"{tmp_path} holds another run: its seed was 1, now 2; set run_dir to a new folder"
    assert contents(tmp_path) == before


# Models


def test_folder_that_is_no_bundle(shards: Index, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    options = ("--model", str(tmp_path / "model"), "--shards", str(shards.root), "--out", str(tmp_path / "out"))
    message = error_of(run("evaluate", *options))
    assert message == f"{tmp_path / 'model'} is no model bundle: it has no SHA256SUMS"
    assert not (tmp_path / "out").exists()


def test_registry_name_without_a_registry(shards: Index, tmp_path: Path) -> None:
    model, out = "models:/crystal-autoencoder@champion", str(tmp_path / "out")
    message = error_of(run("evaluate", "--model", model, "--shards", str(shards.root), "--out", out))
    assert message == f"{model} is in a registry: give --tracking-uri or set MLFLOW_TRACKING_URI"


# Demo


@pytest.fixture(params=["127.0.0.1", "0.0.0.0"])
def taken_port(request: pytest.FixtureRequest) -> Iterator[int]:
    with socket.socket() as server:
        server.bind((request.param, 0))
        server.listen()
        yield int(server.getsockname()[1])


def demo(out: Path, *more: str) -> Sequence[str]:
    return ("demo", "--out", str(out), *more)


def test_demo_on_a_port_in_use(taken_port: int, tmp_path: Path) -> None:
    message = error_of(run(*demo(tmp_path / "out", "--port", str(taken_port))))
    assert message == f"port {taken_port} for the training ranks can't be used: Address already in use; set --port 0"
    assert not (tmp_path / "out").exists()


def test_demo_leaves_a_folder_of_other_things_alone(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "letter.txt").write_text("dear")
    message = error_of(run(*demo(tmp_path)))
    assert message == f"{tmp_path} is not empty and holds no demo; set --out to another folder"
    assert (tmp_path / "below" / "letter.txt").read_text() == "dear"
    assert contents(tmp_path).keys() == {"below/letter.txt"}


def test_demo_elsewhere_than_in_the_clone(tmp_path: Path) -> None:
    message = error_of(run(*demo(tmp_path / "out"), cwd=tmp_path))
    assert message.startswith(f"the demo reads data/sample: run it in {ROOT}")
    assert not (tmp_path / "out").exists()


def test_an_ended_demo_takes_its_stage_with_it(tmp_path: Path) -> None:
    """SIGTERM, as a scheduler or a time limit sends it: the stage has its own process group and must not live on."""
    command = [sys.executable, "-m", "dist_train", "demo", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout
        while "$ dist-train voxelize" not in process.stdout.readline():
            assert process.poll() is None
        deadline = time.monotonic() + LIMIT_S
        while not (stages := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)  # the stage is up and at work
        process.terminate()
        assert process.wait(LIMIT_S) == 143
        gone, alive = psutil.wait_procs(stages, timeout=LIMIT_S)
        assert (len(gone), alive) == (1, [])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
