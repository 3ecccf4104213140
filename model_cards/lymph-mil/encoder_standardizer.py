"""Cells on one scale: each feature of a frozen encoder with mean 0 and standard deviation 1 over the training cells."""

import torch
from torch import nn


class CellStandardizer(nn.Module):
    """`(x - mean) * scale` for each feature, `(..., D)` -> `(..., D)`; the identity until statistics are given.

    What all cells share tells no patient apart, yet it can be nearly all that an encoder gives: a head that starts on
    features whose mean is many times their spread has to learn to subtract before it can learn anything else.

    Args:
        width: D, features of a cell.

    Attributes:
        mean, scale: (D,). Float32 whatever the precision of the model, as a spread may be a small part of the mean.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) * self.scale).to(x.dtype)

    def _apply(self, fn, recurse: bool = True):
        """Move, but do not round: `model.to(torch.bfloat16)` comes here."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            if moved.dtype != exact[name].dtype:
                self._buffers[name] = exact[name].to(moved.device)
        return self


__all__ = ["CellStandardizer"]
