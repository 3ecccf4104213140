"""Weights for a cell encoder, from wherever and however they were published."""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict_from_hf
from torch import nn

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

_WEIGHT_FILES = ("model.safetensors", "*.safetensors", "*.pth", "*.pt", "*.bin")
# Part of a masked autoencoder that holds its own patches, positions and norm -> name in timm.
_MAE_NAMES = {
    "patchify.": "patch_embed.proj.",
    "transformer.": "blocks.",
    "layer_norm.": "norm.",
    "cls_token": "cls_token",
}


@dataclass(frozen=True)
class WeightReport:
    """Which tensors of an encoder a weight source filled.

    Attributes:
        source: where the weights come from, with the wrapper's name they were found under.
        matched: names that were loaded, the resized ones included.
        resized: names loaded in another shape than published, such as positions for another input size.
        missing: names of the encoder that the source lacks or holds in another shape; they stay as they were.
        unexpected: names in the source that the encoder lacks, such as a classifier.
        share: fraction of the encoder's numbers that were loaded, in [0, 1].
    """

    source: str
    matched: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    share: float

    def summary(self) -> str:
        """One line for a log, and one more for every group of names that is not empty."""
        lines = [f"Encoder weights from {self.source}: {self.share:.1%} of the encoder's numbers loaded."]
        for kind in ("resized", "missing", "unexpected"):
            if names := getattr(self, kind):
                lines.append(f"  {kind}: {_first(names)}")
        return "\n".join(lines)


def load_encoder_weights(encoder: nn.Module, source: str | Path, *, minimum_share: float = 0.9) -> WeightReport:
    """Fill an encoder with weights, and tell what was filled.

    Layouts are recognised by their names: timm's own, whatever wrapper they stand in (a model of this package, a
    `teacher` or averaged copy beside its student), those timm converts (DINOv2, DINOv3, CLIP ...), and a masked
    autoencoder that keeps patches, positions and norm beside timm's blocks.

    Args:
        encoder: from `build_encoder`; changed in place, and only when enough matches.
        source: `"timm"` for the weights that timm publishes for this model; `"hf-hub:owner/name"` or
            `"local-dir:folder"` for a timm model; or a file or folder of weights: `.safetensors`, or a foreign
            `.pt`, `.pth`, `.bin` of plain tensors.
        minimum_share: refuse when a smaller fraction of the encoder's numbers is found in the source.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no weights.
        ValueError: the file is a pickle of more than tensors, too little of it matches, or a weight is not finite.
        ConnectionError: the weights cannot be fetched.
    """
    tensors = _mae_names(_source_tensors(encoder, str(source)))
    prefixes = dict.fromkeys((_best_prefix(tensors, encoder.state_dict()), ""))
    attempts = [_match(encoder, tensors, prefix, str(source)) for prefix in prefixes]
    report, fitting = max(attempts, key=lambda attempt: attempt[0].share)
    if report.share < minimum_share:
        raise ValueError(
            f"{report.source}: only {report.share:.1%} of the encoder's numbers are in it, expected at least "
            f"{minimum_share:.0%}. Is it another architecture? Missing: {_first(report.missing)}; "
            f"unexpected: {_first(report.unexpected)}."
        )
    if broken := [name for name, tensor in fitting.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{report.source}: not finite: {_first(broken)}. Take a checkpoint from before it diverged.")
    encoder.load_state_dict(fitting, strict=False)
    return report


def load_first_weights(encoder: nn.Module, *sources: str | Path | None) -> None:
    """Fill an encoder from the first source that is given, and log what was filled; without one it stays as it is.

    Args:
        encoder: from `build_encoder`.
        sources: as in `load_encoder_weights`; `None` is passed over.
    """
    source = next(filter(None, sources), None)
    if source is not None:
        logger.info("%s", load_encoder_weights(encoder, source).summary())


def read_tensors(path: Path) -> Tensors:
    """Named tensors of a weight file, or of the weight file (or its shards) in a folder.

    Tables inside tables, as `{"teacher": {"backbone.norm.weight": ...}}`, come as one with dotted names.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: several weight files to choose from, or a pickle that holds more than tensors; it is not executed.
    """
    files = [path] if path.is_file() else _weight_files(path)
    tensors: Tensors = {}
    for file in files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if not tensors:
        raise ValueError(f"{path}: holds no named tensors.")
    return tensors


def _source_tensors(encoder: nn.Module, source: str) -> Tensors:
    kind, _, place = source.partition(":")
    if source == "timm":
        cfg = encoder.pretrained_cfg
        name = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
        return _fetch(name, lambda: timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    if kind == "hf-hub":
        return _fetch(source, lambda: dict(_flat(load_state_dict_from_hf(place, weights_only=True))))
    return read_tensors(Path(place if kind == "local-dir" else source))


def _fetch(name: str, load: Callable[[], Tensors]) -> Tensors:
    try:
        return load()
    except Exception as error:
        raise ConnectionError(
            f"The weights published as {name} could not be loaded ({type(error).__name__}: {error}). "
            "Check the connection, or give a local file of weights."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The one file of weights in a folder, or the shards that its index lists."""
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        return [folder / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
    for pattern in _WEIGHT_FILES:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"{folder}: which of {', '.join(file.name for file in files)}? Give the file itself.")
        if files:
            return files
    raise FileNotFoundError(
        f"{folder}: no weights there. Expected a .safetensors, .pth, .pt or .bin file, or its folder."
    )


def _read_pickle(path: Path) -> Tensors:
    try:
        # A training script's arguments are the one harmless thing beside tensors that many checkpoints hold.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a file of plain tensors, refused because reading it could run foreign code "
            f"({type(error).__name__}). Ask its author for safetensors, or convert it where you trust it."
        ) from error
    return dict(_flat(content))


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested tables, named by their path; tables numbered like an optimiser's state are passed over."""
    if isinstance(content, torch.Tensor) and path:
        yield path, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str):
                yield from _flat(value, f"{path}.{name}" if path else name)


def _best_prefix(tensors: Tensors, target: Tensors) -> str:
    """The wrapper's name (`backbone.`, `model.encoder.` ...) under which most tensors are the encoder's.

    Of a teacher (or averaged copy) and its student, which match alike, it is the teacher's: that is the one published.
    """
    matches: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            if end in target and target[end].shape == tensor.shape:
                matches["".join(part + "." for part in parts[:i])] += 1
    return max(
        sorted(matches, key=lambda prefix: (len(prefix), prefix)),
        key=lambda prefix: (matches[prefix], "teacher" in prefix or "ema" in prefix),
        default="",
    )


def _match(encoder: nn.Module, tensors: Tensors, prefix: str, source: str) -> tuple[WeightReport, Tensors]:
    """What of the tensors under `prefix` fits the encoder."""
    target = encoder.state_dict()
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    converted = _convert(own, encoder)
    fitting = {n: t for n, t in converted.items() if n in target and t.shape == target[n].shape}
    found = sum(target[name].numel() for name in fitting)
    report = WeightReport(
        source=f"{source} ({prefix}*)" if prefix else source,
        matched=tuple(fitting),
        resized=tuple(n for n in fitting if n in own and own[n].shape != target[n].shape),
        missing=tuple(n for n in target if n not in fitting),
        unexpected=tuple(n for n in converted if n not in target)
        + tuple(n for n in tensors if not n.startswith(prefix)),
        share=found / max(1, sum(tensor.numel() for tensor in target.values())),
    )
    return report, fitting


def _mae_names(tensors: Tensors) -> Tensors:
    """Names of timm for a masked autoencoder that keeps patches, positions and norm of its own around timm's blocks.

    It may hold the whole timm model whose blocks it borrowed, too. Those patches, positions and norm never met the
    trained blocks; they are left out, or they would be mistaken for the encoder's.
    """
    base = next((name.removesuffix("patchify.weight") for name in tensors if name.endswith("patchify.weight")), "")
    positions = tensors.get(f"{base}pos_embedding")  # (L, 1, D), none for the class token
    if positions is None:
        return tensors
    renamed = {
        new + name.removeprefix(base + old): tensor
        for name, tensor in tensors.items()
        for old, new in _MAE_NAMES.items()
        if name.startswith(base + old)
    }
    positions = positions.transpose(0, 1)
    renamed["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return renamed | {name: tensor for name, tensor in tensors.items() if not name.startswith(base)}


def _convert(tensors: Tensors, encoder: nn.Module) -> Tensors:
    """timm's own conversion of published layouts and of position embeddings to another input size."""
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return dict(convert(dict(tensors), encoder))
    except Exception as error:  # written for one publisher's layout each; another's matches by name or is refused
        logger.debug("timm could not convert the weights: %s", error)
        return tensors


def _first(names: Sequence[str], most: int = 4) -> str:
    listed = ", ".join(names[:most]) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


__all__ = ["WeightReport", "load_encoder_weights", "load_first_weights", "read_tensors"]
