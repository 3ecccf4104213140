"""Gradients of an encoder that is trained in bfloat16 on a CPU: backward passes that use its matrix unit."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Attention scores that are worked on at once, for each thread: 1 MB of them, so that they stay in its cache.
_CACHED_SCORES = 2**19


def faster_gradients(network: nn.Module, device: torch.device) -> AbstractContextManager:
    """`FasterGradients` where a network may gain from it, else nothing.

    A compiler sees to the products itself; blocks that are checkpointed are computed anew outside of the context.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    checkpointed = any(getattr(module, "grad_checkpointing", False) for module in network.modules())
    return nullcontext() if checkpointed else FasterGradients()


class FasterGradients(TorchFunctionMode):
    """While it is active, attention and linear layers have faster gradients in bfloat16 on a CPU.

    The forward passes are torch's, and so is everything else: other devices and precisions, masks, dropout, causal
    attention, no gradient. Of a training step of a small vision transformer,

    - the backward pass of `F.scaled_dot_product_attention` takes a third, as it leaves the matrix unit of the CPU
      idle; plain matrix products, of as many images as the cache holds, take a third as long;
    - the weights' gradients of `F.linear` take a quarter: their products read both matrices against the grain, and
      take twice as long as the same product of the forward pass. To turn the narrower one round first costs less.
      The gradient of a bias, a sum over all tokens, comes three times as fast from a product with ones.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _is_plain_attention(args, kwargs):
            query, key, value = _half(args)
            scale = kwargs.get("scale")
            return _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        if func is F.linear and len(args) == 3 and _is_trained_in_half(args):  # as nn.Linear calls it
            return _Linear.apply(*_half(args))
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        outer, cells = gradient.flatten(0, -2), x.flatten(0, -2)  # (T, O), (T, I)
        return (
            gradient @ weight if of_x else None,
            _outer_product(outer, cells) if of_weight else None,
            (outer.new_ones(1, len(outer)) @ outer)[0] if of_bias else None,
        )


def _outer_product(left: Tensor, right: Tensor) -> Tensor:
    """(T, O), (T, I) -> (O, I), the sum over T"""
    if left.shape[1] > right.shape[1]:
        return _outer_product(right, left).T
    turned = left.T
    # Of matrices as wide as each other the copy costs more than it saves.
    return (turned.contiguous() if 2 * left.shape[1] <= right.shape[1] else turned) @ right


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


def _is_plain_attention(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Three inputs, and no option but `scale`."""
    others = [option for name, option in kwargs.items() if name != "scale"]
    plain = len(args) == 3 and not any(isinstance(option, Tensor) or option for option in others)
    return plain and _is_trained_in_half(args)


def _is_trained_in_half(tensors: Sequence[Tensor | None]) -> bool:
    """A gradient to come, and bfloat16 on a CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        half = all(tensor.dtype == torch.bfloat16 for tensor in given)
    return half and all(tensor.is_cpu for tensor in given) and any(tensor.requires_grad for tensor in given)


def _half(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In bfloat16, as autocast would have it."""
    return [None if tensor is None else tensor.to(torch.bfloat16) for tensor in tensors]


__all__ = ["FasterGradients", "faster_gradients"]
