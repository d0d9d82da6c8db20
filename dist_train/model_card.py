"""The card of a registered model: what it is, what it was trained on, how good it is, how to use it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "scipy", "numba", "deepspeed", "ray", "mlflow", "pymatgen", "gemmi", "spglib")


def environment(ranks: int) -> dict[str, str]:
    """What a training ran on, kept in its bundle."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {**found, "ranks": str(ranks)}


def model_card(name: str, config: dict[str, Any]) -> str:
    """Markdown, from the config of a bundle (see `models.export.write_bundle`)."""
    about = config["about"]
    run, counts = about["run"], about["data_counts"]
    licences = run["data"]["licences"]
    grid, sizes = run["grid"], run["model"]
    return "\n".join(
        (
            f"# {name}",
            "",
            "A variational autoencoder and an attention U-Net for crystals on voxel grids: CIF to latent vector and back.",
            "",
            "## Trained on",
            "",
            f"- data digest `{about['data_digest']}`",
            f"- {', '.join(f'{number} {what}' for what, number in counts.items())}",
            *(f"- {where}: {licence}" for where, licence in licences.items()),
            *(f"- {where}" for where in run["data"]["inputs"] if where not in licences),
            f"- {len(config['elements'])} elements; crystals with others, and ones that the grid can't hold, are refused",
            "",
            "## Model",
            "",
            f"- grid: {grid['frame']}, shape {grid['shape']}, spacing at most {grid['max_spacing_A']} A, "
            f"channels {', '.join(grid['channels'])}, at most {grid['max_atoms']} atoms",
            f"- latent of {_latent(sizes)}; VAE {sizes['vae_widths']}, U-Net of {sizes['unet_levels']} levels",
            f"- {about['step']} steps, objective {run['train']['objective']}, precision {run['train']['precision']}",
            *_ancestors(about),
            *_prior(about.get("prior")),
            "",
            "## Last validation",
            "",
            *_table(about.get("metrics", {})),
            "",
            "These are the held-out crystals of the training's own data; crystals of other kinds may fare far worse.",
            "",
            *_properties(config.get("properties")),
            "## Made by",
            "",
            f"- dist_train {config['code_version']}, commit `{about['git_commit'] or 'unknown'}`",
            *(f"- {what} {which}" for what, which in about.get("environment", {}).items()),
            "",
            "## Use",
            "",
            "A DataFrame with a column `cif` (or `latent`) goes in; `cif`, `latent`, `confidence` and `error` come out. The",
            "param `task` is reconstruct, encode, decode, sample, interpolate or alter.",
            "",
        )
    )


def _properties(told: dict[str, Any] | None) -> list[str]:
    """What is read off latents, with the errors on crystals that were held out."""
    if told is None:
        return []
    rows = [
        f"| {known['name']} | {known['unit']} | {known['n_fitted']} | {known['n_held_out']} | {known['mae']:.4g} | "
        f"{known['mae_linear']:.4g} | {known['mae_mean']:.4g} | {known['mae_median']:.4g} | {known['r2']:.3f} |"
        for known in told["properties"]
    ]
    head = "| property | unit | fitted | held out | MAE | linear | mean | median | R2 |"
    from_ = f"Labels of {', '.join(told['about']['data'])}. MAE of the heads beside those of a linear fit and of constants."
    return [
        "## Properties",
        "",
        from_,
        "",
        head,
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _ancestors(about: dict[str, Any]) -> Iterator[str]:
    """A line for each model that this one, or the one before it, started from."""
    while about := about.get("started_from", {}):
        yield f"- started from a model of {about['step']} steps on data of digest `{about['data_digest']}`"


def _prior(told: dict[str, Any] | None) -> list[str]:
    """What samples are drawn from, where that isn't the training's own crystals' prior."""
    if not told:
        return []
    limit = f" with at most {told['max_volume']:g} A^3 an atom" if told.get("max_volume") else ""
    return [f"- samples: fitted to {told['crystals']} crystals of {told['data']}{limit}"]


def _latent(sizes: dict[str, Any]) -> str:
    coarse = sizes.get("latent_voxels")
    return f"{sizes['latent']} numbers" + (f" and at most {coarse} voxels of {sizes['latent_channels']}" if coarse else "")


def _table(metrics: dict[str, float]) -> list[str]:
    return ["| metric | value |", "| --- | --- |", *(f"| {name} | {value:.6g} |" for name, value in metrics.items())]
