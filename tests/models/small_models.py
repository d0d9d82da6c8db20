"""Models and batches that tests can afford."""

from __future__ import annotations

import math

import torch

from dist_train.config import GridSpec, ModelConfig, TrainConfig
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.voxelize import Shape, n_channels
from dist_train.models.autoencoder import CrystalAutoencoder, CrystalBatch, Statistics
from dist_train.models.objectives import Objective, prepare

CPU = torch.device("cpu")
CUBE = GridSpec(shape=12, channels=("occupancy", "period"))
ADAPTIVE = GridSpec(shape="adaptive", channels=("occupancy", "period"))
WINDOW = GridSpec.model_validate({"preset": "paper-window"})
LIGHT = ModelConfig(latent=10, vae_widths=(4, 8), unet_width=4, unet_levels=2)
PAPER = ModelConfig(
    latent=10, vae_widths=(4, 4, 8), vae_halvings=2, hidden=10, unet_width=4, unet_levels=3, blocks="paper", norm_groups=2,
    gate=False,
)  # fmt: skip
SPATIAL = ModelConfig(latent=10, latent_voxels=64, latent_channels=3, vae_widths=(4, 8), vae_depth=1, unet_width=4)
WIDE = SPATIAL.model_copy(update={"atoms_width": 6})
ELEMENTS = (8, 22, 56)


def make_model(grid: GridSpec = CUBE, model: ModelConfig = LIGHT, seed: int = 0) -> CrystalAutoencoder:
    """With the same weights at every call."""
    torch.manual_seed(seed)
    channels = n_channels(grid)
    statistics = Statistics((0.1,) * channels, (0.5,) * channels, (1.4,) * 3 + (0.0,) * 3, (0.1,) * 6, math.log(5), 1.0)
    return CrystalAutoencoder(grid, model, ELEMENTS, statistics)


def make_batch(size: int = 3, shape: Shape = (12, 12, 12), channels: int = 8) -> CrystalBatch:
    """Random densities with two atoms each, different numbers of labelled voxels."""
    torch.manual_seed(1)
    species = torch.zeros(size, *shape, dtype=torch.uint8)
    for crystal in range(size):
        species[crystal, 2:4, 2:4, 2 : 4 + crystal], species[crystal, 7:9, 7:9, 7:9] = 56, 8
    composition = torch.zeros(size, MAX_Z + 1)
    composition[:, [8, 22, 56]] = torch.tensor([3.0, 1.0, 1.0])
    density = torch.rand(size, channels, *shape).half()
    return CrystalBatch(density, species, torch.randn(size, 6), composition, torch.ones(size))


def make_objective(grid: GridSpec = CUBE, model: ModelConfig = LIGHT, seed: int = 0, **train: object) -> Objective:
    """An objective on the CPU in float32; `train`: values of TrainConfig."""
    if train.get("objective") == "unet":
        train["init_from"] = "somewhere"
    settings = TrainConfig.model_validate(train)
    return prepare(Objective(make_model(grid, model, seed), settings, CPU, torch.float32), settings)


def loss_and_gradients(objective: Objective, *arguments: object) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one forward and backward pass; the gradients of trained parameters."""
    objective.zero_grad()
    loss, _ = objective(*arguments)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
