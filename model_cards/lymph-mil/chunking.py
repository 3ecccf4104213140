"""Cells through an encoder in chunks: exact gradients, with the activations of one chunk in memory at a time.

A patient has up to some two hundred cells, and a network trained end to end keeps every activation of every cell
until the backward pass. Here only the last chunks keep them; the others are computed anew, chunk by chunk, when the
backward pass reaches them (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174), with the
random numbers they had. The gradient is the plain one: a patient is one term of the loss, whatever its size.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from .encoder_gradients import faster_gradients

logger = logging.getLogger(__name__)

AUTO = "auto"
# Cells of a chunk with "auto". On a CPU larger ones leave the caches, the sooner where nothing else slows the step
# down; an accelerator wants more work at once.
_CPU_CHUNK, _CPU_CHUNK_WITHOUT_GRADIENT, _ACCELERATOR_CHUNK = 32, 16, 256
# Part of the free memory that the activations may take. The rest is for the temporaries of the backward pass, the
# optimizer's state, which does not exist yet at the first step, and other programs.
_SHARE = 0.5

Encoder = Callable[[torch.Tensor], torch.Tensor]


def encode_in_chunks(encoder: nn.Module, cells: torch.Tensor, chunk_size: int | str | None = None) -> torch.Tensor:
    """Pass cells through the encoder in equal chunks of at most `chunk_size`.

    With a number, memory is that of one chunk, in training too, for one more forward pass of all chunks but the last.
    With `"auto"`, as many of the last chunks keep their activations as fit into half of the free memory. Wherever no
    gradient is needed, nothing is computed twice. Frozen leading layers keep no activation, as nothing that is
    trained precedes them.

    The result is the same, bit for bit, whichever chunks are computed twice; so with `"auto"` it depends on the
    memory only where not even one chunk fits.

    Layers that look at the batch (batch norm in training mode) see one chunk at a time; their running statistics are
    updated once per chunk.

    Args:
        encoder: (N, 3, H, W) -> (N, ...), each output a function of its own cell.
        cells: (T, 3, H, W)
        chunk_size: at least 1; `None` = all at once; `"auto"` = 32 on a CPU (16 without gradient) and 256 on an
            accelerator, or fewer where the activations of so many do not fit.

    Returns:
        The encoder's output for all cells, in their order.

    Raises:
        ValueError: `chunk_size` is none of these.
    """
    kept = 1
    trained = _is_trained(encoder, cells)
    if chunk_size == AUTO:
        chunk_size, kept = _automatic_chunks(encoder, cells, trained)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f'chunk_size={chunk_size!r}: expected a number of at least 1, "auto" or None.')
    encode = _for_training(encoder, cells.device) if trained else encoder
    if chunk_size is None or len(cells) <= chunk_size:
        return encode(cells)
    count = -(-len(cells) // chunk_size)
    if trained:
        return _trained_in_chunks(encoder, encode, cells, count, kept)
    return torch.cat([encode(chunk) for chunk in cells.tensor_split(count)])


def _automatic_chunks(encoder: nn.Module, cells: torch.Tensor, trained: bool) -> tuple[int, int]:
    """Cells of a chunk, and how many of the last chunks may keep their activations."""
    on_cpu = cells.device.type == "cpu"
    if not trained:
        return _CPU_CHUNK_WITHOUT_GRADIENT if on_cpu else _ACCELERATOR_CHUNK, 1
    fitting = cells_that_fit(encoder, cells)
    chunk_size = min(_CPU_CHUNK if on_cpu else _ACCELERATOR_CHUNK, fitting)
    return chunk_size, fitting // chunk_size


@torch.compiler.disable
def cells_that_fit(encoder: nn.Module, cells: torch.Tensor) -> int:
    """Cells whose activations fill half of the free memory; at least 1.

    Measured once for each shape, precision and set of trained parameters, so that it stays the same during a run.
    """
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    precision = torch.get_autocast_dtype(cells.device.type) if torch.is_autocast_enabled(cells.device.type) else None
    case = (cells.shape[1:], cells.dtype, cells.device, precision, encoder.training, trained)
    fitting = _measured.setdefault(encoder, {})
    if case not in fitting:
        fitting[case] = _fitting(encoder, cells)
        logger.info("chunk_size=auto: the activations of %d cells fit into memory.", fitting[case])
    return fitting[case]


_measured: WeakKeyDictionary[nn.Module, dict[tuple, int]] = WeakKeyDictionary()


def _fitting(encoder: nn.Module, cells: torch.Tensor) -> int:
    free = free_memory(cells.device)
    if free is None:
        return _CPU_CHUNK
    return max(1, int(_SHARE * free / max(1, activation_bytes(encoder, cells))))


def activation_bytes(encoder: nn.Module, cells: torch.Tensor) -> float:
    """Bytes that one of these cells keeps for the backward pass.

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

    with (
        _same_random_numbers(cells.device),
        _fixed_statistics(encoder),
        torch.enable_grad(),
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        _for_training(encoder, cells.device)(sample)
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


def _for_training(encoder: nn.Module, device: torch.device) -> Encoder:
    """The encoder as it runs on each chunk, kept or not."""

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        with _Autocast(device).entered(), faster_gradients(encoder, device):
            return encoder(chunk)

    return encode


@torch.compiler.disable
def _trained_in_chunks(encoder: nn.Module, encode: Encoder, cells: torch.Tensor, count: int, kept: int) -> torch.Tensor:
    """`count` chunks, of which the last `kept` keep their activations."""
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    return _Chunks.apply(_Pass(encoder, encode, cells.device, count, kept), cells, *trained)


class _Pass:
    """What the backward pass must know of the forward pass.

    Nothing small is allocated for each chunk: between the large tensors of two chunks, which come and go, it would stay
    and split the memory into pieces that no longer fit them.
    """

    def __init__(self, encoder: nn.Module, encode: Encoder, device: torch.device, count: int, kept: int):
        self.encoder, self.encode = encoder, encode
        self.count, self.first_kept = count, max(0, count - kept)
        self.autocast = _Autocast(device)
        self.random = _RandomStates(device, count)
        self.graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, i: int, chunk: torch.Tensor) -> torch.Tensor:
        """Embeddings of chunk i, whose graph is kept or not."""
        self.random.note(i)
        with torch.set_grad_enabled(i >= self.first_kept):
            embeddings = self.encode(chunk)
        if i >= self.first_kept:
            self.graphs[i] = chunk, embeddings
        return embeddings.detach()

    def graph(self, i: int, chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunk i and its embeddings, with what autograd has noted on the way."""
        if i in self.graphs:
            return self.graphs.pop(i)
        with self.random.restored(i), self.autocast.entered(), _fixed_statistics(self.encoder), torch.enable_grad():
            return chunk, self.encode(chunk)


class _Chunks(torch.autograd.Function):
    """All chunks as one node of the graph.

    `torch.utils.checkpoint` builds a graph, empty, for each chunk: megabytes of nodes for a large bag. The trained
    parameters are inputs, so that their gradients go the usual way, through the hooks of `DistributedDataParallel` too.
    They are summed chunk by chunk from the last to the first, in the same order whatever was kept.
    """

    @staticmethod
    def forward(ctx, passing: _Pass, cells, *trained):
        ctx.passing = passing
        ctx.save_for_backward(cells, *trained)
        result, start = None, 0
        for i, chunk in enumerate(_leaves(cells, passing.count, ctx.needs_input_grad[1])):
            embeddings = passing.forward(i, chunk)
            if result is None:
                result = embeddings.new_empty(len(cells), *embeddings.shape[1:])
            result[start : start + len(chunk)] = embeddings
            start += len(chunk)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cells, *trained = ctx.saved_tensors
        passing, needs_images = ctx.passing, ctx.needs_input_grad[1]
        chunks = _leaves(cells, passing.count, needs_images)
        gradients = gradient.tensor_split(passing.count)
        of_images, sums = [], [None] * len(trained)
        for i in reversed(range(passing.count)):
            chunk, embeddings = passing.graph(i, chunks[i])
            inputs = [chunk, *trained] if needs_images else trained
            found = torch.autograd.grad(embeddings, inputs, gradients[i], allow_unused=True)
            if needs_images:
                of_image, *found = found
                of_images.insert(0, of_image)
            sums = [_added(total, part) for total, part in zip(sums, found, strict=True)]
            del embeddings, found  # before those of the next chunk are made
        return None, torch.cat(of_images) if needs_images else None, *sums


def _leaves(cells: torch.Tensor, count: int, requires_grad: bool) -> list[torch.Tensor]:
    return [chunk.detach().requires_grad_(requires_grad) for chunk in cells.tensor_split(count)]


def _added(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    if part is None:
        return total
    # A copy: autograd may give one tensor as the gradient of two parameters.
    return part.clone() if total is None else total.add_(part)


class _Autocast:
    """The mixed precision of this moment on a device, without its cache of weights.

    The cache would hand weights that were cast in a forward pass without gradient to one with gradient.
    """

    def __init__(self, device: torch.device):
        self.enabled = torch.is_autocast_enabled(device.type)
        self.device_type, self.dtype = device.type, torch.get_autocast_dtype(device.type)

    def entered(self) -> AbstractContextManager:
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled, cache_enabled=False)


class _RandomStates:
    """The random numbers that each chunk is about to draw."""

    def __init__(self, device: torch.device, count: int):
        self.device = device
        self.generators = [torch.default_generator]
        if device.type != "cpu":
            module = torch.get_device_module(device)
            self.generators.append(module.default_generators[device.index or 0])
        states = (generator.get_state() for generator in self.generators)
        self.states = [state.new_empty(count, len(state)) for state in states]

    def note(self, i: int) -> None:
        for generator, states in zip(self.generators, self.states, strict=True):
            states[i] = generator.get_state()

    @contextmanager
    def restored(self, i: int) -> Iterator[None]:
        with _same_random_numbers(self.device):
            for generator, states in zip(self.generators, self.states, strict=True):
                generator.set_state(states[i].clone())  # a part of a tensor would be read from its beginning
            yield


def _same_random_numbers(device: torch.device) -> AbstractContextManager:
    """Afterwards random numbers go on as if nothing had been drawn."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type if devices else "cuda")


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


__all__ = ["AUTO", "activation_bytes", "cells_that_fit", "encode_in_chunks", "free_memory"]
