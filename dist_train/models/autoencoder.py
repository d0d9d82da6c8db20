"""VAE and attention U-Net in one module, with the standardisation of their inputs: the model that is trained and shipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dist_train.config import GridSpec, ModelConfig
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import Shape, n_channels
from dist_train.errors import ModelError
from dist_train.models.blocks import Style
from dist_train.models.flow import LatentFlow
from dist_train.models.grid_flow import GridFlow
from dist_train.models.unet import AttentionUNet
from dist_train.models.vae import N_CELL, N_SHAPE, Decoder, Decoding, Encoder, Latent

GATE_SHARPNESS, GATE_FLOOR = 8.0, 0.002
USUAL_EDGE = 32
"""Edge in voxels of the cube whose coarse grid a model of adaptive grids has."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the training crystals' channels [C], cell numbers [6] and log atom count."""

    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    cell_mean: tuple[float, ...]
    cell_std: tuple[float, ...]
    count_mean: float
    count_std: float


@dataclass(frozen=True)
class EstimateErrors:
    """Root mean square errors of what a model says of a crystal's atoms, on crystals held out (see `reconstruct.calibrate`).

    atoms: of their number; integral: of the number by the integral of the decoded density, None where nobody measured it and
    it counts for nothing; composition: of the number of each element that is there.
    """

    atoms: float = 0.15
    integral: float | None = None
    composition: float = 0.3


class CrystalBatch(NamedTuple):
    """Crystals on grids of one shape, in physical units.

    density_BCDHW: float; species_BDHW: uint8 atomic numbers; cell_B6: logarithms of a, b, c and cosines of the angles;
    composition_BZ: atoms of each atomic number, [B, MAX_Z + 1]; weight_B: 1, or 0 in place of a damaged sample, which is
    then left out of every loss: losses are sums of weight times the crystal's own loss, over B.
    """

    density_BCDHW: Tensor
    species_BDHW: Tensor
    cell_B6: Tensor
    composition_BZ: Tensor
    weight_B: Tensor

    @property
    def size(self) -> int:
        """Crystals, damaged ones included."""
        return len(self.weight_B)

    @property
    def shape(self) -> Shape:
        """Voxels of the grids along the three axes."""
        _, d, h, w = self.species_BDHW.shape
        return d, h, w

    def rows(self, part: slice) -> CrystalBatch:
        """Some of the crystals."""
        return CrystalBatch(*(tensor[part] for tensor in self))

    def to(self, device: torch.device) -> CrystalBatch:
        """The same batch on a device."""
        return CrystalBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class CrystalAutoencoder(nn.Module):
    """The VAE, the U-Net and the numbers that standardise what goes in.

    Raises ModelError for a grid without a channel that atoms can be decoded from, or for no elements.
    """

    prior_mean: Tensor
    prior_cholesky: Tensor

    def __init__(self, grid: GridSpec, model: ModelConfig, elements: tuple[int, ...], statistics: Statistics) -> None:
        super().__init__()
        check_grid(grid)
        if not elements:
            raise ModelError("no elements to tell apart: the training split is empty")
        self.grid, self.model, self.elements, self.statistics = grid, model, elements, statistics
        style = Style(grid.frame == "cell", model.blocks == "paper", model.norm_groups)
        channels, edge = n_channels(grid), USUAL_EDGE if grid.shape == "adaptive" else grid.shape
        coarse = model.coarse or -(-edge // 2**model.halvings)
        adaptive = grid.shape == "adaptive"
        known = N_CELL + N_SHAPE * adaptive
        if model.latent < known:
            raise ModelError(
                f"model.latent {model.latent} can't hold the {known} numbers of cell and shape: give {known} or more"
            )
        self.encoder = Encoder(channels, coarse, model, adaptive, style)
        self.decoder = Decoder(channels, coarse, model, len(elements), adaptive, style)
        self.unet = AttentionUNet(channels, 1 + len(elements), model.unet_width, model.unet_levels, style)
        # The Gaussian of the training crystals' latents, fitted after training: N(0, I) is a poor prior (see generate).
        self.register_buffer("prior_mean", torch.zeros(model.latent_size))
        self.register_buffer("prior_cholesky", torch.eye(model.latent_size))
        self.estimate_errors: EstimateErrors | None = None
        """Measured after training."""
        self.flow: LatentFlow | GridFlow | None = None
        """From noise to latents over `latent_scale`; fitted after training, too."""

    @property
    def latent_scale(self) -> float:
        """Root mean square of the training crystals' latents around their mean."""
        return float((self.prior_cholesky.square().sum() / len(self.prior_cholesky)).sqrt())

    def flow_centre(self, n_centred: int) -> Tensor:
        """[latent_size] the latent that is 0 to a flow: the Gaussian's mean, of the first numbers alone."""
        return self.prior_mean.float() * (torch.arange(len(self.prior_mean), device=self.prior_mean.device) < n_centred)

    def encode(self, density_BCDHW: Tensor, cell_B6: Tensor) -> Latent:
        """Posterior of standardised inputs; the grids may have any shape that `RunConfig.check_halvings` takes."""
        latent: Latent = self.encoder(density_BCDHW, cell_B6)
        return latent

    def decode(self, latent: Tensor, shape: Shape | None = None) -> Decoding:
        """Standardised outputs of latents [B, latent_size] on grids of a shape; None: that of a grid that isn't adaptive."""
        if shape is None:
            assert self.grid.shape != "adaptive"
            shape = (self.grid.shape,) * 3
        decoding: Decoding = self.decoder(latent, shape)
        return decoding

    def segment(self, decoding: Decoding) -> Tensor:
        """[B, 1 + E, D, H, W] logits of 'no atom' and of each element, gated by the decoded composition."""
        features = self.unet(decoding.density_BCDHW).movedim(1, -1).contiguous()  # strided, it is multiplied slowly
        logits = self.unet.classify(features)
        if self.model.gate:
            logits = logits + composition_gate(decoding.composition_BE)[:, None, None, None]
        return logits.movedim(-1, 1)

    def config(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON; `from_config` rebuilds the module from it."""
        measured = {"estimate_errors": asdict(self.estimate_errors)} if self.estimate_errors else {}
        return measured | {
            "grid": self.grid.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "elements": list(self.elements),
            "statistics": asdict(self.statistics),
            "flow": self.flow and self.flow.config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CrystalAutoencoder:
        """Inverse of `config`, with fresh weights."""
        statistics: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config["statistics"].items()
        }
        model = cls(
            GridSpec.model_validate(config["grid"]),
            ModelConfig.model_validate(config["model"]),
            tuple(config["elements"]),
            Statistics(**statistics),
        )
        if errors := config.get("estimate_errors"):
            model.estimate_errors = EstimateErrors(**errors)
        if flow := config.get("flow"):
            model.flow = (
                GridFlow.from_config(model.model.latent, model.elements, flow)
                if "shapes" in flow
                else LatentFlow.from_config(model.model.latent_size, model.elements, flow)
            )
        return model


def check_grid(grid: GridSpec) -> tuple[Literal["occupancy", "z_density"], int]:
    """The kind of channel that atoms are decoded from, and its place among the channels.

    Raises ModelError where the grid has none, so that no crystal could be made of what a model says.
    """
    kind = next((kind for kind in ("occupancy", "z_density") if kind in grid.channels), None)
    if kind is None:
        told = "lack 'occupancy' or 'z_density', which atoms are decoded from; add one"
        raise ModelError(f"grid.channels {list(grid.channels)} {told}")
    before = grid.channels[: grid.channels.index(kind)]
    return kind, n_channels(grid.model_copy(update={"channels": before})) if before else 0


def composition_gate(composition_BE: Tensor) -> Tensor:
    """[B, 1 + E] added to the logits: log(softplus(8 c) / 8 + 0.002), about 0 for one atom and -6 for none.

    The gate bars elements that the latent says are absent; 'no atom' passes unchanged.
    """
    gate = torch.log(softplus(GATE_SHARPNESS * composition_BE) / GATE_SHARPNESS + GATE_FLOOR)
    return torch.cat([torch.zeros_like(gate[:, :1]), gate], dim=1)


class Standardiser:
    """Physical units to the network's and back, on one device and dtype (kept out of the module: never trained)."""

    def __init__(self, model: CrystalAutoencoder, device: torch.device, dtype: torch.dtype) -> None:
        s = model.statistics
        self.dtype = dtype
        self.channel_mean = torch.tensor(s.channel_mean, device=device).reshape(1, -1, 1, 1, 1)
        self.channel_std = torch.tensor(s.channel_std, device=device).reshape(1, -1, 1, 1, 1)
        self.cell_mean, self.cell_std = (
            torch.tensor(s.cell_mean, device=device),
            torch.tensor(s.cell_std, device=device),
        )
        self.count_mean, self.count_std = s.count_mean, s.count_std
        self.elements = torch.tensor(model.elements, device=device)
        self.class_of_z = torch.zeros(MAX_Z + 1, dtype=torch.int64, device=device)
        self.class_of_z[self.elements] = torch.arange(1, len(model.elements) + 1, device=device)

    def density(self, density_BCDHW: Tensor) -> Tensor:
        return ((density_BCDHW - self.channel_mean) / self.channel_std).to(self.dtype)

    def cell(self, cell_B6: Tensor) -> Tensor:
        return ((cell_B6 - self.cell_mean) / self.cell_std).to(self.dtype)

    def physical_density(self, density_BCDHW: Tensor) -> Tensor:
        return density_BCDHW.float() * self.channel_std + self.channel_mean

    def physical_cell(self, cell_B6: Tensor) -> Tensor:
        return cell_B6.float() * self.cell_std + self.cell_mean


def composition_vector(crystal: Crystal) -> np.ndarray:
    """[MAX_Z + 1] atoms of each atomic number, float32."""
    return np.bincount(crystal.numbers_N, minlength=MAX_Z + 1).astype(np.float32)


def cell_numbers(lengths_angles: np.ndarray) -> np.ndarray:
    """[..., 6] cell parameters (angstrom, degrees) -> logarithms of the lengths, cosines of the angles."""
    return np.concatenate([np.log(lengths_angles[..., :3]), np.cos(np.radians(lengths_angles[..., 3:]))], axis=-1).astype(
        np.float32
    )


def cell_parameters(cell_numbers: np.ndarray) -> np.ndarray:
    """Inverse of `cell_numbers`; cosines are cut at +-0.98, since a network may exceed 1."""
    cosines = np.clip(cell_numbers[..., 3:].astype(np.float64), -0.98, 0.98)
    return np.concatenate([np.exp(cell_numbers[..., :3].astype(np.float64)), np.degrees(np.arccos(cosines))], axis=-1)
