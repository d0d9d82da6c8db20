"""What a step of training costs, arithmetic and memory, counted on tensors without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config import RunConfig
from dist_train.crystal.voxelize import Shape, n_channels
from dist_train.models.autoencoder import CrystalAutoencoder, Statistics
from dist_train.models.objectives import Objective, prepare

META = torch.device("meta")


def meta_model(config: RunConfig, elements: int) -> CrystalAutoencoder:
    """The model of a run without memory for its weights, frozen where its objective trains nothing."""
    channels = n_channels(config.grid)
    statistics = Statistics((0.0,) * channels, (1.0,) * channels, (0.0,) * 6, (1.0,) * 6, 0.0, 1.0)
    with META:
        model = CrystalAutoencoder(config.grid, config.model, tuple(range(1, elements + 1)), statistics)
    return prepare(Objective(model, config.train, META, torch.float32), config.train).model


def flops_per_sample(config: RunConfig, elements: int, shape: Shape) -> float:
    """Floating-point operations of the networks, forward and backward, for one crystal on a grid of a shape.

    A product and its sum are two. The U-Net counts with the share of crystals that it sees. Left out, as they are a few
    percent or less: losses, activations, the classifier of the chosen voxels. What activation checkpointing does twice
    counts once.
    """
    plain = config.train.model_copy(update={"activation_checkpointing": False, "compile": False})
    config = config.model_copy(update={"train": plain})
    model = meta_model(config, elements)
    with FlopCounterMode(display=False) as vae:
        seen = _run_vae(model, config, shape)
    with FlopCounterMode(display=False) as unet:
        _run_unet(model, config, seen)
    return float(vae.get_total_flops() + config.train.unet_share * unet.get_total_flops())


def mean_flops(config: RunConfig, elements: int, shapes: Sequence[Shape]) -> float:
    """FLOP of a crystal of the training split: in the mean over its shapes, in proportion to their voxels."""
    common, _ = Counter(shapes).most_common(1)[0]
    return flops_per_sample(config, elements, common) / prod(common) * sum(map(prod, shapes)) / len(shapes)


def activation_bytes(config: RunConfig, elements: int, shape: Shape) -> float:
    """Bytes of what the networks keep for the backward pass, for one crystal on a grid of a shape, weights left out."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    model = meta_model(config, elements).to(torch.float32 if config.train.precision == "fp32" else torch.bfloat16)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes, alive = dict[int, int](), list[torch.UntypedStorage]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)  # or another one might get its address
        return tensor

    def kept() -> int:
        total = sum(sizes.values())
        sizes.clear()
        return total

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seen = _run_vae(model, config, shape)
        vae = kept()
        _run_unet(model, config, seen)
    return vae + config.train.unet_share * kept()


def _run_vae(model: CrystalAutoencoder, config: RunConfig, shape: Shape) -> Tensor:
    """Forward and backward for one crystal; what the U-Net sees of it."""
    dtype, kind = next(model.parameters()).dtype, config.train.objective
    density = torch.empty(1, n_channels(config.grid), *shape, device=META, dtype=dtype)
    with torch.set_grad_enabled(kind != "unet"):
        posterior = model.encode(density, torch.empty(1, 6, device=META, dtype=dtype))
        decoding = model.decode(posterior.mean + posterior.log_variance, shape)
    if kind != "unet":
        torch.autograd.backward(torch.cat([part.flatten() for part in decoding]).sum())
    # In joint training the loss of the U-Net reaches what it sees.
    return decoding.density_BCDHW.detach().requires_grad_(kind == "joint")


def _run_unet(model: CrystalAutoencoder, config: RunConfig, seen: Tensor) -> None:
    if config.train.objective != "vae":
        torch.autograd.backward(model.unet(seen).sum())
