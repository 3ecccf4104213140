"""Cells through an encoder in chunks: exact gradients, with the activations of one chunk in memory at a time.

A patient has up to some two hundred cells, and a network trained end to end keeps every activation of every cell
until the backward pass. Here only the last chunk keeps them; the others are computed anew, chunk by chunk, when the
backward pass reaches them (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174), with the
random numbers they had. The gradient is the plain one: a patient is one term of the loss, whatever its size.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

AUTO = "auto"
# Part of the free memory that the activations of a chunk may take. The rest is for the temporaries of the backward
# pass, the optimizer's state, which does not exist yet at the first step, and other programs.
_SHARE = 0.5
# Where a system does not tell its free memory.
_DEFAULT = 32

Encoder = Callable[[torch.Tensor], torch.Tensor]


def encode_in_chunks(encoder: nn.Module, cells: torch.Tensor, chunk_size: int | str | None = None) -> torch.Tensor:
    """Pass cells through the encoder in equal chunks of at most `chunk_size`.

    Memory is that of one chunk, in training too, for one more forward pass of all chunks but the last. When the
    cells fit in one chunk, and wherever no gradient is needed, nothing is computed twice. Frozen leading layers keep
    no activation, as nothing that is trained precedes them.

    Layers that look at the batch (batch norm in training mode) see one chunk at a time; their running statistics are
    updated once per chunk.

    Args:
        encoder: (N, 3, H, W) -> (N, ...), each output a function of its own cell.
        cells: (T, 3, H, W)
        chunk_size: at least 1; `None` = all at once; `"auto"` = what fits into half of the free memory, measured at
            the first call. Which masks dropout draws depends on the chunks: give a number where a run must be
            repeatable bit for bit on another machine.

    Returns:
        The encoder's output for all cells, in their order.

    Raises:
        ValueError: `chunk_size` is none of these.
    """
    if chunk_size == AUTO:
        chunk_size = automatic_chunk_size(encoder, cells)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f'chunk_size={chunk_size!r}: expected a number of at least 1, "auto" or None.')
    if chunk_size is None or len(cells) <= chunk_size:
        return encoder(cells)
    *chunks, last = cells.tensor_split(-(-len(cells) // chunk_size))
    encode = _recomputed(encoder) if _is_trained(encoder, cells) else encoder
    # The backward pass starts with the last chunk: its activations would be dropped only to be made again at once.
    return torch.cat([*(encode(chunk) for chunk in chunks), encoder(last)])


@torch.compiler.disable
def automatic_chunk_size(encoder: nn.Module, cells: torch.Tensor) -> int:
    """Cells whose activations fill half of the free memory; at least 1.

    Measured once for each shape, precision and set of trained parameters, so that it stays the same during a run.
    """
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    precision = torch.get_autocast_dtype(cells.device.type) if torch.is_autocast_enabled(cells.device.type) else None
    case = (cells.shape[1:], cells.dtype, cells.device, precision, torch.is_grad_enabled(), encoder.training, trained)
    sizes = _measured.setdefault(encoder, {})
    if case not in sizes:
        sizes[case] = _fitting(encoder, cells)
        logger.info("chunk_size=auto: %d cells at once.", sizes[case])
    return sizes[case]


_measured: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()


def _fitting(encoder: nn.Module, cells: torch.Tensor) -> int:
    free = free_memory(cells.device)
    if free is None:
        return _DEFAULT
    return max(1, int(_SHARE * free / max(1, activation_bytes(encoder, cells))))


def activation_bytes(encoder: nn.Module, cells: torch.Tensor) -> float:
    """Bytes that one of these cells keeps for the backward pass; without gradient, an upper bound of what it needs.

    Random numbers and running statistics are left as they were.
    """
    sample = cells[:2].detach()  # two: batch norm in training cannot do with one
    sample.requires_grad_(not _is_trained(encoder, cells))
    known = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [] if cells.device.type == "cpu" else [cells.device]
    with (
        torch.random.fork_rng(devices, device_type="cuda" if not devices else cells.device.type),
        _fixed_statistics(encoder),
        torch.enable_grad(),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        encoder(sample)
    return sum(found.values()) / len(sample)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; `None` where the system does not tell."""
    if device.type == "cpu":
        limits = [limit for limit in (_system_memory(), _container_memory()) if limit is not None]
        return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if limits else None
    if device.type == "cuda":
        # What torch has taken from the device but does not use is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return None


def _system_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _container_memory() -> int | None:
    """What a Linux control group, such as a container's, still allows."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _is_trained(encoder: nn.Module, cells: torch.Tensor) -> bool:
    needed = cells.requires_grad or any(parameter.requires_grad for parameter in encoder.parameters())
    return torch.is_grad_enabled() and needed


def _recomputed(encoder: nn.Module) -> Encoder:
    """The encoder with its activations dropped after the forward pass and computed anew in the backward pass."""
    options = {"context_fn": lambda: (nullcontext(), _fixed_statistics(encoder))} if _batch_norms(encoder) else {}
    return lambda chunk: checkpoint(encoder, chunk, use_reentrant=False, preserve_rng_state=True, **options)


def _batch_norms(encoder: nn.Module) -> list[_BatchNorm]:
    return [module for module in encoder.modules() if isinstance(module, _BatchNorm) and module.training]


def _fixed_statistics(encoder: nn.Module) -> AbstractContextManager:
    """Running statistics stay as they are, so that a second forward pass of the same cells does not count twice."""
    return _without_momentum(_batch_norms(encoder))


@contextmanager
def _without_momentum(norms: list[_BatchNorm]) -> Iterator[None]:
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # A momentum of 0 keeps mean and variance without writing to them: autograd may hold them.
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


__all__ = ["AUTO", "activation_bytes", "automatic_chunk_size", "encode_in_chunks", "free_memory"]
