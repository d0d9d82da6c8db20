"""Settings: what is refused and in which words, overrides, and round trips through YAML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dist_train.config import GRID_PRESETS, GridSpec, RunConfig, load_config
from dist_train.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[1] / "launch" / "runs").glob("*.yaml"))


def refusal(*overrides: str) -> str:
    """The message with which these overrides of the defaults are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def said(resolved: Any, given: Any) -> bool:
    """Whether all that is given is resolved as it stands there; other keys change what a preset stands for."""
    if not isinstance(given, dict):
        return bool(resolved == given)
    return all(said(resolved[key], value) for key, value in given.items() if key != "preset")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_run_files_load_and_say_what_they_set(path: Path) -> None:
    resolved = load_config(path).model_dump(mode="json")
    for section, values in yaml.safe_load(path.read_text()).items():
        assert said(resolved[section], values), section


def test_run_files_are_shipped() -> None:
    assert {"demo.yaml", "families.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("grid.shape=adaptive", "grid.channels=[occupancy, f_block]", "train.stop_after_step=7"),
        ("grid.frame=window", "grid.random_rotation=true", "grid.random_origin=true", "grid.shape=32"),
        ("grid.preset=paper-unit", "grid.shape=32", "grid.niggli=true"),
        ("grid.channels=[table, occupancy]", "grid.element_table={O: [1, -0.25], 'No': [0.5, 1e-3]}"),
        ("data.splits={train: 0.5, holdout: 0.5}", "data.inputs=[a b.cif, 'c:d']", "data.ray_address=auto"),
        ("engine.deepspeed_json=x/y.json", "tracking.uri=sqlite:///a.db", "run_dir=runs/ü"),
        ("train.learning_rate=1e-3", "train.loss.kl=1e-300", "grid.max_spacing_A=0.1", "seed=4294967295"),
    ],
)
def test_yaml_round_trip(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = load_config(None, overrides)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_yaml_round_trip_of_shipped_files(tmp_path: Path, path: Path) -> None:
    (tmp_path / "again.yaml").write_text(load_config(path).to_yaml())
    assert load_config(tmp_path / "again.yaml") == load_config(path)


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ntrain: {epochs: 5, global_batch_size: 8}\n")
    config = load_config(path, ("train.epochs=6", "train.epochs=7", "grid.sigma_A=0.4", "train.learning_rate=1e-4"))
    assert (config.seed, config.train.epochs, config.train.global_batch_size, config.grid.sigma_A) == (3, 7, 8, 0.4)
    assert config.train.learning_rate == 1e-4


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == load_config() == RunConfig()


def test_overrides_read_yaml_values() -> None:
    config = load_config(None, ("model.vae_widths=[8, 16, 32]", "grid.niggli=false", "tracking.uri=null", "run_dir=a=b"))
    assert (config.model.vae_widths, config.grid.niggli, config.tracking.uri) == ((8, 16, 32), False, None)
    assert config.run_dir == Path("a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "train.epoch = 3: unknown key; did you mean 'epochs'?"),
        ("trian.epochs=3", "did you mean 'train'?"),
        ("train.loss.specie=1", "train.loss.specie = 1: unknown key; did you mean 'species'?"),
        ("grid.qqqqqq=1", "grid.qqqqqq = 1: unknown key; known keys: frame, shape, multiple"),
        ("train.epochs=many", "train.epochs = 'many': input should be a valid integer"),
        ("train.epochs=2.5", "train.epochs = 2.5: input should be a valid integer"),
        ("train.epochs=0", "train.epochs = 0: input should be greater than or equal to 1"),
        ("train.precision=fp8", "train.precision = 'fp8': input should be 'bf16', 'fp16' or 'fp32'"),
        ("train.learning_rate=0", "train.learning_rate = 0: input should be greater than 0"),
        ("train.learning_rate=.nan", "train.learning_rate = nan: "),
        ("train.ema_decay=1", "train.ema_decay = 1: input should be less than 1"),
        ("grid.niggli=perhaps", "grid.niggli = 'perhaps': input should be a valid boolean"),
        ("grid=5", "grid = 5: input should be a valid dictionary"),
        ("grid.channels=[]", "grid: channels [] must name at least one channel, each once"),
        ("grid.channels=[occupancy, occupancy]", "grid: channels ['occupancy', 'occupancy'] must name"),
        ("grid.channels=[colour]", "grid.channels.0 = 'colour': input should be 'occupancy'"),
        ("data.splits={train: 0.8, test: 0.1}", "data: splits {'train': 0.8, 'test': 0.1} add up to 0.9, not 1"),
        ("data.splits={train: 1.5, test: -0.5}", "data.splits.train = 1.5: input should be less than or equal to 1"),
        ("data.copies=2", "data.copies 2 would be equal: set grid.random_origin (cells, windows) or grid.random_rotation"),
        ("data.splits={a b: 1}", "data.splits"),
        ("data.split_ids={../x: f.txt}", "data.split_ids"),
        ("model.unet_levels=1", "model.unet_levels = 1: input should be greater than or equal to 2"),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_remedy(override: str, message: str) -> None:
    assert message in refusal(override)


def test_a_cube_that_the_networks_cant_halve_is_for_voxelising_alone() -> None:
    load_config(None, ("grid.shape=32",)).check_halvings()
    with pytest.raises(
        ConfigError, match=r"grid\.shape 30 must be a multiple of 4 for 2 halvings of model\.vae_widths and 3 "
    ):
        load_config(None, ("grid.shape=30",)).check_halvings()


def test_boxes_are_filled_up_and_have_no_coarse_grid_of_their_own() -> None:
    load_config(None, ("grid.preset=paper-unit", "model.preset=paper")).check_halvings()
    with pytest.raises(ConfigError, match=r"model\.coarse 4 is for .*: set it to null"):
        load_config(None, ("grid.preset=paper-unit", "model.coarse=4")).check_halvings()


def test_adaptive_grids_can_be_halved_three_times() -> None:
    load_config(None, ("grid.shape=adaptive", "model.unet_levels=4")).check_halvings()
    for deep in ("model.unet_levels=5", "model.vae_widths=[1, 2, 3, 4]"):
        with pytest.raises(ConfigError, match=r"grid\.multiple 8 must be a multiple of 16 for "):
            load_config(None, ("grid.shape=adaptive", deep)).check_halvings()
        load_config(None, ("grid.shape=adaptive", "grid.multiple=16", deep)).check_halvings()


def test_model_presets_can_be_changed() -> None:
    model = load_config(None, ("model.preset=paper", "model.latent=7")).model
    assert (model.latent, model.unet_width, model.blocks) == (7, 64, "paper")
    assert "known are cell-tiny, cell-small, cell-base, cell-large, paper" in refusal("model.preset=huge")
    assert "norm_groups 3 must divide all of vae_widths [32, 64] and unet_width 8" in refusal("model.norm_groups=3")
    assert "vae_halvings 3 is more than the 2 vae_widths" in refusal("model.vae_halvings=3")
    assert load_config(None, ("model.preset=cell-small",)).model == load_config().model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("grid.frame=box",), "grid.frame = 'box': input should be 'cell', 'window' or 'unit'"),
        (("grid.preset=big",), "grid: preset 'big' is unknown, known are default, paper-unit, paper-window"),
        (
            ("data.encoding=compact", "grid.channels=[table]", "grid.element_table={O: [-1]}"),
            "data.encoding 'compact' holds square roots: no height in grid.element_table may be negative",
        ),
        (("grid.preset=paper-window", "grid.shape=adaptive"), "shape 'adaptive' is for the frame 'cell'; give a window a"),
        (("grid.frame=unit", "grid.shape=adaptive"), "shape 'adaptive' is for the frame 'cell'; give a unit a number"),
        (("grid.random_rotation=true",), "random_rotation has no effect on the frame 'cell', whose axes turn with"),
        (("grid.frame=unit", "grid.random_origin=true"), "random_origin has no effect on the frame 'unit'"),
        (
            ("grid.frame=window", "grid.shape=31"),
            "box_A 9.3 on shape 31 gives a spacing of 0.3100 A, over max_spacing_A 0.3",
        ),
        (("grid.frame=unit", "grid.box_A=0"), "grid.box_A = 0: input should be greater than 0"),
        (("grid.channels=[table]",), "grid: the channel 'table' and element_table go together: give both or neither"),
        (("grid.element_table={O: [1]}",), "grid: the channel 'table' and element_table go together"),
        (("grid.channels=[table]", "grid.element_table={O: [1], H: [1, 2]}"), "every element the same number of heights"),
        (("grid.channels=[table]", "grid.element_table={O: [], H: [1]}"), "the same number of heights, at least one"),
        (("grid.channels=[table]", "grid.element_table={O: []}"), "the same number of heights, at least one"),
        (
            ("grid.channels=[table]", "grid.element_table={O: 1}"),
            "grid.element_table.0.1 = 1: input should be a valid tuple",
        ),
    ],
)
def test_grids_that_make_no_sense_are_refused(overrides: tuple[str, ...], message: str) -> None:
    assert message in refusal(*overrides)


def test_a_box_at_the_limit_of_the_spacing_is_taken() -> None:
    assert GridSpec(frame="window", shape=32, box_A=9.3).shape == 32  # 31 steps of 0.3 A
    assert GridSpec(shape=12).shape == 12  # the spacing of a cell depends on the crystal


@pytest.mark.parametrize("name", GRID_PRESETS)
def test_a_preset_is_where_a_grid_starts(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text(f"grid: {{preset: {name}, shape: 32, sigma_A: 0.7}}")
    grid, preset = load_config(tmp_path / "run.yaml").grid, GridSpec.model_validate({"preset": name})
    assert grid == preset.model_copy(update={"shape": 32, "sigma_A": 0.7})
    assert grid != preset
    assert load_config(None, (f"grid.preset={name}", "grid.shape=32", "grid.sigma_A=0.7")).grid == grid


def test_presets_hold_what_they_are_named_for() -> None:
    unit, window = (GridSpec.model_validate({"preset": f"paper-{frame}"}) for frame in ("unit", "window"))
    assert GridSpec.model_validate({"preset": "default"}) == GridSpec()
    assert (unit.frame, window.frame) == ("unit", "window")
    for grid in (unit, window):
        assert (grid.shape, grid.box_A, grid.sigma_A, grid.radius_A) == (30, 10.0, 1.0, 0.65)
        assert grid.channels == ("z_density",)
        assert grid.random_rotation


def test_a_table_of_elements_is_a_mapping_in_yaml_and_hashable_in_memory() -> None:
    config = load_config(None, ("grid.channels=[table]", "grid.element_table={O: [1, 0], Ti: [0.5, -2]}"))
    assert config.grid.element_table == (("O", (1.0, 0.0)), ("Ti", (0.5, -2.0)))
    assert yaml.safe_load(config.to_yaml())["grid"]["element_table"] == {"O": [1.0, 0.0], "Ti": [0.5, -2.0]}
    assert hash(config.grid) == hash(GridSpec.model_validate(config.grid.model_dump()))


@pytest.mark.parametrize("shape", [8, 129])
def test_grid_shape_out_of_range(shape: int) -> None:
    assert f" = {shape}: " in refusal(f"grid.shape={shape}")


def test_deepest_network_decides_what_the_grid_must_be_a_multiple_of() -> None:
    for deep in ("model.unet_levels=5", "model.vae_widths=[1, 2, 3, 4]"):
        with pytest.raises(ConfigError, match="multiple of 16"):
            load_config(None, ("grid.shape=24", deep)).check_halvings()
    assert load_config(None, ("grid.shape=48", "model.unet_levels=5")).grid.shape == 48
    assert load_config(None, ("grid.shape=adaptive", "model.unet_levels=5")).grid.shape == "adaptive"


def test_all_mistakes_are_named_at_once() -> None:
    message = refusal("train.epochs=0", "grid.sigma_A=-1", "tracking.name=x")
    assert all(key in message for key in ("train.epochs", "grid.sigma_A", "tracking.name"))


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "train.=3", ""])
def test_override_without_key_or_value(override: str) -> None:
    assert f"--set {override!r} has no value: write --set section.key=value" in refusal(override)


def test_override_below_a_value() -> None:
    assert "seed is a value (3), not a section" in refusal("seed=3", "seed.x=4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [unclosed", "is not valid YAML"),
        ("- a\n- b\n", "holds a list, not a mapping of sections"),
        ("just words", "holds a str, not a mapping of sections"),
        ("train: {epoch: 3}", "train.epoch = 3: unknown key; did you mean 'epochs'?"),
        ("train: {epochs: x}", "train.epochs = 'x'"),
        ("epochs: 3", "epochs = 3: unknown key"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml can't be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xc3(")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not valid YAML"):
        load_config(tmp_path / "binary.yaml")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config().train.epochs = 3  # type: ignore[misc]


def leaves(values: dict[str, Any]) -> list[Any]:
    """All values of a nested mapping."""
    return [leaf for value in values.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def test_resolved_yaml_holds_plain_finite_values() -> None:
    values = leaves(yaml.safe_load(load_config().to_yaml()))
    assert len(values) > 50
    assert all(math.isfinite(value) for value in values if isinstance(value, float))
