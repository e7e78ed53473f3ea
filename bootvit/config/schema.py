"""The one schema of bootvit: a frozen, typed model of a run, whose sections own their rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, SerializationInfo, model_validator

from bootvit.addresses import public_address

Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Size = Count | tuple[Count, Count]
Method = Literal["vit", "agent", "joint", "shared"]


def _written(address: str, info: SerializationInfo) -> str:
    """Without its secrets, unless `bootvit.addresses.SECRETS` asks for the whole."""
    return address if (info.context or {}).get("secrets") else public_address(address)


Address = Annotated[str, PlainSerializer(_written)]  # or a path; a secret in it stays in the memory of this process
Network = Literal["vit", "agent"]

NETWORKS: dict[Method, tuple[Network, ...]] = {
    "vit": ("vit",),
    "agent": ("agent",),
    "joint": ("vit", "agent"),
    "shared": ("vit", "agent"),
}


class Section(BaseModel):
    """Base of every section: immutable, typed strictly, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ViTConfig(Section):
    """The student Transformer: a timm name, and what is to differ from it."""

    name: str = Field("bootvit_small_patch16_224", description="any plain ViT of timm, ours included")
    width: int | None = Field(None, ge=1, description="tokens' width; null: as the name says")
    depth: int | None = Field(None, ge=1, description="number of blocks; null: as the name says")
    heads: int | None = Field(None, ge=1, description="attention heads; null: as the name says")
    mlp_width: int | None = Field(None, ge=1, description="hidden width of the MLPs; null: as the name says")
    patch: Size | None = Field(None, description="patch size, or [rows, columns]; null: as the name says")
    norm_eps: Positive | None = Field(None, description="LayerNorm's epsilon; null: as the name says")
    attention: Literal["softmax", "entmax", "entmax_fixed"] = Field(
        "softmax", description="entmax: sparse, alpha learned per block; entmax_fixed: alpha stays at 1.5"
    )
    dropout: Rate = Field(0.0, description="on attention weights, on both residual branches and in the MLP")
    pos_dropout: Rate = Field(0.0, description="after the position table is added")
    weights: Address | None = Field(
        None, description="a run, its checkpoint, a timm export, a file, or timm (its hub); null: from scratch"
    )


class AgentConfig(Section):
    """The agent CNN: mirrors the ViT's width, depth, heads and patch unless it is a CNN of timm."""

    name: str = Field("agent_small", description="agent_small (3x3), agent_base (one matrix per tap), or a timm CNN")
    norm: Literal["pre", "post"] | None = Field(None, description="null: pre for agent_small, post for agent_base")
    stem: Literal["patch", "resnet"] = "patch"
    patch: Size | None = Field(None, description="the patch stem's patch, or [rows, columns]; null: the ViT's")
    stem_width: int = Field(64, ge=1, description="channels inside the resnet stem")
    downsample: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="blocks followed by a 2x2 mean pool")
    taps: Literal["auto", "row_major", "centred"] = Field(
        "auto", description="where heads sit in the window; auto: row_major for our ViTs, centred for others"
    )
    heads: int | None = Field(None, ge=1, description="null: the ViT's")
    mlp_width: int | None = Field(None, ge=1, description="null: the ViT's")
    dropout: Rate | None = Field(None, description="inside the MLP; null: 0, and the ViT's when shared")
    residual_dropout: Rate | None = Field(None, description="on both branches; null: 0, and the ViT's when shared")
    sync_norm: bool = Field(False, description="BatchNorm statistics over all workers")
    value_bias: bool = Field(True, description="shared: add the value bias, as attention does; the reference does not")
    weights: Address | None = Field(None, description="as the ViT's; timm only for a CNN of timm")


class ModelConfig(Section):
    """The networks, and how fresh ones are initialised."""

    init: Literal["timm", "reference"] = Field("timm", description="reference: patches and MLP biases at std 1")
    vit: ViTConfig = ViTConfig()
    agent: AgentConfig = AgentConfig()


class DataConfig(Section):
    """Where images come from, which of them are used, and how they become batches."""

    source: Literal["digits", "cifar10", "cifar100", "imagefolder", "imagenet", "parquet", "fake"] = "digits"
    root: Address | None = Field(None, description="the data set's folder; relative to where the command is started")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the training images, per class")
    fraction_rule: Literal["nested", "reference"] = Field("nested", description="reference: NumPy's shuffle by class")
    held_out: float = Field(0.0, ge=0, lt=1, description="share of the training images kept for selection")
    image_size: Size = Field(224, description="what the networks see: a side, or [rows, columns]")
    batch_size: int = Field(64, ge=1, description="images per step, over all workers")
    eval_batch_size: int = Field(128, ge=1, description="images per evaluation batch, over all workers")
    num_classes: int | None = Field(None, ge=2, description="null: the source's")
    mean: tuple[float, float, float] | None = Field(None, description="of RGB in [0, 1]; null: the source's")
    std: tuple[Positive, Positive, Positive] | None = Field(None, description="null: the source's")
    augment: Literal["auto", "crop", "area", "none"] = Field(
        "auto",
        description="crop: pad, crop and flip at native size; area: random area crop and flip; auto: by size",
    )
    crop_padding: int = Field(4, ge=0, description="zero pixels around the image before a crop")
    flip: bool = Field(True, description="mirror half of the training images (not with augment: none)")
    resize: Literal["device", "pil"] = Field("device", description="pil: bit for bit as the reference, but slower")
    on_error: Literal["raise", "skip"] = Field("raise", description="a broken image ends the run, or is counted")
    workers: int = Field(2, ge=0, description="processes per worker that decode large images")


class NetworkObjective(Section):
    """Weights of one network's loss terms."""

    ce: Weight = 1.0
    kd: Weight = 1.0
    hint: Weight = 0.0
    decayed: tuple[Literal["ce", "kd", "hint"], ...] = Field(("hint",), description="terms under objective.hint_decay")


class ObjectiveConfig(Section):
    """The bootstrapping objective; `kd` and `hint` are used where there are two networks."""

    vit: NetworkObjective = NetworkObjective(hint=10.0)
    agent: NetworkObjective = NetworkObjective()
    temperature: Positive = 4.0
    hint_decay: Literal["linear", "none"] = "linear"
    hint_pool: Literal["grid", "raster"] = Field("grid", description="raster: runs of the sequence, as the reference")
    hint_norm: bool = Field(True, description="layer-normalise the maps before they are compared")


class AgentOptimConfig(Section):
    """What the agent's optimiser does differently in joint training; null: as the ViT's."""

    name: Literal["adamw", "sgd"] | None = None
    lr: Positive | None = None
    weight_decay: Weight | None = None
    momentum: Rate | None = None
    clip_norm: Positive | Literal["none"] | None = None


class OptimConfig(Section):
    """The optimiser."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: Weight = 0.05
    momentum: Rate = Field(0.0, description="for sgd")
    clip_norm: Positive | None = Field(None, description="largest L2 norm of a network's gradient; null: no clipping")
    clip_when: Literal["every", "first_step"] = Field("every", description="first_step: only step 0, as the reference")
    clip_scope: Literal["all", "vit"] = Field("all", description="shared: vit leaves the agent's own weights unclipped")
    sam_rho: Positive | None = Field(None, description="radius of sharpness-aware minimisation; null: off")
    sam_clip: bool = Field(True, description="clip the sharpness-aware gradient; the reference does not")
    agent: AgentOptimConfig = AgentOptimConfig()


class AgentScheduleConfig(Section):
    """What the agent's learning rate does differently in joint training; null: as the ViT's."""

    kind: Literal["cosine", "constant"] | None = None
    period: int | None = Field(None, ge=1)
    warmup_epochs: Weight | None = None
    warmup_mode: Literal["linear", "constant"] | None = None
    warmup_factor: float | None = Field(None, ge=0, le=1)


class ScheduleConfig(Section):
    """How long, and the learning rate over that time."""

    epochs: int = Field(240, ge=1)
    kind: Literal["cosine", "constant"] = "cosine"
    period: int | None = Field(None, ge=1, description="epochs of the half cosine; null: all")
    per: Literal["step", "epoch"] = Field("step", description="epoch: the rate is constant within an epoch")
    warmup_epochs: Weight = 0.0
    warmup_mode: Literal["linear", "constant"] = "linear"
    warmup_factor: float = Field(0.2, ge=0, le=1)
    eval_every: int = Field(1, ge=1, description="epochs between evaluations; the last epoch is always evaluated")
    max_steps: int | None = Field(None, ge=1, description="end the run after this many steps (smoke tests)")
    agent: AgentScheduleConfig = AgentScheduleConfig()


class CheckpointConfig(Section):
    """When a run is saved, beside the end of every epoch, and how much of it is kept."""

    every_steps: int | None = Field(None, ge=1, description="steps between checkpoints within an epoch; null: none")
    every_minutes: Positive | None = Field(10.0, description="minutes between checkpoints within an epoch; null: none")
    keep: int = Field(2, ge=1, description="the newest checkpoints that stay on disk")
    best: bool = Field(False, description="keep also the best by the first network's held-out (else test) top-1")


class RayConfig(Section):
    """Where and on how many workers a run is trained."""

    num_workers: Count | tuple[Count, Count] = Field(
        1, description="[fewest, most]: as many as the cluster has room for, while it shrinks and grows"
    )
    cpus_per_worker: Positive = 1
    use_gpu: bool | None = Field(None, description="null: a GPU per worker where the cluster has them")
    storage_path: Address = Field(
        "./runs", description="parent of the run directories, which every node sees; or s3://BUCKET/FOLDER"
    )
    max_failures: int = Field(0, ge=0, description="restarts from the last checkpoint after a lost worker")
    wait_minutes: Positive = Field(30.0, description="how long workers wait for nodes, at the start and after a loss")
    collective_timeout: Positive = Field(1800.0, description="seconds after which workers that hang count as lost")

    @property
    def fewest(self) -> int:
        """Workers without which the run waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that it never has more of."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"num_workers=[{self.fewest}, {self.most}]: the fewest come first")
        return self


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: Address | None = Field(
        None, description="null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db beside the command", repr=False
    )
    experiment: str = "bootvit"
    log_every: int = Field(20, ge=1, description="steps between journal records")
    checkpoints: Literal["none", "best", "all"] = Field(
        "best",
        description="weights in MLflow when a run has finished, of the checkpoints that it keeps; best: of the highest "
        "held-out accuracy, or the final one where nothing is held out",
    )
    moments: bool = Field(False, description="those checkpoints whole, with the optimiser's moments, to resume from")


class Config(Section):
    """One run, completely."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+,-]*$", max_length=200)
    seed: int = Field(0, ge=0, lt=2**32)
    method: Method = "joint"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    compile: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def networks(self) -> tuple[Network, ...]:
        """The networks that this run trains."""
        return NETWORKS[self.method]

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.ray.storage_path) / self.name

    @property
    def image_size(self) -> tuple[int, int]:
        """(rows, columns) that the networks see."""
        return pair(self.data.image_size)

    @model_validator(mode="after")
    def _every_network_learns(self) -> Self:
        for net in self.networks:
            weights: NetworkObjective = getattr(self.objective, net)
            used = (weights.ce, weights.kd, weights.hint) if len(self.networks) == 2 else (weights.ce,)
            if not any(used):
                raise ValueError(f"objective.{net}: all weights that method={self.method} uses are zero")
        return self

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self) -> Self:
        if self.data.batch_size < self.ray.most:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is smaller than ray.num_workers={self.ray.most}: "
                "every worker needs an image"
            )
        return self


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A side, or (rows, columns), as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
