"""What a served model answers, task by task: a bad row stays alone, and a bad request is one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_train.config import GridSpec, ModelConfig
from dist_train.crystal.cif import write_cif
from dist_train.crystal.structure import Crystal
from dist_train.errors import ModelError
from dist_train.models.autoencoder import CrystalAutoencoder, Statistics
from dist_train.models.reconstruct import Codec
from dist_train.serving import COLUMNS, MAX_ROWS, answer

Answer = list[dict[str, Any]]


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    grid = GridSpec(shape=12, max_spacing_A=0.5, channels=("occupancy", "period"))
    statistics = Statistics((0.1,) * 8, (0.5,) * 8, (1.4,) * 3 + (0.0,) * 3, (0.1,) * 6, math.log(5), 1.0)
    sizes = ModelConfig(latent=10, vae_widths=(4, 8), unet_width=4, unet_levels=2)
    codec = Codec(CrystalAutoencoder(grid, sizes, (8, 22, 56), statistics))
    codec.model.prior_cholesky.copy_(torch.diag(torch.arange(1.0, 11.0)))
    return codec


@pytest.fixture(scope="module")
def cifs(sample_table: Callable[[str], list[Crystal]]) -> list[str]:
    return [write_cif(crystal) for crystal in sample_table("perov_5")[:3]]


def rows(codec: Codec, table: dict[str, Any], **params: object) -> Answer:
    columns = answer(codec, table, params)
    assert tuple(columns) == COLUMNS
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def latents(found: Answer) -> list[torch.Tensor]:
    return [torch.tensor(json.loads(row["latent"])) for row in found]


def test_reconstruct_is_encode_then_decode(codec: Codec, cifs: list[str]) -> None:
    encoded = rows(codec, {"cif": cifs}, task="encode")
    assert all(row["latent"] and not row["cif"] and not row["error"] for row in encoded)
    decoded = rows(codec, {"latent": [row["latent"] for row in encoded]}, task="decode")
    reconstructed = rows(codec, {"cif": cifs})
    for one, other in zip(decoded, reconstructed, strict=True):
        assert bool(one["cif"]) != bool(one["error"])
        assert (one["cif"], one["latent"]) == (other["cif"], other["latent"])


BAD_CIFS = ["", None, float("nan"), 7, "not a cif", "data_x\n_cell_length_a nan", "data_x\n\0", "\ud800"]
BAD_LATENTS = ["", None, "[", "{}", "[1]", "[[1,2,3,4,5,6]]", "[1,2,3,4,5,NaN]", "[1,2,3,4,5,1e999]", '["a"]', "[" * 9999]


@pytest.mark.parametrize("task", ["reconstruct", "encode", "alter"])
def test_a_bad_crystal_is_an_error_in_its_row_alone(codec: Codec, cifs: list[str], task: str) -> None:
    found = rows(codec, {"cif": [cifs[0], *BAD_CIFS, cifs[1]]}, task=task)
    (first, *bad, last), alone = found, rows(codec, {"cif": cifs[:2]}, task=task)
    assert [first, last] == alone
    assert first["latent"]
    for place, row in enumerate(bad, 1):
        assert (row["cif"], row["latent"], row["confidence"]) == ("", "", 0.0)
        assert f"row {place}" in row["error"]
        assert "\n" not in row["error"]


def test_a_bad_latent_is_an_error_in_its_row_alone(codec: Codec) -> None:
    good = json.dumps([0.1] * 10)
    first, *bad, last = rows(codec, {"latent": [good, *BAD_LATENTS, good]}, task="decode")
    assert first == last
    assert first["latent"]
    for place, row in enumerate(bad, 1):
        assert f"row {place}" in row["error"]
        assert (row["cif"], row["latent"]) == ("", "")


def test_latents_far_from_all_crystals_are_no_failure(codec: Codec) -> None:
    for size in (1e3, 1e20, 3e38):
        (row,) = rows(codec, {"latent": [json.dumps([size] * 10)]}, task="decode")
        assert bool(row["cif"]) != bool(row["error"])


def test_crystals_that_the_grid_cannot_hold_are_told(codec: Codec, sample_table: Callable[[str], list[Crystal]]) -> None:
    large = max(sample_table("materials_project"), key=lambda crystal: crystal.lengths_angles[:3].max())
    (row,) = rows(codec, {"cif": [write_cif(large)]})
    assert "max_spacing_A" in row["error"] or "spacing" in row["error"]


def test_samples_follow_from_the_seed(codec: Codec) -> None:
    one, same, other = (rows(codec, {}, task="sample", n=3, seed=seed) for seed in (1, 1, 2))
    assert len(one) == 3
    assert one == same
    assert not torch.equal(latents(one)[0], latents(other)[0])
    assert rows(codec, {"cif": ["ignored"]}, task="sample", n=3, seed=1) == one


def test_interpolation_goes_from_each_row_to_the_next(codec: Codec, cifs: list[str]) -> None:
    ends = latents(rows(codec, {"cif": cifs}, task="encode"))
    found = latents(rows(codec, {"cif": cifs}, task="interpolate", steps=3))
    assert len(found) == 6
    for place, point in enumerate((ends[0], (ends[0] + ends[1]) / 2, ends[1], ends[1], (ends[1] + ends[2]) / 2, ends[2])):
        torch.testing.assert_close(found[place], point)
    mixed = rows(codec, {"cif": [cifs[0], "bad", cifs[2], cifs[1]]}, task="interpolate", steps=2)
    assert ["row 1" in row["error"] for row in mixed] == [True, True, True, True, False, False]


def test_altered_crystals_lie_at_the_radius(codec: Codec, cifs: list[str]) -> None:
    centre = latents(rows(codec, {"cif": cifs[:1]}, task="encode"))[0]
    params: dict[str, object] = {"task": "alter", "n": 4, "radius": 0.5, "seed": 3}
    found = rows(codec, {"cif": cifs[:1]}, **params)
    assert found == rows(codec, {"cif": cifs[:1]}, **params)
    for near in latents(found):
        assert ((near - centre) / torch.arange(1.0, 11.0)).norm().item() == pytest.approx(0.5, rel=1e-3)
    others = rows(codec, {"cif": cifs[:1]}, **params | {"seed": 4})
    assert len({row["latent"] for row in found + others}) == 8
    (unmoved,) = latents(rows(codec, {"latent": [json.dumps(centre.tolist())]}, task="alter", radius=0.0))
    torch.testing.assert_close(unmoved, centre)


def test_a_table_without_the_column_is_refused(codec: Codec) -> None:
    for task, table, told in (
        ("reconstruct", {}, "cif"),
        ("decode", {"cif": ["x"]}, "latent"),
        ("alter", {}, "latent or cif"),
    ):
        with pytest.raises(ModelError, match=f"{task} takes a table with the column {told}, this one has"):
            answer(codec, table, {"task": task})


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"task": "dream"}, "task 'dream' is unknown, known are reconstruct, encode, decode, sample, interpolate, alter"),
        (
            {"temperature": 1},
            "param 'temperature' is unknown, known are task, n, steps, seed, radius, replace, scale, within, of, path",
        ),
        ({"task": "sample", "n": 0}, "param n = 0: input should be greater than or equal to 1"),
        ({"task": "sample", "n": MAX_ROWS + 1}, f"at most {MAX_ROWS} can be had"),
        ({"task": "interpolate", "steps": 1}, "param steps = 1: "),
        ({"task": "alter", "radius": -1.0}, "param radius = -1.0: "),
        ({"task": "alter", "radius": float("inf")}, "param radius = inf: "),
        ({"task": "sample", "seed": -1}, "param seed = -1: "),
        ({"task": "interpolate"}, "interpolate takes two rows or more, 1 were given"),
    ],
)
def test_requests_that_make_no_sense_are_one_line(codec: Codec, params: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as error:
        answer(codec, {"cif": ["x"]}, params)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
