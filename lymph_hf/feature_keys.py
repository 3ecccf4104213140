"""What the features of a frozen encoder depend on, as hashes of content: nothing goes by a name, a path or a date."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .augment import Augmentation
from .processing_lymph import LymphImageProcessor

# Modules and libraries that turn the bytes of an image into features. A change in any of them is another key: it costs
# encoding anew, where features of older code would cost a wrong result.
_CODE = (
    "adapter_layers",
    "adapter_tuners",
    "augment",
    "bags",
    "chunking",
    "encoders",
    "feature_keys",
    "feature_source",
    "images",
    "processing_lymph",
)
_LIBRARIES = ("peft", "pillow", "timm", "torch", "torchvision", "transformers")
# Of a processor: who wrote it, and what concerns the clinical values only.
_NOT_OF_IMAGES = ("auto_map", "clinical_statistics", "image_processor_type")
# What every module has, and what changes the memory or the bookkeeping, never the output in evaluation mode.
_NO_SETTINGS = frozenset(vars(nn.Module())) | {"_is_hf_initialized", "grad_checkpointing"}


def feature_key(encoder: nn.Module, processor: LymphImageProcessor, precision: str) -> str:
    """A hash (32 hexadecimal digits) of all that the features of a given image depend on.

    Args:
        encoder: with its adapters, if it has any; in any mode and on any device.
        processor: its size, resampling and normalisation count, its clinical statistics do not.
        precision: of the computation: `"no"`, `"bf16"` or `"fp16"`.
    """
    settings = {k: v for k, v in processor.to_dict().items() if k not in _NOT_OF_IMAGES and not k.startswith("_")}
    parts = {
        "encoder": encoder_digest(encoder),
        "processor": settings,
        "precision": precision,
        "code": _code_digest(),
        # Without the build ("+cpu"): features computed on an accelerator serve a machine that has none.
        "libraries": {name: version(name).partition("+")[0] for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def encoder_digest(encoder: nn.Module) -> str:
    """SHA-256 of a network: the class and plain settings of each module, and every byte of every tensor.

    Settings count because tensors alone do not tell a mean of patches from a class token, nor the scale of an adapter.
    """
    digest = hashlib.sha256()
    for name, module in encoder.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in vars(module).items() if key not in _NO_SETTINGS}
        digest.update(repr((name, _qualified(type(module)), _plain(settings))).encode())
    for name, tensor in chain(
        encoder.named_parameters(remove_duplicate=False), encoder.named_buffers(remove_duplicate=False)
    ):
        digest.update(repr((name, _plain(tensor))).encode())
    return digest.hexdigest()


def bag_digest(image_digests: Sequence[str], view: int = 0, augmentation: Augmentation | None = None) -> str:
    """SHA-256 of one view of a bag of images.

    An augmented view belongs to the bag as a whole, whose background and stain it takes into account.

    Args:
        image_digests: SHA-256 of each image's bytes, in order.
        view: 0 is the images as they are, and the same whatever the augmentation; 1, 2 ... are random views.
        augmentation: makes the random views.
    """
    parts = (list(image_digests), view, repr(augmentation) if view else "")
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value whose `repr` depends on its content, not on where it lies in memory."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(_bytes(value)).hexdigest()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, Mapping):
        return sorted(((str(key), _plain(item)) for key, item in value.items()), key=lambda pair: pair[0])
    if isinstance(value, set | frozenset):
        return sorted(repr(_plain(item)) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, functools.partial):
        return [_plain(part) for part in (value.func, value.args, value.keywords)]
    if is_dataclass(value) and not isinstance(value, type):
        return [_qualified(type(value)), *((f.name, _plain(getattr(value, f.name))) for f in fields(value))]
    return _qualified(value if hasattr(value, "__qualname__") else type(value))


def _qualified(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@functools.cache
def _code_digest() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in _CODE)).hexdigest()
