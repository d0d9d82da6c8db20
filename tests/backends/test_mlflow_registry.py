"""The model registry for real: versions, champion and previous, a server with passwords, and a model served over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import s3fs
from processes import started, wait_until
from s3_server import s3_server
from small_run import small_config, write_small_shards

from dist_train.backends import mlflow_registry
from dist_train.backends.mlflow_registry import Registry, pull
from dist_train.backends.mlflow_tracker import connect
from dist_train.cli import main
from dist_train.commands.embed import EmbedOptions, embed
from dist_train.commands.registry import register
from dist_train.commands.training import build_model
from dist_train.config import RunConfig
from dist_train.crystal.cif import write_cif
from dist_train.errors import ConfigError, DataError, ModelError
from dist_train.files import sha256
from dist_train.latents import read_about
from dist_train.models import export
from dist_train.models.export import WEIGHTS_NAME, read_bundle, write_bundle
from dist_train.node import free_port, port_fault
from dist_train.serving import MAX_ROWS, Params
from dist_train.shards.index import Index
from dist_train.shards.reader import ShardReader

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]  # mlflow's own dependencies warn
NAME = "crystal-autoencoder"


@dataclass
class Place:
    """A folder with shards, and a registry; runs finish in it without training."""

    folder: Path
    uri: str
    gate: tuple[str, ...] = ("tracking.gate.metric=val/loss", "tracking.gate.better=lower", "tracking.gate.margin=0.1")

    def run(self, name: str, metrics: dict[str, float], evaluation: str = "same", **about: Any) -> Path:
        """The folder of a finished run: a bundle of random weights with such metrics of its last validation."""
        paths = (f"run_dir={self.folder}/{name}", f"tracking.uri={self.uri}")
        config = small_config(self.folder, *paths, *self.gate)
        return finished(config, {"metrics": metrics, "evaluation_digest": evaluation, **about})

    def registry(self) -> Registry:
        return Registry(self.uri, NAME)

    def aliases(self) -> dict[str, int]:
        return {alias: version.number for version in self.registry().versions() for alias in version.aliases}

    def cli(self, *arguments: str) -> int:
        return main(["registry", *arguments, "--tracking-uri", self.uri])


def finished(config: RunConfig, about: dict[str, Any]) -> Path:
    index = Index.read(config.data.shards)
    model = build_model(config, index, ShardReader(index, "train"))
    config.run_dir.mkdir()
    (config.run_dir / "run.yaml").write_text(config.to_yaml())
    whole = {
        "step": 1, "data_digest": index.digest, "data_counts": index.counts, "git_commit": "abc", "environment": {},
        "run": config.model_dump(mode="json"),
    }  # fmt: skip
    write_bundle(config.run_dir / "bundle", model, model.state_dict(), whole | about)
    (config.run_dir / "figures").mkdir()
    (config.run_dir / "figures" / "slices.png").write_bytes(b"picture")
    assert config.tracking.uri
    run = connect(config.tracking.uri).create_run("0")
    (config.run_dir / "mlflow_run_id").write_text(run.info.run_id)
    return config.run_dir


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_small_shards(folder)
    return folder / "shards"


@pytest.fixture
def place(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)  # where MLflow's default experiment keeps its files
    (tmp_path / "shards").symlink_to(shards)
    return Place(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def test_champion_moves_by_the_gate_and_by_hand_and_back(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it is champion now: val/loss 1, and there was no champion" in register(place.run("a", {"val/loss": 1.0}))
    assert place.aliases() == {"candidate": 1, "champion": 1}
    told = register(place.run("b", {"val/loss": 0.95}))
    assert "the champion stays: val/loss 0.95 is not lower than the champion's 1 by more than 0.1" in told
    assert place.aliases() == {"candidate": 2, "champion": 1}
    assert "other data" in register(place.run("c", {"val/loss": 0.5}, "other"))
    assert "has no finite val/loss" in register(place.run("d", {"val/loss": float("nan")}))
    assert "it is champion now" in register(place.run("e", {"val/loss": 0.5}))
    assert place.aliases() == {"candidate": 5, "champion": 5, "previous": 1}

    assert "version 5 is this model already" in register(place.folder / "e")
    assert len(place.registry().versions()) == 5

    assert place.cli("promote", "2", "--reason", "a better look") == 0
    assert place.aliases() == {"candidate": 5, "champion": 2, "previous": 5}
    assert place.cli("promote", "2", "--reason", "again") == 0
    assert place.aliases() == {"candidate": 5, "champion": 2, "previous": 5}
    assert place.cli("rollback", "--reason", "it was not") == 0
    assert place.aliases() == {"candidate": 5, "champion": 5, "previous": 2}
    assert place.cli("promote", "--reason", "the newest") == 0  # the candidate
    capsys.readouterr()
    assert place.cli("list") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["5", "4", "3", "2", "1"]
    assert "candidate, champion" in lines[1]
    assert "loss 0.95" in lines[4]
    assert re.search(r"version 2 became champion \S+ \S+ UTC, by hand: a better look", shown)
    assert re.search(r"version 5 became champion \S+ \S+ UTC, by hand: it was not", shown)
    assert re.search(r"version 5 became champion \S+ \S+ UTC, by the gate: val/loss 0.5", shown), "an earlier reason is kept"
    assert re.search(r"version 1 became champion \S+ \S+ UTC, by the gate: val/loss 1,", shown)


def test_a_table_of_latents_stays_with_the_version_that_an_alias_stood_for(place: Place) -> None:
    register(place.run("a", {"val/loss": 1.0}))
    register(place.run("b", {"val/loss": 0.5}))
    assert place.aliases()["champion"] == 2
    out = place.folder / "latents"
    job = EmbedOptions(
        f"models:/{NAME}@champion", place.uri, [str(place.folder / "shards")], out, 0, None, False, part_rows=30
    )
    embed(job)
    about = read_about(out)
    assert about and about.counts and about.counts["rows"] == about.units and about.counts["embedded"] > 30
    assert (about.model, about.resolved) == (job.model, f"models:/{NAME}/2")
    assert about.bundle_sha256 == sha256(place.folder / "b" / "bundle" / export.SUMS_NAME)
    place.cli("rollback", "--reason", "to see what happens")
    (out / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match="holds the latents of another job"):
        embed(job)
    assert "this run: 30 rows" in embed(replace(job, model=f"models:/{NAME}/2"))


def test_without_a_gate_the_champion_moves_by_hand_alone(place: Place) -> None:
    place.gate = ()
    run = place.run("a", {"val/loss": 1.0})
    assert register(run) == f"registered {NAME} version 1, alias candidate"
    assert place.aliases() == {"candidate": 1}
    for alias, reason in (("champion", None), (None, "why"), ("other", "why")):
        with pytest.raises(ConfigError, match="go together"):
            register(run, alias, reason)
    with pytest.raises(ConfigError, match="move it"):
        register(run, "previous")
    register(run, "best-of-may")
    register(run, "champion", "first")
    assert place.aliases() == {"best-of-may": 1, "candidate": 1, "champion": 1}


def test_a_version_holds_all_that_tells_where_it_comes_from(place: Place, tmp_path: Path) -> None:
    run = place.run("a", {"val/loss": 1.0}, environment={"python": "3.11", "torch": "2"})
    register(run)
    version = place.registry().version("candidate")
    index = Index.read(tmp_path / "shards")
    assert version.run_id == (run / "mlflow_run_id").read_text()
    assert version.tags["data_digest"] == index.digest
    assert version.tags["git_commit"] == "abc"
    assert json.loads(version.tags["metrics"]) == {"val/loss": 1.0}
    assert json.loads(version.tags["environment"]) == {"python": "3.11", "torch": "2"}
    connect(place.uri)
    files = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", dst_path=str(tmp_path / "there")))
    held = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    bundle = {f"artifacts/bundle/{name}" for name in ("model.safetensors", "config.json", "SHA256SUMS")}
    extras = {"artifacts/model_card.md", "artifacts/figures/slices.png", "input_example.json", "requirements.txt"}
    assert held >= bundle | extras
    card = (files / "artifacts" / "model_card.md").read_text()
    for told in (index.digest, "abc", "val/loss | 1", "torch 2", "## Use"):
        assert told in card
    described = connect(place.uri).get_model_version(NAME, "1").description
    assert described == card
    info = mlflow.models.get_model_info(f"models:/{NAME}/1")
    assert [column.name for column in info.signature.inputs] == ["cif", "latent"]
    assert [param.name for param in info.signature.params] == [*Params.model_fields]


def test_what_is_found_of_a_version_is_recorded_below_its_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("a", {"val/loss": 1.0})
    register(run)
    model = ["--model", f"models:/{NAME}@candidate", "--tracking-uri", place.uri, "--workers", "1", "--record"]
    client, out = connect(place.uri), place.folder / "out"
    shards = ["--shards", str(place.folder / "shards"), "--split", "val", "--samples", "2", "--steps", "0"]
    for verb, files in (
        (["evaluate", *shards], {"metrics.json", "report.html", "crystals.csv"}),
        (
            ["generate", "sample", "-n", "3"],
            {"metrics.json", "report.html", "crystals.csv", "crystals.zip", "crystals.extxyz"},
        ),
    ):
        assert main([*verb, *model, "--out", str(out / verb[0])]) == 0
        told = capsys.readouterr().out
        found = re.search(rf"recorded in MLflow as run (\w+), below the run of models:/{NAME}/1$", told, re.M)
        assert found, told
        child = client.get_run(found[1])
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == (run / "mlflow_run_id").read_text()
        assert {file.path for file in client.list_artifacts(found[1])} == files
        metrics = json.loads((out / verb[0] / "metrics.json").read_text())
        assert child.data.params["model.name"] == f"models:/{NAME}/1"
        assert child.data.params["model.bundle_sha256"] == metrics["model"]["bundle_sha256"]
        wanted = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "seed"}
        assert child.data.metrics.items() >= wanted.items()
        assert wanted


def test_a_record_has_its_place_before_the_work(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(place.run("a", {"val/loss": 1.0}) / "bundle")
    sample = ["generate", "sample", "--out", str(place.folder / "out"), "--record", "--model"]
    assert main([*sample, bundle]) == 2
    assert f"{bundle} isn't" in error_of(capsys)
    register(place.folder / "a")
    assert main([*sample, f"models:/{NAME}@nobody", "--tracking-uri", place.uri]) == 2
    assert "no version or alias 'nobody'" in error_of(capsys)
    assert not (place.folder / "out").exists()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("dist-train: error: ")]
    assert len(lines) == 1, told
    assert "Traceback" not in told
    return lines[0]


def test_what_is_asked_wrongly_is_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.run("a", {"val/loss": 1.0})
    assert place.cli("list") == 2
    assert f"has no model '{NAME}'; known: none" in error_of(capsys)
    register(run)
    there = "it has the aliases candidate, champion and the versions 1"
    for arguments, told in (
        (("rollback", "--reason", "x"), f"has no version or alias 'previous'; {there}"),
        (("promote", "7", "--reason", "x"), f"has no version or alias '7'; {there}"),
        (("promote", "1", "--reason", " "), "--reason is empty"),
        (("list", "--name", "other"), f"has no model 'other'; known: {NAME}"),
    ):
        assert place.cli(*arguments) == 2
        assert told in error_of(capsys)
    evaluate = ["generate", "sample", "--out", str(place.folder / "out"), "--tracking-uri", place.uri]
    assert main([*evaluate, "--model", f"models:/{NAME}@nobody"]) == 2
    assert f"alias 'nobody'; {there}" in error_of(capsys)
    secret = f"http://user:{'secret'}@127.0.0.1:9"
    assert main(["registry", "list", "--tracking-uri", secret]) == 2
    told = error_of(capsys)
    assert "holds a password" in told
    assert "secret" not in told
    with pytest.raises(ConfigError, match="holds a password") as error:
        small_config(place.folder, f"tracking.uri={secret}")
    assert "secret" not in str(error.value)


def test_a_damaged_or_newer_bundle_is_refused_when_it_is_pulled(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(place.run("a", {"val/loss": 1.0}))
    (kept,) = tmp_path.rglob("artifacts/bundle/model.safetensors")
    bytes_ = bytearray(kept.read_bytes())
    bytes_[-1] ^= 1
    kept.write_bytes(bytes_)
    with pytest.raises(ModelError, match=r"model.safetensors is missing or differs from SHA256SUMS"):
        pull(place.uri, f"models:/{NAME}@champion", tmp_path / "pulled")
    run = place.run("b", {"val/loss": 0.1})
    register(run)
    newest = export.FORMAT_VERSION
    monkeypatch.setattr(export, "FORMAT_VERSION", 0)  # as a program from before this format
    with pytest.raises(ModelError, match=f"has format {newest}, this program reads up to 0: update it"):
        read_bundle(pull(place.uri, f"models:/{NAME}@candidate", tmp_path / "newer"))


def test_a_mistyped_database_is_told_and_not_made(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.uri = f"sqlite:///{place.folder}/elsewhere/other.db"
    assert place.cli("list") == 2
    assert "elsewhere/other.db is no database: there is no such file" in error_of(capsys)
    assert not (place.folder / "elsewhere").exists()


@contextmanager
def serving(command: list[str], url: str, **environment: str) -> Iterator[None]:
    """A server process that answers at a URL, ended with all that it started."""

    def answers() -> bool:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}  # nobody reads its pipes
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow looks for uvicorn by name there
    with started([sys.executable, "-m", "mlflow", *command], **quiet, PATH=path, **environment) as process:
        wait_until(answers, process)
        yield


def server_command(folder: Path, port: int, *more: str) -> list[str]:
    return kept_in(f"sqlite:///{folder}/server.db", f"{folder}/store", port, *more)


def kept_in(database: str, store: str, port: int, *more: str) -> list[str]:
    """The command of an MLflow server with its runs in a database and its artifacts in a store."""
    where = f"--backend-store-uri {database} --artifacts-destination {store}"
    return [*f"server {where} --host 127.0.0.1 --port {port} --workers 1 --uvicorn-opts=--log-level=warning".split(), *more]


def predict(port: int, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request to a served model."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_model_of_a_server_is_served_over_http(place: Place) -> None:
    """Registry, artifacts and the served model, each in a process of its own; requests as any client makes them."""
    store, port = free_port(), free_port()
    place.uri = f"http://127.0.0.1:{store}"
    crystal = ShardReader(Index.read(place.folder / "shards"), "test").crystal(0)
    cif = write_cif(crystal)
    model = ["models", "serve", "--model-uri", f"models:/{NAME}@champion", "--env-manager", "local"]
    with serving(server_command(place.folder, store), f"{place.uri}/health"):
        assert "it is champion now" in register(place.run("a", {"val/loss": 1.0}))
        command = [*model, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        with serving(command, f"http://127.0.0.1:{port}/ping", MLFLOW_TRACKING_URI=place.uri):
            check_served(port, cif)


def check_served(port: int, cif: str) -> None:
    def rows(table: dict[str, list[Any]], **params: Any) -> list[dict[str, Any]]:
        content = {"columns": list(table), "data": [list(row) for row in zip(*table.values(), strict=True)]}
        status, found = predict(port, {"dataframe_split": content, "params": params})
        assert status == 200, found
        return list(found["predictions"])

    reconstructed = rows({"cif": [cif, "nonsense", cif, 5, None]})
    assert [bool(row["latent"]) for row in reconstructed] == [True, False, True, False, False]
    assert "row 1" in reconstructed[1]["error"]
    encoded = rows({"cif": [cif]}, task="encode")
    assert json.loads(encoded[0]["latent"]) == pytest.approx(json.loads(reconstructed[0]["latent"]), abs=1e-5)
    decoded = rows({"latent": [encoded[0]["latent"], "[]"]}, task="decode")
    assert "row 1" in decoded[1]["error"]
    assert bool(decoded[0]["cif"]) != bool(decoded[0]["error"])
    assert len(rows({"cif": []}, task="sample", n=3, seed=5)) == 3
    assert len(rows({"cif": [cif, cif]}, task="interpolate", steps=4)) == 4
    assert len(rows({"cif": [cif, None]}, task="alter", n=2, radius=0.1)) == 4
    for params, told in (
        ({"task": "dream"}, "task 'dream' is unknown"),
        ({"task": "sample", "n": MAX_ROWS + 1}, "can be had"),
        ({"task": "sample", "n": "many"}, "many"),
    ):
        status, answer = predict(port, {"dataframe_split": {"columns": ["cif"], "data": [[cif]]}, "params": params})
        assert status == 400
        assert told in answer["message"]
        assert "Traceback" not in json.dumps(answer)


def test_a_server_with_passwords(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flask_wtf", reason="MLflow's basic authentication needs mlflow[auth]")
    port = free_port()
    place.uri = f"http://127.0.0.1:{port}"
    settings = place.folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{place.folder}/auth.db\nadmin_username = admin\n"
        "admin_password = a-long-password\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    os.chmod(settings, 0o600)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(place.folder))
    extra = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for the tests"}
    with serving(server_command(place.folder, port, "--app-name", "basic-auth"), f"{place.uri}/health", **extra):
        assert place.cli("list") == 2
        assert "it wants another name and password" in error_of(capsys)
        credentials = place.folder / ".mlflow" / "credentials"
        credentials.parent.mkdir()
        credentials.write_text("[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = a-long-password\n")
        assert "it is champion now" in register(place.run("a", {"val/loss": 1.0}))
        credentials.unlink()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        assert place.cli("list") == 0
        assert "candidate, champion" in capsys.readouterr().out
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-password")
        assert place.cli("list") == 2
        assert "another-password" not in error_of(capsys)


PASSWORD = "known to the server alone"


@contextmanager
def postgresql() -> Iterator[str]:
    """URI of a database of a PostgreSQL server that wants PASSWORD, which is not in it. Skips where none is installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = Path(shutil.which("initdb") or (programs[-1] if programs else ""))
    if not initdb.is_file():
        pytest.skip("PostgreSQL is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        as_user = []
        if not os.geteuid():  # PostgreSQL refuses to be root
            as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            shutil.chown(folder, "nobody", "nogroup")
        data, secret = Path(folder, "data"), Path(folder, "secret")
        secret.write_text(PASSWORD)
        make = [*as_user, initdb, "-D", data, "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
        subprocess.run([str(part) for part in make], check=True, capture_output=True, timeout=120)
        serve = f"{initdb.with_name('postgres')} -D {data} -p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
        with started([*as_user, *serve.split()]) as process:
            wait_until(lambda: port_fault(port), process)
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"


def test_a_server_on_postgresql_with_an_object_store(place: Place, tmp_path: Path) -> None:
    """Runs in a real PostgreSQL, bundles behind a real S3 API, where damage is seen."""
    pytest.importorskip("psycopg", reason="MLflow reaches PostgreSQL by psycopg")
    pytest.importorskip("moto", reason="moto has the object store")
    port = free_port()
    place.uri = f"http://127.0.0.1:{port}"
    with s3_server(tmp_path / "requests.log"), postgresql() as database:
        store = s3fs.S3FileSystem()
        store.mkdir("models")
        command = kept_in(database, "s3://models/kept", port)
        with serving(command, f"{place.uri}/health", PGPASSWORD=PASSWORD):
            assert "it is champion now" in register(place.run("a", {"val/loss": 1.0}))
            assert place.aliases() == {"champion": 1, "candidate": 1}
            read_bundle(pull(place.uri, f"models:/{NAME}@champion", tmp_path / "pulled"))
            (weights,) = (path for path in store.find("models") if path.endswith(WEIGHTS_NAME))
            store.pipe(weights, store.cat(weights)[:-1] + b"?")
            with pytest.raises(ModelError, match=f"{WEIGHTS_NAME} is missing or differs from SHA256SUMS"):
                pull(place.uri, f"models:/{NAME}@champion", tmp_path / "damaged")


SERVED = """
import sys
from importlib.metadata import packages_distributions
from dist_train.serving import answer
from dist_train.models.export import read_bundle
from dist_train.models.reconstruct import Codec
from pathlib import Path
codec = Codec(read_bundle(Path(sys.argv[1]))[0])
answer(codec, {"cif": [sys.stdin.read()]}, {})
names = packages_distributions()
print(*sorted({dist for module in sys.modules for dist in names.get(module, [])}))
"""


def test_what_a_served_model_imports_is_among_its_requirements(place: Place) -> None:
    """Or comes with one of them."""
    place.uri = f"sqlite:///{place.folder}/mlflow.db"
    crystal = ShardReader(Index.read(place.folder / "shards"), "test").crystal(0)
    bundle = place.run("a", {"val/loss": 1.0}) / "bundle"
    done = subprocess.run(
        [sys.executable, "-c", SERVED, str(bundle)], input=write_cif(crystal), capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    loaded = {name.lower() for name in done.stdout.split()}
    ours = {name.partition("=")[0].partition(">")[0].partition("[")[0].lower() for name in dependencies()}
    assert loaded & ours <= {*mlflow_registry.REQUIREMENTS}
    assert {"torch", "gemmi"} <= loaded


def dependencies() -> list[str]:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    return list(project["project"]["dependencies"])
