"""Attention of an encoder that is trained in bfloat16 on a CPU, with a backward pass that uses its matrix unit."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class TrainedAttention(TorchFunctionMode):
    """While it is active, `F.scaled_dot_product_attention` has a faster gradient in bfloat16 on a CPU.

    The forward pass is torch's. Its backward pass takes a third of the time of a training step of a small vision
    transformer, as it leaves the matrix unit of the CPU idle; plain matrix products take half as long. Everything else
    (other devices and precisions, masks, dropout, causal attention, no gradient) goes torch's way.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_plain(args, kwargs):
            query, key, value = args
            if torch.is_autocast_enabled("cpu"):
                query, key, value = (tensor.to(torch.bfloat16) for tensor in args)
            scale = kwargs.get("scale")
            return _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With weights A = softmax(s q k'): dv = A' g, dS = A (g v' - rowsum(A g v')), dq = s dS k, dk = s dS' q."""
        query, key, value = ctx.saved_tensors
        query = ctx.scale * query
        weights = (query @ key.mT).softmax(dim=-1)  # (B, heads, N, N)
        of_value = weights.mT @ gradient
        of_scores = torch.ops.aten._softmax_backward_data(gradient @ value.mT, weights, -1, weights.dtype)
        return (of_scores @ key).mul_(ctx.scale), of_scores.mT @ query, of_value, None


def _is_plain(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Three inputs of one kind, no option but `scale`, a gradient to come, and bfloat16 on a CPU."""
    others = [option for name, option in kwargs.items() if name != "scale"]
    if len(args) != 3 or any(isinstance(option, Tensor) or option for option in others):
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        half = all(tensor.dtype == torch.bfloat16 for tensor in args)
    return half and all(tensor.is_cpu for tensor in args) and any(tensor.requires_grad for tensor in args)


__all__ = ["TrainedAttention"]
