"""The one schema of bootvit: a frozen, typed model of a run, and how files and overrides become one.

`load_config("digits/joint", ["data.fraction=0.1"])` reads a YAML file, merges the files that it `extends`, applies
the overrides, checks everything and returns a `Config`. `dump_config` writes it back; the two are inverse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bootvit.errors import UserError

Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Method = Literal["vit", "agent", "joint", "shared"]
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
    weights: str | None = Field(
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
    weights: str | None = Field(None, description="as the ViT's; timm only for a CNN of timm")


class ModelConfig(Section):
    """The networks, and how fresh ones are initialised."""

    init: Literal["timm", "reference"] = Field("timm", description="reference: patches and MLP biases at std 1")
    vit: ViTConfig = ViTConfig()
    agent: AgentConfig = AgentConfig()


class DataConfig(Section):
    """Where images come from, which of them are used, and how they become batches."""

    source: Literal["digits", "cifar10", "cifar100", "imagefolder", "imagenet", "parquet", "fake"] = "digits"
    root: str | None = Field(None, description="the data set's folder; relative to where the command is started")
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


class RayConfig(Section):
    """Where and on how many workers a run is trained."""

    num_workers: int = Field(1, ge=1)
    cpus_per_worker: Positive = 1
    use_gpu: bool | None = Field(None, description="null: a GPU per worker where the cluster has them")
    storage_path: str = Field("./runs", description="parent of the run directories; every node must see it")
    max_failures: int = Field(0, ge=0, description="restarts from the last checkpoint after a lost worker")


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = Field(None, description="null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db beside the command")
    experiment: str = "bootvit"
    log_every: int = Field(20, ge=1, description="steps between journal records")


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
        if self.data.batch_size < self.ray.num_workers:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is smaller than ray.num_workers={self.ray.num_workers}: "
                "every worker needs an image"
            )
        return self


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A side, or (rows, columns), as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# ------------------------------------------------------------------------------------------------- files

SHIPPED = Path(__file__).resolve().parent.parent / "configs"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: `1e-3` is a number, as everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"the key {key!r} is given twice, line {node.start_mark.line + 1}")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML; a mistake in it is a `UserError` that names `origin`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as err:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(err).split())}") from err


def find_config(name: str, shipped: Path = SHIPPED) -> Path:
    """A path to a YAML file, or the name of a shipped config without its ending."""
    for path in (Path(name), shipped / f"{name}.yaml", shipped / name):
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml"))
    near = get_close_matches(name.removesuffix(".yaml").removeprefix("configs/"), known, n=1)
    raise UserError(f"{name}: no such config file" + (f"; the nearest shipped one is {near[0]!r}" if near else ""))


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file on top of the files that it `extends` (relative to itself, later ones win)."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{path}: cannot be read: {err}") from err
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, not {type(data).__name__}")
    parents = data.pop("extends", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        target = path.parent / parent
        if not target.is_file():
            raise UserError(f"{path}: extends {parent!r}, but {target} does not exist")
        merged = merge(merged, read_layers(target, (*seen, path)))
    return merge(merged, data)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else replaces."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


def nest(key: str, value: Any) -> dict[str, Any]:
    """`a.b.c`, v -> {a: {b: {c: v}}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def parse_override(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` -> (key, value), the value read as YAML."""
    key, eq, value = text.partition("=")
    if not eq or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise UserError(f"override {text!r}: expected KEY=VALUE, such as data.fraction=0.1")
    return key, parse_yaml(value, f"override {text!r}")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check; relative places are resolved against the current folder.

    Raises `UserError` for a missing file, an unknown key, a wrong type or an impossible value.
    """
    path = find_config(name)
    data = read_layers(path)
    origins: dict[str, str] = {}
    for text in overrides:
        key, value = parse_override(text)
        data = merge(data, nest(key, value))
        origins[key] = f"override {text!r}"
    return make_config(data, str(path), origins)


def make_config(data: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> Config:
    """Check a merged mapping, resolve its places and check that the models it describes can be built."""
    from bootvit.models.zoo import check_models

    config = absolute(validate(Config, data, origin, origins or {}))
    try:
        check_models(config)
    except UserError as err:
        raise UserError(f"{origin}: {err}") from err
    return config


def absolute(config: Config) -> Config:
    """Resolve the places that are relative to where the command was started: Ray changes a worker's folder."""
    places: dict[str, Any] = {"ray": {"storage_path": _place(config.ray.storage_path)}}
    if config.data.root is not None:
        places["data"] = {"root": _place(config.data.root)}
    weights = {
        net: {"weights": _place(given)}
        for net, given in (("vit", config.model.vit.weights), ("agent", config.model.agent.weights))
        if given not in (None, "timm")
    }
    return override(config, places | ({"model": weights} if weights else {}))


def _place(path: str | None) -> str:
    return path if path is not None and "://" in path else str(Path(path or ".").expanduser().resolve())


def override(config: Config, changes: dict[str, Any]) -> Config:
    """The same run with some (nested) values changed, checked again."""
    return Config.model_validate_json(json.dumps(merge(config.model_dump(mode="json"), changes)))


T = TypeVar("T", bound=BaseModel)


def validate(schema: type[T], data: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> T:
    """`data` as `schema`; the first mistake becomes one line that names its place, key and value."""
    try:
        return schema.model_validate_json(json.dumps(data))
    except ValidationError as err:
        raise UserError(explain(err, schema, origin, origins or {})) from err
    except TypeError as err:  # a date, a set: YAML has types that JSON has not
        raise UserError(f"{origin}: {err}") from err


def explain(err: ValidationError, schema: type[BaseModel], origin: str, origins: dict[str, str]) -> str:
    """One line for a validation error: an unknown key first, since it often explains the others."""
    errors = sorted(err.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path = [str(part) for part in first["loc"] if not _is_union_arm(str(part))]
    key = ".".join(path)
    place = next(
        (o for k, o in origins.items() if key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.")),
        origin,
    )
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key {key!r}{suggest(schema, path)}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{place}: {key}={json.dumps(first['input'])}: {reason}" if key else f"{place}: {reason}"


def _is_union_arm(part: str) -> bool:
    return "[" in part or part in ("int", "float", "str", "bool")


def suggest(schema: type[BaseModel], path: list[str]) -> str:
    """The nearest key: of the same name elsewhere, else among its siblings, else anywhere in the schema."""
    section: type[BaseModel] | None = schema
    for part in path[:-1]:
        section = _section(section, part) if section else None
    siblings = list(section.model_fields) if section else []
    every = all_keys(schema)
    elsewhere = [key for key in every if key.split(".")[-1] == path[-1]]
    near = get_close_matches(path[-1], siblings, n=1)
    best = elsewhere or [".".join([*path[:-1], key]) for key in near] or get_close_matches(".".join(path), every, n=1)
    return f", did you mean {best[0]!r}?" if best else f"; known here: {', '.join(siblings)}"


def _section(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = schema.model_fields.get(name)
    options = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((t for t in options if isinstance(t, type) and issubclass(t, BaseModel)), None)


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema, leaves only."""
    keys: list[str] = []
    for name in schema.model_fields:
        section = _section(schema, name)
        keys += all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def flatten(config: BaseModel) -> dict[str, Any]:
    """{dotted key: value}, leaves only."""
    out: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                out[f"{prefix}{key}"] = value

    walk(config.model_dump(mode="json"), "")
    return out


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; `load_config` of it is the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)
