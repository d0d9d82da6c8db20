"""Pages of what a released model generates: every output is in its place, with its density; a browser draws them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import ROOT
from test_report import RECORD_ERRORS, TOOLS, Page, browse, densities_of, needs_browser, values

from dist_train.commands.models import load_codec
from dist_train.config import GridSpec, ModelConfig
from dist_train.crystal.cif import parse_cif, write_cif
from dist_train.crystal.decode import Decoded
from dist_train.crystal.frames import representable
from dist_train.crystal.structure import Crystal
from dist_train.crystal.voxelize import voxelize
from dist_train.densities import generated_densities, reconstructed_densities
from dist_train.generate import decode, encode, interpolate_latents, sample_latents
from dist_train.generate_report import MAX_SHOWN, Output, write_generation_report
from dist_train.models.autoencoder import CrystalAutoencoder, Statistics
from dist_train.models.reconstruct import Codec

SampleTable = Callable[[str], list[Crystal]]
COLUMNS = ("id", "verdict")
FAILED = Decoded(None, np.zeros(0), "two atoms 0.2 A apart")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec(str(ROOT / "data" / "models" / "perov_5"), None)[0]


@pytest.fixture(scope="module")
def crystals(codec: Codec, sample_table: SampleTable) -> list[Crystal]:
    return [representable(crystal, codec.model.grid) for crystal in sample_table("perov_5")[:3]]


@pytest.fixture(scope="module")
def reconstructed(codec: Codec, crystals: list[Crystal]) -> list[Decoded]:
    return list(decode(codec, encode(codec, crystals), [crystal.id for crystal in crystals]))


@pytest.fixture(scope="module")
def page(
    codec: Codec, crystals: list[Crystal], reconstructed: list[Decoded], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three reconstructions, the second of which is said to have failed."""
    path = tmp_path_factory.mktemp("generated") / "report.html"
    decoded = [reconstructed[0], FAILED, reconstructed[2]]
    ids = [crystal.id for crystal in crystals]
    write_generation_report(
        path,
        title="Reconstructions",
        summary="3 crystals",
        metrics={"match rate": 2 / 3},
        outputs=[Output(*row) for row in zip(ids, decoded, crystals, ("match", "", "match"), strict=True)],
        columns=COLUMNS,
        rows=list(zip(ids, ("match", FAILED.reason, "match"), strict=True)),
        densities=reconstructed_densities(codec, ids, crystals, decoded),
    )
    return path


def data_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Page(path.read_text(encoding="utf-8")).texts["data"][0])
    return found


def test_reconstructions_lie_beside_their_crystals_and_failures_stay(
    page: Path, crystals: list[Crystal], reconstructed: list[Decoded]
) -> None:
    pairs = data_of(page)["pairs"]
    assert [pair["left"] for pair in pairs] == [write_cif(crystal) for crystal in crystals]
    assert [parse_cif(pairs[i]["right"], "x", 100).composition for i in (0, 2)] == [
        decoded.crystal.composition for decoded in (reconstructed[0], reconstructed[2]) if decoded.crystal
    ]
    assert (pairs[1]["right"], pairs[1]["note"]) == (None, FAILED.reason)
    text = Page(page.read_text()).texts
    assert text["td"].count(FAILED.reason) == 1 and text["td"].count("match") == 2
    assert [name for name in text["button"] if name in COLUMNS] == list(COLUMNS)


def test_densities_are_those_of_the_true_grid_and_of_the_networks(page: Path, codec: Codec, crystals: list[Crystal]) -> None:
    latents = encode(codec, crystals)
    fields = codec.fields(latents, [(12, 12, 12)] * 3)
    for found, crystal, field in zip(densities_of(page), crystals, fields, strict=True):
        assert found["channels"][0] == codec.channel
        true = voxelize(crystal, codec.model.grid).density_CDHW
        for which, density in enumerate((true, field.density_CDHW)):
            order = [codec.channel_place, *(i for i in range(len(density)) if i != codec.channel_place)]
            step = (np.array(found["high"]) - found["low"])[:, None, None, None] / 255
            assert (np.abs(values(found, which) - density[order]) <= 0.51 * step).all()
        # The atoms of the true crystal lie where its grid is dense.
        volume = values(found, 0)[0]
        for _, frac in found["volumes"][0]["atoms"]:
            assert volume[tuple(np.round(12 * np.array(frac)).astype(int) % 12)] > 0.5
        assert found["volumes"][0]["extent"] == pytest.approx(crystal.lattice_A.round(6))
    assert densities_of(page)[1]["note"] == f"No crystal was made of it: {FAILED.reason}"


@pytest.mark.parametrize("frame", ["cell", "window"])
def test_the_channel_of_places_comes_first_and_cubes_are_no_cells(crystals: list[Crystal], frame: str) -> None:
    """With networks that were not trained."""
    spec = GridSpec(frame=frame, shape=32, box_A=9.3, sigma_A=0.5, channels=("period", "occupancy"), canonical=False)
    sizes = ModelConfig(latent=6, vae_widths=(4,), unet_width=4, unet_levels=2)
    statistics = Statistics((0.0,) * 8, (1.0,) * 8, (1.0,) * 6, (0.1,) * 6, 1.6, 0.1)
    codec = Codec(CrystalAutoencoder(spec, sizes, tuple(crystals[0].composition), statistics))
    (found,) = reconstructed_densities(codec, ["x"], crystals[:1], [FAILED])
    assert found.channels == ("occupancy", *(f"period-{i}" for i in range(1, 8)))
    density = voxelize(crystals[0], spec).density_CDHW
    true, decoded = found.volumes
    assert (true.density_CDHW[0] == density[7]).all() and (true.density_CDHW[1:] == density[:7]).all()
    assert decoded.density_CDHW.shape == (8, 32, 32, 32)
    if frame == "cell":
        assert true.periodic and (true.extent_33 == crystals[0].lattice_A).all() and true.crystal is crystals[0]
    else:
        assert not true.periodic and true.crystal is None
        assert true.extent_33 == pytest.approx(np.eye(3) * 9.3 * 32 / 31)


@pytest.mark.parametrize("is_path", [False, True])
def test_samples_fill_a_gallery_and_steps_an_animation(
    codec: Codec, crystals: list[Crystal], tmp_path: Path, is_path: bool
) -> None:
    if is_path:
        latents, ids = interpolate_latents(*encode(codec, crystals[:2]), 4), [f"step-{i}" for i in range(4)]
    else:
        latents, ids = sample_latents(codec, 4, 0), [f"sample-{i}" for i in range(4)]
    decoded = [*list(decode(codec, latents, ids))[:3], FAILED]
    path = tmp_path / "report.html"
    write_generation_report(
        path,
        title="t",
        summary="s",
        outputs=[Output(*row) for row in zip(ids, decoded, strict=True)],
        columns=COLUMNS,
        rows=[],
        is_path=is_path,
        densities=generated_densities(codec, ids, latents, decoded),
    )
    data = data_of(path)
    shown, empty = (data["path"], data["samples"]) if is_path else (data["samples"], data["path"])
    assert not empty and not data["pairs"]
    assert [view["cif"] for view in shown[:3]] == [write_cif(item.crystal) for item in decoded[:3] if item.crystal]
    assert shown[3] == {"title": f"{ids[3]}: not decoded", "cif": None, "note": FAILED.reason}
    assert [[volume["label"] for volume in density["volumes"]] for density in data["densities"]] == [["decoded"]] * 4


def test_other_columns_and_a_page_that_stays_small(reconstructed: list[Decoded], tmp_path: Path) -> None:
    n = 10 * MAX_SHOWN + 5
    outputs = [Output(str(i), reconstructed[0]) for i in range(n)]
    rows = [(i, "yes") for i in range(n)]
    write_generation_report(tmp_path / "r.html", title="t", summary="s", outputs=outputs, columns=("n", "novel"), rows=rows)
    text = (tmp_path / "r.html").read_text()
    assert len(data_of(tmp_path / "r.html")["samples"]) == MAX_SHOWN
    assert text.count("<tr>") == 1 + 10 * MAX_SHOWN
    assert f"The first {10 * MAX_SHOWN} of {n} are listed. The first {MAX_SHOWN} are shown in 3-D." in text


@needs_browser
def test_a_browser_shows_the_page(page: Path) -> None:
    probe = """<script>{
      const channels = $$("#densities select").at(-1);
      const seen = [0, 1].map((channel) => {
        channels.selectedIndex = channel;
        channels.onchange();
        return $$("canvas.slice").map((canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        });
      });
      root.dataset.seen = JSON.stringify(seen);
    }</script>"""
    found = browse(page, RECORD_ERRORS, TOOLS + probe)
    assert found.root["data-errors"] == "" and found.root["data-ready"] == "true"
    assert np.min(json.loads(found.root["data-seen"])) > 50
