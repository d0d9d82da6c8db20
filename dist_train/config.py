"""Every setting of a run, as frozen pydantic sections; unknown keys are errors. Imports no engine and no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from dist_train.errors import ConfigError

USUAL_GROUP = 8
"""Crystals of one adaptive grid shape in a global batch: few enough that nearly every shape is seen."""
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SPLIT_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
SplitName = Annotated[str, Field(pattern=SPLIT_NAME)]
Channel = Literal["occupancy", "z_density", "period", "group", "f_block", "code", "table"]
ElementTable = Annotated[
    tuple[tuple[str, tuple[float, ...]], ...],
    BeforeValidator(lambda given: tuple(given.items()) if isinstance(given, dict) else given),
    PlainSerializer(dict),
]


def is_split_name(name: str) -> bool:
    """Whether a split may have this name: it becomes a part of file names and keys."""
    return re.fullmatch(SPLIT_NAME, name) is not None


class Section(BaseModel):
    """Base of every section: immutable, typed, closed to unknown keys; `description`s are the documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _with_preset(values: Any, presets: dict[str, dict[str, Any]]) -> Any:
    """The values of a section, `preset: NAME` replaced by what it stands for; the other keys change it."""
    if not (isinstance(values, dict) and "preset" in values):
        return values
    changes = dict(values)
    name = changes.pop("preset")
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown, known are {', '.join(presets)}")
    return presets[name] | changes


class GridSpec(Section):
    """How a crystal becomes a voxel grid: where the voxels lie, and what they hold.

    `preset: NAME` in a config starts from one of GRID_PRESETS; other keys change it.
    """

    frame: Literal["cell", "window", "unit"] = "cell"
    """'cell': fractional grid of the cell, periodic. 'window': Cartesian cube cut from the infinite crystal.
    'unit': Cartesian cube around the atoms of one cell, without periodic images."""
    shape: Annotated[int, Field(ge=12, le=128)] | Literal["adaptive"] = 32
    """Voxels along every axis; 'adaptive', for cells: along each axis edge over spacing, rounded up to a `multiple`."""
    multiple: Annotated[int, Field(ge=2, le=32)] = 8
    """Edges of an adaptive grid are multiples of so many voxels: what the networks halve n times needs 2^n of them."""
    box_A: Positive = 9.3
    """Edge in angstrom of the cube of a window or unit, from its first voxel to its last."""
    max_spacing_A: Positive = 0.3
    """Largest distance in angstrom between neighbouring voxels; a cell that would exceed it is rejected."""
    max_voxels: Count = 2**15
    """Voxel budget of an adaptive grid; a cell that needs more is rejected."""
    sigma_A: Positive = 0.5
    """Standard deviation in angstrom of the Gaussian that stands for an atom."""
    radius_A: Positive = 0.5
    """Voxels within this many angstrom of their nearest atom carry its species."""
    min_distance_A: NonNegative = 0.5
    """Crystals with two atoms closer than this many angstrom are rejected: the grid can't tell them apart."""
    min_like_distance_A: NonNegative = 0.95
    """The same for two atoms of one element, which the species of voxels don't tell apart."""
    max_atoms: Count = 1000
    """Crystals with more atoms are rejected."""
    niggli: bool = True
    """Voxelise the Niggli-reduced cell; false keeps the cell of the source."""
    canonical: bool = False
    """Voxelise the canonical cell at its canonical origin: one grid, in whatever way the crystal is written down."""
    random_rotation: bool = False
    """Turn each copy of a crystal at random (windows and units), uniformly over all rotations."""
    random_origin: bool = False
    """Move each copy of a crystal by a random part of its cell (cells and windows)."""
    channels: tuple[Channel, ...] = ("occupancy",)
    """Density channels in order: occupancy, z_density (the paper's), period (7), group (18), f_block (14), code (12: bits,
    four of which differ between any two elements), table."""
    element_table: ElementTable = ()
    """Heights of the channel kind 'table' for each element, such as {O: [1, 0], Ti: [0.5, 2]}."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return _with_preset(values, GRID_PRESETS)

    @model_validator(mode="after")
    def _channels_are_sound(self) -> Self:
        if not self.channels or len(set(self.channels)) != len(self.channels):
            raise ValueError(f"channels {list(self.channels)} must name at least one channel, each once")
        if ("table" in self.channels) != bool(self.element_table):
            raise ValueError("the channel 'table' and element_table go together: give both or neither")
        if len({len(heights) for _, heights in self.element_table} - {0}) > 1 or any(not h for _, h in self.element_table):
            raise ValueError("element_table must give every element the same number of heights, at least one")
        return self

    @model_validator(mode="after")
    def _frame_is_sound(self) -> Self:
        if self.canonical and (self.frame != "cell" or not self.niggli):
            raise ValueError("canonical needs the frame 'cell' and niggli")
        if self.frame == "cell":
            if self.random_rotation:
                raise ValueError("random_rotation has no effect on the frame 'cell', whose axes turn with the crystal")
            return self
        if self.shape == "adaptive":
            raise ValueError(f"shape 'adaptive' is for the frame 'cell'; give a {self.frame} a number of voxels")
        if self.random_origin and self.frame == "unit":
            raise ValueError("random_origin has no effect on the frame 'unit', whose atoms are centred")
        if self.box_A / (self.shape - 1) > self.max_spacing_A * (1 + 1e-9):
            raise ValueError(
                f"box_A {self.box_A} on shape {self.shape} gives a spacing of {self.box_A / (self.shape - 1):.4f} A, "
                f"over max_spacing_A {self.max_spacing_A}"
            )
        return self


_PAPER: dict[str, Any] = {
    "shape": 30, "box_A": 10.0, "max_spacing_A": 0.345, "sigma_A": 1.0, "radius_A": 0.65,
    "min_like_distance_A": 1.0, "random_rotation": True, "channels": ["z_density"],
}  # fmt: skip
GRID_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper-unit": _PAPER | {"frame": "unit", "niggli": False},
    "paper-window": _PAPER | {"frame": "window", "random_origin": True},
}
"""Named starting points of a GridSpec; the paper's grids have 30 points over 0 to 10 A, end points included."""


NO_PASSWORD = (
    "holds a password, which would be seen in process lists and kept with the model: set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD or write ~/.mlflow/credentials (PGPASSWORD or ~/.pgpass for PostgreSQL)"
)


def has_password(uri: str) -> bool:
    """Whether a URI names a password, as in http://user:password@host."""
    return re.match(r"[\w+]+://[^/]*:[^/]*@", uri) is not None


Place = Annotated[
    Path | str, BeforeValidator(lambda given: given if isinstance(given, str) and "://" in given else Path(given))
]
"""A path, or a URL as it was written: a Path would take one of its two slashes."""


class DataConfig(Section):
    """What is read, how it is split, what the samples hold, where the shards lie, and how training reads them."""

    inputs: tuple[str, ...] = ()
    """Folders (searched recursively), globs and files: CIF, POSCAR, extxyz (also .gz), tar and zip archives of them, Parquet
    tables, folders of shards; on a disk or as fsspec URLs such as s3://bucket/folder."""
    licences: dict[str, str] = {}
    """Where inputs come from and under which licence, by their names in `inputs`; a line of dataset_card.md each."""
    shards: Place = Path("runs/shards")
    """Folder of the tar shards, `index.json`, `rejected.csv` and `dataset_card.md`. Training also reads them from an fsspec
    URL such as s3://bucket/folder."""
    splits: dict[SplitName, Fraction] = {"train": 0.9, "val": 0.05, "test": 0.05}
    """Share of each split; a crystal goes by the hash of its reduced formula, so polymorphs stay together."""
    split_column: str | None = None
    """Column of the tables that names each crystal's split; `splits` then has no effect."""
    split_ids: dict[SplitName, Path] = {}
    """Files of ids, one a line: these crystals go to that split, all others by `splits` or `split_column`."""
    drop_duplicates: bool = False
    """Keep the first of crystals with the same reduced cell and atoms; the others are rejected and counted."""
    duplicate_tolerance_A: Positive = 0.01
    """Largest root mean square distance in angstrom between the atoms of duplicates."""
    store: Literal["grids", "structures"] = "grids"
    """'grids': density, species and structure; 'structures': the structure alone, voxelised when it is read."""
    encoding: Literal["raw", "compact"] = "raw"
    """Grids as float16 and uint8 .npy members, or 'compact': uint8 of the density's square root, both under zstd."""
    copies: Count = 1
    """Samples of each crystal, each with its own random rotation or origin (see grid.random_rotation, random_origin)."""
    samples_per_shard: Count = 256
    """Samples in a shard; the last one of a split may hold fewer."""
    max_rejected_fraction: Fraction = 0.1
    """The job fails, after its report, when a larger share of the inputs is rejected."""
    seconds_per_file: Positive = 20.0
    """A file or table row that takes longer to read and check is rejected; the process that reads it is ended."""
    memory_per_file_MB: Count = 2000
    """The same for one that needs more memory."""
    workers: Count = 2
    """Ray workers of a cluster that the job starts for itself; a cluster that it joins is used whole."""
    ray_address: str | None = None
    """Address of a running Ray cluster ('auto' finds it); null takes RAY_ADDRESS, as in a Ray job, or starts a local one."""
    cpus_per_task: Positive = 1.0
    """CPUs that Ray reserves for each task."""
    memory_per_task_MB: Count | None = None
    """Memory that Ray reserves for each task; null reserves none."""
    shuffle_window: Count = 2**16
    """Training shuffles the order of the shards, then their samples in windows of at least this many, so that no more than
    two windows need to be in memory (or in the cache) for fast reading; a smaller split is shuffled whole."""
    reader_threads: Count = 2
    """Threads of each rank that read batches ahead; at most one batch more than these is kept."""
    max_damaged: Annotated[int, Field(ge=0)] = 100
    """Damaged samples that a rank passes over, with weight 0 in every loss, before training stops; 0 stops at the first."""
    cache_dir: Path | None = None
    """Where the shards of a URL are kept while they are read, below its folder dist_train_shards; null is ~/.cache."""
    cache_MB: Count = 50_000
    """Most that all shards in there take up, in 10^6 bytes; those used least recently make room."""

    @property
    def folder(self) -> Path:
        """`shards`, for who writes there. Raises ConfigError for a URL."""
        if isinstance(self.shards, str):
            raise ConfigError(
                f"data.shards {self.shards} is a URL, which is only read: set it to a folder, then upload that"
            )
        return self.shards

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.splits.values()) - 1) > 1e-6:
            raise ValueError(f"splits {self.splits} add up to {sum(self.splits.values()):.4g}, not 1")
        return self


class ModelConfig(Section):
    """Sizes of the VAE and of the attention U-Net.

    `preset: NAME` in a config starts from one of MODEL_PRESETS; other keys change it.
    """

    latent: Count = 256
    """Numbers in the latent vector of a crystal."""
    latent_voxels: Count | None = None
    """Most voxels of a coarse periodic grid that the latent has besides the vector; null: the vector is all."""
    latent_channels: Annotated[int, Field(ge=0)] = 0
    """Numbers in each voxel of that grid."""
    vae_widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 64)
    """Channels after each layer of the encoder; the decoder mirrors them."""
    vae_halvings: Count | None = None
    """How many of these layers, the last ones, halve the grid; null: all."""
    vae_depth: Annotated[int, Field(ge=0)] = 0
    """Residual blocks after each of these layers, and after each of the decoder's."""
    coarse: Count | None = None
    """Voxels along each axis of the grid between the VAE's convolutions and the latent vector; cells of other shapes are
    brought to it by Fourier interpolation. null: the cube's after all halvings (for adaptive grids that of a cube of 32)."""
    hidden: Annotated[int, Field(ge=0)] = 0
    """Width of a linear layer between that grid and the latent vector, in encoder and decoder; 0: none."""
    atoms_width: Annotated[int, Field(ge=0)] = 0
    """Width of the layers that tell the number of atoms and their elements of the latent, its grid included; 0: one layer as
    wide as the latent vector, of that vector alone."""
    unet_width: Count = 8
    """Channels of the U-Net's first level; every level below doubles them."""
    unet_levels: Annotated[int, Field(ge=2, le=6)] = 3
    """Resolutions of the U-Net, the input's included."""
    blocks: Literal["light", "paper"] = "light"
    """'light': strided 4^3 convolutions halve grids, pixel shuffle doubles them; SiLU. 'paper': max pooling (in the VAE
    strided 3^3 convolutions) halves, trilinear interpolation doubles, the U-Net has two convolutions where 'light' has one;
    LeakyReLU."""
    norm_groups: Annotated[int, Field(ge=0)] = 0
    """Groups of a GroupNorm after each convolution; 0: none. No BatchNorm: its statistics would mix the crystals of a batch,
    so that the loss of one would hang on the number of ranks and on damaged samples beside it."""
    gate: bool = True
    """Add the decoded composition to the U-Net's logits, so that absent elements are barred."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return _with_preset(values, MODEL_PRESETS)

    @model_validator(mode="after")
    def _layers_are_sound(self) -> Self:
        if self.vae_halvings is not None and self.vae_halvings > len(self.vae_widths):
            raise ValueError(f"vae_halvings {self.vae_halvings} is more than the {len(self.vae_widths)} vae_widths")
        if bool(self.latent_voxels) != bool(self.latent_channels):
            raise ValueError(
                f"latent_voxels {self.latent_voxels} and latent_channels {self.latent_channels} go together: "
                "give both or neither"
            )
        if self.latent_voxels and (self.coarse or self.hidden):
            raise ValueError(
                f"coarse {self.coarse} and hidden {self.hidden} are for a latent without latent_voxels: leave them out"
            )
        if self.norm_groups and any(width % self.norm_groups for width in (*self.vae_widths, self.unet_width)):
            raise ValueError(
                f"norm_groups {self.norm_groups} must divide all of vae_widths {list(self.vae_widths)} "
                f"and unet_width {self.unet_width}"
            )
        return self

    @property
    def latent_size(self) -> int:
        """Numbers in the whole latent of a crystal."""
        return self.latent + (self.latent_voxels or 0) * self.latent_channels

    @property
    def halvings(self) -> int:
        """How often the encoder halves the grid."""
        return self.vae_halvings or len(self.vae_widths)


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "cell-tiny": {"latent": 64, "vae_widths": [16, 32], "unet_width": 4},
    "cell-small": {},
    "cell-base": {
        "latent": 256, "vae_widths": [64, 128, 256], "unet_width": 48, "unet_levels": 4, "blocks": "paper", "norm_groups": 8,
    },
    "cell-large": {
        "latent": 512, "vae_widths": [128, 256, 512], "unet_width": 72, "unet_levels": 4, "blocks": "paper",
        "norm_groups": 8,
    },
    "paper": {
        "latent": 300, "vae_widths": [16, 32, 64, 128, 256], "vae_halvings": 3, "hidden": 3100, "unet_width": 64,
        "unet_levels": 5, "blocks": "paper", "norm_groups": 8, "gate": False,
    },
}  # fmt: skip
"""Named starting points of a ModelConfig. Parameters in millions, VAE + U-Net, for 94 elements:

cell-tiny 3.5 + 0.064, cell-small 26.2 + 0.24, cell-base 16.8 + 14.5, cell-large 66.9 + 32.6: on cells of 32^3 or of adaptive
shape with the channels occupancy, period and group. Most of the first two lies in linear layers, which shrink with the grid.

paper 108.8 + 103.9, on its grids (see GRID_PRESETS); the code of Hoffmann et al. (2019) has 109.0 + 104.3. Changed, so that
all layers fit: every convolution has a kernel of 3^3 and keeps the shape, and 30^3 is filled up to 32^3. Changed, so that it
trains: GroupNorm for BatchNorm (see `norm_groups`), LeakyReLU throughout and between the linear layers, densities
standardised and so no ReLU behind them. Added: the heads for cell, count and composition.
"""


class LossWeights(Section):
    """Weights of the loss parts (see `models.losses`)."""

    density: NonNegative = 1.0
    """Mean squared error of the standardised density channels, relative to predicting their mean."""
    position_channel: Positive = 1.0
    """Weight, among the channels of the density, of the one that positions are decoded from; the others have 1."""
    species: NonNegative = 0.2
    """Cross entropy of the species of voxels."""
    kl: NonNegative = 1e-4
    """Kullback-Leibler divergence from N(0, I), nats a crystal."""
    free_bits: NonNegative = 0.0
    """Nats of each latent dimension of each crystal that cost nothing (Kingma et al. 2016): max(KL, free_bits) is summed."""
    lattice: NonNegative = 0.1
    """Squared error of the standardised cell parameters."""
    count: NonNegative = 0.1
    """Squared error of the logarithm of the number of atoms."""
    composition: NonNegative = 0.05
    """Squared error of the atoms of each element, summed over elements."""


class TrainConfig(Section):
    """The optimisation: batch, schedule, precision, and when to log, validate and save."""

    epochs: Count = 60
    """Passes over the training split; each drops the crystals beyond the last full global batch."""
    global_batch_size: Count = 64
    """Crystals a step over all ranks; must be divisible by the number of ranks."""
    micro_batch_size: Count | None = None
    """Crystals a rank takes at once, a divisor of its share and of `shape_group`; gradients add up over these. null takes as
    many as it can."""
    shape_group: Count | None = None
    """Of adaptive grids: crystals of one grid shape that come together in a global batch, a divisor of it, which mixes as
    many shapes. Small groups mix better and have rarer shapes, large ones make better use of a device. null: 8 at most."""
    substitution: Fraction = 0.0
    """Chance of each element of a training crystal to be exchanged for another one of the training split, on all its sites,
    anew in every epoch: the networks learn compositions that no crystal has. Needs data.store 'structures'."""
    objective: Literal["joint", "vae", "unet"] = "joint"
    """'joint': both networks, the U-Net on what the VAE decodes. 'vae': the VAE alone. 'unet': the U-Net alone, on what the
    frozen VAE of `init_from` decodes."""
    init_from: Path | None = None
    """Bundle folder whose weights and standardisation a new run starts from; grid, elements and model must be the same, but
    for limits (`grid.max_voxels`, `grid.max_atoms`, `model.latent_voxels`) and `model.atoms_width`: layers of another width
    begin anew."""
    unet_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of each rank's crystals that the U-Net sees in a step (it costs far more than the VAE)."""
    background_ratio: Positive = 3.0
    """Random background voxels in the species loss, for each foreground voxel."""
    learning_rate: Positive = 2e-3
    """Peak of the schedule: linear warm-up, then half a cosine to zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of the linear warm-up."""
    kl_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the weight of the KL divergence rises from 0; 0: it has its full weight at once."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    gradient_clip: Positive = 1.0
    """Largest norm of the gradient over all parameters."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the average of the weights that is validated and exported; 0 takes the last weights."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the forward and backward pass; weights are kept in fp32 beside it. fp16, with a dynamic loss scale,
    is for GPUs under DeepSpeed."""
    loss: LossWeights = LossWeights()
    activation_checkpointing: bool = False
    """Keep the inputs of the networks' blocks alone and compute what is inside again in the backward pass: 1.9 to
    4.3 times less memory for 1.17 to 1.43 times the time, measured on a CPU."""
    channels_last: bool = False
    """Lay out grids with the channels next to each other (torch.channels_last_3d): meant for GPUs, no faster on the CPUs
    that were measured."""
    compile: bool = False
    """Compile the networks with torch.compile; needs a C++ compiler (CPU) or Triton (GPU)."""
    max_nonfinite: Count = 10
    """Steps in a row with a non-finite loss or gradient, skipped on all ranks together, before the run stops."""
    log_every: Count = 10
    """Steps between two records of the metrics."""
    validate_every: Count = 250
    """Steps between two passes over the validation split; the last step always has one."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints; the last step always has one. A multiple of validate_every lets the best be kept."""
    keep_checkpoints: Count = 2
    """Latest checkpoints kept, besides the one with the lowest validation loss."""
    watchdog_seconds: Positive = 1800.0
    """A step, or a pass over the validation split, that takes longer ends the job; every rank tells where it stands."""
    stop_after_step: Count | None = None
    """Stop with a checkpoint after this step, as at an interruption; a later start resumes from there."""

    @model_validator(mode="after")
    def _vae_is_there(self) -> Self:
        if self.objective == "unet" and self.init_from is None:
            raise ValueError("objective 'unet' trains on what a trained VAE decodes: set init_from to its bundle folder")
        return self


class EngineConfig(Section):
    """Who runs the training step."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """'deepspeed': any number of ranks; 'torch': plain PyTorch, one process."""
    deepspeed_json: Path | None = None
    """What only DeepSpeed has (ZeRO stage, buckets, offload); batch, clipping and precision belong to `train`."""


class GateConfig(Section):
    """When a new model becomes the registry's champion by itself: validated on the same data, it is better than that.

    Without a champion there is nothing to compare with, and the first model with the metric becomes it.
    """

    metric: str | None = None
    """Metric of the last validation to compare, such as val/composition_exact; null: the champion moves by hand alone."""
    better: Literal["higher", "lower"] = "higher"
    """Which of two values of the metric is the better one."""
    margin: NonNegative = 0.0
    """It has to be better by more than this."""


class TrackingConfig(Section):
    """Where metrics, pictures and models go besides the run folder."""

    uri: str | None = None
    """MLflow tracking and registry URI ('sqlite:///runs/mlflow.db', 'http://host:5000'); null writes JSONL only."""
    experiment: str = "dist_train"
    """MLflow experiment."""
    artifact_location: str | None = None
    """Artifact root of a new experiment; null leaves it to the server."""
    model_name: str = "crystal-autoencoder"
    """Name of the registered model; every finished run adds a version, with the alias 'candidate'."""
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _known_scheme(self) -> Self:
        if self.uri is not None and has_password(self.uri):
            raise ValueError(f"uri {NO_PASSWORD}")
        if self.uri is not None and not re.match(r"https?://|(sqlite|postgresql|mysql|mssql)(\+\w+)?://", self.uri):
            raise ValueError(f"uri {self.uri!r} is no MLflow server: http(s)://... or a database such as sqlite:///FILE")
        return self


class PriorConfig(Section):
    """What samples are drawn from; fitted to the latents of the training crystals when a run ends."""

    kind: Literal["flow", "gaussian"] = "flow"
    """'gaussian': one of full covariance. 'flow': small networks that draw a composition, and carry noise to a latent of
    such a crystal (see `models.flow`; latents with a grid in two steps, see `models.grid_flow`)."""
    width: Count = 384
    """Of the flows' layers."""
    depth: Count = 3
    """Blocks of each flow."""
    steps: Count = 2000
    """Of the training of each, the flows' on batches of 512 latents: about three minutes on one CPU core. A latent with a
    grid has two of them; of the compositions 8,000 at most."""
    temperature: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the compositions drawn: 1 as often as they were learnt to occur; below, likely ones more often."""


class RunConfig(Section):
    """A whole run: voxelising, training, tracking."""

    run_dir: Path = Path("runs/train")
    """Folder of the training run: checkpoints, metrics.jsonl, bundle, pictures."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, of the order of samples and of the noise."""
    data: DataConfig = DataConfig()
    grid: GridSpec = GridSpec()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    prior: PriorConfig = PriorConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _copies_differ(self) -> Self:
        if self.data.copies > 1 and not (self.grid.random_rotation or self.grid.random_origin):
            raise ValueError(
                f"data.copies {self.data.copies} would be equal: set grid.random_origin (cells, windows) or "
                "grid.random_rotation (windows, units)"
            )
        return self

    @model_validator(mode="after")
    def _compact_holds_heights(self) -> Self:
        if self.data.encoding == "compact" and any(h < 0 for _, heights in self.grid.element_table for h in heights):
            raise ValueError("data.encoding 'compact' holds square roots: no height in grid.element_table may be negative")
        return self

    @property
    def shape_group(self) -> int:
        """Crystals of one grid shape that come together in a global batch."""
        batch = self.train.global_batch_size
        if self.grid.shape != "adaptive":
            return batch
        return self.train.shape_group or gcd(batch, USUAL_GROUP)

    def check_halvings(self) -> None:
        """Raise ConfigError for cells that the networks, which halve them again and again, can't take.

        Windows and units have an outside, so that they are filled up to a size that can be halved.
        """
        grid, model, halvings = self.grid, self.model, max(self.model.halvings, self.model.unet_levels - 1)
        told = f"for {model.halvings} halvings of model.vae_widths and {model.unet_levels} model.unet_levels"
        if grid.frame != "cell":
            if model.coarse is not None:
                raise ConfigError(
                    f"model.coarse {model.coarse} is for grid.frame 'cell', this is {grid.frame!r}: set it to null"
                )
        elif grid.shape == "adaptive":
            if grid.multiple % 2**halvings:
                raise ConfigError(f"grid.multiple {grid.multiple} must be a multiple of {2**halvings} {told}")
        elif grid.shape % 2**halvings:
            raise ConfigError(f"grid.shape {grid.shape} must be a multiple of {2**halvings} {told}")

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load_config` reads back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def load_config(path: Path | None = None, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The RunConfig of a YAML file (defaults without one) with 'a.b=value' overrides on top.

    Raises ConfigError naming the key, its value and the remedy.
    """
    values = _read_yaml(path) if path else {}
    for override in overrides:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        source = f"{path}" if path else "the settings"
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise ConfigError(f"{source} can't be used:\n{lines}") from None


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a.b', value) of every setting of a dumped config."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config {path} can't be read: {error.strerror}; give --config an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config {path} holds a {type(values).__name__}, not a mapping of sections")
    return values or {}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r} has no value: write --set section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value ({child!r}), not a section")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[last] = text


def _explain(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            yield f"{path} = {item['input']!r}: unknown key; {hint}"
        elif item["type"] == "value_error" and not path:
            yield str(item["ctx"]["error"])
        elif item["type"] == "value_error":
            yield f"{path}: {item['ctx']['error']}"
        else:
            yield f"{path} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))
