"""Cell encoders: any timm model, one image in, one vector out."""

import functools
import json
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import (
    parse_model_name,
    resolve_model_input_args,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from .chunking import encode_in_chunks
from .configuration_lymph import LymphMILConfig

# How images must be prepared for an encoder; what a published model says of it goes into the configuration.
_DATA_KEYS = ("input_size", "fixed_input_size", "mean", "std", "interpolation")


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder in the form that a configuration keeps, so that a saved model builds without the Hub.

    Attributes:
        name: plain timm name, for `LymphMILConfig.encoder`.
        options: for `encoder_options`: what the publisher's model differs in from timm's of that name.
        weights: for `load_encoder_weights`; `None` where the name says nothing of weights.
    """

    name: str
    options: dict[str, Any]
    weights: str | None

    def options_with(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """`encoder_options` with the user's own on top; `None` when there is none."""
        return (self.options | (given or {})) or None


def resolve_encoder(name: str) -> EncoderChoice:
    """What a configuration has to hold for an encoder, wherever it is published.

    Args:
        name: a timm name (`"vit_small_patch14_dinov2"`, also as `"timm/vit_small_patch14_dinov2"`), a timm model on
            the Hub (`"hf-hub:1aurent/vit_small_patch14_224.dinobloom"`) or in a folder (`"local-dir:/path"`).

    Raises:
        ValueError: timm knows no model of that name, or what is published there is not one of timm's.
        ConnectionError: the Hub cannot be reached.
        FileNotFoundError: the folder holds no `config.json`.
    """
    name = name.removeprefix("timm/")
    source, _ = parse_model_name(name)
    if source is None:
        return EncoderChoice(_known(name), options={}, weights=None)
    published = _published_arguments(name)
    architecture, cfg = _known(published.pop("model_name")), published.pop("pretrained_cfg")
    options = {key: value for key, value in published.items() if key not in ("num_classes", "pretrained_model_args")}
    if cfg["input_size"][0] != 3:
        raise ValueError(f"{name} takes images of {cfg['input_size'][0]} channels, expected 3 (red, green, blue).")
    if cfg["fixed_input_size"]:
        options.pop("img_size", None)  # timm has written it into input_size
    theirs, ours = (json.loads(json.dumps(c)) for c in (cfg, timm.get_pretrained_cfg(architecture).to_dict()))
    overlay = {key: theirs[key] for key in _DATA_KEYS if theirs[key] != ours[key]}
    if overlay:
        options["pretrained_cfg_overlay"] = overlay
    return EncoderChoice(architecture, options, weights=name)


def encoder_data_config(config: LymphMILConfig) -> dict[str, Any]:
    """What the encoder expects of an image.

    Returns:
        A dictionary with `input_size` (channels, height, width), `mean`, `std` and `interpolation`.

    Raises:
        ValueError: timm knows no model of that name.
    """
    data_config = resolve_data_config(pretrained_cfg=_pretrained_cfg(config))
    size = config.image_size or (config.encoder_options or {}).get("img_size")
    if size is not None:
        data_config["input_size"] = (3, *to_2tuple(size))
    return data_config


def build_encoder(config: LymphMILConfig) -> nn.Module:
    """The timm model without classifier and with random weights: (N, 3, H, W) -> (N, D).

    Weights are loaded afterwards (`load_encoder_weights`), never here: transformers builds models on the meta
    device and would overwrite them.

    Raises:
        ValueError: timm knows no model of that name, or it cannot take the options or the size of the images.
    """
    options = dict(config.encoder_options or {})
    fixed_input_size = _pretrained_cfg(config)["fixed_input_size"]
    if config.image_size is not None and (fixed_input_size or "img_size" in options):
        # Transformers with a fixed grid of positions are built for the size; other networks take any size.
        options["img_size"] = config.image_size
    try:
        encoder = timm.create_model(config.encoder, pretrained=False, num_classes=0, **options)
    except Exception as error:
        raise ValueError(f"encoder={config.encoder!r} cannot be built with {options}: {error}") from error
    if config.image_size is not None:
        _check_image_size(config.encoder, json.dumps(options), config.image_size)
    return encoder


def embedding_size(encoder: nn.Module) -> int:
    """Width D of the vectors that the encoder gives."""
    return encoder.head_hidden_size


def encode_cells(encoder: nn.Module, cells: torch.Tensor, chunk_size: int | str | None = None) -> torch.Tensor:
    """Pass cells through the encoder, at most `chunk_size` at once, in the memory of one chunk.

    Args:
        encoder: from `build_encoder`.
        cells: (N, 3, H, W), normalised by the image processor.
        chunk_size: as in `encode_in_chunks`: at least 1, `None` for all at once, or `"auto"`.

    Returns:
        (N, D)
    """
    return encode_in_chunks(encoder, cells, chunk_size)


def _known(name: str) -> str:
    if not timm.is_model(name):
        near = sorted(timm.list_models(), key=lambda known: _likeness(name, known), reverse=True)[:5]
        raise ValueError(f"encoder={name!r}: timm {timm.__version__} has no such model. Near: {', '.join(near)}.")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tagged = timm.list_pretrained(f"{split_model_name_tag(name)[0]}.*")
        raise ValueError(f"encoder={name!r}: {error} Published: {', '.join(tagged) or 'none'}.") from error
    return name


def _likeness(name: str, known: str) -> tuple[float, float]:
    """Of the beginnings first: timm's names are long, and what is asked for is often short."""
    return tuple(SequenceMatcher(None, name, other).ratio() for other in (known[: len(name)], known))


def _pretrained_cfg(config: LymphMILConfig) -> dict[str, Any]:
    overlay = (config.encoder_options or {}).get("pretrained_cfg_overlay")
    return resolve_pretrained_cfg(_known(config.encoder), pretrained_cfg_overlay=overlay).to_dict()


def _published_arguments(name: str) -> dict[str, Any]:
    try:
        return resolve_model_input_args(name)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{name}: what is there is not a timm model ({type(error).__name__}: {error}).") from error
    except Exception as error:
        if name.startswith("local-dir:"):
            raise
        raise ConnectionError(f"{name} could not be fetched ({type(error).__name__}: {error}).") from error


@functools.lru_cache
def _check_image_size(name: str, options: str, size: int) -> None:
    """Try an image on the meta device, where tensors have shapes only and nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        encoder = timm.create_model(name, num_classes=0, **json.loads(options))
        patch = to_2tuple(getattr(getattr(encoder, "patch_embed", None), "patch_size", None) or 1)[0]
        if rest := size % patch:
            raise ValueError(
                f"image_size={size}: {name} cuts images into patches of {patch} pixels and would drop the last {rest}. "
                f"Choose {size - rest or patch} or {size - rest + patch}."
            )
        try:
            encoder(torch.empty(2, 3, size, size))
        except Exception as error:
            raise ValueError(
                f"image_size={size}: {name} cannot take it ({error}). Its own size is "
                f"{timm.get_pretrained_cfg(name).input_size[-1]}."
            ) from error


__all__ = [
    "EncoderChoice",
    "build_encoder",
    "embedding_size",
    "encode_cells",
    "encoder_data_config",
    "resolve_encoder",
]
