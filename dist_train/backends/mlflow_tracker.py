"""MLflow: the connection, and the uploader of a run's metrics. The registry of models is in `mlflow_registry`.

Training never waits for the tracking server: it writes to the spool, and a thread brings the spool's records to the
server, from the first one on. The server keeps a (key, time, step, value) once, so sending again is harmless.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config import RunConfig, TrackingConfig, flattened
from dist_train.training.tracker import read_on

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

UPLOAD_SECONDS = 2.0
RECORDS_PER_BATCH = 50
SYSTEM_SECONDS = 5.0
MAX_NAME, MAX_PARAM, MAX_OF_A_BATCH = 250, 500, 100
"""Characters of a run's or figure's name and of a parameter, and parameters at a time, that every MLflow server takes."""

log = logging.getLogger(__name__)


def connect(uri: str) -> MlflowClient:
    """A client that gives up within seconds rather than minutes and prints nothing; no telemetry, no pickles.

    Name and password of a server come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials.
    """
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ):
        os.environ.setdefault(name, value)
    import mlflow

    # The first use of a database prints a line for each of some 60 schema migrations.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


class MlflowUploader:
    """Brings the spool of a run folder to MLflow from a thread of its own; the run's id is kept in the folder."""

    def __init__(self, config: RunConfig, spool: Path, tags: dict[str, str]) -> None:
        assert config.tracking.uri is not None
        self.config, self.spool, self.tags = config, spool, tags
        self.run_id: str | None = None
        self._sent = 0  # bytes of the spool
        self._system: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, status: str, artifacts: Iterable[Path] = ()) -> bool:
        """Send what is left, files included, and end the run. False where the server could not be reached."""
        self._stop.set()
        self._thread.join()
        try:
            client = self._upload()
            for path in artifacts:
                send = client.log_artifacts if path.is_dir() else client.log_artifact
                send(self.run_id, str(path), path.name if path.is_dir() else None)
            if self._system is not None:
                self._system.finish()
            client.set_terminated(self.run_id, status)
        except Exception as error:  # whatever a server or its client raises must not end a finished training
            reason = (str(error) or repr(error)).splitlines()[0]
            log.warning("MLflow at %s can't be reached (%s); the metrics are in %s", self._uri, reason, self.spool)
            return False
        return True

    @property
    def _uri(self) -> str:
        assert self.config.tracking.uri is not None
        return self.config.tracking.uri

    def _work(self) -> None:
        while not self._stop.wait(UPLOAD_SECONDS):
            try:
                self._upload()
            except Exception as error:  # the server may be away; the spool keeps everything until it is back
                log.info("MLflow at %s can't be reached yet (%s)", self._uri, error)

    def _upload(self) -> MlflowClient:
        from mlflow.entities import Metric

        client = connect(self._uri)
        if self.run_id is None:
            self.run_id = self._open_run(client)
        records = read_on(self.spool, self._sent)
        while batch := list(islice(records, RECORDS_PER_BATCH)):
            metrics = [Metric(k, v, r["time"], r["step"]) for r, _ in batch for k, v in r["metrics"].items()]
            client.log_batch(self.run_id, metrics=metrics)
            self._sent = batch[-1][1]
        return client

    def _open_run(self, client: MlflowClient) -> str:
        """The run of this folder, made on the first start and taken up again on later ones."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        kept = self.spool.with_name("mlflow_run_id")
        run = _known_run(client, kept.read_text()) if kept.exists() else None
        resumed = run is not None
        if run is None:
            experiment = _experiment(client, self.config.tracking)
            run = client.create_run(experiment, run_name=self.config.run_dir.name, tags=self.tags)
            kept.write_text(run.info.run_id)
        run_id = str(run.info.run_id)
        client.update_run(run_id, status="RUNNING")
        if "run_dir" not in run.data.params:
            _log_config(client, run_id, self.config)
        self._system = SystemMetricsMonitor(
            run_id, sampling_interval=SYSTEM_SECONDS, samples_before_logging=1, resume_logging=resumed
        )
        self._system.start()
        return run_id


def _known_run(client: MlflowClient, run_id: str) -> Any:
    """The run of this id, or None where this server has none (another server than on the first start)."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _experiment(client: MlflowClient, tracking: TrackingConfig) -> str:
    found = client.get_experiment_by_name(tracking.experiment)
    if found is not None:
        return str(found.experiment_id)
    location = tracking.artifact_location
    if location is None and tracking.uri and tracking.uri.startswith("sqlite:///"):
        # MLflow's own default is ./mlruns of whatever folder the command was typed in.
        location = Path(tracking.uri.removeprefix("sqlite:///")).resolve().with_name("mlartifacts").as_uri()
    return str(client.create_experiment(tracking.experiment, artifact_location=location))


def _log_config(client: MlflowClient, run_id: str, config: RunConfig) -> None:
    from mlflow.entities import Param

    # Where one launch of a run is to stop is no setting of the run.
    config = config.model_copy(update={"train": config.train.model_copy(update={"stop_after_step": None})})
    flat = dict(flattened(config.model_dump(mode="json")))
    client.log_batch(run_id, params=[Param(key, str(value)[:MAX_PARAM]) for key, value in flat.items()])
    client.log_text(run_id, config.to_yaml(), "run.yaml")


def log_child(
    uri: str, parent_id: str, name: str, params: dict[str, str], figures: dict[str, float], files: Sequence[Path]
) -> str:
    """A finished run below another one, in its experiment, with parameters, figures and files; returns its id."""
    from mlflow.entities import Metric, Param
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    client = connect(uri)
    parent = client.get_run(parent_id)
    tags = {MLFLOW_PARENT_RUN_ID: parent_id}
    run_id = str(client.create_run(parent.info.experiment_id, run_name=name[:MAX_NAME], tags=tags).info.run_id)
    status = "FAILED"
    try:
        now = int(time.time() * 1000)
        kept_params = [Param(key, value[:MAX_PARAM]) for key, value in params.items()]
        kept = [Metric(key[:MAX_NAME], value, now, 0) for key, value in figures.items()]
        for start in range(0, max(len(kept_params), len(kept)), MAX_OF_A_BATCH):
            part = slice(start, start + MAX_OF_A_BATCH)
            client.log_batch(run_id, metrics=kept[part], params=kept_params[part])
        for path in files:
            client.log_artifact(run_id, str(path))
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return run_id
