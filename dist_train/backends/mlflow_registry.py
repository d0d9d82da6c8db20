"""MLflow's model registry: versions of a model, the aliases candidate, champion and previous, and fetching a bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.backends.mlflow_tracker import connect, log_child
from dist_train.config import NO_PASSWORD, has_password
from dist_train.errors import ConfigError, ModelError
from dist_train.models.export import check_sums
from dist_train.serving import COLUMNS, Params

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SUMS_TAG, REASON_TAG = "bundle_sha256", "champion_reason"
MAX_TAG = 5000
"""Characters of a tag's value that MLflow keeps."""
MODEL_CODE = Path(__file__).with_name("mlflow_model.py")
REQUIREMENTS = ("torch", "numpy", "scipy", "numba", "spglib", "gemmi", "pydantic", "pyyaml", "safetensors", "tqdm", "pandas")
"""What a served model needs beside mlflow; the package's own code travels with it."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    number: int
    aliases: tuple[str, ...]
    created_ms: int
    run_id: str
    tags: dict[str, str]

    @property
    def reasons(self) -> list[str]:
        """Why it became champion, a line for each time."""
        return self.tags.get(REASON_TAG, "").splitlines()


@dataclass(frozen=True)
class Upload:
    """What a version is made of; extras: files and folders beside the bundle; tags of SUMS_TAG and others."""

    bundle: Path
    extras: dict[str, Path]
    description: str
    tags: dict[str, str]
    example_cif: str


class Registry:
    """The versions of one model name on one server. Every method raises ModelError in one line where the server refuses."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri, self.name = uri, name
        with _told(uri):
            self._client = _connect(uri)

    def versions(self) -> list[Version]:
        """All of them, the newest first; none where the name is unknown."""
        with _told(self.uri):
            # Aliases are those of the model: a search for versions doesn't tell them.
            found = self._client.search_registered_models(f"name = '{self.name}'")
            aliases = found[0].aliases if found else {}
            return [
                Version(
                    int(v.version), tuple(sorted(a for a, n in aliases.items() if int(n) == int(v.version))),
                    v.creation_timestamp, v.run_id or "", dict(v.tags),
                )
                for v in _all_versions(self._client, self.name)
            ]  # fmt: skip

    def version(self, which: str) -> Version:
        """By number or alias, or the newest as 'latest'. Raises ModelError with what there is."""
        versions = self.versions()
        for version in versions:
            if which in ("latest", str(version.number), *version.aliases):
                return version
        if versions:
            raise ModelError(f"{self.name} has no version or alias {which!r}; {_there_is(versions)}")
        with _told(self.uri):
            names = ", ".join(model.name for model in self._client.search_registered_models())
        raise ModelError(f"{self.uri} has no model {self.name!r}; known: {names or 'none'}")

    def champion(self) -> Version | None:
        return next((version for version in self.versions() if CHAMPION in version.aliases), None)

    def add(self, run_id: str, upload: Upload) -> int:
        """A new version with the alias candidate."""
        import mlflow

        with (
            _told(self.uri),
            tempfile.TemporaryDirectory() as folder,
            mlflow.start_run(run_id=run_id, log_system_metrics=False),
        ):
            info = mlflow.pyfunc.log_model(
                name="model", python_model=str(MODEL_CODE), code_paths=[str(_copy_of_the_package(Path(folder)))],
                artifacts={"bundle": str(upload.bundle), **{name: str(path) for name, path in upload.extras.items()}},
                pip_requirements=_pinned(REQUIREMENTS), tags=upload.tags, **_signature(upload.example_cif),
            )  # fmt: skip
            made = mlflow.register_model(info.model_uri, self.name, tags=upload.tags)
            self._client.update_model_version(self.name, made.version, upload.description)
            self.point(CANDIDATE, int(made.version))
        return int(made.version)

    def point(self, alias: str, number: int) -> None:
        """Move an alias."""
        with _told(self.uri):
            self._client.set_registered_model_alias(self.name, alias, str(number))

    def record(
        self, version: Version, name: str, params: dict[str, str], figures: dict[str, float], files: Sequence[Path]
    ) -> str:
        """What was found of a version later, as a run below the one that made it; returns the new run's id."""
        with _told(self.uri):
            return log_child(self.uri, version.run_id, name, params, figures, files)

    def promote(self, version: Version, reason: str) -> Version | None:
        """Make a version the champion, and the one that was the previous; returns that, if there was one."""
        before = self.champion()
        if before is not None and before.number != version.number:
            self.point(PREVIOUS, before.number)
        with _told(self.uri):
            kept = "\n".join([*version.reasons, reason])[-MAX_TAG:]
            self._client.set_model_version_tag(self.name, str(version.number), REASON_TAG, kept)
        self.point(CHAMPION, version.number)
        return before


def find(uri: str, model: str) -> tuple[Registry, Version]:
    """What 'models:/NAME@ALIAS' or 'models:/NAME/VERSION' is now. Raises ModelError as `Registry.version` does."""
    name, _, which = model.removeprefix("models:/").replace("@", "/").partition("/")
    registry = Registry(uri, name)
    return registry, registry.version(which)


def pinned(uri: str, model: str) -> str:
    """'models:/NAME/VERSION' of it."""
    registry, version = find(uri, model)
    return f"models:/{registry.name}/{version.number}"


def pull(uri: str, model: str, folder: Path) -> Path:
    """Fetch the bundle of 'models:/NAME@ALIAS' or 'models:/NAME/VERSION' into a folder; returns the bundle's folder.

    Every file of it is checked. Raises ModelError, naming the known aliases and versions where there is no such model.
    """
    import mlflow

    version = pinned(uri, model)
    with _told(uri):
        where = mlflow.artifacts.download_artifacts(version, dst_path=str(folder))
    bundle = Path(where) / "artifacts" / "bundle"
    check_sums(bundle)
    return bundle


def _connect(uri: str) -> Any:
    if has_password(uri):
        raise ConfigError(f"the tracking URI {NO_PASSWORD}")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ModelError(f"{uri} is no database: there is no such file, and a registry is only made by a tracked run")
    return connect(uri)


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Whatever a server or its client raises, as one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise ModelError(f"the registry {uri} can't be used: {_line(error)}") from None


def _line(error: Exception) -> str:
    """What MLflow says, in one line, and what to do where it wants a name and a password."""
    told = " ".join(str(getattr(error, "message", error)).split())
    if "error code 401" in told or "error code 403" in told:
        return (
            "it wants another name and password than were given (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "~/.mlflow/credentials)"
        )
    return told if len(told) < 400 else f"{told[:400]}..."


def _all_versions(client: Any, name: str) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found.extend(page)
        if not (token := page.token):
            return sorted(found, key=lambda v: -int(v.version))


def _there_is(versions: Sequence[Version]) -> str:
    aliases = ", ".join(sorted(alias for version in versions for alias in version.aliases))
    numbers = ", ".join(str(version.number) for version in reversed(versions))
    return f"it has the aliases {aliases or '(none)'} and the versions {numbers}"


def _copy_of_the_package(folder: Path) -> Path:
    from dist_train import __file__ as package

    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(Path(package).parent, folder / "dist_train", ignore=ignored))


def _signature(example_cif: str) -> dict[str, Any]:
    """Signature and input example, as arguments of log_model."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kinds = {str: DataType.string, int: DataType.long, float: DataType.double}
    params = [ParamSpec(name, kinds[type(value)], value) for name, value in Params().model_dump().items()]
    inputs = [ColSpec(DataType.string, name, required=False) for name in ("cif", "latent")]
    outputs = [ColSpec(DataType.double if name == "confidence" else DataType.string, name) for name in COLUMNS]
    return {
        "signature": ModelSignature(Schema(inputs), Schema(outputs), ParamSchema(params)),
        "input_example": (pd.DataFrame({"cif": [example_cif]}), {"task": "reconstruct"}),
    }


def _pinned(names: Iterable[str]) -> list[str]:
    from importlib.metadata import version

    return [f"{name}=={version(name).split('+')[0]}" for name in names]
