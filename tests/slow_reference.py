"""The reference's networks and training written once more, slowly and obviously, to make parity cases of any shape.

Works on a state dict with the reference's names and nothing else; shares no code with bootvit. Tokens are
(tokens, batch, width) and maps (batch, width, rows, cols), as in the parity kit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, pi, prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from entmax import entmax_bisect
from torch import Tensor

State = dict[str, Tensor]


def pair(size: Any) -> tuple[int, int]:
    """A side or a pair as a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# -------------------------------------------------------------------------------------------- weights


def vit_shapes(cfg: Any, classes: int, p: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Transformer's weights."""
    t, e = cfg["transformer"], cfg["patch_embed"]
    d, m, deit = t["embed_dim"], t["dim_feedforward"], cfg["name"] == "deit"
    rows, cols = (i // s for i, s in zip(pair(e["img_size"]), pair(e["patch_size"]), strict=True))
    out: dict[str, tuple[int, ...]] = {
        f"{p}cls_token": (1, 1, d),
        f"{p}patch_embed.proj.weight": (d, 3, *pair(e["patch_size"])),
        f"{p}patch_embed.proj.bias": (d,),
        f"{p}pos_embed.pos_embed": (rows * cols + 1 + deit, 1, d),
        f"{p}transformer.norm.weight": (d,),
        f"{p}transformer.norm.bias": (d,),
        f"{p}cls_head.weight": (classes, d),
        f"{p}cls_head.bias": (classes,),
    }
    if deit:
        out |= {f"{p}dist_token": (1, 1, d), f"{p}dist_head.weight": (classes, d), f"{p}dist_head.bias": (classes,)}
    for i in range(t["num_encoder_layers"]):
        q = f"{p}transformer.layers.{i}."
        linears = {
            "attention.linear_qkv": (3 * d, d),
            "attention.linear_out": (d, d),
            "mlp.linear1": (m, d),
            "mlp.linear2": (d, m),
        }
        for name, shape in linears.items():
            out |= {f"{q}{name}.weight": shape, f"{q}{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            out |= {f"{q}{name}.weight": (d,), f"{q}{name}.bias": (d,)}
        if t.get("use_entmax") and t.get("learnable_entmax_alpha"):
            out[f"{q}attention.softmax.alpha"] = ()
    return out


def cnn_shapes(cfg: Any, classes: int, p: str, d: int, depth: int, *, shared: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CNN's own weights and buffers."""
    stem = cfg["input_proj"]
    out: dict[str, tuple[int, ...]] = {f"{p}linear.weight": (classes, d), f"{p}linear.bias": (classes,)}
    norms = {f"{p}bn": d}
    if stem["name"] == "vit_like":
        out |= {f"{p}input_proj.weight": (d, 3, *pair(stem["patch_size"])), f"{p}input_proj.bias": (d,)}
    else:
        mid = stem["mid_channel"]
        out |= {f"{p}input_proj.conv1.weight": (mid, 3, 7, 7)}
        out |= {f"{p}input_proj.conv2.weight": (d, mid, 3, 3), f"{p}input_proj.conv2.bias": (d,)}
        norms[f"{p}input_proj.norm"] = mid
    for i in range(depth):
        q = f"{p}layers.{i}."
        norms |= {f"{q}norm1": d, f"{q}norm2": d}
        if shared:
            continue
        conv, m = cfg["conv_block"], cfg["mlp_block"]["dim_feedforward"]
        if conv["name"] == "conv_sl":
            out |= {f"{q}cnn_block.conv.weight": (d, d, 3, 3), f"{q}cnn_block.conv.bias": (d,)}
        else:
            out |= {f"{q}cnn_block.weight": (d, d, conv["num_heads"]), f"{q}cnn_block.bias": (d,)}
        out |= {f"{q}mlp_block.conv1.weight": (m, d, 1, 1), f"{q}mlp_block.conv1.bias": (m,)}
        out |= {f"{q}mlp_block.conv2.weight": (d, m, 1, 1), f"{q}mlp_block.conv2.bias": (d,)}
    for name, width in norms.items():
        out |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        out[f"{name}.num_batches_tracked"] = ()
    return out


def fresh(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Random values of sensible size, exact in float32; none at a special value."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("alpha"):
            state[name] = (1.5 + 0.1 * noise).clamp(1.2, 1.8)
        elif name.endswith("running_var") or (("norm" in name or ".bn" in name) and name.endswith("weight")):
            state[name] = 1 + 0.2 * noise.abs()
        elif len(shape) > 1 and "token" not in name and "pos" not in name:
            state[name] = noise / sqrt(prod(shape[1:]))
        else:
            state[name] = 0.2 * noise
    return state


# ------------------------------------------------------------------------------------------- networks


@dataclass
class Output:
    """What one network's forward gives."""

    pred: Tensor
    dist: Tensor
    features: list[Tensor] = field(default_factory=list)


def vit_forward(s: State, p: str, cfg: Any, x: Tensor, *, train: bool) -> Output:
    """A Transformer; a DeiT gives two predictions in training and their mean in evaluation."""
    t, deit = cfg["transformer"], cfg["name"] == "deit"
    z = F.conv2d(
        x, s[f"{p}patch_embed.proj.weight"], s[f"{p}patch_embed.proj.bias"], pair(cfg["patch_embed"]["patch_size"])
    )
    z = z.flatten(2).permute(2, 0, 1)
    tokens = ["cls_token", "dist_token"] if deit else ["cls_token"]
    z = torch.cat([s[f"{p}{name}"].expand(1, len(x), -1) for name in tokens] + [z])
    z = z + s[f"{p}pos_embed.pos_embed"]
    eps, features = t.get("norm_eps", 1e-5), []

    def norm(name: str, v: Tensor) -> Tensor:
        return F.layer_norm(v, v.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    for i in range(t["num_encoder_layers"]):
        q = f"{p}transformer.layers.{i}."
        z = z + attend(s, q, t, norm(f"{q}norm1", z))
        hidden = F.gelu(linear(f"{q}mlp.linear1", norm(f"{q}norm2", z)))
        z = z + linear(f"{q}mlp.linear2", hidden)
        features.append(z)
    z = norm(f"{p}transformer.norm", z)
    pred = linear(f"{p}cls_head", z[0])
    if not deit:
        return Output(pred, pred, features)
    dist = linear(f"{p}dist_head", z[1])
    return Output(pred, dist, features) if train else Output((pred + dist) / 2, (pred + dist) / 2, features)


def attend(s: State, q: str, t: Any, z: Tensor) -> Tensor:
    """Self-attention, one head after another."""
    d, heads = t["embed_dim"], t["num_heads"]
    k = d // heads
    rows = z @ s[f"{q}attention.linear_qkv.weight"].T + s[f"{q}attention.linear_qkv.bias"]
    mixed = []
    for h in range(heads):
        query, key, value = (rows[..., part * d + h * k : part * d + (h + 1) * k].transpose(0, 1) for part in range(3))
        scores = query @ key.transpose(1, 2) / sqrt(k)  # (batch, tokens, tokens)
        if t.get("use_entmax"):
            alpha = s.get(f"{q}attention.softmax.alpha", torch.tensor(1.5, dtype=z.dtype))
            weights = entmax_bisect(scores, alpha.expand(*scores.shape[:-1], 1), dim=-1)
        else:
            weights = scores.softmax(-1)
        mixed.append((weights @ value).transpose(0, 1))
    return torch.cat(mixed, -1) @ s[f"{q}attention.linear_out.weight"].T + s[f"{q}attention.linear_out.bias"]


def taps(x: Tensor, matrices: list[Tensor], bias: Tensor) -> Tensor:
    """One matrix per head at the head's place in the window, raster order, zero-padded."""
    side = next(k for k in range(1, 99) if k * k >= len(matrices))
    reach, (rows, cols) = side // 2, x.shape[2:]
    padded = F.pad(x, (reach,) * 4)
    out = bias[None, :, None, None] + torch.zeros_like(x)
    for h, matrix in enumerate(matrices):
        dy, dx = divmod(h, side)
        out = out + torch.einsum("oi,birc->borc", matrix, padded[:, :, dy : dy + rows, dx : dx + cols])
    return out


def cnn_forward(s: State, p: str, cfg: Any, x: Tensor, *, train: bool, vit: tuple[str, Any] | None = None) -> Output:
    """A CNN on its own weights, or on those of a Transformer: (prefix, its `transformer` section)."""

    def norm(name: str, v: Tensor) -> Tensor:
        if train:
            s[f"{name}.num_batches_tracked"] += 1
        mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.batch_norm(v, mean, var, s[f"{name}.weight"], s[f"{name}.bias"], train, 0.1, 1e-5)

    def pixelwise(name: str, v: Tensor) -> Tensor:
        weight = s[f"{name}.weight"]
        return F.conv2d(v, weight.reshape(*weight.shape[:2], 1, 1), s[f"{name}.bias"])

    def mixer(i: int, v: Tensor) -> Tensor:
        q = f"{p}layers.{i}.cnn_block."
        if vit is None and cfg["conv_block"]["name"] == "conv_sl":
            return F.conv2d(v, s[f"{q}conv.weight"], s[f"{q}conv.bias"], padding=1)
        if vit is None:
            return taps(v, list(s[f"{q}weight"].unbind(2)), s[f"{q}bias"])
        a, heads = f"{vit[0]}transformer.layers.{i}.attention.", vit[1]["num_heads"]
        values = s[f"{a}linear_qkv.weight"].chunk(3)[2].chunk(heads)
        outs = s[f"{a}linear_out.weight"].chunk(heads, 1)
        return taps(v, [o @ w for o, w in zip(outs, values, strict=True)], s[f"{a}linear_out.bias"])

    def mlp(i: int, v: Tensor) -> Tensor:
        first, second = (f"{p}layers.{i}.mlp_block.conv{n}" for n in (1, 2))
        if vit is not None:
            first, second = (f"{vit[0]}transformer.layers.{i}.mlp.linear{n}" for n in (1, 2))
        return pixelwise(second, F.gelu(pixelwise(first, v)))

    stem = cfg["input_proj"]
    if stem["name"] == "vit_like":
        x = F.conv2d(x, s[f"{p}input_proj.weight"], s[f"{p}input_proj.bias"], pair(stem["patch_size"]))
    else:
        x = F.conv2d(x, s[f"{p}input_proj.conv1.weight"], stride=2, padding=3)
        x = F.max_pool2d(F.gelu(norm(f"{p}input_proj.norm", x)), 3, 2, 1)
        x = F.conv2d(x, s[f"{p}input_proj.conv2.weight"], s[f"{p}input_proj.conv2.bias"], 2, 1)
    features = []
    for i in range(vit[1]["num_encoder_layers"] if vit else cfg["num_layers"]):
        for branch, name in ((mixer, "norm1"), (mlp, "norm2")):
            where = f"{p}layers.{i}.{name}"
            x = x + (branch(i, norm(where, x)) if cfg.get("pre_norm", True) else norm(where, branch(i, x)))
        features.append(x)
        if i in cfg["down_sample_layers"]:
            x = F.avg_pool2d(x, 2)
    pooled = F.gelu(norm(f"{p}bn", x)).mean((2, 3))
    pred = pooled @ s[f"{p}linear.weight"].T + s[f"{p}linear.bias"]
    return Output(pred, pred, features)


# --------------------------------------------------------------------------------------------- losses


def hint(vit: Tensor, cnn: Tensor, cfg: Any) -> Tensor:
    """One layer's hint between tokens and a map."""
    a, b = vit[cfg["start_id"] :], cnn.flatten(2).permute(2, 0, 1)
    longer, shorter = max(len(a), len(b)), min(len(a), len(b))
    a, b = (v.unflatten(0, (shorter, longer // shorter)).mean(1) if len(v) > shorter else v for v in (a, b))
    if cfg["norm"]:
        a, b = (F.layer_norm(v, v.shape[-1:]) for v in (a, b))
    return (a - b).square().mean()


def items(out: dict[str, Output], labels: Tensor, loss: Any, *, shared: bool) -> dict[str, Tensor]:
    """Every undecayed loss item by name."""
    if len(out) == 1:
        return {"cls": F.cross_entropy(next(iter(out.values())).pred, labels)}
    named: dict[str, Tensor] = {}
    t = loss["kd_temp"]
    for me, other in (("cnn", "vit"), ("vit", "cnn")):
        student, teacher = out[me], out[other]
        named[f"joint.cls_{me}" if shared else f"{me}.cls"] = F.cross_entropy(student.pred, labels)
        p = (teacher.dist.detach() / t).softmax(1)
        kl = (p * (p.log() - (student.dist / t).log_softmax(1))).sum(1).mean()
        named[f"joint.kd_{me}.{other}" if shared else f"{me}.kd.{other}"] = t * t * kl
        for i, (a, b) in enumerate(zip(student.features, teacher.features, strict=True)):
            sides = (a, b.detach()) if me == "vit" else (b.detach(), a)
            beginning = f"joint.hint_{me}.{other}" if shared else f"{me}.hint_{me}.{other}"
            named[f"{beginning}_layer_{i}"] = hint(*sides, loss["hint_cfg"])
    return named


def totals(named: dict[str, Tensor], loss: Any, decay: dict[str, float]) -> dict[str, Tensor]:
    """The weighted sums."""
    if "cls" in named:
        return {"total": loss["weight_dict"]["cls"] * named["cls"]}
    out: dict[str, Tensor] = {}
    for name, value in named.items():
        total, key = name.split(".")[:2]
        if key in loss["weight_dict"]:
            out[total] = out.get(total, 0) + value * loss["weight_dict"][key] * decay.get(key, 1.0)
    return dict(sorted(out.items()))


def rate(optimizer: Any, schedule: Any, epoch: int) -> float:
    """The learning rate of an epoch."""
    lr, k = optimizer["lr"], schedule.get("warmup_iters", 0)
    lr *= (1 + cos(pi * epoch / schedule["T_max"])) / 2
    return lr * (0.2 * (1 - epoch / k) + epoch / k) if epoch < k else lr
