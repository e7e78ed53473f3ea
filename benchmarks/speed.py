"""`make bench`: what a training step costs, always as ratios of things measured side by side in one process.

Each pair alternates, so that a busy machine slows both; the median of the repeats is reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from bootvit.data.batches import Batch
from bootvit.files import write_json
from bootvit.learner import Learner, World
from bootvit.load import load_config
from bootvit.models.dropout import ByteDropout
from bootvit.models.shapes import head_taps
from bootvit.models.shared import SharedMixer
from bootvit.tracking import source_version


def seconds(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, alternating between them, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def merged_convolution(mixer: SharedMixer, x: Tensor) -> Tensor:
    """The shared mixer as one 3x3 convolution with kernel W_o^h W_v^h at head h's tap."""
    attention = mixer._vit[0]
    width, heads = x.shape[1], attention.num_heads
    w_o = attention.proj.weight.unflatten(1, (heads, -1))  # (D, H, K)
    w_v = attention.qkv.weight[2 * width :].unflatten(0, (heads, -1))  # (H, K, D)
    taps = torch.einsum("ohk,hki->oih", w_o, w_v)
    kernel = F.pad(taps, (0, 9 - heads)).unflatten(2, (3, 3))
    return F.conv2d(x, kernel, attention.proj.bias, padding=1)


def dense_positions(mixer: SharedMixer, x: Tensor) -> Tensor:
    """The shared mixer with its shifts as dense (pixels x pixels) matrices, one a head."""
    attention = mixer._vit[0]
    width, rows, cols = x.shape[1:]
    heads = attention.num_heads
    values = F.linear(x.flatten(2).transpose(1, 2), attention.qkv.weight[2 * width :])  # (batch, N, D)
    values = values.unflatten(2, (heads, -1)).transpose(1, 2)  # (batch, H, N, K)
    places = torch.arange(rows * cols, device=x.device)
    matrices = []
    for dy, dx in mixer.taps:
        row, col = places // cols + dy, places % cols + dx
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        matrices.append((places[None] == (row * cols + col)[:, None]) & inside[:, None])
    mixed = torch.stack(matrices).to(x.dtype) @ values
    out = F.linear(mixed.transpose(1, 2).flatten(2), attention.proj.weight, attention.proj.bias)
    return out.transpose(1, 2).unflatten(2, (rows, cols))


def mixers(device: torch.device, repeats: int) -> dict[str, object]:
    """Forward and backward of one shared mixer at the sizes of the paper's small model (224 px)."""
    torch.manual_seed(0)
    attention = timm.layers.Attention(288, num_heads=9, qkv_bias=True).to(device)
    torch.nn.init.zeros_(attention.qkv.bias)
    mixer = SharedMixer(attention, head_taps(9, "row_major"), value_bias=False)
    x = torch.randn(16, 288, 14, 14, device=device, requires_grad=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "shift": lambda: mixer(x),
        "merged 3x3 convolution": lambda: merged_convolution(mixer, x),
        "dense positions": lambda: dense_positions(mixer, x),
    }
    outputs = {name: way().detach() for name, way in ways.items()}
    difference = {name: (out - outputs["shift"]).abs().max().item() for name, out in outputs.items()}
    measured = seconds({name: (lambda w=way: w().sum().backward()) for name, way in ways.items()}, repeats, device)
    return {
        "what": "forward + backward, batch 16, 14 x 14, width 288, 9 heads",
        "times the shift form": {name: round(t / measured["shift"], 2) for name, t in measured.items()},
        "largest difference from the shift form": difference,
    }


def steps(device: torch.device, repeats: int, preset: str, batch: int, precision: str) -> dict[str, object]:
    """A whole training step of each method, relative to the ViT alone."""
    calls: dict[str, Callable[[], object]] = {}
    world = World(0, 1, device)
    for method in ("vit", "agent", "joint", "shared"):
        config = load_config(f"cifar10/{method}-{preset}", [f"precision={precision}", f"data.batch_size={batch}"])
        learner = Learner(config, 10, world)
        images = torch.randn(batch, 3, *config.image_size, device=device)
        data = Batch(images, torch.zeros(batch, dtype=torch.int64, device=device), batch)
        calls[method] = lambda learner=learner, data=data: learner.step(data, 0, 0, 0.0)
    measured = seconds(calls, repeats, device)
    return {
        "what": f"one step, cifar10/*-{preset}, batch {batch}, {precision}",
        "times the ViT alone": {name: round(t / measured["vit"], 2) for name, t in measured.items()},
        "images per second (this machine, now)": {name: round(batch / t, 1) for name, t in measured.items()},
    }


def plain(learner: Learner) -> Learner:
    """With torch's own dropout and attention, and optimisers that loop over the tensors."""
    for module in learner.networks.modules():
        for name, child in module.named_children():
            if type(child) is ByteDropout:
                setattr(module, name, torch.nn.Dropout(child.p))
        if isinstance(module, timm.layers.Attention):
            module.fused_attn = True
    for group in learner.groups:
        for parameters in group.optimizer.param_groups:
            parameters.update(fused=False, foreach=False)
    return learner


def by_hand(device: torch.device, repeats: int, batch: int, precision: str) -> dict[str, object]:
    """A step with torch's own dropout, attention and loops, relative to the same step as it is."""
    world, out = World(0, 1, device), {}
    for method in ("vit", "joint", "shared"):
        given = [f"precision={precision}", f"data.batch_size={batch}"]
        config = load_config(f"cifar10/{method}-small", given)
        images = torch.randn(batch, 3, *config.image_size, device=device)
        data = Batch(images, torch.zeros(batch, dtype=torch.int64, device=device), batch)
        ways = {"plain": plain(Learner(config, 10, world)), "now": Learner(config, 10, world)}
        calls = {name: (lambda own=own, data=data: own.step(data, 0, 0, 0.0)) for name, own in ways.items()}
        measured = seconds(calls, repeats, device)
        out[f"{method}-small"] = round(measured["plain"] / measured["now"], 2)
    return {"what": f"one step, cifar10/*-small, 224 px, batch {batch}, {precision}", "plain / now": out}


def main() -> None:
    """Measure and write `benchmarks/results/speed_<device>_<date>.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    today = datetime.now(UTC).date().isoformat()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()}-thread CPU"
    precision, preset, batch = ("bf16", "small", 64) if device.type == "cuda" else ("fp32", "tiny", 64)
    document = {
        "date": today,
        "commit": source_version(),
        "device": name,
        "torch": torch.__version__,
        "seed": 0,
        "repeats": options.repeats,
        "shared mixer": mixers(device, options.repeats),
        "dropout, attention, optimiser": by_hand(device, options.repeats, 8, "fp32"),
        "steps": steps(device, options.repeats, preset, batch, precision),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"speed_{name.replace(' ', '-')}_{today}.json"
    write_json(path, document)
    print(path.read_text())


if __name__ == "__main__":
    main()
