"""Cases that the kit does not have, made by `slow_reference`, through the kit's own comparison.

Other head counts, images and patches that are not square, mixed norms, sparse attention and DeiTs in pairs, other
optimisers, and whole runs of each.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import slow_reference as slow
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "parity"))

from parity_kit import Case, ParityError, as_case
from parity_pieces import check_decay
from test_parity import run_case

CLASSES, DEPTH, BATCH = 6, 3, 4
TRAINING = {
    "optimizer": {"name": "AdamW", "lr": 2e-3, "weight_decay": 0.05},
    "lr_schedule": {"name": "cosine_annealing", "T_max": 3},
}


def vit(heads: int, width: int, image: Any, patch: Any, name: str = "vit", **more: Any) -> dict[str, Any]:
    """A Transformer's settings."""
    inner = {
        "embed_dim": width,
        "num_encoder_layers": DEPTH,
        "num_heads": heads,
        "dim_feedforward": 30,
        "dropout": None,
    }
    return {
        "name": name,
        "transformer": inner | {"activation": "gelu", "final_norm": True} | more,
        "patch_embed": {"name": "vit_like", "img_size": image, "patch_size": patch, "image_channels": 3},
        "pos_encoding": {"name": "learnable", "dropout": None},
    }


def stem(patch: Any) -> dict[str, Any]:
    """A CNN's stem: patches of a size, or None for the ResNet-like one."""
    if patch is None:
        return {"name": "resnet_like", "image_channels": 3, "activation": "gelu", "mid_channel": 6}
    return {"name": "vit_like", "image_channels": 3, "patch_size": patch}


def cnn(width: int, patch: Any, heads: int | None, *, pre: bool, pools: tuple[int, ...] = ()) -> dict[str, Any]:
    """A CNN's settings."""
    conv = {"name": "conv_sl", "bias": True} if heads is None else {"name": "conv_manyhead", "num_heads": heads}
    return {
        "name": "cnn",
        "cnn_name": "cnn_block",
        "input_proj": stem(patch),
        "conv_block": conv,
        "mlp_block": {"name": "mlp_cnn", "dim_feedforward": 20, "dropout": None},
        "down_sample_layers": list(pools),
        "embed_dim": width,
        "num_layers": DEPTH,
        "norm": {"name": "bn"},
        "activation": "gelu",
        "pre_norm": pre,
    }


def hint_cfg(width: int, start: int = 1, **more: Any) -> dict[str, Any]:
    """The hint's settings."""
    return {"start_id": start, "proj_student": False, "embed_dim": width, "norm": True, "auto_resample": True} | more


def joint(v: Any, c: Any, hint: Any, *, weights: Any = None, decayed: Any = ("hint_vit",), clips: Any = (None, None),
          trainings: Any = (TRAINING, TRAINING)) -> dict[str, Any]:  # fmt: skip
    """Two networks with their own weights."""
    networks = {
        "vit": {"cfg_path": "v.yaml", "extract_layers": [f"transformer.layers.{i}" for i in range(DEPTH)]},
        "cnn": {"cfg_path": "c.yaml", "extract_layers": [f"layers.{i}" for i in range(DEPTH)]},
    }
    for name, clip in zip(("vit", "cnn"), clips, strict=True):
        networks[name] |= {} if clip is None else {"clip_max_norm": clip}
    return {
        "num_classes": CLASSES,
        "mutual": {"cfg": {"name": "base_mutual", **networks}, "joint_training": False, "master": "vit"},
        "sub_configs": {
            "v.yaml": {"model": v, "training": trainings[0]},
            "c.yaml": {"model": c, "training": trainings[1]},
        },
        "training": {"train_epochs": 4, "decay_strategy": {"use_decay": bool(decayed), "decay_items": list(decayed)}},
        "loss": {
            "name": "base_mutual_loss",
            "weight_dict": weights or {"cls": 1.0, "kd": 1.0, "hint_cnn": 0, "hint_vit": 10.0},
            "loss_items": ["cross_entropy", "mutual_kd", "mutual_hint"],
            "kd_temp": 4.0,
            "hint_cfg": hint,
        },
    }


def shared(v: Any, patch: Any, hint: Any, *, pre: bool, pools: tuple[int, ...] = (), clip: float | None = None,
           weights: Any = None, decayed: Any = ("hint_vit", "kd_cnn"), **training: Any) -> dict[str, Any]:  # fmt: skip
    """A CNN on the Transformer's weights."""
    layers = {
        "extract_layers_vit": [f"transformer.layers.{i}" for i in range(DEPTH)],
        "extract_layers_cnn": [f"layers.{i}" for i in range(DEPTH)],
    }
    own = {"norm": {"name": "bn"}, "input_proj": stem(patch), "pre_norm": pre, "down_sample_layers": list(pools)}
    networks = {"name": "joint_model", "vit": v, "cnn": own, "joint": {"clip_max_norm": clip}, **layers}
    decay = {"use_decay": True, "decay_items": list(decayed)}
    return {
        "num_classes": CLASSES,
        "mutual": {"cfg": networks, "joint_training": True, "master": "vit"},
        "training": TRAINING | {"train_epochs": 4, "decay_strategy": decay} | training,
        "loss": {
            "name": "joint_mutual_loss",
            "weight_dict": weights
            or {
                "cls_cnn": 0.5,
                "cls_vit": 0.7,
                "kd_cnn": 0.4,
                "kd_vit": 0.5,
                "hint_cnn": 1.5,
                "hint_vit": 5.0,
            },
            "loss_items": ["joint_ce", "joint_kd", "joint_hint"],
            "kd_temp": 2.0,
            "hint_cfg": hint,
        },
    }


def single(model: Any, **training: Any) -> dict[str, Any]:
    """One network."""
    loss = {"name": "ce_loss", "weight_dict": {"cls": 1.0}}
    return {"num_classes": CLASSES, "model": model, "loss": loss, "training": TRAINING | {"train_epochs": 3} | training}


SPARSE = {"use_entmax": True, "learnable_entmax_alpha": True}
SGD = {"optimizer": {"name": "SGD", "lr": 0.05, "weight_decay": 5e-4, "momentum": 0.9},
       "lr_schedule": {"name": "cosine_annealing", "T_max": 5, "warmup_iters": 2}}  # fmt: skip

# name: (settings, image rows and columns)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "vit, oblong patches": (single(vit(5, 20, [24, 40], [6, 8])), (24, 40)),
    "deit, sparse": (single(vit(2, 16, [16, 24], 8, "deit", **SPARSE)), (16, 24)),
    "vit, fixed alpha, sgd": (single(vit(4, 16, 16, 4, use_entmax=True), **SGD, clip_max_norm=0.5), (16, 16)),
    "cnn, post-norm 3x3, oblong": (single(cnn(18, [6, 8], None, pre=False), clip_max_norm=0.3), (24, 40)),
    "cnn, pre-norm 5 heads, oblong": (single(cnn(14, None, 5, pre=True, pools=(0, 2))), (50, 70)),
    "cnn, 17 heads": (single(cnn(12, 4, 17, pre=False, pools=(1,))), (24, 24)),
    "joint, sparse, 8-head cnn, oblong": (
        joint(vit(4, 16, [24, 32], 8, **SPARSE), cnn(16, 8, 8, pre=False), hint_cfg(16), clips=(0.3, 0.2)),
        (24, 32),
    ),
    "joint deit": (joint(vit(3, 18, 32, 8, "deit"), cnn(18, 8, None, pre=True), hint_cfg(18, 2)), (32, 32)),
    "joint, other patches, own optimisers": (
        joint(
            vit(2, 16, [32, 48], 8, norm_eps=1e-6),
            cnn(16, [4, 8], 7, pre=True),
            hint_cfg(16, norm=False),
            weights={"cls": 1.0, "kd": 0.3, "hint_cnn": 2.0, "hint_vit": 3.0},
            decayed=("kd", "hint_cnn"),
            trainings=(TRAINING, SGD),
        ),
        (32, 48),
    ),
    "joint, no decay, resnet stem": (
        joint(vit(4, 16, 32, 8), cnn(16, None, 9, pre=False, pools=(1,)), hint_cfg(16), decayed=()),
        (32, 32),
    ),
    "shared, 5 heads, oblong": (shared(vit(5, 20, [24, 32], 8), 8, hint_cfg(20), pre=False, clip=0.2), (24, 32)),
    "shared deit, sparse, 8 heads": (
        shared(vit(8, 16, 32, 16, "deit", **SPARSE), None, hint_cfg(16, 2), pre=True, pools=(0,)),
        (32, 32),
    ),
    "shared, other terms decay": (
        shared(vit(5, 20, 16, 8), 8, hint_cfg(20), pre=True, decayed=("kd_vit", "cls_cnn", "hint_cnn")),
        (16, 16),
    ),
    "shared, a few terms, all decay": (
        shared(
            vit(5, 20, 16, 8),
            8,
            hint_cfg(20),
            pre=False,
            weights={"cls_vit": 0.3, "cls_cnn": 2.0, "kd_vit": 1.5},
            decayed=("cls_vit", "cls_cnn", "kd_vit", "kd_cnn", "hint_vit", "hint_cnn"),
        ),
        (16, 16),
    ),
    "joint, labels and distillation decay": (
        joint(vit(4, 16, 16, 8), cnn(16, 8, 9, pre=True), hint_cfg(16), decayed=("cls", "kd")),
        (16, 16),
    ),
    "joint, names of shared training decay nothing": (
        joint(vit(4, 16, 16, 8), cnn(16, 8, 9, pre=True), hint_cfg(16), decayed=("kd_vit", "cls_cnn", "hint_cnn")),
        (16, 16),
    ),
}
ITEMS = ("cls", "kd", "cls_vit", "cls_cnn", "kd_vit", "kd_cnn", "hint_vit", "hint_cnn")


class Slow:
    """The slow networks of some settings."""

    def __init__(self, config: dict[str, Any], state: slow.State | None = None) -> None:
        self.config, self.mutual = config, config.get("mutual")
        self.shared = bool(self.mutual and self.mutual["joint_training"])
        self.models = self._models()
        self.state = self._fresh() if state is None else state
        self.parameters = {name: value for name, value in self.state.items() if value.requires_grad}

    def _models(self) -> dict[str, tuple[str, Any]]:
        """(prefix, settings) by the reference's name, in its order."""
        if self.mutual is None:
            model = self.config["model"]
            return {"cnn" if model["name"] == "cnn" else "vit": ("", model)}
        nets = self.mutual["cfg"]
        files = self.config.get("sub_configs", {})
        return {
            net: (f"models.{net}.", nets[net] if self.shared else files[nets[net]["cfg_path"]]["model"])
            for net in ("cnn", "vit")
        }

    def _fresh(self) -> slow.State:
        shapes = {}
        for net, (prefix, cfg) in self.models.items():
            if net == "vit":
                shapes |= slow.vit_shapes(cfg, CLASSES, prefix)
                continue
            inner = self.models["vit"][1]["transformer"] if self.shared else {"embed_dim": cfg["embed_dim"]}
            shapes |= slow.cnn_shapes(cfg, CLASSES, prefix, inner["embed_dim"], DEPTH, shared=self.shared)
        state = {n: v.double() if v.is_floating_point() else v for n, v in slow.fresh(shapes, 0).items()}
        for name, value in state.items():
            value.requires_grad_(value.is_floating_point() and not name.endswith(("running_mean", "running_var")))
        return state

    def forward(self, x: Tensor, *, train: bool) -> dict[str, slow.Output]:
        """Both networks, or the one."""
        out = {}
        for net, (prefix, cfg) in self.models.items():
            if net == "vit":
                out[net] = slow.vit_forward(self.state, prefix, cfg, x, train=train)
            else:
                owner = ("models.vit.", self.models["vit"][1]["transformer"]) if self.shared else None
                out[net] = slow.cnn_forward(self.state, prefix, cfg, x, train=train, vit=owner)
        return out

    def items(self, out: dict[str, slow.Output], labels: Tensor) -> dict[str, Tensor]:
        """Every loss item."""
        return slow.items(out, labels, self.config["loss"], shared=self.shared)

    def factors(self, epoch: int | None) -> dict[str, float]:
        """What each name of a weight is multiplied by in an epoch; None: never decayed."""
        strategy = self.config["training"].get("decay_strategy", {})
        factor = 1.0 if epoch is None else max(0.0, 1 - epoch / self.config["training"]["train_epochs"])
        faded = strategy.get("decay_items", []) if strategy.get("use_decay") else []
        return {item: factor if item in faded else 1.0 for item in ITEMS}

    def totals(self, named: dict[str, Tensor], epoch: int | None) -> dict[str, Tensor]:
        """The weighted totals in an epoch; None: never decayed."""
        return slow.totals(named, self.config["loss"], self.factors(epoch))

    def snapshot(self, start: str) -> dict[str, Tensor]:
        """The state dict as the kit stores it, float32 where that loses nothing."""
        exact = start == "state."
        return {f"{start}{n}": (v.detach().float() if exact and v.is_floating_point() else v.detach()).clone()
                for n, v in self.state.items()}  # fmt: skip

    def aliases(self) -> dict[str, str]:
        """CNN-side names of shared tensors."""
        pairs = (("cnn_block.mhsa.", "attention."), ("mlp_block.", "mlp."))
        return {
            name.replace("models.vit.transformer", "models.cnn").replace(vit_side, cnn_side): name
            for cnn_side, vit_side in pairs
            for name in (self.parameters if self.shared else ())
            if f".{vit_side}" in name
        }


def top(k: int, logits: Tensor, labels: Tensor) -> float:
    """The share of labels among the first k."""
    return float((logits.topk(k).indices == labels[:, None]).any(1).double().mean())


def inputs(size: tuple[int, int], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images, exact in float32, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """Plain numbers."""
    return {name: float(value.detach()) for name, value in values.items()}


def one_pass(config: dict[str, Any], size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A `single` or `mutual` case: facts and tensors."""
    net = Slow(config)
    x, labels = inputs(size, BATCH, 1)
    tensors = {"input.x": x, "input.label": labels} | net.snapshot("state.")
    tensors |= {f"state.{alias}": tensors[f"state.{name}"] for alias, name in net.aliases().items()}
    with torch.no_grad():
        calm = net.forward(x.double(), train=False)
    named = numbers(net.items(calm, labels))
    out = net.forward(x.double(), train=True)
    tensors |= {k: v for k, v in net.snapshot("after_train_forward.").items() if k.endswith(("mean", "var", "tracked"))}
    losses = net.items(out, labels)
    if net.mutual is None:
        own = next(iter(out.values()))
        tensors |= {"output.eval": next(iter(calm.values())).pred, "output.train": own.pred.detach()}
        scalars: dict[str, Any] = {"ce_eval": named["cls"], "ce_train": float(losses["cls"].detach())}
        loss = losses["cls"]
        if own.dist is not own.pred:
            distilled = torch.nn.functional.cross_entropy(own.dist, labels)
            scalars["ce_train_dist"] = float(distilled.detach())
            tensors["output.train_dist"] = own.dist.detach()
            loss = loss + 0.5 * distilled
        loss.backward()
        tensors |= {f"grad.{name}": p.grad for name, p in net.parameters.items() if p.grad is not None}
        tensors["output_fp32.eval"] = tensors["output.eval"].float()
        return {"case": "single", "config": config, "scalars": scalars}, tensors
    for name, own in out.items():
        tensors |= {f"output.eval.{name}": calm[name].pred, f"output.train.{name}": own.pred.detach()}
        tensors[f"output_fp32.eval.{name}"] = calm[name].pred.float()
        layer = "transformer.layers" if name == "vit" else "layers"
        tensors |= {f"output.feature.{name}.{layer}.{i}": f.detach() for i, f in enumerate(own.features)}
    if out["vit"].dist is not out["vit"].pred:
        tensors["output.train.vit_dist"] = out["vit"].dist.detach()
    epoch = 1
    for total, loss in net.totals(losses, epoch).items():
        for p in net.parameters.values():
            p.grad = None
        loss.backward(retain_graph=True)
        tensors |= {f"grad.{total}_total.{n}": p.grad for n, p in net.parameters.items() if p.grad is not None}
    counted = {n: sum(p.requires_grad for k, p in net.parameters.items() if k.startswith(f"models.{n}.")) for n in out}
    return {
        "case": "mutual",
        "config": config | {"grad_epoch": epoch},
        "scalars": {
            "loss_items_train": numbers(losses),
            "totals_train_by_epoch": {str(e): numbers(net.totals(losses, e)) for e in (0, 1, 3)},
            **{f"decay_{item}_by_epoch": {str(e): net.factors(e)[item] for e in (0, 1, 3)} for item in ITEMS},
            "eval": {
                "loss_dict": named,
                "totals": numbers(net.totals(net.items(calm, labels), None)),
                "acc1": {name: top(1, own.pred, labels) for name, own in calm.items()},
                "acc5": {name: top(5, own.pred, labels) for name, own in calm.items()},
            },
            "grad_params_present_at_step": {"last": counted},
        },
    }, tensors


def trajectory(config: dict[str, Any], size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A `trajectory` case: two epochs of two batches, as the reference's trainers do them."""
    config = copy.deepcopy(config)
    config["training"]["train_epochs"] = 2
    config |= {"train_batches": [3, 3], "val_batches": [3, 2]}
    x, labels = inputs(size, 6, 2)
    val_x, val_labels = inputs(size, 5, 3)
    net = Slow(config)
    tensors = {"input.x": x, "input.label": labels, "input.val_x": val_x, "input.val_label": val_labels}
    tensors |= net.snapshot("state.")
    tensors |= {f"state.{alias}": tensors[f"state.{name}"] for alias, name in net.aliases().items()}
    scalars: dict[str, Any] = {}
    runs: list[tuple[str, bool, dict[str, Any]]] = [("final.", False, scalars)]
    if net.mutual is not None:
        scalars["clip_every_step"] = {}
        runs.append(("final_clip_every_step.", True, scalars["clip_every_step"]))
    ends = []
    for start, every, into in runs:
        state = {n: v.detach().clone().requires_grad_(v.requires_grad) for n, v in net.state.items()}
        run = Slow(config, state)
        into.update(train(run, x.double(), labels, val_x.double(), val_labels, every=every))
        ends.append(run.snapshot(start))
        tensors |= ends[-1]
    if net.mutual is not None:
        moved = max(
            float((a.double() - b.double()).abs().max()) for a, b in zip(*(e.values() for e in ends), strict=True)
        )
        scalars["max_abs_param_difference_faithful_vs_clip_every_step"] = moved
    return {"case": "trajectory", "config": config, "scalars": scalars}, tensors


def train(run: Slow, x: Tensor, labels: Tensor, val_x: Tensor, val_labels: Tensor, *, every: bool) -> dict[str, Any]:
    """Steps and evaluations of one run."""
    owners, clips = owners_of(run), clips_of(run)
    optimizers = [optimizer(list(parameters), settings["optimizer"]) for parameters, settings in owners.values()]
    steps, evaluations = [], [evaluation(run, val_x, val_labels)]
    for step in range(4):
        epoch, part = step // 2, slice(3 * (step % 2), 3 * (step % 2) + 3)
        for p in run.parameters.values():
            p.grad = None
        named = run.items(run.forward(x[part], train=True), labels[part])
        sums = run.totals(named, epoch)
        rates = []
        for (name, loss), one, (_, settings) in zip(sums.items(), optimizers, owners.values(), strict=True):
            loss.backward(retain_graph=True)
            if clips.get(name) and (every or step == 0 or run.mutual is None):
                max_norm, parameters = clips[name]
                torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            rates.append(slow.rate(settings["optimizer"], settings["lr_schedule"], epoch))
            one.param_groups[0]["lr"] = rates[-1]
            one.step()
        norm = sum(float(p.detach().square().sum()) for p in run.parameters.values()) ** 0.5
        row = {"step": step, "epoch": epoch, "lr": rates, "totals": numbers(sums), "loss_dict": numbers(named)}
        steps.append(row | {"param_norm": norm})
    evaluations.append(evaluation(run, val_x, val_labels))
    return {"steps": steps, "evaluations": evaluations}


def owners_of(run: Slow) -> dict[str, tuple[list[Tensor], Any]]:
    """(parameters, training settings) of every optimiser, by its total, in order."""
    if run.mutual is None or run.shared:
        return {"joint" if run.shared else "total": (list(run.parameters.values()), run.config["training"])}
    files, nets = run.config["sub_configs"], run.mutual["cfg"]
    return {
        net: (
            [p for name, p in run.parameters.items() if name.startswith(f"models.{net}.")],
            files[nets[net]["cfg_path"]]["training"],
        )
        for net in ("cnn", "vit")
    }


def clips_of(run: Slow) -> dict[str, tuple[float, list[Tensor]]]:
    """(largest norm, parameters that are clipped) by total."""
    if run.mutual is None:
        norms = {"total": run.config["training"].get("clip_max_norm")}
    else:
        norms = {n: s.get("clip_max_norm") for n, s in run.mutual["cfg"].items() if isinstance(s, dict) and n != "name"}
    owners = owners_of(run)
    on_vit = [p for name, p in run.parameters.items() if name.startswith("models.vit.")]
    return {
        n: (norm, on_vit if n == "joint" else owners[n][0])
        for n, norm in norms.items()
        if norm is not None and n in owners
    }


def optimizer(parameters: list[Tensor], settings: Any) -> torch.optim.Optimizer:
    """torch's own."""
    rest = {key: value for key, value in settings.items() if key != "name"}
    return getattr(torch.optim, settings["name"])(parameters, **rest)  # type: ignore[no-any-return]


@torch.no_grad()
def evaluation(run: Slow, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """The mean of the batches' values."""
    rows = []
    for images, targets in zip(x.split([3, 2]), labels.split([3, 2]), strict=True):
        out = run.forward(images, train=False)
        named = run.items(out, targets)
        row = numbers(named) | {f"loss {k}": float(v) for k, v in run.totals(named, None).items()}
        row |= {f"acc{k} {net}": top(k, own.pred, targets) for k in (1, 5) for net, own in out.items()}
        rows.append(row)
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    losses = {k.removeprefix("loss "): v for k, v in mean.items() if k.startswith("loss ")}
    named = {k: v for k, v in mean.items() if " " not in k}
    tops = {k: {n.split()[1]: v for n, v in mean.items() if n.startswith(f"acc{k} ")} for k in (1, 5)}
    if run.mutual is None:
        return {"loss": losses["total"], "loss_dict": named, "acc": {str(k): sum(v.values()) for k, v in tops.items()}}
    return {"loss": losses, "loss_dict": named, "acc1": tops[1], "acc5": tops[5]}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_pass(name: str) -> None:
    facts, tensors = one_pass(*VARIANTS[name])
    run_case(as_case(name, facts, tensors))


@pytest.mark.parametrize("name", VARIANTS)
def test_trajectory(name: str) -> None:
    facts, tensors = trajectory(*VARIANTS[name])
    run_case(as_case(name, facts, tensors))


def decay_case(items: list[str], *, used: bool = True, by_epoch: dict[str, list[float]]) -> Case:
    """A case that has nothing but one row of decay factors."""
    row = {"train_epochs": 8, "decay_items": items, "use_decay": used, "epochs": [0, 2, 7, 8, 9], "by_epoch": by_epoch}
    return as_case("decay", {"scalars": {"decay": [row]}}, {})


FADING, STEADY = [1.0, 0.75, 0.125, 0.0, 0.0], [1.0] * 5


@pytest.mark.parametrize("faded", ITEMS)
def test_every_term_of_both_mutual_losses_has_a_factor(faded: str) -> None:
    rows = {item: FADING if item == faded else STEADY for item in ITEMS}
    for case in (
        decay_case([faded], by_epoch=rows),
        decay_case([faded], used=False, by_epoch=dict.fromkeys(ITEMS, STEADY)),
        decay_case([*ITEMS], by_epoch=dict.fromkeys(ITEMS, FADING)),
    ):
        check_decay(case, case.scalars["decay"][0])


@pytest.mark.parametrize("faded", ITEMS)
def test_a_wrong_factor_of_any_term_is_noticed(faded: str) -> None:
    rows = {item: FADING if item == faded else STEADY for item in ITEMS}
    for item in ITEMS:
        wrong = decay_case([faded], by_epoch=rows | {item: STEADY if item == faded else FADING})
        with pytest.raises(ParityError, match=f"decay {item} "):
            check_decay(wrong, wrong.scalars["decay"][0])


def test_a_factor_of_no_term_is_noticed() -> None:
    case = decay_case(["hint_vit"], by_epoch={"kd_dist": STEADY})
    with pytest.raises(ParityError, match="no mutual loss has a term 'kd_dist'"):
        check_decay(case, case.scalars["decay"][0])
