"""The model bundle: a folder with `model.safetensors`, `config.json` and `SHA256SUMS`; no pickle anywhere.

`training_digests.npy` holds the digests of the crystals that the model was trained on (see `crystal.digest`), and
`properties.safetensors` what reads properties off latents (see `models.properties`); a bundle may have neither.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train import __version__
from dist_train.config import GridSpec, ModelConfig
from dist_train.errors import ConfigError, ModelError
from dist_train.files import check_writable, fsync, sha256
from dist_train.models.autoencoder import CrystalAutoencoder
from dist_train.models.properties import PropertyHeads

FORMAT_VERSION, OLDEST_FORMAT = 3, 2
"""Written, and the oldest that is read; 1 named the layers of the VAE otherwise, 2 knew no numbers of 8 bits."""
WEIGHTS_NAME, CONFIG_NAME, SUMS_NAME = "model.safetensors", "config.json", "SHA256SUMS"
DIGESTS_NAME, PROPERTIES_NAME = "training_digests.npy", "properties.safetensors"
SCALE = ".scale"
"""What is added to the name of a matrix of 8 bits a number for the scales of its rows."""


def write_bundle(
    folder: Path,
    model: CrystalAutoencoder,
    weights: dict[str, Tensor],
    about: dict[str, Any],
    digests: NDArray[np.uint64] | None = None,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write a bundle that replaces the one in `folder` as a whole. Raises ConfigError as `check_place` does.

    weights: by the model's parameter names; about: provenance (data digest, step, metrics...), kept in config.json;
    digests: of the training crystals, rising, each once; None where they aren't known; files: others, by their names.
    """
    temporary = _temporary(folder)
    temporary.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, temporary / WEIGHTS_NAME)
    config = {"format_version": FORMAT_VERSION, "code_version": __version__, "about": about, **model.config()}
    (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
    if digests is not None:
        np.save(temporary / DIGESTS_NAME, digests, allow_pickle=False)
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    return _put(temporary, folder)


def add_properties(
    folder: Path, out: Path, heads: PropertyHeads, told: dict[str, Any], files: Mapping[str, bytes] = MappingProxyType({})
) -> Path:
    """Write the bundle of `folder` with these properties, in place of others, as `out`, which may be the same folder.

    told: what config.json says of them; files: others that are added or replaced, by their names.
    """
    with _revised(folder, out) as copy:
        save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, copy / PROPERTIES_NAME)
        _change(copy, {"properties": told}, files)
    return out


def replace_prior(
    folder: Path, out: Path, model: CrystalAutoencoder, about: dict[str, Any], digests: NDArray[np.uint64] | None,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:  # fmt: skip
    """Write the bundle of `folder` with the prior of `model`, which was read from it, as `out`, maybe the same folder.

    about, digests: in place of those there; files: others that are added or replaced, by their names. The weights keep
    their precision (see `compact`). An `evaluation.json` is left out, as it tells of samples of the old prior.
    """
    with _revised(folder, out) as copy:
        small = any(value.dtype == torch.float16 for value in load_file(copy / WEIGHTS_NAME).values())
        weights = compact(model.state_dict()) if small else model.state_dict()
        save_file({name: value.contiguous() for name, value in weights.items()}, copy / WEIGHTS_NAME)
        if digests is not None:
            np.save(copy / DIGESTS_NAME, digests, allow_pickle=False)
        (copy / "evaluation.json").unlink(missing_ok=True)
        _change(copy, {"format_version": FORMAT_VERSION, "about": about, **model.config()}, files)
    return out


def compact(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in half precision, and the matrices of a prior's networks in 8 bits a number.

    Each row of these has a scale of its own. A prior is most of a small model, and samples don't hang on its last digits.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith("flow.") and weight.dim() == 2:
            scale_R = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            found[name], found[name + SCALE] = (weight / scale_R[:, None]).round().to(torch.int8), scale_R
        else:
            found[name] = weight.half()
    return found


def _expanded(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `compact`, but for what was rounded."""
    return {
        name: weight if weight.dtype != torch.int8 else weight.float() * stored[name + SCALE][:, None]
        for name, weight in stored.items()
        if not name.endswith(SCALE)
    }


@contextmanager
def _revised(folder: Path, out: Path) -> Iterator[Path]:
    """A copy of a bundle to work on, which takes the place of `out`, maybe the same folder, at the end of the block."""
    check_sums(folder)
    temporary = _temporary(out)
    shutil.copytree(folder, temporary)
    (temporary / SUMS_NAME).unlink()
    yield temporary
    _put(temporary, out)


def _change(copy: Path, config: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Keys of the config of a bundle's copy, and files, by their names."""
    changed = {**json.loads((copy / CONFIG_NAME).read_text()), **config}
    (copy / CONFIG_NAME).write_text(json.dumps(changed, indent=1) + "\n")
    for name, content in files.items():
        (copy / name).write_bytes(content)


def _temporary(folder: Path) -> Path:
    """Where a folder is made, beside its place. Raises ConfigError as `check_place` does."""
    check_place(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _put(temporary: Path, folder: Path) -> Path:
    """Sum up the files of a folder and put it in the place of another bundle."""
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir()))
    (temporary / SUMS_NAME).write_text(sums)
    for path in temporary.iterdir():
        path.chmod(0o644)
        fsync(path)
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)
    os.replace(temporary, folder)
    shutil.rmtree(before, ignore_errors=True)
    return folder


def check_place(folder: Path) -> None:
    """Raise ConfigError for a folder that a bundle would replace although it holds something else; OSError for no folder."""
    check_writable(folder)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    sums = folder / SUMS_NAME
    listed = {line.partition("  ")[2] for line in sums.read_text(errors="replace").splitlines()} if sums.is_file() else set()
    if others := sorted(there - listed - {SUMS_NAME}):
        raise ConfigError(f"{folder} holds {others[0]!r}, which is of no bundle and would be lost: choose another folder")


def read_bundle(folder: Path) -> tuple[CrystalAutoencoder, dict[str, Any]]:
    """The model of a bundle, in evaluation mode, and its config; every file is checked against SHA256SUMS first.

    Raises ModelError for a folder that is no bundle, is damaged, or was written by a newer program or one that is too old.
    """
    check_sums(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    if config["format_version"] > FORMAT_VERSION:
        raise ModelError(
            f"bundle {folder} has format {config['format_version']}, this program reads up to {FORMAT_VERSION}: update it"
        )
    if config["format_version"] < OLDEST_FORMAT:
        raise ModelError(
            f"bundle {folder} has format {config['format_version']}, this program reads {OLDEST_FORMAT} and later: "
            "train it anew"
        )
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced: leave the caller's numbers alone
        model = CrystalAutoencoder.from_config(config)
    try:
        model.load_state_dict(_expanded(load_file(folder / WEIGHTS_NAME)))
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"bundle file {folder / WEIGHTS_NAME} doesn't hold the model's weights: {str(error).splitlines()[0]}"
        ) from None
    return model.eval(), config


def training_digests(folder: Path) -> NDArray[np.uint64] | None:
    """Digests of the crystals that a bundle's model was trained on, rising; None where an older program wrote the bundle.

    Raises ModelError as `read_bundle` does.
    """
    return np.load(folder / DIGESTS_NAME, allow_pickle=False) if DIGESTS_NAME in check_sums(folder) else None


class Ancestor(NamedTuple):
    """What a run has to know of the bundle that it starts from, to say what its own model was trained on.

    about: of the bundle; digests: as from `training_digests`.
    """

    about: dict[str, Any]
    digests: NDArray[np.uint64] | None

    @classmethod
    def of(cls, folder: Path) -> Ancestor:
        """Raises ModelError for a folder that is no bundle or is damaged."""
        digests = training_digests(folder)
        return cls(json.loads((folder / CONFIG_NAME).read_text())["about"], digests)

    def inherit(
        self, about: dict[str, Any], digests: NDArray[np.uint64]
    ) -> tuple[dict[str, Any], NDArray[np.uint64] | None]:
        """`about` and digests of a bundle that was trained on crystals of these digests, and started from this one.

        Its crystals were seen, too; where it doesn't tell which, nobody knows any more.
        """
        names = ("step", "data_digest", "git_commit", "started_from")
        about |= {"started_from": {name: self.about[name] for name in names if name in self.about}}
        there, here = self.about.get("training_digests", {}), about["training_digests"]
        if self.digests is None or there.get("version") != here["version"]:
            return about, None
        if self.about.get("data_digest") != about["data_digest"]:  # else they are the same samples
            about |= {"training_digests": here | {name: here[name] + there[name] for name in ("samples", "of")}}
        return about, np.union1d(digests, self.digests)


def read_properties(folder: Path) -> PropertyHeads | None:
    """What reads properties off a bundle's latents; None where none were fitted. Raises ModelError as `read_bundle` does."""
    if PROPERTIES_NAME not in check_sums(folder):
        return None
    with torch.random.fork_rng(devices=[]):
        heads = PropertyHeads.from_config(json.loads((folder / CONFIG_NAME).read_text())["properties"])
    heads.load_state_dict(load_file(folder / PROPERTIES_NAME))
    return heads.requires_grad_(False).eval()


ATOMS_LAYERS = ("decoder.atoms.", "decoder.local_atoms.")
OF_LATENTS = ("prior_mean", "prior_cholesky", "flow.")
MAY_DIFFER = ("max_voxels", "max_atoms", "latent_voxels", "atoms_width")
"""Limits, which the layers that all voxels share know nothing of, and the width of the layers that begin anew for it."""


def start_from(folder: Path, grid: GridSpec, model: ModelConfig, elements: tuple[int, ...]) -> CrystalAutoencoder:
    """The model of a bundle, standardisation included, for a new run. Raises ModelError where it isn't of the run's kind.

    The run may take larger crystals, and have a larger grid in its latents. The layers that `atoms_width` is of begin anew
    where that is another one: all else has been learnt without them. The prior begins anew, as latents will be others.
    """
    old = read_bundle(folder)[0]
    for name, there, here in (
        ("grid", old.grid.model_dump(mode="json"), grid.model_dump(mode="json")),
        ("model", old.model.model_dump(mode="json"), model.model_dump(mode="json")),
        ("elements", {"of the training split": old.elements}, {"of the training split": elements}),
    ):
        differing = [key for key in here if there[key] != here[key] and key not in MAY_DIFFER]
        if differing:
            told = "; ".join(f"{key} is {there[key]} there, {here[key]} here" for key in differing)
            raise ModelError(f"train.init_from {folder} has another {name}: {told}; name another bundle or change {name}")
    found = CrystalAutoencoder(grid, model, elements, old.statistics)
    anew = OF_LATENTS + (ATOMS_LAYERS if old.model.atoms_width != model.atoms_width else ())
    kept = {name: value for name, value in old.state_dict().items() if not name.startswith(anew)}
    found.load_state_dict({**found.state_dict(), **kept})
    return found


def check_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by the name of every file of the bundle; each was checked. Raises ModelError for a damaged one."""
    try:
        lines = (folder / SUMS_NAME).read_text(errors="replace").splitlines()
    except OSError:
        raise ModelError(f"{folder} is no model bundle: it has no {SUMS_NAME}") from None
    named = {name: digest for digest, name in (line.partition("  ")[::2] for line in lines)}
    for name in (CONFIG_NAME, WEIGHTS_NAME, *({DIGESTS_NAME, PROPERTIES_NAME} & named.keys())):
        path = folder / name
        if not path.is_file() or named.get(name) != sha256(path):
            raise ModelError(f"bundle file {path} is missing or differs from {SUMS_NAME}: fetch the bundle again")
    return named
