"""The step as one would first write it: what `benchmarks.speed` and `benchmarks.gpu` measure ours against.

Attention with its weights and their dropout in memory, tokens first; the agent's one-matrix-a-head mixer through dense
position matrices (pixels x pixels, one a head), on shared weights after merging each head's two matrices; 1x1
convolutions as convolutions, maps channels first; in joint training a backward pass for each network; torch's own
dropout and optimisers as they come. It computes on the parameters of a `Networks` and shares none of its code.

D width, H heads, K = D / H, N tokens or pixels, B images.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bootvit.config import Config
from bootvit.data.batches import Batch
from bootvit.learner import Networks
from bootvit.models.agent import HeadTapConv
from bootvit.models.shared import SharedMixer

Maps = list[Tensor]  # one a block: (N, B, D) of the ViT, (B, D, rows, cols) of the agent


def bare_networks(config: Config, classes: int, device: torch.device, dtype: torch.dtype) -> Networks:
    """Networks as timm and torch make them, with the initial weights of a `Learner`'s."""
    torch.manual_seed(config.seed)
    return Networks(config, classes).to(device, dtype)


class ObviousStep:
    """Networks, their optimisers, and one step of vit, agent, joint or shared training; no SAM, no DeiT, no entmax."""

    def __init__(self, config: Config, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device = config, device
        self.networks = bare_networks(config, classes, device, dtype)
        self._positions: dict[tuple[int, int, tuple[tuple[int, int], ...]], Tensor] = {}
        joint = config.method == "joint"
        owners = [list(self.networks.own_parameters(net)) for net in config.networks]
        groups = owners if joint else [list(self.networks.parameters())]
        optim = config.optim
        self.optimizers = [torch.optim.AdamW(own, lr=optim.lr, weight_decay=optim.weight_decay) for own in groups]
        self._clips = [optim.clip_norm] * len(groups)
        if joint and optim.agent.clip_norm is not None:
            self._clips[-1] = None if optim.agent.clip_norm == "none" else float(optim.agent.clip_norm)

    # ---------------------------------------------------------------------------------------------- a step

    def step(self, batch: Batch) -> Tensor:
        """One update; the sum of the losses."""
        self.networks.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses = self.losses(batch.images, batch.labels)
        totals = losses if self.config.method == "joint" else [sum(losses[1:], start=losses[0])]
        for total, optimizer, clip in zip(totals, self.optimizers, self._clips, strict=True):
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
            optimizer.step()
        return torch.stack([total.detach() for total in totals]).sum()

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Each network's loss at the first epoch, in the order of the config's networks."""
        with self._autocast():
            out = {net: self._vit(images) if net == "vit" else self._agent(images) for net in self.config.networks}
            return [self._loss(net, out, labels) for net in out]

    def _autocast(self) -> AbstractContextManager[None]:
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def _loss(self, net: Any, out: dict[Any, tuple[Tensor, Maps]], labels: Tensor) -> Tensor:
        weights, (logits, maps) = getattr(self.config.objective, net), out[net]
        loss: Tensor = weights.ce * F.cross_entropy(logits, labels)
        if len(out) == 1:
            return loss
        peer_logits, peer_maps = out["agent" if net == "vit" else "vit"]
        t = self.config.objective.temperature
        if weights.kd:
            target = (peer_logits.detach() / t).softmax(1)
            kl = (target * (target.log() - (logits / t).log_softmax(1))).sum(1).mean()
            loss = loss + weights.kd * t * t * kl
        if weights.hint:
            assert net == "vit"
            hints = [self._hint(a, b.detach()) for a, b in zip(maps, peer_maps, strict=True)]
            loss = loss + weights.hint * sum(hints[1:], start=hints[0])
        return loss

    def _hint(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Tokens (N, B, D) against a map (B, D, rows, cols), pooled over squares to the smaller grid."""
        rows, cols = self.networks.vit.patch_embed.grid_size  # type: ignore[union-attr]
        grid = tokens.permute(1, 2, 0).unflatten(2, (rows, cols))  # (B, D, rows, cols)
        if grid.shape[2] > pixels.shape[2]:
            grid = F.avg_pool2d(grid, grid.shape[2] // pixels.shape[2])
        elif grid.shape[2] < pixels.shape[2]:
            pixels = F.avg_pool2d(pixels, pixels.shape[2] // grid.shape[2])
        a, b = (x.flatten(2).permute(2, 0, 1) for x in (grid, pixels))
        return F.mse_loss(F.layer_norm(a, a.shape[-1:]), F.layer_norm(b, b.shape[-1:]))

    # ------------------------------------------------------------------------------------------- networks

    def _drop(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate, self.networks.training)

    def _vit(self, images: Tensor) -> tuple[Tensor, Maps]:
        vit = self.networks.vit
        assert vit is not None
        rate = self.config.model.vit.dropout
        patch = vit.patch_embed.proj
        z = F.conv2d(images, patch.weight, patch.bias, stride=patch.stride).flatten(2).permute(2, 0, 1)  # (N, B, D)
        z = torch.cat([vit.cls_token.expand(1, z.shape[1], -1), z]) + vit.pos_embed.transpose(0, 1)
        maps = []
        for block in vit.blocks:
            z = z + self._drop(self._attend(block.attn, block.norm1(z), rate), rate)
            hidden = self._drop(F.gelu(block.mlp.fc1(block.norm2(z))), rate)
            z = z + self._drop(block.mlp.fc2(hidden), rate)
            maps.append(z[1:])
        return vit.head(vit.norm(z)[0]), maps

    def _attend(self, attention: Any, z: Tensor, rate: float) -> Tensor:
        tokens, images, width = z.shape
        heads = attention.num_heads
        parts = attention.qkv(z).chunk(3, dim=-1)
        q, k, v = (x.reshape(tokens, images * heads, width // heads).transpose(0, 1) for x in parts)  # (B H, N, K)
        weights = torch.bmm(q / (width // heads) ** 0.5, k.transpose(1, 2)).softmax(-1)
        mixed = torch.bmm(self._drop(weights, rate), v).transpose(0, 1).reshape(tokens, images, width)
        return attention.proj(mixed)  # type: ignore[no-any-return]

    def _agent(self, images: Tensor) -> tuple[Tensor, Maps]:
        agent = self.networks.agent
        assert agent is not None
        x, maps = agent.stem(images), []
        for i, block in enumerate(agent.blocks):
            drop = block.drop.p
            for branch, norm in ((self._mixer, block.norm1), (self._mlp, block.norm2)):
                mixed = branch(block, norm(x)) if block.pre_norm else norm(branch(block, x))
                x = x + self._drop(mixed, drop)
            maps.append(x)
            if i in agent.downsample:
                x = F.avg_pool2d(x, 2)
        return agent.head(F.gelu(agent.norm(x)).mean((2, 3))), maps

    def _mlp(self, block: Any, x: Tensor) -> Tensor:
        if self.config.method != "shared":
            return block.mlp(x)  # type: ignore[no-any-return]
        mlp = block.mlp.mlp
        hidden = F.gelu(F.conv2d(x, mlp.fc1.weight[:, :, None, None], mlp.fc1.bias))
        return F.conv2d(self._drop(hidden, block.mlp.drop.p), mlp.fc2.weight[:, :, None, None], mlp.fc2.bias)

    def _mixer(self, block: Any, x: Tensor) -> Tensor:
        mixer = block.mixer
        if isinstance(mixer, HeadTapConv):
            return self._dense(x, mixer.weight.permute(2, 0, 1), mixer.bias, tuple(self._taps_of(mixer)))
        if not isinstance(mixer, SharedMixer):
            return mixer(x)  # type: ignore[no-any-return]
        value, proj, bias = mixer.weights()
        heads = len(mixer.taps)
        w_o, w_v = proj.unflatten(1, (heads, -1)), value.unflatten(0, (heads, -1))  # (D, H, K), (H, K, D)
        return self._dense(x, torch.einsum("ohk,hki->hoi", w_o, w_v), bias, mixer.taps)

    def _taps_of(self, mixer: HeadTapConv) -> list[tuple[int, int]]:
        left, _, top, _ = mixer.pad
        return [(place // mixer.window[1] - top, place % mixer.window[1] - left) for place in mixer.places.tolist()]

    def _dense(self, x: Tensor, matrices: Tensor, bias: Tensor | None, taps: tuple[tuple[int, int], ...]) -> Tensor:
        """(B, D, rows, cols): one D x D matrix a head, (H, D, D), then the head's (N, N) matrix of positions."""
        rows, cols = x.shape[2:]
        each = torch.einsum("hoi,bin->bhon", matrices, x.flatten(2))  # (B, H, D, N)
        moved = torch.matmul(each, self._position(rows, cols, taps, each))
        out = moved.sum(1).unflatten(2, (rows, cols))
        return out if bias is None else out + bias[None, :, None, None]

    def _position(self, rows: int, cols: int, taps: tuple[tuple[int, int], ...], like: Tensor) -> Tensor:
        """(H, N, N): 1 at [h, m, n] where pixel m is pixel n + tap h. Made once."""
        key = (rows, cols, taps)
        if key not in self._positions:
            row, col = (torch.arange(rows * cols) // cols), (torch.arange(rows * cols) % cols)
            found = []
            for dy, dx in taps:
                y, x = row + dy, col + dx
                inside = (y >= 0) & (y < rows) & (x >= 0) & (x < cols)
                found.append((torch.arange(rows * cols)[:, None] == y * cols + x) & inside)
            self._positions[key] = torch.stack(found).to(like.device, like.dtype)
        return self._positions[key]


class BareViT:
    """timm's ViT, cross entropy and AdamW in the bare loop that one writes first: the same sizes and dropout."""

    def __init__(self, config: Config, classes: int, device: torch.device, *, compiled: bool = False) -> None:
        self.config, self.device = config, device
        self.vit = bare_networks(config, classes, device, torch.float32).vit
        assert self.vit is not None
        optim = config.optim
        self.optimizer = torch.optim.AdamW(self.vit.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
        self._forward: Any = torch.compile(self.vit) if compiled else self.vit

    def step(self, batch: Batch) -> Tensor:
        """One update; the loss."""
        self.vit.train()  # type: ignore[union-attr]
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = F.cross_entropy(self._forward(batch.images), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.config.optim.clip_norm)
        self.optimizer.step()
        return loss.detach()


class BareLoop:
    """Our own modules in a bare loop: one forward, the losses, one backward, torch's optimisers as they come."""

    def __init__(self, config: Config, classes: int, device: torch.device) -> None:
        self.config = config
        self.networks = bare_networks(config, classes, device, torch.float32)
        optim = config.optim
        joint = config.method == "joint"
        owners = [self.networks.own_parameters(net) for net in config.networks]
        groups = owners if joint else [list(self.networks.parameters())]
        self.optimizers = [torch.optim.AdamW(own, lr=optim.lr, weight_decay=optim.weight_decay) for own in groups]

    def step(self, batch: Batch) -> Tensor:
        """One update; the sum of the losses."""
        self.networks.train()
        objective = self.config.objective
        terms = self.networks(batch.images, batch.labels)
        totals = [own.total(getattr(objective, net), 1.0) for net, own in terms.items()]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss: Tensor = sum(totals[1:], start=totals[0])
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            if self.config.optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.config.optim.clip_norm)
            optimizer.step()
        return loss.detach()
