"""The verb release: a small bundle of a finished run, for others to use."""

from __future__ import annotations

from pathlib import Path

from dist_train.errors import DataError
from dist_train.model_card import model_card
from dist_train.models import export
from dist_train.models.export import WEIGHTS_NAME, check_place, read_bundle, training_digests, write_bundle


def release(run_dir: Path, out: Path, evaluation: Path | None) -> str:
    """Write the bundle of a run with weights in half precision, its card and run file, and the metrics of an evaluation.

    The folder has the name of the model. evaluation: folder of `dist-train evaluate`, best of this very release.
    Raises ModelError for a run without a bundle, DataError for an evaluation without metrics, ConfigError where `out` holds
    anything but a bundle.
    """
    check_place(out)
    network, config = read_bundle(run_dir / "bundle")
    files = {"model_card.md": model_card(out.name, config).encode(), "run.yaml": (run_dir / "run.yaml").read_bytes()}
    if evaluation is not None:
        if not (evaluation / "metrics.json").is_file():
            raise DataError(f"{evaluation} holds no metrics.json: give the folder of a finished dist-train evaluate")
        files["evaluation.json"] = (evaluation / "metrics.json").read_bytes()
    weights = network.state_dict()
    write_bundle(out, network, export.compact(weights), config["about"], training_digests(run_dir / "bundle"), files)
    if (heads := export.read_properties(run_dir / "bundle")) is not None:
        export.add_properties(out, out, heads, config["properties"])
    return f"{out}: {(out / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB in half precision, {len(weights)} tensors"
