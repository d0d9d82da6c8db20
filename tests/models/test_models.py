"""The networks: shapes, periodicity, losses with known values, and the bundle they travel in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dist_train.config import GridSpec, LossWeights, ModelConfig, TrainConfig
from dist_train.crystal.elements import MAX_Z
from dist_train.crystal.lattice import from_lengths_angles, lengths_angles
from dist_train.errors import ModelError
from dist_train.models.autoencoder import (
    CrystalAutoencoder,
    CrystalBatch,
    Statistics,
    cell_numbers,
    cell_parameters,
    composition_gate,
)
from dist_train.models.blocks import Down, PeriodicConv, pixel_shuffle_3d
from dist_train.models.export import read_bundle, write_bundle
from dist_train.models.losses import gaussian_kl, species_cross_entropy, species_voxels, squared_error
from dist_train.models.objectives import JointObjective, Noise, step_noise
from dist_train.models.unet import AttentionUNet
from dist_train.models.vae import Latent

CPU = torch.device("cpu")
GRID = GridSpec(shape=12, channels=("occupancy", "period"))
MODEL = ModelConfig(latent=6, vae_widths=(4, 8), unet_width=4, unet_levels=2)
STATISTICS = Statistics((0.1,) * 8, (0.5,) * 8, (1.4,) * 3 + (0.0,) * 3, (0.1,) * 6, math.log(5), 1.0)


def make_model() -> CrystalAutoencoder:
    torch.manual_seed(0)
    return CrystalAutoencoder(GRID, MODEL, (8, 22, 56), STATISTICS)


def make_batch(size: int = 3) -> CrystalBatch:
    torch.manual_seed(1)
    species = torch.zeros(size, 12, 12, 12, dtype=torch.uint8)
    species[:, 2:4, 2:4, 2:4], species[:, 7:9, 7:9, 7:9] = 56, 8
    composition = torch.zeros(size, MAX_Z + 1)
    composition[:, [8, 22, 56]] = torch.tensor([3.0, 1.0, 1.0])
    return CrystalBatch(torch.rand(size, 8, 12, 12, 12).half(), species, torch.randn(size, 6), composition, torch.ones(size))


def test_shapes_from_grid_to_latent_and_back() -> None:
    model = make_model()
    latent = model.encode(torch.randn(2, 8, 12, 12, 12), torch.randn(2, 6))
    assert latent.mean.shape == latent.log_variance.shape == (2, 6)
    decoding = model.decode(latent.mean)
    assert decoding.density_BCDHW.shape == (2, 8, 12, 12, 12)
    assert (decoding.cell_B6.shape, decoding.log_count_B.shape, decoding.composition_BE.shape) == ((2, 6), (2,), (2, 3))
    assert model.segment(decoding).shape == (2, 4, 12, 12, 12)


@pytest.mark.parametrize("shift", [(4, 0, 0), (0, 8, 4)])
def test_the_unet_commutes_with_periodic_translations(shift: tuple[int, int, int]) -> None:
    """By multiples of the coarsest voxel, exactly: every convolution wraps round."""
    torch.manual_seed(0)
    unet = AttentionUNet(5, 7, 4, 3).double()
    x = torch.randn(1, 5, 12, 12, 12, dtype=torch.float64)
    rolled = torch.roll(unet(x), shift, dims=(2, 3, 4))
    torch.testing.assert_close(unet(torch.roll(x, shift, dims=(2, 3, 4))), rolled)


@pytest.mark.parametrize("layer", [PeriodicConv(3, 4), Down(3, 4)])
def test_every_voxel_sees_as_much_as_every_other(layer: torch.nn.Module) -> None:
    """No edge: a constant field stays constant, which zero padding would spoil."""
    out = layer(torch.ones(1, 3, 8, 8, 8))
    torch.testing.assert_close(out, out.mean((2, 3, 4), keepdim=True).expand_as(out))


def test_pixel_shuffle_puts_eight_channels_into_a_block() -> None:
    x = torch.arange(16.0).reshape(1, 16, 1, 1, 1)
    out = pixel_shuffle_3d(x)
    assert out.shape == (1, 2, 2, 2, 2)
    assert out[0, 0].flatten().tolist() == list(range(8))


def test_gate_passes_present_elements_and_bars_absent_ones() -> None:
    gate = composition_gate(torch.tensor([[0.0, 1.0, 3.0]]))[0]
    assert gate[0] == 0
    assert gate[1] < gate[2] < gate[3]
    assert gate[2].item() == pytest.approx(0.0, abs=0.01)
    absent = composition_gate(torch.tensor([[-2.0]]))[0, 1]
    assert absent.item() == pytest.approx(math.log(0.002), abs=0.01)


def test_kl_of_known_gaussians() -> None:
    assert gaussian_kl(Latent(torch.zeros(4, 3), torch.zeros(4, 3))).item() == 0
    one = Latent(torch.tensor([[1.0]]), torch.tensor([[math.log(4.0)]]))
    assert gaussian_kl(one).item() == pytest.approx(0.5 * (1 + 4 - 1 - math.log(4)))


def test_relative_error_of_the_mean_is_one() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert squared_error(torch.zeros_like(x), x).item() == pytest.approx(1.0, abs=0.05)


def test_species_loss_looks_at_all_atoms_and_the_stated_share_of_background() -> None:
    species = make_batch(2).species_BDHW
    uniform = torch.rand(species.shape, generator=torch.Generator().manual_seed(0))
    mask = species_voxels(species, 3.0, uniform)
    assert mask[species > 0].all()
    ratio = (mask & (species == 0)).sum() / (species > 0).sum()
    assert ratio.item() == pytest.approx(3.0, rel=0.2)


def test_loss_is_the_weighted_sum_of_its_parts_and_reaches_every_parameter() -> None:
    weights = LossWeights(density=2.0, species=0.3, kl=0.01, lattice=0.4, count=0.5, composition=0.6)
    objective = JointObjective(make_model(), TrainConfig(loss=weights), CPU, torch.float32)
    loss, parts = objective(make_batch(), step_noise(0, 0, range(3), 1.0, 6, 12, CPU))
    assert loss.item() == pytest.approx(sum(getattr(weights, name) * part.item() for name, part in parts.items()))
    loss.backward()
    without = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_noise_is_a_function_of_seed_and_step_and_position_whatever_the_ranks() -> None:
    def noise(rank: int, ranks: int, step: int = 5) -> Noise:
        share = 8 // ranks
        return step_noise(3, step, range(rank * share, (rank + 1) * share), 0.5, 6, 12, CPU)

    whole = noise(0, 1)
    assert torch.equal(whole.latent_BL, noise(0, 1).latent_BL)
    assert not torch.equal(whole.latent_BL, noise(0, 1, step=6).latent_BL)
    assert len(whole.seen_b) == len(whole.voxels_bDHW) == 4
    for ranks in (2, 4):
        parts = [noise(rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.latent_BL for part in parts]), whole.latent_BL)
        assert torch.equal(torch.cat([part.voxels_bDHW for part in parts]), whole.voxels_bDHW)
        seen = torch.cat([part.seen_b + rank * 8 // ranks for rank, part in enumerate(parts)])
        assert torch.equal(seen, whole.seen_b)


def test_species_loss_of_a_batch_is_the_mean_of_its_halves() -> None:
    """What ranks need: crystals with many voxels and with few count alike."""
    logits, classes = torch.randn(9, 4), torch.randint(4, (9,))
    crystal = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
    whole = species_cross_entropy(logits, classes, crystal)
    halves = [species_cross_entropy(logits[c], classes[c], crystal[c] * 0) for c in (crystal == 0, crystal == 1)]
    assert whole.item() == pytest.approx(sum(half.item() for half in halves) / 2)


def test_cell_numbers_and_parameters_are_inverse() -> None:
    parameters = lengths_angles(from_lengths_angles(torch.tensor([3.0, 4.5, 7.25, 71.0, 93.0, 112.0]).numpy()))
    assert cell_parameters(cell_numbers(parameters)) == pytest.approx(parameters, rel=1e-5)


def test_bundle_brings_back_the_same_model(tmp_path: Path) -> None:
    model = make_model().eval()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {"step": 3})
    again, config = read_bundle(bundle)
    assert config["about"] == {"step": 3}
    assert again.config() == model.config()
    latent = torch.randn(2, 6)
    assert torch.equal(again.segment(again.decode(latent)), model.segment(model.decode(latent)))
    assert sorted(p.name for p in bundle.iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_damaged_bundle_is_refused_by_file(tmp_path: Path, name: str) -> None:
    model = make_model()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {})
    data = bytearray((bundle / name).read_bytes())
    data[10] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(ModelError, match="fetch the bundle again"):
        read_bundle(bundle)


def test_bundle_of_a_newer_format_and_no_bundle_are_refused(tmp_path: Path) -> None:
    from dist_train.files import sha256

    model = make_model()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {})
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    (bundle / "SHA256SUMS").write_text(
        "".join(f"{sha256(bundle / name)}  {name}\n" for name in ("config.json", "model.safetensors"))
    )
    with pytest.raises(ModelError, match="format 99"):
        read_bundle(bundle)
    with pytest.raises(ModelError, match="no model bundle"):
        read_bundle(tmp_path)


def test_adaptive_grids_and_empty_data_can_not_be_trained_on() -> None:
    with pytest.raises(ModelError, match="adaptive"):
        CrystalAutoencoder(GridSpec(shape="adaptive"), MODEL, (8,), STATISTICS)
    with pytest.raises(ModelError, match="no elements"):
        CrystalAutoencoder(GRID, MODEL, (), STATISTICS)
