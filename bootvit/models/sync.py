"""BatchNorm over all workers: torch's own on CUDA; it refuses the CPU, so there a few lines over all_reduce."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bootvit.errors import UserError

M = TypeVar("M", bound=nn.Module)


class _SumOverWorkers(torch.autograd.Function):
    """The sum over workers; its gradient is the sum of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class AllReduceBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of the batch of all workers, whose shares may differ in size."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, rows, cols) -> the same."""
        if not self.training:
            return super().forward(x)
        pixels = x.new_tensor([x.numel() / x.shape[1]])
        packed = _SumOverWorkers.apply(torch.cat([x.sum((0, 2, 3)), pixels]))
        total = packed[-1].detach()
        mean = packed[:-1] / total
        centred = x - mean[None, :, None, None]
        var = _SumOverWorkers.apply(centred.square().sum((0, 2, 3))) / total
        self._update_running(mean.detach(), var.detach(), total)
        scale = torch.rsqrt(var + self.eps) * self.weight
        out: Tensor = centred * scale[None, :, None, None] + self.bias[None, :, None, None]
        return out

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * total / (total - 1), momentum)


def synchronise_norms(module: M, device: torch.device) -> M:
    """Replace every BatchNorm in place by one over all workers; names of parameters and buffers stay.

    Raises `UserError` on the CPU for timm's norms that carry their own activation.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-any-return, no-untyped-call]
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _converted(child))
        else:
            synchronise_norms(child, device)
    return module


def _converted(norm: nn.BatchNorm2d) -> nn.Module:
    if type(norm) is not nn.BatchNorm2d:
        raise UserError(f"model.agent.sync_norm=true: {type(norm).__name__} can be synchronised on GPUs only")
    new = AllReduceBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    new.load_state_dict(norm.state_dict())
    return new.to(norm.weight.device, norm.weight.dtype)
