"""`dist-train demo`: the main job end to end, each stage the very command that a user would type, timed and measured."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dist_train.commands.launch import deepspeed_command, gpus, rank_environment
from dist_train.config import RunConfig, load_config
from dist_train.errors import ConfigError, DistTrainError
from dist_train.files import write_text
from dist_train.node import free_port, port_fault
from dist_train.shards.index import Index
from dist_train.tables import metrics_table

ROOT = Path(__file__).parents[1]
RANKS = 2
MEMORY_SECONDS = 1.0
MARKER = "demo.json"
DEFAULT_OUT = Path("runs/demo")


@dataclass
class Stage:
    """A finished stage: wall seconds and the largest memory of all its processes together (PSS, MiB)."""

    name: str
    seconds: float
    peak_MiB: float


@dataclass
class Demo:
    """The folder of a demo, the run files it uses and what its stages took."""

    out: Path
    port: int
    overrides: list[str]
    stages: list[Stage] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.out}/mlflow.db"

    def config(self, name: str) -> list[str]:
        """--config and --set options of a shipped run file; its outputs are moved where `out` isn't the file's own."""
        moved = {
            "families": [f"data.shards={self.out}/shards/families"],
            "demo": [f"data.shards={self.out}/shards/perov_5", f"run_dir={self.out}/train", f"tracking.uri={self.uri}"],
        }[name]
        settings = [*([] if self.out == DEFAULT_OUT else moved), *(self.overrides if name == "demo" else [])]
        return ["--config", str(run_file(name)), *(part for item in settings for part in ("--set", item))]

    def run(self, title: str, command: list[str], where: str) -> None:
        """Run a stage's command. Raises DistTrainError where it fails."""
        print(f"\n=== {len(self.stages) + 1}. {title}\n    $ {_shown(command)}", flush=True)
        began = time.perf_counter()
        code, peak = _run_measured(command)
        stage = Stage(title, time.perf_counter() - began, peak)
        if code:
            raise DistTrainError(f"stage {title!r} failed with exit code {code}; its message is above")
        self.stages.append(stage)
        print(f"    {stage.seconds:.0f} s, peak memory {stage.peak_MiB:.0f} MiB; output: {where}", flush=True)


def run_file(name: str) -> Path:
    """A run file shipped in launch/runs."""
    return ROOT / "launch" / "runs" / f"{name}.yaml"


def run_demo(out: Path, port: int, epochs: int | None) -> str:
    """Run all stages; returns the closing summary. Raises ConfigError before the first stage where something is missing."""
    for needed in (run_file("demo"), run_file("families"), ROOT / "data" / "sample"):
        if not needed.exists():
            raise ConfigError(f"{needed} is missing: the demo runs from a clone of the project, installed with make demo")
    if Path.cwd() != ROOT:
        raise ConfigError(f"the demo reads data/sample: run it in {ROOT}, not in {Path.cwd()}")
    demo = Demo(out, port or free_port(), [] if epochs is None else [f"train.epochs={epochs}"])
    config = load_config(run_file("demo"), tuple(demo.overrides))
    if fault := port_fault(demo.port):
        raise ConfigError(f"port {demo.port} for the training ranks can't be used: {fault}; set --port 0")
    _clear(out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended too
    began = time.perf_counter()
    _stages(demo, config)
    return _closing(demo, time.perf_counter() - began)


def _stages(demo: Demo, config: RunConfig) -> None:
    cli = [sys.executable, "-m", "dist_train"]
    out = demo.out
    launcher = [*deepspeed_command(_ranks(config), demo.port), "train", *demo.config("demo")]
    demo.run(
        "Ray voxelises CIF files and Materials Project cells of all families, on adaptive grids",
        [*cli, "voxelize", *demo.config("families")], f"{out}/shards/families",
    )  # fmt: skip
    demo.run(
        "Ray voxelises perovskites (Perov-5) for training",
        [*cli, "voxelize", *demo.config("demo")], f"{out}/shards/perov_5",
    )  # fmt: skip
    crystals = len(Index.read(out / "shards" / "perov_5").samples("train"))
    halfway = config.train.epochs * (crystals // config.train.global_batch_size) // 2
    demo.run(
        f"DeepSpeed trains VAE and attention U-Net on {_ranks(config)} ranks, and is stopped halfway",
        [*launcher, "--set", f"train.stop_after_step={max(halfway, 1)}"], f"{out}/train/checkpoints",
    )  # fmt: skip
    demo.run("the same command goes on from the checkpoint to the end", launcher, f"{out}/train")
    demo.run(
        "MLflow registered the model, which becomes champion",
        [*cli, "register", f"{out}/train", "--alias", "champion", "--reason", "first of this registry"], f"{out}/mlflow.db",
    )  # fmt: skip
    evaluate = [*cli, "evaluate", "--model", "models:/crystal-autoencoder@champion", "--tracking-uri", demo.uri]
    demo.run(
        "a fresh process pulls the champion and reconstructs held-out perovskites, moved at random; samples, interpolates",
        [*evaluate, "--shards", f"{out}/shards/perov_5", "--move", "1", "--out", f"{out}/results", "--record"],
        f"{out}/results/report.html",
    )  # fmt: skip
    demo.run(
        "the same on held-out crystals of all families, of which it has seen perovskites only",
        [*evaluate, "--shards", f"{out}/shards/families", "--out", f"{out}/results_families", "--steps", "0", "--record"],
        f"{out}/results_families/report.html",
    )  # fmt: skip


def _closing(demo: Demo, seconds: float) -> str:
    metrics = json.loads((demo.out / "results" / "metrics.json").read_text())
    families = json.loads((demo.out / "results_families" / "metrics.json").read_text())
    stages = [{"stage": s.name, "seconds": round(s.seconds, 1), "peak_MiB": round(s.peak_MiB)} for s in demo.stages]
    document = {**metrics, "families": families, "seconds": round(seconds, 1), "stages": stages}
    write_text(demo.out / "metrics.json", json.dumps(document, indent=1) + "\n")
    report = demo.out / "results" / "report.html"
    return (
        f"\n=== Perovskites (Perov-5) that the model was not trained on\n{metrics_table(metrics)}\n"
        f"  {metrics['samples_structurally_valid']} of {metrics['n_samples']} samples are structurally valid crystals, "
        f"of {metrics['samples_distinct_compositions']} compositions\n"
        f"\n=== All families, trained on perovskites only; cells that its grid can't hold are misses\n"
        f"{metrics_table(families)}\n"
        f"\n{seconds / 60:.1f} minutes; figures: {demo.out}/metrics.json; report to open in a browser: {report}\n"
        f"runs and models: mlflow ui --backend-store-uri {demo.uri}"
    )


def _ranks(config: RunConfig) -> int:
    """One rank a GPU (as many as share the global batch evenly), two where there is none."""
    ranks = gpus() or RANKS
    while config.train.global_batch_size % ranks:
        ranks -= 1
    return ranks


def _clear(out: Path) -> None:
    """Remove an earlier demo; anything else in the folder is left alone and refused."""
    if out.exists() and not (out / MARKER).exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty and holds no demo; set --out to another folder")
    shutil.rmtree(out, ignore_errors=True)
    write_text(out / MARKER, json.dumps({"started": time.time()}) + "\n")


def _shown(command: list[str]) -> str:
    text = shlex.join(command).replace(f"{sys.executable} -m dist_train", "dist-train")
    return text.replace(f"{Path(sys.executable).parent}/", "").replace(f"{ROOT}/", "")


def _run_measured(command: list[str]) -> tuple[int, float]:
    """(exit code, peak MiB) of a command in a process group of its own, which is ended with it."""
    process = subprocess.Popen(command, env={**os.environ, **rank_environment(RANKS)}, start_new_session=True)
    peak, done = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, done), daemon=True)
    watcher.start()
    try:
        return process.wait(), peak[0]
    finally:
        if process.poll() is None:  # an interruption: the stage's own children must not live on
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        done.set()
        watcher.join()


def _watch_memory(pid: int, peak: list[float], done: threading.Event) -> None:
    while not done.wait(MEMORY_SECONDS):
        total = 0.0
        try:
            for process in [(root := psutil.Process(pid)), *root.children(recursive=True)]:
                total += process.memory_full_info().pss / 2**20
        except psutil.Error:
            continue
        peak[0] = max(peak[0], total)
