"""The networks: shapes, periodicity, what their gate and cell numbers say, and the bundle they travel in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import ADAPTIVE, CUBE, ELEMENTS, LIGHT, PAPER, SPATIAL, WIDE, WINDOW, make_model

from dist_train.config import GridSpec, ModelConfig
from dist_train.crystal.lattice import from_lengths_angles, lengths_angles
from dist_train.crystal.voxelize import Shape
from dist_train.errors import ModelError
from dist_train.files import sha256
from dist_train.models.autoencoder import (
    CrystalAutoencoder,
    cell_numbers,
    cell_parameters,
    check_grid,
    composition_gate,
)
from dist_train.models.blocks import Style
from dist_train.models.export import compact, read_bundle, start_from, write_bundle
from dist_train.models.flow import LatentFlow
from dist_train.models.losses import gaussian_kl
from dist_train.models.unet import AttentionUNet
from dist_train.models.vae import latent_shape, shape_numbers, shape_of

STYLES = [Style(), Style(paper=True, groups=2)]


def randomised(model: CrystalAutoencoder) -> CrystalAutoencoder:
    """The model with random weights where it begins with zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_shapes_from_grid_to_latent_and_back() -> None:
    model = make_model()
    latent = model.encode(torch.randn(2, 8, 12, 12, 12), torch.randn(2, 6))
    assert latent.mean.shape == latent.log_variance.shape == (2, LIGHT.latent)
    decoding = model.decode(latent.mean)
    assert decoding.density_BCDHW.shape == (2, 8, 12, 12, 12)
    assert (decoding.cell_B6.shape, decoding.log_count_B.shape, decoding.composition_BE.shape) == ((2, 6), (2,), (2, 3))
    assert model.segment(decoding).shape == (2, 4, 12, 12, 12)


@pytest.mark.parametrize("style", STYLES, ids=["light", "paper"])
@pytest.mark.parametrize("shift", [(4, 0, 0), (0, 8, 4)])
def test_the_unet_commutes_with_periodic_translations(shift: tuple[int, int, int], style: Style) -> None:
    """By multiples of the coarsest voxel, exactly: every convolution wraps round."""
    torch.manual_seed(0)
    unet = AttentionUNet(5, 7, 4, 3, style).double()
    x = torch.randn(1, 5, 12, 8, 16, dtype=torch.float64)
    rolled = torch.roll(unet(x), shift, dims=(2, 3, 4))
    torch.testing.assert_close(unet(torch.roll(x, shift, dims=(2, 3, 4))), rolled)


def test_the_unet_of_a_box_has_an_outside() -> None:
    """What lies at one face of a window has nothing to do with the opposite face."""
    torch.manual_seed(0)
    unet = AttentionUNet(1, 2, 4, 3, Style(periodic=False)).double()
    x = torch.zeros(1, 1, 30, 30, 30, dtype=torch.float64)
    touched = x.clone()
    touched[:, :, 0] = 1.0
    change = (unet(touched) - unet(x)).abs().amax((0, 1, 3, 4))
    assert change[0] > 1e-3
    assert change[-1] == 0


@pytest.mark.parametrize("model", [LIGHT, PAPER, SPATIAL, WIDE], ids=["light", "paper", "spatial", "wide"])
def test_one_model_takes_cells_of_all_shapes_and_gives_the_shape_asked_for(model: ModelConfig) -> None:
    network = make_model(ADAPTIVE, model)
    for shape in ((8, 16, 16), (16, 24, 40)):
        latent = network.encode(torch.randn(2, 8, *shape), torch.randn(2, 6)).mean
        assert latent.shape == (2, model.latent_size)
        decoding = network.decode(latent, shape)
        assert decoding.density_BCDHW.shape == (2, 8, *shape)
        assert network.segment(decoding).shape == (2, 4, *shape)


@pytest.mark.parametrize("model", [LIGHT, PAPER], ids=["light", "paper"])
def test_boxes_of_sizes_that_can_not_be_halved_keep_them(model: ModelConfig) -> None:
    network = make_model(WINDOW, model)
    decoding = network.decode(network.encode(torch.randn(1, 1, 30, 30, 30), torch.randn(1, 6)).mean)
    assert decoding.density_BCDHW.shape == (1, 1, 30, 30, 30)
    assert network.segment(decoding).shape == (1, 4, 30, 30, 30)


def test_the_coarse_grid_decides_how_large_the_linear_layers_are() -> None:
    model = LIGHT.model_copy(update={"coarse": 2})
    network = make_model(CUBE, model)
    assert network.encoder.head.out.in_features == 8 * 2**3 + 64
    assert network.decode(torch.randn(1, LIGHT.latent)).density_BCDHW.shape == (1, 8, 12, 12, 12)


@pytest.mark.parametrize("model", [SPATIAL, WIDE], ids=["spatial", "wide"])
@pytest.mark.parametrize("shift", [(4, 0, 0), (0, 8, 4)])
def test_a_spatial_latent_moves_with_the_crystal(shift: Shape, model: ModelConfig) -> None:
    network = make_model(ADAPTIVE, model).eval()
    latent = randomised(network).encode(x := torch.randn(2, 8, 16, 16, 16), cell := torch.randn(2, 6)).mean
    moved = network.encode(x.roll(shift, (2, 3, 4)), cell).mean
    torch.testing.assert_close(moved[:, :10], latent[:, :10])
    coarse = latent[:, 10:].reshape(2, 3, 4, 4, 4)
    assert coarse.std((2, 3, 4)).min() > 1e-4
    torch.testing.assert_close(moved[:, 10:].reshape(2, 3, 4, 4, 4), coarse.roll([s // 4 for s in shift], (2, 3, 4)))
    was, is_ = network.decode(latent, (16, 16, 16)), network.decode(moved, (16, 16, 16))
    torch.testing.assert_close(is_.density_BCDHW, was.density_BCDHW.roll(shift, (2, 3, 4)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(is_.composition_BE, was.composition_BE)


@pytest.mark.parametrize(
    ("shape", "coarse"),
    [((16, 16, 16), (4, 4, 4)), ((8, 8, 8), (4, 4, 4)), ((8, 8, 32), (2, 3, 10)), ((16, 16, 24), (3, 4, 5)),
     ((8, 8, 256), (1, 1, 64)), ((8, 16, 24), (2, 4, 8)), ((8, 16, 16), (2, 5, 6))],
)  # fmt: skip
def test_the_coarse_grid_has_voxels_that_are_near_to_cubes(shape: Shape, coarse: Shape) -> None:
    assert latent_shape(shape, 64) == coarse


def test_wide_layers_for_atoms_hear_of_all_the_latent() -> None:
    shape, latent = (8, 8, 32), torch.randn(2, SPATIAL.latent_size)
    for model, heard in ((SPATIAL, False), (WIDE, True)):
        network = make_model(ADAPTIVE, model)
        changed = network.decoder.composition(latent + torch.nn.functional.one_hot(torch.tensor(10), 202), shape)
        assert torch.equal(changed, network.decoder.composition(latent, shape)) != heard
        assert torch.equal(network.decode(latent, shape).composition_BE, network.decoder.composition(latent, shape))


@pytest.mark.parametrize("model", [SPATIAL, WIDE], ids=["spatial", "wide"])
def test_what_a_small_coarse_grid_leaves_of_the_latent_is_free_and_unread(model: ModelConfig) -> None:
    network = randomised(make_model(ADAPTIVE, model))
    posterior = network.encode(torch.randn(2, 8, 8, 8, 32), torch.randn(2, 6))
    used = 10 + 3 * math.prod(latent_shape((8, 8, 32), 64))
    assert used < posterior.mean.shape[1]
    kl = gaussian_kl(posterior)
    assert kl[:, :used].min() > 0
    assert (kl[:, used:] == 0).all()
    latent = torch.randn(2, SPATIAL.latent_size)
    other = torch.cat([latent[:, :used], torch.randn(2, SPATIAL.latent_size - used)], 1)
    for a, b in zip(network.decode(latent, (8, 8, 32)), network.decode(other, (8, 8, 32)), strict=True):
        assert torch.equal(a, b)


def test_the_shape_of_an_adaptive_grid_comes_back_from_its_numbers() -> None:
    for shape in ((8, 8, 8), (16, 24, 40), (8, 96, 104)):
        assert shape_of(shape_numbers(shape, torch.zeros(1, 6))[0].numpy(), 8) == shape
    assert shape_of(np.array([-9.0, 0.3, 99.0]), 4) == (4, 20, 4096)


def test_names_and_order_of_parameters_stay_for_bundles_that_are_out_there() -> None:
    model = make_model()
    layers = dict.fromkeys(name.rpartition(".")[0] for name in model.state_dict() if "." in name)
    assert list(layers) == [
        "encoder.down.0.0", "encoder.down.1.0", "encoder.head.cell", "encoder.head.out",
        "decoder.root.expand", "decoder.known", "decoder.atoms.0", "decoder.atoms.2",
        "decoder.up.1", "decoder.up.3.conv", "decoder.out.conv",
        "unet.first.0", "unet.first.2", "unet.down.0.0.0", "unet.down.0.1", "unet.up.0.conv",
        "unet.gate.0.skip", "unet.gate.0.gate", "unet.gate.0.weight", "unet.merge.0.0", "unet.classifier",
    ]  # fmt: skip
    assert model.decoder.up[1].weight.shape == (8, 8, 3, 3, 3)
    assert model.encoder.down[0][0].weight.shape == (4, 8, 4, 4, 4)
    assert model.encoder.head.out.in_features == 8 * 3**3 + 64


def test_gate_passes_present_elements_and_bars_absent_ones() -> None:
    gate = composition_gate(torch.tensor([[0.0, 1.0, 3.0]]))[0]
    assert gate[0] == 0
    assert gate[1] < gate[2] < gate[3]
    assert gate[2].item() == pytest.approx(0.0, abs=0.01)
    absent = composition_gate(torch.tensor([[-2.0]]))[0, 1]
    assert absent.item() == pytest.approx(math.log(0.002), abs=0.01)


def test_cell_numbers_and_parameters_are_inverse() -> None:
    parameters = lengths_angles(from_lengths_angles(torch.tensor([3.0, 4.5, 7.25, 71.0, 93.0, 112.0]).numpy()))
    assert cell_parameters(cell_numbers(parameters)) == pytest.approx(parameters, rel=1e-5)


def test_bundle_brings_back_the_same_model(tmp_path: Path) -> None:
    model = make_model().eval()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {"step": 3})
    again, config = read_bundle(bundle)
    assert config["about"] == {"step": 3}
    assert again.config() == model.config()
    latent = torch.randn(2, LIGHT.latent)
    assert torch.equal(again.segment(again.decode(latent)), model.segment(model.decode(latent)))
    assert sorted(p.name for p in bundle.iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors"]


def test_a_small_bundle_keeps_the_prior_to_a_part_in_250_and_the_rest_in_half_precision(tmp_path: Path) -> None:
    model = make_model().eval()
    model.flow = LatentFlow(LIGHT.latent, 16, 1)
    with torch.no_grad():
        model.flow.first.weight[3] = 0.0
        model.flow.first.weight[4] *= 1000.0
    small = compact(model.state_dict())
    kept, _ = read_bundle(write_bundle(tmp_path / "bundle", model, small, {}))
    for name, before in model.state_dict().items():
        after = kept.state_dict()[name]
        if small[name].dtype == torch.int8:
            assert ((after - before).abs() <= before.abs().amax(1, keepdim=True) / 253).all()
        else:
            assert torch.equal(after, before.half().float())
    assert {name for name, value in small.items() if value.dtype == torch.int8} >= {"flow.first.weight", "flow.last.weight"}
    again = compact(kept.state_dict())
    assert all(torch.equal(again[name], value) for name, value in small.items() if value.dtype == torch.int8)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_damaged_bundle_is_refused_by_file(tmp_path: Path, name: str) -> None:
    model = make_model()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {})
    data = bytearray((bundle / name).read_bytes())
    data[10] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(ModelError, match="fetch the bundle again"):
        read_bundle(bundle)


@pytest.mark.parametrize(("number", "told"), [(99, "format 99, .* update it"), (1, "format 1, .* train it anew")])
def test_bundle_of_another_format_and_no_bundle_are_refused(tmp_path: Path, number: int, told: str) -> None:
    model = make_model()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {})
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "format_version": number}))
    (bundle / "SHA256SUMS").write_text(
        "".join(f"{sha256(bundle / name)}  {name}\n" for name in ("config.json", "model.safetensors"))
    )
    with pytest.raises(ModelError, match=told):
        read_bundle(bundle)
    with pytest.raises(ModelError, match="no model bundle"):
        read_bundle(tmp_path)


def test_a_bundle_from_before_the_newer_settings_is_read(tmp_path: Path) -> None:
    model = make_model()
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {})
    config = json.loads((bundle / "config.json").read_text())
    config["model"] = {name: config["model"][name] for name in ("latent", "vae_widths", "unet_width", "unet_levels")}
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "SHA256SUMS").write_text(
        "".join(f"{sha256(bundle / name)}  {name}\n" for name in ("config.json", "model.safetensors"))
    )
    again, _ = read_bundle(bundle)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_run_starts_from_a_bundle_of_its_own_kind_alone(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.unet.classifier.bias.fill_(3.0)
    bundle = write_bundle(tmp_path / "bundle", model, model.state_dict(), {})
    found = start_from(bundle, CUBE, LIGHT, ELEMENTS)
    assert found.training
    assert found.statistics == model.statistics
    assert (found.unet.classifier.bias == 3.0).all()
    for grid, sizes, elements, told in (
        (CUBE.model_copy(update={"sigma_A": 0.4}), LIGHT, ELEMENTS, r"another grid: sigma_A is 0\.5 there, 0\.4 here"),
        (CUBE, PAPER, ELEMENTS, r"another model: vae_widths is \[4, 8\] there"),
        (CUBE, LIGHT, (8, 22), r"another elements: .*\(8, 22, 56\) there, \(8, 22\) here"),
    ):
        with pytest.raises(ModelError, match=told):
            start_from(bundle, grid, sizes, elements)


@pytest.mark.parametrize(("there", "here"), [(SPATIAL, WIDE), (WIDE, SPATIAL)], ids=["wider", "narrower"])
def test_a_run_can_start_with_other_layers_for_the_atoms(tmp_path: Path, there: ModelConfig, here: ModelConfig) -> None:
    old = make_model(ADAPTIVE, there, seed=1)
    bundle = write_bundle(tmp_path / "bundle", old, old.state_dict(), {})
    torch.manual_seed(5)
    found, again = start_from(bundle, ADAPTIVE, here, ELEMENTS), make_model(ADAPTIVE, here, seed=5)
    assert found.model == here
    assert found.statistics == old.statistics
    for name, value in found.state_dict().items():
        fresh = name.startswith(("decoder.atoms.", "decoder.local_atoms."))
        assert torch.equal(value, (again if fresh else old).state_dict()[name]), name


def test_a_run_can_start_with_more_room_for_larger_crystals(tmp_path: Path) -> None:
    old = make_model(ADAPTIVE, SPATIAL, seed=1)
    old.prior_mean.fill_(3.0)
    bundle = write_bundle(tmp_path / "bundle", old, old.state_dict(), {})
    assert SPATIAL.latent_voxels
    grid = ADAPTIVE.model_copy(update={"max_voxels": 2 * ADAPTIVE.max_voxels})
    sizes = SPATIAL.model_copy(update={"latent_voxels": 3 * SPATIAL.latent_voxels})
    found = start_from(bundle, grid, sizes, ELEMENTS)
    assert (found.grid, found.model) == (grid, sizes)
    assert found.prior_mean.eq(0).all()
    assert len(found.prior_mean) == sizes.latent_size
    for name, value in found.state_dict().items():
        if not name.startswith("prior_"):
            assert torch.equal(value, old.state_dict()[name]), name


def test_grids_without_atoms_and_empty_data_can_not_be_trained_on() -> None:
    with pytest.raises(ModelError, match="lack 'occupancy' or 'z_density'"):
        make_model(GridSpec(channels=("period",)))
    with pytest.raises(ModelError, match="no elements"):
        CrystalAutoencoder(CUBE, LIGHT, (), make_model().statistics)


def test_the_channel_that_atoms_are_decoded_from_is_found_behind_others() -> None:
    assert check_grid(GridSpec(channels=("period", "occupancy"))) == ("occupancy", 7)
    assert check_grid(GridSpec(channels=("z_density", "occupancy"))) == ("occupancy", 1)
    assert check_grid(GridSpec(channels=("group", "z_density"))) == ("z_density", 18)
