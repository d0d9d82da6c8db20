"""Embedding on real Ray actors: the rows of one process, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from processes import ISOLATED, LIMIT_S, commands, contents, kill_session, small_disk, started, wait_until

from dist_train.commands.embed import EmbedOptions, embed
from dist_train.errors import DataError
from dist_train.latents import ABOUT_NAME

pytestmark = pytest.mark.usefixtures("no_foreign_cluster")
ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data" / "models" / "perov_5")
ROWS, PART_ROWS = 480, 16

SCENARIOS = """
import os
import ray
from dist_train.backends.ray_embed import on_ray
from dist_train.errors import DistTrainError, ModelError

def poisoned():
    return lambda part: os.kill(os.getpid(), 9) if part == 2 else os.getpid()

def broken():
    raise ModelError("no such model")

def dying():
    os.kill(os.getpid(), 9)

context = ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
ray.shutdown = lambda: None  # the cluster is for all of them
ray.init = lambda **_: None
for name, work in ("poisoned", poisoned), ("broken", broken), ("dying", dying):
    done = {}
    try:
        done.update(on_ray(work, [*range(8)], 2, None))
    except DistTrainError as error:
        print(name, type(error).__name__, error)
    print(name, len(done), len(set(done.values())))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Perovskites, an empty file, and a link to a folder, which isn't followed."""
    folder = tmp_path_factory.mktemp("inputs")
    pq.write_table(pq.read_table(ROOT / "data" / "sample" / "perov_5.parquet").slice(0, ROWS), folder / "table.parquet")
    (folder / "link").symlink_to(ROOT / "data" / "sample" / "cifs")
    (folder / "empty.cif").write_text("")
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this process makes of them without Ray."""
    out = tmp_path_factory.mktemp("alone") / "latents"
    embed(EmbedOptions(MODEL, None, [str(inputs)], out, workers=0, decode=False, part_rows=PART_ROWS))
    return out


def job(inputs: Path, out: Path, workers: int) -> list[str]:
    options = ["--model", MODEL, "--input", str(inputs), "--output", str(out), "--workers", str(workers)]
    return [sys.executable, "-m", "dist_train", "embed", *options, "--no-decode", "--part-rows", str(PART_ROWS)]


def busy(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Actors in the middle of a part."""
    return [found for found, command in commands(process.pid) if command.startswith("ray::_Actor.do")]


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def test_the_part_of_a_killed_actor_is_made_by_another(inputs: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with started(job(inputs, out, workers=2)) as process:
        wait_until(lambda: len(parts(out)) >= 2, process)
        actor = wait_until(lambda: busy(process), process)[0]
        actor.kill()
        assert len(parts(out)) < len(parts(alone))
        output, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, errors
    assert f"{ROWS + 2} rows in {len(parts(alone))} parts: {ROWS} with a latent of 256, 2 without" in output
    assert "1 x parse: empty file" in output and "1 x parse: a link to a folder isn't followed" in output
    assert "crystals/s" in output
    assert contents(out) == contents(alone)


def test_a_killed_job_goes_on_where_it_was(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """Killed with its two actors, and taken up by one process without Ray."""
    out = tmp_path / "latents"
    with started(job(inputs, out, workers=2)) as process:
        wait_until(lambda: len(parts(out)) >= 3, process)
        kill_session(process)
    before = {path: path.stat().st_mtime_ns for path in parts(out)}
    assert 3 <= len(before) < len(parts(alone))
    assert json.loads((out / ABOUT_NAME).read_text())["counts"] is None
    (out / ".part-00000.parquet.left.tmp").write_text("left behind")
    done = subprocess.run(job(inputs, out, workers=0), capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert "this run: 0 rows" not in done.stdout and "nothing was missing" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(out) == contents(alone)


def test_what_ends_actors_again_and_again_is_told() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCENARIOS], capture_output=True, text=True, timeout=LIMIT_S,
        env=os.environ | ISOLATED,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("poisoned", "broken", "dying"))]
    poisoned, before, broken, _, dying, none = told
    assert poisoned.startswith("poisoned DistTrainError the actor of 2 was lost 3 times"), poisoned
    assert 1 <= int(before.split()[1]) <= 7, "the other parts, which come before it is tried again"
    assert broken == "broken ModelError no such model"
    assert dying.startswith("dying DistTrainError an actor before it was ready was lost 3 times"), dying
    assert none == "dying 0 0"


def test_a_full_disk_is_told_and_the_job_goes_on_when_there_is_room(inputs: Path, alone: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, "100k") as disk:
        out = disk / "latents"
        options = EmbedOptions(MODEL, None, [str(inputs)], out, workers=0, decode=False, part_rows=PART_ROWS)
        with pytest.raises(DataError, match=f"the disk of {out} is full; free space and run the same command again"):
            embed(options)
        before = parts(out)
        assert 0 < len(before) < len(parts(alone)) and not list(out.glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True, timeout=30)
        embed(options)
        assert contents(out) == contents(alone)
