"""The one schema of bootvit: a frozen, typed model of a run, whose sections own their rules."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

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
    read_by: ClassVar[tuple[str, ...]] = ()  # the files that act on its keys, for `bootvit config --explain`


class ViTConfig(Section):
    """The student Transformer: a timm name, and what is to differ from it."""

    read_by = ("bootvit/models/zoo.py", "bootvit/models/shapes.py", "bootvit/weights.py")
    name: str = Field(
        "bootvit_small_patch16_224", description="The student's name in timm: any plain ViT, ours included."
    )
    width: int | None = Field(None, ge=1, description="Width of the tokens; null: as the name says.")
    depth: int | None = Field(None, ge=1, description="Number of blocks; null: as the name says.")
    heads: int | None = Field(
        None, ge=1, description="Attention heads, which divide the width; null: as the name says."
    )
    mlp_width: int | None = Field(None, ge=1, description="Hidden width of the blocks' MLPs; null: as the name says.")
    patch: Size | None = Field(
        None,
        description="Pixels of a patch's side, or [rows, columns], which divide the image; null: as the name says.",
    )
    norm_eps: Positive | None = Field(None, description="Epsilon of every LayerNorm; null: as the name says.")
    attention: Literal["softmax", "entmax", "entmax_fixed"] = Field(
        "softmax",
        description="What turns scores into attention: entmax is sparse, with an alpha that each block learns; "
        "entmax_fixed keeps alpha at 1.5.",
    )
    dropout: Rate = Field(0.0, description="Dropout on attention weights, on both residual branches and in the MLPs.")
    pos_dropout: Rate = Field(0.0, description="Dropout after the position table is added to the tokens.")
    drop_path: Rate = Field(
        0.0,
        description="Stochastic depth: how often the last block's branches are left out for an image; it rises from 0 "
        "at the first block.",
    )
    weights: Address | None = Field(
        None,
        description="What to start from: a run, its checkpoint, a timm export, a file, or timm (its hub); null: from "
        "scratch.",
    )


class AgentConfig(Section):
    """The agent CNN: mirrors the ViT's width, depth, heads and patch unless it is a CNN of timm."""

    read_by = ("bootvit/models/zoo.py", "bootvit/learner.py", "bootvit/weights.py")
    name: str = Field(
        "agent_small",
        description="The agent: agent_small (a 3x3 convolution a block), agent_base (one matrix per head and tap), or "
        "a CNN of timm.",
    )
    norm: Literal["pre", "post"] | None = Field(
        None, description="BatchNorm before or after each branch; null: pre for agent_small, post for agent_base."
    )
    stem: Literal["patch", "resnet"] = Field(
        "patch", description="How pixels become the first map: one convolution over patches, or a ResNet's beginning."
    )
    patch: Size | None = Field(
        None, description="Pixels of the patch stem's side, or [rows, columns]; null: the ViT's patch."
    )
    stem_width: int = Field(64, ge=1, description="Channels inside of the resnet stem.")
    downsample: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="Numbers of the blocks, from 0, that are followed by a 2x2 mean pool."
    )
    taps: Literal["auto", "row_major", "centred"] = Field(
        "auto",
        description="Which places of the window the heads take: row by row, or the nearest to the centre first; auto: "
        "row_major for the paper's ViTs, centred for all others.",
    )
    heads: int | None = Field(None, ge=1, description="Heads of an agent with weights of its own; null: the ViT's.")
    mlp_width: int | None = Field(None, ge=1, description="Hidden width of the agent's own MLPs; null: the ViT's.")
    dropout: Rate | None = Field(
        None, description="Dropout in the agent's MLPs; null: 0, and the ViT's in shared training."
    )
    residual_dropout: Rate | None = Field(
        None, description="Dropout on both branches of a block; null: 0, and the ViT's in shared training."
    )
    drop_path: Rate | None = Field(
        None, description="Stochastic depth of the agent, as the ViT's; null: 0, and the ViT's in shared training."
    )
    sync_norm: bool = Field(False, description="Whether BatchNorm takes its statistics over all workers.")
    value_bias: bool = Field(
        True,
        description="Whether a shared agent adds the bias of the values, as attention does and the reference does not.",
    )
    weights: Address | None = Field(
        None, description="What to start from, as model.vit.weights; timm only for a CNN of timm; null: from scratch."
    )


class ModelConfig(Section):
    """The networks, and how fresh ones are initialised."""

    read_by = ("bootvit/models/zoo.py",)
    init: Literal["timm", "reference"] = Field(
        "timm", description="Initial values; reference: patch embedding and MLP biases at a standard deviation of 1."
    )
    checkpoint_blocks: bool = Field(
        False,
        description="Keep each block's input only, and compute the block again in the backward pass: less memory.",
    )
    vit: ViTConfig = ViTConfig()
    agent: AgentConfig = AgentConfig()


class DataConfig(Section):
    """Where images come from, which of them are used, and how they become batches."""

    read_by = (
        *("bootvit/data/sources.py", "bootvit/data/fractions.py", "bootvit/data/batches.py", "bootvit/data/loaders.py"),
        *("bootvit/data/decode.py", "bootvit/data/vary.py", "bootvit/data/own.py"),
    )
    source: Literal["digits", "cifar10", "cifar100", "imagefolder", "imagenet", "parquet", "dataset", "fake"] = Field(
        "digits",
        description="The kind of data set; digits is embedded, dataset is one of yours in Python, fake is noise for "
        "trials of speed.",
    )
    dataset: str | None = Field(
        None,
        description="For source=dataset, MODULE:NAME of a module that `imports` lists: what, called with 'train' or "
        "'test', gives something with __len__ and __getitem__ of (image, label), or None.",
    )
    root: Address | None = Field(
        None, description="The data set's folder, relative to where the command is started, or an address for parquet."
    )
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the training images that is used, in every class.")
    fraction_rule: Literal["nested", "reference"] = Field(
        "nested",
        description="Which images a fraction takes: by a hash, so that small ones lie in large ones, or as the "
        "reference shuffles.",
    )
    held_out: float = Field(
        0.0, ge=0, lt=1, description="Share of the training images that is kept from training, for selection in sweeps."
    )
    channels: int = Field(
        3, ge=1, le=512, description="Channels of an image: 3 is RGB, 1 is grey; others come from TIFF or .npy files."
    )
    value_range: tuple[float, float] | None = Field(
        None,
        description="Values that become black and white where data.channels is not 3; null: the whole range of the "
        "type, 0 to 1 for fractions.",
    )
    image_size: Size = Field(224, description="What the networks see, in pixels: a side, or [rows, columns].")
    batch_size: int = Field(64, ge=1, description="Images of one training step, over all workers.")
    eval_batch_size: int = Field(128, ge=1, description="Images of one evaluation batch, over all workers.")
    num_classes: int | None = Field(None, ge=2, description="Number of classes; null: the source's.")
    mean: tuple[float, ...] | None = Field(
        None, description="Mean of each channel, red, green and blue, in [0, 1] that is subtracted; null: the source's."
    )
    std: tuple[Positive, ...] | None = Field(
        None, description="Standard deviation of each channel that is divided by; null: the source's."
    )
    augment: Literal["auto", "crop", "area", "none"] = Field(
        "auto",
        description="How training images vary: crop pads, crops and flips at native size, area cuts out a random area; "
        "auto: by the source and its sizes.",
    )
    crop_padding: int = Field(4, ge=0, description="Pixels of zeros around an image before augment=crop cuts.")
    flip: bool = Field(True, description="Whether half of the training images are mirrored (not with augment=none).")
    color_jitter: Rate = Field(
        0.0, description="Largest change of the brightness, contrast and saturation of training images, as a share."
    )
    policy: Literal["none", "rand", "trivial"] = Field(
        "none", description="Random operations on training images: RandAugment, or TrivialAugment (wide)."
    )
    policy_layers: int = Field(2, ge=1, le=8, description="Operations of RandAugment on each image.")
    policy_strength: int = Field(9, ge=0, le=30, description="Strength of RandAugment's operations, of 30.")
    erase: float = Field(
        0.0, ge=0, le=1, description="Share of the training images in which a random rectangle is erased."
    )
    mixup: Weight = Field(
        0.0,
        description="Alpha of mixup, which blends each training image and its label with another's; 0: off; beside "
        "cutmix each takes half of the images.",
    )
    cutmix: Weight = Field(
        0.0, description="Alpha of cutmix, which puts a rectangle of another image into each training image; 0: off."
    )
    repeats: int = Field(
        1,
        ge=1,
        description="How often each image of a batch is in it, varied anew; an epoch sees 1/repeats of the images.",
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform",
        description="How often an image is seen: once an epoch, or so that every class is seen equally often.",
    )
    resize: Literal["device", "pil"] = Field(
        "device", description="Who resizes small images: the device, in batches, or PIL itself, which is slower."
    )
    dct_scaling: bool = Field(
        False,
        description="Whether training decodes JPEGs at 1/2, 1/4 or 1/8 of their size where random areas of them are "
        "still as large as image_size: less work for large photographs.",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="A broken image ends the run, or is left out and counted."
    )
    workers: int = Field(2, ge=0, description="Processes of each worker that decode large images.")

    @model_validator(mode="after")
    def _every_channel_has_its_numbers(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"data.{name} has {len(values)} numbers for data.channels={self.channels}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"data.value_range={list(self.value_range)}: the smaller one comes first")
        return self


class NetworkObjective(Section):
    """Weights of one network's loss terms."""

    read_by = ("bootvit/objective.py", "bootvit/learner.py")
    ce: Weight = Field(1.0, description="Weight of the cross entropy with the labels.")
    kd: Weight = Field(1.0, description="Weight of the distance to the other network's softened predictions.")
    hint: Weight = Field(0.0, description="Weight of the distance to the other network's features after every block.")
    decayed: tuple[Literal["ce", "kd", "hint"], ...] = Field(
        ("hint",), description="Names of the terms whose weight falls as objective.hint_decay says."
    )


class ObjectiveConfig(Section):
    """The bootstrapping objective; `kd` and `hint` are used where there are two networks."""

    read_by = ("bootvit/objective.py", "bootvit/learner.py")
    vit: NetworkObjective = NetworkObjective(hint=10.0)
    agent: NetworkObjective = NetworkObjective()
    label_smoothing: Rate = Field(
        0.0, description="Share of each label in the cross entropies that is spread evenly over all classes."
    )
    class_weights: Literal["none", "balanced"] | tuple[Positive, ...] = Field(
        "none",
        description="What an image's cross entropy is multiplied by, class by class; balanced: images / (classes * "
        "images of its class).",
    )
    temperature: Positive = Field(4.0, description="What logits are divided by before their softened predictions.")
    hint_decay: Literal["linear", "none"] = Field(
        "linear", description="Whether decayed terms fall to zero over the run, epoch by epoch, or keep their weight."
    )
    hint_pool: Literal["grid", "raster"] = Field(
        "grid",
        description="How the larger of two maps is averaged: over squares, or, as the reference, over runs of it.",
    )
    hint_norm: bool = Field(True, description="Whether both maps are layer-normalised before they are compared.")


class AgentOptimConfig(Section):
    """What the agent's optimiser does differently in joint training; null: as the ViT's."""

    read_by = ("bootvit/optim.py",)
    name: str | None = Field(None, description="The agent's optimiser; null: the ViT's.")
    lr: Positive | None = Field(None, description="The agent's learning rate; null: the ViT's.")
    weight_decay: Weight | None = Field(None, description="The agent's weight decay; null: the ViT's.")
    momentum: Rate | None = Field(None, description="The agent's momentum, for sgd; null: the ViT's.")
    clip_norm: Positive | Literal["none"] | None = Field(
        None, description="Largest L2 norm of the agent's gradient; none: no clipping; null: the ViT's."
    )


class OptimConfig(Section):
    """The optimiser."""

    read_by = ("bootvit/optim.py", "bootvit/learner.py")
    name: str = Field("adamw", description="The optimiser: adamw or sgd of torch, or another of timm by its name.")
    lr: Positive = Field(1e-3, description="The learning rate, which the warm-up and schedule.kind multiply.")
    weight_decay: Weight = Field(0.05, description="Weight decay, of every parameter as in the paper.")
    momentum: Rate = Field(0.0, description="Momentum, for sgd, and for those of timm that have one.")
    decay_vectors: bool = Field(
        True,
        description="Whether weight decay falls on biases, norms, tokens and position tables too, as in the paper.",
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Factor of the learning rate from each layer to the one below it, as timm's; null: one rate.",
    )
    ema: Rate | None = Field(
        None,
        description="Decay of a moving average of the weights, which is evaluated, saved and exported beside the last "
        "ones; it is lower in the first steps, as timm's warm-up; null: none.",
    )
    clip_norm: Positive | None = Field(
        None, description="Largest L2 norm of a network's gradient, which is scaled down to it; null: no clipping."
    )
    clip_when: Literal["every", "first_step"] = Field(
        "every", description="Which steps clip: all, or only the first one as in the reference."
    )
    clip_scope: Literal["all", "vit"] = Field(
        "all", description="What shared training clips: all weights, or not those that only the agent has."
    )
    accumulate: int = Field(
        1, ge=1, description="Parts in which a batch passes the networks, one after the other: less memory."
    )
    sam_rho: Positive | None = Field(
        None, description="Radius of sharpness-aware minimisation, which takes two passes a step; null: off."
    )
    sam_clip: bool = Field(
        True, description="Whether the sharpness-aware gradient is clipped, which the reference does not do."
    )
    agent: AgentOptimConfig = AgentOptimConfig()


class AgentScheduleConfig(Section):
    """What the agent's learning rate does differently in joint training; null: as the ViT's."""

    read_by = ("bootvit/optim.py",)
    kind: Literal["cosine", "constant"] | None = Field(
        None, description="The agent's course of the learning rate; null: the ViT's."
    )
    period: int | None = Field(None, ge=1, description="Epochs of the agent's half cosine; null: the ViT's.")
    warmup_epochs: Weight | None = Field(None, description="Epochs of the agent's warm-up; null: the ViT's.")
    warmup_mode: Literal["linear", "constant"] | None = Field(
        None, description="The course of the agent's warm-up; null: the ViT's."
    )
    warmup_factor: float | None = Field(
        None, ge=0, le=1, description="Share of the rate with which the agent's warm-up begins; null: the ViT's."
    )


class ScheduleConfig(Section):
    """How long, and the learning rate over that time."""

    read_by = ("bootvit/optim.py", "bootvit/loop.py")
    epochs: int = Field(240, ge=1, description="Passes over the training images in use.")
    kind: Literal["cosine", "constant"] = Field(
        "cosine", description="Course of the learning rate after the warm-up: half a cosine down to zero, or constant."
    )
    period: int | None = Field(None, ge=1, description="Epochs of the half cosine; null: all of the run.")
    per: Literal["step", "epoch"] = Field(
        "step", description="Whether the rate changes at every step or once an epoch."
    )
    warmup_epochs: Weight = Field(0.0, description="Epochs of the warm-up, which may be a part of one.")
    warmup_mode: Literal["linear", "constant"] = Field(
        "linear", description="Whether the rate rises during the warm-up or stays at warmup_factor's share."
    )
    warmup_factor: float = Field(0.2, ge=0, le=1, description="Share of the rate with which the warm-up begins.")
    eval_every: int = Field(1, ge=1, description="Epochs between evaluations; the last epoch is always evaluated.")
    max_steps: int | None = Field(None, ge=1, description="Steps after which a run ends early, for trials; null: none.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Evaluations without a higher held-out accuracy of the first network after which a run ends; null: "
        "none.",
    )
    agent: AgentScheduleConfig = AgentScheduleConfig()


class CheckpointConfig(Section):
    """When a run is saved, beside the end of every epoch, and how much of it is kept."""

    read_by = ("bootvit/loop.py", "bootvit/checkpoint.py")
    every_steps: int | None = Field(None, ge=1, description="Steps between checkpoints within an epoch; null: none.")
    every_minutes: Positive | None = Field(10.0, description="Minutes between checkpoints within an epoch; null: none.")
    keep: int = Field(2, ge=1, description="Number of the newest checkpoints that stay on disk.")
    best: bool = Field(
        False,
        description="Whether the best checkpoint stays too, by the first network's held-out top-1, or its test top-1 "
        "where nothing is held out.",
    )


class RayConfig(Section):
    """Where and on how many workers a run is trained."""

    read_by = ("bootvit/ray_workers.py", "bootvit/driver.py", "bootvit/runs.py", "cluster/capacity.py")
    num_workers: Count | tuple[Count, Count] = Field(
        1,
        description="Workers of a run; [fewest, most]: as many as a cluster that shrinks and grows has room for.",
    )
    cpus_per_worker: Positive = Field(1, description="CPUs that each worker books and computes with.")
    use_gpu: bool | None = Field(
        None, description="Whether each worker takes a GPU; null: where the machine or cluster has them."
    )
    storage_path: Address = Field(
        "./runs",
        description="Parent of the runs' folders, relative to where the command is started, which every node sees; or "
        "an address in an object store, such as s3://BUCKET/FOLDER.",
    )
    max_failures: int = Field(
        0, ge=0, description="How often a run goes on from its last checkpoint after it has lost a worker."
    )
    wait_minutes: Positive = Field(
        30.0, description="Minutes that workers wait for nodes, at the start and after a loss."
    )
    collective_timeout: Positive = Field(1800.0, description="Seconds after which workers that hang count as lost.")

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


# every model inherits ABCMeta's `register`, which nobody calls
warnings.filterwarnings("ignore", 'Field name "register" in "TrackingConfig" shadows')


class TrackingConfig(Section):
    """MLflow."""

    read_by = (
        *("bootvit/tracking/run.py", "bootvit/tracking/artifacts.py", "bootvit/tracking/model.py"),
        *("bootvit/driver.py", "bootvit/loop.py"),
    )
    enabled: bool = Field(
        True, description="Whether runs are sent to MLflow; their folders have everything either way."
    )
    uri: Address | None = Field(
        None,
        description="MLflow's server or store; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db where the command "
        "starts.",
        repr=False,
    )
    experiment: str = Field("bootvit", description="The experiment's name in MLflow.")
    log_every: int = Field(20, ge=1, description="Steps between two records of losses, rate and speed in the journal.")
    checkpoints: Literal["none", "best", "all"] = Field(
        "best",
        description="Which weights MLflow gets of a finished run, of the checkpoints that it keeps; best: of the "
        "highest held-out accuracy, or the final one where nothing is held out.",
    )
    moments: bool = Field(
        False, description="Whether MLflow gets those checkpoints whole, with the optimiser's moments, to resume from."
    )
    model: bool = Field(
        True,
        description="Whether MLflow gets a model to serve of a finished run; trials of a sweep have none.",
    )
    register: str | None = Field(
        None,
        pattern=r"^[^/:'\"]+$",
        description="The name under which that model is registered in MLflow; null: it is not.",
    )
    system: bool = Field(
        True, description="Whether the load of rank 0's machine is recorded, every ten seconds at most."
    )
    explain_images: int = Field(
        0,
        ge=0,
        description="Images on which every evaluation notes, block by block, what `bootvit explain` measures; 0: none.",
    )

    @model_validator(mode="after")
    def _registers_a_model(self) -> Self:
        if self.register is not None and not self.model:
            raise ValueError(f"tracking.register={self.register}: tracking.model=false leaves nothing to register")
        return self


class Config(Section):
    """One run, completely."""

    read_by = ("bootvit/driver.py", "bootvit/runs.py", "bootvit/learner.py", "bootvit/extensions.py")
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+,-]*$",
        max_length=200,
        description="The run's name and its folder's.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="What initial weights, the order of images, augmentation and dropout depend on."
    )
    imports: tuple[str, ...] = Field(
        (),
        description="Modules of yours that are imported first, by name or as files beside the config: they register "
        "models with timm, and have data sets and functions for on_epoch.",
    )
    on_epoch: tuple[str, ...] = Field(
        (),
        description="MODULE:NAME of functions of yours that rank 0 calls with the config and an EpochReport after "
        "every epoch.",
    )
    method: Method = Field(
        "joint",
        description="One network alone (vit, agent), or both: joint as two networks, shared on one set of weights.",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32",
        description="Number format: of everything, or bf16 or fp16 for the products that tolerate it (autocast); fp16 "
        "scales the loss.",
    )
    compile: bool = Field(
        False,
        description="Whether torch.compile translates the training step first, which takes a minute or two; on CPUs it "
        "made the step of tiny images faster and that of 224 pixels slower.",
    )
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
        if self.data.batch_size < self.ray.most * self.optim.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is smaller than optim.accumulate={self.optim.accumulate} "
                f"times ray.num_workers={self.ray.most}: every part needs an image"
            )
        return self

    @model_validator(mode="after")
    def _repeated_images_have_partners(self) -> Self:
        mixes = self.data.mixup or self.data.cutmix
        if mixes and self.data.repeats > 1 and self.data.batch_size < 2 * self.data.repeats:
            raise ValueError(
                f"data.repeats={self.data.repeats}: a batch of {self.data.batch_size} has no two images to mix"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_images_of_its_own(self) -> Self:
        if self.schedule.patience is not None and self.data.held_out == 0:
            raise ValueError(
                f"schedule.patience={self.schedule.patience}: when to stop is decided on held-out images: set "
                "data.held_out, such as 0.1"
            )
        return self

    @model_validator(mode="after")
    def _steps_of_the_scaler_are_plain(self) -> Self:
        if self.precision == "fp16" and self.optim.sam_rho is not None:
            raise ValueError("precision=fp16: sharpness-aware steps are not scaled: use bf16, or optim.sam_rho=null")
        return self

    @model_validator(mode="after")
    def _blocks_are_computed_again_uncompiled(self) -> Self:
        if self.model.checkpoint_blocks and self.compile:
            raise ValueError("model.checkpoint_blocks=true: the compiler decides itself what to keep; compile=false")
        return self


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A side, or (rows, columns), as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
