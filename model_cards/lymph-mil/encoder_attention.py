"""Attention of an encoder that is trained in bfloat16 on a CPU, with a backward pass that uses its matrix unit."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Attention scores that are worked on at once, for each thread: 1 MB of them, so that they stay in its cache.
_CACHED_SCORES = 2**19


def trained_attention(network: nn.Module, device: torch.device) -> AbstractContextManager:
    """`TrainedAttention` where a network may gain from it, else nothing.

    A compiler sees to the attention itself; blocks that are checkpointed are computed anew outside of the context.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    checkpointed = any(getattr(module, "grad_checkpointing", False) for module in network.modules())
    return nullcontext() if checkpointed else TrainedAttention()


class TrainedAttention(TorchFunctionMode):
    """While it is active, `F.scaled_dot_product_attention` has a faster gradient in bfloat16 on a CPU.

    The forward pass is torch's. Its backward pass takes a third of the time of a training step of a small vision
    transformer, as it leaves the matrix unit of the CPU idle; plain matrix products, of as many images as the cache
    holds, take a third as long. Everything else (other devices and precisions, masks, dropout, causal attention, no
    gradient) goes torch's way.
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
        inputs = ctx.saved_tensors
        found = [torch.empty_like(tensor) for tensor in inputs]
        scores = math.prod(inputs[0].shape[1:-1]) * inputs[1].shape[-2]  # of one image
        images = max(1, _CACHED_SCORES * torch.get_num_threads() // scores)
        parts = (tensor.split(images) for tensor in (*inputs, gradient, *found))
        for query, key, value, outer, of_query, of_key, of_value in zip(*parts, strict=True):
            query, key, value, outer = (part.contiguous() for part in (ctx.scale * query, key, value, outer))
            weights = (query @ key.mT).softmax(dim=-1)  # (b, heads, N, N)
            of_value.copy_(weights.mT @ outer)
            of_scores = torch.ops.aten._softmax_backward_data(outer @ value.mT, weights, -1, weights.dtype)
            of_query.copy_((of_scores @ key).mul_(ctx.scale))
            of_key.copy_(of_scores.mT @ query)
        return *found, None


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


__all__ = ["TrainedAttention", "trained_attention"]
