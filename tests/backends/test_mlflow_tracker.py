"""MLflow for real, on a sqlite file: metrics, registry, and the served model that needs neither ray nor deepspeed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from processes import started, wait_until
from small_run import small_config, write_small_shards

from dist_train.backends import mlflow_tracker
from dist_train.backends.mlflow_registry import pull
from dist_train.backends.mlflow_tracker import MlflowUploader
from dist_train.cli import main
from dist_train.commands import registry
from dist_train.commands import training as commands
from dist_train.config import RunConfig
from dist_train.crystal.cif import parse_cif, write_cif
from dist_train.errors import ConfigError, ModelError
from dist_train.models.export import read_bundle
from dist_train.node import free_port
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader
from dist_train.training.tracker import Spool, read_spool

pytestmark = pytest.mark.filterwarnings("default")  # mlflow's own dependencies warn


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run trained in two parts, tracked and registered as champion."""
    folder = tmp_path_factory.mktemp("tracked")
    write_small_shards(folder)
    uri = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    config = small_config(folder, uri, "tracking.experiment=test", "tracking.gate.metric=val/loss")
    patch = pytest.MonkeyPatch()
    patch.setattr(mlflow_tracker, "SYSTEM_SECONDS", 0.1)  # this run is over before the usual first sample
    patch.setattr(mlflow_tracker, "UPLOAD_SECONDS", 0.1)
    commands.train(config.model_copy(update={"train": config.train.model_copy(update={"stop_after_step": 5})}))
    told = commands.train(config)
    patch.undo()
    assert "registered crystal-autoencoder version 1, alias candidate; it is champion now: val/loss " in told
    assert "version 1 is champion already" in registry.register(config.run_dir, "champion", "by the test")
    return config


def client(config: RunConfig) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(config.tracking.uri, config.tracking.uri)


def test_every_record_of_the_spool_is_in_mlflow_once(tracked: RunConfig) -> None:
    runs = client(tracked).search_runs([client(tracked).get_experiment_by_name("test").experiment_id])
    assert len(runs) == 1, "the resumed run goes on in the same MLflow run"
    run_id = runs[0].info.run_id
    assert run_id == (tracked.run_dir / "mlflow_run_id").read_text()
    history = client(tracked).get_metric_history(run_id, "train/loss")
    spooled = [r for r in read_spool(tracked.run_dir / "metrics.jsonl") if "train/loss" in r["metrics"]]
    assert [(m.step, m.value) for m in history] == [(r["step"], r["metrics"]["train/loss"]) for r in spooled]
    assert [m.step for m in history] == list(range(1, 13))


def test_run_holds_parameters_config_digest_system_metrics_and_pictures(tracked: RunConfig) -> None:
    run = client(tracked).get_run((tracked.run_dir / "mlflow_run_id").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.params["model.latent"] == "10"
    assert run.data.tags["data_digest"] == Index.read(tracked.data.shards).digest
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert "val/composition_exact" in run.data.metrics
    files = {f.path for folder in ("", "figures") for f in client(tracked).list_artifacts(run.info.run_id, folder)}
    assert {"run.yaml", "report.html", "figures/slices.png", "figures/loss_curves.png"} <= files


def test_pulled_bundle_is_the_trained_one(tracked: RunConfig, tmp_path: Path) -> None:
    assert tracked.tracking.uri
    bundle = pull(tracked.tracking.uri, "models:/crystal-autoencoder@champion", tmp_path)
    model, config = read_bundle(bundle)
    assert (bundle / "SHA256SUMS").read_bytes() == (tracked.run_dir / "bundle" / "SHA256SUMS").read_bytes()
    assert config["about"]["step"] == 12
    assert model.model.latent == 10


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models:/crystal-autoencoder@nobody", r"aliases candidate, champion and"),
        ("models:/crystal-autoencoder/9", r"versions 1"),
        ("models:/other@champion", "known: crystal-autoencoder"),
    ],
)
def test_unknown_models_are_refused_with_what_there_is(tracked: RunConfig, tmp_path: Path, name: str, told: str) -> None:
    assert tracked.tracking.uri
    with pytest.raises(ModelError, match=told):
        pull(tracked.tracking.uri, name, tmp_path)


PLAIN_CLIENT = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/crystal-autoencoder@champion")
out = model.predict(pandas.DataFrame({"cif": json.loads(sys.stdin.read())}))
assert not {"ray", "deepspeed"} & set(sys.modules), "a plain client must need neither"
print("RESULT" + out.to_json(orient="records"))
"""


def test_plain_mlflow_client_predicts_row_by_row(tracked: RunConfig) -> None:
    crystal = ShardReader(Index.read(tracked.data.shards), "test").crystal(0)
    rows = [write_cif(crystal), "not a cif", write_cif(crystal)]
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_CLIENT, str(tracked.tracking.uri)],
        input=json.dumps(rows), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    table = pd.DataFrame(json.loads(line.removeprefix("RESULT")))
    assert list(table.columns) == ["cif", "latent", "confidence", "error"]
    assert "not a CIF" in table.error[1]
    assert table.cif[1] == ""
    first, last = (json.loads(table.latent[row]) for row in (0, 2))
    assert first == pytest.approx(last, abs=1e-5)
    assert len(first) == 10
    for row in (0, 2):
        assert table.error[row] or len(parse_cif(table.cif[row], "x", 1000)) > 0


def test_a_server_that_is_away_neither_stops_nor_loses_anything(tmp_path: Path) -> None:
    """Nobody listens on the port: closing says so in seconds; a later start brings everything to the server once."""
    spool = Spool(tmp_path / "run" / "metrics.jsonl")
    for step in range(1, 4):
        spool.log(step, {"loss": 1.0 / step})
    spool.close()
    away = small_config(tmp_path, "tracking.uri=http://127.0.0.1:9")
    uploader = MlflowUploader(away, spool.path, {})
    assert uploader.close("FINISHED") is False
    back = small_config(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    for _ in range(2):  # the second upload sends everything again
        uploader = MlflowUploader(back, spool.path, {})
        assert uploader.close("FINISHED") is True
    history = client(back).get_metric_history(str(uploader.run_id), "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A real MLflow server on loopback, killed at the end."""
    options = {"backend-store-uri": f"sqlite:///{folder}/server.db", "artifacts-destination": str(folder)}
    options |= {"host": "127.0.0.1", "port": str(port), "workers": "1"}
    command = [sys.executable, "-m", "mlflow", "server", *(part for k, v in options.items() for part in (f"--{k}", v))]
    with started(command, MLFLOW_DISABLE_TELEMETRY="true") as process:

        def answers() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
            return False

        wait_until(answers, process)
        yield


@pytest.mark.timeout(180)
def test_a_server_killed_and_started_again_in_a_run_has_every_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "UPLOAD_SECONDS", 0.2)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config = small_config(tmp_path, f"tracking.uri={uri}", "tracking.experiment=outage")
    spool = Spool(config.run_dir / "metrics.jsonl")

    def steps() -> list[int]:
        return [m.step for m in there.get_metric_history((config.run_dir / "mlflow_run_id").read_text(), "train/loss")]

    there = mlflow.MlflowClient(uri, uri)
    with server(tmp_path, port):
        uploader = MlflowUploader(config, spool.path, {})
        for step in range(1, 31):
            spool.log(step, {"train/loss": float(step)})
        wait_until((config.run_dir / "mlflow_run_id").exists)
        wait_until(lambda: len(steps()) > 0)
    for step in range(31, 61):
        spool.log(step, {"train/loss": float(step)})
    time.sleep(1.0)  # some attempts fail
    with server(tmp_path, port):
        for step in range(61, 91):
            spool.log(step, {"train/loss": float(step)})
        spool.close()
        assert uploader.close("FINISHED")
        assert steps() == list(range(1, 91))


def test_untracked_or_unfinished_runs_are_not_registered(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no finished run"):
        registry.register(tmp_path, None)
    config = small_config(tmp_path)
    (config.run_dir / "bundle").mkdir(parents=True)
    (config.run_dir / "run.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match="not tracked"):
        registry.register(config.run_dir, None)


def test_a_damaged_bundle_never_becomes_champion(tracked: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tracked.run_dir, run)
    (run / "bundle" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="fetch the bundle again"):
        registry.register(run, "champion", "x")
    with pytest.raises(ConfigError, match="alias 'v7' can't be used"):
        registry.register(tracked.run_dir, "v7")
    assert len(client(tracked).search_model_versions("name = 'crystal-autoencoder'")) == 1


@pytest.mark.parametrize(("split", "told"), [("test", "None of the"), ("train", "WARNING: ")])
def test_evaluating_on_training_data_is_said_loudly(
    tracked: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, told: str
) -> None:
    shards, bundle = str(tracked.data.shards), str(tracked.run_dir / "bundle")
    where = ["--shards", shards, "--split", split, "--out", str(tmp_path), "--workers", "1", "--samples", "1"]
    assert main(["evaluate", "--model", bundle, *where]) == 0
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("uri", ["nonsense", "http://127.0.0.1:9", "foo://bar"])
def test_a_registry_that_is_none_is_one_message(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be used"):
        pull(uri, "models:/crystal-autoencoder@champion", tmp_path)
